"""Cases of attention over a cache for ahead-of-time compilation."""

import contextlib

import torch

from onevocab.kernels import tuning
from onevocab.kernels.aot_cases import cases
from onevocab.kernels.decode import decode_attention


def _decode(dim: int, dtype: torch.dtype, page: int, parts: int | None = None) -> None:
    """page: slots of a page, 0: a dense cache; parts: into how many the keys are cut; on CPU tensors the launcher
    itself would cut little."""
    pages = -(-1024 // page) if page else 1
    keys = torch.zeros(2 * pages, 2, page or 1024, dim, dtype=dtype)
    table = torch.arange(2 * pages, dtype=torch.int32).view(2, pages) if page else None
    lengths = torch.full((2,), 1024, dtype=torch.int32)
    with tuning.forced(decode_attention={"PARTS": parts}) if parts else contextlib.nullcontext():
        decode_attention(torch.zeros(2, 8, 1, dim, dtype=dtype), keys, keys, lengths, table)


CASES = (
    cases("decode", _decode, (64, 128, 256), ("bf16",), plain=(0,), paged=(16,))
    # A page that holds tiles; one that tiles cross; and as a GPU would cut a long context.
    | cases("decode", _decode, (128,), ("bf16",), pages64=(64,), pages20=(20,), parts=(0, 64))
    | cases("decode", _decode, (128, 256), ("fp32",), plain=(0,))
)
