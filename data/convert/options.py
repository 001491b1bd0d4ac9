"""What can be chosen of a format: each option once, with its default."""

import argparse
from pathlib import Path
from types import SimpleNamespace

from onevocab.common.errors import UserError
from onevocab.data.convert.media import MediaFolder
from onevocab.data.convert.samples import Format


def positive(text: str) -> int:
    """For argparse."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)


# name -> what argparse's add_argument takes
OPTIONS: dict[str, dict] = {
    "media": {"type": Path, "help": "folder that the records' paths start from (default: the input's folder)"},
    "captions": {"type": positive, "metavar": "N", "help": "at most N captions of one file (default: all)"},
    "turns": {"type": positive, "default": 6, "metavar": "N", "help": "questions in one conversation (default: 6)"},
    "frames": {"type": positive, "default": 8, "metavar": "N", "help": "at most N frames of one video (default: 8)"},
    "split": {"help": "only this split, as train (default: all)"},
    "file": {"metavar": "TEMPLATE", "help": "a record's file name, with the record's fields in braces"},
    "annotations": {"type": Path, "help": "the file of answers (default: beside the questions, by its usual name)"},
    "images": {"type": Path, "help": "the JSON of base64 pictures (default: FOLDER.json beside the instructions)"},
    "map": {"action": "append", "metavar": "ROLE=FIELD",
            "help": "which field plays which role, as instruction=question; a.b looks inside; repeat it for more"},
    "by": {"choices": ("file", "paragraph", "line"), "default": "paragraph",
           "help": "what of a .txt is a document (default: paragraph, between empty lines)"},
    "max_chars": {"type": positive, "metavar": "N", "help": "cut longer documents, at a paragraph, sentence or space"},
}


def options_of(name: str, chosen: Format, source, given: dict) -> SimpleNamespace:
    """A format's options: `source` (Path), `media` (MediaFolder), `map` ({role: field}), the others as in OPTIONS.
    Raises UserError."""
    unknown = sorted(set(given) - set(chosen.options))
    if unknown:
        raise UserError(f"{name} has no option {', '.join(unknown)}; it takes {', '.join(chosen.options)}")
    values = {option: OPTIONS[option].get("default") for option in chosen.options}
    values |= {option: value for option, value in given.items() if value is not None}
    options = SimpleNamespace(**values, source=Path(source))
    if not options.source.exists():
        raise UserError(f"no such file or folder: {source}; check the path")
    if "media" in values:
        beside = options.source if options.source.is_dir() else options.source.parent
        options.media = MediaFolder(options.media or beside, values.get("frames", 1))
    if "map" in values:
        options.map = _roles(options.map or (), chosen.roles)
    return options


def _roles(given, allowed: tuple[str, ...]) -> dict[str, str]:
    """["instruction=question", ...] -> {"instruction": "question"}. Raises UserError on an unknown role."""
    found = {}
    for item in given:
        role, _, field = item.partition("=")
        if role not in allowed or not field:
            raise UserError(f"--map {item}: write ROLE=FIELD, where ROLE is one of {', '.join(allowed)}")
        if role in found:
            raise UserError(f"--map {item}: {role} is given twice, {found[role]} before")
        found[role] = field
    return found
