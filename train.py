"""Trains every stage of one model, in order: `torchrun train.py configs/demo.toml [--section.key=value ...]`.

Finished stages are skipped; an interrupted one continues. Each stage writes only below the run's folder.
"""

import os
import sys
import time
import tomllib
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tomli_w
import torch
import tyro
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from onevocab.common.errors import UserError, cli, invalid
from onevocab.common.files import hash_json, read_json, write_atomic, write_json
from onevocab.common.provenance import first_difference, provenance
from onevocab.data.codes import tokenize_in_processes
from onevocab.data.config import DataConfig, StageData
from onevocab.data.curriculum import Curriculum, Lesson
from onevocab.data.demo import write_demo
from onevocab.data.loader import Batch, LoaderConfig, PackedLoader
from onevocab.data.remote import is_remote, list_sources
from onevocab.data.tokenizer_samples import clips, pictures, texts
from onevocab.evaluation.config import EvaluateConfig
from onevocab.generation.sources import open_source, take_shape
from onevocab.model.config import ModelSection
from onevocab.model.decoder import Decoder
from onevocab.tokenizers.audio import AudioConfig, AudioTokenizer
from onevocab.tokenizers.bundle import Tokenizers, load_media_tokenizer, save_media_tokenizer
from onevocab.tokenizers.image import ImageConfig, ImageTokenizer
from onevocab.tokenizers.text import TextConfig, TextTokenizer
from onevocab.tokenizers.vocab import Vocabulary
from onevocab.training import checkpoint, distributed
from onevocab.training.autoencoder import train_autoencoder
from onevocab.training.config import TrainConfig
from onevocab.training.faults import Stopped, alone
from onevocab.training.loop import NextTokenLoss, train_language
from onevocab.training.metrics import MetricsLog, curves, read_metrics
from onevocab.training.plan import PlanConfig, probe, si, stage_lines
from onevocab.training.precision import device_flops


class LanguageStage(TrainConfig, StageData):
    """[pretrain] and [instruct]: the same loop with other data. batch_tokens: of a step over all ranks, padding
    included, in place of `loader.rows_per_step` (0: that holds)."""

    batch_tokens: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _within(self):
        late = [lesson.start for lesson in self.lessons if lesson.start + lesson.steps > self.steps]
        if late:
            raise ValueError(f"the lesson from step {late[0]} on ends after the stage's {self.steps} steps")
        if self.batch_tokens % self.loader.row_length:
            raise ValueError(f"batch_tokens ({self.batch_tokens}) is not a multiple of loader.row_length "
                             f"({self.loader.row_length})")
        return self

    @property
    def rows(self) -> LoaderConfig:
        """`loader`, with as many rows a step as `batch_tokens` are."""
        if not self.batch_tokens:
            return self.loader
        return self.loader.model_copy(update={"rows_per_step": self.batch_tokens // self.loader.row_length})


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


# Settings that change how fast a stage runs or what it says, not what it makes.
INCIDENTAL = {"workers", "log_every", "save_every", "max_bad_steps", "stall_seconds", "micro_rows", "parallel",
              "recompute", "compile", "background_save"}


class Stage(NamedTuple):
    """name: also the folder's; settings and inputs (names of stages): what the result depends on."""

    name: str
    settings: dict
    inputs: tuple[str, ...]
    work: Callable[[], None]


class Run:
    """A run's folder, its stages, and what each was made of."""

    def __init__(self, config: RunConfig):
        self.config, self.folder = config, Path(config.folder)
        self.device = distributed.init(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.main = distributed.is_main()
        shared = {"seed": config.seed, "samples": config.data.tokenizer_samples}
        language = {"seed": config.seed, "model": config.model.shape.model_dump(mode="json")}
        self.source, begun = open_source(config.model.init, config.init_from), {}
        self.kept: list[str] = []  # media whose tokenizers come from there, in the order of its vocabulary
        made_of = {name: _settings(getattr(config, name)) | shared for name in ("text", "image", "audio")}
        if self.source is not None:
            if config.init_from and self.folder.resolve() == self.source.folder.resolve():
                raise UserError(f"init_from is {self.folder} itself; use another --folder")
            self.kept = list(self.source.vocabulary().spans)
            found = distributed.together(lambda: self.source.identity() if self.main else None)
            tokenizers, weights = distributed.broadcast(found)
            made_of |= {name: {"init": tokenizers} for name in ("text", *self.kept)}
            begun = {"init": weights}
        self.stages = [
            Stage("shards", _settings(config.data), (), self.write_shards),
            Stage("text", made_of["text"], ("shards",), self.train_text),
            Stage("image", made_of["image"], ("shards",), self.train_image),
            Stage("audio", made_of["audio"], ("shards",), self.train_audio),
            Stage("codes", {}, ("shards", "text", "image", "audio"), self.write_codes),
            Stage("pretrain", _settings(config.pretrain) | language | begun, ("codes",),
                  lambda: self.train_stage("pretrain", config.pretrain, None)),
            Stage("instruct", _settings(config.instruct) | language, ("codes", "pretrain"),
                  lambda: self.train_stage("instruct", config.instruct, "pretrain")),
        ]

    def train(self) -> None:
        """Every stage in order; finished ones are skipped, an interrupted one continues.

        Raises UserError, before anything is written, when a stage was made with other settings: going on would mix
        two models in one folder.
        """
        records = distributed.together(self._check)
        with ExitStack() as held:
            self.on_main(lambda: held.enter_context(alone(self.folder)))
            self.log = MetricsLog(self.folder / "metrics.jsonl" if self.main else None, self.config.wandb,
                                  self.folder.name)
            held.callback(self.log.close)
            resolved = self.config.model_dump(mode="json", exclude_none=True)
            self.on_main(lambda: write_atomic(self.folder / "config.toml", tomli_w.dumps(resolved)))
            for stage in self.stages:
                folder = self.folder / stage.name
                if not distributed.broadcast((folder / "done.json").exists()):
                    self._run(stage, folder, records[stage.name])

    def _check(self) -> dict[str, dict]:
        """Of each stage: what it is to be made of, and the hash of that."""
        records: dict[str, dict] = {}
        for stage in self.stages:
            made_of = {"settings": stage.settings, "inputs": {name: records[name]["hash"] for name in stage.inputs}}
            record = records[stage.name] = {"hash": hash_json([stage.name, made_of]), "made_of": made_of}
            for path in (self.folder / stage.name / "done.json", self.folder / stage.name / "started.json"):
                if not path.exists():
                    continue
                found = read_json(path)
                if not isinstance(found, dict) or not isinstance(found.get("made_of", {}), dict):
                    raise UserError(f"{path} is damaged; remove {path.parent} to run that stage again")
                if found.get("hash") != record["hash"]:
                    change = first_difference(found.get("made_of", {}), made_of)
                    later = ", ".join(later.name for later in self.stages[len(records) :])
                    raise UserError(f"stage {stage.name} of {self.folder} was made with other settings ({change}); "
                                    f"use another --folder, or remove {path.parent}"
                                    + (f" and what follows from it ({later})" if later else ""))
        return records

    def _run(self, stage: Stage, folder: Path, record: dict) -> None:
        started = folder / "started.json"

        def start() -> float:
            print(f"--- {stage.name}", file=sys.stderr, flush=True)
            before = read_json(started)["seconds"] if started.exists() else 0.0
            write_json(started, record | {"seconds": before})
            return before

        before, began = self.on_main(start), time.perf_counter()
        torch.manual_seed(self.config.seed)
        np.random.seed(self.config.seed)
        try:
            stage.work()
        finally:
            if self.main:  # of all sittings; one that was killed is not counted
                seconds = round(before + time.perf_counter() - began, 1)
                with suppress(OSError):  # what went wrong in the stage is what is to be told
                    write_json(started, record | {"seconds": seconds})

        def end() -> None:
            write_json(folder / "done.json", record | {"seconds": seconds, "provenance": provenance()})
            metrics = self.folder / "metrics.jsonl"
            if metrics.exists() and (drawn := curves(read_metrics(metrics), stage.name)):
                write_atomic(folder / "curves.png", drawn)

        distributed.barrier()
        self.on_main(end)

    def on_main(self, work: Callable):
        """Work that one rank does while the others wait; when it cannot, all say so. What it returns is there alone."""
        return distributed.together(lambda: work() if self.main else None)

    # ------------------------------------------------------------------------------------------------ the stages

    @property
    def raw_shards(self) -> list[str]:
        return [source for path in self.config.data.shards for source in list_sources(placed(self.folder, path))]

    def write_shards(self) -> None:
        self.on_main(lambda: self.config.data.demo and write_demo(self.folder / "shards", self.config.data.demo))

    def train_text(self) -> None:
        def work():
            if self.source is not None:
                tokenizer = self.source.text()
            else:
                sample = texts(self.raw_shards, self.config.data.tokenizer_samples)
                tokenizer = TextTokenizer.train(sample, self.config.text)
            write_json(self.folder / "text" / "text.json", tokenizer.to_json())

        self.on_main(work)

    def keep_tokenizer(self, name: str) -> None:
        """A medium that the source knows keeps its tokenizer, whatever the configuration says."""
        self.on_main(lambda: save_media_tokenizer(self.folder / name, self.source.media()[name]))

    def train_image(self) -> None:
        if "image" in self.kept:
            return self.keep_tokenizer("image")
        tokenizer = ImageTokenizer(self.config.image)
        pixels = distributed.together(
            lambda: pictures(self.raw_shards, self.config.data.tokenizer_samples, tokenizer))

        def sample(generator: torch.Generator) -> torch.Tensor:
            chosen = self._choose(len(pixels), self.config.image.batch_size, generator)
            return tokenizer.prepare(pixels[chosen].to(self.device))

        self._train_autoencoder("image", tokenizer, sample, self.config.image)

    def train_audio(self) -> None:
        if "audio" in self.kept:
            return self.keep_tokenizer("audio")
        tokenizer = AudioTokenizer(self.config.audio)
        mels = distributed.together(lambda: clips(self.raw_shards, self.config.data.tokenizer_samples, tokenizer))
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
        if settings.batch_size < distributed.world():
            raise UserError(f"{name}.batch_size = {settings.batch_size} leaves some of the {distributed.world()} ranks "
                            f"without a part; make it larger, or train up to stage {name} on fewer ranks")
        tokenizer.to(self.device)
        train_autoencoder(tokenizer, sample, settings.steps, settings.learning_rate, self.folder / name, self.log, name,
                          self.config.seed)

    def write_codes(self) -> None:
        """Gathers the trained tokenizers below `tokenizers/`, then turns all media to codes."""
        self.on_main(self._gather_tokenizers)
        self.on_main(lambda: tokenize_in_processes(self.raw_shards, self.folder / "codes", self.folder / "tokenizers",
                                                   self.config.data.workers))

    def _gather_tokenizers(self) -> None:
        media = {name: load_media_tokenizer(self.folder / name, name) for name in self.kept}
        for tokenizer in (ImageTokenizer(self.config.image), AudioTokenizer(self.config.audio)):
            steps = checkpoint.list_steps(self.folder / tokenizer.name)
            if steps and tokenizer.name not in self.kept:
                try:
                    weights, _ = checkpoint.load_weights(steps[0])
                except UserError as error:
                    raise UserError(f"{error}; remove {self.folder / tokenizer.name / 'done.json'} to train its last "
                                    "steps again") from None
                checkpoint.load_into(tokenizer, weights, steps[0])
                media[tokenizer.name] = tokenizer
        text = TextTokenizer.from_json(read_json(self.folder / "text" / "text.json"))
        Tokenizers(text, media).save(self.folder / "tokenizers")

    def train_stage(self, name: str, settings: LanguageStage, after: str | None) -> None:
        steps = distributed.broadcast([path.name for path in checkpoint.list_steps(self.folder / (after or name))])
        vocabulary, loader, decoder = distributed.together(lambda: self._make_ready(name, settings, after, steps))
        if len(set(distributed.gather(hash_json(loader.state_dict())))) > 1:
            raise UserError(f"{name}: the ranks see different data; all of them need the same shards")
        info = {"config": self.config.model.shape.model_dump(mode="json"), "vocab_size": vocabulary.size,
                "vocabulary": vocabulary.hash, "stage": name}
        train_language(decoder, loader, settings, self.folder / name, info, vocabulary.modalities, self.log, name,
                       self.device, lambda precision: self.config.device_flops or device_flops(self.device, precision))

    def _make_ready(self, name: str, settings: LanguageStage, after: str | None, steps: list[str]):
        """Vocabulary, loader and decoder of a stage; steps: checkpoints of `after`, or of the stage, newest first."""
        tokenizers = Tokenizers.load(self.folder / "tokenizers")

        def read(sources) -> PackedLoader:
            sources = [source.model_copy(update={"path": placed(self.folder, source.path)}) for source in sources]
            loader = PackedLoader(sources, tokenizers, settings.rows, distributed.rank(), distributed.world(),
                                  self.config.seed, self.folder / "documents",
                                  max(1, self.config.data.workers // distributed.world()))
            if self.main:
                print(f"{name}: {loader.summary()}", file=sys.stderr)
            return loader

        lessons = [Lesson(lesson.start, lesson.steps, read(lesson.sources)) for lesson in settings.lessons]
        loader = Curriculum(read(settings.sources), lessons)
        with self.device:  # where it is needed: the ranks of a machine share its memory
            decoder = Decoder(self.config.model.shape, tokenizers.vocab.size)
        if after:
            if not steps:
                raise UserError(f"{self.folder / after} holds no checkpoint; remove its done.json")
            newest = self.folder / after / steps[0]
            checkpoint.load_into(decoder, checkpoint.load_weights(newest)[0], newest)
        elif self.source is not None and not steps:
            self.source.load(decoder, tokenizers.vocab)
        decoder.old_rows = 0 if self.source is None else self.source.rows
        if settings.new_rows_steps and not 0 < decoder.old_rows < tokenizers.vocab.size:
            raise UserError(f"{name}: new_rows_steps is for a run that starts from other weights (model.init, "
                            "init_from) and adds rows to their vocabulary; leave it out")
        return tokenizers.vocab, loader, decoder


def placed(folder: Path, path: str) -> str:
    """A path of the configuration, which starts from the run's folder; an address stays."""
    return path if is_remote(path) else str(folder / path)


def plan_lines(config: RunConfig, words: list[str]) -> list[str]:
    """What `--plan` prints. Nothing is written, and no weights are made. Raises UserError on another `--plan...`."""
    pairs = [word.removeprefix("--plan").removeprefix(".").partition("=") for word in words if word != "--plan"]
    try:
        supposed = PlanConfig.model_validate({key: value for key, _, value in pairs})
    except ValidationError as error:
        raise invalid(error, "--plan") from None
    folder = Path(config.folder)
    if (folder / "tokenizers" / "vocabulary.json").is_file():
        vocabulary, said = Tokenizers.load(folder / "tokenizers").vocab, "of the trained tokenizers"
    else:
        source = open_source(config.model.init, config.init_from)
        old = Vocabulary.build(config.text.vocab_size, []) if source is None else source.vocabulary()
        media = [ImageTokenizer(config.image).layout, AudioTokenizer(config.audio).layout]
        vocabulary = old.extended([layout for layout in media if layout["name"] not in old.spans])
        said = "as configured, no tokenizers yet"
        if source is not None:
            said = f"{source.rows:,} of {source.folder}, {vocabulary.size - source.rows:,} new"

    def network(layers: int, size: int) -> NextTokenLoss:
        return NextTokenLoss(Decoder(config.model.model_copy(update={"layers": layers}), size), config.pretrain.z_loss)

    with torch.device("meta"):
        model = network(config.model.layers, vocabulary.size)
    found = [f"{si(sum(p.numel() for p in model.parameters()))} parameters; a vocabulary of {vocabulary.size:,} ids "
             f"({said})"]
    for name, stage in (("pretrain", config.pretrain), ("instruct", config.instruct)):
        # Everything but the head's weight, which is not among the activations, is the same for a small vocabulary.
        found += stage_lines(name, stage, stage.rows.rows_per_step, stage.rows.row_length, model,
                             lambda layers: network(layers, 1024), probe(Batch, 1024), supposed, config.device_flops)
        if checkpoint.list_steps(folder / name):  # so that its documents are all kept, and none is encoded here
            found += _source_lines(config, stage)
    return found


def _source_lines(config: RunConfig, stage: LanguageStage) -> list[str]:
    """How often each source is shown."""
    run = Path(config.folder)
    sources = [source.model_copy(update={"path": placed(run, source.path)}) for source in stage.sources]
    loader = PackedLoader(sources, Tokenizers.load(run / "tokenizers"), stage.rows, seed=config.seed,
                          keep=run / "documents", workers=config.data.workers)
    shown = loader.per_source()
    tokens = stage.steps * stage.rows.rows_per_step * stage.rows.row_length
    epochs = tokens / sum(held * times for _, _, held, times in shown)
    return [f"  data      {os.path.relpath(path, run)}: {documents:,} documents of {si(held)} tokens, each "
            f"{epochs * times:.3g} times" for path, documents, held, times in shown]


def _settings(model: BaseModel) -> dict:
    """What the result of a stage depends on."""
    return model.model_dump(mode="json", exclude=INCIDENTAL)


@cli
def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        raise UserError("which configuration? For example: torchrun train.py configs/demo.toml")
    asked = [word for word in arguments[1:] if word.startswith("--plan")]
    config = read_config(arguments[0], [word for word in arguments[1:] if word not in asked])
    if asked:
        print("\n".join(plan_lines(config, asked)))
        return
    try:
        run = Run(config)
        run.train()
        if run.main:
            print(f"done: {run.folder}. Try: python sample.py {run.folder} --text 'Draw a dog at the top left on a "
                  f"blue background.' --want image; evaluate: python -m onevocab.evaluation {run.folder}")
    except Stopped as stopped:
        if run.main:
            print(stopped, file=sys.stderr)
    finally:
        distributed.finish()
    distributed.leave()


if __name__ == "__main__":
    main()
