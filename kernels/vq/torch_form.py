"""The nearest code with torch alone: what a CPU runs."""

import torch
from torch import Tensor

CHUNK = 1 << 20  # distances that the CPU holds at once: 4 MB of float32 stay in its cache


def vq_assign_torch(latents: Tensor, codebook: Tensor, rows: int) -> Tensor:
    """latents (N, d) of any type, codebook (K, d) -> (N,) int64, in the codebook's type; `rows` latents at a time."""
    half_square, transposed = codebook.square().sum(-1).mul_(0.5), codebook.t()
    codes = latents.new_empty(len(latents), dtype=torch.int64)
    for x, out in zip(latents.split(rows), codes.split(rows), strict=True):
        torch.argmin(torch.addmm(half_square, x.to(codebook.dtype), transposed, alpha=-1), -1, out=out)
    return codes
