"""Attention's cases for ahead-of-time compilation."""

import torch

from onevocab.kernels.aot_cases import backward, cases, leaf
from onevocab.kernels.attention import IntervalMask, attention


def _attention(dim: int, dtype: torch.dtype, two: bool) -> None:
    """Forward and backward, four query heads per key head, rows of 512."""
    q, k, v = (leaf(1, 512, heads, dim, dtype=dtype) for heads in (8, 2, 2))
    document = torch.arange(512)[None] // 128
    mask = IntervalMask.shared_prefix(document, document.clamp(max=1) - 1) if two else IntervalMask.causal(document)
    backward(attention(*(x.transpose(1, 2) for x in (q, k, v)), mask))


_MAIN = cases("attention", _attention, (64, 128), ("bf16",), plain=(False,), two=(True,))
CASES = _MAIN | cases("attention", _attention, (128,), ("fp16", "fp32"), two=(True,))
# What a model runs most: no spills, and on Hopper the matrix products use warpgroups, in all kernels but these.
MAIN = tuple(_MAIN)
WITHOUT_PRODUCTS = ("delta_kernel",)
