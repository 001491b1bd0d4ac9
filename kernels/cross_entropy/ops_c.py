"""The call of the kernel in C."""

import torch
from torch import Tensor

from onevocab.kernels.c_library import call


def softmax_c(logits: Tensor, targets: Tensor, weights: Tensor, z_loss: float, gradient: bool):
    """logits (n, V), targets and weights (n,) -> (lse, nll), both (n,) float32. With `gradient` the logits become
    d loss / d logits, in place."""
    lse, nll = (torch.empty(len(logits)) for _ in range(2))
    call("cross_entropy", "softmax_rows", logits, targets, weights, lse, nll, *logits.shape,
         int(logits.dtype == torch.float32), float(z_loss), int(gradient))
    return lse, nll
