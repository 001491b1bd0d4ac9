"""Attention's definition, written to be read."""

import torch
from torch import Tensor

from onevocab.kernels.attention.mask import IntervalMask


def attention_reference(q, k, v, mask: IntervalMask | None = None, scale: float | None = None) -> Tensor:
    """softmax(scale * q k^T) v over the visible keys (B, H, S, D); scale is D ** -0.5 unless given."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is None:
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    else:
        visible = mask.dense(k.shape[2])
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) * visible) @ v
