"""The learning rate over time, as a pure function of the step."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ScheduleConfig(BaseModel):
    """A linear warm-up, then what `kind` says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["wsd", "cosine", "constant"] = Field("wsd", description="wsd: stable, then a linear decay over the "
                                                       "last part (Hu et al. 2024, MiniCPM); cosine: from the end of "
                                                       "the warm-up to the end (Loshchilov and Hutter 2017); constant: "
                                                       "no decay")
    warmup: float = Field(0.02, ge=0, lt=1, description="length of the warm-up, as a part of all steps")
    decay: float = Field(0.4, ge=0, le=1, description="length of wsd's decay, as a part of all steps")
    floor: float = Field(0.0, ge=0, le=1, description="what the learning rates are multiplied by at the end")

    @model_validator(mode="after")
    def _fits(self):
        if self.kind == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"warmup ({self.warmup}) and decay ({self.decay}) together are more than all steps")
        return self


def multiplier(config: ScheduleConfig, step: int, total: int) -> float:
    """The factor of every learning rate at step 0 .. total - 1, in [0, 1]; never 0 before the decay's last step."""
    warmup = round(config.warmup * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.kind == "constant":
        return 1.0
    length = total - warmup if config.kind == "cosine" else round(config.decay * total)
    progress = (step - (total - length)) / length if length else 0.0
    progress = min(max(progress, 0.0), 1.0)
    falling = (1 + math.cos(math.pi * progress)) / 2 if config.kind == "cosine" else 1 - progress
    return config.floor + (1 - config.floor) * falling
