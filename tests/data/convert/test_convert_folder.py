"""The output folder of a conversion, and what is refused before anything is written."""


import pytest
from test_convert import llava, put, shards

from onevocab.common.errors import UserError
from onevocab.data.convert import convert
from onevocab.data.convert.report import claimed


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
