"""CSV and TSV: records below a header. A record that cannot be read is dropped, and no part of it is taken for another.

Quotation marks are read strictly: a cell that begins with one ends with one, and those within are doubled. A TSV may be
quoted so (pandas, Excel) or hold them as characters like any other (Common Voice): its own cells tell which. The header
of a CSV tells what stands between its cells: a comma, a semicolon (Excel where numbers have decimal commas) or a tab.
"""

import csv
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from onevocab.data.convert.samples import Dropped
from onevocab.data.convert.streams import damaged, texts

MAX_RECORD = 16 << 20  # characters
# The csv module's own limit ends a record in the middle of a quoted cell, whose other lines it then takes for records.
csv.field_size_limit(2 * MAX_RECORD)


class _Records:
    """The lines of one table, as the csv reader takes them. taken: those of the record that is being read. Raises
    Dropped where one is longer than MAX_RECORD: nobody knows where the next one begins."""

    def __init__(self, text, name: str, **dialect):
        self.text, self.name, self.taken, self.size, self.line = text, name, [], 0, 0
        self.rows = csv.reader(self, strict=True, **dialect)

    def __iter__(self):
        return self

    def __next__(self) -> str:
        line = self.text.readline(MAX_RECORD + 1)
        if not line:
            raise StopIteration
        self.taken.append(line)
        self.size += len(line)
        if self.size > MAX_RECORD:
            raise Dropped("damaged input", f"{self.name}: the record from line {self.line + 1} on has more than "
                          f"{MAX_RECORD:,} characters; is a quotation mark not closed?")
        return line

    def read(self) -> list[str] | Dropped | None:
        """The cells of the next record, None after the last."""
        self.line += len(self.taken)
        self.taken.clear()
        self.size = 0
        try:
            return next(self.rows, None)
        except csv.Error as error:
            first, last = self.line + 1, self.line + len(self.taken)
            where = f"line {first}" if first == last else f"lines {first} to {last}"
            return Dropped("bad record", f"{where}: {error}: a quotation mark within a quoted cell is doubled")


def cells(path: Path, delimiter: str) -> Iterator[dict | Dropped]:
    """The records of a table as dicts by its header. Raises Dropped when it is damaged."""
    quoting = csv.QUOTE_NONE if delimiter == "\t" and not quoted(path) else csv.QUOTE_MINIMAL
    try:
        dialect = {"delimiter": delimiter} if delimiter == "\t" else _dialect(path)
        for text in texts(path):
            records, header = _Records(text, path.name, quoting=quoting, **dialect), None
            while (row := records.read()) is not None:
                if isinstance(row, Dropped):
                    if header is None:
                        raise Dropped("damaged input", f"{path.name}: its header cannot be read: {row.detail}")
                    yield row
                elif header is None:
                    header = [cell.strip() for cell in row] or None  # empty lines come before it
                    if twice := [cell for cell, count in Counter(filter(None, header or ())).items() if count > 1]:
                        raise Dropped("damaged input", f"{path.name}: its header names {twice[0]!r} twice, and each "
                                      "record would lose one of them: rename one")
                elif len(row) > len(header):
                    yield Dropped("bad record", "more cells than the header names")
                elif row:
                    yield dict.fromkeys(header) | dict(zip(header, row, strict=False))
    except damaged() as error:
        raise Dropped("damaged input", f"{path.name}: {error}") from None


def _dialect(path: Path) -> dict:
    """What stands between the cells of a CSV: the likeliest by its header, a comma where that says nothing; and whether
    a space follows it, which belongs to no cell."""
    header = _first_line(path)
    delimiter = max(",;\t", key=header.count)
    return {"delimiter": delimiter, "skipinitialspace": f"{delimiter} " in header}


def _first_line(path: Path) -> str:
    """The first that holds something, or its beginning; "" where there is none."""
    for text in texts(path):
        while line := text.readline(MAX_RECORD):
            if line.strip():
                return line
    return ""


@lru_cache(maxsize=64)
def quoted(path: Path) -> bool:
    """Whether a TSV is quoted. Each cell with a quotation mark or an end of line is a vote: for it where it is written
    as a quoting writer does, against it where not, as is each record that such a reader cannot read, or whose lines are
    all of the table's width. A quoted header is one for it; so are quoted cells with commas, as Excel writes them, if
    all cells with commas are quoted."""
    votes, commas, bare = 0, 0, 0
    try:
        for text in texts(path):
            records, width = _Records(text, path.name, delimiter="\t"), None
            while (row := records.read()) is not None:
                raw = "".join(records.taken)
                if width is None and row and not isinstance(row, Dropped):
                    width = len(row)
                    votes += all(f'"{cell}"' in raw for cell in row)
                elif isinstance(row, Dropped) or (row and len(row) != width) or _holds_rows(records.taken, width):
                    votes -= 1
                else:
                    for cell in row:
                        written = '"' + cell.replace('"', '""') + '"' in raw
                        if any(mark in cell for mark in '"\t\r\n'):
                            votes += 1 if written else -1
                        elif "," in cell:
                            commas, bare = commas + written, bare + (not written)
    except (Dropped, *damaged()):
        votes -= 1
    return votes + (0 if bare else commas) > 0


def _holds_rows(lines: list[str], width: int | None) -> bool:
    """Whether a record of several lines is as many rows: its quotation marks only happen to enclose them."""
    return len(lines) > 1 < (width or 0) and all(line.count("\t") == width - 1 for line in lines)
