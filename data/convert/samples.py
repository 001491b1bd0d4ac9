"""What a converter yields: samples in the documents' format, and what is left out, with the reason.

A format is three functions over one input: `units` says which files hold records, `rows` reads the records of one of
them without touching any picture or sound, and `make` turns one record into samples. So the records of a file can be
split over ranks, and reading them twice costs little.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


class Dropped(Exception):
    """Something that is left out. reason: a few words that are counted in the report; detail: what exactly."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class Medium(NamedTuple):
    """A checked file. modality: "image" or "audio"; ending: of a shard's member, as `png`; reencoded: whether the
    bytes are not the source's, since shards do not take its kind; without: what had to be left out, such as a video's
    subtitles."""

    modality: str
    ending: str
    content: bytes
    reencoded: bool = False
    without: Dropped | None = None


Part = str | Medium


@dataclass
class Draft:
    """A sample to be written. turns: (role, parts) in order; one turn of role None is a plain document. left_out: what
    the sample has to do without, such as one missing picture of several."""

    turns: list[tuple[str | None, list[Part]]]
    left_out: list[Dropped] = field(default_factory=list)


Row = tuple[str, object]  # (where the record stands, the record or a Dropped)


class Format(NamedTuple):
    """help: one line; units(options): what can be read independently, in a fixed order; rows(options, unit): its
    records, a Dropped in place of one that cannot be read; make(options, name, record): its samples, what is dropped
    yielded or raised; options: names in options.OPTIONS that it takes; roles: what a field can be mapped to."""

    help: str
    units: Callable[..., list]
    rows: Callable[..., Iterator[Row]]
    make: Callable[..., Iterator[Draft | Dropped]]
    options: tuple[str, ...] = ("media",)
    roles: tuple[str, ...] = ()


def printable(text: str) -> str:
    """A text that can be written: what is no Unicode (odd bytes in a file's name) becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def members_of(draft: Draft, source: str) -> dict[str, bytes]:
    """Draft -> members of a shard's sample: `json`, `0.png`, `1.flac`, ...; a file that is shown twice is stored once.

    source: where the sample comes from, kept in the JSON. Raises Dropped when it says nothing, or holds text that no
    encoding takes.
    """
    members: dict[str, bytes] = {}
    names: dict[bytes, str] = {}

    def part(value: Part) -> dict:
        if isinstance(value, str):
            return {"type": "text", "text": value}
        name = names.setdefault(value.content, f"{len(names)}.{value.ending}")
        members[name] = value.content
        return {"type": value.modality, "file": name}

    turns = [(role, [part(value) for value in parts if value]) for role, parts in draft.turns]
    if not turns or not all(parts for _, parts in turns):
        raise Dropped("empty text", "a turn holds nothing")
    if turns[0][0] is None:
        data = {"content": turns[0][1]}
    else:
        data = {"messages": [{"role": role, "content": parts} for role, parts in turns]}
    try:  # a lone surrogate: bytes that are no UTF-8, or half a pair spelled in JSON
        members["json"] = json.dumps(data | {"source": printable(source)}, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Dropped("bad text", f"not Unicode ({error.reason})") from None
    return members


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


def pairs(parts: Callable[[], list[Part]], captions: list, most: int | None = None) -> Iterator[Draft | Dropped]:
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
        yield Draft([(None, [*medium, caption])])


def exchanges(parts: list[Part], asked: list[tuple[str, str]], turns: int, hint: str = "",
              left_out: list[Dropped] | None = None) -> Iterator[Draft]:
    """(question, answer) pairs about one medium -> conversations of at most `turns` pairs, each showing it first.

    hint: what kind of answer is wanted, said with the first question.
    """
    for start in range(0, len(asked), turns):
        said: list[tuple[str | None, list[Part]]] = []
        for question, answer in asked[start : start + turns]:
            said += [("user", [question]), ("assistant", [answer])]
        said[0][1][:] = [*parts, f"{said[0][1][0]} {hint}".strip()]
        yield Draft(said, list(left_out or ()) if start == 0 else [])
