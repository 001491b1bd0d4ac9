"""Kernels in C for CPUs: compiled where they first run, by the machine's own compiler, for its own CPU.

A library is built from an operation's `kernels.c` in a second or two and kept in the user's cache folder
(XDG_CACHE_HOME, else ~/.cache, else a private temporary one) under a name made from all that it depends on. Without a
compiler, or where one fails, there is none, `why_not` says why, and the operations run on torch alone.

Threads are those of torch: the library is linked without an OpenMP runtime of its own and finds torch's, since two
pools of threads would fight for the cores.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
FLAGS = ["-O3", "-march=native", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-fno-math-errno",
         "-fno-trapping-math", "-fno-strict-aliasing"]
LIMIT = 120  # seconds for a compiler
TYPES = (torch.float32, torch.bfloat16)

_problems: dict[str, str] = {}


def why_not(operation: str, *tensors: Tensor, types: tuple[torch.dtype, ...] = TYPES) -> str | None:
    """Why the C kernels of an operation's folder cannot take these tensors, or None."""
    if torch.compiler.is_compiling():
        return "torch.compile writes its own"
    if any(type(x) not in (Tensor, nn.Parameter) for x in tensors):
        return "the tensors are of a class of their own"  # fake ones have no memory
    odd = sorted({str(x.dtype) for x in tensors if x.is_floating_point() and x.dtype not in types})
    if odd:
        return f"the C kernel has no {' or '.join(odd)}"
    return missing(operation)


@functools.cache
def library(operation: str) -> ctypes.CDLL | None:
    """The compiled kernels of an operation's folder; None where they cannot be had, and `why_not` says why."""
    try:
        return ctypes.CDLL(str(_build(operation)))
    except (OSError, subprocess.SubprocessError, UnicodeError) as error:
        _problems[operation] = f"no C kernels: {(str(error).strip() or repr(error)).splitlines()[0][:200]}"
        return None


def missing(operation: str) -> str | None:
    """Why there is no library of an operation, None where there is one."""
    return None if library(operation) else _problems[operation]


def _build(operation: str) -> Path:
    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")))), None)
    if compiler is None:
        raise OSError("no C compiler (cc, gcc, clang, or what CC names)")
    source = HERE / operation / "kernels.c"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=LIMIT).stdout
    parts = [version, *FLAGS, _cpu(), (HERE / "vector.h").read_text(), source.read_text()]
    name = f"{operation}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:20]}.so"
    folder = _cache_folder()
    if not (folder / name).exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            compiled, linked = Path(scratch, "kernels.o"), Path(scratch, "kernels.so")
            # Linked without -fopenmp: its functions are torch's, which are there already.
            for command in ([compiler, *FLAGS, f"-I{HERE}", "-c", str(source), "-o", str(compiled)],
                            [compiler, "-shared", str(compiled), "-o", str(linked), "-lm"]):
                done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=LIMIT)
                if done.returncode:
                    lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
                    raise OSError(f"{compiler} failed: {lines[0] if lines else done.returncode}")
            os.replace(linked, folder / name)
    return folder / name


def _cpu() -> str:
    """What -march=native depends on: a home folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])


def _cache_folder() -> Path:
    """A folder that nobody else can write to: what lies in it is run."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return _private(Path(base, "onevocab"))
    except (OSError, RuntimeError):  # no home, or one that cannot be written
        return _private(Path(tempfile.gettempdir(), f"onevocab-{os.getuid()}"))


def _private(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise OSError(f"{folder} is not a folder that only its owner can write to")
    if not os.access(folder, os.W_OK):
        raise OSError(f"{folder} cannot be written to")
    return folder


def call(operation: str, function: str, *arguments: Tensor | int | float | None) -> None:
    """Runs a function of an operation's library on torch's threads, whose number is its last argument. It takes
    pointers, long and float, and returns whether its scratch memory could not be had: then MemoryError."""
    given = [_argument(value) for value in (*arguments, torch.get_num_threads())]
    if getattr(library(operation), function)(*given):
        raise MemoryError(f"{function}: no memory for what it needs besides its results")


def _argument(value):
    if value is None or isinstance(value, Tensor):
        return ctypes.c_void_p(None if value is None else value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_long(value)
