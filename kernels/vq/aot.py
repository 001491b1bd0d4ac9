"""The nearest code's cases for ahead-of-time compilation."""

import torch

from onevocab.kernels.aot_cases import cases
from onevocab.kernels.vq import vq_assign


def _vq(dim: int, dtype: torch.dtype) -> None:
    vq_assign(torch.zeros(64, dim, dtype=dtype), torch.zeros(512, dim, dtype=dtype))


CASES = cases("vq", _vq, (16, 64, 256), ("fp32", "bf16"))
