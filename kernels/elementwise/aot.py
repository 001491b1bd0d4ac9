"""Cases of the norms, the rotation and the gate for ahead-of-time compilation."""

import torch

from onevocab.kernels.aot_cases import backward, cases, leaf
from onevocab.kernels.elementwise import qk_norm_rope, rms_norm, swiglu


def _rms_norm(width: int, dtype: torch.dtype, residual: bool) -> None:
    x, weight = leaf(64, width, dtype=dtype), leaf(width, dtype=dtype)
    out = rms_norm(x, weight, 1e-6, residual=leaf(64, width, dtype=dtype) if residual else None)
    backward(*(out if residual else (out,)))


def _qk_norm_rope(dim: int, dtype: torch.dtype) -> None:
    angles = (torch.zeros(1, 64, dim // 2, dtype=dtype) for _ in range(2))
    backward(qk_norm_rope(leaf(1, 64, 4, dim, dtype=dtype), leaf(dim, dtype=dtype), *angles, 1e-6))


def _swiglu(width: int, dtype: torch.dtype) -> None:
    backward(swiglu(leaf(64, width, dtype=dtype), leaf(64, width, dtype=dtype)))


CASES = (
    cases("rms_norm", _rms_norm, (256, 1024, 2048, 4096, 16384), ("bf16",), plain=(False,))
    | cases("rms_norm", _rms_norm, (1024, 4096), ("bf16", "fp32"), residual=(True,))
    | cases("qk_norm_rope", _qk_norm_rope, (64, 128, 256), ("bf16",))
    | cases("qk_norm_rope", _qk_norm_rope, (128,), ("fp32",))
    | cases("swiglu", _swiglu, (4096,), ("bf16", "fp32"))
)
# A row of 16,384 that a program holds whole is 128 registers a thread, all that there are for 16 warps.
MAY_SPILL = ("rms_norm-16384-bf16",)
