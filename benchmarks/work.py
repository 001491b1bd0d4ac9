"""What a benchmark describes: presets, and the work that a preset builds. The harness measures them.

A benchmark module has PRESETS and a command, and is found by that (benchmarks/modules.py). A preset builds a `Work`:
inputs, providers that compute the same thing, its definition and its costs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import checkout  # noqa: F401  for what it does when imported

OURS = "ours"
LONG_TO_SHORT = {"both": "forward + backward", "fresh": "mask + forward", "fresh both": "mask + forward + backward"}


class Unavailable(Exception):
    """A provider cannot run here; the message says why."""


class Cost(NamedTuple):
    """What one call has to do at least: floating-point operations, bytes read and written once."""

    flops: int
    bytes: int


class Target(NamedTuple):
    """`quantity` of the best of `against` divided by ours must be at least (or ours by theirs at most: `at_most`).

    quantity is "time", "memory", "copy" (our bytes/s as a part of the copy bandwidth) or "mfu" (our FLOP/s as a part of
    what the GPU's data sheet says; Chowdhery et al. 2022, appendix B).
    """

    quantity: str
    step: str
    against: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None


@dataclass
class Work:
    """One workload. Calls take the tensors of `inputs()` and return a tensor or a tuple of tensors."""

    inputs: Callable[[], tuple[Tensor, ...]]
    providers: dict[str, Callable[[], Callable]]  # name -> what prepares (a mask, a cache) and returns the call
    definition: Callable  # the readable reference, for float64 inputs as well
    costs: dict[str, Cost]  # step -> cost; steps: forward, backward, both, fresh, fresh both, step
    differentiable: int = 0  # gradients of the first so many inputs
    compared: Callable = lambda outputs, inputs: outputs  # what of the outputs is compared
    notes: list[str] = field(default_factory=list)
    operations: tuple[str, ...] = ()  # of ours, for saying which backend ran
    # Of the largest value: an error of so many is allowed though the definition made none. For each value, or for all.
    roundings: float | tuple[float, ...] = 1
    whole: bool = False  # a network: errors relative to the value's norm, the worst of all values counts
    tokens: int | None = None  # of one call


def roundings_of_sum(terms: int) -> float:
    """What a sum of `terms` numbers, one after the other, may be off by, in machine epsilons of its value: sqrt(n) / 2.

    Higham and Mary 2019 (A New Approach to Probabilistic Rounding Error Analysis), with lambda = 1 and the sum's value
    instead of the sum of magnitudes, which is never smaller. Definitions add in pairs and so are no bound for it.
    """
    return max(1.0, math.sqrt(terms) / 2)


@dataclass
class Preset:
    """`build(shape, device, dtype)` makes the Work; shapes has "cpu", "cuda" and "tiny" (for tests). A dtype "auto" is
    what `train.py` would choose."""

    description: str
    build: Callable[[dict, torch.device, torch.dtype], Work]
    shapes: dict[str, dict]
    targets: dict[str, list[Target]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=lambda: {"cpu": "float32", "cuda": "bfloat16"})
    kernel: bool = True  # one operation: `benchmarks.gpu` checks it on both shapes, in every type, for bad addresses


def as_tuple(outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
