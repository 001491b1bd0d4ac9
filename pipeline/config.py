"""The configuration of a run: one TOML file and what the command line says over it."""

import tomllib
from typing import Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from onevocab.common.errors import UserError, invalid
from onevocab.data.loader import LoaderConfig, Source
from onevocab.demo.writer import DemoConfig
from onevocab.evaluation.config import EvaluateConfig
from onevocab.model.config import ModelSection
from onevocab.pipeline.sources import open_source, take_shape
from onevocab.tokenizers.audio import AudioConfig
from onevocab.tokenizers.image import ImageConfig
from onevocab.tokenizers.text import TextConfig
from onevocab.training.config import TrainConfig


class DataConfig(BaseModel):
    """demo: write the demo world's shards first; shards: folders, globs or files of raw shards that train the
    tokenizers and are turned to codes (relative to the run folder); tokenizer_samples: how many pictures, sounds and
    texts the tokenizers are trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    demo: DemoConfig | None = None
    shards: tuple[str, ...] = ("shards",)
    tokenizer_samples: int = Field(default=12_000, ge=1)
    workers: int = Field(default=2, ge=1, description="processes that turn media to codes")


class PhaseConfig(BaseModel):
    """Steps start .. start + steps - 1 of a stage read these sources instead of the usual ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    start: int = Field(ge=0)
    steps: int = Field(ge=1)
    sources: tuple[Source, ...]


class StageData(BaseModel):
    """What a language stage reads: code shards below the run folder's `codes/`, how they become rows, and phases that
    interrupt them."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    sources: tuple[Source, ...]
    loader: LoaderConfig = LoaderConfig()
    phases: tuple[PhaseConfig, ...] = ()

    @model_validator(mode="after")
    def _apart(self):
        phases = sorted(self.phases, key=lambda phase: phase.start)
        for one, two in zip(phases, phases[1:], strict=False):
            if one.start + one.steps > two.start:
                raise ValueError(f"phases overlap: {one.steps} steps from {one.start} on, and one from {two.start} on")
        return self


class LanguageStage(TrainConfig, StageData):
    """[pretrain] and [instruct]: the same loop with other data. batch_tokens: of a step over all ranks, padding
    included, in place of `loader.global_batch_size` (0: that holds)."""

    batch_tokens: int = Field(default=0, ge=0)

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


class RunConfig(BaseModel):
    """One TOML file. folder: where the run lives; init_from: a run whose tokenizers and weights this one starts from;
    threads: CPU threads a rank (0: torch's choice); device_flops: FLOP/s of a device as its data sheet says, for the
    MFU (0: what a plain product reaches here)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    folder: str
    init_from: str | None = None
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(default=0, ge=0)
    device_flops: float = Field(default=0.0, ge=0)
    wandb: str | None = None
    data: DataConfig = DataConfig()
    text: TextConfig = TextConfig()
    image: ImageConfig = ImageConfig()
    audio: AudioConfig = AudioConfig()
    model: ModelSection
    pretrain: LanguageStage
    instruct: LanguageStage
    evaluate: EvaluateConfig = EvaluateConfig()


def read_config(path, overrides: list[str]) -> RunConfig:
    """TOML file and `--section.key=value` overrides. Raises UserError that names the key that is wrong."""
    try:
        with open(path, "rb") as file:
            data = tomllib.load(file)
        config = RunConfig.model_validate(data)
        # AvoidSubcommands: --data.demo.seed=1 is an option like any other although [data.demo] may be absent.
        config = tyro.cli(RunConfig, default=config, args=overrides, prog="train.py CONFIG",
                          config=(tyro.conf.AvoidSubcommands,))
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}; see configs/ for examples") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    except ValidationError as error:
        raise invalid(error, path) from None
    source = open_source(config.model.init, config.init_from)
    model = take_shape(source, config.model, data.get("model", {}), overrides)
    return config.model_copy(update={"model": model})
