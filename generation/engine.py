"""The sampling loop: a batch of prompts in, legal ids out, one forward step of the model per id.

Rows of different lengths share a batch: each is prefilled into the cache at its own positions and goes on
from there. The loop asks the grammars only when they can change their mind: inside a picture all of its
codes are taken without leaving the device. Only the legal rows of the head are computed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onevocab.generation.sampling import Sampling, row_noise, sample_ids
from onevocab.kernels.attention import IntervalMask
from onevocab.model.cache import KVCache
from onevocab.tokenizers.grammar import Grammar


@dataclass
class Request:
    """prompt: int ids (n,); grammar: what may follow it; seed_row: added to the seed of the sampling.

    unconditional: the prompt without what it asks for, ids (m,), needed for guidance; None: not guided.
    """

    prompt: np.ndarray
    grammar: Grammar
    seed_row: int = 0
    unconditional: np.ndarray | None = None


class _Batch:
    """The rows that still speak: caches, positions and draws. Guided rows come twice: [asked..., not
    asked...]."""

    def __init__(self, model, requests: Sequence[Request], sampling: Sampling):
        self.model, self.sampling, self.requests = model, sampling, list(requests)
        self.names = list(range(len(requests)))  # of each row: its place among the requests
        self.guided = sampling.guided and all(r.unconditional is not None for r in requests)
        self.device = model.head_weight.device
        noise = [row_noise(sampling.seed + r.seed_row, 1, r.grammar.left + 1) for r in requests]
        longest = max(part.shape[1] for part in noise)
        padded = [torch.nn.functional.pad(part, (0, longest - part.shape[1])) for part in noise]
        self.noise = torch.cat(padded).to(self.device)
        self.taken = torch.zeros(len(requests), dtype=torch.long, device=self.device)

    def prefill(self, prefixes: list[list[int]]) -> Tensor:
        """Runs the prompts, each followed by its already certain ids. Returns the last hidden states
        (rows, dim)."""
        starts = [r.prompt for r in self.requests]
        if self.guided:
            starts += [r.unconditional for r in self.requests]
        times = 1 + self.guided
        prompts = [np.concatenate(pair) for pair in zip(starts, prefixes * times, strict=True)]
        self.taken += torch.tensor([len(prefix) for prefix in prefixes], device=self.device)
        self.filled = [len(prompt) for prompt in prompts]
        lengths = torch.tensor(self.filled, device=self.device)
        room = max(len(p) + r.grammar.left for p, r in zip(prompts, self.requests * times, strict=True))
        ids = torch.zeros(len(prompts), max(self.filled), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.from_numpy(prompt.astype(np.int64))
        positions = torch.arange(ids.shape[1], device=self.device).expand_as(ids)
        # Padding stands on the right and is not stored.
        positions = torch.where(positions < lengths[:, None], positions, -1)
        weight = self.model.head_weight
        self.cache = KVCache(self.model.config, len(prompts), room, weight.dtype, self.device)
        mask = IntervalMask.up_to(positions)
        hidden = self.model(ids.to(self.device), positions, mask, self.cache, max(self.filled))
        self.positions = lengths
        return hidden[torch.arange(len(prompts), device=self.device), lengths - 1]

    def step(self, ids: Tensor) -> Tensor:
        """Runs one id (rows,) of every row. Returns hidden states (rows, dim), twice as many rows when
        guided."""
        if self.guided:
            ids = torch.cat([ids, ids])
        positions = self.positions[:, None]
        self.filled = [filled + 1 for filled in self.filled]
        hidden = self.model(ids[:, None], positions, IntervalMask.up_to(positions), self.cache, max(self.filled))
        self.positions = self.positions + 1
        return hidden[:, 0]

    def groups(self) -> list[tuple[Tensor | None, tuple[range, ...], Tensor | None, str]]:
        """Rows by what is legal: (rows or None for all, ranges, ids of the logits or None for one slice,
        modality)."""
        by_legal: dict[tuple, list[int]] = {}
        for row, request in enumerate(self.requests):
            grammar = request.grammar
            by_legal.setdefault((grammar.legal, grammar.modality), []).append(row)
        groups = []
        for (legal, modality), rows in by_legal.items():
            ids = None
            if len(legal) > 1:
                ids = torch.cat([torch.arange(part.start, part.stop, device=self.device) for part in legal])
            where = None if len(by_legal) == 1 else torch.tensor(rows, device=self.device)
            groups.append((where, legal, ids, modality))
        return groups

    def next_ids(self, hidden: Tensor, groups) -> Tensor:
        """Hidden states (rows or twice as many, dim) -> the next id of every row, int64 (rows,)."""
        count = len(self.requests)
        noise = self.noise.gather(1, self.taken[:, None])[:, 0]
        self.taken = self.taken + 1
        chosen = torch.empty(count, dtype=torch.long, device=self.device)
        for where, legal, ids, modality in groups:
            rows = slice(0, count) if where is None else where
            logits = self._logits(hidden[:count][rows], legal)
            guidance = self.sampling.guidance_of(modality) if self.guided else 1.0
            if guidance != 1.0:
                without = self._logits(hidden[count:][rows], legal)
                logits = without + guidance * (logits - without)
            places = sample_ids(logits, noise[rows], self.sampling, modality)
            chosen[rows] = places + legal[0].start if ids is None else ids[places]
        return chosen

    def _logits(self, hidden: Tensor, legal: tuple[range, ...]) -> Tensor:
        parts = [self.model.logits(hidden, part.start, part.stop) for part in legal]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).float()

    def keep(self, rows: list[int]) -> None:
        """Drops all other rows."""
        kept = rows + [row + len(self.requests) for row in rows] if self.guided else rows
        index, both = (torch.tensor(each, device=self.device) for each in (rows, kept))
        self.cache = self.cache.select(both)
        self.positions = self.positions[both]
        self.filled = [self.filled[row] for row in kept]
        self.noise, self.taken = self.noise[index], self.taken[index]
        self.requests = [self.requests[row] for row in rows]
        self.names = [self.names[row] for row in rows]


@torch.inference_mode()
def stream(model, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[tuple[int, list[int]]]]:
    """Yields, as they come, [(place of the request, its next ids), ...] until every grammar is done.

    The end of a turn is yielded like any other id. What a row gets depends on its prompt, its seed and
    its seed_row, not on its neighbours (up to rounding: a matrix product of another batch size differs by
    about 1e-5).
    """
    batch = _Batch(model, requests, sampling)
    prefixes = []
    for request in requests:  # what is certain from the start (a picture's begin and size) joins the prompt
        prefixes.append([])
        while request.grammar.forced is not None:
            prefixes[-1].append(request.grammar.forced)
            request.grammar.accept(request.grammar.forced)
    if any(prefixes):
        yield [(row, prefix) for row, prefix in enumerate(prefixes) if prefix]
    hidden = batch.prefill(prefixes)
    while True:
        run = min(request.grammar.run for request in batch.requests)
        groups, taken = batch.groups(), []
        for step in range(run):
            if step:
                hidden = batch.step(taken[-1])
            taken.append(batch.next_ids(hidden, groups))
        new = torch.stack(taken, 1).tolist()
        for request, ids in zip(batch.requests, new, strict=True):
            for id in ids:
                request.grammar.accept(id)
            if request.grammar.last is not None:
                ids.append(request.grammar.last)
                request.grammar.accept(ids[-1])
        yield list(zip(batch.names, new, strict=True))
        alive = [row for row, request in enumerate(batch.requests) if not request.grammar.done]
        if not alive:
            return
        ids = taken[-1]
        if len(alive) < len(batch.requests):
            ids = ids[torch.tensor(alive, device=ids.device)]
            batch.keep(alive)
        hidden = batch.step(ids)


def generate(model, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
    """All ids of every reply."""
    replies = [[] for _ in requests]
    for new in stream(model, requests, sampling):
        for row, ids in new:
            replies[row] += ids
    return replies
