"""Shards: plain webdataset tars, written whole or not at all, read as what they are: untrusted input.

A sample is the adjacent members that share a key; key and ending part at the first dot of the file's name, endings
are lower-cased (webdataset's own rule). Only the endings in ENDINGS are ever read, nothing is unpickled, and no path
of a member is ever written to. Codes shards begin with a member `__header__/tokenizers.json` that says which
tokenizers made the codes; webdataset skips such members.
"""

import ast
import glob
import io
import json
import os
import re
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import webdataset

from onevocab.common.errors import UserError

ENDINGS = frozenset(("json", "txt", "jpg", "jpeg", "png", "webp", "flac", "wav", "npy"))
MAX_MEMBER = 256 << 20  # bytes
HEADER_KEY, HEADER = "__header__/tokenizers", "__header__/tokenizers.json"
CODE_TYPES = (np.dtype("<u2"), np.dtype("<u4"))

_SPLIT = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")


@dataclass(slots=True)
class Sample:
    """members: ending -> bytes; refused: ending -> why this member was not read (a link, too large, ...)."""

    key: str
    members: dict[str, bytes]
    shard: str
    refused: dict[str, str] = field(default_factory=dict)


def list_shards(path) -> list[Path]:
    """A shard, a folder of shards, or a glob -> sorted paths. Raises UserError when there is none."""
    path = str(path)
    if os.path.isdir(path):
        found = sorted(Path(path).glob("*.tar"))
    elif os.path.isfile(path):
        found = [Path(path)]
    else:
        found = sorted(map(Path, glob.glob(path, recursive=True)))
    found = [shard for shard in found if not shard.name.startswith(".")]
    if not found:
        raise UserError(f"no shards at {path}: give a .tar file, a folder that holds some, or a glob")
    return found


# ---------------------------------------------------------------------------------------------------- writing


class ShardFile:
    """One shard, written aside with webdataset's own writer and renamed when it is complete.

    The same samples give the same bytes: no times, one owner, members of a sample in alphabetical order. Used as a
    context manager; after an exception nothing is left under `path`.
    """

    def __init__(self, path, header: dict | None = None):
        self.path, self.samples, self._before = Path(path), 0, None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._aside = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        self._file = open(self._aside, "wb")
        self._tar = webdataset.TarWriter(self._file, user="onevocab", group="onevocab", encoder=False, mtime=0)
        if header is not None:
            content = json.dumps(header, sort_keys=True).encode()
            self._tar.write({"__key__": HEADER_KEY, "json": content})

    def write(self, key: str, members: dict[str, bytes]) -> None:
        """Adds a sample. Raises ValueError on a key or an ending that would not be read back."""
        split = _SPLIT.fullmatch(key + ".x")
        if not split or split[2] != "x" or _META.match(key) or unsafe_name(key) or key == self._before:
            raise ValueError(f"bad or repeated sample key {key!r}: no dots in its last part, not the one before")
        for ending in members:
            if ending != ending.lower() or ending.rpartition(".")[2] not in ENDINGS or "/" in ending:
                raise ValueError(f"sample {key}: a member may not end in {ending!r}; use {sorted(ENDINGS)}")
        self._tar.write({"__key__": key, **members})
        self._before = key
        self.samples += 1

    def close(self) -> None:
        """Completes the shard: end marker, fsync, rename."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._aside, self.path)

    def discard(self) -> None:
        """Leaves nothing behind."""
        self._tar.close()
        self._file.close()
        self._aside.unlink(missing_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.discard() if kind else self.close()


class ShardWriter:
    """Samples -> `folder/prefix-000000.tar`, `prefix-000001.tar`, ... of `samples_per_shard` samples each.

    Raises UserError when the folder already holds shards of this prefix, unless `overwrite` (then they go first).
    """

    def __init__(self, folder, prefix: str, samples_per_shard: int = 1000, header: dict | None = None,
                 overwrite: bool = False):
        self.folder, self.prefix, self.header = Path(folder), prefix, header
        self.samples_per_shard, self.shards, self._open = samples_per_shard, [], None
        for old in sorted(self.folder.glob(f"{glob.escape(prefix)}-[0-9]*.tar")):
            if not overwrite:
                raise UserError(f"{old} exists already: choose another folder, or remove the old shards first")
            old.unlink()

    def write(self, key: str, members: dict[str, bytes]) -> None:
        """Adds a sample: ending -> bytes (`json`, `0.png`, ...). Raises ValueError as ShardFile.write does."""
        if self._open is None:
            self._open = ShardFile(self.folder / f"{self.prefix}-{len(self.shards):06d}.tar", self.header)
        self._open.write(key, members)
        if self._open.samples >= self.samples_per_shard:
            self.close()

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self.shards.append(self._open.path)
            self._open = None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind and self._open is not None:
            self._open.discard()
            self._open = None
        self.close()


# ---------------------------------------------------------------------------------------------------- reading


def unsafe_name(name: str) -> bool:
    """Whether a member's name points outside. We never write to it, but who sends such a name means no good."""
    return name.startswith(("/", "\\")) or ".." in name.split("/") or "\0" in name


def _members(path: Path, max_member: int) -> Iterator[tuple[str, bytes | None, str]]:
    """Yields (name, content or None, why it is None) of every member that is not a folder.

    tarfile takes a cut or overwritten header for the end of the archive; so what follows the last member must be the
    end marker, or the shard is damaged.
    """
    damaged = f"{path} is damaged or cut short ({{}}); fetch or make this shard again"
    try:
        file = open(path, "rb")
    except OSError as error:
        raise UserError(f"cannot read shard {path}: {error.strerror}") from None
    with file:
        try:
            tar = tarfile.open(fileobj=file, mode="r:")
            reached = -1
            while (info := tar.next()) is not None:
                tar.members.clear()  # tarfile would keep every header of the shard
                if info.size < 0 or info.offset_data <= reached:
                    raise tarfile.ReadError(f"impossible size of {info.name!r}")
                reached = info.offset_data
                if info.isdir():
                    continue
                if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    yield info.name, None, "a link, device or other special file"
                elif unsafe_name(info.name):
                    yield info.name, None, "its name points outside the shard"
                elif info.name.rpartition(".")[2].lower() not in ENDINGS:
                    continue
                elif info.size > max_member:
                    yield info.name, None, f"{info.size:,} bytes, more than the {max_member:,} allowed"
                else:
                    file.seek(info.offset_data)
                    content = file.read(info.size)
                    if len(content) != info.size:
                        raise tarfile.ReadError(f"{info.name!r} is not whole")
                    yield info.name, content, ""
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end marker at byte {tar.offset:,}")
        except (tarfile.TarError, UnicodeError, ValueError, OverflowError, MemoryError, OSError) as error:
            raise UserError(damaged.format(error)) from None


def read_shard(path, tokenizers_hash: str | None = None, max_member: int = MAX_MEMBER) -> Iterator[Sample]:
    """Streams a shard's samples in order.

    tokenizers_hash: when given, codes made by other tokenizers are refused. Members with other endings than ENDINGS
    are left out; links, devices, members over `max_member` bytes, names that point outside and second members of one
    name are listed in `Sample.refused`. Raises UserError, naming the shard, when it is missing, damaged, cut short,
    or made by other tokenizers.
    """
    path, sample = Path(path), None
    for name, content, reason in _members(path, max_member):
        if name == HEADER:
            check_header(path, parse_header(path, content), tokenizers_hash)
        if _META.match(name) or ("/" not in name and name.startswith("__") and name.endswith("__")):
            continue
        split = _SPLIT.fullmatch(name)
        if not split:
            continue
        key, ending = split[1], split[2].lower()
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            sample = Sample(key, {}, str(path))
        if ending in sample.members or ending in sample.refused:
            sample.refused[ending] = "two members of this name"
        elif content is None:
            sample.refused[ending] = reason
        else:
            sample.members[ending] = content
    if sample is not None:
        yield sample


def parse_header(path, content: bytes | None) -> dict:
    """Content of the header member -> dict. Raises UserError when it is no header of ours."""
    try:
        header = json.loads(content)
        if isinstance(header, dict) and isinstance(header.get("tokenizers"), str):
            return header
    except (TypeError, ValueError, RecursionError):
        pass
    raise UserError(f"{path}: its {HEADER} is broken; tokenize this shard again")


def read_header(path) -> dict | None:
    """The header of a codes shard, None for a raw shard (the header is the first member, or there is none)."""
    for name, content, _ in _members(Path(path), 1 << 20):
        return parse_header(path, content) if name == HEADER else None
    return None


def check_header(path, header: dict, tokenizers_hash: str | None) -> None:
    """Raises UserError when the codes were made by other tokenizers."""
    if tokenizers_hash is not None and header["tokenizers"] != tokenizers_hash:
        raise UserError(f"{path} holds codes of other tokenizers ({header['tokenizers']}, this run has "
                        f"{tokenizers_hash}); tokenize the shards again with this run's tokenizers")


# ---------------------------------------------------------------------------------------------------- codes


def codes_to_npy(codes: np.ndarray, n_codes: int) -> bytes:
    """Codes [first axis, second axis] -> .npy bytes, uint16, or uint32 for a codebook above 65,536 entries."""
    buffer = io.BytesIO()
    array = np.ascontiguousarray(codes, CODE_TYPES[n_codes > 65536])
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


@lru_cache(4096)
def _npy_header(header: bytes) -> tuple[np.dtype, tuple[int, int]]:
    """The text of a .npy header -> (type, shape). Cached: a million grids of one size share it."""
    fields = ast.literal_eval(header.decode("latin1").strip())
    dtype, shape = np.dtype(fields["descr"]), fields["shape"]
    if dtype not in CODE_TYPES or fields["fortran_order"] is not False:
        raise ValueError(f"type {fields['descr']}, codes are little-endian uint16 or uint32 in C order")
    if not (isinstance(shape, tuple) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
        raise ValueError(f"shape {shape}, codes are a grid [first axis, second axis]")
    return dtype, shape


def npy_to_codes(content: bytes) -> np.ndarray:
    """.npy bytes -> codes, read-only, uint16 or uint32 of two axes. Raises ValueError on anything else.

    Never unpickles: object arrays are refused by their type, before anything is read.
    """
    if len(content) < 10 or content[:8] != b"\x93NUMPY\x01\x00":
        raise ValueError("not a .npy file of version 1.0")
    start = 10 + struct.unpack("<H", content[8:10])[0]
    if start > 4096:
        raise ValueError("a .npy header of more than 4,096 bytes")
    try:
        dtype, shape = _npy_header(content[10:start])
    except (SyntaxError, TypeError, KeyError, RecursionError, MemoryError) as error:
        raise ValueError(f"a broken .npy header ({type(error).__name__})") from None
    if len(content) - start != shape[0] * shape[1] * dtype.itemsize:
        raise ValueError(f"{len(content) - start} bytes of data for a grid of shape {shape}")
    return np.frombuffer(content, dtype, offset=start).reshape(shape)
