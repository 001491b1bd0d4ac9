"""What a terminal adds: editing of lines with a history, and pictures among the text."""

import base64
import io
import os
import re
import shutil
import sys
from collections.abc import Callable

from PIL import Image

from onevocab.tokenizers.modalities import MODALITIES

COLUMNS = 32  # that a picture takes; at most as many characters high


def edit_lines(complete: Callable[[str], list[str]]) -> None:
    """Gives `input` in a terminal arrow keys, a history in memory alone, and Tab. complete: the line up to the cursor
    -> what it can become. Without the module readline (Windows) lines are read as they come."""
    try:
        import readline
    except ImportError:
        return
    found: list[str] = []

    def completer(_: str, number: int) -> str | None:
        if number == 0:
            found[:] = complete(readline.get_line_buffer()[: readline.get_endidx()])
        return found[number][readline.get_begidx():] if number < len(found) else None

    readline.set_completer_delims(" \t\n")
    readline.set_completer(completer)
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")


def printable(text: str) -> str:
    """For a terminal, which would obey control characters; as it is for a pipe or a file."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text) if sys.stdout.isatty() else text


def way_to_show(environment=os.environ) -> str | None:
    """How standard output shows pictures: "kitty" or "iterm" (their protocols), "blocks" (coloured half blocks), or
    None: not a terminal, or one that says neither."""
    if not sys.stdout.isatty() or environment.get("TERM", "dumb") == "dumb":
        return None
    term, program = environment["TERM"], environment.get("TERM_PROGRAM", "")
    if "TMUX" not in environment and not term.startswith(("screen", "tmux")):  # these swallow both protocols
        if "KITTY_WINDOW_ID" in environment or term in ("xterm-kitty", "xterm-ghostty"):
            return "kitty"
        if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
            return "iterm"
    truecolor = environment.get("COLORTERM") in ("truecolor", "24bit") and "NO_COLOR" not in environment
    return "blocks" if truecolor and (sys.stdout.encoding or "").lower().replace("-", "") == "utf8" else None


def _kitty(content: bytes, columns: int) -> str:
    """PNG -> the graphics protocol of kitty: chunks of 4,096 characters, no answer asked for."""
    data = base64.b64encode(content).decode()
    chunks = [data[start : start + 4096] for start in range(0, len(data), 4096)]
    keys = [f"a=T,f=100,q=2,c={columns},", *[""] * (len(chunks) - 1)]
    return "".join(f"\x1b_G{key}m={int(number < len(chunks) - 1)};{chunk}\x1b\\"
                   for number, (key, chunk) in enumerate(zip(keys, chunks, strict=True))) + "\n"


def _iterm(content: bytes, columns: int) -> str:
    data = base64.b64encode(content).decode()
    return f"\x1b]1337;File=inline=1;size={len(content)};width={columns};preserveAspectRatio=1:{data}\x07\n"


def _blocks(picture: Image.Image, columns: int) -> str:
    """Two pixels a character: the upper one its colour, the lower one its background."""
    scale = min(columns / picture.width, 2 * columns / picture.height)
    width, height = max(round(picture.width * scale), 1), max(round(picture.height * scale / 2), 1)
    pixels = picture.resize((width, 2 * height), Image.Resampling.BOX).load()
    lines = ("".join("\x1b[38;2;{};{};{}m\x1b[48;2;{};{};{}m▀".format(*pixels[x, 2 * y], *pixels[x, 2 * y + 1])
                     for x in range(width)) for y in range(height))
    return "".join(f"{line}\x1b[0m\n" for line in lines)


def show(kind: str, value, way: str | None) -> str:
    """A value of a modality whose preview is a picture, as characters for a terminal; way: see `way_to_show`. "" where
    there is nothing to show."""
    preview = MODALITIES[kind].preview(value) if way else None
    if preview is None or not preview.mime.startswith("image/"):
        return ""
    columns = min(COLUMNS, shutil.get_terminal_size().columns)
    if way == "iterm":
        return _iterm(preview.content, columns)
    with Image.open(io.BytesIO(preview.content)) as picture:
        if way == "blocks":
            return _blocks(picture.convert("RGB"), columns)
        png = io.BytesIO()
        picture.save(png, "PNG")
    return _kitty(png.getvalue(), columns)
