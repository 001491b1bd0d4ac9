"""How much is evaluated, and how replies are drawn."""

from pydantic import BaseModel, ConfigDict, Field


class EvaluateConfig(BaseModel):
    """The `[evaluate]` section. Counts are items; every split of a task is cut to `--limit` when that is given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: str = Field("onevocab.demo.tasks", description="the module whose TASKS are asked, by its dotted name")
    seed: int = 0
    batch: int = Field(64, ge=1)
    captions: int = Field(150, ge=1, description="scenes described and drawn; enough that every name appears")
    items: int = Field(96, ge=1, description="items of each other task")
    controls: int = Field(64, ge=1, description="items of each control: shuffled media, unseen style or voice")
    reconstructions: int = Field(200, ge=1)
    malformed: int = Field(1000, ge=1, description="replies that are drawn hot and checked for their form")
    malformed_temperature: float = Field(1.5, ge=0)
    text_temperature: float = Field(0.0, ge=0)
    image_temperature: float = Field(0.7, ge=0)
    audio_temperature: float = Field(0.7, ge=0)
    max_text_tokens: int = Field(128, ge=8)
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = Field(1.0, ge=0, description="classifier-free guidance of pictures; 1 is none")
    judge_steps: int = Field(220, ge=20, description="training steps of the picture judge")
    judge_floor: float = Field(0.5, ge=0, le=1, description="below this probability the judge sees nothing")
    candidates: int = Field(20, ge=2, description="phrases among which the speech judge decides")
    gallery: int = Field(16, ge=1, description="drawings shown, of seeds 0, 1, ...; never selected")
