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
        shape = (batch, max_length, config.kv_heads, config.head_dim)
        self.max_length = max_length
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)

    def advance(self, positions: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
        """Once per forward, with positions (B, S), negative = padding, not stored: where each layer writes, and
        how many slots the longest row has filled. Raises ValueError past max_length."""
        rows, columns = (positions >= 0).nonzero(as_tuple=True)
        slots = positions[rows, columns].long()
        self.lengths = torch.maximum(self.lengths, positions.amax(1).long() + 1)
        n_keys = int(self.lengths.max())
        if n_keys > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} positions, {n_keys} are needed")
        return (rows, columns, slots), n_keys

    def write(self, layer: int, where, keys: Tensor, values: Tensor, n_keys: int) -> tuple[Tensor, Tensor]:
        """Stores keys and values (B, S, Hkv, D) and returns all of the layer's, (B, n_keys, Hkv, D) each."""
        rows, columns, slots = where
        self.keys[layer][rows, slots] = keys[rows, columns]
        self.values[layer][rows, slots] = values[rows, columns]
        return self.keys[layer][:, :n_keys], self.values[layer][:, :n_keys]

    def select(self, rows: Tensor) -> KVCache:
        """A new cache that holds these rows (integer indices), in this order."""
        other = object.__new__(KVCache)
        other.max_length = self.max_length
        other.keys = [x[rows] for x in self.keys]
        other.values = [x[rows] for x in self.values]
        other.lengths = self.lengths[rows]
        return other
