"""The configuration of a run: one TOML file and what the command line says over it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from onevocab.common.errors import UserError
from onevocab.common.files import read_toml
from onevocab.common.paths import HomePath, expand_home
from onevocab.data.loader import LoaderConfig
from onevocab.data.source import Source
from onevocab.demo.writer import DemoConfig
from onevocab.evaluation.config import EvaluateConfig
from onevocab.model.config import ModelSection
from onevocab.pipeline.settings import merge, overrides, validated
from onevocab.pipeline.sources import open_source, take_shape
from onevocab.tokenizers.modalities import MODALITIES
from onevocab.tokenizers.text import TextConfig
from onevocab.training.config import TrainConfig


class DataConfig(BaseModel):
    """[data]: where the samples come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    demo: DemoConfig | None = Field(None, description="write the demo world's shards first")
    shards: tuple[HomePath, ...] = Field(("shards",), min_length=1, description="raw shards: folders, globs, files or "
                                         "addresses, paths relative to the run's folder; tokenizers are trained on "
                                         "them, and they are turned to codes")
    tokenizer_samples: int = Field(12_000, ge=1, description="about how many samples with a text, or files of a "
                                   "modality, each tokenizer is trained on")
    max_bad_fraction: float = Field(0.01, ge=0, le=1, description="share of bad samples above which a stage stops")
    workers: int = Field(2, ge=1, description="processes that turn media to codes, and that encode "
                         "documents for the token cache")


class PhaseConfig(BaseModel):
    """Steps start .. start + steps - 1 of a stage read these sources instead of the usual ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    start: int = Field(ge=0, description="first step")
    steps: int = Field(ge=1, description="how many")
    sources: tuple[Source, ...] = Field(min_length=1, description="what is read in them")


class StageData(BaseModel):
    """What a language stage reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    sources: tuple[Source, ...] = Field(min_length=1, description="shards of codes, paths relative to the "
                                        "run's folder")
    loader: LoaderConfig = LoaderConfig()
    phases: tuple[PhaseConfig, ...] = Field((), description="steps that read other sources")

    @property
    def every_source(self) -> list[Source]:
        """The usual ones, and those of the phases."""
        return [*self.sources, *(source for phase in self.phases for source in phase.sources)]

    @model_validator(mode="after")
    def _apart(self):
        phases = sorted(self.phases, key=lambda phase: phase.start)
        for one, two in zip(phases, phases[1:], strict=False):
            if one.start + one.steps > two.start:
                raise ValueError(f"phases overlap: {one.steps} steps from {one.start} on, and one from {two.start} on")
        return self


class LanguageStage(TrainConfig, StageData):
    """[pretrain] and [instruct]: the same loop with other data."""

    batch_tokens: int = Field(0, ge=0, description="tokens of a step over all ranks, padding included, in place of "
                              "loader.global_batch_size (0: that holds)")

    @model_validator(mode="after")
    def _within(self):
        late = [phase.start for phase in self.phases if phase.start + phase.steps > self.steps]
        if late:
            raise ValueError(f"the phase from step {late[0]} on ends after the stage's {self.steps} steps")
        if self.batch_tokens % self.loader.seq_len:
            raise ValueError(f"batch_tokens ({self.batch_tokens}) is not a multiple of loader.seq_len "
                             f"({self.loader.seq_len})")
        return self

    @property
    def rows(self) -> LoaderConfig:
        """`loader`, with as many rows a step as `batch_tokens` are."""
        if not self.batch_tokens:
            return self.loader
        return self.loader.model_copy(update={"global_batch_size": self.batch_tokens // self.loader.seq_len})


class _Run(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    folder: HomePath = Field(min_length=1, description="where the run lives")
    init_from: HomePath | None = Field(None, description="a run whose tokenizers and weights this one starts from")
    seed: int = Field(0, description="seed of all random numbers")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    threads: int = Field(0, ge=0, description="CPU threads a rank (0: torch's choice)")
    device_flops: float = Field(0.0, ge=0, description="FLOP/s of a device as its data sheet says, for the MFU (0: "
                                "what a plain product reaches here)")
    wandb: str | None = Field(None, description="project at Weights & Biases (default: none)")
    data: DataConfig = DataConfig()
    text: TextConfig = TextConfig()
    model: ModelSection
    pretrain: LanguageStage
    instruct: LanguageStage
    evaluate: EvaluateConfig = EvaluateConfig()

    @property
    def modalities(self) -> list[str]:
        """The media that the configuration has a section for, in the order of the vocabulary."""
        return [name for name in MODALITIES if getattr(self, name) is not None]


# One TOML file. A section for each registered modality; the run trains those that are there.
RunConfig = create_model("RunConfig", __base__=_Run, **{
    name: (modality.config | None, Field(None, description=f"the tokenizer of {modality.plural}"))
    for name, modality in MODALITIES.items()})


def read_config(path, words: list[str]) -> RunConfig:
    """TOML file and `--section.key=value` words. Raises UserError that names the key that is wrong."""
    path = expand_home(str(path))
    try:
        data = read_toml(path)
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}; see configs/ for examples") from None
    said = overrides(RunConfig, words)
    config = validated(RunConfig, data, path, said)
    source = open_source(config.model.init, config.init_from)
    model = take_shape(source, config.model, merge(data, said).get("model", {}))
    return config.model_copy(update={"model": model})
