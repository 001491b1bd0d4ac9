"""The GPU's `linear_cross_entropy`: matmuls by the library, everything between them in one kernel.

One program reads one row of logits twice: first for the log-sum-exp, kept online (Milakov and Gimelshein 2018), then
to write d logits over it. Logits, softmax and gradient share one buffer of (chunk, V) (the idea of Liger Kernel).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from onevocab.kernels import tuning
from onevocab.kernels.backend import on_device
from onevocab.kernels.cross_entropy import rows_that_count, scale_
from onevocab.kernels.elementwise_triton import INTERPRET, rounded

LOWEST = tl.constexpr(-3.0e38)  # finite: -inf minus -inf would be NaN
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def cross_entropy_rows(
    logits_ptr, target_ptr, weight_ptr, nll_ptr, loss_ptr, n_ids, row_stride, z_loss,
    BLOCK: tl.constexpr, WRITE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """logits (R, V) -> nll (R,), loss (R,) = w * (nll + z lse^2); with WRITE the logits become d loss / d logits."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * row_stride
    columns = tl.arange(0, BLOCK)
    target = tl.load(target_ptr + row)
    weight = tl.load(weight_ptr + row)
    at_target = tl.load(logits_ptr + target).to(tl.float32)

    top = tl.full((), LOWEST, tl.float32)  # of logits * log2(e)
    total = tl.full((), 0.0, tl.float32)  # sum of 2 ** (logits * log2(e) - top)
    for start in range(0, n_ids, BLOCK):
        inside = start + columns < n_ids
        x = tl.load(logits_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x * LOG2E, LOWEST)
        new_top = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(x - new_top), 0)
        top = new_top
    lse = (top + tl.log2(total)) * LN2
    nll = lse - at_target
    tl.store(nll_ptr + row, nll)
    tl.store(loss_ptr + row, weight * (nll + z_loss * lse * lse))

    if WRITE:
        scale = weight * (1.0 + 2.0 * z_loss * lse) / total
        for start in range(0, n_ids, BLOCK):
            inside = start + columns < n_ids
            x = tl.load(logits_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
            gradient = scale * tl.exp2(x * LOG2E - top) - tl.where(start + columns == target, weight, 0.0)
            tl.store(logits_ptr + start + columns, rounded(gradient, logits_ptr, INTERPRET), mask=inside)


def softmax_gradient_(logits: Tensor, targets: Tensor, weights: Tensor, z_loss: float, write: bool):
    """logits (R, V) become their gradient when `write`; returns nll (R,), loss (R,), float32."""
    nll, loss = (torch.empty(len(logits), device=logits.device, dtype=torch.float32) for _ in range(2))
    config = tuning.config("cross_entropy", logits.shape[1], logits.dtype, logits.device)
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
        if need_weight and x.dtype == torch.float32:
            d_weight.addmm_(logits.t(), x[part])
        elif need_weight:
            d_weight += logits.t() @ x[part]
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
