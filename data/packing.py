"""Packing: documents into rows of a fixed length, none ever cut.

Best-fit decreasing: the longest document first, each into the fullest row that still has room. At most
11/9 optimal + 4 rows (Johnson et al., SIAM J. Computing 3, 1974); over a window of some thousand documents much shorter
than a row, far less than 1% of the tokens is padding.
"""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np


class Packing(NamedTuple):
    """rows: lists of document numbers; dropped: numbers of the documents that are longer than a row."""

    rows: list[list[int]]
    dropped: list[int]


def pack(lengths, seq_len: int) -> Packing:
    """Deterministic. lengths: tokens of each document; a length of 0 is an empty place and is passed over."""
    lengths = np.asarray(lengths, np.int64)
    dropped = np.flatnonzero(lengths > seq_len).tolist()
    order = np.argsort(-lengths, kind="stable")
    order = order[(lengths[order] > 0) & (lengths[order] <= seq_len)]
    rows: list[list[int]] = []
    room: list[list[int]] = [[] for _ in range(seq_len + 1)]  # rooms -> rows with exactly so many tokens left
    rooms: list[int] = []  # sorted: which entries of `room` are not empty
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect_left(rooms, length)
        if at < len(rooms):
            left = rooms[at]
            row = room[left].pop()
            if not room[left]:
                del rooms[at]
        else:
            left, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(document)
        left -= length
        if left:
            if not room[left]:
                insort(rooms, left)
            room[left].append(row)
    return Packing(rows, dropped)
