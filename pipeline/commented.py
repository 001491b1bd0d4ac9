"""A configuration as TOML that explains itself: every key with what it means."""

import textwrap

import tomli_w
from pydantic import BaseModel

WIDTH = 118


def commented_toml(config: BaseModel, first: tuple[str, ...] = (), leave_out: tuple[str, ...] = ()) -> str:
    """All keys of a configuration, each below its description; one without a value stands in a comment.

    first: sections in the order in which they come before the others; leave_out: dotted names of keys.
    """
    return "\n".join(_section(config, "", first, leave_out)).strip() + "\n"


def _section(model: BaseModel, path: str, first: tuple[str, ...], leave_out: tuple[str, ...]) -> list[str]:
    fields, lines, sections = type(model).model_fields, [], []
    order = [name for name in first if name in fields] + [name for name in fields if name not in first]
    for name in order:
        field, value, place = fields[name], getattr(model, name), f"{path}{name}"
        if place in leave_out:
            continue
        tables = isinstance(value, tuple) and value and isinstance(value[0], BaseModel)
        if isinstance(value, BaseModel) or tables:
            head = [["", *_comment(field.description), f"[[{place}]]" if tables else f"[{place}]",
                     *_section(each, f"{place}.", (), leave_out)] for each in (value if tables else (value,))]
            sections += [line for each in head for line in each]
        elif value is None:
            if not _is_section(field):
                lines += [*_comment(field.description), f"# {name} ="]
        else:
            lines += [*_comment(field.description), _line(name, value)]
    return lines + sections


def _is_section(field) -> bool:
    """Whether a key without a value would hold a section."""
    kinds = getattr(field.annotation, "__args__", (field.annotation,))
    return any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds)


def _line(name: str, value) -> str:
    """`name = value` in one line."""
    if isinstance(value, list | tuple):
        return f"{name} = [{', '.join(_line('x', each).removeprefix('x = ') for each in value)}]"
    return tomli_w.dumps({name: value}).strip()


def _comment(text: str | None) -> list[str]:
    return textwrap.wrap(text or "", WIDTH, initial_indent="# ", subsequent_indent="# ")
