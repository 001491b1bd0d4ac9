"""What the reference and the torch form need of a cache: its pages gathered, and which keys a query sees."""

import torch
from einops import rearrange
from torch import Tensor


def gather_pages(pages: Tensor, block_table: Tensor) -> Tensor:
    """pages (P, Hkv, page, D), block_table (B, max_pages) -> (B, Hkv, max_pages * page, D), a copy.

    Entries behind a row's last page are never looked at by its queries and may be anything.
    """
    table = block_table.long().clamp(0, len(pages) - 1)
    return rearrange(pages[table], "b pages kv_heads page d -> b kv_heads (pages page) d")


def visible_keys(lengths: Tensor, queries: int, n_keys: int) -> Tensor:
    """bool (B, Q, T)"""
    last = lengths.long()[:, None] - queries + torch.arange(queries, device=lengths.device)
    return torch.arange(n_keys, device=lengths.device) <= last[..., None]
