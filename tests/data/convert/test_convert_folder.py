"""The command and its output folder, on any number of ranks, and what is refused before anything is written."""

import re
from importlib import import_module

import pytest
from conftest import ROOT
from layouts import llava, put, shards, written

from onevocab.common.errors import UserError
from onevocab.data.convert import __main__ as command
from onevocab.data.convert import convert
from onevocab.data.convert.formats import FORMATS, MODULES
from onevocab.data.convert.report import claimed


def test_ranks_write_the_same_shards(tmp_path):
    lines = [f"line {i}" for i in range(230)]
    source = put(tmp_path / "in", {"a.txt": "\n".join([*lines, "line 3\n"]).encode() + b"\xff\n", "b.txt": "one more"})
    options = {"by": "line", "parts": 2, "samples_per_shard": 40, "progress": False}
    alone = convert("text", source, tmp_path / "alone", **options)
    first = convert("text", source, tmp_path / "ranks", rank=1, world=2, **options)
    assert not (tmp_path / "ranks" / "report.json").exists() and first.samples < alone.samples
    both = convert("text", source, tmp_path / "ranks", rank=0, world=2, **options)
    assert shards(tmp_path / "ranks") == shards(tmp_path / "alone") and len(both.shards) > 4
    assert vars(both) == vars(alone) and both.dropped == {"bad text": 1, "duplicate": 1}
    assert sorted(turns[0][1][0] for turns in written(tmp_path / "ranks")) == sorted([*lines, "one more"])
    for rank in range(4):  # by default each rank gets a part
        assert convert("text", source / "a.txt", tmp_path / "four", rank, 4, by="line", progress=False).samples >= 30
    assert sorted(turns[0][1][0] for turns in written(tmp_path / "four")) == sorted(lines)


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    source = str(put(tmp_path / "in", {"a.txt": "one\n\none\n\ntwo"}) / "a.txt")
    command.main(["text", source, "--out", str(tmp_path / "out"), "--max-chars", "100"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("text: 2 samples in 1 shards (text only") and printed[0].endswith("1 dropped")
    assert printed[1] == "  dropped: 1 duplicate, as a.txt#1: the same as a.txt#0"
    for out, more, reason in (("out", [], "error: "), ("b", ["--turns", "2"], "unrecognized arguments"),
                              ("b", ["--parts", "0"], "from 1 on")):
        with pytest.raises(SystemExit) as caught:
            command.main(["text", source, "--out", str(tmp_path / out), *more])
        assert caught.value.code == 2 and reason in capsys.readouterr().err
    for name, chosen in FORMATS.items():
        with pytest.raises(SystemExit) as caught:
            command.main([name, "--help"])
        printed = capsys.readouterr().out
        assert caught.value.code == 0 and "--overwrite" in printed
        assert all(f"--{option.name.replace('_', '-')}" in printed for option in chosen.options)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    command.main(["text", source, "--out", str(tmp_path / "ranks"), "--parts", "2"])
    assert capsys.readouterr().out.startswith("rank 1: text: 0 samples in 0 shards")


def test_formats_are_listed_in_the_guide():
    """One name each, in one place each."""
    guide = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").partition("## Published data sets")[2]
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", guide, re.MULTILINE)) == sorted(FORMATS)
    modules = [import_module(f"onevocab.data.convert.{module}").FORMATS for module in MODULES]
    assert sum(map(len, modules)) == len(FORMATS)


def test_output_folder(tmp_path):
    source, out = put(tmp_path / "in", {"a.txt": "one\n\ntwo\n\nthree"}), tmp_path / "out"
    convert("text", source, out, samples_per_shard=1, progress=False)
    before = shards(out)
    assert len(before) == 3
    for again in ("text", "captions"):
        with pytest.raises(UserError, match=r"is not empty \(it holds report.json\).*--overwrite"):
            convert(again, source, out, progress=False)
    assert shards(out) == before
    put(out, {"notes.md": "mine"})
    convert("text", source, out, overwrite=True, progress=False)
    assert list(shards(out)) == ["text-00000-000000.tar"] and (out / "notes.md").read_text() == "mine"
    put(tmp_path, {"busy/report.json": {"state": "running"}, "other/notes.md": "mine", "tars/0.tar": "mine"})
    for folder, reason in (("other", "notes.md"), ("busy", "report.json"), ("in/out", "lies in the input")):
        with pytest.raises(UserError, match=reason):
            convert("text", source, tmp_path / folder, progress=False)
    with pytest.raises(UserError, match="0.tar, of no conversion"):
        convert("text", source, tmp_path / "tars", overwrite=True, progress=False)
    with pytest.raises(UserError, match="or the input in it"):
        convert("img2dataset", out / "text-00000-000000.tar", out, overwrite=True, progress=False)
    with claimed(tmp_path / "two", 0, 1, False), pytest.raises(UserError, match="another conversion is writing"):
        convert("text", source, tmp_path / "two", overwrite=True, progress=False)


def test_nothing_kept_and_wrong_options(tmp_path):
    put(tmp_path / "in", {"d.json": [llava("gone.png", "<image>", "a")], "broken.json": "[", "e.json": []})
    for file, reason in (("d.json", r"nothing of .*d.json was kept.*missing media.*d.json#0"),
                         ("broken.json", "damaged input"), ("e.json", "holds no records")):
        with pytest.raises(UserError, match=reason):
            convert("llava", tmp_path / "in" / file, tmp_path / file, progress=False)
        assert not list((tmp_path / file).iterdir())  # the corrected command finds it empty
    for name, source, options, reason in (
            ("lava", "in", {}, "choose one of captions, llava"), ("llava", "gone", {}, "no such file"),
            ("llava", "in", {"turns": 3}, "no option turns"), ("clotho", "in", {}, "holds no file"),
            ("llava", "in", {"media": tmp_path / "gone"}, "no folder of media"), ("map", "in", {}, "say by --map"),
            ("captions", "in", {"map": ["text=words"]}, "ROLE is one of file, caption"),
            ("map", "in/d.json", {"map": ["image=imgae", "conversations=conversations"]}, "no such field; .*image")):
        with pytest.raises(UserError, match=reason):
            convert(name, tmp_path / source, tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


def test_what_a_newcomer_gives_in_place_of_a_folder(tmp_path):
    put(tmp_path / "in", {"a.png": b"", "a.txt": "a dog"})
    put(tmp_path / "texts", {"b.txt": "only words"})
    for place, reason in (("in/a.png", "a.png is one file: give the folder that holds media"),
                          ("in/a.txt", "a.txt is one file: give the folder that holds media"),
                          ("texts", "caption of no medium, as b.txt: .* are read by the format text")):
        with pytest.raises(UserError, match=reason):
            convert("captions", tmp_path / place, tmp_path / "x", progress=False)
    with pytest.raises(UserError, match="cannot write into .*a.txt is no folder"):
        convert("text", tmp_path / "texts", tmp_path / "in" / "a.txt", progress=False)
