"""A learned codebook."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from onevocab.kernels.vq import vq_assign
from onevocab.tokenizers.quantizers.base import Quantizer, QuantizerConfig, from_first_rank, sum_over_ranks


class VQConfig(QuantizerConfig):
    """quantizer = { kind = "vq", ... }, the kind where none is given"""

    kind: Literal["vq"] = "vq"
    codebook_size: int = Field(1024, ge=2, le=1 << 20, description="number of codes")
    dim: int = Field(16, ge=1, le=256, description="dimension of a code's vector")
    decay: float = Field(0.99, gt=0, lt=1, description="of the moving averages from which the codebook is made")
    commitment: float = Field(0.25, ge=0, description="weight of the loss that draws latents to their codes")
    restart_below: float = Field(0.1, ge=0, description="a code that is used less often in a batch, on average, "
                                 "is started anew")


class VectorQuantizer(Quantizer):
    """VQ-VAE codebook (van den Oord et al. 2017) learned by moving averages (Razavi et al. 2019), on the unit sphere
    in few dimensions (Yu et al. 2022, ViT-VQGAN), started by k-means, dead codes restarted (Lancucki et al. 2020).

    Under torch.distributed all ranks hold the same codebook: statistics are summed, draws come from rank 0.
    """

    Config = VQConfig

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config, self.codebook_size, self.dim = config, config.codebook_size, config.dim
        start = F.normalize(torch.randn(config.codebook_size, config.dim), dim=-1)
        self.register_buffer("codebook", start)
        self.register_buffer("sums", start.clone())
        self.register_buffer("uses", torch.ones(config.codebook_size))

    def encode(self, z: Tensor) -> Tensor:
        """The code nearest by angle."""
        z = F.normalize(z, dim=-1)
        return vq_assign(z.reshape(-1, self.dim), self.codebook).reshape(*z.shape[:-1], 1)

    def decode(self, codes: Tensor) -> Tensor:
        return self.codebook[codes[..., 0]]

    def bypass(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1)

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
        self.uses.lerp_(sum_over_ranks(uses), 1 - self.config.decay)
        self.sums.lerp_(sum_over_ranks(sums), 1 - self.config.decay)
        self.codebook.copy_(F.normalize(self.sums, dim=-1))
        dead = self.uses < self.config.restart_below
        # Drawn on every rank, dead or not, so that all ranks take part in the broadcast.
        fresh = from_first_rank(z[torch.randint(len(z), (self.codebook_size,), device=z.device)])
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
        self.codebook.copy_(from_first_rank(centres))
        self.sums.copy_(centres)
        self.uses.fill_(1.0)
