"""What a converter yields: documents whose media are files, and what is left out, with the reason."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from onevocab.data.documents import members_of
from onevocab.tokenizers.document import Document, MediaFile, Part, conversation, plain_document


class Dropped(Exception):
    """Something that is left out. reason: a few words that are counted in the report; detail: what exactly."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Medium(MediaFile):
    """A checked file. reencoded: whether the bytes are not the source's, since shards do not take its kind; without:
    what had to be left out, such as a video's subtitles."""

    reencoded: bool = field(default=False, compare=False)
    without: Dropped | None = field(default=None, compare=False)


class Converted(NamedTuple):
    """A sample to be written. document: its media are Medium; left_out: what it has to do without, such as one missing
    picture of several."""

    document: Document
    left_out: list[Dropped] | tuple[()] = ()


Row = tuple[str, object]  # (where the record stands, the record or a Dropped)


def printable(text: str) -> str:
    """A text that can be written: what is no Unicode (odd bytes in a file's name) becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def sample_of(document: Document, source: str) -> dict[str, bytes]:
    """Document -> members of a shard's sample: `json`, `0.png`, `1.flac`, ...; files of the same bytes are stored once.

    source: where the sample comes from, kept in the JSON. Raises Dropped when a turn says nothing or holds text that
    no encoding takes, or null characters.
    """
    filled = Document(tuple(segment for segment in document.segments if segment.content != ""))
    if not filled.segments or len(filled.turns) < len(document.turns):
        raise Dropped("empty text", "a turn holds nothing")
    stored: dict[bytes, Medium] = {}
    filled = filled.map_media(lambda _, file: stored.setdefault(file.content, file))
    if any(segment.modality == "text" and "\0" in segment.content for segment in filled.segments):
        raise Dropped("bad text", "it holds null characters, as UTF-16 without its mark does: save it as UTF-8")
    try:  # a lone surrogate: bytes that are no UTF-8, or half a pair spelled in JSON
        return members_of(filled, {"source": printable(source)})
    except UnicodeEncodeError as error:
        raise Dropped("bad text", f"not Unicode ({error.reason}): save the input as UTF-8") from None


# ------------------------------------------------------------------------------------------- reading of records


def field_of(record, *names: str):
    """The first of these fields that the record has and that is not None, else None. A name with dots looks inside:
    `image.path`. Raises Dropped when the record is not an object."""
    if not isinstance(record, dict):
        raise Dropped("bad record", "not an object")
    for name in names:
        value = record.get(name)
        if value is None and "." in name:
            value = record
            for step in name.split("."):
                value = value.get(step) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def list_of(value) -> list:
    """None -> [], a list as it is, anything else as the only item."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def files_in(value) -> list:
    """The files that a field names, one or a list of them; "" and "None", as some tables write it, name none."""
    return [file for file in list_of(value) if file and file != "None"]


def text_of(value) -> str:
    """A text or a number as text, white space around it gone; "" for anything else, NaN (an empty cell) included."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int | float) and not isinstance(value, bool) and not (
            isinstance(value, float) and math.isnan(value)):
        return str(value)
    return ""


def id_of(record: dict, name: str) -> int | str | None:
    """A field that names something: an integer or a text, None for anything else."""
    value = record.get(name)
    return value if isinstance(value, int | str) else None


class _Cell(str):
    """A text that can be written as the number it spells, `{start_time:06d}`: all cells of a CSV are texts."""

    def __format__(self, spec: str) -> str:
        return format(int(self), spec) if spec.endswith("d") else super().__format__(spec)


def fill(template: str, record: dict) -> str:
    """`{youtube_id}_{start_time}.wav` with a record's fields. Raises Dropped when one is missing or of another type."""
    try:
        return template.format_map({name: _Cell(value) if isinstance(value, str) else value
                                    for name, value in record.items()})
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise Dropped("bad record", f"--file {template}: {type(error).__name__} {error}") from None


# ------------------------------------------------------------------------------------------- making of samples


def pairs(parts: Callable[[], list[Part]], captions: list, most: int | None = None) -> Iterator[Converted | Dropped]:
    """A medium with each of its captions: as many plain documents, `most` of them at most (None: all).

    parts: reads the medium, called once and only if there is a caption.
    """
    medium, kept = None, 0
    for caption in map(text_of, captions or [""]):
        if most and kept >= most:
            return
        if not caption:
            yield Dropped("empty text", "no caption")
            continue
        medium = parts() if medium is None else medium
        kept += 1
        yield Converted(plain_document([*medium, ("text", caption)]))


def exchanges(parts: list[Part], asked: list[tuple[str, str]], turns: int, hint: str = "",
              left_out: list[Dropped] | None = None) -> Iterator[Converted]:
    """(question, answer) pairs about one medium -> conversations of at most `turns` pairs, each showing it first.

    hint: what kind of answer is wanted, said with the first question.
    """
    for start in range(0, len(asked), turns):
        messages: list[tuple[str, list[Part]]] = []
        for question, answer in asked[start : start + turns]:
            first = not messages
            shown = [*parts, ("text", f"{question} {hint}".strip())] if first else [("text", question)]
            messages += [("user", shown), ("assistant", [("text", answer)])]
        yield Converted(conversation(messages), list(left_out or ()) if start == 0 else [])
