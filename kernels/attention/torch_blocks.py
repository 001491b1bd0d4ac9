"""Attention under any interval mask with torch alone, block by block: what a CPU runs for windows.

Queries are cut into blocks of `BLOCK`. The keys that some query of a block sees are gathered, and all blocks run as one
batch of the CPU's flash kernel, each with a small dense mask: work and memory go with what is seen, not with S * T.
Local attention by chunks (Longformer, Beltagy et al. 2020) does so for windows; here a block's keys may be any.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from onevocab.kernels.attention.mask import IntervalMask

BLOCK = 64  # queries; times the heads that share a key head they are one tile

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass
class Blocks:
    """keys (N, n): which keys of the row each of the N = B * blocks blocks reads, numbers along B * T; unused places
    name key 0. bias (N, 1, BLOCK, n): 0 where a query sees a key, -inf elsewhere; 0 in rows that see nothing, whose
    results are dropped: empty (B, 1, S, 1), None if there are none. pairs: how many are computed."""

    keys: Tensor
    bias: Tensor
    empty: Tensor | None
    pairs: int


def blocks_of(mask: IntervalMask, n_keys: int, dtype: torch.dtype) -> Blocks:
    """Made once per mask. O(B * S / BLOCK * T) bits and O(B * S * n)."""
    key = ("blocks", n_keys, dtype)
    if key not in mask._cache:
        mask._cache[key] = _make(mask.intervals(n_keys).long(), n_keys, dtype)
    return mask._cache[key]


def _make(spans: Tensor, n_keys: int, dtype: torch.dtype) -> Blocks:
    batch, _, length = spans.shape
    first, last = spans[:, ::2], spans[:, 1::2]  # (B, 1 or 2, S); an empty interval is n_keys .. -1
    pad = -length % BLOCK
    first, last = F.pad(first, (0, pad), value=n_keys), F.pad(last, (0, pad), value=-1)
    # (N, intervals, BLOCK) -> how many intervals of a block open and close at each key
    first, last = (x.unflatten(2, (-1, BLOCK)).transpose(1, 2).flatten(0, 1) for x in (first, last))
    n_blocks = len(first)
    opened = first.new_zeros(n_blocks, n_keys + 1)
    seen = (last >= first).long().flatten(1)
    opened.scatter_add_(1, first.flatten(1), seen).scatter_add_(1, (last + 1).flatten(1), -seen)
    rows, columns = (opened[:, :-1].cumsum(1) > 0).nonzero(as_tuple=True)
    counts = rows.bincount(minlength=n_blocks)
    places = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    # a multiple of 16 keys, which the kernel likes; a place without a key names one that no query sees
    wide = max(int(counts.max()) + 15 & ~15, 16)
    numbers = first.new_full((n_blocks, wide), n_keys)
    numbers[rows, places] = columns
    visible = ((numbers[:, None, None] >= first[..., None]) & (numbers[:, None, None] <= last[..., None])).any(1)
    nothing = ~visible.any(-1)
    bias = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~(visible | nothing[..., None]), float("-inf"))
    nothing = nothing.view(batch, 1, -1, 1)[:, :, :length]
    row = torch.arange(batch).repeat_interleave(n_blocks // batch)[:, None] * n_keys
    keys = torch.where(numbers < n_keys, numbers, 0) + row
    return Blocks(keys, bias[:, None], nothing if bool(nothing.any()) else None, n_blocks * BLOCK * wide)


class ByBlock(torch.autograd.Function):
    """q (B, H, S, D), k and v (B, Hkv, T, D), blocks, scale -> (B, H, S, D)."""

    @staticmethod
    def forward(ctx, q, k, v, blocks, scale):
        groups = q.shape[1] // k.shape[1]
        bias = _repeat(blocks.bias, groups)
        tiles = _queries(q, groups), _gather(k, blocks.keys), _gather(v, blocks.keys)
        out, lse = flash(*tiles, 0.0, False, attn_mask=bias, scale=scale)
        ctx.save_for_backward(*tiles, out, lse)
        ctx.blocks, ctx.scale, ctx.shapes, ctx.groups = blocks, scale, (q.shape, k.shape), groups
        out = _rows(out, q.shape, groups)
        return out if blocks.empty is None else out.masked_fill(blocks.empty, 0.0)

    @staticmethod
    def backward(ctx, grad):
        blocks, (q_shape, k_shape) = ctx.blocks, ctx.shapes
        if blocks.empty is not None:
            grad = grad.masked_fill(blocks.empty, 0.0)
        q, k, v, out, lse = ctx.saved_tensors
        bias = _repeat(blocks.bias, ctx.groups)
        dq, dk, dv = flash_backward(
            _queries(grad, ctx.groups), q, k, v, out, lse, 0.0, False, attn_mask=bias, scale=ctx.scale
        )
        return _rows(dq, q_shape, ctx.groups), *(_scatter(x, blocks.keys, k_shape) for x in (dk, dv)), None, None


def _repeat(bias: Tensor, groups: int) -> Tensor:
    """(N, 1, BLOCK, n) -> (N, 1, groups * BLOCK, n)."""
    return bias.repeat(1, 1, groups, 1) if groups > 1 else bias


def _queries(x: Tensor, groups: int) -> Tensor:
    """(B, H, S, D) -> (N, Hkv, groups * BLOCK, D): heads that share a key head are queries of one tile."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % BLOCK))
    x = x.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, groups))  # (B, Hkv, groups, blocks, BLOCK, D)
    return x.permute(0, 3, 1, 2, 4, 5).flatten(3, 4).flatten(0, 1)


def _rows(x: Tensor, shape, groups: int) -> Tensor:
    """The inverse of `_queries`."""
    batch, _, length, _ = shape
    x = x.unflatten(2, (groups, BLOCK)).unflatten(0, (batch, -1))  # (B, blocks, Hkv, groups, BLOCK, D)
    return x.permute(0, 2, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2)[:, :, :length]


def _gather(x: Tensor, keys: Tensor) -> Tensor:
    """(B, Hkv, T, D) -> (N, Hkv, n, D); a view of (N, n, Hkv, D)."""
    return x.transpose(1, 2).flatten(0, 1)[keys].transpose(1, 2)


def _scatter(x: Tensor, keys: Tensor, shape) -> Tensor:
    """The transpose of `_gather`: gradients of a key that several blocks read are added up."""
    batch, heads, length, dim = shape
    total = x.new_zeros(batch * length, heads, dim)
    total.index_add_(0, keys.flatten(), x.transpose(1, 2).flatten(0, 1))
    return total.unflatten(0, (batch, length)).transpose(1, 2)
