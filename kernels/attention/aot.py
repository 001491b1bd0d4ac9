"""Attention's cases for ahead-of-time compilation."""

import torch

from onevocab.kernels.aot_cases import backward, cases, leaf
from onevocab.kernels.attention import IntervalMask, attention
from onevocab.kernels.attention.configs import SHORT


def _attention(dim: int, dtype: torch.dtype, two: bool, mean_keys: float | None = None, deterministic: bool = True,
               aligned: bool = True) -> None:
    """Forward and backward, four query heads per key head, rows of 512. two: a second interval; aligned: False for
    tensors that no descriptor can address."""
    q, k, v = (leaf(1, 512, heads, dim, dtype=dtype) for heads in (8, 2, 2))
    document = torch.arange(512)[None] // 128
    mask = IntervalMask.shared_prefix(document, document.clamp(max=1) - 1) if two else IntervalMask.causal(document)
    mask.mean_keys = mean_keys
    if not aligned:
        q, k, v = (torch.cat([x, x[..., :8]], -1)[..., :dim] for x in (q, k, v))
    backward(attention(*(x.transpose(1, 2) for x in (q, k, v)), mask, deterministic=deterministic))


_MAIN = cases("attention", _attention, (64, 128), ("bf16",), plain=(False,), two=(True,), short=(False, SHORT))
CASES = (
    _MAIN
    | cases("attention", _attention, (96, 256), ("bf16",), plain=(False,))
    | cases("attention", _attention, (64,), ("bf16",), fused=(False, None, False))
    | cases("attention", _attention, (64, 128), ("bf16",), pointers=(False, None, True, False))
    | cases("attention", _attention, (128,), ("fp16", "fp32"), two=(True,))
    | cases("attention", _attention, (256,), ("fp32",), plain=(False,))
)
MAIN = tuple(_MAIN)  # what a model runs most
WITHOUT_PRODUCTS = ("delta_kernel",)
TWO_PROGRAMS = ("forward_kernel", "dq_kernel", "dkdv_kernel")
