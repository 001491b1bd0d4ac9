"""What lies in a folder of checkpoints: FOLDER/step-N/ with weights, JSON and a manifest. Knows files, no tensors.

`best.json` beside them, where the best is kept. `model.safetensors`: whole weights; `averaged.safetensors`: their
moving average, where one is kept; `model.json`: what the model is; `state.json`: where training stands;
`optimizer/`: a file of each rank; `manifest.json`: bytes and sha256 of the others, and its own.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from onevocab.common.errors import UserError
from onevocab.common.files import hash_json, read_json, sha256_file

MODEL, AVERAGED, INFO, STATE, MANIFEST = ("model.safetensors", "averaged.safetensors", "model.json", "state.json",
                                          "manifest.json")
BEST = "best.json"  # beside the step folders: which one had the lowest held-out loss
ALWAYS = {MODEL, INFO, STATE}


def list_steps(folder) -> list[Path]:
    """The step-N folders inside, newest first."""
    numbered = [(int(m[1]), p) for p in Path(folder).glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def best_step(folder) -> Path | None:
    """The step of the lowest held-out loss, where one is kept."""
    try:
        step = json.loads((Path(folder) / BEST).read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # none: the newest are used
        return None
    return next((path for path in list_steps(folder) if path.name == f"step-{step}"), None)


def steps_to_use(folder) -> list[Path]:
    """The step-N folders for whoever uses the weights: the best where one is kept, then the newest first."""
    steps, best = list_steps(folder), best_step(folder)
    return steps if best is None else [best, *(path for path in steps if path != best)]


def file_entry(path: Path) -> dict:
    """A file's line in the manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def write_manifest(step_folder: Path, files: dict[str, dict]) -> Path:
    """files: name in the folder -> `file_entry`. Returns the manifest's path."""
    return write_plain_json(step_folder / MANIFEST, {"files": files, "sha256": hash_json(files)})


def read_manifest(step_folder) -> dict[str, dict]:
    """name -> `file_entry` of each file. Raises UserError when the manifest is missing or is not as it was written."""
    path = Path(step_folder) / MANIFEST
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


def verify(step_folder, names: Sequence[str] | None = None) -> None:
    """Compares the files (all, or `names`) with the manifest. Raises UserError that names the first bad file."""
    files = read_manifest(step_folder)
    for name in files if names is None else names:
        path = Path(step_folder) / name
        if name not in files or not path.is_file():
            raise UserError(f"{path} is missing")
        if path.stat().st_size != files[name].get("bytes") or sha256_file(path) != files[name]["sha256"]:
            raise UserError(f"{path} is damaged: its contents differ from {MANIFEST}")


def check_shapes(model: Mapping[str, Sequence[int]], saved: Mapping[str, Sequence[int]], source) -> None:
    """Shapes by name, of a model's tensors and of those in `source`. Raises UserError that names the first tensor which
    does not fit."""
    for name in sorted(model.keys() | saved.keys()):
        there = tuple(saved[name]) if name in saved else "nothing"
        here = tuple(model[name]) if name in model else "nothing"
        if there != here:
            raise UserError(f"{source} is of another model: {name} is {there} there and {here} here")


def write_plain_json(path: Path, value) -> Path:
    """Neither atomic nor synced: for a folder that is renamed when it is whole. Returns the path."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
