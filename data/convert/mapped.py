"""Records whose fields the user names (`--map instruction=question`), and Hugging Face's `datasets` folders, where the
columns say what they hold."""

from collections.abc import Iterator
from pathlib import Path

from onevocab.common.errors import UserError
from onevocab.data.convert import tables
from onevocab.data.convert.conversations import conversation_of
from onevocab.data.convert.media import KINDS, kind_of
from onevocab.data.convert.options import FILE, FRAMES, MAP, MEDIA, SPLIT, Format
from onevocab.data.convert.samples import (
    Converted,
    Dropped,
    Row,
    field_of,
    files_in,
    fill,
    list_of,
    pairs,
    text_of,
)

ROLES = (*KINDS, "conversations", "system", "instruction", "input", "response", "text")
# What publishers call the columns of texts, by role.
CALLED = {"conversations": ("conversations", "messages", "conversation"),
          "instruction": ("instruction", "question", "query", "prompt"), "input": ("input",),
          "response": ("response", "answer", "answers", "output"),
          "text": ("text", "caption", "captions", "sentence", "transcription", "transcript", "description")}


def _sample(options, roles: dict[str, str], record) -> Iterator[Converted | Dropped]:
    """A conversation where roles name conversations or a response, else a plain document for each text."""
    files = {kind: files_in(field_of(record, roles[kind])) for kind in KINDS if kind in roles}
    if options.file:
        file = fill(options.file, record)
        files.setdefault(kind_of(file) or KINDS[0], []).append(file)
    media = {kind: [options.media.take(file) for file in named] for kind, named in files.items()}
    if "conversations" in roles:
        return iter([Converted(conversation_of(field_of(record, roles["conversations"]), media))])
    if "response" in roles:
        asked = "\n".join(filter(None, (_text(record, roles.get(role)) for role in ("instruction", "input"))))
        messages = [{"from": "system", "value": _text(record, roles.get("system"))}, {"from": "human", "value": asked},
                    {"from": "gpt", "value": _text(record, roles["response"])}]
        return iter([Converted(conversation_of(messages, media))])
    parts = [part for shown in media.values() for file in shown for part in file]
    if media and not parts:
        raise Dropped("missing media", "no file is named")
    return pairs(lambda: parts, list_of(field_of(record, roles["text"])))


def _text(record, field: str | None) -> str:
    """The field's text, of a list the first that is not empty."""
    values = list_of(field_of(record, field)) if field else []
    return next(filter(None, map(text_of, values)), "")


# ------------------------------------------------------------------------------------------------ by the user


def _units(options) -> list[Path]:
    if not {"conversations", "response", "text"} & set(options.map):
        raise UserError("say by --map which field holds the conversations, the response, or the text: "
                        "--map instruction=question --map response=answer --map image=file")
    return tables.files_of(options)


def _make(options, name: str, record) -> Iterator[Converted | Dropped]:
    return _sample(options, options.map, record)


# ------------------------------------------------------------------------------------------------ by the columns


def _folder_units(options) -> list[Path]:
    """The files of all splits, or of one: `train-00000-of-00002.parquet`, `train/data-00000-of-00001.arrow`."""
    files = [path for path in tables.files_of(options, tables.COLUMNS) if not path.name.startswith("cache-")]
    if options.split:
        files = [path for path in files if options.split in (path.name.partition("-")[0], path.stem, path.parent.name)]
    if options.split and not files:
        raise UserError(f"{options.source} has no split {options.split}")
    return files


def guess(names: list[str], files: list[str], texts: list[str], given: dict[str, str]) -> dict[str, str]:
    """Roles of a table's columns; files: those that hold media; texts: those that hold texts; given: roles that the
    user named, which come first. Raises UserError when it is not clear."""
    roles, ask = dict(given), f"the columns are {', '.join(names)}: say by --map ROLE=COLUMN, as --map image=COLUMN"
    if not set(KINDS) & set(given):
        for name in files:
            kind = next((kind for kind in KINDS[1:] if kind in name.lower()), KINDS[0])
            if kind in roles:
                raise UserError(f"{roles[kind]} and {name} both hold media; {ask}")
            roles[kind] = name
    if not set(CALLED) & set(given):
        called = {role: next((name for name in choices if name in names and name not in files), None)
                  for role, choices in CALLED.items()}
        wanted = (("conversations",), ("instruction", "response"), ("text",))
        chosen = next((group for group in wanted if all(called[role] for role in group)), None)
        if chosen is None:
            raise UserError(f"no column of texts that is known by its name; {ask} --map text=COLUMN")
        if "response" in chosen and (called["response"] not in texts or {"choices", "options"} & set(names)):
            raise UserError(f"{called['response']} may be no answer in words, but the number of one; {ask} "
                            f"--map instruction={called['instruction']} --map response=COLUMN")
        chosen += ("input",) if "response" in chosen and called["input"] else ()
        roles |= {role: called[role] for role in chosen}
    elif not {"conversations", "response", "text"} & set(roles):
        raise UserError(f"--map names no response, conversations or text; {ask}")
    return roles


def _folder_rows(options, unit: Path) -> Iterator[Row]:
    columns = tables.column_names(unit)
    try:
        roles = guess(*columns, options.map)
    except UserError as error:  # other files may have other columns
        raise Dropped("unclear columns", str(error)) from None
    return ((name, (roles, record)) for name, record in tables.rows(unit))


def _folder_make(options, name: str, row) -> Iterator[Converted | Dropped]:
    return _sample(options, *row)


FORMATS = {
    "huggingface": Format("a folder of parquet or arrow files of `datasets`, media in the columns", _folder_units,
                          _folder_rows, _folder_make, (MEDIA, SPLIT, MAP, FILE, FRAMES), ROLES),
    "map": Format("any table, its fields named by --map", _units, tables.rows_of, _make,
                  (MEDIA, MAP, FILE, FRAMES), ROLES),
}
