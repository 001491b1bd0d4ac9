"""Finite scalar quantization."""

from math import prod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from onevocab.tokenizers.quantizers.base import Quantizer, QuantizerConfig


class FSQConfig(QuantizerConfig):
    """quantizer = { kind = "fsq", ... }"""

    kind: Literal["fsq"] = "fsq"
    levels: tuple[int, ...] = Field((8, 8, 8, 2), description="number of levels of each dimension; their product is "
                                    "the codebook's size")


class FiniteScalarQuantizer(Quantizer):
    """FSQ (Mentzer et al. 2023): each of a few dimensions is bounded and rounded to its own number of levels; the
    codebook is their product, so nothing can collapse. The first dimension is the lowest digit of a code."""

    Config = FSQConfig

    def __init__(self, config: FSQConfig):
        super().__init__()
        levels = config.levels
        self.dim, self.codebook_size = len(levels), prod(levels)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.cumprod(torch.tensor((1, *levels[:-1])), 0), persistent=False)

    def _bound(self, z: Tensor, eps: float = 1e-3) -> Tensor:
        half = (self.levels - 1) * (1 + eps) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        shift = torch.atanh(offset / half)
        return torch.tanh(z + shift) * half - offset

    def encode(self, z: Tensor) -> Tensor:
        digits = self._bound(z).round().long() + self.levels // 2
        return (digits * self.basis).sum(-1, keepdim=True)

    def decode(self, codes: Tensor) -> Tensor:
        digits = codes // self.basis % self.levels
        half = self.levels // 2
        return (digits - half).float() / half

    def bypass(self, z: Tensor) -> Tensor:
        return self._bound(z) / (self.levels // 2)

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bounded = self._bound(z)
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / (self.levels // 2), self.encode(z), z.new_zeros(())
