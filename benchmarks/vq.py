"""Nearest code of each latent: ours beside torch.cdist, a plain matmul, and torch.compile.

    python -m benchmarks.vq --out vq.json

Two codes can be equally near within rounding, so what is compared is not the index but its distance, in float64:
it may be longer by the rounding of the two scores that were compared.
"""

import functools

import torch
from torch import Tensor

from benchmarks import command
from benchmarks.work import OURS, Cost, Preset, Target, Work, roundings_of_sum
from onevocab.kernels.vq import vq_assign

CDIST, MATMUL, COMPILED = "torch.cdist, argmin", "matmul, argmin", "torch.compile of matmul, argmin"


def by_cdist(latents: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(latents, codebook).argmin(-1)


def by_matmul(latents: Tensor, codebook: Tensor) -> Tensor:
    return (codebook.square().sum(-1) - 2 * latents @ codebook.t()).argmin(-1)


@functools.cache
def compiled():
    return torch.compile(by_matmul, dynamic=False)


def in_pieces(latents: Tensor, codebook: Tensor) -> Tensor:
    """The definition, in the precision of its inputs: differences, squared and added up."""
    rows = max(1, (1 << 24) // codebook.numel())
    return torch.cat([(x[:, None] - codebook).square().sum(-1).argmin(-1) for x in latents.split(rows)])


def distances(codes: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """Squared distance to the chosen code, in float64."""
    latents, codebook = (x.double() for x in inputs)
    return (latents - codebook[codes]).square().sum(-1)


def build(shape: dict, device: torch.device, dtype: torch.dtype) -> Work:
    n, dim, codes = shape["latents"], shape["dim"], shape["codes"]

    def inputs():
        return tuple(torch.nn.functional.normalize(torch.randn(m, dim, device=device), dim=-1).to(dtype)
                     for m in (n, codes))

    providers = {OURS: lambda: vq_assign, CDIST: lambda: by_cdist, MATMUL: lambda: by_matmul,
                 COMPILED: lambda: compiled()}
    cost = Cost(2 * n * dim * codes, (n + codes) * dim * dtype.itemsize + 8 * n)
    # Rows have length 1: a score |c|^2 - 2 z.c is off by three sums' errors, and two scores are compared.
    return Work(inputs, providers, in_pieces, {"forward": cost}, compared=distances,
                operations=("vq_assign",), roundings=2 * 3 * roundings_of_sum(dim))


CPU = {"latents": 16384, "dim": 16, "codes": 4096}
GPU = {"latents": 131072, "dim": 16, "codes": 16384}
TARGETS = {"cuda": [Target("time", "forward", (CDIST,), at_least=2.0)]}
FLOAT32 = {"cpu": "float32", "cuda": "float32"}
PRESETS = {
    "small": Preset("latents of low dimension, as our tokenizers have", build,
                    {"cpu": CPU, "cuda": GPU, "tiny": {"latents": 50, "dim": 8, "codes": 33}}, TARGETS, FLOAT32),
    "wide": Preset("latents of dimension 64", build,
                   {"cpu": CPU | {"dim": 64}, "cuda": GPU | {"dim": 64},
                    "tiny": {"latents": 50, "dim": 40, "codes": 33}}, TARGETS, FLOAT32),
}

main = command.main("vq", __doc__, PRESETS)

if __name__ == "__main__":
    main()
