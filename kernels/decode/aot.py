"""Cases of attention over a cache for ahead-of-time compilation."""

import contextlib

import torch

from onevocab.kernels import tuning
from onevocab.kernels.aot_cases import cases
from onevocab.kernels.decode import decode_attention


def _decode(dim: int, dtype: torch.dtype, paged: bool, parts: int | None = None) -> None:
    """parts: into how many the keys are cut; on CPU tensors the launcher itself would cut little."""
    keys = torch.zeros(2 * 64, 2, 16, dim, dtype=dtype) if paged else torch.zeros(2, 2, 1024, dim, dtype=dtype)
    table = torch.arange(128, dtype=torch.int32).view(2, 64) if paged else None
    lengths = torch.full((2,), 1024, dtype=torch.int32)
    with tuning.forced(decode_attention={"PARTS": parts}) if parts else contextlib.nullcontext():
        decode_attention(torch.zeros(2, 8, 1, dim, dtype=dtype), keys, keys, lengths, table)


CASES = (
    cases("decode", _decode, (64, 128, 256), ("bf16",), plain=(False,), paged=(True,))
    | cases("decode", _decode, (128,), ("bf16",), parts=(False, 64))  # as a GPU would cut a long context
    | cases("decode", _decode, (128, 256), ("fp32",), plain=(False,))
)
