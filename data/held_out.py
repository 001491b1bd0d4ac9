"""Which samples are held out: never trained on, so that a loss on them says what the model has learned, not remembered.

By the hash of a sample's media (of its text where it has none): all captions of one picture go together, wherever they
stand, and the same share holds out the same samples in every stage. As data are added samples leave the held-out set,
none joins it. Stages and phases with other sources, or other shares, hold out others of the same shards: each writes
its limits down, and what one of them trains on no later one measures.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from onevocab.common.errors import UserError
from onevocab.common.files import read_json, write_json
from onevocab.data.shards.remote import is_remote, shown
from onevocab.data.token_cache import HASHES

FILE = "held_out.json"
VALID, LEAST, MOST = 0.01, 64, 0.1  # of a source: this share or so many samples, but at most this share


def _without_crowds(hashes: np.ndarray, share: float) -> int:
    """The limit that holds out `share` of sorted hashes, at least one sample where that is one; or fewer, where many
    samples have equal media, as far as tokenizers that tell little apart can see: never over twice the share."""
    wanted = share * len(hashes)
    if wanted < 1:
        return 0
    limit = max(round(share * HASHES), int(hashes[0]) + 1)
    if np.count_nonzero(hashes < limit) <= max(2 * wanted, 1):
        return limit
    return int(hashes[int(max(2 * wanted, 1))])  # that of the first ones that are too many


def limits(valid: list[float | None], apart: list[bool], shards: list[list[str]], hashes: list[np.ndarray],
           held_out_shards: list[str]) -> dict[str, int]:
    """Shard -> the hash below which its samples are held out. Of a shard that two sources read, the larger one.

    valid, apart, shards, hashes: of each source its share (None: the default), whether its held-out samples are in
    shards of their own, its shards, and the hashes (n,) of its samples. held_out_shards: those shards of their own.
    Raises UserError when one of these is trained on.
    """
    found: dict[str, int] = {}
    for share, alone, paths, there in zip(valid, apart, shards, hashes, strict=True):
        if share is None:
            share = min(max(VALID, LEAST / max(len(there), 1)), MOST)
        limit = 0 if alone else _without_crowds(np.sort(there), share)
        for path in paths:
            found[path] = max(limit, found.get(path, 0))
    for path in held_out_shards:
        if path in found:
            raise UserError(f"valid_path: {shown(path)} is trained on as well; name other shards")
    return found | dict.fromkeys(held_out_shards, HASHES)


def real(shard: str) -> str:
    """The one name of a shard, however it was found."""
    return shard if is_remote(shard) else os.path.realpath(shard)


def together(*found: dict[str, int]) -> dict[str, int]:
    """Limits of several loaders by the real names of their shards: below them none of these trains on a sample."""
    smallest: dict[str, int] = {}
    for limits in found:
        for shard, limit in limits.items():
            smallest[real(shard)] = min(limit, smallest.get(real(shard), HASHES))
    return smallest


def write_limits(run: Path, stage: str, limits: dict[str, int]) -> None:
    """What `together` found for a stage and its phases, as RUN/STAGE/held_out.json; paths start from the run."""
    (run / stage).mkdir(parents=True, exist_ok=True)
    start = os.path.realpath(run)
    write_json(run / stage / FILE, {shard if is_remote(shard) else os.path.relpath(shard, start): limit
                                    for shard, limit in limits.items()})


def read_limits(run: Path, stages: Iterable[str]) -> dict[str, int]:
    """What these stages wrote, together. Raises UserError when a file is damaged."""
    start, paths = os.path.realpath(run), [run / stage / FILE for stage in stages]
    return together(*({shard if is_remote(shard) else os.path.join(start, shard): limit
                       for shard, limit in read_json(path).items()} for path in paths if path.exists()))
