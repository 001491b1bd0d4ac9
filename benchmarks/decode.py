"""Decoding: one new query per row against its cache, dense or in pages.

    python -m benchmarks.decode --preset long --out decode.json

Bound by memory: the bytes are those of the keys and values that a row has, read once; the measure is their rate as a
part of the copy bandwidth. Rows have different lengths, between half of the context and all of it.
"""

import functools

import torch
import torch.nn.functional as F

from benchmarks import command
from benchmarks.attention import FLEX, REFERENCE, compiled_flex
from benchmarks.work import OURS, Cost, Preset, Target, Work
from onevocab.common.errors import UserError
from onevocab.kernels.decode import decode_attention, decode_attention_reference
from onevocab.kernels.decode.cache import gather_pages, visible_keys

SDPA, SDPA_GROUPED = "SDPA, mask of lengths", "SDPA, mask of lengths, heads as queries"
SDPA_PLAIN = "SDPA without a mask"  # where all rows have the whole context


def sdpa(lengths: torch.Tensor, grouped: bool, table: torch.Tensor | None, n_keys: int):
    """SDPA over the whole cache. `grouped`: heads that share a key head become its queries, no key is repeated."""
    visible = visible_keys(lengths, 1, n_keys)[:, None]

    def call(q, k, v):
        if table is not None:
            k, v = gather_pages(k, table), gather_pages(v, table)
        if not grouped:
            groups = q.shape[1] // k.shape[1]
            return F.scaled_dot_product_attention(q, *(x.repeat_interleave(groups, 1) for x in (k, v)), visible)
        queries = q.reshape(len(q), k.shape[1], -1, q.shape[3])
        return F.scaled_dot_product_attention(queries, k, v, visible).reshape(q.shape)

    return call


def without_mask(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def flex(lengths: torch.Tensor, rows: int, n_keys: int):
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b, h, i, j):
        return j < lengths[b]

    blocks = create_block_mask(visible, rows, None, 1, n_keys, device=str(lengths.device))
    return lambda q, k, v: compiled_flex()(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])


def build(page: int | None):
    """page: keys per page of a paged cache; None for a dense one."""
    def make(shape: dict, device: torch.device, dtype: torch.dtype) -> Work:
        rows, heads, kv_heads, dim, context = (
            shape[name] for name in ("rows", "heads", "kv_heads", "head_dim", "context"))
        if heads % kv_heads or page and context % page:
            raise UserError("heads must be a multiple of kv_heads, context of the page")
        lengths = torch.randint(-(-context // 2), context + 1, (rows,)).to(device)
        lengths[0] = context
        table = None
        if page:  # a row's pages lie anywhere
            table = torch.randperm(rows * context // page).view(rows, -1).to(device, torch.int32)

        def inputs():
            keys = (rows, kv_heads, context) if not page else (rows * context // page, kv_heads, page)
            shapes = (rows, heads, 1, dim), (*keys, dim), (*keys, dim)
            return tuple(torch.randn(each, device=device, dtype=dtype) for each in shapes)

        providers = {
            OURS: lambda: lambda q, k, v: decode_attention(q, k, v, lengths, table),
            SDPA: lambda: sdpa(lengths, False, table, context),
            SDPA_GROUPED: lambda: sdpa(lengths, True, table, context),
            REFERENCE: lambda: lambda q, k, v: decode_attention_reference(q, k, v, lengths, table),
        }
        if not page:
            providers[FLEX] = lambda: flex(lengths, rows, context)
            if bool((lengths == context).all()):
                providers[SDPA_PLAIN] = lambda: without_mask
        definition = functools.partial(definition_by_row, lengths=lengths, table=table)
        keys = int(lengths.sum())
        moved = dtype.itemsize * dim * (2 * kv_heads * keys + 2 * rows * heads)
        return Work(inputs, providers, definition, {"forward": Cost(4 * keys * heads * dim, moved)},
                    notes=[f"{keys:,} keys in all" + (f", pages of {page}" if page else "")],
                    operations=("decode_attention",))

    return make


def definition_by_row(q, k, v, lengths, table):
    """The definition, a row at a time: keys repeated for all heads in float64 would not fit beside the cache."""
    parts = []
    for b in range(len(q)):
        part, page_table = slice(b, b + 1), None if table is None else table[b : b + 1]
        keys = (k, v) if table is not None else (k[part], v[part])
        parts.append(decode_attention_reference(q[part], *keys, lengths[part], page_table))
    return torch.cat(parts)


CPU = {"rows": 1, "heads": 8, "kv_heads": 2, "head_dim": 64, "context": 8192}
GPU = {"rows": 1, "heads": 32, "kv_heads": 8, "head_dim": 128, "context": 32768}
TINY = {"rows": 3, "heads": 4, "kv_heads": 2, "head_dim": 16, "context": 64}
FULL = {"rows": 64, "context": 8192}

PRESETS = {
    "long": Preset(
        "one row with a long context", build(None), {"cpu": CPU, "cuda": GPU, "tiny": TINY | {"rows": 1}},
        {"cuda": [Target("time", "forward", (SDPA, SDPA_GROUPED, SDPA_PLAIN), at_least=2.0)]},
    ),
    "batch": Preset(
        "many rows of different lengths", build(None),
        {"cpu": CPU | {"rows": 16, "context": 1024}, "cuda": GPU | FULL, "tiny": TINY},
        {"cuda": [Target("copy", "forward", at_least=0.8)]},
    ),
    "paged": Preset(
        "the same with a cache in pages of 16 keys", build(16),
        {"cpu": CPU | {"rows": 16, "context": 1024}, "cuda": GPU | FULL, "tiny": TINY},
        {"cuda": [Target("copy", "forward", at_least=0.8)]},
    ),
}

main = command.main("decode", __doc__, PRESETS)

if __name__ == "__main__":
    main()
