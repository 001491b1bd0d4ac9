"""Records of published files: JSON, JSON lines, CSV, TSV, and columns (parquet, arrow) through pyarrow.

All but columns may be compressed. A record that cannot be read takes the place of a record as a `Dropped`, so that the
others of its file are read; a file that is damaged raises one.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

from onevocab.common.errors import UserError
from onevocab.common.files import single_keys
from onevocab.data.convert import cells
from onevocab.data.convert.samples import Dropped, Row
from onevocab.data.convert.streams import PACKED, damaged, lines, streams
from onevocab.data.convert.walking import walk

BATCH = 64  # rows of columns in memory at once: a row may hold pictures
LINES, COLUMNS = (".jsonl", ".ndjson"), (".parquet", ".arrow")
TABLES = (".json", *LINES, ".csv", ".tsv", *COLUMNS)
MAX_DOCUMENT = 1 << 30  # bytes of a compressed file that is one JSON document


def kind_of(path: Path) -> str:
    """".jsonl" of `a.jsonl` and `a.jsonl.gz`. Compressed `.json` is taken for lines, as C4 is published; see `rows`."""
    name = Path(path.name.lower())
    inner = Path(name.stem).suffix
    if name.suffix in PACKED and inner in (".txt", ".csv", ".tsv", ".json", *LINES):
        return ".jsonl" if inner == ".json" else inner
    return name.suffix


def files_of(options, kinds: tuple[str, ...] = TABLES, pattern: str = "*") -> list[Path]:
    """The source, a file, or those of a folder and the folders in it, in a fixed order. Raises UserError when there is
    none."""
    source = options.source
    if source.is_file():
        if kind_of(source) not in kinds:
            raise UserError(f"{source}: this format reads {' '.join(kinds)}")
        return [source]
    files = sorted(source / place / name for place, names in walk(options) for name in names
                   if fnmatchcase(name, pattern) and kind_of(Path(name)) in kinds)
    if not files:
        passed = [f"; {place} is passed over ({why})" for place, why in options.passed_over.items()]
        raise UserError(f"{source} holds no file that this format reads ({pattern} ending in {' '.join(kinds)})"
                        + "".join(passed[:1]))
    return files


@lru_cache(maxsize=2)
def document(path: Path):
    """A whole JSON file. The last two are kept, since a file may be read in several parts. Raises Dropped."""
    try:
        if path.suffix.lower() not in PACKED:
            content = path.read_bytes()
        else:
            content = b"".join(file.read(MAX_DOCUMENT + 1) for file in streams(path))
            if len(content) > MAX_DOCUMENT:
                raise Dropped("damaged input", f"{path.name} unpacks to more than {MAX_DOCUMENT:,} bytes; make it "
                              "lines")
        value = json.loads(content, object_pairs_hook=_object)
        if isinstance(value, Dropped):
            raise Dropped("damaged input", f"{path.name}: {value.detail}")
        return value
    except (ValueError, RecursionError) as error:
        raise Dropped("damaged input", f"{path.name} is not valid JSON ({error}); if each line is a "
                      "record, call it .jsonl") from None
    except damaged() as error:
        raise Dropped("damaged input", f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def listed(value) -> list | None:
    """The records of a JSON document: a list, or the only list of an object if it holds objects."""
    if isinstance(value, dict):
        lists = [held for held in value.values() if isinstance(held, list)]
        return lists[0] if len(lists) == 1 and any(isinstance(item, dict) for item in lists[0]) else None
    return value if isinstance(value, list) else None


def objects(path: Path, key: str) -> list[dict]:
    """The list of objects under a key of a JSON file; what is no object becomes an empty one. Raises Dropped."""
    value = document(path)
    value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, list):
        raise Dropped("damaged input", f"{path.name} has no list {key!r}")
    return [item if isinstance(item, dict) else {} for item in value]


def rows(path: Path) -> Iterator[Row]:
    """The records of any of TABLES: (`name#number`, record). Raises Dropped when the file is damaged."""
    kind = kind_of(path)
    if kind == ".json" or _packs_list(path):
        value = listed(document(path))
        if value is None:
            raise Dropped("damaged input", f"{path.name} is not a list of records, nor an object with one such list")
        records = iter(value)
    elif kind in LINES:
        records = map(record_of, lines(path))
    elif kind in COLUMNS:
        records = columns(path)
    else:
        records = cells.cells(path, "\t" if kind == ".tsv" else ",")
    return ((f"{path.name}#{number}", record) for number, record in enumerate(records))


def _packs_list(path: Path) -> bool:
    """Whether a compressed `.json` is a list, and not lines."""
    if not path.name.lower().endswith((".json.gz", ".json.zst")):
        return False
    try:
        return any(file.read(64).lstrip().startswith(b"[") for file in streams(path))
    except damaged() as error:
        raise Dropped("damaged input", f"{path.name}: {error}") from None


def units_of(*kinds: str) -> Callable[..., list[Path]]:
    """A format's `units`: the input, or the files of these kinds in it."""
    return lambda options: files_of(options, kinds)


def rows_of(options, unit: Path) -> Iterator[Row]:
    """A format's `rows`: the records as they are."""
    return rows(unit)


def record_of(line: bytes):
    """JSON -> value, or the Dropped that says why not."""
    try:
        return json.loads(line, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        return Dropped("bad record", f"not valid JSON ({error})")


def _object(pairs: list[tuple]) -> dict | Dropped:
    """For json.loads: an object; a Dropped stands in the place of one that would lose something."""
    try:
        return single_keys(pairs)
    except ValueError as error:
        return Dropped("bad record", str(error))


# ------------------------------------------------------------------------------------------------ columns


def _pyarrow():
    try:
        import pyarrow.ipc
        import pyarrow.parquet
        import pyarrow.types
    except ImportError as error:
        raise UserError(f"parquet and arrow files need pyarrow ({error}); run `pip install 'onevocab[convert]'` "
                        "(from a clone: pip install -e '.[convert]')") from None
    return pyarrow


@contextmanager
def _open_columns(pyarrow, path: Path):
    """(schema, its batches) of a parquet file, or of an arrow file or stream (`save_to_disk` writes streams)."""
    if kind_of(path) == ".parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file.schema_arrow, file.iter_batches(batch_size=BATCH)
    else:
        with pyarrow.memory_map(str(path)) as source:
            if source.read(6) == b"ARROW1":
                reader = pyarrow.ipc.open_file(source)
                yield reader.schema, map(reader.get_batch, range(reader.num_record_batches))
            else:
                source.seek(0)
                reader = pyarrow.ipc.open_stream(source)
                yield reader.schema, reader


def columns(path: Path) -> Iterator[dict]:
    """The rows of a parquet or arrow file, a few at a time. Raises Dropped when it is damaged, UserError without
    pyarrow."""
    pyarrow = _pyarrow()
    try:
        with _open_columns(pyarrow, path) as (_, batches):
            for batch in batches:
                batch.validate(full=True)  # arrow believes a file's offsets, and this one is a stranger's
                for start in range(0, batch.num_rows, BATCH):
                    yield from batch.slice(start, BATCH).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise Dropped("damaged input", f"{path.name}: {error}") from None


def column_names(path: Path) -> tuple[list[str], list[str], list[str]]:
    """(all columns, those that hold files: bytes, or `{bytes, path}` or `{array, sampling_rate}` as `datasets` stores
    them, or lists of these; those that hold texts, or lists of these). Raises as `columns` does."""
    pyarrow = _pyarrow()
    try:
        with _open_columns(pyarrow, path) as (schema, _):
            return schema.names, *([field.name for field in schema if holds(pyarrow.types, field.type)]
                                   for holds in (_holds_files, _holds_texts))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise Dropped("damaged input", f"{path.name}: {error}") from None


def _item(types, kind):
    while types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
    return kind


def _holds_texts(types, kind) -> bool:
    kind = _item(types, kind)
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind)


def _holds_files(types, kind) -> bool:
    kind = _item(types, kind)
    if types.is_struct(kind):
        names = {field.name for field in kind}
        return {"bytes", "path"} <= names or {"array", "sampling_rate"} <= names
    return types.is_binary(kind) or types.is_large_binary(kind)
