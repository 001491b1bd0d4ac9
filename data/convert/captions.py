"""Files with captions: a folder of media with captions beside them, or a table that names files and captions.

A medium and a caption become a plain document of two parts; a file with several captions gives as many documents.
"""

import re
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path

from onevocab.common.errors import UserError
from onevocab.data.convert import tables
from onevocab.data.convert.media import KINDS, VIDEO, MediaFolder, kind_of, suffix_of
from onevocab.data.convert.options import CAPTIONS, FRAMES, MAP, MEDIA, Format
from onevocab.data.convert.samples import Dropped, Row, field_of, list_of, pairs
from onevocab.data.convert.streams import encoding_of
from onevocab.data.convert.walking import walk

FILES = ("file_name", "file", "filename", "path", "filepath",
         *(name for kind in KINDS for name in (kind, f"{kind}_path")))
TEXTS = ("caption", "captions", "text", "sentence", "transcription", "transcript", "description")
MAX_SIDECAR = 1 << 20  # bytes
NO_MEDIUM = "no picture, sound or video beside it has this name; texts alone are read by the format text"
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
        if kind_of(options.source.name) or suffix_of(options.source.name) == ".txt":
            raise UserError(f"{options.source} is one file: give the folder that holds media and captions, or a table")
        return tables.files_of(options)
    described = sorted(options.source / place / name for place, names in walk(options) for name in names
                       if name.startswith("metadata.") and tables.kind_of(Path(name)) in tables.TABLES)
    described = [path for path in described if _names_files(path, options)]
    if described:
        _pass_over_unnamed(described, options)
    return described or [options.source]


def _pass_over_unnamed(described: list[Path], options) -> None:
    """Media of a folder with tables whose name stands in none of these are counted."""
    named = set()
    for path in described:
        with suppress(Dropped):  # it is counted when it is read
            for _, record in _records(path):
                file = _file_of(options, record) if isinstance(record, dict) else None
                file = file.get("path") if isinstance(file, dict) else file
                if isinstance(file, str):
                    last = unicodedata.normalize("NFC", re.split(r"[/\\]", file.strip())[-1])
                    named |= {last, last.partition("?")[0]}
    options.passed_over |= {str(Path(place, name)): Dropped("in no table") for place, names in walk(options)
                            for name in names if kind_of(name) and unicodedata.normalize("NFC", name) not in named}


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
    """Records are (folder of the media, files and the one with their captions, or a table's record)."""
    if unit.is_dir():
        for place, names in walk(options):
            yield from ((name, row if isinstance(row, Dropped) else (unit, row))
                        for name, row in sorted(_beside(place, names), key=lambda row: row[0]))
        return
    folder = unit.parent if options.source.is_dir() else options.media.root
    for name, record in _records(unit):
        yield name, record if isinstance(record, Dropped) else (folder, record)


def _beside(place: str, names: list[str]) -> Iterator[Row]:
    """The files of a folder that share a name: [media], and the file with their captions or None. A picture and a sound
    are one document; several of a kind, and videos, are one each. A caption of no medium is dropped."""
    media: dict[str, list[str]] = {}
    captions: dict[str, str] = {}
    subtitles: dict[str, list[str]] = {}
    for name in names:
        suffix, here = suffix_of(name), Path(place, name).as_posix()
        stem = unicodedata.normalize("NFC", name.rpartition(".")[0])  # Macs take the é of a name apart, others do not
        if kind_of(name):
            media.setdefault(stem, []).append(here)
        elif suffix in (".srt", ".vtt"):
            subtitles.setdefault(stem, []).append(here)
        elif suffix not in (".txt", ".json"):
            yield here, Dropped("unknown ending")
        elif stem not in captions:
            captions[stem] = here
        else:  # the .txt comes first
            captions[stem], other = sorted((here, captions[stem]), key=lambda file: suffix_of(file) != ".txt")
            yield other, Dropped("beside a .txt")
    for stem, files in media.items():
        kinds = sorted(files, key=lambda file: KINDS.index(kind_of(file)))
        one = len(set(map(kind_of, files))) == len(files) and VIDEO not in map(kind_of, files)
        yield from ((some[0], (some, captions.get(stem))) for some in ([kinds] if one else [[file] for file in files]))
    yield from ((captions[stem], Dropped("caption of no medium", NO_MEDIUM)) for stem in captions.keys() - media.keys())
    for stem, files in subtitles.items():
        if VIDEO not in map(kind_of, media.get(stem, ())):
            yield from ((file, Dropped("unknown ending")) for file in files)


def _file_of(options, record):
    """What a table's record says of its file, None where it says nothing. Raises Dropped when it is no object."""
    return field_of(record, *[options.map["file"]] if "file" in options.map else FILES)


def _make(options, name: str, row) -> Iterator:
    folder, record = row
    media = _folder(folder, options.frames, options.follow_links)
    if isinstance(record, tuple):
        files, beside = record
        return pairs(lambda: [part for file in files for part in media.parts(file)],
                     _captions_in(media, beside) if beside else [], options.captions)
    file = _file_of(options, record)
    captions = captions_of(record, *[options.map["caption"]] if "caption" in options.map else TEXTS)
    if file is None:
        raise Dropped("bad record", f"no field names a file (of {', '.join(map(str, record))}): say --map file=FIELD")
    return pairs(lambda: media.take(file), captions, options.captions)


@lru_cache(maxsize=16)
def _folder(folder: Path, frames: int, follow_links: bool) -> MediaFolder:
    return MediaFolder(folder, frames, follow_links)


def _captions_in(media: MediaFolder, place: str) -> list:
    """The captions in a file: lines of a .txt, or a .json that holds a text, a list or an object with either."""
    try:
        with open(media.find(place), "rb") as file:
            content = file.read(MAX_SIDECAR + 1)
    except OSError as error:
        raise Dropped("damaged input", f"{place}: {error.strerror}") from None
    if len(content) > MAX_SIDECAR:
        raise Dropped("too large", f"{place} has more than {MAX_SIDECAR:,} bytes")
    if suffix_of(place) == ".txt":
        try:
            text = content.decode(encoding_of(content[:4]))
        except UnicodeError as error:
            raise Dropped("bad text", f"{place} is not UTF-8 ({error}): save it as UTF-8") from None
        return [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    value = tables.record_of(content)
    if isinstance(value, Dropped):
        raise value
    return captions_of(value, *TEXTS) if isinstance(value, dict) else list_of(value)


FORMATS = {
    "captions": Format("a folder of media with .txt or .json beside them, or a table of files and captions",
                       _units, _rows, _make, (MEDIA, MAP, CAPTIONS, FRAMES), ("file", "caption")),
}
