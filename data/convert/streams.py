"""Files of records as streams and lines: unpacked while they are read (`.gz`, `.zip`; `.zst` with the package
zstandard), and as UTF-8. What begins with the mark of UTF-16 or UTF-32 is decoded so; others are not guessed."""

import codecs
import gzip
import io
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from onevocab.data.convert.samples import Dropped
from onevocab.data.shards.remote import unpacked_zstd

MAX_LINE = 64 << 20  # bytes
PACKED = (".gz", ".zip", ".zst")
_DAMAGED = (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError, UnicodeError)


def encoding_of(start: bytes) -> str:
    """Python's name of the encoding by the first four bytes: UTF-16 or UTF-32 with their mark, else UTF-8."""
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def streams(path: Path) -> Iterator[io.BufferedIOBase]:
    """The file, unpacked while it is read; of an archive each member, in the order of their names."""
    if path.suffix.lower() == ".gz":
        with gzip.open(path) as file:
            yield file
    elif path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if not name.endswith("/"):
                    with archive.open(name) as file:
                        yield file
    elif path.suffix.lower() == ".zst":
        with open(path, "rb") as packed:
            yield io.BufferedReader(unpacked_zstd(packed, path))
    else:
        with open(path, "rb") as file:
            yield file


def texts(path: Path) -> Iterator[io.TextIOWrapper]:
    """`streams`, decoded, ends of lines kept. What is not UTF-8 stays in the text as what no encoding takes: that
    record is dropped, the others are not."""
    for file in streams(path):
        encoding = encoding_of(file.peek(4)[:4])
        errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
        yield io.TextIOWrapper(file, encoding=encoding, errors=errors, newline="")


def lines(path: Path, empty: bool = False) -> Iterator[bytes]:
    """The lines, those that hold something unless `empty`. Raises Dropped when the file is damaged, or a line is longer
    than MAX_LINE."""
    try:
        for file in streams(path):
            if (encoding := encoding_of(file.peek(4)[:4])) != "utf-8-sig":
                file = _Recoded(file, encoding)
            while line := file.readline(MAX_LINE + 1):
                if len(line) > MAX_LINE:
                    raise Dropped("damaged input", f"{path.name} has a line of more than {MAX_LINE:,} bytes")
                if empty or line.strip():
                    yield line
    except damaged() as error:
        raise Dropped("damaged input", f"{path.name}: {error}") from None


class _Recoded(io.TextIOWrapper):
    """A stream of another encoding, whose lines are UTF-8."""

    def __init__(self, file, encoding: str):
        super().__init__(file, encoding, newline="\n")

    def readline(self, size: int = -1) -> bytes:
        return super().readline(size).encode("utf-8", "surrogatepass")


def damaged() -> tuple:
    """What reading a damaged file raises."""
    zstandard = sys.modules.get("zstandard")
    return (*_DAMAGED, zstandard.ZstdError) if zstandard else _DAMAGED
