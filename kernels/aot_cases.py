"""What the ahead-of-time cases of all operations share: names for widths and types, leaves, and a backward pass.

An operation's `aot.py` has CASES: name -> a call of its public function on small CPU tensors; `kernels/aot.py` says
what becomes of it. They reach every row of the operation's tuning table that a target can reach. It may also have MAIN,
names of cases that on Hopper must have warpgroup matrix products; WITHOUT_PRODUCTS, kernels of these that multiply no
matrices; TWO_PROGRAMS, kernels of these of which a multiprocessor must hold two programs; and MAY_SPILL, names of cases
in 16-bit types that may spill on Hopper, with the reason.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Cases = dict[str, Callable[[], None]]


def cases(name: str, call: Callable, widths: Iterable[int], dtypes: Iterable[str], **kinds: tuple) -> Cases:
    """`name-width-dtype` -> call(width, dtype); with kinds, suffix=(more arguments), one of each:
    `name-width-dtype-suffix` -> call(width, dtype, *more), where the suffix "plain" is left out of the name."""
    return {
        f"{name}-{width}-{dtype}" + ("" if suffix == "plain" else f"-{suffix}"):
            lambda width=width, dtype=dtype, more=more: call(width, DTYPES[dtype], *more)
        for width in widths for dtype in dtypes for suffix, more in (kinds or {"plain": ()}).items()
    }  # fmt: skip


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def backward(*outputs: Tensor) -> None:
    torch.autograd.backward(outputs, [torch.zeros_like(x) for x in outputs])
