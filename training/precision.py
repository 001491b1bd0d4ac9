"""In which precision matrices are multiplied. Weights, optimiser state, norms and losses stay float32."""

import time
from contextlib import nullcontext

import torch


def select_precision(precision: str, device: torch.device) -> str:
    """"auto" -> "float32" or "bfloat16": on a GPU what it supports, on a CPU what is faster here, by trying.

    Some CPUs multiply bfloat16 three times faster than float32 (AVX512-BF16, AMX), others many times slower.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    sizes = 2048, 256, 512  # as training uses them
    plain, low = (_flops(*sizes, 8, device, dtype) for dtype in (torch.float32, torch.bfloat16))
    return "bfloat16" if low > 1.5 * plain else "float32"


def device_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of a square product, measured here."""
    n = 8192 if device.type == "cuda" else 2048
    return _flops(n, n, n, 4, device, getattr(torch, precision))


def _flops(rows: int, inner: int, columns: int, times: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of (rows, inner) @ (inner, columns): the best of `times` tries."""
    a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, inner), (inner, columns)))
    best = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - began)
    return 2 * rows * inner * columns / best


def autocast(precision: str, device: torch.device):
    """The context in which a forward pass runs."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()
