"""The head's matmul and the cross-entropy in one, a chunk of rows at a time: the logits are never all stored.

The gradients are computed in the forward pass, while a chunk's logits are at hand (as Liger Kernel does), so the
backward pass only scales them. Exact, not an approximation.
"""

import torch
from torch import Tensor

from onevocab.kernels.backend import autocast_type, select_backend, unsupported_type
from onevocab.kernels.c_library import why_not
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

    A GPU is waited for once a call, to learn which rows count: its queue runs dry for some 0.1 ms. Without it all rows
    would be multiplied by the head: of 16,384 rows, with V = 65,536 and d = 2,048, a tenth that does not count is 2 ms.
    In conversations it is more than half, and a sixth of packed rows is padding.

    Gradients flow to hidden and weight, once: the backward pass scales in place what the forward pass kept. Raises
    ValueError when shapes, dtypes or devices do not belong together, IndexError when a target that counts is outside
    the vocabulary.
    """
    _check(hidden, weight, targets, weights, chunk)
    chosen = select_backend("linear_cross_entropy", hidden, weight, targets, weights, backend=backend,
                            unsupported=unsupported_type(hidden, weight),
                            without_c=lambda: why_not("cross_entropy", hidden, weight, targets))
    if chosen == "reference":
        return linear_cross_entropy_reference(hidden, weight, targets, weights, z_loss)
    if kind := autocast_type(hidden.device):  # the matmuls in its type; softmax, loss and d weight in the weight's
        hidden = hidden.to(kind)
    with torch.autocast(hidden.device.type, enabled=False):
        return LossSums(*_fused(hidden, weight, targets, weights, z_loss, chunk or _chunk(hidden, weight), chosen))


def _fused(hidden, weight, targets, weights, z_loss, chunk, chosen):
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    if chosen in ("c", "torch"):
        return LinearCrossEntropy.apply(hidden, weight, targets, weights, z_loss, chunk, *wanted, chosen == "c")
    from onevocab.kernels.cross_entropy.ops_triton import linear_cross_entropy as run

    loss, nll, *_ = run(hidden, weight, targets, weights, z_loss, chunk, *wanted)
    return loss, nll.detach()


def _chunk(hidden: Tensor, weight: Tensor) -> int:
    """Rows per chunk. Each chunk reads and writes all of d weight (V * d) beside its logits (rows * V).

    On a CPU rows = d / 4 keeps the logits a quarter of d weight, and the rest of the traffic about as large as the
    softmax's. A GPU takes 4,096: with V = 65,536, d = 2,048 and 16,384 rows, d weight in float32 is moved 4 times, 4.3
    GB or 1.3 ms of an H100's bandwidth beside some 19 ms of products; chunks of 1,024 would move 17 GB. The memory: a
    chunk's logits, V * 8 KiB in 16 bits (0.5 GiB of V = 65,536, 1.2 of 152,000) and twice that in float32, and d weight
    in float32, V * d * 4 bytes (0.5 GiB).
    """
    return min(max(hidden.shape[1] // 4, 128), 512) if hidden.device.type == "cpu" else 4096


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
