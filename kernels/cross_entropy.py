"""The head's matmul and the cross-entropy in one, a chunk of rows at a time: the logits are never all stored.

The gradients are computed in the forward pass, while a chunk's logits are at hand (as Liger Kernel does), so the
backward pass only scales them. Exact, not an approximation.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LossSums(NamedTuple):
    loss: Tensor  # scalar: sum over rows of weight * (nll + z_loss * lse ** 2)
    nll: Tensor  # (N,), detached: -ln p(target) in nats; 0 for rows of zero weight, which are not computed


def linear_cross_entropy_reference(hidden, weight, targets, weights, z_loss: float = 0.0) -> LossSums:
    """hidden (N, d), weight (V, d), targets (N,) integer ids, weights (N,) >= 0 -> LossSums. The definition.

    z_loss is the coefficient of ln(Z) ** 2, which keeps the logits from drifting (PaLM; Chameleon uses 1e-5).
    """
    logits = F.linear(hidden, weight)
    lse = logits.logsumexp(-1)
    nll = lse - logits.gather(1, targets[:, None].long()).squeeze(1)
    return LossSums((weights * (nll + z_loss * lse**2)).sum(), nll.detach() * (weights != 0))


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, z_loss: float = 0.0, chunk: int = 512
) -> LossSums:
    """Like the reference; logits of at most `chunk` rows exist at once, and rows of zero weight cost nothing.

    Gradients flow to hidden and weight. Raises IndexError when a target that counts is outside the vocabulary.
    """
    needs_grad, kind = torch.is_grad_enabled(), hidden.device.type
    if torch.is_autocast_enabled(kind):  # the matmuls in its type; softmax, loss and d weight in the weight's
        hidden = hidden.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            return LossSums(*_LinearCrossEntropy.apply(hidden, weight, targets, weights, z_loss, chunk, needs_grad))
    return LossSums(*_LinearCrossEntropy.apply(hidden, weight, targets, weights, z_loss, chunk, needs_grad))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, weights, z_loss, chunk, needs_grad):
        rows = weights.nonzero().squeeze(1)
        x, t, w = hidden.index_select(0, rows), targets[rows].long(), weights[rows].float()
        if len(rows) and not (0 <= int(t.min()) and int(t.max()) < len(weight)):
            raise IndexError(f"targets {int(t.min())} .. {int(t.max())} do not fit {len(weight)} ids")
        need_x, need_weight = (needs_grad and need for need in ctx.needs_input_grad[:2])
        head = weight.to(x.dtype)
        d_x = torch.empty_like(x) if need_x else None
        d_weight = torch.zeros_like(weight) if need_weight else None
        kept_nll = torch.empty(len(rows), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        loss = kept_nll.new_zeros(())
        # the two large buffers are made once: fresh pages for each chunk would cost a CPU as much as the softmax
        logits_buffer = x.new_empty(min(chunk, len(rows)), len(weight))
        probabilities_buffer = torch.empty_like(logits_buffer, dtype=kept_nll.dtype)
        for start in range(0, len(rows), chunk):
            part = slice(start, min(start + chunk, len(rows)))
            n = part.stop - start
            logits = torch.mm(x[part], head.t(), out=logits_buffer[:n])
            probabilities = torch.softmax(logits, -1, dtype=kept_nll.dtype, out=probabilities_buffer[:n])
            logits = logits.to(kept_nll.dtype)
            # ln Z from the likeliest id, whose probability never underflows: one pass less than logsumexp
            lse = logits.amax(-1) - probabilities.amax(-1).log()
            kept_nll[part] = lse - logits.gather(1, t[part, None]).squeeze(1)
            loss += (w[part] * (kept_nll[part] + z_loss * lse**2)).sum()
            if need_x or need_weight:  # d loss / d logits = w * ((1 + 2 z lse) * p - onehot), in place
                d_logits = probabilities.mul_((w[part] * (1 + 2 * z_loss * lse))[:, None])
                d_logits.scatter_add_(1, t[part, None], -w[part, None].to(d_logits.dtype))
                d_logits = d_logits.to(x.dtype)
                if need_x:
                    torch.mm(d_logits, head, out=d_x[part])
                if need_weight and x.dtype == weight.dtype:
                    d_weight.addmm_(d_logits.t(), x[part])
                elif need_weight:
                    d_weight += d_logits.t() @ x[part]
        nll = kept_nll.new_zeros(len(hidden)).index_copy_(0, rows, kept_nll)
        ctx.save_for_backward(rows, d_x, d_weight)
        ctx.n_rows = len(hidden)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx, grad, _):
        rows, d_x, d_weight = ctx.saved_tensors
        if d_x is not None:
            full = d_x.new_zeros(ctx.n_rows, d_x.shape[1])
            d_x = full.index_copy_(0, rows, d_x * grad.to(d_x.dtype))
        if d_weight is not None:
            d_weight = d_weight * grad.to(d_weight.dtype)
        return d_x, d_weight, None, None, None, None, None
