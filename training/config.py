"""How one language stage is trained."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from onevocab.training.muon import OptimizerConfig
from onevocab.training.schedule import ScheduleConfig


class TrainConfig(BaseModel):
    """steps: optimiser steps; micro_rows: rows of a rank's step that are computed at once, their gradients are added up
    (0: all); parallel: every rank has all weights, or a part of each; recompute: activations are computed again in the
    backward pass instead of kept; compile: the layers, by torch.compile; z_loss: weight of log(Z)^2 (PaLM, Chowdhery et
    al. 2022); clip: largest gradient norm; precision: of the matmuls, "auto" is the faster one here; new_rows_steps: so
    many steps at the start train only the rows that a pretrained vocabulary did not have; max_bad_steps: so many
    non-finite losses in a row stop the run; stall_seconds: a rank that waits so long for data or for another rank ends
    the run (0: never); background_save: checkpoints are written while training goes on, "auto": on a GPU; *_every: in
    steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    steps: int = Field(default=1000, ge=1)
    micro_rows: int = Field(default=0, ge=0)
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    recompute: bool = False
    compile: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    z_loss: float = Field(default=1e-5, ge=0)
    clip: float = Field(default=1.0, gt=0)
    new_rows_steps: int = Field(default=0, ge=0)
    max_bad_steps: int = Field(default=10, ge=1)
    stall_seconds: float = Field(default=1800.0, ge=0)
    log_every: int = Field(default=20, ge=1)
    background_save: Literal["auto", "on", "off"] = "auto"
    save_every: int = Field(default=500, ge=1)
