"""Launches of the C kernels, and their place in autograd."""

import torch
from torch import Tensor

from onevocab.kernels.attention.mask import IntervalMask
from onevocab.kernels.c_library import call

PARTS, PART = 16, 256  # a backward pass is cut into that many tasks, but not below so many queries


def attention_c(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float | None) -> Tensor:
    """Like `attention_reference`, on inputs that `attention` has checked; computed in float32."""
    spans = mask.intervals(k.shape[2])
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return AttentionC.apply(q.float(), k.float(), v.float(), spans, scale).to(q.dtype)


class AttentionC(torch.autograd.Function):
    """q (B, H, S, D), k and v (B, Hkv, T, D), spans (B, 2 or 4, S) -> a view of (B, S, H, D); gradients are such views
    as well, which is what the projections around attention read without a copy."""

    @staticmethod
    def forward(ctx, q, k, v, spans, scale):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        batch, heads, queries, dim = q.shape
        out = q.new_zeros(batch, queries, heads, dim)  # queries that see nothing are not written
        stats = q.new_empty(batch, heads, queries, 2)
        ctx.shape = batch, heads, heads // k.shape[1], queries, k.shape[2], dim, spans.shape[1] // 2, scale
        call("attention", "attention_forward", *_strided(q), *_strided(k), *_strided(v), spans, out, stats, *ctx.shape)
        ctx.save_for_backward(q, k, v, spans, out, stats)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, spans, out, stats = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        batch, heads, keys, dim = k.shape
        parts = max(min(PARTS // (batch * heads), q.shape[2] // PART), 1)
        dq, dk, dv = torch.zeros_like(out), *(k.new_zeros(parts, batch, keys, heads, dim) for _ in range(2))
        call("attention", "attention_backward", *_strided(q), *_strided(k), *_strided(v), spans, out, stats,
             *_strided(grad), dq, dk, dv, *ctx.shape, parts)
        dk, dv = (x[0] if parts == 1 else x.sum(0) for x in (dk, dv))
        return *(x.transpose(1, 2) for x in (dq, dk, dv)), None, None


def _strided(x: Tensor) -> tuple:
    return x, *x.stride()[:3]
