"""The loss's cases for ahead-of-time compilation."""

import torch

from onevocab.kernels.aot_cases import cases, leaf
from onevocab.kernels.cross_entropy import linear_cross_entropy


def _cross_entropy(vocabulary: int, dtype: torch.dtype) -> None:
    targets, weights = torch.zeros(32, dtype=torch.long), torch.ones(32)
    head = leaf(vocabulary, 16, dtype=dtype)
    linear_cross_entropy(leaf(32, 16, dtype=dtype), head, targets, weights, 1e-4).loss.backward()


CASES = cases("cross_entropy", _cross_entropy, (4096, 32768), ("bf16", "fp32"))
