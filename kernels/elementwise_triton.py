"""The GPU's RMSNorm (with residual), per-head RMSNorm with rotary positions, and SwiGLU.

Each is bound by memory: a tile of whole rows is read once and written once, arithmetic in float32. The weight's
gradient is a sum over all rows: every program adds up its own slab of rows, and a second step adds the programs'
sums in a fixed order, without atomics, so that gradients are bitwise the same from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from onevocab.kernels import tuning
from onevocab.kernels.backend import on_device

INTERPRET = bool(triton.knobs.runtime.interpret)  # the tests' interpreter, whose bfloat16 arithmetic is wrong


@triton.jit
def rounded(x, pointer, INTERPRET: tl.constexpr):
    """float32 x in the type that the pointer points to, rounded to nearest even (the interpreter truncates)."""
    if INTERPRET and pointer.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(pointer.dtype.element_ty)


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
    ROWS: tl.constexpr, BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """d x of a slab of rows (+ the gradient that reached the sum itself), and the slab's part of d weight (P, d)."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK,), tl.float32)
    first = program.to(tl.int64) * slab
    for start in range(0, slab, ROWS):
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
    HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The gradient turned back by the same angles, then RMSNorm's backward; partial (P, D) as in `rms_backward`."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    weight_a = tl.load(weight_ptr + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    weight_b = tl.load(weight_ptr + HALF + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    d_weight_a = tl.zeros((BLOCK,), tl.float32)
    d_weight_b = tl.zeros((BLOCK,), tl.float32)
    first = program.to(tl.int64) * slab
    for start in range(0, slab, ROWS):
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


def tile(operation: str, x: Tensor, width: int) -> dict:
    """BLOCK holds a whole row, so only ROWS and the launch options come from the table."""
    return {**tuning.config(operation, width, x.dtype, x.device), "BLOCK": triton.next_power_of_2(width)}


def slabs(n_rows: int, rows: int, device: torch.device) -> tuple[int, int]:
    """(programs, rows per program): a few programs per multiprocessor, each a whole number of tiles."""
    many = 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
    slab = triton.cdiv(triton.cdiv(n_rows, rows), many) * rows
    return triton.cdiv(n_rows, slab), slab


def _launch_rms(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    kind = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out = torch.empty_like(x, dtype=torch.promote_types(kind, weight.dtype))
    total = x if residual is None else torch.empty_like(x, dtype=kind)
    n, config = x.numel() // x.shape[-1], tile("rms_norm", x, x.shape[-1])
    rms_forward[(triton.cdiv(n, config["ROWS"]),)](
        x, x if residual is None else residual.contiguous(), weight, total, out, n, x.shape[-1], eps,
        RESIDUAL=residual is not None, INTERPRET=INTERPRET, **config,
    )  # fmt: skip
    return out, total


@torch.library.custom_op("onevocab::rms_norm", mutates_args=())
@on_device
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _launch_rms(x, weight, eps, None)[0]


@torch.library.custom_op("onevocab::add_rms_norm", mutates_args=())
@on_device
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> (normed, x + residual)"""
    return _launch_rms(x, weight, eps, residual)


@torch.library.custom_op("onevocab::rms_norm_backward", mutates_args=())
@on_device
def rms_norm_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """-> (d x, d weight); x is what was normed, grad_total a gradient that is added to d x."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    width, d_x = x.shape[-1], torch.empty_like(x)
    n, config = x.numel() // width, tile("rms_norm_backward", x, width)
    programs, slab = slabs(n, config["ROWS"], x.device)
    partial = x.new_empty(programs, width, dtype=torch.float32)
    rms_backward[(programs,)](
        grad, grad if grad_total is None else grad_total.contiguous(), x, weight, d_x, partial, n, width, eps, slab,
        RESIDUAL=grad_total is not None, INTERPRET=INTERPRET, **config,
    )  # fmt: skip
    return d_x, partial.sum(0).to(weight.dtype)


@rms_norm.register_fake
def _(x, weight, eps):
    return torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype), memory_format=torch.contiguous_format)


@add_rms_norm.register_fake
def _(x, residual, weight, eps):
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return x.new_empty(x.shape, dtype=torch.promote_types(total.dtype, weight.dtype)), total


@rms_norm_backward.register_fake
def _(grad, grad_total, x, weight, eps):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep_rms(ctx, inputs, output):
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _keep_add_rms(ctx, inputs, output):
    _, residual, weight, ctx.eps = inputs
    ctx.kinds = inputs[0].dtype, residual.dtype
    ctx.save_for_backward(output[1], weight)
    ctx.set_materialize_grads(False)


def _rms_norm_grad(ctx, grad):
    return *rms_norm_backward(grad, None, *ctx.saved_tensors, ctx.eps), None


def _add_rms_norm_grad(ctx, grad, grad_total):
    total, weight = ctx.saved_tensors
    if grad is None:  # only the sum was used
        d_x, d_weight = grad_total, None
    else:
        d_x, d_weight = rms_norm_backward(grad, grad_total, total, weight, ctx.eps)
    return *(None if d_x is None else d_x.to(kind) for kind in ctx.kinds), d_weight, None


rms_norm.register_autograd(_rms_norm_grad, setup_context=_keep_rms)
add_rms_norm.register_autograd(_add_rms_norm_grad, setup_context=_keep_add_rms)


@torch.library.custom_op("onevocab::qk_norm_rope", mutates_args=())
@on_device
def qk_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    x, weight, cos, sin = (each.contiguous() for each in (x, weight, cos, sin))
    heads, half = x.shape[2], x.shape[3] // 2
    n, config, out = x.numel() // x.shape[3], tile("qk_norm_rope", x, half), torch.empty_like(x)
    rope_forward[(triton.cdiv(n, config["ROWS"]),)](
        x, weight, cos, sin, out, n, heads, eps, HALF=half, INTERPRET=INTERPRET, **config
    )
    return out


@torch.library.custom_op("onevocab::qk_norm_rope_backward", mutates_args=())
@on_device
def qk_norm_rope_backward(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """-> (d x, d weight)"""
    grad, x, weight, cos, sin = (each.contiguous() for each in (grad, x, weight, cos, sin))
    heads, half = x.shape[2], x.shape[3] // 2
    n, config, d_x = x.numel() // x.shape[3], tile("qk_norm_rope_backward", x, half), torch.empty_like(x)
    programs, slab = slabs(n, config["ROWS"], x.device)
    partial = x.new_empty(programs, 2 * half, dtype=torch.float32)
    rope_backward[(programs,)](
        grad, x, weight, cos, sin, d_x, partial, n, heads, eps, slab, HALF=half, INTERPRET=INTERPRET, **config
    )
    return d_x, partial.sum(0).to(weight.dtype)


@qk_norm_rope.register_fake
def _(x, weight, cos, sin, eps):
    return x.new_empty(x.shape)


@qk_norm_rope_backward.register_fake
def _(grad, x, weight, cos, sin, eps):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep_rope(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _qk_norm_rope_grad(ctx, grad):
    return *qk_norm_rope_backward(grad, *ctx.saved_tensors, ctx.eps), None, None, None


qk_norm_rope.register_autograd(_qk_norm_rope_grad, setup_context=_keep_rope)


@torch.library.custom_op("onevocab::swiglu", mutates_args=())
@on_device
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    n, out = gate.numel(), torch.empty_like(up)
    config = tuning.config("swiglu", gate.shape[-1], gate.dtype, gate.device)
    swiglu_forward[(triton.cdiv(n, config["BLOCK"]),)](gate, up, out, n, INTERPRET=INTERPRET, **config)
    return out


@torch.library.custom_op("onevocab::swiglu_backward", mutates_args=())
@on_device
def swiglu_grad(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """-> (d gate, d up)"""
    grad, gate, up = (each.contiguous() for each in (grad, gate, up))
    d_gate, d_up, n = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    config = tuning.config("swiglu_backward", gate.shape[-1], gate.dtype, gate.device)
    swiglu_backward[(triton.cdiv(n, config["BLOCK"]),)](
        grad, gate, up, d_gate, d_up, n, INTERPRET=INTERPRET, **config
    )
    return d_gate, d_up


@swiglu.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@swiglu_grad.register_fake
def _(grad, gate, up):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


swiglu.register_autograd(
    lambda ctx, grad: swiglu_grad(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
