"""Attention over a cache with torch alone: what a CPU runs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from onevocab.kernels.decode.cache import gather_pages, visible_keys


def decode_attention_torch(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, block_table: Tensor | None, scale: float
) -> Tensor:
    """One SDPA call: heads that share a key head become its queries, so that no key is repeated."""
    on_cpu, groups = q.device.type == "cpu", q.shape[1] // k.shape[1]
    shortest, longest = (int(x) for x in lengths.aminmax()) if on_cpu else (0, 0)
    if block_table is not None:
        block_table = block_table[:, : -(-max(longest, 1) // k.shape[2])] if on_cpu else block_table
        k, v = gather_pages(k, block_table), gather_pages(v, block_table)
    if on_cpu:  # keys that no row has any more cost nothing
        k, v = k[:, :, : max(longest, 1)], v[:, :, : max(longest, 1)]
    grouped = q.reshape(q.shape[0], k.shape[1], groups * q.shape[2], q.shape[3])
    if shortest == longest > 0 and q.shape[2] == 1:  # one row, as in a conversation, or rows of one length
        return F.scaled_dot_product_attention(grouped, k, v, scale=scale).reshape(q.shape)
    visible = visible_keys(lengths, q.shape[2], k.shape[2])
    empty = ~visible.any(-1)
    # An empty row sees one key, so that no kernel divides 0 by 0; its result is dropped below.
    mask = visible | (empty[..., None] & (torch.arange(k.shape[2], device=q.device) == 0))
    mask = mask[:, None].repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
    if not bool(torch.isfinite(out).all()):  # memory never written, behind some length: NaN passes through any mask
        k, v = (x.masked_fill(~visible[:, None, -1, :, None], 0.0) for x in (k, v))
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
    return out.reshape(q.shape).masked_fill(empty[:, None, :, None], 0.0)
