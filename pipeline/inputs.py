"""The raw shards of a run: what media they hold, and whether they are still what the run was made from.

A shard's index has the checksums of all it holds, so reading that tells one shard from another. What was found is kept
in the run's `shards/files.json`; a shard of the size and time that stand there is not opened again.
"""

import hashlib
import os
from pathlib import Path

import numpy as np

from onevocab.common.errors import UserError
from onevocab.common.files import read_json
from onevocab.data.codes import codes_names
from onevocab.data.documents import modality_of_ending
from onevocab.data.shards.index import ARRAYS, READ, Index, build_index
from onevocab.data.shards.remote import ShardCache, is_remote

FILES = "files.json"
AWAY = "away.json"  # in `shards/` too, where the raw shards stayed on the machine that made the codes of this run


def inspect_shards(shards: list[str], folder: Path) -> dict[str, dict]:
    """Of each shard {name of its codes: {"at": [address] or [bytes, time of last change in ns], "digest", "media":
    modalities, "bare": those of samples without a json, which no json can leave out}}. folder: holds FILES of an
    earlier start, or nothing. Raises UserError when a shard cannot be read, or is there twice."""
    known, found = known_files(folder), {}
    for shard, name in zip(shards, codes_names(shards), strict=True):
        at = [shard]  # what an address holds is taken not to change
        if not is_remote(shard):
            try:
                stat = os.stat(shard)
            except OSError as error:
                raise UserError(f"cannot read shard {shard}: {error.strerror}") from None
            at = [stat.st_size, stat.st_mtime_ns]
        before = known.get(name)
        if before is not None and before["at"] == at:
            found[name] = before
        else:
            found[name] = {"at": at} | _contents(build_index(ShardCache().fetch(shard), must_save=False))
    return found


def known_files(folder: Path) -> dict[str, dict]:
    """What an earlier start found; {} where nothing is, or nothing of use."""
    try:
        files = read_json(folder / FILES)
    except UserError:
        return {}
    keys = {"at", "digest", "media", "bare"}
    whole = isinstance(files, dict) and all(isinstance(one, dict) and one.keys() == keys for one in files.values())
    return files if whole else {}


def _contents(index: Index) -> dict:
    digest = hashlib.sha256("\n".join([*index.endings, index.damage]).encode("utf-8", "surrogateescape"))
    for name in ARRAYS:
        digest.update(getattr(index, name).tobytes())
    modality = [modality_of_ending(ending) for ending in index.endings]
    read = index.status == READ
    is_json = np.array([ending == "json" for ending in index.endings], bool)[index.ending] & read
    with_json = np.add.reduceat(is_json, index.first[:-1]) > 0 if len(index.first) > 1 else np.zeros(0, bool)
    bare = read & ~np.repeat(with_json, np.diff(index.first))

    def media(members: np.ndarray) -> list[str]:
        return sorted({modality[i] for i in np.unique(index.ending[members]).tolist()} - {None})

    return {"digest": digest.hexdigest()[:16], "media": media(read), "bare": media(bare)}


def media_of(files: dict[str, dict], which: str = "media") -> set[str]:
    """The modalities that some shard holds."""
    return {modality for one in files.values() for modality in one[which]}


def changes(before: dict[str, dict], after: dict[str, dict]) -> str:
    """In what the shards differ, in words; "" where nothing is known of before."""
    other = [name for name in before if name in after and before[name]["digest"] != after[name]["digest"]]
    kinds = {"has other bytes": other, "is gone": [name for name in before if name not in after],
             "is new": [name for name in after if name not in before]}
    return "" if not before else ", ".join(
        f"{names[0]} {what}" + (f" and {len(names) - 1} more" if names[1:] else "")
        for what, names in kinds.items() if names)
