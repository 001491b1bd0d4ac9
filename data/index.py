"""Random access to shards: a sidecar index says where every member of a plain tar lies.

`.x.tar.index` stands beside `x.tar` and holds keys, endings, offsets, sizes and crc32 of what `read_shard` reads, by
its rules. It is made by one pass over the shard, counts only for a shard of exactly that size and time of last change,
and is a safetensors file, so nothing in it is unpickled. An index that does not fit its shard is made again.
"""

import json
import logging
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from onevocab.common.errors import UserError
from onevocab.common.files import write_atomic
from onevocab.common.processes import run_processes
from onevocab.data.shards import (
    _META,
    _SPLIT,
    ENDINGS,
    HEADER,
    MAX_MEMBER,
    Sample,
    check_header,
    parse_header,
    unsafe_name,
)

VERSION = 1
READ, SPECIAL, OUTSIDE, DOUBLE, DAMAGED = range(5)  # status of a member: it is read, or why not
REASONS = ("", "a link, device or other special file", "its name points outside the shard",
           "two members of this name", "the shard is damaged or cut short here")
ARRAYS = {"first": np.int64, "key_stop": np.int64, "keys": np.uint8, "offset": np.int64, "size": np.int64,
          "crc": np.uint32, "ending": np.uint32, "status": np.uint8, "header": np.int64}
CHUNK = 4096  # samples whose places are taken out of the arrays at once
log = logging.getLogger("onevocab.data")


# ---------------------------------------------------------------------------------------------------- tar

BLOCK = 512
MAX_EXTENSION, MAX_NAME = 1 << 20, 4096  # bytes of a header that extends the next one; of a name
_ZEROS = bytes(BLOCK)
_EXTENSIONS = (b"L", b"K", b"x", b"X", b"g")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes: their size counts nothing
_SPARSE = b"GNU.sparse."


class _Damaged(Exception):
    """What is wrong with a tar, and where."""


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _number(field: bytes) -> int:
    """A number of a header: octal digits, or base 256 after a byte 0x80 (GNU)."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    if digits.strip(b"01234567"):
        raise _Damaged(f"{digits!r} stands in a header for a number")
    return int(digits or b"0", 8)


def _check_sum(block: bytes, at: int) -> None:
    found, summed = _number(block[148:156]), block[:148] + block[156:]
    wanted = sum(summed) + 8 * ord(" ")
    if found != wanted and found != wanted - 256 * sum(byte > 127 for byte in summed):  # some summed signed bytes
        raise _Damaged(f"bad checksum of the header at byte {at:,}")


def _records(text: bytes, at: int) -> dict[bytes, bytes]:
    """The records `length key=value` of a PAX header; length counts the whole record with its line end."""
    found, text, start = {}, text.rstrip(b"\0"), 0
    while start < len(text):
        digits = text[start : start + 20].partition(b" ")[0]
        stop = start + (int(digits) if digits.isdigit() else 0)
        key, equals, value = text[start + len(digits) + 1 : max(stop - 1, 0)].partition(b"=")
        if not equals or text[stop - 1 : stop] != b"\n":
            raise _Damaged(f"a broken PAX record at byte {at:,}")
        found[key], start = value, stop
    return found


def _headers(file, total: int) -> Iterator[tuple[str, bool, int, int]]:
    """Yields (name, whether it is a plain file, offset, size) of every member that is not a folder, `file` standing at
    its content then. Understands ustar, GNU and PAX; where they leave a choice, chooses as `tarfile` does.

    total: bytes of the file. Raises _Damaged where the tar is not one any more, or has no end marker.
    """
    at, said = 0, {}  # said: what extension headers say about the member that follows
    while True:
        if at > total:
            raise _Damaged("the last member is not whole")
        file.seek(at)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise _Damaged(f"no end marker at byte {at:,}")
        if block == _ZEROS:
            if said:
                raise _Damaged(f"the member that is announced before byte {at:,} is not there")
            return
        _check_sum(block, at)
        kind, size, at = block[156:157], _number(block[124:136]), at + BLOCK
        if kind in _EXTENSIONS:
            text = file.read(size) if size <= MAX_EXTENSION else b""
            if len(text) < size:
                raise _Damaged(f"a bad extension header before byte {at:,}")
            if kind in (b"L", b"K"):
                told = {b"path" if kind == b"L" else b"linkpath": text.partition(b"\0")[0]}
            else:
                told = _records(text, at)
            if kind == b"g":  # for all members that follow: dates and comments do no harm, a name or a size would
                if any(key in (b"path", b"size") or key.startswith(_SPARSE) for key in told):
                    raise _Damaged(f"a global header that names a file before byte {at:,}")
                told = {}
            said = told | said  # what was said first counts
            at += _padded(size)
            continue
        name = block[:100].partition(b"\0")[0]
        folder = kind == b"5" or (kind == b"\0" and name.endswith(b"/"))  # the second is how the oldest tars say it
        prefix = block[345:500].partition(b"\0")[0]
        if prefix and kind != b"S":
            name = prefix + b"/" + name
        more = kind == b"S" and block[482]  # an old GNU sparse file: its map may go on before the content
        while more:
            block = file.read(BLOCK)
            if len(block) < BLOCK:
                raise _Damaged(f"no end marker at byte {at:,}")
            more, at = block[504], at + BLOCK
        name = said.get(_SPARSE + b"name", said.get(b"path", name))
        plain = kind in (b"0", b"\0") and not any(key.startswith(_SPARSE) for key in said)
        if b"size" in said:
            if not said[b"size"].isdigit() or len(said[b"size"]) > 18:
                raise _Damaged(f"an impossible size before byte {at:,}")
            size = int(said[b"size"])
        if folder or kind in _WITHOUT_DATA:
            size = 0
        if len(name) > MAX_NAME:
            raise _Damaged(f"a name of {len(name):,} bytes before byte {at:,}")
        if not folder:
            yield name.decode("utf-8", "surrogateescape"), plain, at, size
        at, said = at + _padded(size), {}


def _crc32(file, size: int) -> int:
    """crc32 of the next `size` bytes, read in pieces: a header can promise anything."""
    crc = 0
    while size:
        piece = file.read(min(size, 1 << 20))
        if not piece:
            raise _Damaged("the last member is not whole")
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
        """The index beside a shard of this `stat`; None when there is none, or none that fits."""
        try:
            file = index_path(path)
            if file.stat().st_size > 8 * stat.st_size + 65536:  # a member takes more of a tar than of its index
                return None
            arrays = load_arrays(file.read_bytes())
            about = json.loads(arrays.pop("about").tobytes())
            if about.pop("version") != VERSION:
                return None
            index = cls(**arrays, **(about | {"shard": tuple(about["shard"])}))
            fits = index.shard == (stat.st_size, stat.st_mtime_ns) and index._is_consistent()
        except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
            return None
        return index if fits else None

    def _is_consistent(self) -> bool:
        """Whether all numbers stay within the shard and the tables: a stranger's shard brings a stranger's index."""
        if any((array := getattr(self, name)).ndim != 1 or array.dtype != kind for name, kind in ARRAYS.items()):
            return False
        n, m, total, read = len(self.first) - 1, len(self.offset), self.shard[0], self.status == READ
        if not all(isinstance(text, str) for text in [self.damage, *self.endings]):
            return False
        allowed = np.array([ending.rpartition(".")[2] in ENDINGS for ending in self.endings], bool)
        return bool(
            n >= 0 and len(self.key_stop) == n + 1 and len(self.header) % 2 == 0
            and m == len(self.size) == len(self.crc) == len(self.ending) == len(self.status)
            and self.first[0] == 0 and self.first[-1] == m and (np.diff(self.first) > 0).all()
            and self.key_stop[0] == 0 and self.key_stop[-1] == len(self.keys) and (np.diff(self.key_stop) >= 0).all()
            and (self.offset >= 0).all() and (self.offset <= total).all()
            and (self.size >= 0).all() and (self.size <= total - self.offset).all()
            and (self.status < len(REASONS)).all() and (self.ending < len(allowed)).all()
            and allowed[self.ending[read]].all()
        )


def index_path(path) -> Path:
    """`x.tar` -> `.x.tar.index`: hidden, so that a glob over the shards does not find it."""
    return Path(path).with_name(f".{Path(path).name}.index")


def _scan(path, file) -> Index:
    """Reads an open shard from its start to its end marker, or to where it is damaged. Raises UserError when the system
    fails to read it, or it changes meanwhile."""
    keys, first, rows, header, endings, damage = [], [], [], [], {}, ""
    seen: set[str] = set()
    stat = os.fstat(file.fileno())
    try:
        for name, plain, offset, size in _headers(file, stat.st_size):
            status = SPECIAL if not plain else OUTSIDE if unsafe_name(name) else READ
            if status == READ and name.rpartition(".")[2].lower() not in ENDINGS:
                continue
            if name == HEADER:
                header += [offset, size if status == READ else -1]
            if _META.match(name) or ("/" not in name and name.startswith("__") and name.endswith("__")):
                continue
            split = _SPLIT.fullmatch(name)
            if not split:
                continue
            key, ending = split[1], split[2].lower()
            if not keys or key != keys[-1]:
                keys.append(key)
                first.append(len(rows))
                seen = set()
            if ending in seen:
                status = DOUBLE
            seen.add(ending)
            place = (offset, size, _crc32(file, size)) if status == READ else (0, 0, 0)
            rows.append((*place, endings.setdefault(ending, len(endings)), status))
    except _Damaged as error:
        damage = str(error)
        if keys:  # nobody knows whether the last sample is complete
            rows.append((0, 0, 0, endings.setdefault("", len(endings)), DAMAGED))
    except OSError as error:
        raise UserError(f"cannot read shard {path}: {error.strerror}") from None
    after = os.fstat(file.fileno())
    if (after.st_size, after.st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
        raise UserError(f"{path} changed while it was indexed; wait until it is written, then try again")
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    offset, size, crc, ending, status = zip(*rows, strict=True) if rows else [()] * 5
    values = {"first": [*first, len(rows)], "key_stop": np.cumsum([0, *map(len, encoded)]), "offset": offset,
              "size": size, "crc": crc, "ending": ending, "status": status, "header": header}
    arrays = {name: np.array(value, ARRAYS[name]) for name, value in values.items()}
    return Index(**arrays, keys=np.frombuffer(b"".join(encoded), np.uint8), endings=list(endings), damage=damage,
                 shard=(stat.st_size, stat.st_mtime_ns))


def _open(path):
    try:
        return open(path, "rb", buffering=1 << 20)
    except OSError as error:
        raise UserError(f"cannot read shard {path}: {error.strerror}") from None


def _index_of(path, file, must_save: bool) -> Index:
    """The saved index of an open shard, or a new one, saved."""
    index = Index.load(path, os.fstat(file.fileno()))
    if index is None:
        index = _scan(path, file)
        try:
            write_atomic(index_path(path), index.to_bytes())
        except OSError as error:
            if must_save:
                raise UserError(f"cannot write {index_path(path)}: {error.strerror}; make room, or the folder "
                                "writable, or copy the shard elsewhere") from None
            log.warning("cannot write %s (%s): every process that opens this shard will read it twice",
                        index_path(path), error.strerror)
    return index


def build_index(path) -> Index:
    """The index of a shard, made and saved unless one that fits is there. A damaged shard has one too, up to the
    damage, which `Index.damage` tells. Raises UserError when the shard cannot be read or the index not be written."""
    with _open(path) as file:
        return _index_of(path, file, must_save=True)


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
        return Index.load(path, os.fstat(file.fileno())) is not None


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
                refused[endings[ending]] = f"{size:,} bytes, more than the {self.max_member:,} allowed"
            else:
                content = self._map[offset : offset + size]
                if self.verify and zlib.crc32(content) != crc:
                    refused[endings[ending]] = "its checksum is not the index's: it was damaged after it was indexed"
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
