"""`python train.py --new my.toml --shards SHARDS`: a complete configuration for one's own data and this machine.

Rules, of which the file says what came of them. A medium's size and length are those of the data. The vocabulary has a
piece for 500 characters of text, rows hold all but one document in 200. A fifth of the time is for each tokenizer, at
most two fifths together; the rest is shared by pretrain and instruct. The model is the largest of SHAPES that gets 20
tokens a parameter in that time (Hoffmann et al. 2022), at a speed that is measured here; no stage shows a sample more
than 60 times, unless it does in the 20 steps that a stage takes at least.
"""

import os
import shlex
import time
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch

from onevocab.common import provenance
from onevocab.common.commands import Parser
from onevocab.common.errors import UserError
from onevocab.common.files import check_writable, write_atomic
from onevocab.common.paths import expand_home, path_argument
from onevocab.data.documents import BadSample, document_of, read_media
from onevocab.data.loader import Batch
from onevocab.data.shards.index import build_index
from onevocab.data.shards.remote import ShardCache, is_remote, list_sources, read_source
from onevocab.model.config import ModelConfig
from onevocab.model.decoder import Decoder
from onevocab.pipeline.commented import commented_toml
from onevocab.pipeline.config import RunConfig, read_config
from onevocab.tokenizers.bundle import Tokenizers
from onevocab.tokenizers.modalities import MODALITIES
from onevocab.tokenizers.text import TextConfig, TextTokenizer
from onevocab.training.config import OptimizerConfig
from onevocab.training.loop import NextTokenLoss, backward
from onevocab.training.muon import build_optimizers
from onevocab.training.plan import clock, si
from onevocab.training.precision import autocast, select_precision

SHAPES = ((128, 4), (192, 6), (256, 8), (384, 8), (512, 10), (768, 12), (1024, 16))  # (dim, layers)
SURVEYED, FILES = 2000, 64  # samples that are read; files a tokenizer's speed is measured on
STEP_SHARE = 0.8  # part of a stage's time; the rest reads, measures the losses on held-out data, saves
TURNS = 32  # tokens that a request adds to a captioned document, at most
EPOCHS, FEW = 60, 5  # how often a stage shows a sample: at most; less is too little for a small set
LEFT_OUT = ("data.demo", "evaluate.tasks", "evaluate.judge_steps", "evaluate.judge_floor", "evaluate.candidates")


@dataclass
class Found:
    """What lies in shards: samples in all, how many were read and how many of them are bad; of those read, in which a
    text and media stand, what each medium measures, some files of each modality, the texts of each document and the
    measures of its media."""

    samples: int = 0
    read: int = 0
    bad: int = 0
    captioned: int = 0
    conversations: int = 0
    sizes: dict[str, list[float]] = field(default_factory=dict)
    files: dict[str, list[bytes]] = field(default_factory=dict)
    documents: list[tuple[str, list[tuple[str, float]]]] = field(default_factory=list)


def look(shards: list[str]) -> Found:
    """Reads about SURVEYED samples, equally many from the start of each shard. Raises UserError when none is usable."""
    found = Found()
    for shard in shards:
        found.samples += len(build_index(ShardCache().fetch(shard), must_save=False).first) - 1
        for sample in islice(read_source(shard), -(-SURVEYED // len(shards))):
            found.read += 1
            try:
                document = document_of(sample)
                if any(medium.content.holds_codes for medium in document.media):
                    raise UserError(f"{shard} holds codes; name the raw shards that they were made from")
                opened = read_media(sample, document, lambda modality, file: MODALITIES[modality].load(file.content))
            except BadSample:
                found.bad += 1
                continue
            measures = [(medium.modality, MODALITIES[medium.modality].measure(medium.content)[1])
                        for medium in opened.media]
            for file, (modality, size) in zip(document.media, measures, strict=True):
                found.sizes.setdefault(modality, []).append(size)
                files = found.files.setdefault(modality, [])
                if len(files) < FILES:
                    files.append(file.content.content)
            text = " ".join(part.content for part in document.segments if part.modality == "text")
            found.documents.append((text, measures))
            found.conversations += document.is_conversation
            found.captioned += bool(text and measures and not document.is_conversation)
    if not found.documents:
        raise UserError(f"none of {found.read} samples can be used; look at them with python -m onevocab.data.inspect")
    return found


# ------------------------------------------------------------------------------------------------ choices


def media_settings(name: str, sizes: list[float], minutes: float, gpu: bool) -> dict:
    """What a modality's section says, where it has these keys; the rest is its default."""
    fields = MODALITIES[name].config.model_fields
    chosen = {"global_context": MODALITIES[name].sized, "fine_width": 32, "fine_blocks": 1,
              "encoder_kernel": 1 if MODALITIES[name].sized else 3}
    if "size" in fields and "patch" in fields:
        most = 256 if gpu else 64 if minutes <= 60 else 128
        side = int(min(most, max(16, np.round(np.median(sizes) / 16) * 16)))
        patch = 16 if side > 128 else 8
        chosen |= {"size": (side, side), "patch": patch, "max_side": max(32, side // patch)}
    if "max_seconds" in fields:
        chosen["max_seconds"] = float(np.ceil(2 * np.quantile(sizes, 0.998, method="higher")) / 2 or 0.5)
    return {key: value for key, value in chosen.items() if key in fields}


def document_lengths(found: Found, tokenizers: dict, text: TextTokenizer) -> np.ndarray:
    """Tokens of the documents, a request included."""
    grids = {name: int(np.prod(tokenizer.max_grid)) for name, tokenizer in tokenizers.items()}
    longest = {name: max(sizes) for name, sizes in found.sizes.items()}

    def of_medium(name: str, size: float) -> float:
        return grids[name] * (1 if MODALITIES[name].sized else size / max(longest[name], 1e-9)) + 4

    return np.array([len(text.encode(words)) + TURNS + sum(of_medium(*medium) for medium in media)
                     for words, media in found.documents])


def round_up(value: float, step: int) -> int:
    return int(-(-value // step) * step)


def shape(dim: int, layers: int, length: int) -> ModelConfig:
    return ModelConfig(dim=dim, layers=layers, heads=dim // 32 if dim < 512 else dim // 64, head_dim=32 if dim < 512
                       else 64, kv_heads=2, mlp_dim=3 * dim, max_length=length)


def parameters(config: ModelConfig, vocabulary: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(config, vocabulary).parameters())


def seconds_of(step, device: torch.device, times: int = 5) -> float:
    """Seconds of one call, the median of some after a first one."""
    taken = []
    for _ in range(times + 1):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken[1:]))


def language_seconds(config: ModelConfig, vocabulary: int, rows: int, length: int, device: torch.device) -> float:
    """Seconds of a training step of `rows` rows, measured."""
    with device:
        module = NextTokenLoss(Decoder(config, vocabulary), 1e-5)
    optimizers = build_optimizers(module.decoder, OptimizerConfig())
    generator, index = torch.Generator().manual_seed(0), torch.arange(length).expand(rows, -1)
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    batch = Batch(ids=ids, targets=ids, loss_weights=torch.ones(rows, length), positions=index % 64,
                  modality=torch.zeros(rows, length, dtype=torch.uint8), document_ids=(index // 64).int()).to(device)
    precision = select_precision("auto", device)

    def step() -> None:
        optimizers.zero_grad()
        backward(module, batch, torch.tensor(1.0 / (rows * length), device=device), 0, precision, device)
        optimizers.step(1.0, decay=1.0)

    return seconds_of(step, device)


def media_seconds(tokenizer, files: list[bytes], device: torch.device) -> float:
    """Seconds of a training step of a medium's tokenizer, measured on some of the data's files."""
    examples, precision = tokenizer.training_set(files), select_precision("auto", device)
    if not len(examples):
        raise UserError(f"none of {len(files)} {MODALITIES[tokenizer.name].plural} can be read")
    tokenizer.to(device)
    optimizers = build_optimizers(tokenizer, OptimizerConfig())
    chosen = examples[torch.arange(tokenizer.config.batch_size) % len(examples)].to(device)

    def step() -> None:
        optimizers.zero_grad()
        with autocast(precision, device):
            loss, _ = tokenizer(tokenizer.batch(chosen), False)
        loss.backward()
        optimizers.step(1.0)

    return seconds_of(step, device)


def choose(found: Found, shards: list[str], folder: str, minutes: float) -> tuple[RunConfig, list[str]]:
    """(the configuration, lines that say why it is as it is)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu, cores, scale = device.type == "cuda", len(os.sched_getaffinity(0)), found.samples / found.read
    media = [name for name in MODALITIES if name in found.sizes]
    text_length = sum(len(words) for words, _ in found.documents) * scale
    pieces = int(2 ** np.clip(np.floor(np.log2(max(text_length, 1) / 500)), 9, 15))
    text = TextTokenizer.train((words for words, _ in found.documents), TextConfig(vocab_size=pieces))
    sections, tokenizers, took = {}, {}, {}
    share = 0.2 if len(media) < 3 else 0.4 / len(media)
    for name in media:
        config = MODALITIES[name].config(**media_settings(name, found.sizes[name], minutes, gpu))
        tokenizers[name] = MODALITIES[name].tokenizer(config)
        took[name] = media_seconds(tokenizers[name], found.files[name], device)
        steps = int(np.clip(STEP_SHARE * share * minutes * 60 / took[name], 50, 20_000 if gpu else 3000))
        sections[name] = config.model_copy(update={"steps": steps})
    lengths = document_lengths(found, tokenizers, text)
    most = 4096 if gpu else 1024
    least = max([128, *(int(np.prod(tokenizer.max_grid)) + TURNS for name, tokenizer in tokenizers.items()
                        if MODALITIES[name].sized)])  # a row holds any medium that is whole, however rare it is
    length = max(round_up(least, 64), min(most, round_up(float(np.quantile(lengths, 0.995, method="higher")), 64)))
    rows = max(2, (65_536 if gpu else 2048) // length // 2 * 2)
    vocabulary = Tokenizers(text, tokenizers).vocab.size
    budget = STEP_SHARE * minutes * 60 * (1 - share * len(media)) / 2  # seconds of a language stage's steps
    context = max(512, 2 * length)
    smallest = shape(*SHAPES[0], context)
    speed = rows * length / language_seconds(smallest, vocabulary, rows, length, device)
    fits = [each for each in SHAPES if 2 * budget * speed * parameters(smallest, vocabulary)
            >= 20 * parameters(shape(*each, context), vocabulary) ** 2]
    model = shape(*(fits or SHAPES[:1])[-1], context)
    if model != smallest:
        speed = rows * length / language_seconds(model, vocabulary, rows, length, device)
    tokens = float(np.minimum(lengths, length).sum()) * scale
    steps = int(max(20, min(budget * speed, EPOCHS * tokens) / (rows * length)))
    source = {"path": "codes/*.tar"}
    stage = {"steps": steps, "valid_every": max(10, steps // 10), "save_every": max(10, steps // 4),
             "log_every": max(1, min(20, steps // 20)), "micro_batch_size": max(1, 8192 // length) if gpu else 0}
    loader = {"seq_len": length, "global_batch_size": rows}
    config = RunConfig.model_validate({
        "folder": folder, "text": {"vocab_size": pieces}, "model": model.model_dump(),
        "data": {"shards": [place if is_remote(place) else os.path.relpath(os.path.realpath(place), os.path.realpath(
                     folder)) for place in shards],
                 "workers": max(1, min(16, cores))},
        "pretrain": stage | {"sources": [source], "schedule": {"kind": "constant"},
                             "loader": loader | {"loss": {"context_weight": 0.05}}},
        "instruct": stage | {"sources": [source | ({"turns": "captions"} if found.captioned else {})],
                             "schedule": {"kind": "wsd", "warmup": 0.0, "decay": 0.6}, "keep_best": True,
                             "loader": loader | {"loss": {"context_weight": 0.0}}},
        **{name: section.model_dump() for name, section in sections.items()}})
    kinds = [f"{len(sizes):,} {MODALITIES[name].plural} (median {np.median(sizes):.4g}, largest {max(sizes):.4g})"
             for name, sizes in found.sizes.items()]
    takes = (sum(sections[name].steps * took[name] for name in media) + 2 * steps * rows * length / speed) / STEP_SHARE
    why = [f"{found.samples:,} samples, {found.read:,} of them read ({found.bad:,} bad): "
           f"{', '.join([f'{text_length / scale:,.0f} characters of text', *kinds])}; {found.captioned:,} media with a "
           f"text, {found.conversations:,} conversations; {(lengths > length).mean():.1%} of them longer than a row",
           f"{provenance.device()}, {cores} cores: {speed:,.0f} tokens/s measured for "
           f"{si(parameters(model, vocabulary))} parameters"
           + "".join(f", {1 / took[name]:.3g} steps/s of a tokenizer of {MODALITIES[name].plural}" for name in media),
           f"about {clock(takes)} of training for {minutes:g} asked; each stage shows a sample "
           f"{steps * rows * length / tokens:.3g} times"]
    if steps * rows * length < FEW * tokens and found.samples < 10_000:
        why.append(f"that is too little to learn from so few samples (under {FEW} times each): give more --minutes, or "
                   "write it again while nothing else runs here, since the speed is that of now")
    return config, why


def new_configuration(words: list[str]) -> None:
    """The command; `words` follow `train.py`. Raises UserError."""
    parser = Parser(prog="python train.py --new", description=__doc__.split("\n\n")[0])
    parser.add_argument("--new", type=path_argument, required=True, metavar="MY.toml", help="the file to write")
    parser.add_argument("--shards", nargs="+", type=expand_home, required=True,
                        help="raw shards: folders, globs, files or addresses")
    parser.add_argument("--folder", type=expand_home,
                        help="where the run will live (default: runs/ and the file's name)")
    parser.add_argument("--minutes", type=float, default=12.0, help="time that the training may take (default: 12)")
    given = parser.parse_args(words)
    if given.new.exists():
        raise UserError(f"{given.new} exists already: choose another name, or remove it")
    if not 0 < given.minutes < 1e6:
        raise UserError("--minutes is a number above 0")
    if given.new.suffix != ".toml":
        raise UserError(f"--new {given.new}: the configuration's name ends in .toml")
    check_writable(given.new.parent)
    folder = given.folder or f"runs/{given.new.stem}"
    shards = [shard for place in given.shards for shard in list_sources(place)]
    config, why = choose(look(shards), given.shards, folder, given.minutes)
    text = commented_toml(config, ("folder", "seed", "data", "text", *config.modalities), LEFT_OUT)
    train = shlex.join(["torchrun", "train.py", str(given.new)])
    head = "".join(f"# {line}.\n" for line in (f"Written by train.py --new from {', '.join(given.shards)}", *why))
    write_atomic(given.new, f"{head}# Train: {train}\n\n{text}")
    if read_config(given.new, []) != config:
        raise AssertionError(f"{given.new} does not say what was chosen")
    print("\n".join(why))
    print(f"wrote {given.new}; next: {train}")
