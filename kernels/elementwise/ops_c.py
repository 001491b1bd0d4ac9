"""Launches of the C kernels, and their place in autograd. float32 and bfloat16."""

import functools

import torch
from torch import Tensor

from onevocab.kernels.c_library import call

SLAB, SLABS = 16, 64  # rows, at least, whose part of a weight's gradient is added up by itself; how many such parts

_call = functools.partial(call, "elementwise")


def rms_norm_c(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, kind: torch.dtype):
    """x and residual (..., d), weight (d,) -> normed of type `kind`; with a residual (normed, x + residual)."""
    normed, total = RMSNormC.apply(x, residual, weight, eps, kind)
    return normed if residual is None else (normed, total)


class RMSNormC(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, kind):
        ctx.types = x.dtype, None if residual is None else residual.dtype, weight.dtype
        ctx.set_materialize_grads(False)
        x, weight = x.contiguous(), weight.float().contiguous()
        total = x
        if residual is not None:
            residual = residual.contiguous()
            total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
        rows, dim = x.numel() // x.shape[-1], x.shape[-1]
        normed, rstd = torch.empty(x.shape, dtype=kind), torch.empty(rows)
        _call("rms_norm_forward", x, residual, weight, total, normed, rstd, rows, dim, float(eps),
              *map(_wide, (x, residual, total, normed)))
        ctx.save_for_backward(total, weight, rstd)
        return normed, None if residual is None else total

    @staticmethod
    def backward(ctx, grad, grad_total):
        total, weight, rstd = ctx.saved_tensors
        kind, residual_kind, weight_kind = ctx.types
        d_total, d_weight = grad_total, None
        if grad is not None:
            grad = grad.contiguous()
            grad_total = None if grad_total is None else grad_total.contiguous()
            rows, dim = total.numel() // total.shape[-1], total.shape[-1]
            d_total, d_weight = torch.empty_like(total), torch.empty(dim)
            _call("rms_norm_backward", grad, grad_total, total, weight, rstd, d_total, d_weight, rows, dim,
                  _slabs(rows), _wide(grad), _wide(total))
            d_weight = d_weight.to(weight_kind)
        d_residual = None if residual_kind is None or d_total is None else d_total.to(residual_kind)
        return None if d_total is None else d_total.to(kind), d_residual, d_weight, None, None


class QKNormRopeC(torch.autograd.Function):
    """x (B, S, H, D), weight (D,), cos and sin (B, S, D / 2), eps -> (B, S, H, D)."""

    @staticmethod
    def forward(ctx, x, weight, cos, sin, eps):
        batch, length, heads, dim = x.shape
        if x.stride(3) != 1 or x.stride(2) != dim or x.stride(0) != length * x.stride(1):
            x = x.contiguous()
        ctx.kind = weight.dtype
        weight, cos, sin = (each.float().contiguous() for each in (weight, cos, sin))
        out, rstd = torch.empty(x.shape, dtype=x.dtype), torch.empty(batch, length, heads)
        _call("qk_norm_rope_forward", x, x.stride(1), weight, cos, sin, out, rstd, batch * length, heads, dim,
              float(eps), _wide(x))
        ctx.save_for_backward(x, weight, cos, sin, rstd)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, cos, sin, rstd = ctx.saved_tensors
        (batch, length, heads, dim), grad = x.shape, grad.contiguous()
        d_x, d_weight = torch.empty(x.shape, dtype=x.dtype), torch.empty(dim)
        _call("qk_norm_rope_backward", grad, x, x.stride(1), weight, cos, sin, rstd, d_x, d_weight, batch * length,
              heads, dim, _slabs(batch * length), _wide(x))
        return d_x, d_weight.to(ctx.kind), None, None, None


class SwiGLUC(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty(gate.shape, dtype=gate.dtype)
        _call("swiglu_forward", gate, up, out, gate.numel(), _wide(gate))
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx, grad):
        (gate, up), grad = ctx.saved_tensors, grad.contiguous()
        d_gate, d_up = (torch.empty(gate.shape, dtype=gate.dtype) for _ in range(2))
        _call("swiglu_backward", grad, gate, up, d_gate, d_up, gate.numel(), _wide(gate))
        return d_gate, d_up


def _wide(x: Tensor | None) -> int:
    return int(x is None or x.dtype == torch.float32)


def _slabs(rows: int) -> int:
    return min(max(rows // SLAB, 1), SLABS)
