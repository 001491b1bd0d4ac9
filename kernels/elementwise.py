"""RMSNorm, per-head RMSNorm with rotary positions, and SwiGLU, with backward passes that touch memory as little
as they can: written plainly they cost a CPU a third of what the matmuls cost. torch.compile, which fuses them itself,
sees them written plainly.

Each takes `backend`: "triton", "torch" (the fastest correct torch operators), "reference", or None to choose.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from onevocab.kernels.backend import choose

TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported_type(*tensors: Tensor) -> str | None:
    """Why no Triton kernel takes these tensors, or None."""
    kinds = sorted({str(x.dtype) for x in tensors if x.is_floating_point() and x.dtype not in TRITON_TYPES})
    return f"the kernel has no {' or '.join(kinds)}" if kinds else None


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None):
    """x / sqrt(mean(x ** 2) + eps) * weight over the last dimension (Zhang and Sennrich 2019).

    With a residual of x's shape: (that of x + residual, x + residual).
    """
    if residual is not None:
        total = x + residual
        return rms_norm_reference(total, weight, eps), total
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (i, i + D/2) of x (B, S, H, D) by the angles whose cos and sin are (B, S, D/2)."""
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def qk_norm_rope_reference(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """RMSNorm of each head, then rotary positions."""
    return rotary_reference(rms_norm_reference(x, weight, eps), cos, sin)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020)."""
    return gate * torch.sigmoid(gate) * up


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, backend: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """x (..., d), weight (d,) -> (..., d); with a residual (..., d): (normed, x + residual), both (..., d).

    Raises ValueError when shapes, dtypes or devices do not belong together.
    """
    given = (x, weight) if residual is None else (x, weight, residual)
    _check("rms_norm", *given)
    if weight.shape != x.shape[-1:] or (residual is not None and residual.shape != x.shape):
        raise ValueError(f"rms_norm: {_shapes(*given)} do not fit x (..., d), weight (d,), residual (..., d)")
    odd = f"a row holds at most 32768, not {len(weight)}" if len(weight) > 32768 else unsupported_type(*given)
    chosen = choose("rms_norm", *given, backend=backend, unsupported=odd)
    if chosen == "reference":
        return rms_norm_reference(x, weight, eps, residual)
    if chosen == "triton":
        from onevocab.kernels import elementwise_triton as kernels

        return kernels.rms_norm(x, weight, eps) if residual is None else kernels.add_rms_norm(x, residual, weight, eps)
    if residual is not None:
        total = x + residual
        return _rms_norm_torch(total, weight, eps), total
    return _rms_norm_torch(x, weight, eps)


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
    chosen = choose("qk_norm_rope", x, weight, cos, sin, backend=backend, unsupported=odd)
    if chosen == "triton":
        from onevocab.kernels import elementwise_triton as kernels

        return kernels.qk_norm_rope(x, weight, cos, sin, eps)
    kind, x = x.dtype, x.to(weight.dtype)
    if chosen == "reference":
        return qk_norm_rope_reference(x, weight, cos, sin, eps).to(kind)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return rotary_reference(F.rms_norm(x, weight.shape, weight, eps), cos, sin).to(kind)
    return _QKNormRope.apply(x, weight, cos, sin, eps).to(kind)


def swiglu(gate: Tensor, up: Tensor, backend: str | None = None) -> Tensor:
    """silu(gate) * up, both (..., m). Raises ValueError when they do not belong together."""
    _check("swiglu", gate, up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu: {gate.dtype} {tuple(gate.shape)} and {up.dtype} {tuple(up.shape)} differ")
    chosen = choose("swiglu", gate, up, backend=backend, unsupported=unsupported_type(gate))
    if chosen == "reference":
        return swiglu_reference(gate, up)
    if chosen == "triton":
        from onevocab.kernels import elementwise_triton as kernels

        return kernels.swiglu(gate, up)
    plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
    return F.silu(gate) * up if plain else _SwiGLU.apply(gate, up)


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)


def _check(name: str, *tensors: Tensor) -> None:
    if any(x.dim() == 0 or x.numel() == 0 or not x.is_floating_point() for x in tensors):
        kinds = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in tensors)
        raise ValueError(f"{name}: {kinds}; takes floating-point tensors that are not empty")


def _rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


def _rms_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """LayerNorm's fused backward with a mean of zero is RMSNorm's but for rstd * mean(grad * weight)."""
    d = x.shape[-1]
    grad = grad.contiguous()
    rstd = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(d)).add_(eps).rsqrt_()
    d_x, d_weight, _ = torch.ops.aten.native_layer_norm_backward(
        grad, x, [d], torch.zeros_like(rstd), rstd, weight, None, [True, True, False]
    )
    return d_x.addcmul_(rstd, (grad @ weight)[..., None], value=1 / d), d_weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def backward(ctx, grad):
        return *_rms_backward(grad, *ctx.saved_tensors, ctx.eps), None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """rotary_reference (sign 1) or its inverse (sign -1) without temporaries."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (a, b), (out_a, out_b) = x.chunk(2, -1), out.chunk(2, -1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin, value=sign)
    return out


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, cos, sin, eps):
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps = eps
        return _rotate(F.rms_norm(x, weight.shape, weight, eps), cos, sin, 1)

    @staticmethod
    def backward(ctx, grad):
        x, weight, cos, sin = ctx.saved_tensors
        return *_rms_backward(_rotate(grad, cos, sin, -1), x, weight, ctx.eps), None, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):  # silu is computed again: keeping it would cost as much memory as `up`
        gate, up = ctx.saved_tensors
        d_up, d_silu = F.silu(gate).mul_(grad), grad * up
        # Into the same memory: on a CPU fresh memory costs more than the arithmetic on it.
        return torch.ops.aten.silu_backward.grad_input(d_silu, gate, grad_input=d_silu), d_up
