"""The keys and values of what a model has read so far."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # at run time any object with its fields does: benchmarks run without pydantic
    from onevocab.model.config import ModelConfig


class KVCache:
    """Preallocated: keys and values per layer (B, max_length, Hkv, D). Slot = position: rows may differ in length.

    `lengths` (B,) int64 counts the filled slots of each row: one more than the highest position written. Cutting
    it back by hand forgets the end of a row; `select` reorders, repeats or drops rows.
    """

    def __init__(self, config: ModelConfig, batch: int, max_length: int, dtype=torch.float32, device="cpu"):
        # One slot before the first takes what is padding: which positions are none need not be known on the host.
        shape = (batch, max_length + 1, config.kv_heads, config.head_dim)
        stored = [[torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)] for _ in range(2)]
        self._hold(max_length, *stored, torch.zeros(batch, dtype=torch.long, device=device))

    def _hold(self, max_length: int, keys: list[Tensor], values: list[Tensor], lengths: Tensor) -> None:
        self.max_length, self.lengths = max_length, lengths
        self._keys, self._values = keys, values
        self.keys, self.values = ([x[:, 1:] for x in stored] for stored in (keys, values))
        self._rows = torch.arange(len(lengths), device=lengths.device)[:, None]

    def advance(self, positions: Tensor, filled: int | None = None) -> tuple[Tensor, int]:
        """Once per forward, with positions (B, S), negative = padding, not stored: where each layer writes, and how
        many slots it gives out: all that the longest row has filled, or in a GPU's step of one position a row all that
        there are, so that shapes stay the same and a CUDA graph can hold the step.

        filled: how many slots the longest row then has, where the caller knows it. On a GPU it is believed, and without
        it the host waits for the device; on a CPU it is counted. Raises ValueError past max_length, before anything is
        written.
        """
        reached = positions.amax(1).long() + 1
        on_cpu = positions.device.type == "cpu"
        if filled is None or on_cpu:
            filled = int(torch.maximum(self.lengths, reached).max())
        if filled > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} positions, {filled} are needed")
        self.lengths.clamp_(min=reached)
        steady = positions.shape[1] == 1 and not on_cpu
        return positions.long().clamp(min=-1) + 1, self.max_length if steady else filled

    def write(self, layer: int, where: Tensor, keys: Tensor, values: Tensor, n_keys: int) -> tuple[Tensor, Tensor]:
        """Stores keys and values (B, S, Hkv, D) and returns all of the layer's, (B, n_keys, Hkv, D) each."""
        self._keys[layer][self._rows, where] = keys
        self._values[layer][self._rows, where] = values
        return self.keys[layer][:, :n_keys], self.values[layer][:, :n_keys]

    def select(self, rows: Tensor) -> KVCache:
        """A new cache that holds these rows (integer indices), in this order."""
        other = object.__new__(KVCache)
        keys, values = ([x[rows] for x in stored] for stored in (self._keys, self._values))
        other._hold(self.max_length, keys, values, self.lengths[rows])
        return other
