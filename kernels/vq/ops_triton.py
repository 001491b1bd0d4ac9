"""The GPU's `vq_assign`: launches the kernel of `kernels_triton`, and registers it with torch."""

import torch
import triton
from torch import Tensor

from onevocab.kernels import tuning
from onevocab.kernels.backend import on_device
from onevocab.kernels.vq.configs import TABLE
from onevocab.kernels.vq.kernels_triton import nearest


@torch.library.custom_op("onevocab::vq_assign", mutates_args=())
@on_device
def vq_assign(latents: Tensor, codebook: Tensor) -> Tensor:
    latents, codebook = (x.float().contiguous() for x in (latents, codebook))
    (n, dim), n_codes = latents.shape, len(codebook)
    out = latents.new_empty(n, dtype=torch.int64)
    half_square = codebook.square().sum(-1).mul_(0.5)
    config = tuning.config(TABLE, "vq_assign", dim, latents.dtype, latents.device)
    nearest[(triton.cdiv(n, config["BLOCK_N"]),)](
        latents, codebook, half_square, out, n, n_codes,
        DIM=dim, **config,
    )  # fmt: skip
    return out


@vq_assign.register_fake
def _(latents, codebook):
    return latents.new_empty(latents.shape[0], dtype=torch.int64)
