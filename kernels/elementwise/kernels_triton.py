"""The Triton kernels of RMSNorm (with residual), per-head RMSNorm with rotary positions, and SwiGLU.

Each is bound by memory: a tile of whole rows is read once and written once, arithmetic in float32. The weight's
gradient is a sum over all rows: every program adds up its own slab of rows, and a second step adds the programs'
sums in a fixed order, without atomics, so that gradients are bitwise the same from run to run.
"""

import triton
import triton.language as tl

from onevocab.kernels.rounding_triton import rounded


@triton.jit
def rms_forward(
    x_ptr, residual_ptr, weight_ptr, total_ptr, out_ptr, n_rows, width, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """out = norm(x) * weight for ROWS rows; with RESIDUAL total = x + residual is stored and takes x's place."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    at = rows[:, None] * width + columns[None, :]
    inside = (rows < n_rows)[:, None] & (columns < width)[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        total = rounded(x, total_ptr, INTERPRET)
        tl.store(total_ptr + at, total, mask=inside)
        x = total.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / width + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, rounded(x * rstd[:, None] * weight[None, :], out_ptr, INTERPRET), mask=inside)


@triton.jit
def rms_backward(
    grad_ptr, grad_total_ptr, x_ptr, weight_ptr, d_x_ptr, partial_ptr, n_rows, width, eps, slab,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, RESIDUAL: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """d x of a slab of rows (+ the gradient that reached the sum itself), and the slab's part of d weight (P, d)."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK,), tl.float32)
    first = program.to(tl.int64) * slab
    for start in tl.range(0, slab, ROWS, num_stages=STAGES):
        rows = first + start + tl.arange(0, ROWS)
        at = rows[:, None] * width + columns[None, :]
        inside = (rows < n_rows)[:, None] & (columns < width)[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]
        x *= rstd
        d_weight += tl.sum(grad * x, 0)
        grad *= weight[None, :]
        d_x = rstd * (grad - x * (tl.sum(grad * x, 1) / width)[:, None])
        if RESIDUAL:
            d_x += tl.load(grad_total_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_x_ptr + at, rounded(d_x, d_x_ptr, INTERPRET), mask=inside)
    tl.store(partial_ptr + program * width + columns, d_weight, mask=columns < width)


@triton.jit
def rope_forward(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, n_rows, heads, eps,
    HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """A row is one head of one token. Its halves a, b are two tiles: the rotation pairs element i of both."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < n_rows)[:, None] & (columns < HALF)[None, :]
    at = rows[:, None] * (2 * HALF) + columns[None, :]
    angle_at = (rows // heads)[:, None] * HALF + columns[None, :]
    a = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)[:, None]
    a *= rstd * tl.load(weight_ptr + columns, mask=columns < HALF, other=0.0).to(tl.float32)[None, :]
    b *= rstd * tl.load(weight_ptr + HALF + columns, mask=columns < HALF, other=0.0).to(tl.float32)[None, :]
    cos = tl.load(cos_ptr + angle_at, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, rounded(a * cos - b * sin, out_ptr, INTERPRET), mask=inside)
    tl.store(out_ptr + at + HALF, rounded(b * cos + a * sin, out_ptr, INTERPRET), mask=inside)


@triton.jit
def rope_backward(
    grad_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, d_x_ptr, partial_ptr, n_rows, heads, eps, slab,
    HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The gradient turned back by the same angles, then RMSNorm's backward; partial (P, D) as in `rms_backward`."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    weight_a = tl.load(weight_ptr + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    weight_b = tl.load(weight_ptr + HALF + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    d_weight_a = tl.zeros((BLOCK,), tl.float32)
    d_weight_b = tl.zeros((BLOCK,), tl.float32)
    first = program.to(tl.int64) * slab
    for start in tl.range(0, slab, ROWS, num_stages=STAGES):
        rows = first + start + tl.arange(0, ROWS)
        inside = (rows < n_rows)[:, None] & (columns < HALF)[None, :]
        at = rows[:, None] * (2 * HALF) + columns[None, :]
        angle_at = (rows // heads)[:, None] * HALF + columns[None, :]
        a = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
        turned_a = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        turned_b = tl.load(grad_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + angle_at, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle_at, mask=inside, other=0.0).to(tl.float32)
        grad_a = turned_a * cos + turned_b * sin
        grad_b = turned_b * cos - turned_a * sin
        rstd = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)[:, None]
        a *= rstd
        b *= rstd
        d_weight_a += tl.sum(grad_a * a, 0)
        d_weight_b += tl.sum(grad_b * b, 0)
        grad_a *= weight_a[None, :]
        grad_b *= weight_b[None, :]
        mean = (tl.sum(grad_a * a + grad_b * b, 1) / (2 * HALF))[:, None]
        tl.store(d_x_ptr + at, rounded(rstd * (grad_a - a * mean), d_x_ptr, INTERPRET), mask=inside)
        tl.store(d_x_ptr + at + HALF, rounded(rstd * (grad_b - b * mean), d_x_ptr, INTERPRET), mask=inside)
    tl.store(partial_ptr + program * (2 * HALF) + columns, d_weight_a, mask=columns < HALF)
    tl.store(partial_ptr + program * (2 * HALF) + HALF + columns, d_weight_b, mask=columns < HALF)


@triton.jit
def swiglu_forward(gate_ptr, up_ptr, out_ptr, n, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, rounded(gate * tl.sigmoid(gate) * up, out_ptr, INTERPRET), mask=at < n)


@triton.jit
def swiglu_backward(
    grad_ptr, gate_ptr, up_ptr, d_gate_ptr, d_up_ptr, n, BLOCK: tl.constexpr, INTERPRET: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(d_gate_ptr + at, rounded(d_gate, d_gate_ptr, INTERPRET), mask=at < n)
    tl.store(d_up_ptr + at, rounded(grad * gate * sigmoid, d_up_ptr, INTERPRET), mask=at < n)
