"""The commands below `python -m`: a mistake is one line, `~` is the home folder, and a folder that cannot be written is
told before any work."""

import tempfile
from pathlib import Path

import pytest
from PIL import Image
from tiny import tiny_run

from onevocab.data import survey, tokenize
from onevocab.data.convert import __main__ as convert
from onevocab.data.shards.writer import ShardFile
from onevocab.evaluation import __main__ as evaluation
from onevocab.generation import AnyToAny

COMMANDS = {"evaluation": evaluation.main, "tokenize": tokenize.main, "inspect": survey.main, "convert": convert.main}


def refused(capsys, command: str, *words) -> str:
    with pytest.raises(SystemExit) as stop:
        COMMANDS[command]([str(word) for word in words])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder with pictures, and a folder `elsewhere` to work in."""
    (tmp_path / "home" / "pictures").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (20, 20), "red").save(tmp_path / "home" / "pictures" / "a.png")
    (tmp_path / "home" / "pictures" / "a.txt").write_text("a red square")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


def test_wrong_flags_are_one_line(capsys):
    for command in COMMANDS:
        assert "--help" in refused(capsys, command)
    assert "unrecognized arguments: --limt" in refused(capsys, "evaluation", "runs/x", "--limt", "3")
    assert "--limit: invalid int value: 'few'" in refused(capsys, "evaluation", "runs/x", "--limit", "few")
    assert "--limit must be 1 or more" in refused(capsys, "evaluation", "runs/x", "--limit", "0")
    assert "invalid choice: 'nosuch'" in refused(capsys, "convert", "nosuch", "a", "--out", "b")
    assert "unrecognized arguments: --colour" in refused(capsys, "convert", "captions", "a", "--out", "b", "--colour")


def test_a_path_behind_an_equals_sign_may_begin_at_home(home, capsys):
    convert.main(["captions", "~/pictures", "--out=~/shards"])
    tiny_run(home / "run")
    tokenize.main(["~/run", "~/shards", "--out=~/codes"])
    survey.main(["~/shards", "--run=~/run", "--out=~/page.html"])
    assert list(home.glob("shards/*.tar")) and list(home.glob("codes/*.tar")) and (home / "page.html").exists()
    assert not list(Path().iterdir()), "nothing is called ~"
    capsys.readouterr()
    assert f"no run folder {home}/none" in refused(capsys, "evaluation", "~/none")
    assert "there is no such home folder" in refused(capsys, "evaluation", "~nobody-of-this-name/run")


def test_what_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch, capsys):
    run = tiny_run(tmp_path / "run")
    with ShardFile(tmp_path / "raw" / "a.tar") as shard:
        shard.write("a", {"txt": b"a word"})

    def read_only(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)  # tests may run as root, whom no permission stops
    monkeypatch.setattr(AnyToAny, "load", lambda *_: pytest.fail("the run was loaded"))
    monkeypatch.setattr(tokenize.Tokenizers, "load", lambda *_: pytest.fail("the tokenizers were loaded"))
    monkeypatch.setattr(survey, "survey", lambda *_: pytest.fail("the shards were read"))
    for words in (("evaluation", run), ("tokenize", run, tmp_path / "raw", "--out", tmp_path / "codes"),
                  ("inspect", tmp_path / "raw", "--out", tmp_path / "page.html")):
        assert "Read-only file system; make it writable, or choose another folder" in refused(capsys, *words)
