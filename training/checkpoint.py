"""Checkpoints that are either whole or not there.

FOLDER/step-N/ holds `model.safetensors`, `model.json`, `optimizer.safetensors` (optimiser and random-number state),
`state.json` (the caller's) and `manifest.json` (bytes and sha256 of the others). It is written aside, synced and
renamed, so a kill at any instant leaves the old ones as they were. safetensors and JSON only: reading runs no code.
"""

import json
import os
import random
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onevocab.common.errors import UserError
from onevocab.common.files import read_json, sha256_file


@dataclass
class Checkpoint:
    """What `load_latest` found. `damaged` has one line for each newer checkpoint that could not be used."""

    folder: Path
    step: int
    model_info: dict
    state: dict
    damaged: list[str] = field(default_factory=list)

    def report_damage(self) -> None:
        for line in self.damaged:
            print(f"skipped a damaged checkpoint: {line}", file=sys.stderr)


def save(folder, step: int, model: nn.Module, model_info: dict, optimizers, state: dict, keep: int = 2) -> Path:
    """Writes FOLDER/step-N, then removes all but the newest `keep`. Call it on one rank.

    optimizers has `tensors() -> dict[str, Tensor]` (or is None); state and model_info are JSON values. Raises UserError
    when the disk is full or not writable; what was there before stays.
    """
    folder = Path(folder)
    final, aside = folder / f"step-{step}", folder / f".step-{step}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        aside.mkdir()
        rng_tensors, rng_json = _rng_state()
        tensors = {} if optimizers is None else optimizers.tensors()
        _save_tensors(aside / "model.safetensors", model.state_dict())
        _save_tensors(aside / "optimizer.safetensors", tensors | rng_tensors)
        _save_json(aside / "model.json", model_info)
        _save_json(aside / "state.json", {"step": step, "state": state, "rng": rng_json})
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in sorted(aside.iterdir())}
        for path in aside.iterdir():
            _sync(path)
        _save_json(aside / "manifest.json", {"step": step, "files": files})
        _sync(aside / "manifest.json")
        _sync(aside)
        if final.exists():
            os.replace(final, folder / f".step-{step}.old")
        os.replace(aside, final)
        _sync(folder)
        for old in list_steps(folder)[keep:]:
            os.replace(old, folder / f".{old.name}.old")  # a half-deleted folder must not look like a checkpoint
        sweep(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"cannot write the checkpoint {final}: {error}; free some space and start again, "
                        "the run continues from its last checkpoint") from None
    return final


def list_steps(folder) -> list[Path]:
    """The step-N folders inside, newest first."""
    found = [(int(m[1]), p) for p in Path(folder).glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def verify(step_folder, names: list[str] | None = None) -> None:
    """Compares the files (all, or `names`) with the manifest. Raises UserError that names the first bad file."""
    step_folder = Path(step_folder)
    manifest = read_json(step_folder / "manifest.json")
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(isinstance(v, dict) and "sha256" in v for v in files.values()):
        raise UserError(f"{step_folder / 'manifest.json'} is damaged: it lists no files")
    for name in names or ["model.safetensors", "model.json", "optimizer.safetensors", "state.json"]:
        path = step_folder / name
        if name not in files or not path.is_file():
            raise UserError(f"{path} is missing")
        if path.stat().st_size != files[name].get("bytes") or sha256_file(path) != files[name]["sha256"]:
            raise UserError(f"{path} is damaged: its contents differ from manifest.json")


def load_latest(folder, model: nn.Module | None = None, optimizers=None, restore_rng: bool = True) -> Checkpoint | None:
    """The newest whole checkpoint of FOLDER, put into model, optimizers and the random-number generators; None when
    there is none at all. Damaged ones are skipped and named in the result.

    Raises UserError when every one is damaged, or when it belongs to another model.
    """
    damaged = []
    for step_folder in list_steps(folder):
        try:
            verify(step_folder)
            saved = read_json(step_folder / "state.json")
            model_info = read_json(step_folder / "model.json")
        except UserError as error:
            damaged.append(str(error))
            continue
        if model is not None:
            load_into(model, _load_tensors(step_folder / "model.safetensors"), step_folder)
        tensors = _load_tensors(step_folder / "optimizer.safetensors")
        if optimizers is not None:
            optimizers.load_tensors(tensors)
        if restore_rng:
            _restore_rng(tensors, saved["rng"])
        return Checkpoint(step_folder, saved["step"], model_info, saved["state"], damaged)
    if damaged:
        raise UserError(f"no checkpoint in {folder} can be used: {'; '.join(damaged)}; remove them to start over")
    return None


def load_weights(step_folder) -> tuple[dict[str, Tensor], dict]:
    """The weights and `model.json` of one step folder, verified. Raises UserError when it is missing or damaged."""
    step_folder = Path(step_folder)
    if not step_folder.is_dir():
        raise UserError(f"no checkpoint at {step_folder}")
    verify(step_folder, ["model.safetensors", "model.json"])
    return _load_tensors(step_folder / "model.safetensors"), read_json(step_folder / "model.json")


def load_into(model: nn.Module, tensors: dict[str, Tensor], source) -> None:
    """Copies weights in. Raises UserError that names the first parameter that does not fit."""
    own = model.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        shapes = [tuple(x[name].shape) if name in x else "nothing" for x in (tensors, own)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{source} is of another model: {name} is {shapes[0]} there and {shapes[1]} here")
    model.load_state_dict(tensors)


def _rng_state() -> tuple[dict[str, Tensor], dict]:
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {"rng.torch": torch.get_rng_state(), "rng.numpy": torch.from_numpy(keys.astype(np.int64))}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return tensors, {"python": [version, list(words), gauss], "numpy": [name, position, has_gauss, cached]}


def _restore_rng(tensors: dict[str, Tensor], saved: dict) -> None:
    torch.set_rng_state(tensors["rng.torch"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words), gauss))
    name, position, has_gauss, cached = saved["numpy"]
    np.random.set_state((name, tensors["rng.numpy"].numpy().astype(np.uint32), position, has_gauss, cached))


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: value.detach().contiguous().cpu() for name, value in tensors.items()}, path)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _save_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Removes what an earlier, killed save left aside."""
    for leftover in [*folder.glob(".step-*.part"), *folder.glob(".step-*.old")]:
        shutil.rmtree(leftover, ignore_errors=True)
