"""A run: its stages in order, each in a folder of its own."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tomli_w
import torch
from pydantic import BaseModel

from onevocab.common.checkpoint_files import list_steps, steps_to_use
from onevocab.common.errors import UserError
from onevocab.common.files import hash_json, read_json, write_atomic, write_json
from onevocab.common.provenance import first_difference, provenance
from onevocab.data.codes import check_raw, tokenize_in_processes
from onevocab.data.held_out import read_limits, together, write_limits
from onevocab.data.loader import PackedLoader
from onevocab.data.mixture import MixtureSchedule, Phase
from onevocab.data.shards.remote import list_sources, placed
from onevocab.data.turns import read_wordings
from onevocab.demo.writer import write_demo
from onevocab.generation import defaults as generation
from onevocab.kernels import c_library
from onevocab.kernels.backend import VARIABLE
from onevocab.model.code_rows import features_of
from onevocab.model.decoder import Decoder
from onevocab.model.weights import load_into, load_weights
from onevocab.pipeline.checks import check_folder, check_settings, check_sources, language_stages
from onevocab.pipeline.config import LanguageStage, RunConfig
from onevocab.pipeline.inputs import AWAY, FILES, changes, inspect_shards, known_files, media_of
from onevocab.pipeline.size import check_disk
from onevocab.pipeline.sources import open_source
from onevocab.pipeline.tokenizer_samples import media_files, texts
from onevocab.tokenizers.bundle import Tokenizers, load_media_tokenizer, save_media_tokenizer
from onevocab.tokenizers.modalities import MODALITIES
from onevocab.tokenizers.text import TextTokenizer
from onevocab.training import distributed
from onevocab.training.autoencoder import train_autoencoder
from onevocab.training.faults import run_lock
from onevocab.training.held_out import memorising
from onevocab.training.loop import train_language
from onevocab.training.metrics import MetricsLog, curves, read_metrics
from onevocab.training.precision import device_flops

# Settings that change how fast a stage runs, what it says or where it reads, not what it makes.
INCIDENTAL = {"shards", "workers", "max_bad_fraction", "log_every", "save_every", "max_bad_steps", "stall_seconds",
              "micro_batch_size", "parallel", "activation_checkpointing", "compile", "background_save", "valid_every",
              "valid_rows"}
DATA = "data"  # among the inputs of a stage: the raw shards


class Stage(NamedTuple):
    """name: also the folder's; settings and inputs (names of stages, DATA): what the result depends on."""

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
        # Whether the raw shards are on another machine (pipeline/packed.py).
        self.away = distributed.broadcast((self.folder / "shards" / AWAY).exists())
        shared = {"seed": config.seed, "samples": config.data.tokenizer_samples}
        self.source, self._begun = open_source(config.model.init, config.init_from), {}
        distributed.all_or_raise(lambda: check_settings(config, distributed.world(), self.source is None))
        self.kept: list[str] = []  # media whose tokenizers come from there, in the order of its vocabulary
        self._made_of = {name: _settings(getattr(config, name)) | shared for name in ("text", *config.modalities)}
        if self.source is not None:
            if config.init_from and self.folder.resolve() == self.source.folder.resolve():
                raise UserError(f"init_from is {self.folder} itself; use another --folder")
            self.kept = list(self.source.vocabulary().spans)
            identity = distributed.all_or_raise(lambda: self.source.identity() if self.main else None)
            tokenizers, weights = distributed.broadcast(identity)
            self._made_of |= {name: {"init": tokenizers} for name in ("text", *self.kept)}
            self._begun = {"init": weights}
        self.trained = [name for name in config.modalities if name not in self.kept]
        self.files, self.changed = None, ""  # of the raw shards: see `_take_in`
        self.stages = self._plan_stages()

    def _plan_stages(self) -> list[Stage]:
        config, made_of = self.config, self._made_of
        media = [*self.kept, *self.trained]  # the order of the vocabulary: a source's ids keep their meaning
        language = {"seed": config.seed, "model": config.model.shape.model_dump(mode="json"),
                    "code_features": config.model.code_features}
        return [
            Stage("shards", _settings(config.data), (), self.write_shards),
            Stage("text", made_of["text"], ("shards", DATA)[: 1 + (self.source is None)], self.train_text),
            *(Stage(name, made_of[name], ("shards", DATA)[: 1 + (name in self.trained)],
                    partial(self.train_media, name)) for name in media),
            Stage("codes", {}, ("shards", DATA, "text", *media), self.write_codes),
            Stage("pretrain", _settings(config.pretrain) | language | self._begun, ("codes",),
                  lambda: self.train_stage("pretrain", config.pretrain, None)),
            Stage("instruct", _settings(config.instruct) | language, ("codes", "pretrain"),
                  lambda: self.train_stage("instruct", config.instruct, "pretrain")),
        ]

    def _take_in(self) -> None:
        """What the raw shards are, once they are there, or were where they have stayed. A modality of which they hold
        nothing is left out of the run.

        Raises UserError when there are none, when they hold media of another modality, or when a source of a language
        stage matches the codes of none."""
        shards = self.folder / "shards"
        files = self.on_main(lambda: known_files(shards) if self.away else inspect_shards(self.raw_shards, shards))
        self.files = distributed.broadcast(files)
        self.changed = changes(known_files(self.folder / "shards"), self.files)
        there, known = media_of(self.files), {*self.kept, *self.config.modalities}
        if unknown := sorted(media_of(self.files, "bare") - known):
            shard = next(name for name, file in self.files.items() if unknown[0] in file["bare"])
            raise UserError(f"the shards hold {MODALITIES[unknown[0]].plural} ({shard}); add a section [{unknown[0]}] "
                            "to the configuration, or take these samples out")
        check_sources(self.config, list(self.files))
        if not distributed.broadcast((self.folder / "text" / "done.json").exists()):
            self.on_main(lambda: check_raw(self.raw_shards, self.config.data.max_bad_fraction))
        for name in [name for name in self.trained if name not in there]:
            self.trained.remove(name)
            if self.main:
                print(f"[{name}] is left out of this run: the shards of [data] shards hold no "
                      f"{MODALITIES[name].plural}", file=sys.stderr)
        self.stages = self._plan_stages()

    def train(self, until: str = "instruct") -> None:
        """Every stage in order, up to this one; finished ones are skipped, an interrupted one continues.

        Raises UserError, before anything is written, when a stage was made with other settings: going on would mix
        two models in one folder.
        """
        demo_first = self.config.data.demo is not None and not distributed.broadcast(
            (self.folder / "shards" / "done.json").exists())
        if not demo_first:
            self._take_in()
        records = distributed.all_or_raise(self._check)
        self.on_main(self._check_room)
        with ExitStack() as held:
            self.on_main(lambda: held.enter_context(run_lock(self.folder)))
            self.log = MetricsLog(self.folder / "metrics.jsonl" if self.main else None, self.config.wandb,
                                  self.folder.name)
            held.callback(self.log.close)
            resolved = self.config.model_dump(mode="json", exclude_none=True)
            self.on_main(lambda: write_atomic(self.folder / "config.toml", tomli_w.dumps(resolved)))
            self.on_main(lambda: write_json(self.folder / generation.FILE, self.config.evaluate.sampling))
            asked = os.environ.get(VARIABLE)  # for other kernels: then nothing is compiled
            if self.main and self.device.type == "cpu" and not asked and (problem := c_library.missing("attention")):
                print(f"{problem}; language training runs on torch alone, which is slower", file=sys.stderr)
            self._run(self.stages[0], records)
            if demo_first:
                self._take_in()
                records = distributed.all_or_raise(self._check)
            self.on_main(lambda: write_json(self.folder / "shards" / FILES, self.files))
            names = [stage.name for stage in self.stages]
            for stage in self.stages[1 : names.index(until) + 1]:
                self._run(stage, records)

    def _check_room(self) -> None:
        check_folder(self.folder, [stage.name for stage in self.stages])
        check_disk(self.config)

    def _check(self) -> dict[str, dict]:
        """Of each stage: what it is to be made of, and the hash of that."""
        digests = {name: file["digest"] for name, file in (self.files or {}).items()}
        records: dict[str, dict] = {DATA: {"hash": hash_json(digests)}}
        for stage in language_stages(self.config).values():
            for source in stage.every_source:
                read_wordings(source.placed(self.folder).wordings)
        for stage in self.stages:
            made_of = {"settings": stage.settings, "inputs": {name: records[name]["hash"] for name in stage.inputs}}
            record = records[stage.name] = {"hash": hash_json([stage.name, made_of]), "made_of": made_of}
            for path in (self.folder / stage.name / "done.json", self.folder / stage.name / "started.json"):
                if not path.exists():
                    continue
                old = read_json(path)
                if not isinstance(old, dict) or not isinstance(old.get("made_of", {}), dict):
                    raise UserError(f"{path} is damaged; remove {path.parent} to run that stage again")
                if old.get("hash") != record["hash"] and (self.files or stage is self.stages[0]):
                    change = first_difference(old.get("made_of", {}), made_of)
                    what = f"made with other settings ({change})"
                    if change.startswith(f"inputs.{DATA}:"):
                        what = "made from other raw shards" + (f" ({self.changed})" if self.changed else "")
                    later = ", ".join(later.name for later in self.stages[self.stages.index(stage) + 1 :])
                    raise UserError(f"stage {stage.name} of {self.folder} was {what}; "
                                    f"use another --folder, or remove {path.parent}"
                                    + (f" and what follows from it ({later})" if later else ""))
        return records

    def _run(self, stage: Stage, records: dict[str, dict]) -> None:
        """Unless it is done."""
        folder, record = self.folder / stage.name, records[stage.name]
        if distributed.broadcast((folder / "done.json").exists()):
            return
        if self.away and stage.name not in language_stages(self.config):
            raise UserError(f"stage {stage.name} of {self.folder} is not done, and its raw shards are on the machine "
                            "where the run was packed: make its codes there, and pack it again")
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
        """Work that rank 0 does while the others wait; when it cannot, all raise. Returns the result on rank 0, None
        elsewhere."""
        return distributed.all_or_raise(lambda: work() if self.main else None)

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
                sample = texts(self.raw_shards, self.config.data.tokenizer_samples, self.config.data.max_bad_fraction)
                tokenizer = TextTokenizer.train(sample, self.config.text)
            write_json(self.folder / "text" / "text.json", tokenizer.to_json())

        self.on_main(work)

    def train_media(self, name: str) -> None:
        """The tokenizer of one modality. One that the source of the run knows keeps its tokenizer, whatever the
        configuration says."""
        if name in self.kept:
            return self.on_main(lambda: save_media_tokenizer(self.folder / name, self.source.media()[name]))
        modality, settings = MODALITIES[name], getattr(self.config, name)
        tokenizer = modality.tokenizer(settings)
        examples = distributed.all_or_raise(lambda: tokenizer.training_set(
            media_files(self.raw_shards, self.config.data.tokenizer_samples, name)))
        if not len(examples):
            raise UserError(f"[{name}]: none of the {modality.plural} in the shards of [data] shards can be read; mend "
                            f"them, or take them out")

        def sample(generator: torch.Generator) -> torch.Tensor:
            """This rank's part of a batch that is the same for every number of ranks."""
            chosen = torch.randint(len(examples), (settings.batch_size,), generator=generator)
            return tokenizer.batch(examples[chosen[distributed.rank() :: distributed.world()]].to(self.device))

        train_autoencoder(tokenizer.to(self.device), sample, settings.steps, settings.learning_rate,
                          self.folder / name, self.log, name, self.config.seed)

    def write_codes(self) -> None:
        """Gathers the trained tokenizers below `tokenizers/`, then turns all media to codes."""
        self.on_main(self._gather_tokenizers)
        self.on_main(lambda: tokenize_in_processes(self.raw_shards, self.folder / "codes", self.folder / "tokenizers",
                                                   self.config.data.workers, self.config.data.max_bad_fraction))

    def _gather_tokenizers(self) -> None:
        media = {name: load_media_tokenizer(self.folder / name, name) for name in self.kept}
        for name in self.trained:
            tokenizer = MODALITIES[name].tokenizer(getattr(self.config, name))
            newest = next(iter(list_steps(self.folder / name)), self.folder / name / "step-N")
            try:
                weights, _ = load_weights(newest)
            except UserError as error:
                raise UserError(f"{error}; remove {self.folder / name / 'done.json'} to train its last steps "
                                "again") from None
            load_into(tokenizer, weights, newest)
            media[name] = tokenizer
        text = TextTokenizer.from_json(read_json(self.folder / "text" / "text.json"))
        Tokenizers(text, media).save(self.folder / "tokenizers")

    def train_stage(self, name: str, settings: LanguageStage, after: str | None) -> None:
        steps = distributed.broadcast([path.name for path in steps_to_use(self.folder / (after or name))])
        vocabulary, loader, decoder = distributed.all_or_raise(lambda: self._make_ready(name, settings, after, steps))
        if len(set(distributed.gather(hash_json(loader.state_dict())))) > 1:
            raise UserError(f"{name}: the ranks see different data; all of them need the same shards")
        info = {"config": self.config.model.shape.model_dump(mode="json"), "vocab_size": vocabulary.size,
                "vocabulary": vocabulary.hash, "stage": name}
        train_language(decoder, loader, settings, self.folder / name, info, vocabulary.modalities, self.log, name,
                       self.device, lambda precision: self.config.device_flops or device_flops(self.device, precision),
                       loader.usual.held_out(settings.valid_rows, settings.micro_batch_size))
        if self.main and (line := memorising(read_metrics(self.folder / "metrics.jsonl"), name)):
            print(line, file=sys.stderr)

    def _make_ready(self, name: str, settings: LanguageStage, after: str | None, steps: list[str]):
        """Vocabulary, loader and decoder of a stage; steps: checkpoints of `after`, or of the stage, newest first."""
        tokenizers = Tokenizers.load(self.folder / "tokenizers")

        def read(sources) -> PackedLoader:
            sources = [source.placed(self.folder) for source in sources]
            loader = PackedLoader(sources, tokenizers, settings.rows, distributed.rank(), distributed.world(),
                                  self.config.seed, self.folder / "token_cache",
                                  max(1, self.config.data.workers // distributed.world()),
                                  self.config.data.max_bad_fraction, name == "instruct")
            if self.main:
                print(f"{name}: {loader.summary()}", file=sys.stderr)
                for line in loader.remarks():
                    print(f"{name}: {line}", file=sys.stderr)
            return loader

        phases = [Phase(phase.start, phase.steps, read(phase.sources)) for phase in settings.phases]
        usual = read(settings.sources)
        others = [phase.loader.limits for phase in phases]
        if self.main:
            write_limits(self.folder, name, together(usual.limits, *others))
        elsewhere = usual.measure_below(together(read_limits(self.folder, [after] if after else []), *others))
        if elsewhere and self.main:
            print(f"{name}: {elsewhere:,} samples that it holds out are trained on by another stage or phase, so they "
                  "are not measured", file=sys.stderr)
        loader = MixtureSchedule(usual, phases)
        with self.device:  # where it is needed: the ranks of a machine share its memory
            decoder = Decoder(self.config.model.shape, tokenizers.vocab.size)
        if after:
            if not steps:
                raise UserError(f"{self.folder / after} holds no checkpoint; remove its done.json")
            newest = self.folder / after / steps[0]
            load_into(decoder, load_weights(newest)[0], newest)
        elif self.source is not None and not steps:
            self.source.load(decoder, tokenizers.vocab)
        decoder.old_rows = 0 if self.source is None else self.source.rows
        if settings.new_rows_steps and not 0 < decoder.old_rows < tokenizers.vocab.size:
            raise UserError(f"{name}: new_rows_steps is for a run that starts from other weights (model.init, "
                            "init_from) and adds rows to their vocabulary; leave it out")
        if self.config.model.code_features:
            fresh = not after and self.source is None
            decoder.split_code_rows(code_features(tokenizers, self.config.model.code_features), fresh)
        return tokenizers.vocab, loader, decoder


def code_features(tokenizers: Tokenizers, count: int) -> dict[str, tuple[int, torch.Tensor]]:
    """For `Decoder.split_code_rows`. A modality whose codes stand for nothing by themselves is left out."""
    found = {}
    for number, (name, tokenizer) in enumerate(tokenizers.media.items()):
        vectors = tokenizer.quantizer.vectors()
        if vectors is not None:
            found[name] = tokenizers.vocab.spans[name].codes_start, features_of(vectors, count, seed=number)
    return found


def _settings(model: BaseModel) -> dict:
    """What the result of a stage depends on."""
    return model.model_dump(mode="json", exclude=INCIDENTAL)
