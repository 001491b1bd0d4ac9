"""Which implementation of an operation runs: one place that decides, can be told, and says what it chose.

- `triton`: fused GPU kernels. On CPU tensors they run only under Triton's interpreter, which is for tests.
- `c`: kernels in C for a CPU's float32 and bfloat16, compiled where they first run (`c_library`).
- `torch`: the fastest correct way with torch alone; what a CPU without a compiler uses.
- `reference`: the definition, written to be read.

In this order: the argument `backend`, the environment variable ONEVOCAB_KERNELS, and else Triton for CUDA tensors where
triton is installed and supports the inputs, C for CPU tensors where the operation has such kernels, a compiler is there
and they support the inputs, torch for everything else.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BACKENDS = ("triton", "c", "torch", "reference")
VARIABLE = "ONEVOCAB_KERNELS"
TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class Choice(NamedTuple):
    backend: str
    reason: str


_HAS_TRITON = importlib.util.find_spec("triton") is not None
_last: dict[str, Choice] = {}


def interpreting() -> bool:
    """Whether Triton runs on the CPU, slowly. The variable must be set before triton is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def chosen() -> dict[str, Choice]:
    """operation -> (backend, reason) of its last call in this process, calls in compiled code left out."""
    return dict(_last)


def note(operation: str, remark: str) -> None:
    """Adds to what `chosen()` says of an operation's last call: how its backend did it."""
    last = _last.get(operation)
    if last is not None and remark not in last.reason:
        _last[operation] = Choice(last.backend, f"{last.reason}; {remark}")


@contextlib.contextmanager
def forced(backend: str | None):
    """Within the block all operations that are not told otherwise run on this backend; None changes nothing."""
    before = os.environ.get(VARIABLE)
    if backend is not None:
        os.environ[VARIABLE] = backend
    try:
        yield
    finally:
        if backend is not None:
            os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})


def unsupported_type(*tensors: Tensor) -> str | None:
    """Why no Triton kernel takes these tensors, or None."""
    kinds = sorted({str(x.dtype) for x in tensors if x.is_floating_point() and x.dtype not in TRITON_TYPES})
    return f"the kernel has no {' or '.join(kinds)}" if kinds else None


def autocast_type(device: torch.device) -> torch.dtype | None:
    """The type that autocast multiplies matrices in, None where it is off or unknown (the device "meta")."""
    kind = device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def select_backend(
    operation: str,
    *tensors: Tensor,
    backend: str | None = None,
    unsupported: str | None = None,
    without_c: Callable[[], str | None] = lambda: "it has no kernel in C",
) -> str:
    """The backend for `operation` on these tensors: one of BACKENDS.

    unsupported says why Triton cannot take these inputs, without_c() why the kernels in C cannot, on a CPU; None when
    they can. Raises ValueError when tensors lie on several devices, for an unknown name, and when Triton or C is asked
    for where it cannot run.
    """
    device = tensors[0].device if tensors else None
    if device is None or any(tensor.device != device for tensor in tensors[1:]):
        devices = sorted({str(tensor.device) for tensor in tensors})
        raise ValueError(f"{operation}: tensors on {' and '.join(devices) or 'no device'}, not on one device")
    asked, why = backend, "the argument backend"
    if asked is None and os.environ.get(VARIABLE):
        asked, why = os.environ[VARIABLE], f"the environment variable {VARIABLE}"
    on_cuda = device.type == "cuda"
    obstacle = None
    if not _HAS_TRITON:
        obstacle = "triton is not installed"
    elif not on_cuda and not interpreting():
        obstacle = f"the tensors are on {device}, and TRITON_INTERPRET=1 is not set"
    elif unsupported:
        obstacle = unsupported
    if asked is not None:
        if asked not in BACKENDS:
            raise ValueError(f"{operation}: {why} is {asked!r}; it can be {', '.join(BACKENDS)}")
        if asked == "triton" and obstacle:
            raise ValueError(f"{operation}: {why} asks for triton, but {obstacle}")
        if asked == "c" and (obstacle := without_c() if device.type == "cpu" else f"the tensors are on {device}"):
            raise ValueError(f"{operation}: {why} asks for c, but {obstacle}")
        choice = Choice(asked, why)
    elif on_cuda and obstacle is None:
        choice = Choice("triton", f"tensors on {device}")
    elif device.type == "cpu":
        reason = without_c()
        choice = Choice("torch", f"tensors on cpu; {reason}") if reason else Choice("c", "tensors on cpu")
    else:
        choice = Choice("torch", obstacle if on_cuda else f"tensors on {device}")
    if not torch.compiler.is_compiling():  # a compiler would guard what is in there
        _last[operation] = choice
    return choice.backend


def on_device(launch: Callable) -> Callable:
    """Triton launches on the current device: for the call it becomes the first argument's."""

    @functools.wraps(launch)
    def run(first: Tensor, *others, **options):
        with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
            return launch(first, *others, **options)

    return run
