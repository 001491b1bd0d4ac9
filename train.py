"""Trains every stage of one model, in order: `torchrun train.py configs/demo.toml [--section.key=value ...]`.

Finished stages are skipped; an interrupted one continues. Each stage writes only below the run's folder.
"""

import sys
import time
import tomllib
from pathlib import Path
from typing import Literal

import numpy as np
import tomli_w
import torch
import tyro
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onevocab.common.errors import UserError, cli, invalid
from onevocab.common.files import hash_json, read_json, write_atomic, write_json
from onevocab.common.provenance import provenance
from onevocab.data.codes import tokenize_in_processes
from onevocab.data.config import DataConfig, StageData
from onevocab.data.demo import write_demo
from onevocab.data.loader import PackedLoader
from onevocab.data.shards import list_shards
from onevocab.data.tokenizer_samples import clips, pictures, texts
from onevocab.evaluation.config import EvaluateConfig
from onevocab.model.config import ModelConfig
from onevocab.model.decoder import Decoder
from onevocab.tokenizers.audio import AudioConfig, AudioTokenizer
from onevocab.tokenizers.bundle import Tokenizers
from onevocab.tokenizers.image import ImageConfig, ImageTokenizer
from onevocab.tokenizers.text import TextConfig, TextTokenizer
from onevocab.training import checkpoint, distributed
from onevocab.training.autoencoder import train_autoencoder
from onevocab.training.config import TrainConfig
from onevocab.training.loop import Stopped, train_language
from onevocab.training.metrics import MetricsLog, plot_curves


class LanguageStage(TrainConfig, StageData):
    """[pretrain] and [instruct]: the same loop with other data."""


class RunConfig(BaseModel):
    """One TOML file. folder: where the run lives; threads: CPU threads a rank (0: torch's choice)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    folder: str
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(default=0, ge=0)
    wandb: str | None = None
    data: DataConfig = DataConfig()
    text: TextConfig = TextConfig()
    image: ImageConfig = ImageConfig()
    audio: AudioConfig = AudioConfig()
    model: ModelConfig
    pretrain: LanguageStage
    instruct: LanguageStage
    evaluate: EvaluateConfig = EvaluateConfig()


def read_config(path, overrides: list[str]) -> RunConfig:
    """TOML file and `--section.key=value` overrides. Raises UserError that names the key that is wrong."""
    try:
        with open(path, "rb") as file:
            data = tomllib.load(file)
        config = RunConfig.model_validate(data)
        return tyro.cli(RunConfig, default=config, args=overrides, prog="train.py CONFIG", console_outputs=True)
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}; see configs/ for examples") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    except ValidationError as error:
        raise invalid(error, path) from None


class Run:
    """A run's folder, its finished stages and what they were made of."""

    def __init__(self, config: RunConfig):
        self.config, self.folder = config, Path(config.folder)
        self.device = distributed.init(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.main = distributed.is_main()
        self.log = MetricsLog(self.folder / "metrics.jsonl" if self.main else None, config.wandb, self.folder.name)
        self.hashes: dict[str, str] = {}
        if self.main:
            resolved = config.model_dump(mode="json", exclude_none=True)
            write_atomic(self.folder / "config.toml", tomli_w.dumps(resolved))
            write_json(self.folder / "provenance.json", provenance())

    def stage(self, name: str, settings: BaseModel | dict, inputs: list[str], work) -> None:
        """Runs `work()` unless the stage is done with the same settings and inputs.

        Raises UserError when it is done with others: going on would mix two models in one folder.
        """
        made_of = {"settings": settings if isinstance(settings, dict) else settings.model_dump(mode="json"),
                   "inputs": {stage: self.hashes[stage] for stage in inputs}}
        self.hashes[name] = hash_json([name, made_of])
        done = self.folder / name / "done.json"
        if done.exists():
            before = read_json(done)
            if before["hash"] != self.hashes[name]:
                raise UserError(f"stage {name} of {self.folder} was made with other settings "
                                f"({_difference(before['made_of'], made_of)}); use another folder, or remove "
                                f"{self.folder / name} and what follows it")
            return
        if self.main:
            print(f"--- {name}", file=sys.stderr, flush=True)
        began = time.perf_counter()
        torch.manual_seed(self.config.seed)
        np.random.seed(self.config.seed)
        work()
        distributed.barrier()
        if self.main:
            write_json(done, {"hash": self.hashes[name], "seconds": round(time.perf_counter() - began, 1),
                              "made_of": made_of})
            if (self.folder / "metrics.jsonl").exists():
                plot_curves(self.folder / "metrics.jsonl", name, self.folder / name / "curves.png")
        distributed.barrier()

    def on_main(self, work) -> None:
        """Work that one rank does while the others wait."""
        if self.main:
            work()
        distributed.barrier()

    # ------------------------------------------------------------------------------------------------ the stages

    @property
    def raw_shards(self) -> list[str]:
        return [str(file) for path in self.config.data.shards for file in list_shards(self.folder / path)]

    def write_shards(self) -> None:
        self.on_main(lambda: self.config.data.demo and write_demo(self.folder / "shards", self.config.data.demo))

    def train_text(self) -> None:
        def work():
            sample = texts(self.raw_shards, self.config.data.tokenizer_samples)
            tokenizer = TextTokenizer.train(sample, self.config.text)
            write_json(self.folder / "text" / "text.json", tokenizer.to_json())

        self.on_main(work)

    def train_image(self) -> None:
        tokenizer = ImageTokenizer(self.config.image)
        pixels = pictures(self.raw_shards, self.config.data.tokenizer_samples, tokenizer)

        def sample(generator: torch.Generator) -> torch.Tensor:
            chosen = self._choose(len(pixels), self.config.image.batch_size, generator)
            return tokenizer.prepare(pixels[chosen].to(self.device))

        self._train_autoencoder("image", tokenizer, sample, self.config.image)

    def train_audio(self) -> None:
        tokenizer = AudioTokenizer(self.config.audio)
        mels = clips(self.raw_shards, self.config.data.tokenizer_samples, tokenizer)
        if len(mels):
            tokenizer.mean.fill_(mels.mean())
            tokenizer.deviation.fill_(mels.std())

        def sample(generator: torch.Generator) -> torch.Tensor:
            chosen = self._choose(len(mels), self.config.audio.batch_size, generator)
            return tokenizer.standardise(mels[chosen].to(self.device))

        if len(mels):
            self._train_autoencoder("audio", tokenizer, sample, self.config.audio)

    @staticmethod
    def _choose(count: int, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        """This rank's part of a batch that is the same for every number of ranks."""
        return torch.randint(count, (batch_size,), generator=generator)[distributed.rank() :: distributed.world()]

    def _train_autoencoder(self, name: str, tokenizer, sample, settings) -> None:
        tokenizer.to(self.device)
        train_autoencoder(tokenizer, sample, settings.steps, settings.learning_rate, self.folder / name, self.log, name,
                          self.config.seed)

    def tokenizers(self) -> Tokenizers:
        """Gathers the trained tokenizers below `tokenizers/`, once, and loads them."""
        folder = self.folder / "tokenizers"
        if not (folder / "vocabulary.json").exists():
            def work():
                media = {}
                for name, tokenizer in (("image", ImageTokenizer(self.config.image)),
                                        ("audio", AudioTokenizer(self.config.audio))):
                    if checkpoint.load_latest(self.folder / name, tokenizer, restore_rng=False):
                        media[name] = tokenizer
                text = TextTokenizer.from_json(read_json(self.folder / "text" / "text.json"))
                Tokenizers(text, media).save(folder)

            self.on_main(work)
        return Tokenizers.load(folder)

    def write_codes(self) -> None:
        self.tokenizers()
        self.on_main(lambda: tokenize_in_processes(self.raw_shards, self.folder / "codes", self.folder / "tokenizers",
                                                   self.config.data.workers))

    def train_stage(self, name: str, settings: LanguageStage, init_from: str | None) -> None:
        tokenizers = self.tokenizers()
        sources = [source.model_copy(update={"path": str(self.folder / source.path)}) for source in settings.sources]
        loader = PackedLoader(sources, tokenizers, settings.loader, distributed.rank(), distributed.world(),
                              self.config.seed)
        if self.main:
            print(f"{name}: {loader.summary()}", file=sys.stderr)
        decoder = Decoder(self.config.model, tokenizers.vocab.size).to(self.device)
        if init_from:
            weights, _ = checkpoint.load_weights(checkpoint.list_steps(self.folder / init_from)[0])
            checkpoint.load_into(decoder, weights, self.folder / init_from)
        info = {"config": self.config.model.model_dump(mode="json"), "vocab_size": tokenizers.vocab.size,
                "vocabulary": tokenizers.vocab.hash, "stage": name}
        train_language(decoder, loader, settings, self.folder / name, info, tokenizers.vocab.modalities, self.log, name,
                       self.device)


def _difference(before: dict, after: dict, path: str = "") -> str:
    """The first setting in which two nested values differ: "settings.steps: 100 then, 200 now"."""
    for key in sorted(before.keys() | after.keys()):
        one, two = before.get(key), after.get(key)
        if isinstance(one, dict) and isinstance(two, dict):
            if found := _difference(one, two, f"{path}{key}."):
                return found
        elif one != two:
            return f"{path}{key}: {one} then, {two} now"
    return ""


@cli
def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        raise UserError("which configuration? For example: torchrun train.py configs/demo.toml")
    config = read_config(arguments[0], arguments[1:])
    run = Run(config)
    shared = {"seed": config.seed, "samples": config.data.tokenizer_samples}
    try:
        run.stage("shards", config.data, [], run.write_shards)
        run.stage("text", config.text.model_dump(mode="json") | shared, ["shards"], run.train_text)
        run.stage("image", config.image.model_dump(mode="json") | shared, ["shards"], run.train_image)
        run.stage("audio", config.audio.model_dump(mode="json") | shared, ["shards"], run.train_audio)
        run.stage("codes", {}, ["shards", "text", "image", "audio"], run.write_codes)
        language = config.model.model_dump(mode="json") | {"seed": config.seed}
        run.stage("pretrain", config.pretrain.model_dump(mode="json") | {"model": language}, ["codes"],
                  lambda: run.train_stage("pretrain", config.pretrain, None))
        run.stage("instruct", config.instruct.model_dump(mode="json") | {"model": language}, ["codes", "pretrain"],
                  lambda: run.train_stage("instruct", config.instruct, "pretrain"))
        if run.main:
            print(f"done: {run.folder}. Try: python sample.py {run.folder} --text 'Draw a dog at the top left on a "
                  f"blue background.' --want image; evaluate: python -m onevocab.evaluation {run.folder}")
    except Stopped as stopped:
        if run.main:
            print(stopped, file=sys.stderr)
    finally:
        distributed.finish()


if __name__ == "__main__":
    main()
