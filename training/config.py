"""How one language stage is trained."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from onevocab.training.schedule import ScheduleConfig


class OptimizerConfig(BaseModel):
    """Muon for hidden matrices, AdamW for the rest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    matrix_lr: float = Field(0.02, gt=0, description="Muon's peak learning rate, for hidden matrices; the schedule "
                             "multiplies it")
    other_lr: float = Field(4e-3, gt=0, description="AdamW's peak learning rate, for embedding, head and norms; the "
                            "schedule multiplies it")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's")
    weight_decay: float = Field(0.0, ge=0, description="decoupled, on hidden matrices; fades to zero over the stage")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="decay of the weights' moving average, which is what is used "
                           "afterwards; 0: none is kept")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's decay of the mean of gradients, and of their "
                                       "squares")
    eps: float = Field(1e-8, gt=0, description="AdamW's, added to the root of the squares")


class TrainConfig(BaseModel):
    """The loop of [pretrain] and [instruct]."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    steps: int = Field(1000, ge=1, description="optimiser steps")
    micro_batch_size: int = Field(0, ge=0, description="rows of a rank's step that are computed at once; their "
                                  "gradients are added up (0: all rows)")
    parallel: Literal["ddp", "fsdp2"] = Field("ddp", description="every rank has all weights (ddp), or a part of "
                                              "each (fsdp2)")
    activation_checkpointing: bool = Field(False, description="compute a layer's activations again in the backward "
                                           "pass instead of keeping them")
    compile: bool = Field(False, description="run the layers through torch.compile")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="of the matmuls; auto: bfloat16 on a "
                                                              "GPU that has it, and on a CPU where a short trial is "
                                                              "over 1.5 times faster with it")
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    z_loss: float = Field(1e-5, ge=0, description="weight of the z-loss, log(Z)^2, Z the sum that the softmax divides "
                          "by (PaLM, Chowdhery et al. 2022)")
    max_grad_norm: float = Field(1.0, gt=0, description="largest norm of the gradients; larger ones are scaled down")
    new_rows_steps: int = Field(0, ge=0, description="so many steps at the start train only the vocabulary's new "
                                "rows: those that the weights it starts from do not have (model.init, init_from)")
    max_bad_steps: int = Field(10, ge=1, description="so many non-finite losses in a row stop the run")
    stall_seconds: float = Field(1800.0, ge=0, description="a rank that waits so long for data or for another rank "
                                 "ends the run (0: never)")
    log_every: int = Field(20, ge=1, description="steps between two lines of metrics")
    valid_every: int = Field(200, ge=0, description="steps between two losses on held-out data; also at the end (0: "
                             "never)")
    valid_rows: int = Field(32, ge=1, description="rows of held-out data that are looked at, over all ranks")
    keep_best: bool = Field(False, description="keep a checkpoint of the lowest loss on held-out data, which then is "
                            "what the next stage and whoever samples take")
    background_save: Literal["auto", "on", "off"] = Field("auto", description="write checkpoints while training goes "
                                                          "on; auto: on a GPU")
    save_every: int = Field(500, ge=1, description="steps between two checkpoints")
