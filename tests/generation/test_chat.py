"""The chat without a model: files, commands, the order of parts, a full context; then in a terminal of its own."""

import ast
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from chatting import FakeModel, new_chat
from conftest import ROOT
from PIL import Image

from onevocab.generation.chat import COMMANDS, HELP, Chat


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The current folder, with pictures and a sound under names that people have."""
    monkeypatch.chdir(tmp_path)
    for name in ("cat.png", "my cat.png", "it's #1.png"):
        Image.new("RGB", (40, 30), "red").save(name)
    soundfile.write("hello.wav", np.ones(8000, np.float32) / 2, 16_000)
    Path("notes.txt").write_text("notes")
    return tmp_path


@pytest.fixture
def talk(monkeypatch, capsys, tmp_path):
    def run(*lines, chat: Chat | None = None, parts=()):
        chat = chat or new_chat(tmp_path / "out")
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
        chat.run(list(parts))
        return chat, *capsys.readouterr()
    return run


def said(message) -> list[str]:
    return [part.content if part.modality == "text" else part.modality for part in message["content"]]


def test_files_are_taken_in_the_order_given_and_said(files, talk):
    chat, out, err = talk("/image cat.png", "/audio hello.wav", "/image 'my cat.png' cat.png", "what?", "and now?",
                          chat=new_chat(files, FakeModel(context_length=1000)))
    assert said(chat.model.asked[0][-1]) == ["image", "audio", "image", "image", "what?"]
    assert said(chat.model.asked[1][-1]) == ["and now?"]  # once, in the message that they were given with
    assert [said(message) for message in chat.model.asked[1]][:2] == [said(chat.model.asked[0][-1]), ["what?"]]
    assert out == "what?\nand now?\n"
    assert err.splitlines() == ["(image cat.png: 40x30, 20 tokens)", "(audio hello.wav: 0.5 s at 16,000 Hz, 12 tokens)",
                                "(image my cat.png: 40x30, 20 tokens)", "(image cat.png: 40x30, 20 tokens)"]


def test_paths_as_people_and_terminals_write_them(files, talk, monkeypatch):
    monkeypatch.setenv("HOME", str(files))
    lines = ["/image my cat.png", "/image my\\ cat.png", '/image "my cat.png"', "/image ~/cat.png",
             f"/image file://{files}/my%20cat.png", f"file://localhost{files}/it%27s%20%231.png",
             "'it'\\''s #1.png'", f"{files}/cat.png", "cat.png  hello.wav ", f"{files}/my\\ cat.png {files}/cat.png"]
    chat, _, err = talk(*lines)
    assert [part.modality for part in chat.parts] == ["image"] * 9 + ["audio"] + ["image"] * 2 and "error" not in err


def test_what_is_no_file_is_a_message_or_one_line(files, talk):
    files.joinpath("bad.png").write_text("no picture")
    messages = ["is it cat.png?", "notes.txt", "it's a \"quote", "x" * 5000, "cat.png none.png"]
    chat, out, err = talk(*messages, "/image none.png", "/image 'cat.png", "/image", f"{files}/notes.txt",
                          f"{files}/none.png", str(files), "/image file://elsewhere/a.png", "/image cat.png none.png",
                          "/image notes.txt", "/image " + "x" * 5000, "bad.png")
    assert [said(asked[-1])[0] for asked in chat.model.asked] == messages
    reasons = ("no such file: none.png", "a quote is not closed", "which file? /image PATH", "unknown kind of file",
               "no such file", "unknown kind of file", "file of elsewhere", "no such file: none.png",
               "cannot read notes", "", "cannot read bad")
    errors = [line for line in err.splitlines() if not line.startswith("(the message")]
    assert len(errors) == len(reasons) and not chat.parts  # all of a line's files, or none
    assert all(line.startswith("error: ") and reason in line for line, reason in zip(errors, reasons, strict=True))


def test_commands(talk):
    chat, out, err = talk("/want image", "/want smell", "/set temperature 0.7", "/set temprature 1", "/set seed=5",
                          "/set temperature", "/imgae x", "/rest", "/nonsense", "/help", "hello", "/reset", "/quit",
                          "never read")
    assert chat.options == {"want": "image", "temperature": None, "seed": 6.0, "max_new_tokens": None}
    assert chat.messages == [] and len(chat.model.asked) == 1 and out == f"{HELP}\nhello\n"
    for part in ("cannot make 'smell'; choose any, text, image, audio", "temperature 0.7", "did you mean temperature?",
                 "did you mean /image?", "did you mean /reset?", "unknown command /nonsense; /help lists them"):
        assert part in err, part
    assert all(command in HELP for command in COMMANDS) and HELP.count("\n") < 12


def test_a_modality_that_the_model_lacks(files, talk):
    model = FakeModel()
    model.vocab = type(model.vocab).build(256, [{"name": "image", "sizes": 8, "codes": 16, "rows": 0}])
    chat, _, err = talk("/audio hello.wav", chat=new_chat(files, model))
    assert err == "error: this model takes no audio; it knows text, image\n" and not chat.parts


def test_a_full_context_drops_the_oldest_and_says_so(talk):
    lines = [" ".join([f"w{turn}"] * 12) for turn in range(6)]  # 2 + 2 * (2 + 12) tokens an exchange, of 100
    chat, _, err = talk(*lines, "a " * 90, "b " * 120, chat=new_chat(".", max_new_tokens=20))
    asked = [[said(message)[0].split()[0] for message in messages] for messages in chat.model.asked]
    assert asked[2] == ["w0", "w0", "w1", "w1", "w2"] and asked[3] == ["w1", "w1", "w2", "w2", "w3"]
    assert [messages[0]["role"] for messages in chat.model.asked] == ["user"] * 7
    lines = err.splitlines()
    assert lines[0] == ("(the context of 100 tokens is nearly full: the oldest message is dropped, files and answers "
                        "included; /reset forgets all)")
    assert asked[-1] == ["a"] and "the answer may be cut after 6)" in lines[-2]
    assert lines[-1].startswith("error: the context is full: this message alone takes 124 of 100")
    assert said(chat.messages[0])[0].startswith("a ")  # the refused message dropped nothing


def test_cut_answers_are_said(talk):
    _, _, err = talk("hello", "cut", chat=new_chat(".", max_new_tokens=3))
    assert err == ("(the answer was cut at 3 new tokens; raise max_new_tokens (in the chat: /set max_new_tokens N))\n")


def test_bytes_that_are_no_text_and_a_closed_input(tmp_path):
    command = [sys.executable, Path(__file__).parent / "chatting.py", tmp_path]
    done = subprocess.run(command, input=b"\xff\xfe\nhello\n", capture_output=True, cwd=ROOT)
    assert done.stdout.startswith(b"hello\n") and done.returncode == 0
    assert done.stderr == b"error: this line is not UTF-8 text; it was not read\n"
    done = subprocess.run(f'"{sys.executable}" "{command[1]}" . <&-', shell=True, capture_output=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith(b"error: standard input is closed")


# In a terminal.


class Terminal:
    """A process whose terminal we are."""

    def __init__(self, folder: Path, **environment: str):
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            dropped = ("HOME", "TMUX", "KITTY_WINDOW_ID", "NO_COLOR")
            kept = {name: value for name, value in os.environ.items() if name not in dropped}
            program = [sys.executable, str(Path(__file__).parent / "chatting.py"), str(folder / "out")]
            os.chdir(folder)
            os.execve(sys.executable, program, kept | {"TERM": "xterm", "PYTHONUTF8": "1"} | environment)
        self.output, self.read = "", 0

    def until(self, text: str, seconds: float = 30) -> None:
        """Reads until `text` comes after what the last call waited for."""
        end = time.monotonic() + seconds
        while text not in self.output[self.read:]:
            assert time.monotonic() < end, f"no {text!r} in {self.output[self.read:]!r}"
            if select.select([self.terminal], [], [], 0.1)[0]:
                try:
                    self.output += os.read(self.terminal, 65536).decode(errors="replace")
                except OSError:  # the process is gone
                    assert text in self.output[self.read:], f"ended without {text!r}: {self.output[self.read:]!r}"
        self.read = self.output.index(text, self.read) + len(text)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def interrupt(self, text: str) -> None:
        """Ctrl-C, until the process says `text`. CPython misses one that comes just before it waits for a key."""
        for _ in range(4):
            time.sleep(0.2)
            self.type("\x03")
            try:
                return self.until(text, seconds=5)
            except AssertionError:
                self.type(" ")
        self.until(text, seconds=0)

    def end(self, begun: bool = False) -> tuple[int, list]:
        """The exit code, and the conversation as it was when the chat ended. begun: its "[" was waited for."""
        if not begun:
            self.until("\n[")
        self.until("]\r\n")
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.terminal)
        assert "Traceback" not in self.output and "error" not in self.output
        return code, ast.literal_eval(self.output.splitlines()[-1])


@pytest.fixture
def terminal(files):
    opened = []

    def start(**environment) -> Terminal:
        opened.append(Terminal(files, **environment))
        opened[-1].until("> ")
        return opened[-1]
    yield start
    for each in opened:
        try:
            os.kill(each.pid, signal.SIGKILL)
            os.waitpid(each.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(terminal):
    term = terminal()
    term.type("slow\r")
    term.until("word3 ")
    term.interrupt("(stopped; what was said is kept)")
    term.until("> ")
    term.type("wait\r")
    term.until("wait\r\n")
    term.interrupt("(stopped before anything was said; the message is dropped)")
    term.until("> ")
    term.type("draw on\r")
    term.until("image-0.png]")
    term.interrupt("(stopped; what was said is kept)")
    term.until("> ")
    term.type("hello\r")
    term.until("\nhello\r\n")
    term.until("> ")
    term.type("\x04")  # Ctrl-D
    code, messages = term.end()
    assert code == 0 and [role for role, _ in messages] == ["user", "assistant"] * 3
    assert "".join(messages[1][1]).startswith("word0 word1 word2 word3 ") and messages[4][1] == ["hello"]
    assert messages[2:4] == [["user", ["draw on"]], ["assistant", ["image"]]]


@pytest.mark.parametrize("before", ["", "half a line", "slow\r"])
def test_a_second_ctrl_c_ends_the_chat(terminal, before):
    term = terminal()
    term.type(before)
    term.until("word1 " if before == "slow\r" else before)
    term.interrupt("kept)" if before == "slow\r" else "(Ctrl-C again, or Ctrl-D, ends the chat)")
    term.until("> ")
    term.interrupt("\n[")
    code, messages = term.end(begun=True)
    assert ("ends the chat)" in term.output) == (before != "slow\r")  # it was the second one already
    assert code == 0 and len(messages) == (2 if before == "slow\r" else 0)


def test_a_line_in_between_forgives_a_ctrl_c(terminal):
    term = terminal()
    for _ in range(3):
        term.interrupt("ends the chat)")
        term.until("> ")
        term.type("hello\r")
        term.until("\nhello\r\n")
        term.until("> ")
    term.type("/quit\r")
    assert term.end()[0] == 0


def test_lines_are_edited_remembered_and_completed(terminal):
    pytest.importorskip("readline")
    term = terminal()
    term.type("helo\x1b[Dl\r")  # left, then the missing letter
    term.until("\nhello\r\n")
    term.until("> ")
    term.type("\x1b[A, you\r")  # up
    term.until("\nhello, you\r\n")
    term.until("> ")
    term.type("/im\t my\t\r")
    term.until("(image my cat.png: 40x30, 20 tokens)")
    term.until("> ")
    term.type("what?\r")
    term.until("\nwhat?\r\n")
    term.until("> ")
    term.type("\x04")
    code, messages = term.end()
    assert code == 0 and [content for role, content in messages if role == "user"] == [
        ["hello"], ["hello, you"], ["image", "what?"]]


@pytest.mark.parametrize("environment,drawn", [({"COLORTERM": "truecolor"}, "48;2;255;0;0m▀"), ({"COLORTERM": ""}, ""),
                                               ({"TERM": "xterm-kitty"}, "\x1b_Ga=T,f=100,q=2,c=32,m=0;"),
                                               ({"TERM_PROGRAM": "iTerm.app"}, "\x1b]1337;File=inline=1;")])
def test_pictures_are_shown_where_the_terminal_can(terminal, environment, drawn):
    term = terminal(**{"COLORTERM": ""} | environment)
    term.type("draw\r")
    term.until("image-0.png]")
    term.until(drawn or "\r\n> ")
    term.type("/show off\r")
    term.until("> ")
    before = len(term.output)
    term.type("draw\r")
    term.until("image-1.png]")
    term.until("> ")
    assert "▀" not in term.output[before:] and "\x1b_G" not in term.output[before:]
    term.type("\x04")
    assert term.end() == (0, [["user", ["draw"]], ["assistant", ["image"]]] * 2)


def test_a_pipe_gets_no_pictures_and_what_the_model_says_as_it_is(tmp_path):
    command = [sys.executable, Path(__file__).parent / "chatting.py", tmp_path]
    done = subprocess.run(command, input=b"draw\n\x1b[31mred\n", capture_output=True, cwd=ROOT,
                          env=os.environ | {"COLORTERM": "truecolor", "TERM": "xterm-kitty"})
    assert done.stdout.startswith(f"[{tmp_path / 'image-0.png'}]\n\x1b[31mred\n[".encode()) and done.stderr == b""


def test_a_terminal_obeys_no_control_characters_of_the_model(terminal):
    term = terminal()
    term.type("esc\r")
    term.until("]0;mine\N{REPLACEMENT CHARACTER}")
    assert "\x1b]0;" not in term.output


def test_ctrl_c_without_a_terminal_is_one_line(tmp_path):
    command = [sys.executable, "-u", Path(__file__).parent / "chatting.py", tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(b"slow\n")
        process.stdin.flush()
        assert process.stdout.read(6) == b"word0 "
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130 and process.stderr.read() == b"error: interrupted\n"
