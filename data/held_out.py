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


def limits(valid: list[float | None], apart: list[bool], shards: list[list[str]], hashes: list[np.ndarray],
           held_out_shards: list[str]) -> dict[str, int]:
    """Shard -> the hash below which its samples are held out. Of a shard that two sources read, the larger one.

    valid, apart, shards, hashes: of each source its share (None: the default), whether its held-out samples are in
    shards of their own, its shards, and the hashes (n,) of its samples. held_out_shards: those shards of their own.
    Raises UserError when one of these is trained on.
    """
    found: dict[str, int] = {}
    for share, alone, paths, there in zip(valid, apart, shards, hashes, strict=True):
        limit = 0 if alone else round((share or 0) * HASHES)
        if share is None and not alone and len(there):
            limit = round(min(max(VALID, LEAST / len(there)), MOST) * HASHES)
            if len(there) * MOST >= 1:
                limit = max(limit, int(there.min()) + 1)  # at least one
        for path in paths:
            found[path] = max(limit, found.get(path, 0))
    for path in held_out_shards:
        if path in found:
            raise UserError(f"valid_path: {shown(path)} is trained on as well; name other shards")
        found[path] = HASHES
    return found
