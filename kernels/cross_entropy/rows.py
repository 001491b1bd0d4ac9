"""What the torch form and the Triton form share: the rows that count, sums of products, gradients scaled in place."""

import torch
from torch import Tensor


def rows_that_count(hidden: Tensor, targets: Tensor, weights: Tensor, vocabulary: int) -> tuple[Tensor, ...]:
    """(rows, hidden, targets int64, weights) of the rows whose weight is not zero; IndexError for a bad target.

    How many there are and what their targets reach is read from the device together: it is waited for once.
    """
    counts = weights != 0
    low, high = torch.where(counts, targets.long(), 0).aminmax()
    many, low, high = torch.stack([counts.sum(), low, high]).tolist()
    if low < 0 or high >= vocabulary:
        raise IndexError(f"targets {low} .. {high} do not fit {vocabulary} ids")
    rows = torch.nonzero_static(counts, size=many).squeeze(1)
    if many < len(hidden):
        hidden = hidden.index_select(0, rows)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return rows, hidden, targets[rows].long(), weights[rows].to(wide)


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (m, n) += a (m, k) @ b (k, n). A GPU adds 16-bit factors up in the total's float32 and rounds nothing;
    elsewhere torch has no such product: it is rounded to the factors' type before it is added."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def scale_(kept: Tensor, grad: Tensor) -> Tensor:
    """kept * grad in place: a second gradient as large as the head is not made. Autograd notices a second use.

    While a compiler traces, not in place: what a graph keeps for its backward pass it may also give out.
    """
    return kept.mul_(grad.to(kept.dtype)) if type(grad) is Tensor else kept * grad.to(kept.dtype)
