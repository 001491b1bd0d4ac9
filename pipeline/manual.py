"""What `train.py CONFIG --help` prints: every key, its value in this configuration, and what it means."""

import json
import shutil
import textwrap
from collections.abc import Iterator
from typing import Literal, get_args, get_origin

from pydantic import BaseModel

from onevocab.pipeline.settings import fields_of, is_list, parts_of
from onevocab.training.plan import PlanConfig

NARROW, COLUMN, WIDEST = 100, 48, 120  # below NARROW columns a meaning stands below its key, else from COLUMN on


def manual(config: BaseModel, path: str) -> str:
    """The manual of a configuration read from `path`, as wide as the terminal."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    lines = [
        "usage: train.py CONFIG [--section.key=VALUE ...] [--plan]", "",
        *textwrap.wrap(f"Trains every stage of one model. Below are all keys with their values in {path}. Each can "
                       "stand in the TOML or, over it, on the command line; lists and tables as in TOML: "
                       "--data.shards='[\"a\", \"b\"]'. A switch is also --section.key or --section.no-key.", width),
        "",
        *_entry("--plan", "prints memory, work, time and energy of the run, and trains nothing", width),
        *(line for key, field in PlanConfig.model_fields.items()
          for line in _entry(f"--plan.{key}={_shown(field.default)}", field.description, width)),
        *_section(type(config), config, "", width, {})]
    return "\n".join(lines)


def _section(annotation, values, name: str, width: int, before: dict) -> list[str]:
    """A section's own keys, then the sections below it. values: the section as it is configured, None of one that is
    not there: then its defaults are shown; before: class -> (name, values) of sections shown before, of whose keys only
    other values are shown."""
    known, old = before.get(type(values), ("", None))
    before |= {} if name.count(".") or values is None else {type(values): (name, values)}
    if old is not None:
        entries = [(key, value) for key, value in _flat(values) if value != dict(_flat(old))[key]]
        return ["", f"[{name}] has the keys of [{known}]; with other values:",
                *(f"  --{name}.{key}={_shown(value)}" for key, value in entries)]
    fields, lines, below = fields_of(annotation if values is None else type(values)), [], []
    for key, field in fields.items():
        value = field.get_default(call_default_factory=True) if values is None else getattr(values, key)
        dotted = f"{name}.{key}" if name else key
        if fields_of(field.annotation) and not is_list(field.annotation):
            below += _section(field.annotation, value, dotted, width, before)
        else:
            word = "" if field.is_required() and values is None else _shown(value)
            lines += _entry(f"--{dotted}={word}", _meaning(field), width)
    title = f"[{name}]" + (" (not in this configuration)" if values is None else "") if name else "First lines"
    return ["", title, *lines, *below]


def _flat(section: BaseModel, name: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of everything below a section."""
    for key, value in section:
        yield from _flat(value, f"{name}{key}.") if isinstance(value, BaseModel) else [(name + key, value)]


def _meaning(field) -> str:
    choices = [str(choice) for part in parts_of(field.annotation) if get_origin(part) is Literal
               for choice in get_args(part)]
    several = f"{' | '.join(choices)}; " if len(choices) > 1 else ""
    return several + (field.description or "which kind it is")


def _shown(value) -> str:
    """A value as it is written; what is long is counted."""
    if isinstance(value, tuple):
        if any(isinstance(part, BaseModel) for part in value):
            return f"[...] ({len(value)} of them)"
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) < 40 else f"[...] ({len(value)} of them)"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _entry(word: str, meaning: str, width: int) -> list[str]:
    if width < NARROW:
        return [f"  {word}", *textwrap.wrap(meaning, width, initial_indent=" " * 8, subsequent_indent=" " * 8)]
    first, *rest = textwrap.wrap(meaning, width - COLUMN)
    if len(word) + 3 > COLUMN:
        return [f"  {word}", *(" " * COLUMN + line for line in (first, *rest))]
    return [f"  {word}".ljust(COLUMN) + first, *(" " * COLUMN + line for line in rest)]
