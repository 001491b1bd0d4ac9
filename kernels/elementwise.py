"""RMSNorm, per-head RMSNorm with rotary positions, and SwiGLU, with backward passes that touch memory as little
as they can: written plainly they cost a CPU a third of what the matmuls cost.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x ** 2) + eps) * weight over the last dimension (Zhang and Sennrich 2019)."""
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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., d), weight (d,) -> (..., d)."""
    if x.device.type != "cpu" or not torch.is_grad_enabled():
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


def qk_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """RMSNorm of each head, then rotary positions: x (B, S, H, D), weight (D,), cos and sin (B, S, D/2)."""
    if x.dtype != weight.dtype:  # autocast: norms and angles stay in the weights' precision
        return qk_norm_rope(x.to(weight.dtype), weight, cos, sin, eps).to(x.dtype)
    if x.device.type != "cpu":
        return rotary_reference(F.rms_norm(x, weight.shape, weight, eps), cos, sin)
    return _QKNormRope.apply(x, weight, cos, sin, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both (..., m)."""
    return F.silu(gate) * up if not torch.is_grad_enabled() else _SwiGLU.apply(gate, up)


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
        d_up = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), d_up
