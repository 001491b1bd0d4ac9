"""What every quantizer does: vectors to codes and back.

Shapes: latents z are float (..., dim); codes are int64 (..., codes_per_place), each 0 .. codebook_size - 1. The last
axis of codes is always there, of length 1 where one code says it all. A quantizer with several codes a place (residual
or product quantization) uses the same numbers for each of them: which one is meant follows from its position. In a
grid of codes those of one place stand side by side.
"""

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn


class QuantizerConfig(BaseModel):
    """What the configs of all kinds share; each adds `kind: Literal["its name"] = "its name"` and its settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: str


class Quantizer(nn.Module):
    """Built from its config, `Config`; sets `dim` and `codebook_size`.

    Codebooks are buffers, not parameters: DDP waits for the gradients of all parameters, and `bypass` uses no codebook.
    Under torch.distributed all ranks hold the same ones, see `sum_over_ranks` and `from_first_rank`.
    """

    Config: type[QuantizerConfig]
    dim: int
    codebook_size: int
    codes_per_place: int = 1

    def encode(self, z: Tensor) -> Tensor:
        """z (..., dim) -> codes (..., codes_per_place)"""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """codes (..., codes_per_place) -> vectors (..., dim)"""
        raise NotImplementedError

    def vectors(self) -> Tensor | None:
        """What each code stands for, (codebook_size, dim); None where that depends on its position."""
        if self.codes_per_place > 1:
            return None
        return self.decode(torch.arange(self.codebook_size, device=next(self.buffers()).device)[:, None])

    def bypass(self, z: Tensor) -> Tensor:
        """z (..., dim) -> what `quantize` gives, (..., dim), but not rounded: for training before the codebook is."""
        raise NotImplementedError

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (..., dim) -> (quantized (..., dim), codes (..., codes_per_place), loss ()). Gradients go straight through
        to z; in training mode the codebook may move."""
        raise NotImplementedError

    def init_codebook(self, z: Tensor) -> None:
        """Starts the codebook from latents (n, dim). Nothing to do where it is fixed."""


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """In place; returns the tensor."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_first_rank(tensor: Tensor) -> Tensor:
    """Rank 0's values, in place, on every rank; returns the tensor. All ranks must call it."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(tensor, 0)
    return tensor
