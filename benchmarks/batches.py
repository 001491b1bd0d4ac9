"""Batches for whole training steps: packed rows, and the same documents one a row.

A batch is a dict of tensors: ids, targets, positions, document (-1 is padding) and weights, all (B, S), and mask_4d
(B, 1, S, S), True where a query sees a key; of the padded ones attention_mask (B, S) in its place.
"""

import itertools

import numpy as np
import torch
from torch import Tensor

from onevocab.data.packing import pack
from onevocab.kernels.attention import IntervalMask

Batch = dict[str, Tensor]


def finished(batch: Batch, shape: dict, generator: torch.Generator) -> Batch:
    """With random ids, and the dense mask that peers get."""
    ids = torch.randint(shape["vocabulary"], batch["document"].shape, generator=generator)
    itself = torch.eye(shape["length"], dtype=torch.bool)  # what a padding query sees: peers have no empty rows
    dense = IntervalMask.causal(batch["document"]).dense(shape["length"]) | itself
    return {"ids": ids, "targets": ids.roll(-1, 1), **batch, "mask_4d": dense}


def empty(shape: dict) -> Batch:
    rows, length = shape["rows"], shape["length"]
    return {"positions": torch.zeros(rows, length, dtype=torch.long), "document": torch.full((rows, length), -1),
            "weights": torch.zeros(rows, length)}


def put(batch: Batch, row: int, start: int, number: int, weights: Tensor) -> None:
    """Document `number` of a row; weights (n,) of its tokens as inputs. The last one predicts nothing."""
    part = row, slice(start, start + len(weights))
    batch["document"][part] = number
    batch["positions"][part] = torch.arange(len(weights))
    batch["weights"][part] = weights
    batch["weights"][row, start + len(weights) - 1] = 0.0


def uniform_batches(n: int, shape: dict, generator: torch.Generator) -> list[Batch]:
    """Documents of `shortest` .. `longest` tokens packed into rows; of each the last `counted` percent count in the
    loss: 100 when everything is learnt, less when a document begins with a prompt."""
    batches = []
    for _ in range(n):
        batch = empty(shape)
        for row in range(shape["rows"]):
            start = 0
            for number in itertools.count():
                length = int(torch.randint(shape["shortest"], shape["longest"] + 1, (), generator=generator))
                if start + length > shape["length"]:
                    break
                weights = torch.ones(length)
                weights[: round((1 - shape["counted"] / 100) * length)] = 0.0
                put(batch, row, start, number, weights)
                start += length
        batches.append(finished(batch, shape, generator))
    return batches


def mixed_document(longest: int, generator: torch.Generator) -> Tensor:
    """The weights of one document's tokens; their number is its length, at most `longest`.

    Of ten documents three are text of 20 .. 250 tokens (short ones more often: uniform in the logarithm), four a
    picture of 64 codes and 4 ids around them with a caption of 6 .. 36, three a sound of 60 .. 120 ids with a
    transcript of 5 .. 25. These are the lengths that a run of configs/demo.toml packs: 71 .. 104 tokens with a picture
    (103 .. 224 with questions about it), sounds up to 72, here up to the length of a longer sentence. In one half of
    the pairs the text comes first and the medium is predicted; in the other the medium is only looked at: weight 0.
    """
    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    kind = between(0, 9)
    if kind < 3:
        span = torch.rand((), generator=generator).item()
        return torch.ones(min(longest, round(20 * (250 / 20) ** span)))
    span, text = (68, between(6, 36)) if kind < 7 else (between(60, 120), between(5, 25))
    text = min(text, longest // 3)
    span = min(span, longest - text)
    if between(0, 1):
        return torch.ones(text + span)
    # Position t predicts token t + 1: the last of a medium that is looked at predicts the first of the text.
    return torch.cat([torch.zeros(span - 1), torch.ones(text + 1)])


def mixed_batches(n: int, shape: dict, generator: torch.Generator) -> list[Batch]:
    """Mixed-modal documents as in pretraining, packed as the loader does: best fit over a window of documents, then
    the rows in random order."""
    rows = n * shape["rows"]
    window = [mixed_document(shape["length"], generator) for _ in range(8 * rows)]
    packed = pack(np.array([len(weights) for weights in window]), shape["length"]).rows
    order = torch.randperm(len(packed), generator=generator)[:rows].tolist()
    batches = []
    for first in range(0, rows, shape["rows"]):
        batch = empty(shape)
        for row, at in enumerate(order[first : first + shape["rows"]]):
            start = 0
            for number, document in enumerate(packed[at]):
                put(batch, row, start, number, window[document])
                start += len(window[document])
        batches.append(finished(batch, shape, generator))
    return batches


def padded(batch: Batch) -> Batch:
    """The same documents one a row, on the right of each padding up to the longest: what a usual collator makes."""
    document = batch["document"]
    number = torch.arange(document.shape[0])[:, None] * document.shape[1] + document  # rows never share one
    lengths = number[document >= 0].unique_consecutive(return_counts=True)[1]
    real = torch.arange(int(lengths.max())) < lengths[:, None]

    def spread(values: Tensor) -> Tensor:
        return torch.zeros(real.shape, dtype=values.dtype).masked_scatter_(real, values[document >= 0])

    return {name: spread(batch[name]) for name in ("ids", "targets", "weights")} | {"attention_mask": real.long()}
