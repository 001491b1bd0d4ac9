"""What a format is: three functions over one input, and what can be chosen of it.

`units` says which files hold records, `rows` reads the records of one of them without touching any picture or sound,
and `make` turns one record into samples. So the records of a file can be split over ranks, and reading them twice costs
little.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from onevocab.common.errors import UserError
from onevocab.common.paths import path_argument
from onevocab.data.convert.media import MediaFolder
from onevocab.data.convert.samples import Converted, Dropped, Row


def positive(text: str) -> int:
    """For argparse."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)


@dataclass(frozen=True)
class Option:
    """name: in Python, `max_chars` for `--max-chars`; the others are those of argparse's `add_argument`."""

    name: str
    help: str
    type: Callable[[str], object] | None = None
    default: object = None
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    repeated: bool = False

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        settings = {"type": self.type, "choices": self.choices, "action": "append" if self.repeated else "store"}
        parser.add_argument(f"--{self.name.replace('_', '-')}", dest=self.name, default=self.default,
                            metavar=self.metavar, help=self.help, **settings)


# What several formats take; what one alone takes stands in its file.
MEDIA = Option("media", "folder that the records' paths start from (default: the input's folder)", path_argument)
CAPTIONS = Option("captions", "at most N captions of one file (default: all)", positive, metavar="N")
TURNS = Option("turns", "questions in one conversation (default: 6)", positive, 6, "N")
FRAMES = Option("frames", "at most N frames of one video (default: 8)", positive, 8, "N")
SPLIT = Option("split", "only this split, as train (default: all)")
FILE = Option("file", "a record's file name, with the record's fields in braces", metavar="TEMPLATE")
MAP = Option("map", "which field plays which role, as instruction=question; a.b looks inside; repeat it for more",
             metavar="ROLE=FIELD", repeated=True)


class Format(NamedTuple):
    """help: one line; units(options): what can be read independently, in a fixed order; rows(options, unit): its
    records, a Dropped in place of one that cannot be read; make(options, name, record): its samples, what is dropped
    yielded or raised; options: what can be chosen; roles: what a field can be mapped to, with MAP."""

    help: str
    units: Callable[..., list]
    rows: Callable[..., Iterator[Row]]
    make: Callable[..., Iterator[Converted | Dropped]]
    options: tuple[Option, ...] = (MEDIA,)
    roles: tuple[str, ...] = ()


def options_of(name: str, chosen: Format, source, given: dict, follow_links: bool = False) -> SimpleNamespace:
    """A format's options: `source` (Path), `follow_links`, `passed_over` (what `walk` passes over), `media`
    (MediaFolder), `map` ({role: field}), the others as given or by default. Raises UserError."""
    values = {option.name: option.default for option in chosen.options}
    unknown = sorted(set(given) - set(values))
    if unknown:
        raise UserError(f"{name} has no option {', '.join(unknown)}; it takes {', '.join(values)}")
    values |= {option: value for option, value in given.items() if value is not None}
    options = SimpleNamespace(**values, source=Path(source), follow_links=follow_links, passed_over={})
    if not options.source.exists():
        raise UserError(f"no such file or folder: {source}; check the path")
    if "media" in values:
        beside = options.source if options.source.is_dir() else options.source.parent
        options.media = MediaFolder(options.media or beside, values.get("frames", 1), follow_links)
    if "map" in values:
        options.map = _roles(options.map or (), chosen.roles)
    return options


def _roles(given, allowed: tuple[str, ...]) -> dict[str, str]:
    """["instruction=question", ...] -> {"instruction": "question"}. Raises UserError on an unknown role."""
    fields = {}
    for item in given:
        role, _, field = item.partition("=")
        if role not in allowed or not field:
            raise UserError(f"--map {item}: write ROLE=FIELD, where ROLE is one of {', '.join(allowed)}")
        if role in fields:
            raise UserError(f"--map {item}: {role} is given twice, {fields[role]} before")
        fields[role] = field
    return fields
