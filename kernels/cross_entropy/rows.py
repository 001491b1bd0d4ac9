"""What the torch form and the Triton form share: the rows that count, and gradients scaled in place."""

import torch
from torch import Tensor


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
