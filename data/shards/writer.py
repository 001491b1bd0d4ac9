"""Writes shards: whole or absent, the same bytes for the same samples, each with an index of what was written."""

import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import webdataset

from onevocab.common.errors import UserError
from onevocab.common.files import claim_file
from onevocab.data.shards.format import ENDINGS, HEADER_KEY, MAX_NAME, is_meta, split_name, unsafe_name
from onevocab.data.shards.index import build_index, index_path


class ShardFile:
    """One shard, written aside with webdataset's own writer and renamed when it is complete.

    The same samples give the same bytes: no times, one owner, members of a sample in alphabetical order. Used as a
    context manager; after an exception nothing is left under `path`, and what a killed process left aside is written
    over. Raises UserError when another process is writing this shard, and when the system refuses to write (a full
    disk).
    """

    def __init__(self, path, header: dict | None = None):
        self.path, self.samples, self._keys = Path(path), 0, set()
        self._aside = self.path.with_name(f".{self.path.name}.part")
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = claim_file(self._aside)
        if self._file is None:
            raise UserError(f"another process is writing {self.path}: wait for it, or choose another folder")
        self._tar = webdataset.TarWriter(self._file, user="onevocab", group="onevocab", encoder=False, mtime=0)
        if header is not None:
            with self._writing():
                content = json.dumps(header, sort_keys=True).encode()
                self._tar.write({"__key__": HEADER_KEY, "json": content})

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}; make room, or choose another folder "
                            "(finished shards are kept)") from None

    def write(self, key: str, members: dict[str, bytes]) -> None:
        """Adds a sample. Raises ValueError on a key or an ending that would not be read back."""
        if split_name(key + ".x") != (key, "x") or is_meta(key) or unsafe_name(key) or key in self._keys:
            raise ValueError(f"bad or repeated sample key {key!r}: no dots in its last part, and each one once")
        for ending in members:
            known = ending == ending.lower() and ending.rpartition(".")[2] in ENDINGS
            if not known or "/" in ending or ending.startswith("_"):
                raise ValueError(f"sample {key}: a member may not end in {ending!r}; use {sorted(ENDINGS)}")
            if len(key) + 1 + len(ending) > MAX_NAME:
                raise ValueError(f"sample {key[:100]}...: a name of more than {MAX_NAME:,} characters")
        with self._writing():
            self._tar.write({"__key__": key, **members})
        self._keys.add(key)
        self.samples += 1

    def close(self) -> None:
        """Completes the shard: end marker, fsync, rename; then the index, by which later damage is noticed."""
        try:
            with self._writing():
                self._tar.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                index_path(self.path).unlink(missing_ok=True)  # of a shard that this one replaces
                os.replace(self._aside, self.path)
                self._file.close()
        except BaseException:
            self.discard()
            raise
        build_index(self.path, must_save=False, anew=True)

    def discard(self) -> None:
        """Leaves nothing behind."""
        with suppress(OSError, ValueError):  # the disk is full, or it is closed already
            self._tar.close()
        with suppress(OSError, ValueError):  # only while we hold its lock it is ours to remove
            if os.path.samestat(os.stat(self._aside), os.fstat(self._file.fileno())):
                self._aside.unlink()
        with suppress(OSError, ValueError):
            self._file.close()

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
            index_path(old).unlink(missing_ok=True)

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
