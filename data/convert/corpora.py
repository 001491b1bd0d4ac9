"""Plain text: .txt by file, paragraph or line, and JSON lines with a text in a field."""

from collections.abc import Iterator
from pathlib import Path

from onevocab.data.convert import streams, tables
from onevocab.data.convert.options import MAP, Format, Option, positive
from onevocab.data.convert.samples import Converted, Dropped, Row, field_of, text_of
from onevocab.data.convert.walking import walk
from onevocab.tokenizers.document import plain_document

MAX_TEXT = 64 << 20  # bytes of one document
BY = Option("by", "what of a .txt is a document (default: paragraph, between empty lines)",
            choices=("file", "paragraph", "line"), default="paragraph")
MAX_CHARS = Option("max_chars", "cut longer documents, at a paragraph, sentence or space", positive, metavar="N")
_CUTS = ("\n\n", "\n", ". ", " ")


def pieces(text: str, limit: int | None) -> Iterator[str]:
    """Cuts what is longer than `limit` characters, in its second half at an empty line, else at the end of a line, of a
    sentence, of a word."""
    start = 0
    while limit and len(text) - start > limit:
        half, whole = start + limit // 2, start + limit
        cut = next((at + len(mark) for mark in _CUTS if (at := text.rfind(mark, half, whole)) >= 0), whole)
        yield text[start:cut].strip()
        start = cut
    yield text[start:].strip()


def _units(options) -> list[Path]:
    """The folder for all .txt in it, however many and small they are, and each file of lines; a file alone is itself.
    The others are counted."""
    kinds = (".txt", *tables.LINES)
    if not options.source.is_dir():
        return tables.files_of(options, kinds)
    options.passed_over |= {str(Path(place, name)): Dropped("unknown ending") for place, names in walk(options)
                            for name in names if tables.kind_of(Path(name)) not in kinds}
    files = tables.files_of(options, kinds)
    records = [path for path in files if tables.kind_of(path) != ".txt"]
    return [options.source, *records] if len(records) < len(files) else records


def _rows(options, unit: Path) -> Iterator[Row]:
    if not unit.is_dir():
        yield from _rows_of(options, unit, unit.name)
        return
    for path in tables.files_of(options, (".txt",)):
        place = path.relative_to(unit).as_posix()
        try:
            yield from _rows_of(options, path, place)
        except Dropped as dropped:  # one file of many
            yield place, dropped


def _rows_of(options, path: Path, place: str) -> Iterator[Row]:
    if tables.kind_of(path) != ".txt":
        yield from tables.rows(path)
        return
    for number, text in enumerate(_texts(options.by, path)):
        yield f"{place}#{number}", text


def _texts(by: str, path: Path) -> Iterator[str | Dropped]:
    held, size = [], 0
    for line in streams.lines(path, empty=True):
        if by == "line" or (by == "paragraph" and not line.strip()):
            held.append(line)
            yield from _text(held, size)
            held, size = [], 0
        else:
            size += len(line)
            if size <= MAX_TEXT:
                held.append(line)
    yield from _text(held, size)


def _text(lines: list[bytes], size: int) -> Iterator[str | Dropped]:
    """What is not UTF-8 is kept as what no encoding takes, so that only this document is dropped."""
    text = b"".join(lines).decode("utf-8", "surrogateescape").removeprefix("\ufeff").strip()
    if size > MAX_TEXT:
        yield Dropped("too large", f"a text of {size:,} bytes, {MAX_TEXT:,} are allowed")
    elif text:
        yield text


def _make(options, name: str, record) -> Iterator[Converted | Dropped]:
    text = record if isinstance(record, str) else text_of(field_of(record, options.map.get("text", "text")))
    for piece in pieces(text.replace("\r\n", "\n"), options.max_chars):
        yield Converted(plain_document([("text", piece)])) if piece else Dropped("empty text")


FORMATS = {
    "text": Format("plain text: .txt, or JSON lines with a field of text, also compressed",
                   _units, _rows, _make, (BY, MAX_CHARS, MAP), ("text",)),
}
