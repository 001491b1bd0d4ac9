"""Files in a conversation: paths as people type, paste and drop them; what was made, written under new names."""

import itertools
import os
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

from onevocab.common.errors import UserError
from onevocab.common.paths import path_argument
from onevocab.tokenizers.modalities import MODALITIES, modality_of_path


def load_part(kind: str, value: str):
    """What --KIND VALUE says. Raises UserError when the file is missing or cannot be read."""
    return value if kind == "text" else MODALITIES[kind].load(path_argument(value))


def write_new(folder: Path, kind: str, value) -> Path:
    """Writes a value of a modality to FOLDER/KIND-N under the first free N: nothing is ever overwritten, and what is
    interrupted leaves no file."""
    modality = MODALITIES[kind]
    content = modality.save(value)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count():
            path = folder / f"{kind}-{number}{modality.suffixes[0]}"
            try:
                file = open(path, "xb")
            except FileExistsError:
                continue
            try:
                with file:
                    file.write(content)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            return path
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to {folder}: {reason}; choose another --out") from None


def _path(word: str) -> Path:
    """A path, `~` and file:// addresses understood. Needs no home directory."""
    if word.startswith("file:"):
        word = unquote(word.removeprefix("file:"))
        if word.startswith("//"):
            host, _, rest = word[2:].partition("/")
            if host not in ("", "localhost"):
                raise UserError(f"file://{word[2:]} is a file of {host}, not of this machine; copy it here")
            word = f"/{rest}"
    return Path(os.path.expanduser(word))


def paths_of(text: str) -> list[Path]:
    """The paths that a text names: one that stands as it is, spaces included, or several with quotes or backslashes,
    as terminals paste them. Raises UserError on a quote that is not closed."""
    if os.path.exists(whole := _path(text)):
        return [whole]
    try:
        return [_path(word) for word in shlex.split(text)]
    except ValueError:
        raise UserError(f"{text}: a quote is not closed; close it, or write \\ before it") from None


def dropped_files(line: str) -> list[tuple[str, Path]]:
    """[(modality, path)] of a line that is nothing but paths of existing files of known modalities, else []."""
    try:
        paths = paths_of(line)
        return [(modality_of_path(path), path) for path in paths] if all(map(os.path.isfile, paths)) else []
    except UserError:
        return []


def completions(line: str, commands: tuple[str, ...]) -> list[str]:
    """What `line` can become: a command's name, or, after a command that takes files or as the first word, a path."""
    word = re.search(r"(?:\\.|[^\\\s])*$", line)[0]
    head = line[: len(line) - len(word)].split()
    found = [command for command in commands if not head and word and command.startswith(word)]
    if head and head[0][1:] not in MODALITIES or not head and word[:1] not in ("/", "~", "."):
        return found
    folder, start = os.path.split(os.path.expanduser(re.sub(r"\\(.)", r"\1", word)))
    endings = tuple(ending for modality in MODALITIES.values() for ending in modality.suffixes)
    try:
        entries = sorted(os.scandir(folder or "."), key=lambda entry: entry.name)
    except OSError:
        return found
    for entry in entries:
        known = entry.is_dir() or entry.name.lower().endswith(endings)
        if known and entry.name.startswith(start) and (start or not entry.name.startswith(".")):
            rest = re.sub(r"([^\w@%+=:,./~-])", r"\\\1", entry.name[len(start):])
            found.append(f"{line}{rest}{'/' if entry.is_dir() else ''}")
    return found
