"""The GPU's `decode_attention`: split-KV (Flash-Decoding, Dao et al. 2023), then a kernel that combines.

A few queries cannot fill a GPU, so the keys of a row are cut into parts that run side by side, each with its own
softmax: (out, log-sum-exp) of every part are kept in float32 and weighed together. The query heads that share a key
head are the rows of one tile, so every key and value is read once.
"""

import triton
import triton.language as tl

from onevocab.kernels.rounding_triton import rounded

NOTHING = tl.constexpr(-1.0e30)  # a finite log-sum-exp of no keys at all


@triton.jit(do_not_specialize=["table_row"])
def partial_attention(
    q_ptr, k_ptr, v_ptr, length_ptr, table_ptr, out_ptr, lse_ptr, scale,
    k_row, k_head, k_key, v_row, v_head, v_key, table_row,
    KV_HEADS: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program (b * Hkv + head, part). q (B, Hkv, ROWS, D), ROWS = heads per key head * QUERIES, the latter inner;
    out (B * Hkv, parts, ROWS, D) and lse (B * Hkv, parts, ROWS) in base 2. Strides in elements. PAGE: slots of a page,
    0 for a dense cache. No argument changes its kind while a row grows: what is compiled serves all lengths."""
    program, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch, head = (program // KV_HEADS).to(tl.int64), (program % KV_HEADS).to(tl.int64)
    length = tl.load(length_ptr + batch).to(tl.int32)
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    last = length - QUERIES + rows % QUERIES  # the last key that a row sees
    q_at = (program.to(tl.int64) * ROWS + rows[:, None]) * DIM + columns[None, :]
    q_inside = (rows < ROWS)[:, None] & (columns < DIM)[None, :]
    q = tl.load(q_ptr + q_at, mask=q_inside, other=0.0)
    if INTERPRET:
        q = q.to(tl.float32)

    blocks = tl.cdiv(length, BLOCK_N)
    per_part = tl.cdiv(blocks, parts)
    start, stop = part * per_part * BLOCK_N, tl.minimum((part + 1) * per_part * BLOCK_N, length)
    top = tl.full((BLOCK_M,), NOTHING, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(start, stop, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        known = keys < stop
        if PAGE == 0:
            row, slot = batch, keys.to(tl.int64)
        elif PAGE % BLOCK_N == 0:  # the tile lies within a page: one entry of the table
            row = tl.load(table_ptr + batch * table_row + first // PAGE).to(tl.int64)
            slot = (first % PAGE + tl.arange(0, BLOCK_N)).to(tl.int64)
        elif BLOCK_N % PAGE == 0:  # the tile is a few whole pages: an entry for each
            pages = first // PAGE + tl.arange(0, BLOCK_N // PAGE)
            row = tl.load(table_ptr + batch * table_row + pages, mask=pages * PAGE < stop, other=0).to(tl.int64)
            row = tl.reshape(tl.broadcast_to(row[:, None], (BLOCK_N // PAGE, PAGE)), (BLOCK_N,))
            slot = (keys % PAGE).to(tl.int64)
        else:  # pages that begin and end within tiles: an entry for each key
            row = tl.load(table_ptr + batch * table_row + keys // PAGE, mask=known, other=0).to(tl.int64)
            slot = (keys % PAGE).to(tl.int64)
        k_at = (row * k_row + head * k_head + slot * k_key)[None, :] + columns[:, None]
        k = tl.load(k_ptr + k_at, mask=known[None, :] & (columns < DIM)[:, None], other=0.0)
        v_at = (row * v_row + head * v_head + slot * v_key)[:, None] + columns[None, :]
        v = tl.load(v_ptr + v_at, mask=known[:, None] & (columns < DIM)[None, :], other=0.0)
        if INTERPRET:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, k, input_precision="ieee") * (scale * 1.4426950408889634)
        seen = known[None, :] & (keys[None, :] <= last[:, None])
        scores = tl.where(seen, scores, NOTHING)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.where(seen, tl.exp2(scores - new_top[:, None]), 0.0)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        weights = rounded(weights, v_ptr, INTERPRET)
        if INTERPRET:
            weights = weights.to(tl.float32)
        out = out * shrink[:, None] + tl.dot(weights, v, input_precision="ieee")
        top = new_top

    empty = total == 0.0
    at = (program.to(tl.int64) * parts + part) * ROWS + rows
    tl.store(lse_ptr + at, tl.where(empty, NOTHING, top + tl.log2(tl.where(empty, 1.0, total))), mask=rows < ROWS)
    out /= tl.where(empty, 1.0, total)[:, None]
    tl.store(out_ptr + at[:, None] * DIM + columns[None, :], out, mask=q_inside)


@triton.jit(do_not_specialize=["parts"])
def combine(
    part_ptr, lse_ptr, out_ptr, parts,
    ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program (b * Hkv + head, row): the parts' outputs, weighed by 2 ** lse."""
    program, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns, each = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_P)
    at = (program * parts + each) * ROWS + row
    lse = tl.load(lse_ptr + at, mask=each < parts, other=NOTHING)
    weights = tl.where(lse > NOTHING, tl.exp2(lse - tl.max(lse, 0)), 0.0)
    total = tl.sum(weights, 0)
    weights /= tl.where(total == 0.0, 1.0, total)
    inside = (each < parts)[:, None] & (columns < DIM)[None, :]
    out = tl.load(part_ptr + at[:, None] * DIM + columns[None, :], mask=inside, other=0.0)
    out = tl.sum(out * weights[:, None], 0)
    out_at = (program * ROWS + row) * DIM + columns
    tl.store(out_ptr + out_at, rounded(out, out_ptr, INTERPRET), mask=columns < DIM)
