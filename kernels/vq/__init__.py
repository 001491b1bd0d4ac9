"""The codebook entry nearest to each latent: distances and their minimum in one, so that they are never all stored."""

import torch
from torch import Tensor

from onevocab.kernels.backend import select_backend, unsupported_type
from onevocab.kernels.vq.reference import vq_assign_reference
from onevocab.kernels.vq.torch_form import CHUNK, vq_assign_torch

__all__ = ["vq_assign", "vq_assign_reference"]


def vq_assign(latents: Tensor, codebook: Tensor, backend: str | None = None) -> Tensor:
    """Like the reference, in float32 or better; for unit vectors nearest is also nearest by angle. No gradient.

    Compared is x . c - |c|^2 / 2, which orders codes as the distance does: two codes whose distances differ by less
    than its rounding may be exchanged. Raises ValueError when shapes, dtypes or devices do not fit.
    """
    fits = latents.dim() == codebook.dim() == 2 and latents.shape[1] == codebook.shape[1]
    if not fits or 0 in (*latents.shape, *codebook.shape):
        shapes = f"{tuple(latents.shape)}, {tuple(codebook.shape)}"
        raise ValueError(f"vq_assign: latents, codebook {shapes} do not fit (N, d), (K, d), none of them empty")
    if not (latents.is_floating_point() and codebook.is_floating_point()):
        raise ValueError(f"vq_assign: latents {latents.dtype}, codebook {codebook.dtype}; takes floating-point tensors")
    wide = f"vectors have at most 256 numbers, not {latents.shape[1]}" if latents.shape[1] > 256 else None
    odd = wide or unsupported_type(latents, codebook)
    chosen = select_backend("vq_assign", latents, codebook, backend=backend, unsupported=odd)
    with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
        if chosen == "triton":
            from onevocab.kernels.vq import ops_triton

            return ops_triton.vq_assign(latents, codebook)
        kind = torch.promote_types(torch.promote_types(latents.dtype, codebook.dtype), torch.float32)
        codebook = codebook.to(kind)
        rows = max(1, CHUNK // len(codebook)) if latents.device.type == "cpu" else max(1, 16 * CHUNK // len(codebook))
        if chosen == "reference":
            rows = max(1, rows // latents.shape[1])
            return torch.cat([vq_assign_reference(x.to(kind), codebook) for x in latents.split(rows)])
        return vq_assign_torch(latents, codebook, rows)
