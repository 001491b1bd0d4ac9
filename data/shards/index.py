"""Random access to shards: a sidecar index says where every member of a plain tar lies.

`.x.tar.index` stands beside `x.tar` and holds keys, endings, offsets, sizes and crc32 of what `read_shard` reads, by
its rules. It is made when we write a shard, or by one pass over it, counts only for a shard of exactly that size and
time of last change, and is a safetensors file, so nothing in it is unpickled. An index that does not fit its shard is
made again; one whose time alone is another (the shard was copied) still says what the checksums were.
"""

import json
import logging
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from stat import S_ISREG

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from onevocab.common.errors import UserError
from onevocab.common.files import write_atomic
from onevocab.common.processes import run_processes
from onevocab.data.shards.format import (
    DAMAGED,
    DOUBLE,
    ENDINGS,
    HEADER,
    MAX_MEMBER,
    OUTSIDE,
    SPECIAL,
    SPLIT,
    Damaged,
    Sample,
    check_header,
    entries,
    is_meta,
    parse_header,
    split_keys,
    split_name,
    too_large,
)

VERSION = 2
READ = 0  # status of a member that is read; of others the place in REASONS of why not
CHANGED = ("its checksum is not the index's: it was damaged after it was written (if not, remove the shard's index and "
           "what was made from it)")
REASONS = ("", SPECIAL, OUTSIDE, DOUBLE, DAMAGED, CHANGED, SPLIT)
ARRAYS = {"first": np.int64, "key_stop": np.int64, "keys": np.uint8, "offset": np.int64, "size": np.int64,
          "crc": np.uint32, "ending": np.uint32, "status": np.uint8, "header": np.int64}
CHUNK = 4096  # samples whose places are taken out of the arrays at once
log = logging.getLogger("onevocab.data")


def _crc32(file, offset: int, size: int) -> int:
    """crc32 of `size` bytes, read in pieces: a header can promise anything."""
    file.seek(offset)
    crc = 0
    while size:
        piece = file.read(min(size, 1 << 20))
        if not piece:
            raise Damaged("the last member is not whole")
        crc, size = zlib.crc32(piece, crc), size - len(piece)
    return crc


# ---------------------------------------------------------------------------------------------------- index


@dataclass(frozen=True, eq=False)
class Index:
    """Where the n samples of a shard lie, with m members in all.

    first: int64 (n + 1,), sample i has the members first[i] .. first[i + 1] - 1; key_stop: int64 (n + 1,), its key is
    keys[key_stop[i]:key_stop[i + 1]] (uint8, UTF-8); per member, each (m,): offset and size, int64 bytes; crc, uint32;
    ending, uint32, an entry of `endings`; status, uint8, 0 where it is read, else which of REASONS forbids it. header:
    int64, offset and size of each header member in turn, size -1 when it may not be read. damage: what is wrong with
    the tar after the last sample, "" for a whole one. shard: its (size, time of last change in ns).
    """

    first: np.ndarray
    key_stop: np.ndarray
    keys: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    crc: np.ndarray
    ending: np.ndarray
    status: np.ndarray
    header: np.ndarray
    endings: list[str]
    damage: str
    shard: tuple[int, int]

    def to_bytes(self) -> bytes:
        about = {"version": VERSION, "endings": self.endings, "damage": self.damage, "shard": self.shard}
        arrays = {name: getattr(self, name) for name in ARRAYS}
        return save_arrays(arrays | {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)})

    @classmethod
    def load(cls, path, stat: os.stat_result) -> "Index | None":
        """The index beside a shard of this size; None when there is none, or none that makes sense."""
        try:
            most = 8 * stat.st_size + 65536  # a member takes more of a tar than of its index
            with open(index_path(path), "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
                about = os.fstat(file.fileno())
                if not stat.st_size or not S_ISREG(about.st_mode) or about.st_size > most:
                    return None
                arrays = load_arrays(file.read(most))
            about = json.loads(arrays.pop("about").tobytes())
            if about.pop("version") != VERSION:
                return None
            index = cls(**arrays, **(about | {"shard": tuple(about["shard"])}))
            fits = index.shard[0] == stat.st_size and index._is_consistent()
        except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
            return None
        return index if fits else None

    def remember(self, before: "Index") -> None:
        """Takes over the checksums of an older index of the same members: what differs now was damaged since, as by a
        faulty disk or a copy that went wrong."""
        places = ("first", "keys", "offset", "size")
        if not all(np.array_equal(getattr(self, name), getattr(before, name)) for name in places):
            return
        known = (before.status == READ) | (before.status == REASONS.index(CHANGED))
        changed = (self.status == READ) & known & (self.crc != before.crc)
        self.status[changed] = REASONS.index(CHANGED)
        self.crc[changed] = before.crc[changed]

    def _is_consistent(self) -> bool:
        """Whether all numbers stay within the shard and the tables: a stranger's shard brings a stranger's index."""
        if any((array := getattr(self, name)).ndim != 1 or array.dtype != kind for name, kind in ARRAYS.items()):
            return False
        n, m, total, read = len(self.first) - 1, len(self.offset), self.shard[0], self.status == READ
        texts = [self.damage, *self.endings] if isinstance(self.endings, list) else [None]
        if not all(isinstance(text, str) for text in texts):
            return False
        start, stop = self.offset[read], (self.offset + self.size)[read]
        allowed = np.array([ending.rpartition(".")[2] in ENDINGS for ending in self.endings], bool)
        return bool(
            n >= 0 and len(self.key_stop) == n + 1 and len(self.header) % 2 == 0
            and m == len(self.size) == len(self.crc) == len(self.ending) == len(self.status)
            and self.first[0] == 0 and self.first[-1] == m and (np.diff(self.first) > 0).all()
            and self.key_stop[0] == 0 and self.key_stop[-1] == len(self.keys) and (np.diff(self.key_stop) >= 0).all()
            and (self.offset >= 0).all() and (self.offset <= total).all()
            and (self.size >= 0).all() and (self.size <= total - self.offset).all()
            and (start[1:] >= stop[:-1]).all()  # one after the other: few bytes cannot make a large sample
            and (self.status < len(REASONS)).all() and (self.ending < len(allowed)).all()
            and allowed[self.ending[read]].all()
        )


def index_path(path) -> Path:
    """`x.tar` -> `.x.tar.index`: hidden, so that a glob over the shards does not find it."""
    return Path(path).with_name(f".{Path(path).name}.index")


def _scan(path, file) -> Index:
    """Reads an open shard from its start to its end marker, or to where it is damaged. Raises UserError when the system
    fails to read it, or it changes meanwhile."""
    keys, samples, header, endings, damage = [], [], [], {}, ""  # samples: of each its members, rows of the index
    seen: set[str] = set()
    stat = os.fstat(file.fileno())
    try:
        for name, offset, size, refused in entries(file):
            status = REASONS.index(refused)
            if name == HEADER:
                header += [offset, size if status == READ else -1]
            split = None if is_meta(name) else split_name(name)
            if split is None:
                continue
            key, ending = split
            if not keys or key != keys[-1]:
                keys.append(key)
                samples.append([])
                seen = set()
            if ending in seen:
                status = REASONS.index(DOUBLE)
            seen.add(ending)
            place = (offset, size, _crc32(file, offset, size)) if status == READ else (0, 0, 0)
            samples[-1].append((*place, endings.setdefault(ending, len(endings)), status))
    except Damaged as error:
        damage = str(error)
        if keys:  # nobody knows whether the last sample is complete
            samples[-1].append(_about_all(endings, DAMAGED))
    except OSError as error:
        raise UserError(f"cannot read shard {path}: {error.strerror}") from None
    after = os.fstat(file.fileno())
    if (after.st_size, after.st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
        raise UserError(f"{path} changed while it was indexed; wait until it is written, then try again")
    split_up = split_keys(keys)
    for key, members in zip(keys, samples, strict=True):
        if key in split_up:
            members.append(_about_all(endings, SPLIT))
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    rows = list(chain.from_iterable(samples))
    offset, size, crc, ending, status = zip(*rows, strict=True) if rows else [()] * 5
    values = {"first": np.cumsum([0, *map(len, samples)]), "key_stop": np.cumsum([0, *map(len, encoded)]),
              "offset": offset, "size": size, "crc": crc, "ending": ending, "status": status, "header": header}
    arrays = {name: np.array(value, ARRAYS[name]) for name, value in values.items()}
    return Index(**arrays, keys=np.frombuffer(b"".join(encoded), np.uint8), endings=list(endings), damage=damage,
                 shard=(stat.st_size, stat.st_mtime_ns))


def _about_all(endings: dict[str, int], reason: str) -> tuple:
    """The row that says what is wrong with a sample itself, as a member without an ending that is not read."""
    return 0, 0, 0, endings.setdefault("", len(endings)), REASONS.index(reason)


def _open(path):
    try:
        return open(path, "rb", buffering=1 << 20)
    except OSError as error:
        raise UserError(f"cannot read shard {path}: {error.strerror}") from None


def _index_of(path, file, must_save: bool, anew: bool = False) -> Index:
    """The saved index of an open shard, or a new one, saved."""
    stat = os.fstat(file.fileno())
    before = None if anew else Index.load(path, stat)
    if before is not None and before.shard[1] == stat.st_mtime_ns:
        return before
    index = _scan(path, file)
    if before is not None:
        index.remember(before)
    try:
        now = os.stat(path)
        if os.path.samestat(now, stat) and now.st_mtime_ns == stat.st_mtime_ns:  # else it was replaced meanwhile
            write_atomic(index_path(path), index.to_bytes())
    except OSError as error:
        if must_save:
            raise UserError(f"cannot write {index_path(path)}: {error.strerror}; make room, or the folder "
                            "writable, or copy the shard elsewhere") from None
        log.warning("cannot write %s (%s): every process that opens this shard will read it twice",
                    index_path(path), error.strerror)
    return index


def build_index(path, must_save: bool = True, anew: bool = False) -> Index:
    """The index of a shard, made and saved unless one that fits is there. A damaged shard has one too, up to the
    damage, which `Index.damage` tells. Raises UserError when the shard cannot be read, and when the index cannot be
    written, unless `must_save` is False: then that is logged. anew: whatever is there, which is of another shard."""
    with _open(path) as file:
        return _index_of(path, file, must_save, anew)


def build_indexes(paths: Iterable, workers: int = 1) -> dict[Path, str]:
    """`build_index` for many shards, by `workers` processes (then the script needs the `__main__` guard).

    Returns the damaged shards and what is wrong with each: {} when all are whole. Killed at any time and started
    again, it goes on with the missing ones. Raises UserError as build_index does.
    """
    paths = [Path(path) for path in paths]
    missing = [path for path in paths if not _has_index(path)] if workers > 1 else []
    if len(missing) > 1:
        arguments = [(missing[rank::workers],) for rank in range(min(workers, len(missing)))]
        run_processes(_build, arguments, "a process that indexed shards died; run it again: finished ones are kept")
    return {path: index.damage for path in paths if (index := build_index(path)).damage}


def _has_index(path) -> bool:
    with _open(path) as file:
        stat = os.fstat(file.fileno())
        index = Index.load(path, stat)
        return index is not None and index.shard[1] == stat.st_mtime_ns


def _build(paths: list[Path]) -> None:
    for path in paths:
        build_index(path)


# ---------------------------------------------------------------------------------------------------- reading


class IndexedShard:
    """A shard as a sequence: `shard[i]` is the i-th sample that `read_shard` yields, read through a memory map.

    tokenizers_hash, max_member: as for read_shard. verify: compare each member with its crc32; one that differs is
    listed in `Sample.refused`. salvage: take a damaged shard up to the damage; its last sample, of which nobody knows
    whether it is complete, is refused. name: what `Sample.shard` says, the path by default. An index that is missing
    is made; where it cannot be saved, that is logged. The file must not be cut shorter while it is open; replacing it
    does no harm. Raises UserError as read_shard does, damage included, before the first sample.
    """

    def __init__(self, path, tokenizers_hash: str | None = None, max_member: int = MAX_MEMBER, verify: bool = False,
                 salvage: bool = False, name: str | None = None):
        self.path, self.name, self.max_member, self.verify = Path(path), name or str(Path(path)), max_member, verify
        with _open(path) as file:
            self.index = index = _index_of(path, file, must_save=False)
            if index.damage and not (salvage and len(self)):
                raise UserError(f"{self.name} is damaged or cut short ({index.damage}); fetch or make this shard again")
            if index.damage:
                log.warning("%s is damaged or cut short (%s): %d samples before that are read; fetch or make it again "
                            "for the rest", self.name, index.damage, len(self) - 1)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._keys = index.keys.tobytes()
        for offset, size in index.header.reshape(-1, 2).tolist():
            content = self._map[offset : offset + size] if 0 <= size <= max_member else None
            check_header(self.name, parse_header(self.name, content), tokenizers_hash)

    def __len__(self) -> int:
        return len(self.index.first) - 1

    def __getitem__(self, i: int) -> Sample:
        i = range(len(self))[i]  # negative numbers and IndexError as in any sequence
        start, stop = self.index.first[i : i + 2].tolist()
        return self._sample(self.key(i), self._members(start, stop))

    def __iter__(self) -> Iterator[Sample]:
        for start in range(0, len(self), CHUNK):
            first = self.index.first[start : start + CHUNK + 1].tolist()
            stops = self.index.key_stop[start : start + CHUNK + 1].tolist()
            members, before = self._members(first[0], first[-1]), first[0]
            for i in range(len(first) - 1):
                key = self._keys[stops[i] : stops[i + 1]].decode("utf-8", "surrogateescape")
                yield self._sample(key, members[first[i] - before : first[i + 1] - before])

    def key(self, i: int) -> str:
        """The key of sample i, without reading the sample."""
        start, stop = self.index.key_stop[i : i + 2].tolist()
        return self._keys[start:stop].decode("utf-8", "surrogateescape")

    def _members(self, start: int, stop: int) -> list[tuple]:
        index, here = self.index, slice(start, stop)
        columns = index.offset, index.size, index.crc, index.ending, index.status
        return list(zip(*(column[here].tolist() for column in columns), strict=True))

    def _sample(self, key: str, places: list[tuple]) -> Sample:
        members, refused, endings = {}, {}, self.index.endings
        for offset, size, crc, ending, status in places:
            if status != READ:
                refused[endings[ending]] = REASONS[status]
            elif size > self.max_member:
                refused[endings[ending]] = too_large(size, self.max_member)
            else:
                content = self._map[offset : offset + size]
                if self.verify and zlib.crc32(content) != crc:
                    refused[endings[ending]] = CHANGED
                else:
                    members[endings[ending]] = content
        return Sample(key, members, self.name, refused)

    def close(self) -> None:
        self._map.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def read_indexed(path, **options) -> Iterator[Sample]:
    """The samples of `read_shard`, in order, many times faster once there is an index. options: as for IndexedShard."""
    with IndexedShard(path, **options) as shard:
        if hasattr(mmap, "MADV_SEQUENTIAL"):
            shard._map.madvise(mmap.MADV_SEQUENTIAL)
        yield from shard
