"""Shards that are compressed or lie elsewhere: copied to a local folder, whole or not at all, and used like any shard.

    cache = ShardCache("/fast/shards", max_bytes=200 << 30)
    for source in list_sources("s3://bucket/set/{000..099}.tar"):
        with cache.open(source) as shard: ...

A plain tar on a local disk is used where it lies. What is fetched is kept as a plain tar under a name of ours, never
one from a URL or an archive, with its index beside it. Credentials are the storage library's business (environment,
configuration files); messages show a URL without them.
"""

import gzip
import hashlib
import io
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

from onevocab.common.errors import UserError
from onevocab.common.files import locked
from onevocab.data.shards.format import Sample, list_shards
from onevocab.data.shards.index import IndexedShard, build_index, index_path, read_indexed

# Protocol -> what to install for it. Others are refused: `pipe:` runs a shell, and some of fsspec's nest in each other.
PROTOCOLS = {"http": "fsspec[http]", "https": "fsspec[http]", "s3": "fsspec[s3]", "gs": "fsspec[gs]",
             "gcs": "fsspec[gcs]", "az": "fsspec[abfs]", "abfs": "fsspec[abfs]", "hf": "huggingface_hub"}
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst")
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # what files of these kinds begin with
PIECE = 1 << 20  # bytes copied at once
VARIABLE = "ONEVOCAB_SHARD_CACHE"
_OURS = re.compile(r"[0-9a-f]{32}-[\w-]*\.tar", re.ASCII)  # nothing else in the folder is ever removed
log = logging.getLogger("onevocab.data")


def is_remote(source) -> bool:
    return "://" in str(source)


def placed(folder: Path, path: str) -> str:
    """A path that starts from a folder, which need not be there yet, as it is found from here; an address stays."""
    if is_remote(path):
        return path
    return os.path.normpath(folder.resolve() / path) if ".." in Path(path).parts else str(folder / path)


def shown(source) -> str:
    """A source as messages show it: without user, password and query, which may be secret."""
    source = str(source)
    return re.sub(r"//[^/]*@", "//", source.partition("?")[0]) if is_remote(source) else source


def list_sources(path) -> list[str]:
    """Sources of shards in a fixed order: of a URL, whose `{000..099}` and, outside http, `*` are expanded; or of what
    `list_shards` takes, where a folder's compressed shards count too. Raises UserError when there is none, or when a
    folder holds the same shard compressed and not."""
    path, sources, shards = str(path), [], []
    if is_remote(path):
        from webdataset.shardlists import expand_urls  # which imports torch

        with _failing(path):
            for url in expand_urls(path):
                if "*" in url and not url.startswith(("http:", "https:")):
                    storage, pattern = _storage(url)
                    sources += [storage.unstrip_protocol(name) for name in sorted(storage.glob(pattern))]
                else:
                    sources.append(url)
        if not sources:
            raise UserError(f"no shards at {shown(path)}; check the address")
        return sources
    if os.path.isdir(path):
        names = [entry.name for entry in Path(path).iterdir()]
        shards = sorted(name for name in names if name.endswith(SUFFIXES) and not name.startswith("."))
        stems = sorted(map(_stem, shards))
        double = next((a for a, b in zip(stems, stems[1:], strict=False) if a == b), None)
        if double:
            raise UserError(f"{path} holds {double} more than once, compressed and not: its samples would count twice; "
                            "remove one")
    return [os.path.join(path, name) for name in shards] or [str(shard) for shard in list_shards(path)]


class ShardCache:
    """Local copies of compressed and remote shards, at most `max_bytes` of them; those asked for longest ago go first.

    Any number of processes may share the folder; one of them copies a shard, the others wait for it. A shard that was
    asked for in the last `keep_seconds` stays, even above the limit: somebody may be about to open it. One that is
    open may go; its reader keeps it until it closes it. What a URL holds is taken not to change; a local compressed
    shard may.

    folder: by default the one that the environment variable names, else `onevocab/shards` in the user's cache, which
    is looked up when there is something to copy.
    """

    def __init__(self, folder=None, max_bytes: int = 100 << 30, keep_seconds: float = 60.0):
        self.max_bytes, self.keep_seconds = max_bytes, keep_seconds
        if folder is not None:
            self.folder = Path(folder)

    @cached_property
    def folder(self) -> Path:
        if chosen := os.environ.get(VARIABLE):
            return Path(chosen)
        try:
            return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "onevocab" / "shards"
        except RuntimeError:  # no HOME, and no entry in the list of users
            raise UserError(f"compressed and remote shards are copied to a folder first, and this user has no home for "
                            f"one: name a folder by {VARIABLE}") from None

    def open(self, source, **options) -> IndexedShard:
        """A shard of any kind, ready to be read; `Sample.shard` says where it came from. options: IndexedShard's."""
        return IndexedShard(self.fetch(source), name=shown(source), **options)

    def fetch(self, source) -> Path:
        """The plain tar of a source: a local one as it is, any other as a copy in the folder, with its index.

        Raises UserError when the source is missing, cannot be fetched or decompressed to its end, is larger than the
        folder may be, needs a package that is not installed, or when the folder cannot be made.
        """
        source = str(source)
        identity = [source]
        if not is_remote(source):
            try:
                stat = os.stat(source)
                with open(source, "rb") as file:
                    start = file.read(len(ZSTD))
            except OSError as error:
                raise UserError(f"cannot read shard {source}: {error.strerror}") from None
            if not start.startswith((GZIP, ZSTD)):
                return Path(source)
            identity = [os.path.abspath(source), str(stat.st_size), str(stat.st_mtime_ns)]
        digest = hashlib.sha256("\n".join(identity).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        readable = re.sub(r"[^A-Za-z0-9_-]+", "_", _stem(shown(source).rpartition("/")[2]))[:64]
        shard = self.folder / f"{digest}-{readable}.tar"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {self.folder} for shards: {error.strerror}; choose another by "
                            f"{VARIABLE}") from None
        with locked(_lock_of(shard)):
            try:  # it was asked for now; its other time is the one that its index knows
                with suppress(PermissionError):  # another user's copy
                    os.utime(shard, ns=(time.time_ns(), shard.stat().st_mtime_ns))
            except FileNotFoundError:
                self._copy(source, shard)
            else:
                if build_index(shard).damage:  # a download that was cut, perhaps: once more
                    self._copy(source, shard)
            build_index(shard)
        return shard

    def _copy(self, source: str, shard: Path) -> None:
        """Writes aside; the lock makes that file ours alone, so what a killed process left there is overwritten."""
        aside, size = shard.with_name(f".{shard.name}.part"), 0
        try:
            with _failing(source), _open(source) as file, open(aside, "wb") as out:
                counted = _Counted(file)
                stream = _decompressed(io.BufferedReader(counted, PIECE), source)
                while piece := stream.read(PIECE):
                    size += len(piece)
                    if size > self.max_bytes:
                        raise UserError(f"{shown(source)} is larger than the {self.max_bytes:,} bytes that "
                                        f"{self.folder} may hold; allow more")
                    out.write(piece)
                expected = getattr(file, "size", None)
                if isinstance(expected, int) and counted.count < expected:
                    raise UserError(f"only {counted.count:,} of {expected:,} bytes of {shown(source)} came; try again")
                out.flush()
                os.fsync(out.fileno())
            self._make_room(size)
            os.replace(aside, shard)
        finally:
            aside.unlink(missing_ok=True)
        log.info("%s is now %s, %d bytes", shown(source), shard, size)

    def _make_room(self, needed: int) -> None:
        copies = []
        for shard in self.folder.iterdir():
            if _OURS.fullmatch(shard.name):
                try:
                    stat = shard.stat()
                except FileNotFoundError:  # another process makes room too
                    continue
                copies.append((stat.st_atime_ns, stat.st_size, shard))
        total = sum(size for _, size, _ in copies)
        for asked, size, shard in sorted(copies):
            if total + needed <= self.max_bytes or time.time_ns() - asked < self.keep_seconds * 1e9:
                break
            with suppress(BlockingIOError), locked(_lock_of(shard), wait=False):  # else somebody is asking for it
                if shard.exists() and shard.stat().st_atime_ns == asked:
                    shard.unlink()
                    index_path(shard).unlink(missing_ok=True)
                    total -= size


def read_source(source) -> Iterator[Sample]:
    """The samples of a raw shard of any kind; of a damaged one those before the damage. Raises UserError when it cannot
    be read."""
    yield from read_indexed(ShardCache().fetch(source), verify=True, salvage=True, name=shown(source))


def local_name(source) -> str:
    """`s3://bucket/a/x.tar.gz` -> `x.tar`."""
    return _stem(shown(source).rpartition("/")[2]) + ".tar"


def _lock_of(shard: Path) -> Path:
    return shard.with_name(f".{shard.name}.lock")


def _stem(name: str) -> str:
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)


@contextmanager
def _failing(source: str) -> Iterator[None]:
    """Storage libraries and decompressors raise errors of their own: each becomes a UserError that names the source."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        what = re.sub(r"\?[^\s'\")]*|(?<=//)[^/\s]*@", "", f"{type(error).__name__}: {error}")  # libraries show secrets
        if not is_remote(source):
            raise UserError(f"cannot decompress {source} ({what}): damaged or cut short; fetch it again") from None
        raise UserError(f"cannot fetch {shown(source)} ({what}); check the address, your access and the disk") from None


def _storage(url: str):
    """A remote source's file system and its path there. Raises UserError for protocols that are not in PROTOCOLS."""
    protocol = url.partition("://")[0].lower()
    if protocol not in PROTOCOLS or "::" in url:
        raise UserError(f"{shown(url)}: shards come from a local path or from {', '.join(PROTOCOLS)}; copy it to one")
    try:
        from fsspec import url_to_fs

        return url_to_fs(url)
    except ImportError:
        raise UserError(f"{shown(url)} needs a package that is not installed: pip install '{PROTOCOLS[protocol]}', or "
                        "copy it to a local path") from None


def _open(source: str):
    if not is_remote(source):
        return open(source, "rb")
    storage, path = _storage(source)
    return storage.open(path, "rb")


class _Counted(io.RawIOBase):
    """What a BufferedReader needs of any file; counts the bytes, and gives enough at once to see what kind it is."""

    def __init__(self, file):
        self._file, self.count = file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        piece = self._file.read(len(buffer))
        while 0 < len(piece) < len(ZSTD) <= len(buffer) and (more := self._file.read(len(buffer) - len(piece))):
            piece += more
        buffer[: len(piece)] = piece
        self.count += len(piece)
        return len(piece)


def _decompressed(stream: io.BufferedReader, source: str):
    """A stream of the plain tar, by what the file begins with: servers decompress some files on the way."""
    start = stream.peek(len(ZSTD))
    if start.startswith(GZIP):
        return gzip.GzipFile(fileobj=stream, mode="rb")
    return unpacked_zstd(stream, source) if start.startswith(ZSTD) else stream


def unpacked_zstd(stream, source):
    """A stream of what a zstd file holds. Raises UserError without the package zstandard."""
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{shown(source)} is compressed by zstd: pip install zstandard, or decompress it") from None
    # The window bounds the memory that a hostile file can ask for.
    return zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(stream, read_across_frames=True)
