"""The loss and its gradients by torch's products, a chunk of rows at a time: what a CPU runs, with a softmax in C where
there is one."""

import torch
from torch import Tensor

from onevocab.kernels.cross_entropy.ops_c import softmax_c
from onevocab.kernels.cross_entropy.rows import add_product_, rows_that_count, scale_


def softmax_(logits: Tensor, buffer: Tensor, targets: Tensor, weights: Tensor, z_loss: float, gradient: bool):
    """logits (n, V), targets and weights (n,) -> (lse, nll), both (n,). With `gradient` the logits become d loss /
    d logits = weights * ((1 + 2 z lse) * p - onehot). buffer (n, V), of the type of the weights: the logits themselves
    where that is theirs; the kernel is done with a row before it writes it."""
    top, at_target = (each.to(weights.dtype) for each in (logits.amax(-1), logits.gather(1, targets[:, None])[:, 0]))
    probabilities = torch.softmax(logits, -1, dtype=weights.dtype, out=buffer)
    # ln Z from the likeliest id, whose probability never underflows: one pass less than logsumexp
    lse = top - probabilities.amax(-1).log()
    if gradient:
        d_logits = probabilities.mul_((weights * (1 + 2 * z_loss * lse))[:, None])
        d_logits.scatter_add_(1, targets[:, None], -weights[:, None])
        if buffer is not logits:
            logits.copy_(d_logits)
    return lse, lse - at_target


class LinearCrossEntropy(torch.autograd.Function):
    """(hidden, weight, targets, weights, z_loss, chunk, need_hidden, need_weight, in_c) -> loss (), nll (N,).
    in_c: whether the softmax is that in C."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, weights, z_loss, chunk, need_x, need_weight, in_c):
        rows, x, t, w = rows_that_count(hidden, targets, weights, len(weight))
        head = weight.to(x.dtype)
        d_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
        d_weight = torch.zeros_like(weight) if need_weight else None
        kept_nll = x.new_empty(len(rows), dtype=w.dtype)
        loss = kept_nll.new_zeros(())
        # The large buffers are made once: fresh pages for each chunk would cost a CPU as much as the softmax.
        logits_buffer = x.new_empty(min(chunk, len(rows)), len(weight))
        softmax_buffer = torch.empty_like(logits_buffer, dtype=w.dtype) if x.dtype != w.dtype and not in_c else None
        for start in range(0, len(rows), chunk):
            part = slice(start, min(start + chunk, len(rows)))
            n = part.stop - start
            logits = torch.mm(x[part], head.t(), out=logits_buffer[:n])
            given = t[part], w[part], z_loss, need_x or need_weight
            if in_c:
                lse, kept_nll[part] = softmax_c(logits, *given)
            else:
                buffer = logits if softmax_buffer is None else softmax_buffer[:n]
                lse, kept_nll[part] = softmax_(logits, buffer, *given)
            loss += (w[part] * (kept_nll[part] + z_loss * lse**2)).sum()
            if need_x:
                torch.mm(logits, head, out=d_x[part])
            if need_weight:
                add_product_(d_weight, logits.t(), x[part])
        nll = kept_nll.new_zeros(len(hidden)).index_copy_(0, rows, kept_nll)
        ctx.save_for_backward(rows, d_x, d_weight)
        ctx.n_rows = len(hidden)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx, grad, _):
        rows, d_x, d_weight = ctx.saved_tensors
        if d_x is not None:
            d_x = scale_(d_x, grad)
            if len(rows) < ctx.n_rows:
                d_x = d_x.new_zeros(ctx.n_rows, d_x.shape[1]).index_copy_(0, rows, d_x)
        return d_x, None if d_weight is None else scale_(d_weight, grad), *(None,) * 7
