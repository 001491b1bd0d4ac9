"""The forward kernel of attention under an interval mask: FlashAttention-2 (Dao 2023) that walks only over blocks with
something to see. `ops_triton` launches it.

One program owns a block of queries and walks over the blocks of keys that its row of the plan names
(`IntervalMask.plan`): first those seen in full, without mask arithmetic, then those at an interval's edge.

Softmax runs in base 2 with the scale folded in: 2 ** (s * scale / ln 2) is one multiply-add and one exp2. The running
maximum starts at a finite value far below any score, so that a masked score (-inf) never meets another -inf.
`lse` is the base-2 logarithm of a row's sum, (B, H, S) float32.

With AHEAD the product of queries and keys is a block ahead of the softmax, so that tensor cores work while exponentials
are taken (FlashAttention-3, Shah et al. 2024, overlaps within a warpgroup in this way). It costs one product too many
at the end of the walk.
"""

import triton
import triton.language as tl

from onevocab.kernels.attention.tiles_triton import (
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

LOWEST = tl.constexpr(-1e29)  # where the running maximum starts
EMPTY = tl.constexpr(1e30)  # the lse of a row that sees nothing: 2 ** (s - EMPTY) is 0


@triton.jit
def _scores(
    q, K, batch, head, block, k_head, k_row, T,
    D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    k = load(K, batch, head, block * BLOCK_K, k_head, k_row, T, D, BLOCK_K, BLOCK_D, EDGE, DESCRIPTORS)
    return dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_K], tl.float32))


@triton.jit
def _attend(
    scores, acc, total, top, V, batch, head, block, v_head, v_row, first, last, T, scale_log2,
    D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """One block of keys into the online softmax: acc (BLOCK_Q, BLOCK_D), its row sums and row maxima."""
    start = block * BLOCK_K
    if EDGE:
        keys = start + tl.arange(0, BLOCK_K)
        visible = (keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    p = tl.exp2(scores * scale_log2 - new_top[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(p, 1)
    v = load(V, batch, head, start, v_head, v_row, T, D, BLOCK_K, BLOCK_D, EDGE, DESCRIPTORS)
    acc = dot(to(p, v.dtype), v, acc * fade[:, None])
    return acc, total, new_top


@triton.jit
def forward_kernel(
    Q, K, V, Out, Lse, Intervals, Plan, scale_log2, S, T,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TWO: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head. Grid: query blocks, H, B; the last blocks, often the longest, come first."""
    block, head, batch = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_head = head // GROUPS
    Q, K, V = (batch_of(Q, batch, q_batch, DESCRIPTORS), batch_of(K, batch, k_batch, DESCRIPTORS),
               batch_of(V, batch, v_batch, DESCRIPTORS))  # fmt: skip
    Intervals += batch.to(tl.int64) * S * (4 if TWO else 2)
    lo, full_lo, full_hi, hi, lo2, full_lo2, full_hi2, hi2 = read_plan(
        Plan, batch.to(tl.int64) * tl.num_programs(0) + block, TWO
    )
    n_full = full_hi - full_lo + full_hi2 - full_lo2
    n_edge = full_lo - lo + hi - full_hi + full_lo2 - lo2 + hi2 - full_hi2

    start = block * BLOCK_Q
    queries = start + tl.arange(0, BLOCK_Q)
    q = load(Q, batch, head, start, q_head, q_row, S, D, BLOCK_Q, BLOCK_D, True, DESCRIPTORS)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    top = tl.full([BLOCK_Q], LOWEST, tl.float32)
    if AHEAD:
        edge, _ = walk_edges(0, lo, full_lo, full_hi, hi, lo2, full_lo2, full_hi2)
        at = tl.where(n_full > 0, walk(0, full_lo, full_hi, full_lo2), edge)
        scores = _scores(q, K, batch, kv_head, at, k_head, k_row, T, D, BLOCK_K, BLOCK_D, True, DESCRIPTORS)
    for step in range(0, n_full):
        at = walk(step, full_lo, full_hi, full_lo2)
        if AHEAD:
            edge, _ = walk_edges(0, lo, full_lo, full_hi, hi, lo2, full_lo2, full_hi2)
            after = tl.where(step + 1 < n_full, walk(step + 1, full_lo, full_hi, full_lo2), edge)
            following = _scores(q, K, batch, kv_head, after, k_head, k_row, T, D, BLOCK_K, BLOCK_D, True, DESCRIPTORS)
        else:
            scores = _scores(q, K, batch, kv_head, at, k_head, k_row, T, D, BLOCK_K, BLOCK_D, False, DESCRIPTORS)
        acc, total, top = _attend(
            scores, acc, total, top, V, batch, kv_head, at, v_head, v_row, queries, queries, T, scale_log2,
            D, BLOCK_K, BLOCK_D, False, DESCRIPTORS,
        )  # fmt: skip
        if AHEAD:
            scores = following
    for step in range(0, n_edge):
        at, second = walk_edges(step, lo, full_lo, full_hi, hi, lo2, full_lo2, full_hi2)
        if AHEAD:
            after, _ = walk_edges(step + 1, lo, full_lo, full_hi, hi, lo2, full_lo2, full_hi2)
            following = _scores(q, K, batch, kv_head, after, k_head, k_row, T, D, BLOCK_K, BLOCK_D, True, DESCRIPTORS)
        else:
            scores = _scores(q, K, batch, kv_head, at, k_head, k_row, T, D, BLOCK_K, BLOCK_D, True, DESCRIPTORS)
        first, last = read_intervals(Intervals, queries, S, T, second, TWO)
        acc, total, top = _attend(
            scores, acc, total, top, V, batch, kv_head, at, v_head, v_row, first, last, T, scale_log2,
            D, BLOCK_K, BLOCK_D, True, DESCRIPTORS,
        )  # fmt: skip
        if AHEAD:
            scores = following
    empty = total == 0
    Out += batch.to(tl.int64) * o_batch + head.to(tl.int64) * o_head
    store(Out, start, o_row, S, acc / tl.where(empty, 1.0, total)[:, None], D, BLOCK_Q, BLOCK_D)
    Lse += (batch.to(tl.int64) * tl.num_programs(1) + head) * S
    tl.store(Lse + queries, tl.where(empty, EMPTY, top + tl.log2(tl.where(empty, 1.0, total))), mask=queries < S)
