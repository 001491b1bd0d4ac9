"""A conversation: messages from a terminal or a pipe, answers streamed, media written as files."""

import difflib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from onevocab.common.errors import UserError
from onevocab.generation.context import fit, remark
from onevocab.generation.files import completions, dropped_files, load_part, paths_of, write_new
from onevocab.generation.terminal import edit_lines, printable, show, way_to_show
from onevocab.tokenizers.document import Segment
from onevocab.tokenizers.modalities import MODALITIES, modality_of_path

FILES = ", ".join(f"/{name}" for name in MODALITIES)
COMMANDS = (*(f"/{name}" for name in MODALITIES), "/want", "/set", "/show", "/reset", "/help", "/quit")
HELP = f"""\
Type a message; Enter sends it. The answer sees the whole conversation, until the context is full.
{FILES} PATH...   add files to the next message; so does a line of nothing but their paths
/want any|text|{"|".join(MODALITIES)}   what the answers are
/set [NAME [VALUE]]   the sampling options; no VALUE: as at the start
/show on|off   pictures in the terminal, where it can
/reset   forget the conversation
/help, /quit
Ctrl-C stops an answer: what was said is kept, a picture or sound that is not whole is not. Twice, or Ctrl-D: quit."""


def say(text: str) -> None:
    """To the user, not part of an answer."""
    sys.stdout.flush()
    print(printable(text), file=sys.stderr, flush=True)


class Chat:
    """model: an `AnyToAny`; options: `stream`'s; parse: (name, text) -> an option's value, raising UserError;
    way: how pictures are shown (see `way_to_show`)."""

    def __init__(self, model, out: Path, options: dict, parse: Callable[[str, str], object], way: str | None):
        self.model, self.out, self.options, self.start, self.parse = model, out, options, dict(options), parse
        self.way, self.last_way = way, way
        self.messages: list[dict] = []
        self.parts: list = []  # files of the next message
        self.stopped = False  # by Ctrl-C, since the last line
        if sys.stdin is None:
            raise UserError("standard input is closed; the chat reads its messages from it")
        self.interactive = sys.stdin.isatty()

    def run(self, parts: list) -> None:
        """Until /quit or the end of the input; `parts` are the first message, if any. A user's mistake costs the
        message, not the chat. Ctrl-C without a terminal is the caller's."""
        if self.interactive:
            say(HELP)
            edit_lines(lambda line: completions(line, COMMANDS))
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # a byte that is not text costs a line, not the chat
        message = parts or None
        try:
            while True:
                try:
                    line = "" if message else self.read()
                    if line.strip() in ("/quit", "/exit"):
                        return
                    if message or not self.command(line.strip()):
                        message, content = None, message or [*self.parts, *([line.strip()] if line.strip() else [])]
                        self.parts = []
                        if content:
                            self.answer(content)
                except UserError as error:
                    say(f"error: {error}")
                    message = None
                except KeyboardInterrupt:
                    if self.stopped or not self.interactive:
                        raise
                    self.stopped, message = True, None
                    say("\n(Ctrl-C again, or Ctrl-D, ends the chat)")
        except EOFError:
            pass
        except KeyboardInterrupt:
            if not self.interactive:
                raise
        if self.interactive:
            print()

    def read(self) -> str:
        line = input("> " if self.interactive and sys.stdout.isatty() else "")
        self.stopped = False
        try:
            line.encode()
        except UnicodeEncodeError:
            raise UserError("this line is not UTF-8 text; it was not read") from None
        return line

    # The commands.

    def command(self, line: str) -> bool:
        """Does what a line says that is no message; False: it is one."""
        if files := dropped_files(line):
            self.attach(files)
            return True
        if not line.startswith("/"):
            return False
        word, value = line.split()[0], " ".join(line.split(maxsplit=1)[1:])
        if word[1:] in MODALITIES:
            if not value:
                raise UserError(f"which file? {word} PATH")
            self.attach([(word[1:], path) for path in paths_of(value)])
        elif word in COMMANDS:
            getattr(self, f"on_{word[1:]}")(value)
        elif os.path.exists(line):
            modality_of_path(line)  # names the known endings
            raise UserError(f"{line} is no file; give a picture's or a sound's path")
        elif "/" in word[1:]:
            raise UserError(f"no such file: {line}; check the path (/help lists the commands)")
        else:
            near = difflib.get_close_matches(word.lower(), COMMANDS, 1)
            raise UserError(f"unknown command {word}; {f'did you mean {near[0]}? ' if near else ''}/help lists them")
        return True

    def attach(self, files: list[tuple[str, Path]]) -> None:
        """Adds files to the next message, all or none, and says what they are."""
        added = []
        for kind, path in files:
            if kind not in self.model.vocab.spans:
                raise UserError(f"this model takes no {kind}; it knows {', '.join(self.model.vocab.modalities)}")
            try:
                value = load_part(kind, str(path))
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror or error}") from None
            [segment] = self.model.encode([value])[0]["content"]
            tokens = self.model.vocab.spans[kind].tokens(segment.content.shape)
            added.append((segment, f"{kind} {path.name}: {MODALITIES[kind].preview(value).label}, {tokens} tokens"))
        for segment, label in added:
            self.parts.append(segment)
            say(f"({label})")

    def on_want(self, value: str) -> None:
        if value not in (choices := ("any", *self.model.vocab.modalities)):
            raise UserError(f"cannot make {value!r}; choose {', '.join(choices)}")
        self.options["want"] = value

    def on_set(self, value: str) -> None:
        name, value = [*re.split(r"[\s=]+", value, maxsplit=1), ""][:2]
        name = name.replace("-", "_")
        if name == "want" and value:
            return self.on_want(value)
        if name and name not in self.options:
            near = difflib.get_close_matches(name, self.options, 1)
            raise UserError(f"no option {name!r}; {f'did you mean {near[0]}? ' if near else ''}"
                            f"choose {', '.join(self.options)}")
        if name:
            self.options[name] = self.parse(name, value) if value else self.start[name]
        say(", ".join(f"{key} {'default' if each is None else each}" for key, each in self.options.items()))

    def on_show(self, value: str) -> None:
        if value not in ("on", "off"):
            raise UserError("/show on, or /show off")
        self.way = (self.last_way or way_to_show()) if value == "on" else None
        if value == "on" and self.way is None:
            say("(this terminal shows no pictures)")

    def on_reset(self, _: str) -> None:
        self.messages, self.parts = [], []

    def on_help(self, _: str) -> None:
        print(HELP)

    # The answer.

    def answer(self, content: list) -> None:
        """One message and its answer, streamed. Both join the conversation when the answer ends, or is stopped after
        something was said; else neither does."""
        want, limit = self.options["want"], self.options["max_new_tokens"]
        fitted = fit(self.model, [*self.messages, {"role": "user", "content": content}], want, limit)
        if fitted.dropped:
            oldest = "oldest message is" if fitted.dropped == 1 else f"{fitted.dropped} oldest messages are"
            say(f"(the context of {self.model.context_length} tokens is nearly full: the {oldest} dropped, files and "
                "answers included; /reset forgets all)")
        if fitted.left < fitted.reserved:
            say(f"(the message takes {fitted.prompt_tokens} of the context's {self.model.context_length} tokens: "
                f"the answer may be cut after {fitted.left})")
        said: list[Segment] = []
        try:
            for event in self.model.stream(fitted.messages, **self.options):
                if event.kind == "text":
                    said.append(Segment("text", event.value))
                    print(printable(event.value), end="", flush=True)
                elif event.kind in MODALITIES:
                    self.print_medium(event.kind, event.value)
                    said.append(Segment(event.kind, event.codes))
                elif event.kind == "reply":
                    said = event.value.segments or [Segment("text", "")]
                    print(flush=True)
                    if note := remark(self.model, event.value, want, limit):
                        say(f"({note})")
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            self.stopped = True
            say("\n(stopped; what was said is kept)" if said else
                "\n(stopped before anything was said; the message is dropped)")
        self.options["seed"] += 1
        if said:
            self.messages = [*fitted.messages, {"role": "assistant", "content": said}]

    def print_medium(self, kind: str, value) -> None:
        print(f"[{write_new(self.out, kind, value)}]", end="", flush=True)
        if drawn := show(kind, value, self.way):
            print(f"\n{drawn}", end="", flush=True)
