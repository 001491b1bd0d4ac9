"""The backward kernels of attention under an interval mask: dQ by blocks of queries, dK and dV by blocks of keys.

Each walks like the forward kernel over the blocks of the other side that its row of the plan names. Nothing is added by
atomics, so gradients are bitwise the same from run to run. Both products of a block's scores come before the first
exponential: tensor cores are busy while exponentials are taken.

With FUSED the kernel by blocks of keys adds its share to dQ as well, by atomics: five products in place of seven, and
sums whose order, and so whose last bits, change from run to run.
"""

import triton
import triton.language as tl

from onevocab.kernels.attention.forward_triton import EMPTY
from onevocab.kernels.attention.tiles_triton import (
    INTERPRET,
    batch_of,
    dot,
    load,
    read_intervals,
    read_plan,
    store,
    to,
    walk,
    walk_edges,
)


@triton.jit
def delta_kernel(
    Out, DOut, Delta, S, o_batch, o_head, o_row, g_batch, g_head, g_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(d_out * out), what the softmax's backward subtracts. Grid: query blocks, H, B."""
    start, head, batch = tl.program_id(0) * BLOCK_Q, tl.program_id(1), tl.program_id(2)
    Out, DOut = batch_of(Out, batch, o_batch, False), batch_of(DOut, batch, g_batch, False)
    out = load(Out, batch, head, start, o_head, o_row, S, D, BLOCK_Q, BLOCK_D, True, False)
    grad = load(DOut, batch, head, start, g_head, g_row, S, D, BLOCK_Q, BLOCK_D, True, False)
    queries = start + tl.arange(0, BLOCK_Q)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(Delta + (batch.to(tl.int64) * tl.num_programs(1) + head) * S + queries, delta, mask=queries < S)


@triton.jit
def _dq_step(
    q, grad, lse, delta, dq, K, V, batch, head, block, k_head, k_row, v_head, v_row, first, last, T, scale_log2,
    D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    start = block * BLOCK_K
    k = load(K, batch, head, start, k_head, k_row, T, D, BLOCK_K, BLOCK_D, EDGE, DESCRIPTORS)
    v = load(V, batch, head, start, v_head, v_row, T, D, BLOCK_K, BLOCK_D, EDGE, DESCRIPTORS)
    nothing = tl.zeros([q.shape[0], BLOCK_K], tl.float32)
    scores = dot(q, tl.trans(k), nothing)
    d_p = dot(grad, tl.trans(v), nothing)
    d_scores = tl.exp2(scores * scale_log2 - lse[:, None]) * (d_p - delta[:, None])
    if EDGE:
        keys = start + tl.arange(0, BLOCK_K)
        visible = (keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None])
        d_scores = tl.where(visible, d_scores, 0.0)
    return dot(to(d_scores, k.dtype), k, dq)


@triton.jit
def dq_kernel(
    Q, K, V, DOut, Lse, Delta, DQ, Intervals, Plan, scale, scale_log2, S, T,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    dq_batch, dq_head, dq_row,
    GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TWO: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """dQ of a block of queries of one head. Grid: query blocks, H, B."""
    block, head, batch = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_head = head // GROUPS
    Q, K = batch_of(Q, batch, q_batch, DESCRIPTORS), batch_of(K, batch, k_batch, DESCRIPTORS)
    V, DOut = batch_of(V, batch, v_batch, DESCRIPTORS), batch_of(DOut, batch, g_batch, DESCRIPTORS)
    Intervals += batch.to(tl.int64) * S * (4 if TWO else 2)
    lo, full_lo, full_hi, hi, lo2, full_lo2, full_hi2, hi2 = read_plan(
        Plan, batch.to(tl.int64) * tl.num_programs(0) + block, TWO
    )

    start = block * BLOCK_Q
    queries = start + tl.arange(0, BLOCK_Q)
    q = load(Q, batch, head, start, q_head, q_row, S, D, BLOCK_Q, BLOCK_D, True, DESCRIPTORS)
    grad = load(DOut, batch, head, start, g_head, g_row, S, D, BLOCK_Q, BLOCK_D, True, DESCRIPTORS)
    rows = (batch.to(tl.int64) * tl.num_programs(1) + head) * S
    lse = tl.load(Lse + rows + queries, mask=queries < S, other=EMPTY)
    delta = tl.load(Delta + rows + queries, mask=queries < S, other=0.0)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for step in range(0, full_hi - full_lo + full_hi2 - full_lo2):
        at = walk(step, full_lo, full_hi, full_lo2)
        dq = _dq_step(
            q, grad, lse, delta, dq, K, V, batch, kv_head, at, k_head, k_row, v_head, v_row, queries, queries, T,
            scale_log2, D, BLOCK_K, BLOCK_D, False, DESCRIPTORS,
        )  # fmt: skip
    for step in range(0, full_lo - lo + hi - full_hi + full_lo2 - lo2 + hi2 - full_hi2):
        at, second = walk_edges(step, lo, full_lo, full_hi, hi, lo2, full_lo2, full_hi2)
        first, last = read_intervals(Intervals, queries, S, T, second, TWO)
        dq = _dq_step(
            q, grad, lse, delta, dq, K, V, batch, kv_head, at, k_head, k_row, v_head, v_row, first, last, T,
            scale_log2, D, BLOCK_K, BLOCK_D, True, DESCRIPTORS,
        )  # fmt: skip
    DQ += batch.to(tl.int64) * dq_batch + head.to(tl.int64) * dq_head
    store(DQ, start, dq_row, S, dq * scale, D, BLOCK_Q, BLOCK_D)


@triton.jit
def _add_to_dq(
    tile, DQ, batch, head, start, S, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """tile (BLOCK, BLOCK_D) to rows start .. of DQ (B, H, S, D) float32, side by side in memory."""
    if DESCRIPTORS:
        tile = tile.reshape(1, 1, BLOCK, BLOCK_D)
        if INTERPRET:  # it cannot add by a descriptor; its programs run one after another
            DQ.store([batch, head, start, 0], DQ.load([batch, head, start, 0]) + tile)
        else:
            DQ.atomic_add([batch, head, start, 0], tile)
    else:
        rows, columns = (start + tl.arange(0, BLOCK))[:, None], tl.arange(0, BLOCK_D)[None, :]
        at = DQ + head.to(tl.int64) * S * D + rows.to(tl.int64) * D + columns
        tl.atomic_add(at, tile, mask=(rows < S) & (columns < D), sem="relaxed")


@triton.jit
def _dkdv_step(
    k, v, dk, dv, keys, Q, DOut, Lse, Delta, DQ, Intervals, batch, head, block, second,
    q_head, q_row, g_head, g_row, S, T, scale_log2,
    D: tl.constexpr, TWO: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head into dK and dV, and dQ. Scores are (BLOCK_K, BLOCK_Q): keys are rows."""
    start = block * BLOCK_Q
    queries = start + tl.arange(0, BLOCK_Q)
    q = load(Q, batch, head, start, q_head, q_row, S, D, BLOCK_Q, BLOCK_D, EDGE, DESCRIPTORS)
    grad = load(DOut, batch, head, start, g_head, g_row, S, D, BLOCK_Q, BLOCK_D, EDGE, DESCRIPTORS)
    row = head.to(tl.int64) * S
    if EDGE:
        lse = tl.load(Lse + row + queries, mask=queries < S, other=EMPTY)
        delta = tl.load(Delta + row + queries, mask=queries < S, other=0.0)
    else:
        lse, delta = tl.load(Lse + row + queries), tl.load(Delta + row + queries)
    nothing = tl.zeros([k.shape[0], BLOCK_Q], tl.float32)
    scores = dot(k, tl.trans(q), nothing)
    d_p = dot(v, tl.trans(grad), nothing)
    p = tl.exp2(scores * scale_log2 - lse[None, :])
    d_scores = p * (d_p - delta[None, :])
    if EDGE:
        first, last = read_intervals(Intervals, queries, S, T, second, TWO)
        visible = (keys[:, None] >= first[None, :]) & (keys[:, None] <= last[None, :])
        p, d_scores = tl.where(visible, p, 0.0), tl.where(visible, d_scores, 0.0)
    dv = dot(to(p, grad.dtype), grad, dv)
    d_scores = to(d_scores, q.dtype)
    dk = dot(d_scores, q, dk)
    if FUSED:
        dq = dot(tl.trans(d_scores), k, tl.zeros([BLOCK_Q, BLOCK_D], tl.float32))
        _add_to_dq(dq, DQ, batch, head, start, S, D, BLOCK_Q, BLOCK_D, DESCRIPTORS)
    return dk, dv


@triton.jit
def dkdv_kernel(
    Q, K, V, DOut, Lse, Delta, DK, DV, DQ, Intervals, Plan, scale, scale_log2, S, T,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TWO: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys of one key head: one loop over its GROUPS query heads times the query blocks.

    Grid: key blocks, Hkv, B. The plan is the transposed one, in units of query blocks. DQ, used with FUSED alone:
    float32 zeros at first, in the end dQ without the scale.
    """
    block, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head0 = kv_head * GROUPS
    Q, K = batch_of(Q, batch, q_batch, DESCRIPTORS), batch_of(K, batch, k_batch, DESCRIPTORS)
    V, DOut = batch_of(V, batch, v_batch, DESCRIPTORS), batch_of(DOut, batch, g_batch, DESCRIPTORS)
    if FUSED:
        DQ = batch_of(DQ, batch, tl.num_programs(1).to(tl.int64) * GROUPS * S * D, DESCRIPTORS)
    rows = batch.to(tl.int64) * tl.num_programs(1) * GROUPS * S
    Lse, Delta = Lse + rows, Delta + rows
    Intervals += batch.to(tl.int64) * S * (4 if TWO else 2)
    lo, full_lo, full_hi, hi, lo2, full_lo2, full_hi2, hi2 = read_plan(
        Plan, batch.to(tl.int64) * tl.num_programs(0) + block, TWO
    )

    start = block * BLOCK_K
    keys = start + tl.arange(0, BLOCK_K)
    k = load(K, batch, kv_head, start, k_head, k_row, T, D, BLOCK_K, BLOCK_D, True, DESCRIPTORS)
    v = load(V, batch, kv_head, start, v_head, v_row, T, D, BLOCK_K, BLOCK_D, True, DESCRIPTORS)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    n = full_hi - full_lo + full_hi2 - full_lo2
    each = tl.maximum(n, 1)  # the pipeliner computes the first step's addresses also where there is none
    for step in range(0, n * GROUPS):
        at = walk(step % each, full_lo, full_hi, full_lo2)
        dk, dv = _dkdv_step(
            k, v, dk, dv, keys, Q, DOut, Lse, Delta, DQ, Intervals, batch, head0 + step // each, at, False,
            q_head, q_row, g_head, g_row, S, T, scale_log2, D, TWO, BLOCK_Q, BLOCK_D, False, DESCRIPTORS, FUSED,
        )  # fmt: skip
    n = full_lo - lo + hi - full_hi + full_lo2 - lo2 + hi2 - full_hi2
    each = tl.maximum(n, 1)
    for step in range(0, n * GROUPS):
        at, second = walk_edges(step % each, lo, full_lo, full_hi, hi, lo2, full_lo2, full_hi2)
        dk, dv = _dkdv_step(
            k, v, dk, dv, keys, Q, DOut, Lse, Delta, DQ, Intervals, batch, head0 + step // each, at, second,
            q_head, q_row, g_head, g_row, S, T, scale_log2, D, TWO, BLOCK_Q, BLOCK_D, True, DESCRIPTORS, FUSED,
        )  # fmt: skip
    DK += batch.to(tl.int64) * dk_batch + kv_head.to(tl.int64) * dk_head
    DV += batch.to(tl.int64) * dv_batch + kv_head.to(tl.int64) * dv_head
    store(DK, start, dk_row, T, dk * scale, D, BLOCK_K, BLOCK_D)
    store(DV, start, dv_row, T, dv, D, BLOCK_K, BLOCK_D)
