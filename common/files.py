"""Files that are either whole or absent, and hashes that say what is in them."""

import fcntl
import hashlib
import json
import os
import secrets
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from onevocab.common.errors import UserError


def write_atomic(path, content: bytes | str) -> None:
    """Writes aside, fsyncs and renames, so that a crash never leaves half a file under `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process's number: machines that share a disk share those.
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(aside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def check_writable(folder) -> None:
    """Whether files can be made in a folder, which need not be there yet. Raises UserError; leaves nothing behind."""
    folder = Path(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"cannot write into {folder}: {there} is no folder")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror or error}; make it writable, or choose another "
                        "folder") from None


def sync(path) -> None:
    """Waits until the disk has a file's bytes, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path, wait: bool = True) -> Iterator[None]:
    """One process at a time holds the file `path`; the lock goes with its process, however that ends. Without `wait`
    raises BlockingIOError when another one has it."""
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def claim_file(path: Path) -> BinaryIO | None:
    """The empty file `path`, open for writing and locked, or None while another process has it. The lock goes with its
    process, however that ends."""
    while True:
        file = open(path, "ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                file.truncate(0)
                return file
        file.close()  # whoever had it has just renamed it


def sha256_file(path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value) -> str:
    """First 16 hex digits of the SHA-256 of a JSON value; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def read_json(path):
    """Parses a JSON file. Raises UserError, naming the file, when it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore it or make it again") from None


def read_toml(path, name=None) -> dict:
    """Parses a TOML file, whatever mark an editor left before it. Raises UserError, which calls it `name` (default: its
    path), when it is no TOML, and OSError when it cannot be read."""
    try:
        return tomllib.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise UserError(f"{name or path} is not UTF-8 ({where}): save it as UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{name or path} is not valid TOML: {error}") from None


def write_json(path, value) -> None:
    """Writes a JSON file atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def single_keys(pairs: list[tuple[str, object]]) -> dict:
    """For json.loads(object_pairs_hook=...): the object. Raises ValueError where a key comes twice, of which a dict
    would keep the last."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)[:80]!r} comes twice in an object")
    return value
