"""The settings of a configuration one by one: `--section.key=value` on the command line, and the key that was meant."""

import tomllib
from collections.abc import Iterator
from difflib import get_close_matches
from types import NoneType
from typing import get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from onevocab.common.errors import UserError, wrong


def parts_of(annotation) -> list:
    """The types that a union, a tuple or an annotated type is made of, itself where it is none."""
    inner = get_args(annotation)
    return [annotation, *(part for one in inner for part in parts_of(one))] if inner else [annotation]


def sections_of(annotation) -> list[type[BaseModel]]:
    """The models that a field's type names; of several, as of quantizers, each may be meant."""
    return [part for part in parts_of(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]


def fields_of(annotation) -> dict[str, FieldInfo]:
    """The keys of a section, {} of what is none."""
    return {name: field for section in sections_of(annotation) for name, field in section.model_fields.items()}


def is_list(annotation) -> bool:
    return any(getattr(part, "__origin__", None) is tuple for part in parts_of(annotation))


def settings_of(annotation, before: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of everything below a section, sections included, lists not entered."""
    for name, field in fields_of(annotation).items():
        yield before + name, field
        if not is_list(field.annotation):
            yield from settings_of(field.annotation, f"{before}{name}.")


def unknown(model, key: str, flag: str = "") -> str:
    """What to say of a key that there is not: which was meant, by its spelling or by its place, or which there are."""
    keys = [path for path, _ in settings_of(model)]
    if key in keys:
        return "this is a key of another kind than the one that is chosen here"
    section, _, last = key.rpartition(".")
    here = [path for path in keys if path.rpartition(".")[0] == section]
    near = get_close_matches(last, [path.rpartition(".")[2] for path in here], 1)
    meant = ([path for path in here if near and path.rpartition(".")[2] == near[0]]
             or [path for path in keys if path.rpartition(".")[2] == last] or get_close_matches(key, keys, 1, 0.8))
    if meant:
        return f"unknown key; did you mean {' or '.join(flag + path for path in meant[:4])}?"
    return f"unknown key; there are {', '.join(here or [path for path in keys if '.' not in path])}"


def overrides(model: type[BaseModel], words: list[str]) -> dict[tuple[str, ...], tuple[object, str]]:
    """`--a.b=value`, `--a.b value`, `--a.switch`, `--a.no-switch` -> {("a", "b"): (value, the word)}.

    Values are text, which pydantic turns into what the key takes; `none` where a key may be absent; what begins as a
    list or table of TOML is one. Raises UserError on a key that there is not, a value that is missing, or other words.
    """
    found, words = {}, list(words)
    while words:
        word = words.pop(0)
        flag, equals, text = word.partition("=")
        if not flag.startswith("--") or flag == "--":
            raise UserError(f"{word!r} is not expected here: settings are written as --section.key=value")
        path, annotation = _find(model, flag)
        if fields_of(annotation) and not text.startswith("{") and not is_list(annotation):
            raise UserError(f"{flag} is a section; set one of its keys: "
                            + ", ".join(f"{flag}.{name}" for name in fields_of(annotation)))
        if not equals and bool in parts_of(annotation):
            text = "false" if path[-1] != flag.rpartition(".")[2].removeprefix("--").replace("-", "_") else "true"
        elif not equals:
            values = []
            while words and not words[0].startswith("--") and (is_list(annotation) or not values):
                values.append(words.pop(0))
            if not values:
                raise UserError(f"{flag}: its value is missing; write {flag}=VALUE")
            text, word = values[0], " ".join([flag, *values])
            if len(values) > 1:
                found[path] = values, word
                continue
        found[path] = _value(text, annotation, word), word
    return found


def _find(model, flag: str) -> tuple[tuple[str, ...], type]:
    """The place and type of `--a.b`, or of `--a.no-b` where b is a switch. Raises UserError."""
    names, annotation = flag.removeprefix("--").replace("-", "_").split("."), model
    for at, name in enumerate(names):
        fields = {} if is_list(annotation) else fields_of(annotation)
        if is_list(annotation) and name.isdecimal():  # one of a list of sections: --pretrain.sources.0.repeat
            annotation = get_args(annotation)[0]
            continue
        if is_list(annotation):
            raise UserError(f"{flag}: this is a list, whose parts are counted from 0: --{'.'.join(names[:at])}.0")
        switch = fields.get(name.removeprefix("no_"))
        if name not in fields and switch is not None and bool in parts_of(switch.annotation):
            names[at] = name = name.removeprefix("no_")
        if name not in fields:
            if near := get_close_matches(flag, ("--plan", "--help"), 1, 0.75):
                raise UserError(f"{flag}: unknown; did you mean {near[0]}?")
            raise UserError(f"{flag}: {unknown(model, '.'.join(names), '--')}")
        annotation = fields[name].annotation
    return tuple(names), annotation


def _value(text: str, annotation, word: str):
    if NoneType in parts_of(annotation) and text.lower() == "none":
        return None
    nested = bool(sections_of(annotation)) or is_list(annotation)
    if nested and text.startswith(("[", "{")):
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{word}: its value is not valid TOML: {error}") from None
    return [text] if nested else text


def merge(data: dict, said: dict[tuple[str, ...], tuple[object, str]]) -> dict:
    """What was said on the command line over a TOML's tables; nothing of `data` is changed. Raises UserError where the
    TOML has no section, or too short a list, for it."""
    data = {**data}
    for path, (value, word) in said.items():
        here = data
        for at, name in enumerate(path, 1):
            if isinstance(here, list):
                if not (name.isdecimal() and int(name) < len(here)):
                    raise UserError(f"{word}: there are {len(here)} of these, counted from 0")
                name = int(name)
            if at == len(path):
                here[name] = value
                break
            inner = here[name] if isinstance(here, list) else here.get(name, {})
            if not isinstance(inner, dict | list | tuple):
                raise UserError(f"{word}: {'.'.join(path[:at])} is no section in the file, but {inner!r}")
            here[name] = dict(inner) if isinstance(inner, dict) else list(inner)
            here = here[name]
    return data


def validated(model: type[BaseModel], data: dict, where, said: dict[tuple[str, ...], tuple[object, str]]):
    """The model of `data`. Raises UserError: the words of the command line that are wrong, or `where` and the key."""
    try:
        return model.model_validate(merge(data, said))
    except ValidationError as error:
        errors = error.errors()
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    annotation, path = model, []
    for part in first["loc"]:  # it also names which of several models was tried
        fields = fields_of(annotation)
        if isinstance(part, int) or part in fields or (part == first["loc"][-1] and first["type"] == "extra_forbidden"):
            path.append(str(part))
            annotation = fields[part].annotation if part in fields else annotation
    key, reason = ".".join(path), wrong(first)
    if first["type"] == "extra_forbidden":
        reason = unknown(model, key)
    elif first["type"] == "missing" and fields_of(annotation):
        reason = f"this section is missing; its keys are {', '.join(fields_of(annotation))}"
    elif first["type"] in ("model_type", "dict_type", "model_attributes_type"):
        reason = f"this is a section; its keys are {', '.join(fields_of(annotation))}"
    words = [word for at, (_, word) in said.items() if at[: len(path)] == (*path,) or (*path[: len(at)],) == at]
    if words:
        inside = (*path,) not in said and not any(at[: len(path)] == (*path,) for at in said)
        raise UserError(f"{' '.join(words)}: {f'{key}: ' if inside else ''}{reason}")
    raise UserError(f"{where}: {key}: {reason}")
