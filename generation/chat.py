"""A conversation in a terminal: messages from standard input, answers streamed, media written as files."""

import itertools
import sys
from pathlib import Path

from onevocab.common.errors import UserError
from onevocab.tokenizers.modalities import MODALITIES

HELP = f"""Type a message. {" and ".join(f"/{name} FILE" for name in MODALITIES)} add a file to the next message,
/want any|text|{"|".join(MODALITIES)} sets what the answers are, /reset starts over, /help shows this, /quit leaves."""


def load_part(kind: str, value: str):
    """What --KIND VALUE says. Raises UserError when the file is missing or cannot be read."""
    return value if kind == "text" else MODALITIES[kind].load(Path(value))


def write_new(folder: Path, kind: str, value) -> Path:
    """Writes a value of a modality to FOLDER/KIND-N under the first free N: nothing is ever overwritten."""
    modality = MODALITIES[kind]
    content = modality.save(value)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count():
            path = folder / f"{kind}-{number}{modality.suffixes[0]}"
            try:
                with open(path, "xb") as file:
                    file.write(content)
                return path
            except FileExistsError:
                continue
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to {folder}: {reason}; choose another --out") from None


def chat(model, parts: list, out: Path, options: dict) -> None:
    """Reads messages from standard input until /quit or its end; `parts` are the first, if any.

    A user's mistake costs the message, not the chat.
    """
    messages = []
    if sys.stdin.isatty():
        print(HELP)
    answer_now = bool(parts)
    while True:
        try:
            line = "" if answer_now else input("> " if sys.stdin.isatty() else "").strip()
            answer_now = False
            command, _, value = line.partition(" ")
            if command in ("/quit", "/exit"):
                return
            elif command[:1] == "/" and command[1:] in MODALITIES:
                parts.append(load_part(command[1:], value.strip()))
            elif command == "/want":
                if value.strip() not in (choices := ("any", *model.vocab.modalities)):
                    raise UserError(f"cannot make {value.strip()!r}; choose {', '.join(choices)}")
                options["want"] = value.strip()
            elif command == "/reset":
                messages, parts = [], []
            elif command.startswith("/") and command[1:].isalpha():  # /help, or misspelt
                print(HELP)
            elif line or parts:
                turn = {"role": "user", "content": parts + ([line] if line else [])}
                parts = []
                for event in model.stream([*messages, turn], **options):
                    if event.kind == "text":
                        print(event.value, end="", flush=True)
                    elif event.kind in MODALITIES:
                        print(f"[{write_new(out, event.kind, event.value)}]", end="", flush=True)
                    elif event.kind == "reply":
                        messages += [turn, {"role": "assistant", "content": event.value.segments}]
                        print()
                options["seed"] += 1
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except EOFError:
            return
