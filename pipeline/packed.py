"""What travels when the language stages are trained on another machine than the one with the raw data.

There: a run without its raw shards, `pack` and `unpack`. Back: the newest weights, rounded to bfloat16, in files of at
most PART bytes, and what else the run has, `write_back` and `take_back`. Archives and weights are checked before
anything of them is used.
"""

import gzip
import io
import json
import lzma
import re
import tarfile
import zlib
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from onevocab.common.checkpoint_files import (
    INFO,
    MODEL,
    STATE,
    file_entry,
    list_steps,
    steps_to_use,
    write_manifest,
    write_plain_json,
)
from onevocab.common.errors import UserError
from onevocab.common.files import read_json, sha256_file, write_atomic, write_json
from onevocab.common.provenance import provenance
from onevocab.generation import defaults as generation
from onevocab.generation.anytoany import STAGES
from onevocab.model.weights import load_tensors, load_weights
from onevocab.pipeline.inputs import AWAY, FILES

PART = 15 << 20  # bytes of a file of weights
RECORDS = ("done.json", "started.json", "curves.png")
TOP = ("config.toml", "metrics.jsonl", generation.FILE)
RUN, BACK = "run.tgz", "weights.json"  # what came back but for the weights; in it, what the weights are


def pack(run: Path, out: Path, most: int) -> int:
    """Writes `out`, a .tar.xz of all that the language stages of a run need; returns its bytes. Raises UserError when
    the codes are not done, or when it would be larger than `most` bytes."""
    if not (run / "codes" / "done.json").exists():
        raise UserError(f"{run} has no codes yet: its stages up to codes come first")
    write = io.BytesIO()
    with lzma.open(write, "w", preset=6) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        for path in sorted(run.rglob("*")):
            name = path.relative_to(run)
            if path.is_file() and (name.parts[0] in ("codes", "tokenizers") or str(name) in TOP
                                   or name.name in RECORDS and name.parts[0] not in STAGES
                                   or name.parts == ("shards", FILES)):
                archive.add(path, str(name))
        _add(archive, f"shards/{AWAY}", json.dumps(provenance()).encode())
    if (size := write.tell()) > most:
        raise UserError(f"the codes and tokenizers of {run} take {size / 2**20:.1f} MiB packed, and {most / 2**20:.0f} "
                        "MiB may travel: make fewer samples, or say another --most")
    write_atomic(out, write.getvalue())
    return size


def unpack(packed: Path, run: Path) -> None:
    """Makes the run folder that was packed. Raises UserError when it is there already, or when that is no such file."""
    if run.exists():
        raise UserError(f"{run} is there already; remove it, or unpack into another folder")
    aside = run.with_name(f".{run.name}.part")
    try:
        with tarfile.open(packed, "r:xz") as archive:
            archive.extractall(aside, filter="data")
        if not (aside / "shards" / AWAY).is_file():
            raise UserError(f"{packed} is no packed run")
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        raise UserError(f"cannot unpack {packed}: {error}") from None
    aside.rename(run)


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def parts_of(tensors: dict[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """The tensors in their order, in as few parts as hold `most` bytes each; one that is larger has its own."""
    parts, size = [{}], 0
    for name, tensor in tensors.items():
        needed = tensor.numel() * tensor.element_size()
        if parts[-1] and size + needed > most:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += needed
    return parts


def write_back(run: Path, out: Path) -> list[Path]:
    """Writes what is to come back of a run into a folder; returns the files. Raises UserError when there are no
    weights."""
    stage = next((name for name in STAGES if list_steps(run / name)), None)
    if stage is None:
        raise UserError(f"{run} has no checkpoint yet: nothing comes back")
    step = steps_to_use(run / stage)[0]
    tensors, info = load_weights(step)
    parts = parts_of({name: value.bfloat16() for name, value in tensors.items()}, PART)
    written = []
    for number, part in enumerate(parts, 1):
        written.append(out / f"weights-{number}-of-{len(parts)}.safetensors")
        write_atomic(written[-1], save(part))
    back = {"stage": stage, "step": step.name, "model": info, "codes": read_json(run / "codes" / "done.json")["hash"],
            "files": {path.name: sha256_file(path) for path in written}, "provenance": provenance()}
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        _add(archive, BACK, json.dumps(back).encode())
        for name in [*TOP, *(f"{stage}/{record}" for stage in STAGES for record in RECORDS)]:
            if (run / name).is_file():
                archive.add(run / name, name)
    write_atomic(out / RUN, content.getvalue())
    return [*written, out / RUN]


def take_back(folder: Path, run: Path) -> Path:
    """Puts what `write_back` wrote into the run that was packed; returns the step folder. Raises UserError when a file
    is missing or other than it was, is of another run, or when the run was trained here since."""
    files = _read_back(folder / RUN)
    try:
        back = json.loads(files.pop(BACK))
        stage, step, info, codes, weights = (back[key] for key in ("stage", "step", "model", "codes", "files"))
        if stage not in STAGES or not re.fullmatch(r"step-\d{1,9}", step) or not isinstance(info, dict):
            raise ValueError
        expected = {f"weights-{number}-of-{len(weights)}.safetensors" for number in range(1, len(weights) + 1)}
        if weights.keys() != expected:
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{folder / RUN} does not say what came back; copy the files again") from None
    if read_json(run / "codes" / "done.json").get("hash") != codes:
        raise UserError(f"{folder} comes from another run than {run}: their codes differ")
    if there := next((name for name in STAGES if list_steps(run / name)), None):
        raise UserError(f"{run / there} holds checkpoints already; move them away first")
    tensors: dict[str, Tensor] = {}
    for name, digest in weights.items():
        if not (folder / name).is_file() or sha256_file(folder / name) != digest:
            raise UserError(f"{folder / name} is missing or damaged; copy it again")
        tensors |= {key: value.to(torch.float32) for key, value in load_tensors(folder / name).items()}
    for name, content in files.items():
        write_atomic(run / name, content)
    aside, final = run / stage / f".{step}.part", run / stage / step
    aside.mkdir(parents=True, exist_ok=True)
    (aside / MODEL).write_bytes(save(tensors))
    write_plain_json(aside / INFO, info)
    write_plain_json(aside / STATE, {"step": int(step.partition("-")[2]), "weights_only": True})
    write_manifest(aside, {name: file_entry(aside / name) for name in (MODEL, INFO, STATE)})
    aside.rename(final)
    write_json(run / stage / BACK, back)
    return final


def _read_back(path: Path) -> dict[str, bytes]:
    """name -> content of the files that may come back. Raises UserError when there is another one, or no archive."""
    allowed = {BACK, *TOP, *(f"{stage}/{record}" for stage in STAGES for record in RECORDS)}
    found = {}
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for entry in archive:
                if entry.name not in allowed or not entry.isreg() or entry.size > 1 << 28:
                    raise UserError(f"{path} holds {entry.name!r}, which does not come back from a training")
                found[entry.name] = archive.extractfile(entry).read()
            stream.seek(0, io.SEEK_END)  # to the end, where gzip compares its checksum: a tar ends before
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if BACK not in found:
        raise UserError(f"{path} does not say what came back; copy the files again")
    return found
