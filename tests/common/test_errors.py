"""How a command ends: one line for a user's mistake, and no failure because of what a terminal cannot write."""

import io
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


def test_a_stream_of_the_caller_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    cli(lambda: print("\N{CAT FACE}"))()
    assert sys.stdout.getvalue() == "\N{CAT FACE}\n"
