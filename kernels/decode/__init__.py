"""Attention of the newest one or few queries of each row over a key-value cache.

The cache is dense, k and v (B, Hkv, T, D), or paged (Kwon et al. 2023): k and v (P, Hkv, page, D) with a block
table (B, max_pages) that names each row's pages in order. Row b holds `lengths[b]` keys, the Q newest of which belong
to the queries: query i sees the keys 0 .. lengths[b] - Q + i. A query with nothing to see gives zeros.
"""

import torch
from torch import Tensor

from onevocab.kernels.backend import select_backend, unsupported_type
from onevocab.kernels.decode.reference import decode_attention_reference
from onevocab.kernels.decode.torch_form import decode_attention_torch

__all__ = ["decode_attention", "decode_attention_reference"]


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    block_table: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Like the reference, q (B, H, Q, D) -> (B, H, Q, D); what the cache holds behind a row's length is never used.

    lengths (B,) and block_table are integers. H is a multiple of Hkv. No gradient: for training use `attention`.
    Raises ValueError when shapes, dtypes or devices do not fit, and on a CPU also when lengths or pages do not.
    """
    _check(q, k, v, lengths, block_table)
    given = (q, k, v, lengths) if block_table is None else (q, k, v, lengths, block_table)
    chosen = select_backend("decode_attention", *given, backend=backend, unsupported=_unsupported(q, k))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    with torch.no_grad():
        if chosen == "triton":
            from onevocab.kernels.decode import ops_triton

            return ops_triton.decode_attention(q, k, v, lengths, block_table, scale)
        if chosen == "reference":
            return decode_attention_reference(q, k, v, lengths, block_table, scale)
        return decode_attention_torch(q, k, v, lengths, block_table, scale)


def _unsupported(q: Tensor, k: Tensor) -> str | None:
    if q.shape[-1] > 256:
        return f"head dims go up to 256, not {q.shape[-1]}"
    rows = q.shape[1] // k.shape[1] * q.shape[2]  # heads of a key head * queries: one tile
    if rows > 128:
        return f"a tile holds 128 queries, not {rows}; long prompts are for `attention`"
    return unsupported_type(q)


def _check(q, k, v, lengths, block_table):
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, lengths {tuple(lengths.shape)}"
    tensors = [q, k, v, lengths]
    if block_table is not None:
        shapes += f", block_table {tuple(block_table.shape)}"
        tensors.append(block_table)
    fits = q.dim() == k.dim() == 4 and k.shape == v.shape and q.shape[-1] == k.shape[-1]
    fits = fits and all(x.numel() for x in tensors) and q.shape[1] % k.shape[1] == 0 and lengths.shape == q.shape[:1]
    if block_table is None:
        fits = fits and k.shape[0] == q.shape[0]
    else:
        fits = fits and block_table.dim() == 2 and len(block_table) == len(q)
    if not fits:
        raise ValueError(f"decode_attention: {shapes} do not fit (or one is empty)")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"decode_attention: q {q.dtype}, k {k.dtype}, v {v.dtype}; takes one floating-point type")
    for name, x in (("lengths", lengths), ("block_table", block_table)):
        if x is not None and x.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"decode_attention: {name} is {x.dtype}; takes int32 or int64")
    if q.device.type == "cpu":  # on a GPU looking would stop the pipeline at every token
        room = k.shape[2] * (1 if block_table is None else block_table.shape[1])
        low, high = (int(x) for x in lengths.aminmax())
        if low < 0 or high > room:
            raise ValueError(f"decode_attention: lengths {low} .. {high} do not fit a cache of {room} keys per row")
        if block_table is not None:
            used = torch.arange(block_table.shape[1]) * k.shape[2] < lengths[:, None]
            pages = block_table[used]
            if pages.numel() and not (0 <= int(pages.min()) and int(pages.max()) < len(k)):
                raise ValueError(f"decode_attention: block_table names a page outside 0 .. {len(k) - 1}")
