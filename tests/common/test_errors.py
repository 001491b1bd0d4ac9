"""How a command ends: one line for a user's mistake, and no failure because of what a terminal cannot write."""

import io
import shlex
import subprocess
import sys

import pytest

from onevocab.common.errors import UserError, cli


@pytest.mark.parametrize("encoding, errors", [("latin-1", "strict"), ("ascii", "strict"), ("utf-8", "strict")])
def test_names_that_the_terminal_cannot_write(monkeypatch, encoding, errors):
    """An emoji, and bytes of a file's name that are no text."""
    out, err = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding, errors))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(err, encoding, errors))

    @cli
    def main():
        print("no caption \N{CAT FACE} \udcff")
        raise UserError("what is \N{CAT FACE}")

    with pytest.raises(SystemExit) as caught:
        main()
    sys.stdout.flush()
    sys.stderr.flush()
    cat = "\N{CAT FACE}" if encoding == "utf-8" else "\\U0001f431"
    assert caught.value.code == 2 and out.getvalue().decode() == f"no caption {cat} \\udcff\n"
    assert err.getvalue().decode() == f"error: what is {cat}\n"


def test_a_reader_that_goes_away_ends_the_command_without_a_word():
    code = ("from onevocab.common.errors import cli\n"
            "@cli\ndef main():\n    for i in range(100_000): print('a line', i)\nmain()")
    command = f"{shlex.join([sys.executable, '-c', code])} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["a line 0", "141"] and not done.stderr


def test_a_stream_of_the_caller_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    cli(lambda: print("\N{CAT FACE}"))()
    assert sys.stdout.getvalue() == "\N{CAT FACE}\n"


def test_a_closed_output_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert cli(lambda: print("nobody reads") or 3)() == 3
