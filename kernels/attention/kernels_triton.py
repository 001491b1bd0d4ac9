"""The Triton kernels of attention under an interval mask: FlashAttention-2 (Dao 2023) that walks only over blocks with
something to see. `ops_triton` launches them.

One program owns a block of queries (forward, dQ) or of keys (dK and dV) and walks over the blocks of the other side
that its row of the plan names (`IntervalMask.plan`): first those seen in full, without mask arithmetic, then those at
an interval's edge. Nothing is added by atomics, so gradients are bitwise the same from run to run.

Softmax runs in base 2 with the scale folded in: 2 ** (s * scale / ln 2) is one multiply-add and one exp2. The running
maximum starts at a finite value far below any score, so that a masked score (-inf) never meets another -inf.
`lse` is the base-2 logarithm of a row's sum, (B, H, S) float32.
"""

import os

import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOWEST = tl.constexpr(-1e29)  # where the running maximum starts
EMPTY = tl.constexpr(1e30)  # the lse of a row that sees nothing: 2 ** (s - EMPTY) is 0


@triton.jit
def _dot(a, b, total):
    """total + a @ b. The interpreter computes bfloat16 products wrongly: it gets float32."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _to(x, dtype: tl.constexpr):
    """float32 x as dtype, rounded to nearest even. The interpreter cuts bfloat16 off: it gets the rounding by hand."""
    if INTERPRET:
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _pointers(base, start, stride, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK, BLOCK_D) addresses of rows start .. and all columns, which lie side by side."""
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    return base + start.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]


@triton.jit
def _load(base, start, stride, limit, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr):
    """Rows start .. start + BLOCK - 1, zero beyond column D and, with EDGE, beyond row limit - 1."""
    at = _pointers(base, start, stride, BLOCK, BLOCK_D)
    rows, columns = (start + tl.arange(0, BLOCK))[:, None], tl.arange(0, BLOCK_D)[None, :]
    if EDGE:
        tile = tl.load(at, mask=(rows < limit) & (columns < D), other=0.0)
    elif D < BLOCK_D:
        tile = tl.load(at, mask=columns < D, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def _store(base, start, stride, limit, tile, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    rows, columns = (start + tl.arange(0, BLOCK))[:, None], tl.arange(0, BLOCK_D)[None, :]
    at = _pointers(base, start, stride, BLOCK, BLOCK_D)
    tl.store(at, _to(tile, base.dtype.element_ty), mask=(rows < limit) & (columns < D))


@triton.jit
def _read_plan(Plan, at, TWO: tl.constexpr):
    """lo, full_lo, full_hi, hi of both intervals; the second is empty unless TWO."""
    at = Plan + at * (8 if TWO else 4)
    lo, full_lo, full_hi, hi = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    lo2, full_lo2, full_hi2, hi2 = lo * 0, lo * 0, lo * 0, lo * 0
    if TWO:
        lo2, full_lo2, full_hi2, hi2 = tl.load(at + 4), tl.load(at + 5), tl.load(at + 6), tl.load(at + 7)
    return lo, full_lo, full_hi, hi, lo2, full_lo2, full_hi2, hi2


@triton.jit
def _walk(step, a, b, c):
    """The step-th of a, a + 1, .., b - 1, c, c + 1, .."""
    return tl.where(step < b - a, a + step, c + step - (b - a))


@triton.jit
def _walk_edges(step, lo, full_lo, full_hi, hi, lo2, full_lo2, full_hi2):
    """The step-th block at an edge, and whether it belongs to the second interval."""
    n = full_lo - lo + hi - full_hi
    block = tl.where(step < n, _walk(step, lo, full_lo, full_hi), _walk(step - n, lo2, full_lo2, full_hi2))
    return block, step >= n


@triton.jit
def _read_intervals(Intervals, queries, S, T, second, TWO: tl.constexpr):
    """first and last of one of the intervals of `queries`; queries beyond the end see nothing."""
    at = Intervals + queries
    if TWO:
        at += tl.where(second, 2 * S, 0)
    inside = queries < S
    return tl.load(at, mask=inside, other=T), tl.load(at + S, mask=inside, other=-1)


@triton.jit
def _attend(
    q, acc, total, top, K, V, block, k_stride, v_stride, first, last, T, scale_log2,
    D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One block of keys into the online softmax: acc (BLOCK_Q, BLOCK_D), its row sums and row maxima."""
    start = block * BLOCK_K
    k = _load(K, start, k_stride, T, D, BLOCK_K, BLOCK_D, EDGE)
    scores = _dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_K], tl.float32))
    if EDGE:
        keys = start + tl.arange(0, BLOCK_K)
        visible = (keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    p = tl.exp2(scores * scale_log2 - new_top[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(p, 1)
    v = _load(V, start, v_stride, T, D, BLOCK_K, BLOCK_D, EDGE)
    acc = _dot(_to(p, v.dtype), v, acc * fade[:, None])
    return acc, total, new_top


@triton.jit
def forward_kernel(
    Q, K, V, Out, Lse, Intervals, Plan, scale_log2, S, T,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TWO: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head. Grid: query blocks, H, B; the last blocks, often the longest, come first."""
    block, head, batch = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head = head // GROUPS
    Q += batch * q_batch + head.to(tl.int64) * q_head
    K += batch * k_batch + kv_head.to(tl.int64) * k_head
    V += batch * v_batch + kv_head.to(tl.int64) * v_head
    Out += batch * o_batch + head.to(tl.int64) * o_head
    Lse += (batch * tl.num_programs(1) + head) * S
    Intervals += batch * S * (4 if TWO else 2)
    lo, full_lo, full_hi, hi, lo2, full_lo2, full_hi2, hi2 = _read_plan(Plan, batch * tl.num_programs(0) + block, TWO)

    start = block * BLOCK_Q
    queries = start + tl.arange(0, BLOCK_Q)
    q = _load(Q, start, q_row, S, D, BLOCK_Q, BLOCK_D, True)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    top = tl.full([BLOCK_Q], LOWEST, tl.float32)
    for step in range(0, full_hi - full_lo + full_hi2 - full_lo2):
        at = _walk(step, full_lo, full_hi, full_lo2)
        acc, total, top = _attend(
            q, acc, total, top, K, V, at, k_row, v_row, queries, queries, T, scale_log2, D, BLOCK_K, BLOCK_D, False
        )
    for step in range(0, full_lo - lo + hi - full_hi + full_lo2 - lo2 + hi2 - full_hi2):
        at, second = _walk_edges(step, lo, full_lo, full_hi, hi, lo2, full_lo2, full_hi2)
        first, last = _read_intervals(Intervals, queries, S, T, second, TWO)
        acc, total, top = _attend(
            q, acc, total, top, K, V, at, k_row, v_row, first, last, T, scale_log2, D, BLOCK_K, BLOCK_D, True
        )
    empty = total == 0
    _store(Out, start, o_row, S, acc / tl.where(empty, 1.0, total)[:, None], D, BLOCK_Q, BLOCK_D)
    tl.store(Lse + queries, tl.where(empty, EMPTY, top + tl.log2(tl.where(empty, 1.0, total))), mask=queries < S)


@triton.jit
def delta_kernel(
    Out, DOut, Delta, S, o_batch, o_head, o_row, g_batch, g_head, g_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(d_out * out), what the softmax's backward subtracts. Grid: query blocks, H, B."""
    start, head, batch = tl.program_id(0) * BLOCK_Q, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    out = _load(Out + batch * o_batch + head * o_head, start, o_row, S, D, BLOCK_Q, BLOCK_D, True)
    grad = _load(DOut + batch * g_batch + head * g_head, start, g_row, S, D, BLOCK_Q, BLOCK_D, True)
    queries = start + tl.arange(0, BLOCK_Q)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(Delta + (batch * tl.num_programs(1) + head) * S + queries, delta, mask=queries < S)


@triton.jit
def _dq_step(
    q, grad, lse, delta, dq, K, V, block, k_stride, v_stride, first, last, T, scale_log2,
    D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    start = block * BLOCK_K
    k = _load(K, start, k_stride, T, D, BLOCK_K, BLOCK_D, EDGE)
    v = _load(V, start, v_stride, T, D, BLOCK_K, BLOCK_D, EDGE)
    nothing = tl.zeros([q.shape[0], BLOCK_K], tl.float32)
    p = tl.exp2(_dot(q, tl.trans(k), nothing) * scale_log2 - lse[:, None])
    if EDGE:
        keys = start + tl.arange(0, BLOCK_K)
        visible = (keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None])
        p = tl.where(visible, p, 0.0)
    d_scores = p * (_dot(grad, tl.trans(v), nothing) - delta[:, None])
    return _dot(_to(d_scores, k.dtype), k, dq)


@triton.jit
def dq_kernel(
    Q, K, V, DOut, Lse, Delta, DQ, Intervals, Plan, scale, scale_log2, S, T,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    dq_batch, dq_head, dq_row,
    GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TWO: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dQ of a block of queries of one head. Grid: query blocks, H, B."""
    block, head, batch = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head = head // GROUPS
    Q += batch * q_batch + head.to(tl.int64) * q_head
    K += batch * k_batch + kv_head.to(tl.int64) * k_head
    V += batch * v_batch + kv_head.to(tl.int64) * v_head
    DOut += batch * g_batch + head.to(tl.int64) * g_head
    DQ += batch * dq_batch + head.to(tl.int64) * dq_head
    rows = (batch * tl.num_programs(1) + head) * S
    Intervals += batch * S * (4 if TWO else 2)
    lo, full_lo, full_hi, hi, lo2, full_lo2, full_hi2, hi2 = _read_plan(Plan, batch * tl.num_programs(0) + block, TWO)

    start = block * BLOCK_Q
    queries = start + tl.arange(0, BLOCK_Q)
    q = _load(Q, start, q_row, S, D, BLOCK_Q, BLOCK_D, True)
    grad = _load(DOut, start, g_row, S, D, BLOCK_Q, BLOCK_D, True)
    lse = tl.load(Lse + rows + queries, mask=queries < S, other=EMPTY)
    delta = tl.load(Delta + rows + queries, mask=queries < S, other=0.0)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for step in range(0, full_hi - full_lo + full_hi2 - full_lo2):
        at = _walk(step, full_lo, full_hi, full_lo2)
        dq = _dq_step(
            q, grad, lse, delta, dq, K, V, at, k_row, v_row, queries, queries, T, scale_log2, D, BLOCK_K, BLOCK_D, False
        )
    for step in range(0, full_lo - lo + hi - full_hi + full_lo2 - lo2 + hi2 - full_hi2):
        at, second = _walk_edges(step, lo, full_lo, full_hi, hi, lo2, full_lo2, full_hi2)
        first, last = _read_intervals(Intervals, queries, S, T, second, TWO)
        dq = _dq_step(
            q, grad, lse, delta, dq, K, V, at, k_row, v_row, first, last, T, scale_log2, D, BLOCK_K, BLOCK_D, True
        )
    _store(DQ, start, dq_row, S, dq * scale, D, BLOCK_Q, BLOCK_D)


@triton.jit
def _dkdv_step(
    k, v, dk, dv, keys, Q, DOut, Lse, Delta, Intervals, step, block, second, head0, n,
    q_head, q_row, g_head, g_row, S, T, scale_log2,
    D: tl.constexpr, TWO: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One block of queries of head head0 + step // n into dK and dV. Scores are (BLOCK_K, BLOCK_Q): keys are rows."""
    head = (head0 + step // n).to(tl.int64)
    start = block * BLOCK_Q
    queries = start + tl.arange(0, BLOCK_Q)
    q = _load(Q + head * q_head, start, q_row, S, D, BLOCK_Q, BLOCK_D, EDGE)
    grad = _load(DOut + head * g_head, start, g_row, S, D, BLOCK_Q, BLOCK_D, EDGE)
    if EDGE:
        lse = tl.load(Lse + head * S + queries, mask=queries < S, other=EMPTY)
        delta = tl.load(Delta + head * S + queries, mask=queries < S, other=0.0)
    else:
        lse, delta = tl.load(Lse + head * S + queries), tl.load(Delta + head * S + queries)
    nothing = tl.zeros([k.shape[0], BLOCK_Q], tl.float32)
    p = tl.exp2(_dot(k, tl.trans(q), nothing) * scale_log2 - lse[None, :])
    if EDGE:
        first, last = _read_intervals(Intervals, queries, S, T, second, TWO)
        p = tl.where((keys[:, None] >= first[None, :]) & (keys[:, None] <= last[None, :]), p, 0.0)
    dv = _dot(_to(p, grad.dtype), grad, dv)
    d_scores = p * (_dot(v, tl.trans(grad), nothing) - delta[None, :])
    dk = _dot(_to(d_scores, q.dtype), q, dk)
    return dk, dv


@triton.jit
def dkdv_kernel(
    Q, K, V, DOut, Lse, Delta, DK, DV, Intervals, Plan, scale, scale_log2, S, T,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TWO: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys of one key head: one loop over its GROUPS query heads times the query blocks.

    Grid: key blocks, Hkv, B. The plan is the transposed one, in units of query blocks.
    """
    block, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head0 = kv_head * GROUPS
    Q += batch * q_batch
    K += batch * k_batch + kv_head.to(tl.int64) * k_head
    V += batch * v_batch + kv_head.to(tl.int64) * v_head
    DOut += batch * g_batch
    DK += batch * dk_batch + kv_head.to(tl.int64) * dk_head
    DV += batch * dv_batch + kv_head.to(tl.int64) * dv_head
    Lse += batch * tl.num_programs(1) * GROUPS * S
    Delta += batch * tl.num_programs(1) * GROUPS * S
    Intervals += batch * S * (4 if TWO else 2)
    lo, full_lo, full_hi, hi, lo2, full_lo2, full_hi2, hi2 = _read_plan(Plan, batch * tl.num_programs(0) + block, TWO)

    start = block * BLOCK_K
    keys = start + tl.arange(0, BLOCK_K)
    k = _load(K, start, k_row, T, D, BLOCK_K, BLOCK_D, True)
    v = _load(V, start, v_row, T, D, BLOCK_K, BLOCK_D, True)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    n = full_hi - full_lo + full_hi2 - full_lo2
    for step in range(0, n * GROUPS):
        at = _walk(step % n, full_lo, full_hi, full_lo2)
        dk, dv = _dkdv_step(
            k, v, dk, dv, keys, Q, DOut, Lse, Delta, Intervals, step, at, False, head0, n,
            q_head, q_row, g_head, g_row, S, T, scale_log2, D, TWO, BLOCK_Q, BLOCK_D, False,
        )  # fmt: skip
    n = full_lo - lo + hi - full_hi + full_lo2 - lo2 + hi2 - full_hi2
    for step in range(0, n * GROUPS):
        at, second = _walk_edges(step % n, lo, full_lo, full_hi, hi, lo2, full_lo2, full_hi2)
        dk, dv = _dkdv_step(
            k, v, dk, dv, keys, Q, DOut, Lse, Delta, Intervals, step, at, second, head0, n,
            q_head, q_row, g_head, g_row, S, T, scale_log2, D, TWO, BLOCK_Q, BLOCK_D, True,
        )  # fmt: skip
    _store(DK, start, dk_row, T, dk * scale, D, BLOCK_K, BLOCK_D)
    _store(DV, start, dv_row, T, dv, D, BLOCK_K, BLOCK_D)
