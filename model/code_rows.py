"""Rows of an embedding or head that are made from what their codes stand for.

A code's row is features(codebook vector) @ projection + a row of its own: codes that look or sound alike start alike,
and what is learned of one is learned of its neighbours. In the spirit of DAR (arXiv:2503.11129). A model in training
has these parts; `fold` adds them up, so that whoever uses the weights sees plain rows, and `CodeRows.take` takes plain
rows apart again without changing what the model computes.
"""

import math

import torch
from torch import Tensor, nn

PREFIX = "code_rows"  # the decoder's attribute; names in a checkpoint are PREFIX.<table>-<modality>.<part>
FREQUENCY = 2.0  # of the cosine features, for vectors of length 1


def features_of(vectors: Tensor, count: int, seed: int) -> Tensor:
    """Codebook vectors (K, d) -> (K, count) float32: the vectors at a mean length of 1, then random cosine features of
    them (Rahimi and Recht 2007), together of length 1 as well. With count < d the vectors alone, (K, d)."""
    vectors = vectors.detach().float().cpu()
    vectors = vectors / vectors.norm(dim=-1).mean().clamp(min=1e-6)
    waves = count - vectors.shape[1]
    if waves <= 0:
        return vectors
    generator = torch.Generator().manual_seed(seed)
    frequencies = FREQUENCY * torch.randn(vectors.shape[1], waves, generator=generator)
    phases = 2 * math.pi * torch.rand(waves, generator=generator)
    return torch.cat([vectors, (vectors @ frequencies + phases).cos() * (2 / waves) ** 0.5], 1)


class CodeRows(nn.Module):
    """What is added to the rows first .. first + K - 1 of a table (V, dim)."""

    def __init__(self, features: Tensor, dim: int, first: int):
        super().__init__()
        self.register_buffer("features", features)  # (K, F); kept with the weights, which are then complete
        self.register_buffer("first", torch.tensor(first))
        self.projection = nn.Parameter(torch.zeros(dim, features.shape[1]))
        self.start, self.stop = first, first + len(features)

    def forward(self) -> Tensor:
        """(K, dim)"""
        return self.features @ self.projection.T

    @torch.no_grad()
    def take(self, table: Tensor, fresh: bool) -> None:
        """Takes the rows of `table` (V, dim) apart, in place. fresh: they were never trained; the projection then gives
        rows of the same size and what is left of them is 0. Else the projection that fits them best explains as much of
        them as it can, and the sum stays the same."""
        rows = table[self.start : self.stop]
        if fresh:
            size = rows.std() / self.features.norm(dim=-1).mean()
            self.projection.copy_(torch.randn_like(self.projection) * size)
            rows.zero_()
        else:
            wide = torch.linalg.lstsq(self.features.double().cpu(), rows.double().cpu(), driver="gelsd").solution
            self.projection.copy_(wide.T)
            rows -= self()


def with_codes(table: Tensor, parts: list[CodeRows]) -> Tensor:
    """table (V, dim) with the rows of codes complete; parts do not overlap."""
    if not parts:
        return table
    pieces, done = [], 0
    for part in sorted(parts, key=lambda part: part.start):
        pieces += [table[done : part.start], table[part.start : part.stop] + part()]
        done = part.stop
    return torch.cat([*pieces, table[done:]])


def fold(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state of a decoder, by name, with plain rows: what `CodeRows` add is added, and their parts are gone."""
    plain = {name: value for name, value in tensors.items() if not name.startswith(f"{PREFIX}.")}
    for name, projection in tensors.items():
        if name.startswith(f"{PREFIX}.") and name.endswith(".projection"):
            part = name.removesuffix(".projection")
            table = f"{part.removeprefix(f'{PREFIX}.').partition('-')[0]}.weight"
            features, first = tensors[f"{part}.features"], int(tensors[f"{part}.first"])
            plain[table] = plain[table].clone()
            plain[table][first : first + len(features)] += features @ projection.T
    return plain
