"""Files with captions: a folder of media with captions beside them, or a table that names files and captions.

A medium and a caption become a plain document of two parts; a file with several captions gives as many documents.
"""

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path

from onevocab.data.convert import tables
from onevocab.data.convert.media import KINDS, VIDEO, MediaFolder, kind_of, suffix_of
from onevocab.data.convert.options import CAPTIONS, FRAMES, MAP, MEDIA, Format
from onevocab.data.convert.samples import Dropped, Row, field_of, list_of, pairs

FILES = ("file_name", "file", "filename", "path", "filepath",
         *(name for kind in KINDS for name in (kind, f"{kind}_path")))
TEXTS = ("caption", "captions", "text", "sentence", "transcription", "transcript", "description")
MAX_SIDECAR = 1 << 20  # bytes
_NUMBERED = re.compile(r"caption_?(\d+)")


def captions_of(record, *names: str) -> list:
    """The captions of a record: under one of these names, or `caption_1`, `caption_2`, ... in their order."""
    captions = field_of(record, *names)
    if captions is not None:
        return list_of(captions)
    numbered = [(int(match[1]), key) for key in record if (match := _NUMBERED.fullmatch(str(key)))]
    return [record[key] for _, key in sorted(numbered)]


def _units(options) -> list[Path]:
    """Tables: the input itself, or `metadata.*` in a folder (as `datasets` publishes folders of media). Else the folder
    itself: files with captions beside them."""
    if options.source.is_file():
        return tables.files_of(options.source)
    described = sorted(path for path in options.source.rglob("metadata.*") if tables.kind_of(path) in tables.TABLES)
    return [path for path in described if _names_files(path, options)] or [options.source]


def _names_files(path: Path, options) -> bool:
    """Whether a `metadata.*` is a table of files: others are about something else."""
    for _, record in islice(_records(path), 1):
        return isinstance(record, dict) and field_of(record, options.map.get("file", FILES[0]), *FILES) is not None
    return False


def _records(unit: Path) -> Iterator[Row]:
    """A table's records; an object of file: caption as well."""
    if tables.kind_of(unit) == ".json" and tables.listed(listed := tables.document(unit)) is None and isinstance(
            listed, dict):
        for number, (file, caption) in enumerate(listed.items()):
            yield f"{unit.name}#{number}", {"file": file, "caption": caption}
        return
    yield from tables.rows(unit)


def _rows(options, unit: Path) -> Iterator[Row]:
    """Records are (folder of the media, path of a file or a table's record)."""
    if unit.is_dir():
        yield from _walk(unit)
        return
    folder = unit.parent if options.source.is_dir() else options.media.root
    for name, record in _records(unit):
        yield name, record if isinstance(record, Dropped) else (folder, record)


def _walk(folder: Path) -> Iterator[Row]:
    for here, folders, names in os.walk(folder):
        folders.sort()
        videos = {Path(name).stem for name in names if kind_of(name) == VIDEO}
        for name in sorted(names):
            place = Path(here, name).relative_to(folder).as_posix()
            used = suffix_of(name) in (".txt", ".json") or (
                suffix_of(name) in (".srt", ".vtt") and Path(name).stem in videos)
            if not name.startswith(".") and not used:
                yield place, (folder, place) if kind_of(name) else Dropped("unknown ending", place)


def _make(options, name: str, row) -> Iterator:
    folder, record = row
    media = _folder(folder, options.frames)
    if isinstance(record, str):
        return pairs(lambda: media.parts(record), _beside(media, record), options.captions)
    file = field_of(record, *[options.map["file"]] if "file" in options.map else FILES)
    captions = captions_of(record, *[options.map["caption"]] if "caption" in options.map else TEXTS)
    if file is None:
        raise Dropped("bad record", f"no field names a file (of {', '.join(map(str, record))}): say --map file=FIELD")
    return pairs(lambda: media.take(file), captions, options.captions)


@lru_cache(maxsize=16)
def _folder(folder: Path, frames: int) -> MediaFolder:
    return MediaFolder(folder, frames)


def _beside(media: MediaFolder, place: str) -> list:
    """The captions beside a file: lines of a .txt, or a .json that holds a text, a list or an object with either."""
    stem = place.rpartition(".")[0]
    for ending in (".txt", ".json"):
        try:
            path = media.find(stem + ending)
        except Dropped as dropped:
            if dropped.reason != "missing media":
                raise
            continue
        try:
            with open(path, "rb") as file:
                content = file.read(MAX_SIDECAR + 1)
        except OSError as error:
            raise Dropped("damaged input", f"{stem}{ending}: {error.strerror}") from None
        if len(content) > MAX_SIDECAR:
            raise Dropped("too large", f"{stem}{ending} has more than {MAX_SIDECAR:,} bytes")
        if ending == ".txt":
            try:
                text = content.decode("utf-8-sig")
            except UnicodeError as error:
                raise Dropped("bad text", f"{stem}{ending} is not UTF-8 ({error}): save it as UTF-8") from None
            return [line for line in re.split(r"[\r\n]+", text) if line.strip()]
        value = tables.record_of(content)
        if isinstance(value, Dropped):
            raise value
        return captions_of(value, *TEXTS) if isinstance(value, dict) else list_of(value)
    return []


FORMATS = {
    "captions": Format("a folder of media with .txt or .json beside them, or a table of files and captions",
                       _units, _rows, _make, (MEDIA, MAP, CAPTIONS, FRAMES), ("file", "caption")),
}
