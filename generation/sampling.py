"""From logits to one id per row: temperature, top-k, top-p, and seeds that make a row independent of
others."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from onevocab.common.errors import UserError

_BLOCK = 256


@dataclass(frozen=True)
class Sampling:
    """How the next id is chosen.

    temperature: 0 takes the likeliest id; 1 samples from the model as it is; a number for all, or one for each modality
    by its name, "text" for words and for the choice of what comes next (1 where it is not named). top_k: keep the k
    likeliest (0: all). top_p: keep the smallest set whose probability reaches p (nucleus sampling, Holtzman et al.
    2020; 1: all). seed: row i of a batch draws from a generator seeded with seed + i. guidance:
    classifier-free guidance (Ho and Salimans 2022) inside media: uncond + g * (cond - uncond); 1: none, at
    no cost; a number for all media, or one for each modality by its name. Raises UserError for
    impossible values.
    """

    temperature: float | Mapping[str, float] = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    guidance: float | Mapping[str, float] = 1.0

    def __post_init__(self):
        checks = (
            ("temperature", all(0.0 <= value < float("inf") for value in _values(self.temperature)), "0 or more"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("guidance", all(0.0 <= scale < float("inf") for scale in _values(self.guidance)), "0 or more (1: none)"),
            ("seed", 0 <= self.seed < 2**63, "0 or more"),
        )
        for name, good, wanted in checks:
            if not good:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {wanted}")

    @property
    def guided(self) -> bool:
        return any(scale != 1.0 for scale in _values(self.guidance))

    def guidance_of(self, modality: str) -> float:
        """The scale inside a span of this modality; words are not guided."""
        if modality == "text":
            return 1.0
        return self.guidance.get(modality, 1.0) if isinstance(self.guidance, Mapping) else self.guidance

    def temperature_of(self, modality: str) -> float:
        """The temperature of words ("text"), or inside a span of this modality."""
        return self.temperature.get(modality, 1.0) if isinstance(self.temperature, Mapping) else self.temperature


def _values(setting: float | Mapping[str, float]) -> list[float]:
    return list(setting.values()) if isinstance(setting, Mapping) else [setting]


def row_noise(seed: int, rows: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1), float64 (rows, at least count): number n of row i depends on seed + i
    and n only.

    Drawn beforehand, so that a step needs no loop over the rows' generators; on the CPU and in blocks of
    fixed size, so that neither the batch, nor the device, nor the length asked for changes what a row
    draws.
    """
    blocks = max(1, -(-count // _BLOCK))
    noise = torch.empty(rows, blocks * _BLOCK, dtype=torch.float64)
    for row in range(rows):
        generator = torch.Generator().manual_seed(seed + row)
        for block in range(blocks):
            part = noise[row, block * _BLOCK : (block + 1) * _BLOCK]
            part.copy_(torch.rand(_BLOCK, generator=generator, dtype=torch.float64))
    return noise


def probabilities(logits: Tensor, sampling: Sampling, modality: str = "text") -> Tensor:
    """Logits (rows, n) to float64 probabilities (rows, n) by the modality's temperature (not 0), top-k and top-p."""
    scaled = logits.double() / sampling.temperature_of(modality)
    if 0 < sampling.top_k < scaled.shape[-1]:
        values, places = scaled.topk(sampling.top_k, dim=-1)  # exactly k of them, ties or not
        scaled = torch.full_like(scaled, -torch.inf).scatter(-1, places, values)
    probs = scaled.softmax(-1)
    if sampling.top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # the mass of the likelier ones: the first is always kept
        kept = torch.where(before < sampling.top_p, ordered, 0.0)
        probs = torch.empty_like(probs).scatter(-1, order, kept)
    return probs


def sample_ids(logits: Tensor, noise: Tensor, sampling: Sampling, modality: str = "text") -> Tensor:
    """Places (rows,) in logits (rows, n): the greatest at temperature 0, else the distribution inverted
    at `noise`.

    noise: (rows,) in [0, 1), float64; modality: what the rows are inside of. A place of probability
    zero is never drawn: it is the first whose cumulated probability exceeds the draw.
    """
    if sampling.temperature_of(modality) == 0.0:
        return logits.argmax(-1)
    cumulated = probabilities(logits, sampling, modality).cumsum(-1)
    total = cumulated[:, -1]
    draw = torch.minimum(noise * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, draw[:, None], right=True)[:, 0]
