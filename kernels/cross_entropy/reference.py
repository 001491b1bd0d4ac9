"""The definition of the loss, written to be read, and what every form of it returns."""

from typing import NamedTuple

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
