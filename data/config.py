"""[data]: where the samples come from."""

from pydantic import BaseModel, ConfigDict, Field, model_validator

from onevocab.data.demo import DemoConfig
from onevocab.data.loader import LoaderConfig, Source


class DataConfig(BaseModel):
    """demo: write the demo world's shards first; shards: folders, globs or files of raw shards that train the
    tokenizers and are turned to codes (relative to the run folder); tokenizer_samples: how many pictures, sounds and
    texts the tokenizers are trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    demo: DemoConfig | None = None
    shards: tuple[str, ...] = ("shards",)
    tokenizer_samples: int = Field(default=12_000, ge=1)
    workers: int = Field(default=2, ge=1, description="processes that turn media to codes")


class LessonConfig(BaseModel):
    """Steps start .. start + steps - 1 of a stage read these sources instead of the usual ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    start: int = Field(ge=0)
    steps: int = Field(ge=1)
    sources: tuple[Source, ...]


class StageData(BaseModel):
    """What a language stage reads: code shards below the run folder's `codes/`, how they become rows, and lessons that
    interrupt them."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    sources: tuple[Source, ...]
    loader: LoaderConfig = LoaderConfig()
    lessons: tuple[LessonConfig, ...] = ()

    @model_validator(mode="after")
    def _apart(self):
        lessons = sorted(self.lessons, key=lambda lesson: lesson.start)
        for one, two in zip(lessons, lessons[1:], strict=False):
            if one.start + one.steps > two.start:
                raise ValueError(f"lessons overlap: {one.steps} steps from {one.start} on, and one from {two.start} on")
        return self
