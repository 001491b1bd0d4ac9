"""The GPU's `linear_cross_entropy`: matmuls by the library, everything between them by `kernels_triton`."""

import torch
from torch import Tensor

from onevocab.kernels import tuning
from onevocab.kernels.backend import on_device
from onevocab.kernels.cross_entropy.configs import TABLE
from onevocab.kernels.cross_entropy.kernels_triton import cross_entropy_rows
from onevocab.kernels.cross_entropy.rows import add_product_, rows_that_count, scale_
from onevocab.kernels.rounding_triton import INTERPRET


def softmax_gradient_(logits: Tensor, targets: Tensor, weights: Tensor, z_loss: float, write: bool):
    """logits (R, V) become their gradient when `write`; returns nll (R,), loss (R,), float32."""
    nll, loss = (torch.empty(len(logits), device=logits.device, dtype=torch.float32) for _ in range(2))
    config = tuning.config(TABLE, "cross_entropy", logits.shape[1], logits.dtype, logits.device)
    cross_entropy_rows[(len(logits),)](
        logits, targets, weights, nll, loss, logits.shape[1], logits.stride(0), z_loss,
        WRITE=write, INTERPRET=INTERPRET, **config,
    )  # fmt: skip
    return nll, loss


@torch.library.custom_op("onevocab::linear_cross_entropy", mutates_args=())
@on_device
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, z_loss: float, chunk: int,
    need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> loss (), nll (N,), d hidden (N, d), d weight (V, d); a gradient that is not needed is empty (0, d)."""
    rows, x, t, w = rows_that_count(hidden, targets, weights, len(weight))
    head = weight.to(x.dtype)
    d_hidden = torch.zeros(hidden.shape if need_hidden else (0, hidden.shape[1]), dtype=x.dtype, device=x.device)
    # d weight is the sum of all chunks: in float32, for bfloat16 would round at each of them.
    d_weight = x.new_zeros(weight.shape if need_weight else (0, weight.shape[1]), dtype=torch.float32)
    kept_nll = x.new_empty(len(rows), dtype=torch.float32)
    loss = kept_nll.new_zeros(())
    buffer = x.new_empty(min(chunk, len(rows)), len(weight))
    for start in range(0, len(rows), chunk):
        part = slice(start, min(start + chunk, len(rows)))
        logits = torch.mm(x[part], head.t(), out=buffer[: part.stop - start])
        kept_nll[part], each = softmax_gradient_(logits, t[part], w[part], z_loss, need_hidden or need_weight)
        loss += each.sum()
        if need_hidden:
            d_hidden.index_copy_(0, rows[part], torch.mm(logits, head))
        if need_weight:
            add_product_(d_weight, logits.t(), x[part])
    nll = kept_nll.new_zeros(len(hidden)).index_copy_(0, rows, kept_nll)
    return loss, nll, d_hidden, d_weight.to(weight.dtype)


@linear_cross_entropy.register_fake
def _(hidden, weight, targets, weights, z_loss, chunk, need_hidden, need_weight):
    loss, nll = (hidden.new_empty(shape, dtype=torch.float32) for shape in ((), (hidden.shape[0],)))
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else (0, hidden.shape[1]))
    return loss, nll, d_hidden, weight.new_empty(weight.shape if need_weight else (0, weight.shape[1]))


def _keep(ctx, inputs, output):
    ctx.needed = inputs[-2:]
    ctx.save_for_backward(*output[2:])
    ctx.set_materialize_grads(False)  # else zeros as large as d weight are made for the outputs that nobody uses


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    kept = (scale_(each.detach(), grad) if need else None
            for each, need in zip(ctx.saved_tensors, ctx.needed, strict=True))  # fmt: skip
    return *kept, *(None,) * 6


linear_cross_entropy.register_autograd(_backward, setup_context=_keep)
