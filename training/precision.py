"""In which precision matrices are multiplied. Weights, optimiser state, norms and losses stay float32."""

import time
from contextlib import nullcontext

import torch


def choose(precision: str, device: torch.device) -> str:
    """"auto" -> "float32" or "bfloat16": on a GPU what it supports, on a CPU what is faster here, by trying.

    Some CPUs multiply bfloat16 three times faster than float32 (AVX512-BF16, AMX), others many times slower.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if 1.5 * _seconds(torch.bfloat16) < _seconds(torch.float32) else "float32"


def _seconds(dtype: torch.dtype) -> float:
    """The best of several products of a size that training uses."""
    a, b = torch.randn(2048, 256).to(dtype), torch.randn(256, 512).to(dtype)
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return best


def autocast(precision: str, device: torch.device):
    """The context in which a forward pass runs."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()
