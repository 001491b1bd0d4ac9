"""The GPU's norms, rotation and gate: launches the kernels of `kernels_triton`, and registers them with torch."""

import torch
import triton
from torch import Tensor

from onevocab.kernels import tuning
from onevocab.kernels.backend import on_device
from onevocab.kernels.elementwise.configs import TABLE
from onevocab.kernels.elementwise.kernels_triton import (
    rms_backward,
    rms_forward,
    rope_backward,
    rope_forward,
    swiglu_backward,
    swiglu_forward,
)
from onevocab.kernels.rounding_triton import INTERPRET


def tile(operation: str, x: Tensor, width: int) -> dict:
    """BLOCK holds a whole row, so only ROWS and the launch options come from the table."""
    return {**tuning.config(TABLE, operation, width, x.dtype, x.device), "BLOCK": triton.next_power_of_2(width)}


def slabs(n_rows: int, rows: int, device: torch.device) -> tuple[int, int]:
    """(programs, rows per program): a few programs per multiprocessor, each a whole number of tiles."""
    many = 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
    slab = triton.cdiv(triton.cdiv(n_rows, rows), many) * rows
    return triton.cdiv(n_rows, slab), slab


def _launch_rms(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, kind: torch.dtype):
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x, dtype=kind)
    total = x if residual is None else torch.empty_like(out, dtype=torch.promote_types(x.dtype, residual.dtype))
    n, config = x.numel() // x.shape[-1], tile("rms_norm", x, x.shape[-1])
    rms_forward[(triton.cdiv(n, config["ROWS"]),)](
        x, x if residual is None else residual.contiguous(), weight, total, out, n, x.shape[-1], eps,
        RESIDUAL=residual is not None, INTERPRET=INTERPRET, **config,
    )  # fmt: skip
    return out, total


@torch.library.custom_op("onevocab::rms_norm", mutates_args=())
@on_device
def rms_norm(x: Tensor, weight: Tensor, eps: float, kind: torch.dtype) -> Tensor:
    """kind: the type of the result"""
    return _launch_rms(x, weight, eps, None, kind)[0]


@torch.library.custom_op("onevocab::add_rms_norm", mutates_args=())
@on_device
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, kind: torch.dtype
) -> tuple[Tensor, Tensor]:
    """-> (normed in `kind`, x + residual)"""
    return _launch_rms(x, weight, eps, residual, kind)


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
def _(x, weight, eps, kind):
    return x.new_empty(x.shape, dtype=kind)


@add_rms_norm.register_fake
def _(x, residual, weight, eps, kind):
    return x.new_empty(x.shape, dtype=kind), x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


@rms_norm_backward.register_fake
def _(grad, grad_total, x, weight, eps):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep_rms(ctx, inputs, output):
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _keep_add_rms(ctx, inputs, output):
    _, residual, weight, ctx.eps, _ = inputs
    ctx.kinds = inputs[0].dtype, residual.dtype
    ctx.save_for_backward(output[1], weight)
    ctx.set_materialize_grads(False)


def _rms_norm_grad(ctx, grad):
    return *rms_norm_backward(grad, None, *ctx.saved_tensors, ctx.eps), None, None


def _add_rms_norm_grad(ctx, grad, grad_total):
    total, weight = ctx.saved_tensors
    if grad is None:  # only the sum was used
        d_x, d_weight = grad_total, None
    else:
        d_x, d_weight = rms_norm_backward(grad, grad_total, total, weight, ctx.eps)
    return *(None if d_x is None else d_x.to(kind) for kind in ctx.kinds), d_weight, None, None


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
    config = tuning.config(TABLE, "swiglu", gate.shape[-1], gate.dtype, gate.device)
    swiglu_forward[(triton.cdiv(n, config["BLOCK"]),)](gate, up, out, n, INTERPRET=INTERPRET, **config)
    return out


@torch.library.custom_op("onevocab::swiglu_backward", mutates_args=())
@on_device
def swiglu_grad(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """-> (d gate, d up)"""
    grad, gate, up = (each.contiguous() for each in (grad, gate, up))
    d_gate, d_up, n = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    config = tuning.config(TABLE, "swiglu_backward", gate.shape[-1], gate.dtype, gate.device)
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
