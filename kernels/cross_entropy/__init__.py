"""The head's matmul and the cross-entropy in one, a chunk of rows at a time: the logits are never all stored.

The gradients are computed in the forward pass, while a chunk's logits are at hand (as Liger Kernel does), so the
backward pass only scales them. Exact, not an approximation.
"""

import torch
from torch import Tensor

from onevocab.kernels.backend import select_backend, unsupported_type
from onevocab.kernels.cross_entropy.reference import LossSums, linear_cross_entropy_reference
from onevocab.kernels.cross_entropy.torch_form import LinearCrossEntropy

__all__ = ["LossSums", "linear_cross_entropy", "linear_cross_entropy_reference"]


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
    chosen = select_backend("linear_cross_entropy", hidden, weight, targets, weights, backend=backend,
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
        return LinearCrossEntropy.apply(hidden, weight, targets, weights, z_loss, chunk, *wanted)
    from onevocab.kernels.cross_entropy.ops_triton import linear_cross_entropy as run

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
