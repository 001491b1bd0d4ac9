"""Checkpoints that are either whole or not there, whatever the number of ranks.

FOLDER/step-N/ holds `model.safetensors` (whole weights), with averaging `averaged.safetensors`, `model.json`,
`state.json` (the caller's, random-number state), `optimizer/` (a file of each rank, written by torch's distributed
checkpoint, DCP) and `manifest.json` (bytes and sha256 of the others, and its own). It is written aside, synced and
renamed, so a kill at any instant leaves the old ones as they were. safetensors and JSON only: reading runs no code.
DCP puts the optimiser's parts together for any other number of ranks, sharded by FSDP2 or not.
"""

import base64
import json
import os
import random
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor, distribute_tensor

from onevocab.common.errors import UserError
from onevocab.common.files import hash_json, read_json, sha256_file, sync
from onevocab.training import distributed
from onevocab.training.faults import Stopped

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # DCP's, on one rank

MODEL, AVERAGED, INFO, STATE, MANIFEST = ("model.safetensors", "averaged.safetensors", "model.json", "state.json",
                                          "manifest.json")
ALWAYS = {MODEL, INFO, STATE}


@dataclass
class Checkpoint:
    """What `find` found. `damaged` has one line for each newer checkpoint that could not be used."""

    folder: Path
    step: int
    model_info: dict
    state: dict
    rng: dict
    damaged: list[str] = field(default_factory=list)

    def report_damage(self) -> None:
        for line in self.damaged:
            print(f"skipped a damaged checkpoint: {line}", file=sys.stderr)


class Saver:
    """Writes FOLDER/step-N and then removes all but the newest `keep`. All ranks make the same calls.

    In the background: `save` returns when the state has been copied, a thread writes it, and the checkpoint is there
    when `finish` has returned, which is to be called once `written` is true on all ranks; `save` does it too, and so
    does the end of a `with`, unless it is left by an error that may be this rank's alone.
    """

    def __init__(self, folder, keep: int = 2, background: bool = False):
        self.folder, self.keep, self.background = Path(folder), keep, background
        self._group = distributed.cpu_group()
        self._step, self._pending = 0, None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is not None and not issubclass(kind, (UserError, Stopped)):  # these all ranks raise together
            return
        try:
            self.finish()
        except UserError as error:
            if kind is not UserError:
                raise
            print(f"error: {error}", file=sys.stderr)  # beside what came first

    def save(self, step: int, model: nn.Module, model_info: dict, optimizers, state: dict) -> None:
        """optimizers has `tensors()` and `averages()`, both -> dict[str, Tensor] (or is None); state and model_info are
        JSON values, the first rank's count. Raises UserError on all ranks when any cannot write; what was there
        before stays."""
        self.finish()
        self._step = step
        try:
            distributed.all_or_raise(self._begin)
        except UserError as error:
            self._give_up(error)
        tensors = {} if optimizers is None else optimizers.tensors()
        if self.background:
            tensors = DefaultStager(StagingOptions(
                use_pinned_memory=torch.cuda.is_available(), use_shared_memory=False, use_async_staging=False,
                use_non_blocking_copy=False)).stage(tensors)
        averages = {} if optimizers is None else optimizers.averages()
        weights = {name: self._whole(values) for name, values in ((MODEL, model.state_dict()), (AVERAGED, averages))
                   if values}
        texts = {INFO: model_info, STATE: {"step": step, "state": state, "rng": _rng_state()}}
        self._pending = pending = Future()

        def write() -> None:
            pending.set_result(self._write(tensors, weights, texts))

        if self.background:  # a daemon: a process that fails does not wait for ranks that are gone
            threading.Thread(target=write, daemon=True).start()
        else:
            write()
            self.finish()

    @property
    def written(self) -> bool:
        """Whether this rank's part of a checkpoint waits for `finish`."""
        return self._pending is not None and self._pending.done()

    def finish(self) -> None:
        """Makes what was being written the newest checkpoint. Does nothing when nothing was."""
        if self._pending is None:
            return
        files, error = self._pending.result()
        self._pending = None
        parts = distributed.gather((files, error))
        try:
            if errors := [error for _, error in parts if error]:
                raise UserError(errors[0])
            files = {name: entry for files, _ in parts for name, entry in files.items()}
            distributed.all_or_raise(lambda: distributed.is_main() and self._commit(files))
        except UserError as error:
            self._give_up(error)

    @property
    def _aside(self) -> Path:
        return self.folder / f".step-{self._step}.part"

    def _begin(self) -> None:
        if distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder)
            self._aside.mkdir()

    def _whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the first rank's CPU, one after the other, copies of what training goes on to change; the
        other ranks only give their parts."""
        kept = {}
        for name, value in tensors.items():
            value = distributed.full_tensor(value.detach())
            if distributed.is_main():
                copy = self.background and value.device.type == "cpu"
                kept[name] = (value.clone() if copy else value.cpu()).contiguous()
        return kept

    def _write(self, tensors: dict, weights: dict, texts: dict) -> tuple[dict, str | None]:
        """(this rank's files, None), or (nothing, what went wrong). In the background: no collective but DCP's."""
        aside, own = self._aside, []
        try:
            if tensors:  # before the first rank's own files: a rank that fails alone would let the others wait
                writer = HuggingFaceStorageWriter(str(aside / "optimizer"), save_distributed=True)
                dcp.save(tensors, storage_writer=writer, process_group=self._group, no_dist=distributed.world() == 1)
                own += aside.glob(f"optimizer/shard-{distributed.rank() + 1:05d}-*")
            if distributed.is_main():
                for name, values in weights.items():
                    save_file(values, aside / name)
                for name, value in texts.items():
                    _save_json(aside / name, value)
                own += [aside / name for name in (*weights, *texts)]
            for path in own:
                sync(path)
            return {path.relative_to(aside).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
                    for path in own}, None
        except dcp.CheckpointException as error:
            return {}, _first(error)
        except Exception as error:  # whatever it is, the other ranks must hear of it
            return {}, str(error)

    def _commit(self, files: dict) -> None:
        aside, final = self._aside, self.folder / f"step-{self._step}"
        _save_json(aside / MANIFEST, {"files": files, "sha256": hash_json(files)})
        for path in (aside / MANIFEST, *(folder for folder in aside.iterdir() if folder.is_dir()), aside):
            sync(path)
        if final.exists():
            os.replace(final, self.folder / f".step-{self._step}.old")
        os.replace(aside, final)
        sync(self.folder)
        steps = list_steps(self.folder)  # newer ones were damaged, or training would have gone on from them
        for old in steps[: steps.index(final)] + steps[steps.index(final) + self.keep :]:
            os.replace(old, self.folder / f".{old.name}.old")  # a half-deleted folder must not look like a checkpoint
        sweep(self.folder)

    def _give_up(self, error: UserError) -> None:
        if distributed.is_main():
            shutil.rmtree(self._aside, ignore_errors=True)
        raise UserError(f"cannot write the checkpoint {self.folder / f'step-{self._step}'}: {error}; free some space "
                        "and start again, the run continues from its last checkpoint") from None


def save(folder, step: int, model: nn.Module, model_info: dict, optimizers, state: dict, keep: int = 2) -> Path:
    """`Saver.save` in the foreground; returns FOLDER/step-N."""
    Saver(folder, keep).save(step, model, model_info, optimizers, state)
    return Path(folder) / f"step-{step}"


def list_steps(folder) -> list[Path]:
    """The step-N folders inside, newest first."""
    found = [(int(m[1]), p) for p in Path(folder).glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def verify(step_folder, names: list[str] | None = None) -> None:
    """Compares the files (all, or `names`) with the manifest. Raises UserError that names the first bad file."""
    files = _manifest(Path(step_folder))
    for name in files if names is None else names:
        path = Path(step_folder) / name
        if name not in files or not path.is_file():
            raise UserError(f"{path} is missing")
        if path.stat().st_size != files[name].get("bytes") or sha256_file(path) != files[name]["sha256"]:
            raise UserError(f"{path} is damaged: its contents differ from {MANIFEST}")


def _manifest(step_folder: Path) -> dict[str, dict]:
    path = step_folder / MANIFEST
    manifest = read_json(path)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    whole = (isinstance(files, dict) and ALWAYS <= files.keys()
             and all(re.fullmatch(r"(optimizer/)?\w[\w.-]*", name, re.ASCII) for name in files)
             and all(isinstance(entry, dict) and re.fullmatch(r"[0-9a-f]{64}", str(entry.get("sha256")))
                     and isinstance(entry.get("bytes"), int) and len(entry) == 2 for entry in files.values())
             and manifest == {"files": files, "sha256": hash_json(files)})
    if not whole:
        raise UserError(f"{path} is damaged, or was written by an older version")
    return files


def load_latest(folder, model: nn.Module, optimizers=None) -> Checkpoint | None:
    """`find`, then `restore`."""
    found = find(folder)
    if found:
        restore(found, model, optimizers)
    return found


def find(folder) -> Checkpoint | None:
    """The newest whole checkpoint of FOLDER; None when there is none at all. Damaged ones are skipped and named in the
    result. All ranks call it, and share the checking. Raises UserError when every one is damaged."""
    damaged = []
    for name in distributed.broadcast([path.name for path in list_steps(folder)]):
        step_folder = Path(folder) / name

        def check(step_folder=step_folder) -> dict:
            files = _manifest(step_folder)
            verify(step_folder, sorted(files)[distributed.rank() :: distributed.world()])
            strange = {f"optimizer/{path.name}" for path in step_folder.glob("optimizer/*")} - files.keys()
            if strange:  # DCP would read them too
                raise UserError(f"{step_folder / min(strange)} is not in {MANIFEST}")
            saved = read_json(step_folder / STATE)
            if not isinstance(saved, dict) or not {"step", "state", "rng"} <= saved.keys():
                raise UserError(f"{step_folder / STATE} is damaged")
            return saved

        try:
            saved = distributed.all_or_raise(check)
        except UserError as error:
            damaged.append(str(error))
            continue
        info = read_json(step_folder / INFO)
        return Checkpoint(step_folder, saved["step"], info, saved["state"], saved["rng"], damaged)
    if damaged:
        raise UserError(f"no checkpoint in {folder} can be used: {'; '.join(damaged)}; remove them to start over")
    return None


def restore(found: Checkpoint, model: nn.Module, optimizers=None) -> None:
    """Puts it into model, optimizers and the random-number generators. All ranks call it. Raises UserError when it
    belongs to another model."""
    distributed.all_or_raise(lambda: _copy_file(model.state_dict(), found.folder / MODEL))
    if optimizers is not None:
        _load_optimizers(optimizers, found.folder)
    _restore_rng(found.rng)


def load_weights(step_folder) -> tuple[dict[str, Tensor], dict]:
    """The weights, averaged ones where there are, and `model.json` of one step folder, verified. Raises UserError when
    it is missing or damaged."""
    step_folder = Path(step_folder)
    if not step_folder.is_dir():
        raise UserError(f"no checkpoint at {step_folder}")
    weights = AVERAGED if AVERAGED in _manifest(step_folder) else MODEL
    verify(step_folder, [weights, INFO])
    return _load_tensors(step_folder / weights), read_json(step_folder / INFO)


def load_into(model: nn.Module, tensors: dict[str, Tensor], source) -> None:
    """Copies whole weights in. Raises UserError that names the first parameter that does not fit."""
    shapes = {name: value.shape for name, value in tensors.items()}
    _copy(model.state_dict(), shapes, tensors.__getitem__, source)


def _copy_file(own: dict[str, Tensor], path: Path) -> None:
    """One tensor after the other: all ranks of a machine read at once."""
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
            _copy(own, shapes, file.get_tensor, path.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


@torch.no_grad()
def _copy(own: dict[str, Tensor], shapes: dict, read: Callable[[str], Tensor], source) -> None:
    for name in sorted(own.keys() | shapes.keys()):
        there = tuple(shapes[name]) if name in shapes else "nothing"
        here = tuple(own[name].shape) if name in own else "nothing"
        if there != here:
            raise UserError(f"{source} is of another model: {name} is {there} there and {here} here")
    for name, target in own.items():
        value = read(name).to(target.device)
        if isinstance(target, DTensor):  # no source rank: each takes its part of what it has read itself
            value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
        distributed.local(target).copy_(distributed.local(value))


def _load_optimizers(optimizers, step_folder: Path) -> None:
    wanted, averages = optimizers.tensors(), optimizers.averages()
    if averages:
        distributed.all_or_raise(lambda: _copy_file(averages, step_folder / AVERAGED))
    reader = HuggingFaceStorageReader(str(step_folder / "optimizer"))
    found = reader.read_metadata().state_dict_metadata
    for name, tensor in wanted.items():
        shape = tuple(found[name].size) if name in found else "nothing"
        if shape != tuple(tensor.shape):
            raise UserError(f"{step_folder}: optimiser state {name}: expected shape {tuple(tensor.shape)}, found "
                            f"{shape}; the checkpoint belongs to another model, give the run another folder")
    try:
        dcp.load(wanted, storage_reader=reader, process_group=distributed.cpu_group(), no_dist=distributed.world() == 1)
    except dcp.CheckpointException as error:
        raise UserError(f"{step_folder / 'optimizer'}: {_first(error)}") from None


def _first(error: dcp.CheckpointException) -> str:
    """What went wrong on the first rank where something did."""
    return str(next(iter(error.failures.values()))[0])


def _rng_state() -> dict:
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {"python": [version, list(words), gauss], "numpy": [name, keys.tolist(), position, has_gauss, cached],
             "torch": _text(torch.get_rng_state())}
    return state | ({"cuda": _text(torch.cuda.get_rng_state())} if torch.cuda.is_available() else {})


def _restore_rng(saved: dict) -> None:
    torch.set_rng_state(_bytes(saved["torch"]))
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(saved["cuda"]))
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _save_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def sweep(folder: Path) -> None:
    """Removes what an earlier, killed save left aside."""
    for leftover in [*folder.glob(".step-*.part"), *folder.glob(".step-*.old")]:
        shutil.rmtree(leftover, ignore_errors=True)
