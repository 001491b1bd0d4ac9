"""The definitions of the norms, the rotation and the gate, written to be read."""

import torch
from torch import Tensor


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
