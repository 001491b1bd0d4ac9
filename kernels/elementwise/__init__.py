"""RMSNorm, per-head RMSNorm with rotary positions, and SwiGLU.

Each takes `backend`: "triton", "torch" (the fastest correct torch operators), "reference", or None to choose.
"""

import functools

import torch
from torch import Tensor

from onevocab.kernels.backend import autocast_type, select_backend, unsupported_type
from onevocab.kernels.c_library import why_not
from onevocab.kernels.elementwise.ops_c import QKNormRopeC, SwiGLUC, rms_norm_c
from onevocab.kernels.elementwise.reference import (
    qk_norm_rope_reference,
    rms_norm_reference,
    rotary_reference,
    swiglu_reference,
)
from onevocab.kernels.elementwise.torch_form import qk_norm_rope_torch, rms_norm_torch, swiglu_torch

__all__ = [
    "qk_norm_rope", "qk_norm_rope_reference", "rms_norm", "rms_norm_reference", "rotary_reference", "swiglu",
    "swiglu_reference",
]  # fmt: skip


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, backend: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """x (..., d), weight (d,) -> (..., d); with a residual (..., d): (normed, x + residual), both (..., d).

    Under autocast a norm that would be float32 comes out in autocast's type, rounded once for all the matrices that
    read it; arithmetic and the sum stay float32. Raises ValueError when shapes, dtypes or devices do not belong
    together.
    """
    given = (x, weight) if residual is None else (x, weight, residual)
    _check("rms_norm", *given)
    if weight.shape != x.shape[-1:] or (residual is not None and residual.shape != x.shape):
        raise ValueError(f"rms_norm: {_shapes(*given)} do not fit x (..., d), weight (d,), residual (..., d)")
    odd = f"a row holds at most 32768, not {len(weight)}" if len(weight) > 32768 else unsupported_type(*given)
    chosen = select_backend("rms_norm", *given, backend=backend, unsupported=odd,
                            without_c=lambda: why_not("elementwise", *given))
    kind = functools.reduce(torch.promote_types, (each.dtype for each in given))
    if kind == torch.float32:
        kind = autocast_type(x.device) or kind
    if chosen == "triton":
        from onevocab.kernels.elementwise import ops_triton

        if residual is None:
            return ops_triton.rms_norm(x, weight, eps, kind)
        return ops_triton.add_rms_norm(x, residual, weight, eps, kind)
    if chosen == "c":
        return rms_norm_c(x, residual, weight, eps, kind)
    total = x if residual is None else x + residual
    if chosen == "reference":
        normed = rms_norm_reference(total, weight, eps).to(kind)
    else:
        normed = rms_norm_torch(total, weight, eps, kind)
    return normed if residual is None else (normed, total)


def qk_norm_rope(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, backend: str | None = None
) -> Tensor:
    """RMSNorm of each head, then rotary positions: x (B, S, H, D), weight (D,), cos and sin (B, S, D/2).

    Norm and angles in the weight's precision when x has another (autocast). cos and sin get no gradient. Raises
    ValueError when shapes, dtypes or devices do not belong together.
    """
    _check("qk_norm_rope", x, weight, cos, sin)
    fits = x.dim() == 4 and x.shape[-1] % 2 == 0 and weight.shape == x.shape[-1:]
    if not fits or not cos.shape == sin.shape == (*x.shape[:2], x.shape[-1] // 2):
        shapes = _shapes(x, weight, cos, sin)
        raise ValueError(f"qk_norm_rope: {shapes} do not fit x (B, S, H, D), weight (D,), cos and sin (B, S, D/2)")
    odd = f"head dims go up to 512, not {x.shape[-1]}" if x.shape[-1] > 512 else unsupported_type(x, weight, cos, sin)
    chosen = select_backend("qk_norm_rope", x, weight, cos, sin, backend=backend, unsupported=odd,
                            without_c=lambda: why_not("elementwise", x, weight, cos, sin))
    if chosen == "triton":
        from onevocab.kernels.elementwise import ops_triton

        return ops_triton.qk_norm_rope(x, weight, cos, sin, eps)
    if chosen == "c":
        return QKNormRopeC.apply(x, weight, cos, sin, eps)
    kind, x = x.dtype, x.to(weight.dtype)
    if chosen == "reference":
        return qk_norm_rope_reference(x, weight, cos, sin, eps).to(kind)
    return qk_norm_rope_torch(x, weight, cos, sin, eps).to(kind)


def swiglu(gate: Tensor, up: Tensor, backend: str | None = None) -> Tensor:
    """silu(gate) * up, both (..., m). Raises ValueError when they do not belong together."""
    _check("swiglu", gate, up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu: {gate.dtype} {tuple(gate.shape)} and {up.dtype} {tuple(up.shape)} differ")
    chosen = select_backend("swiglu", gate, up, backend=backend, unsupported=unsupported_type(gate),
                            without_c=lambda: why_not("elementwise", gate, up))
    if chosen == "reference":
        return swiglu_reference(gate, up)
    if chosen == "c":
        return SwiGLUC.apply(gate, up)
    if chosen == "triton":
        from onevocab.kernels.elementwise import ops_triton

        return ops_triton.swiglu(gate, up)
    return swiglu_torch(gate, up)


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)


def _check(name: str, *tensors: Tensor) -> None:
    if any(x.dim() == 0 or x.numel() == 0 or not x.is_floating_point() for x in tensors):
        kinds = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in tensors)
        raise ValueError(f"{name}: {kinds}; takes floating-point tensors that are not empty")
