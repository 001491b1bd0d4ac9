"""Attention whose mask is at most two intervals of visible keys per query.

Shapes: q (B, H, S, D); k and v (B, Hkv, T, D), H a multiple of Hkv; float32, float64, bfloat16 or float16.
`reference.py` is the definition, `torch_form.py` what a CPU runs; a GPU runs Triton kernels that walk over visible
blocks only.
"""

import os

import torch
from torch import Tensor

from onevocab.kernels.attention.mask import IntervalMask
from onevocab.kernels.attention.ops_c import attention_c
from onevocab.kernels.attention.reference import attention_reference
from onevocab.kernels.attention.torch_form import attention_torch
from onevocab.kernels.backend import select_backend
from onevocab.kernels.c_library import why_not
from onevocab.kernels.decode import decode_attention

__all__ = ["IntervalMask", "attention", "attention_reference"]

DETERMINISTIC = "ONEVOCAB_DETERMINISTIC"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask | None = None,
    scale: float | None = None,
    backend: str | None = None,
    deterministic: bool | None = None,
) -> Tensor:
    """Like `attention_reference`, fused. mask=None means causal and needs S == T. backend: see `kernels.backend`.

    deterministic: False allows a faster backward pass on a GPU whose last bits change from run to run, where the tuning
    table has one; None: what the environment variable ONEVOCAB_DETERMINISTIC says, 1 unless it is set to 0.
    Raises ValueError when shapes, types or devices of q, k, v and mask do not belong together, when a tensor is
    empty, and when a backend is asked for that cannot run.
    """
    _check(q, k, v, mask)
    chosen = select_backend("attention", q, k, v, backend=backend, unsupported=_unsupported(q, scale),
                            without_c=lambda: _without_c(q, k, v, mask))
    if chosen == "reference":
        return attention_reference(q, k, v, mask, scale)
    if chosen == "triton":  # imported here: not everywhere is triton installed
        grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        if mask is not None and mask.lengths is not None and not grad and q.shape[1] // k.shape[1] <= 128:
            return decode_attention(q, k, v, mask.lengths.clamp(0, k.shape[2]), scale=scale, backend="triton")
        from onevocab.kernels.attention import ops_triton

        if mask is None:
            mask = IntervalMask.causal(torch.zeros(q.shape[0], q.shape[2], dtype=torch.int32, device=q.device))
        if deterministic is None:
            deterministic = os.environ.get(DETERMINISTIC, "1") != "0"
        return ops_triton.attention(q, k, v, mask, scale, deterministic)
    if chosen == "c":
        return attention_c(q, k, v, mask, scale)
    return attention_torch(q, k, v, mask, scale)


def _without_c(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask | None) -> str | None:
    """Why the C kernels do not take these, or None."""
    if mask is None:
        return "torch's own kernel is as fast without a mask"
    if q.shape[-1] % 16:
        return f"its C kernel takes head dims that are multiples of 16, not {q.shape[-1]}"
    if q.shape[2] == 1:
        return "one query a row would leave most of a vector empty"
    return why_not("attention", q, k, v, types=(torch.float32, torch.bfloat16, torch.float16))


def _unsupported(q: Tensor, scale: float | None) -> str | None:
    """Why the Triton kernels cannot take q of this type and head dim, or None."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels take float32, bfloat16 and float16, not {q.dtype}"
    if not 16 <= q.shape[-1] <= 256:
        return f"its kernels take head dims 16 to 256, not {q.shape[-1]}"
    if scale is not None and scale <= 0:
        return f"its kernels take a positive scale, not {scale}"
    return None


def _check(q, k, v, mask):
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"attention: {shapes} are not all (B, heads, length, dim)")
    if not (q.numel() and k.numel() and v.numel()):
        raise ValueError(f"attention: {shapes}: a tensor is empty")
    fits = k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[-1] == k.shape[-1]
    if not fits or q.shape[1] % k.shape[1] or (mask is None and q.shape[2] != k.shape[2]):
        raise ValueError(f"attention: {shapes} do not fit")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"attention: q {q.dtype}, k {k.dtype}, v {v.dtype} are not one floating-point type")
    if mask is None:
        return
    shape = (q.shape[0], q.shape[2])
    for part in (mask.first, mask.last, mask.prefix_first, mask.prefix_last):
        if part is not None and part.shape != shape:
            raise ValueError(f"attention: mask {tuple(part.shape)} is not {shape}")
        if part is not None and part.device != q.device:
            raise ValueError(f"attention: mask on {part.device}, q on {q.device}")
    if (mask.prefix_first is None) != (mask.prefix_last is None):
        raise ValueError("attention: a mask's second interval needs both of its ends")
