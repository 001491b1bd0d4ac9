"""Which samples are held out: never trained on, so that a loss on them says what the model has learned, not remembered.

By the hash of a sample's media (of its text where it has none): all captions of one picture go together, wherever they
stand, and the same share holds out the same samples in every stage. As data are added samples leave the held-out set,
none joins it.
"""

import numpy as np

from onevocab.common.errors import UserError
from onevocab.data.shards.remote import shown
from onevocab.data.token_cache import HASHES

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
