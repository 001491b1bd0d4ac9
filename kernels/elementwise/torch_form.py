"""The norms, the rotation and the gate with torch alone, with backward passes that touch memory as little as they can:
written plainly they cost a CPU a third of what the matmuls cost. torch.compile, which fuses them itself, sees them
written plainly.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from onevocab.kernels.elementwise.reference import rotary_reference


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float, kind: torch.dtype) -> Tensor:
    """kind: the type of the result"""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return F.rms_norm(x, weight.shape, weight, eps).to(kind)
    return _RMSNorm.apply(x, weight, eps, kind)


def qk_norm_rope_torch(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return rotary_reference(F.rms_norm(x, weight.shape, weight, eps), cos, sin)
    return _QKNormRope.apply(x, weight, cos, sin, eps)


def swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
    return F.silu(gate) * up if plain else _SwiGLU.apply(gate, up)


def _rms_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """LayerNorm's fused backward with a mean of zero is RMSNorm's but for rstd * mean(grad * weight)."""
    d = x.shape[-1]
    grad = grad.to(x.dtype).contiguous()
    rstd = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(d)).add_(eps).rsqrt_()
    d_x, d_weight, _ = torch.ops.aten.native_layer_norm_backward(
        grad, x, [d], torch.zeros_like(rstd), rstd, weight, None, [True, True, False]
    )
    return d_x.addcmul_(rstd, (grad @ weight)[..., None], value=1 / d), d_weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, kind):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps).to(kind)

    @staticmethod
    def backward(ctx, grad):
        return *_rms_backward(grad, *ctx.saved_tensors, ctx.eps), None, None


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
