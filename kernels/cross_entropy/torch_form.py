"""The loss and its gradients with torch alone, a chunk of rows at a time: what a CPU runs."""

import torch

from onevocab.kernels.cross_entropy.rows import add_product_, rows_that_count, scale_


class LinearCrossEntropy(torch.autograd.Function):
    """(hidden, weight, targets, weights, z_loss, chunk, need_hidden, need_weight) -> loss (), nll (N,)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, weights, z_loss, chunk, need_x, need_weight):
        rows, x, t, w = rows_that_count(hidden, targets, weights, len(weight))
        head = weight.to(x.dtype)
        d_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
        d_weight = torch.zeros_like(weight) if need_weight else None
        kept_nll = x.new_empty(len(rows), dtype=w.dtype)
        loss = kept_nll.new_zeros(())
        # The large buffers are made once: fresh pages for each chunk would cost a CPU as much as the softmax.
        logits_buffer = x.new_empty(min(chunk, len(rows)), len(weight))
        softmax_buffer = logits_buffer if x.dtype == w.dtype else torch.empty_like(logits_buffer, dtype=w.dtype)
        for start in range(0, len(rows), chunk):
            part = slice(start, min(start + chunk, len(rows)))
            n = part.stop - start
            logits = torch.mm(x[part], head.t(), out=logits_buffer[:n])
            top, at_target = (each.to(w.dtype) for each in (logits.amax(-1), logits.gather(1, t[part, None])[:, 0]))
            # Over the logits themselves where the types agree: the kernel is done with a row before it writes it.
            probabilities = torch.softmax(logits, -1, dtype=w.dtype, out=softmax_buffer[:n])
            # ln Z from the likeliest id, whose probability never underflows: one pass less than logsumexp
            lse = top - probabilities.amax(-1).log()
            kept_nll[part] = lse - at_target
            loss += (w[part] * (kept_nll[part] + z_loss * lse**2)).sum()
            if need_x or need_weight:  # d loss / d logits = w * ((1 + 2 z lse) * p - onehot), in place
                d_logits = probabilities.mul_((w[part] * (1 + 2 * z_loss * lse))[:, None])
                d_logits.scatter_add_(1, t[part, None], -w[part, None])
                if x.dtype != w.dtype:
                    d_logits = logits.copy_(d_logits)
                if need_x:
                    torch.mm(d_logits, head, out=d_x[part])
                if need_weight:
                    add_product_(d_weight, d_logits.t(), x[part])
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
        return d_x, None if d_weight is None else scale_(d_weight, grad), *(None,) * 6
