"""The head's matmul and the cross-entropy in one, a chunk of rows at a time: the logits are never all stored.

The gradients are computed in the forward pass, while a chunk's logits are at hand (as Liger Kernel does), so the
backward pass only scales them. Exact, not an approximation.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from onevocab.kernels.backend import choose
from onevocab.kernels.elementwise import unsupported_type


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
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    z_loss: float = 0.0,
    chunk: int | None = None,
    backend: str | None = None,
) -> LossSums:
    """Like the reference; logits of at most `chunk` rows exist at once, and rows of zero weight cost nothing.

    Gradients flow to hidden and weight, once: the backward pass scales in place what the forward pass kept. Raises
    ValueError when shapes, dtypes or devices do not belong together, IndexError when a target that counts is outside
    the vocabulary.
    """
    _check(hidden, weight, targets, weights, chunk)
    chosen = choose("linear_cross_entropy", hidden, weight, targets, weights, backend=backend,
                    unsupported=unsupported_type(hidden, weight))
    if chosen == "reference":
        return linear_cross_entropy_reference(hidden, weight, targets, weights, z_loss)
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):  # the matmuls in its type; softmax, loss and d weight in the weight's
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        return LossSums(*_fused(hidden, weight, targets, weights, z_loss, chunk or _chunk(hidden, weight), chosen))


def _fused(hidden, weight, targets, weights, z_loss, chunk, chosen):
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    if chosen == "torch":
        return _LinearCrossEntropy.apply(hidden, weight, targets, weights, z_loss, chunk, *wanted)
    from onevocab.kernels.cross_entropy_triton import linear_cross_entropy as run

    loss, nll, *_ = run(hidden, weight, targets, weights, z_loss, chunk, *wanted)
    return loss, nll.detach()


def _chunk(hidden: Tensor, weight: Tensor) -> int:
    """Rows per chunk. Each chunk reads and writes all of d weight (V * d) beside its logits (rows * V): rows = d / 4
    keeps the logits a quarter of d weight, and the rest of the traffic about as large as the softmax's. A GPU needs
    tall matrices to be busy."""
    least, most = (128, 512) if hidden.device.type == "cpu" else (1024, 4096)
    return min(max(hidden.shape[1] // 4, least), most)


def _check(hidden, weight, targets, weights, chunk):
    fits = hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1]
    if not fits or not targets.shape == weights.shape == hidden.shape[:1] or 0 in (*hidden.shape, *weight.shape):
        shapes = ", ".join(str(tuple(x.shape)) for x in (hidden, weight, targets, weights))
        raise ValueError(f"linear_cross_entropy: {shapes} do not fit (N, d), (V, d), (N,), (N,), none of them empty")
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"linear_cross_entropy: hidden {hidden.dtype} and weight {weight.dtype} must be floating")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"linear_cross_entropy: targets are ids, not {targets.dtype}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"linear_cross_entropy: chunk {chunk} is not positive")


def rows_that_count(hidden: Tensor, targets: Tensor, weights: Tensor, vocabulary: int) -> tuple[Tensor, ...]:
    """(rows, hidden, targets int64, weights) of the rows whose weight is not zero; IndexError for a bad target."""
    rows = weights.nonzero().squeeze(1)
    targets = targets[rows].long()
    if len(rows):
        low, high = torch.stack(targets.aminmax()).tolist()
        if low < 0 or high >= vocabulary:
            raise IndexError(f"targets {low} .. {high} do not fit {vocabulary} ids")
    if len(rows) < len(hidden):
        hidden = hidden.index_select(0, rows)
    return rows, hidden, targets, weights[rows].to(torch.promote_types(hidden.dtype, torch.float32))


def scale_(kept: Tensor, grad: Tensor) -> Tensor:
    """kept * grad in place: a second gradient as large as the head is not made. Autograd notices a second use.

    While a compiler traces, not in place: what a graph keeps for its backward pass it may also give out.
    """
    return kept.mul_(grad.to(kept.dtype)) if type(grad) is Tensor else kept * grad.to(kept.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
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
            d_x = scale_(d_x, grad)
            if len(rows) < ctx.n_rows:
                d_x = d_x.new_zeros(ctx.n_rows, d_x.shape[1]).index_copy_(0, rows, d_x)
        return d_x, None if d_weight is None else scale_(d_weight, grad), *(None,) * 6
