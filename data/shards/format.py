"""Shards: plain webdataset tars, read as what they are: untrusted input.

A sample is the adjacent members that share a key; key and ending part at the first dot of the file's name, endings
are lower-cased (webdataset's own rule). A key that comes again later in its shard is a sample that fell apart: all
pieces are refused. Only the endings in ENDINGS are ever read, nothing is unpickled, and no path
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
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from onevocab.common.errors import UserError
from onevocab.tokenizers.modalities import MODALITIES

ENDINGS = frozenset(("json", "txt", "npy", *(end for media in MODALITIES.values() for end in media.shard_endings)))
MAX_MEMBER, MAX_NAME = 256 << 20, 4096  # bytes; characters of a member's name
MAX_EXTENSION = 64 << 10  # bytes of a header that extends the next one
HEADER_KEY, HEADER = "__header__/tokenizers", "__header__/tokenizers.json"
CODE_TYPES = (np.dtype("<u2"), np.dtype("<u4"))

SPECIAL, OUTSIDE = "a link, device or other special file", "its name points outside the shard"
DOUBLE, DAMAGED = "two members of this name", "the shard is damaged or cut short here"
SPLIT = ("its key comes again in the shard, its members do not stand side by side: make the tar with them sorted, "
         "`tar --sort=name`")

_SPLIT = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")


@dataclass(slots=True)
class Sample:
    """members: ending -> bytes; refused: ending -> why this member was not read (a link, too large, ...), and under ""
    what is wrong with the sample itself."""

    key: str
    members: dict[str, bytes]
    shard: str
    refused: dict[str, str] = field(default_factory=dict)


def list_shards(path) -> list[Path]:
    """A shard, a folder of shards, or a glob -> sorted paths; as much of a glob as exists is taken literally. Raises
    UserError when there is none."""
    path = str(path)
    if os.path.isdir(path):
        shards = sorted(Path(path).glob("*.tar"))
    elif os.path.isfile(path):
        shards = [Path(path)]
    else:
        shards = sorted(map(Path, glob.glob(_pattern(path), recursive=True)))
    shards = [shard for shard in shards if not shard.name.startswith(".")]
    if not shards:
        raise UserError(f"no shards at {path}: give a .tar file, a folder that holds some, or a glob")
    return shards


def _pattern(path: str) -> str:
    """A path as glob's pattern, the longest beginning that exists escaped: `run [v1]/*.tar` -> `run [[]v1]/*.tar`."""
    folders = Path(path).parts
    exist = next(n for n in range(len(folders), -1, -1) if os.path.lexists(os.path.join("", *folders[:n]) or "."))
    return os.path.join(glob.escape(os.path.join("", *folders[:exist])), *folders[exist:])


# ---------------------------------------------------------------------------------------------------- reading


def unsafe_name(name: str) -> bool:
    """Whether a member's name points outside. We never write to it, but who sends such a name means no good."""
    return name.startswith(("/", "\\")) or ".." in name.split("/") or "\0" in name


class Damaged(Exception):
    """What is wrong with a tar, and where."""


class _Member(tarfile.TarInfo):
    """A header that is not believed: those that extend the next one (long names, PAX) are bounded before they are read,
    since tarfile takes any length, and before Python 3.11.10 a time that grows with the square of one."""

    EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
                  tarfile.SOLARIS_XHDTYPE)

    def _proc_member(self, tar):
        if self.type in self.EXTENSIONS:
            if self.size > MAX_EXTENSION:
                raise Damaged(f"an extension header of {self.size:,} bytes")
            text = tar.fileobj.read(self.size)
            if re.search(rb"\d{200}", text):
                raise Damaged("an extension header full of digits")
            tar.fileobj.seek(self.offset + tarfile.BLOCKSIZE)
        return super()._proc_member(tar)


class Entry(NamedTuple):
    """A member that counts: offset and size of its content in bytes; refused: why it may not be read, or ""."""

    name: str
    offset: int
    size: int
    refused: str


def entries(file) -> Iterator[Entry]:
    """The members of an open plain tar that are no folders and have one of ENDINGS, or are refused.

    tarfile takes a cut or overwritten header for the end of the archive; so what follows the last member must be the
    end marker and then nothing but zeros, or the tar is damaged. Raises Damaged.
    """
    total = os.fstat(file.fileno()).st_size
    try:
        tar = tarfile.open(fileobj=file, mode="r:", tarinfo=_Member)
        reached = -1
        while (info := tar.next()) is not None:
            tar.members.clear()  # tarfile would keep every header of the shard
            if info.size < 0 or info.offset_data <= reached:
                raise tarfile.ReadError(f"impossible size of {info.name!r}")
            reached = info.offset_data
            if info.isdir():
                continue
            refused = ""
            if len(info.name) > MAX_NAME:
                raise tarfile.ReadError(f"a name of {len(info.name):,} characters")
            if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.issparse():
                refused = SPECIAL
            elif unsafe_name(info.name):
                refused = OUTSIDE
            elif info.name.rpartition(".")[2].lower() not in ENDINGS:
                continue
            elif info.offset_data + info.size > total:
                yield Entry(info.name, 0, 0, DAMAGED)
                raise tarfile.ReadError(f"{info.name!r} is not whole")
            yield Entry(info.name, info.offset_data, info.size, refused)
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end marker at byte {tar.offset:,}")
        while piece := file.read(1 << 20):
            if piece.strip(b"\0"):
                raise tarfile.ReadError(f"its end marker is at byte {tar.offset:,}, but more follows, as when tars are "
                                        "joined by `cat` instead of `tar --concatenate`")
    except (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError, OSError) as error:
        raise Damaged(str(error)) from None


def is_meta(name: str) -> bool:
    """Whether a member is about the shard and belongs to no sample: webdataset's own rule."""
    return bool(_META.match(name)) or ("/" not in name and name.startswith("__") and name.endswith("__"))


def split_name(name: str) -> tuple[str, str] | None:
    """A member's name -> (key, ending in lower case); None where it has no ending."""
    split = _SPLIT.fullmatch(name)
    return (split[1], split[2].lower()) if split else None


def too_large(size: int, max_member: int) -> str:
    """Why a member of so many bytes is refused."""
    return f"{size:,} bytes, more than the {max_member:,} allowed"


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """The open shard. Raises UserError, also where it turns out to be damaged."""
    try:
        file = open(path, "rb")
    except OSError as error:
        raise UserError(f"cannot read shard {path}: {error.strerror}") from None
    with file:
        try:
            yield file
        except (Damaged, OSError) as error:
            raise UserError(f"{path} is damaged or cut short ({error}); fetch or make this shard again") from None


def _read(file, entry: Entry, max_member: int) -> tuple[bytes | None, str]:
    """A member's content or None, and why it is None."""
    refused = entry.refused or (too_large(entry.size, max_member) if entry.size > max_member else "")
    if refused:
        return None, refused
    file.seek(entry.offset)
    return file.read(entry.size), ""


def split_keys(keys: list[str]) -> set[str]:
    """Of the keys of groups of adjacent members those that come more than once: pieces of samples that fell apart."""
    return {key for key, count in Counter(keys).items() if count > 1}


def read_shard(path, tokenizers_hash: str | None = None, max_member: int = MAX_MEMBER) -> Iterator[Sample]:
    """A shard's samples in order, after one look at all its headers; one sample is in memory at a time.

    tokenizers_hash: when given, codes made by other tokenizers are refused. Members with other endings than ENDINGS
    are left out; links, devices, members over `max_member` bytes, names that point outside, second members of one
    name, and every piece of a sample whose key comes again later are listed in `Sample.refused`. Raises UserError,
    naming the shard, when it is missing, damaged, cut short, or made by other tokenizers.
    """
    path = Path(path)
    with _reading(path) as file:
        groups: list[tuple[str, list[tuple[str, Entry]]]] = []  # (key, [(ending, member)])
        headers, damage = [], None
        try:
            for entry in entries(file):
                if entry.name == HEADER:
                    headers.append(entry)
                split = None if is_meta(entry.name) else split_name(entry.name)
                if split is None:
                    continue
                if not groups or split[0] != groups[-1][0]:
                    groups.append((split[0], []))
                groups[-1][1].append((split[1], entry))
        except (Damaged, OSError) as error:
            damage = error
        for entry in headers:
            check_header(path, parse_header(path, _read(file, entry, max_member)[0]), tokenizers_hash)
        split_up = split_keys([key for key, _ in groups])
        for key, members in groups[:-1] if damage else groups:  # nobody knows whether the last sample is complete
            sample = Sample(key, {}, str(path), {"": SPLIT} if key in split_up else {})
            for ending, entry in members:
                if ending in sample.members or ending in sample.refused:
                    sample.refused[ending] = DOUBLE
                    continue
                content, reason = _read(file, entry, max_member)
                if content is None:
                    sample.refused[ending] = reason
                else:
                    sample.members[ending] = content
            yield sample
        if damage:
            raise damage


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
    with _reading(Path(path)) as file:
        first = next(entries(file), None)
        return parse_header(path, _read(file, first, 1 << 20)[0]) if first and first.name == HEADER else None


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
