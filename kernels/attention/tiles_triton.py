"""What the attention kernels share: tiles in and out, products, and the walk over the blocks that a plan names.

A tile is read in one of two ways (DESCRIPTORS): by pointers, which take any strides, or by a tensor descriptor made on
the host, which Hopper's copy engine (TMA) reads without address arithmetic in registers, and which gives zeros beyond
the tensor's end. `descriptors_triton.py` says which tensors a descriptor can address.
"""

import os

import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, total):
    """total + a @ b. The interpreter computes bfloat16 products wrongly: it gets float32."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def to(x, dtype: tl.constexpr):
    """float32 x as dtype, rounded to nearest even. The interpreter cuts bfloat16 off: it gets the rounding by hand."""
    if INTERPRET:
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def batch_of(X, batch, stride, DESCRIPTORS: tl.constexpr):
    """X (B, H, S, D) at one row of the batch; a descriptor stays as it is."""
    if not DESCRIPTORS:
        X += batch.to(tl.int64) * stride
    return X


@triton.jit
def load(
    X, batch, head, start, head_stride, row_stride, limit,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Rows start .. start + BLOCK - 1 of one head of `batch_of`'s X, zero beyond column D and, with EDGE, beyond row
    limit - 1. A descriptor gives zeros there in any case."""
    if DESCRIPTORS:
        tile = X.load([batch, head, start, 0]).reshape(BLOCK, BLOCK_D)
    else:
        at = _pointers(X + head.to(tl.int64) * head_stride, start, row_stride, BLOCK, BLOCK_D)
        rows, columns = (start + tl.arange(0, BLOCK))[:, None], tl.arange(0, BLOCK_D)[None, :]
        if EDGE:
            tile = tl.load(at, mask=(rows < limit) & (columns < D), other=0.0)
        elif D < BLOCK_D:
            tile = tl.load(at, mask=columns < D, other=0.0)
        else:
            tile = tl.load(at)
    return tile


@triton.jit
def store(base, start, stride, limit, tile, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows start .. of one head, by pointers; nothing beyond row limit - 1 and column D - 1."""
    rows, columns = (start + tl.arange(0, BLOCK))[:, None], tl.arange(0, BLOCK_D)[None, :]
    at = _pointers(base, start, stride, BLOCK, BLOCK_D)
    tl.store(at, to(tile, base.dtype.element_ty), mask=(rows < limit) & (columns < D))


@triton.jit
def _pointers(base, start, stride, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK, BLOCK_D) addresses of rows start .. and all columns, which lie side by side."""
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    return base + start.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]


@triton.jit
def read_plan(Plan, at, TWO: tl.constexpr):
    """lo, full_lo, full_hi, hi of both intervals; the second is empty unless TWO."""
    at = Plan + at * (8 if TWO else 4)
    lo, full_lo, full_hi, hi = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    lo2, full_lo2, full_hi2, hi2 = lo * 0, lo * 0, lo * 0, lo * 0
    if TWO:
        lo2, full_lo2, full_hi2, hi2 = tl.load(at + 4), tl.load(at + 5), tl.load(at + 6), tl.load(at + 7)
    return lo, full_lo, full_hi, hi, lo2, full_lo2, full_hi2, hi2


@triton.jit
def walk(step, a, b, c):
    """The step-th of a, a + 1, .., b - 1, c, c + 1, .."""
    return tl.where(step < b - a, a + step, c + step - (b - a))


@triton.jit
def walk_edges(step, lo, full_lo, full_hi, hi, lo2, full_lo2, full_hi2):
    """The step-th block at an edge, and whether it belongs to the second interval."""
    n = full_lo - lo + hi - full_hi
    block = tl.where(step < n, walk(step, lo, full_lo, full_hi), walk(step - n, lo2, full_lo2, full_hi2))
    return block, step >= n


@triton.jit
def read_intervals(Intervals, queries, S, T, second, TWO: tl.constexpr):
    """first and last of one of the intervals of `queries`; queries beyond the end see nothing."""
    at = Intervals + queries
    if TWO:
        at += tl.where(second, 2 * S, 0)
    inside = queries < S
    return tl.load(at, mask=inside, other=T), tl.load(at + S, mask=inside, other=-1)
