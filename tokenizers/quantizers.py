"""Vectors to codes and back, behind one small interface.

`quantize(z) -> (quantized z, codes, loss)` in training, `bypass(z)` the same without rounding (before
`init_codebook(z)`), `encode(z) -> codes`, `decode(codes) -> vectors`, `codebook_size`.
Latents are (..., dim); codes are (...) int64.
"""

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from onevocab.kernels.vq import vq_assign


class QuantizerConfig(BaseModel):
    """kind: "vq" or "fsq"; codebook_size, dim: entries and their dimension (vq); levels: per dimension (fsq)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["vq", "fsq"] = "vq"
    codebook_size: int = Field(default=1024, ge=2, le=1 << 20)
    dim: int = Field(default=16, ge=1, le=256)
    decay: float = Field(default=0.99, gt=0, lt=1)
    commitment: float = Field(default=0.25, ge=0)
    restart_below: float = Field(default=0.1, ge=0, description="mean uses a batch under which a code is restarted")
    levels: tuple[int, ...] = (8, 8, 8, 2)


def build_quantizer(config: QuantizerConfig) -> nn.Module:
    return VectorQuantizer(config) if config.kind == "vq" else FiniteScalarQuantizer(config.levels)


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class VectorQuantizer(nn.Module):
    """VQ-VAE codebook (van den Oord et al. 2017) learned by moving averages (Razavi et al. 2019), on the unit sphere
    in few dimensions (Yu et al. 2022, ViT-VQGAN), started by k-means, dead codes restarted (Lancucki et al. 2020).

    Under torch.distributed all ranks hold the same codebook: statistics are summed, draws come from rank 0.
    """

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.config, self.codebook_size, self.dim = config, config.codebook_size, config.dim
        start = F.normalize(torch.randn(config.codebook_size, config.dim), dim=-1)
        self.register_buffer("codebook", start)
        self.register_buffer("sums", start.clone())
        self.register_buffer("uses", torch.ones(config.codebook_size))

    def encode(self, z: Tensor) -> Tensor:
        """(..., dim) -> (...) index of the code nearest by angle."""
        return vq_assign(F.normalize(z, dim=-1).reshape(-1, self.dim), self.codebook).reshape(z.shape[:-1])

    def decode(self, codes: Tensor) -> Tensor:
        """(...) -> (..., dim)"""
        return self.codebook[codes]

    def bypass(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1)

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Straight-through in the backward pass; in training also moves the codebook."""
        z = F.normalize(z, dim=-1)
        codes = self.encode(z.detach())
        nearest = self.decode(codes)
        loss = self.config.commitment * (z - nearest).square().sum(-1).mean()
        if self.training:
            self._update(z.detach().reshape(-1, self.dim), codes.reshape(-1))
        return z + (nearest - z).detach(), codes, loss

    @torch.no_grad()
    def _update(self, z: Tensor, codes: Tensor) -> None:
        uses = torch.bincount(codes, minlength=self.codebook_size).to(z.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, codes, z)
        if _world() > 1:
            dist.all_reduce(uses)
            dist.all_reduce(sums)
        self.uses.lerp_(uses, 1 - self.config.decay)
        self.sums.lerp_(sums, 1 - self.config.decay)
        self.codebook.copy_(F.normalize(self.sums, dim=-1))
        dead = self.uses < self.config.restart_below
        # Drawn on every rank, dead or not, so that all ranks take part in the broadcast.
        fresh = z[torch.randint(len(z), (self.codebook_size,), device=z.device)]
        if _world() > 1:
            dist.broadcast(fresh, 0)
        self.codebook[dead] = fresh[dead]
        self.sums[dead] = fresh[dead]
        self.uses[dead] = 1.0

    @torch.no_grad()
    def init_codebook(self, z: Tensor, iterations: int = 10) -> None:
        """Spherical k-means on latents (n, dim): the codebook begins where the data is."""
        z = F.normalize(z.reshape(-1, self.dim), dim=-1)
        centres = z[torch.randint(len(z), (self.codebook_size,))]
        for _ in range(iterations):
            nearest = vq_assign(z, centres)
            sums = torch.zeros_like(centres).index_add_(0, nearest, z)
            empty = torch.bincount(nearest, minlength=self.codebook_size) == 0
            sums[empty] = z[torch.randint(len(z), (int(empty.sum()),))]
            centres = F.normalize(sums, dim=-1)
        if _world() > 1:
            dist.broadcast(centres, 0)
        self.codebook.copy_(centres)
        self.sums.copy_(centres)
        self.uses.fill_(1.0)


class FiniteScalarQuantizer(nn.Module):
    """FSQ (Mentzer et al. 2023): each of a few dimensions is bounded and rounded to its own number of levels; the
    codebook is their product, so nothing can collapse. The first dimension is the lowest digit of a code."""

    def __init__(self, levels: tuple[int, ...]):
        super().__init__()
        self.levels_tuple, self.dim = tuple(levels), len(levels)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.cumprod(torch.tensor((1, *levels[:-1])), 0), persistent=False)
        self.codebook_size = int(torch.tensor(levels).prod())

    def _bound(self, z: Tensor, eps: float = 1e-3) -> Tensor:
        half = (self.levels - 1) * (1 + eps) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        shift = torch.atanh(offset / half)
        return torch.tanh(z + shift) * half - offset

    def encode(self, z: Tensor) -> Tensor:
        digits = self._bound(z).round().long() + self.levels // 2
        return (digits * self.basis).sum(-1)

    def decode(self, codes: Tensor) -> Tensor:
        digits = codes[..., None] // self.basis % self.levels
        half = self.levels // 2
        return (digits - half).float() / half

    def bypass(self, z: Tensor) -> Tensor:
        return self._bound(z) / (self.levels // 2)

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bounded = self._bound(z)
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / (self.levels // 2), self.encode(z), z.new_zeros(())

    def init_codebook(self, z: Tensor) -> None:
        """Nothing to start: the codebook is fixed."""
