"""Checkpoints that are either whole or not there, whatever the number of ranks.

FOLDER/step-N/ holds the files that `common/checkpoint_files.py` lists. It is written aside, synced and renamed, so a
kill at any instant leaves the old ones as they were. safetensors and JSON only: reading runs no code. `optimizer/` is
torch's distributed checkpoint (DCP), which puts the ranks' parts together for any other number of ranks, sharded by
FSDP2 or not.
"""

import os
import shutil
import sys
import threading
import warnings
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor, distribute_tensor

from onevocab.common.checkpoint_files import (
    AVERAGED,
    BEST,
    INFO,
    MANIFEST,
    MODEL,
    STATE,
    check_shapes,
    file_entry,
    list_steps,
    read_manifest,
    verify,
    write_manifest,
    write_plain_json,
)
from onevocab.common.errors import UserError
from onevocab.common.files import read_json, sync, write_json
from onevocab.training import distributed
from onevocab.training.faults import Stopped
from onevocab.training.random_state import random_state, restore_random_state

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # DCP's, on one rank


@dataclass
class Checkpoint:
    """A whole checkpoint. damaged: one line for each newer one that could not be used."""

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
    """Writes FOLDER/step-N and then removes all but the newest `keep` and the best. All ranks make the same calls.

    In the background `save` returns when the state has been copied, and a thread writes it. Call `finish` once
    `written` is true on all ranks: when it has returned, the checkpoint is there. The next `save` calls it too, and so
    does the end of a `with`, unless it is left by an error that may be this rank's alone.
    """

    def __init__(self, folder, keep: int = 2, background: bool = False):
        self.folder, self.keep, self.background = Path(folder), keep, background
        self._group = distributed.cpu_group()
        self._step, self._best, self._pending = 0, None, None

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

    def save(self, step: int, model: nn.Module, model_info: dict, optimizers, state: dict,
             best: int | None = None) -> None:
        """optimizers: None, or has `tensors()` and `averages()`, both -> dict[str, Tensor]. state and model_info: JSON
        values; rank 0's are written. best: a step that is kept beside the newest ones, this or an older one. Raises
        UserError on all ranks when any cannot write; older checkpoints stay."""
        self.finish()
        self._step, self._best = step, best
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
        texts = {INFO: model_info, STATE: {"step": step, "state": state, "rng": random_state()}}
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
        """Waits until this rank's part is written, then makes the checkpoint the newest. Does nothing without one."""
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
        """Gathers whole tensors, one at a time, on rank 0's CPU; {} on the others. Copies where training would change
        them while a thread writes."""
        kept = {}
        for name, value in tensors.items():
            value = distributed.full_tensor(value.detach())
            if distributed.is_main():
                copy = self.background and value.device.type == "cpu"
                kept[name] = (value.clone() if copy else value.cpu()).contiguous()
        return kept

    def _write(self, tensors: dict, weights: dict, texts: dict) -> tuple[dict, str | None]:
        """Returns (manifest entries of this rank's files, None), or ({}, what went wrong). May run in a thread, so it
        calls no collective but DCP's, which has a group of its own."""
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
                    write_plain_json(aside / name, value)
                own += [aside / name for name in (*weights, *texts)]
            for path in own:
                sync(path)
            return {path.relative_to(aside).as_posix(): file_entry(path) for path in own}, None
        except dcp.CheckpointException as error:
            return {}, _first(error)
        except Exception as error:  # whatever it is, the other ranks must hear of it
            return {}, str(error)

    def _commit(self, files: dict) -> None:
        aside, final = self._aside, self.folder / f"step-{self._step}"
        manifest = write_manifest(aside, files)
        for path in (manifest, *(folder for folder in aside.iterdir() if folder.is_dir()), aside):
            sync(path)
        if final.exists():
            os.replace(final, self.folder / f".step-{self._step}.old")
        os.replace(aside, final)
        sync(self.folder)
        if self._best is not None:
            write_json(self.folder / BEST, {"step": self._best})
        steps = list_steps(self.folder)  # newer ones were damaged, or training would have gone on from them
        for old in steps[: steps.index(final)] + steps[steps.index(final) + self.keep :]:
            if old.name != f"step-{self._best}":  # aside: a half-deleted folder must not look like a checkpoint
                os.replace(old, self.folder / f".{old.name}.old")
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


def load_latest(folder, model: nn.Module, optimizers=None) -> Checkpoint | None:
    """`find`, then `restore`."""
    newest = find(folder)
    if newest:
        restore(newest, model, optimizers)
    return newest


def find(folder) -> Checkpoint | None:
    """The newest whole checkpoint of FOLDER; None when there is none at all. Damaged ones are skipped and named in the
    result. All ranks call it, and share the checking. Raises UserError when every one is damaged."""
    damaged = []
    for name in distributed.broadcast([path.name for path in list_steps(folder)]):
        step_folder = Path(folder) / name

        def check(step_folder=step_folder) -> dict:
            files = read_manifest(step_folder)
            verify(step_folder, sorted(files)[distributed.rank() :: distributed.world()])
            strange = {f"optimizer/{path.name}" for path in step_folder.glob("optimizer/*")} - files.keys()
            if strange:  # DCP would read them too
                raise UserError(f"{step_folder / min(strange)} is not in {MANIFEST}")
            saved = read_json(step_folder / STATE)
            if isinstance(saved, dict) and saved.get("weights_only"):
                raise UserError(f"{step_folder} holds weights only, from another machine: it cannot be trained on")
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


def restore(saved: Checkpoint, model: nn.Module, optimizers=None) -> None:
    """Puts a checkpoint into model, optimizers and the random-number generators. All ranks call it. Raises UserError
    when it belongs to another model."""
    distributed.all_or_raise(lambda: _copy_file(model.state_dict(), saved.folder / MODEL))
    if optimizers is not None:
        _load_optimizers(optimizers, saved.folder)
    restore_random_state(saved.rng)


@torch.no_grad()
def _copy_file(own: dict[str, Tensor], path: Path) -> None:
    """Fills tensors, sharded by FSDP2 or not, from a file of whole ones. One after the other: all ranks of a machine
    read at once. Raises UserError when the file cannot be read, or belongs to another model."""
    try:
        with safe_open(path, "pt") as file:
            saved = {name: file.get_slice(name).get_shape() for name in file.keys()}
            check_shapes({name: value.shape for name, value in own.items()}, saved, path.parent)
            for name, target in own.items():
                value = file.get_tensor(name).to(target.device)
                if isinstance(target, DTensor):  # no source rank: each takes its part of what it has read itself
                    value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
                distributed.local(target).copy_(distributed.local(value))
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _load_optimizers(optimizers, step_folder: Path) -> None:
    wanted, averages = optimizers.tensors(), optimizers.averages()
    if averages:
        distributed.all_or_raise(lambda: _copy_file(averages, step_folder / AVERAGED))
    reader = HuggingFaceStorageReader(str(step_folder / "optimizer"))
    saved = reader.read_metadata().state_dict_metadata
    for name, tensor in wanted.items():
        shape = tuple(saved[name].size) if name in saved else "nothing"
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


def sweep(folder: Path) -> None:
    """Removes what an earlier, killed save left aside."""
    for leftover in [*folder.glob(".step-*.part"), *folder.glob(".step-*.old")]:
        shutil.rmtree(leftover, ignore_errors=True)
