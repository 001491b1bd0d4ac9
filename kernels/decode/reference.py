"""The definition of attention over a cache, written to be read."""

import torch
from torch import Tensor

from onevocab.kernels.decode.cache import gather_pages, visible_keys


def decode_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, block_table: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale * q k^T) v over the visible keys, (B, H, Q, D); scale is D ** -0.5 unless given."""
    if block_table is not None:
        k, v = gather_pages(k, block_table), gather_pages(v, block_table)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    visible = visible_keys(lengths, q.shape[2], k.shape[2])[:, None]
    v = v.masked_fill(~visible[:, :, -1, :, None], 0.0)  # 0 * NaN would be NaN
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) * visible) @ v
