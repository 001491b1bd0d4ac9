"""Converters of tables whose columns the user names, or that say themselves what they hold."""

import io
import sys

import pytest
import soundfile
from layouts import AB, WAV, as_csv, as_lines, converted, jpg, lost, plain, put, records, talk
from samples import flac, png

from onevocab.common.errors import UserError
from onevocab.data.convert import convert
from onevocab.data.convert.mapped import guess

MESSAGES = records("role content", ("system", "Be kind."), ("user", [
    {"type": "image"}, {"type": "text", "text": "What?"}]), ("assistant", "A dog."))
FIELDS = ["instruction=q", "input=more", "response=a", "image=files.picture", "audio=files.sound"]

# format, files, options, what the shards say, what is dropped or left out
CASES = {
    "map": ("map", {"0.png": png(0), "0.flac": flac(0), "t.json": [
        {"q": "Who?", "more": "Say it.", "a": ["", "He."], "files": {"picture": "0.png", "sound": "/x/0.flac"}},
        *records("q a files", ("No file", "ok", None), ("Who?", "", {}), ("", "x", {}), ("?", "x", {"picture": "1"}))]},
     {"map": FIELDS}, [talk([png(0), flac(0), "Who?\nSay it."], "He."), talk("No file", "ok")],
     {"empty answer": 1, "empty question": 1, "missing media": 1}),
    "map conversations": ("map", {"0.png": png(0), "c.jsonl": as_lines({"m": MESSAGES, "i": "0.png"})},
     {"map": ["conversations=m", "image=i"]},
     [[("system", ["Be kind."]), *talk([png(0), "What?"], "A dog.")]], {}),
    "map texts": ("map", {"0.png": png(0), "p.csv": as_csv(("t", "image"), ("a dog", "0.png"), ("no file", ""))},
     {"map": ["text=t", "image=image"]}, [plain(png(0), "a dog")], {"missing media": 1}),
    "records below a key": ("map", AB | {"d.json": {"info": {"n": 1}, "annotations": records(
        "q a i", ("Why?", "So.", "None"), ("Why?", "So.", "a.png"))}},
        {"map": ["instruction=q", "response=a", "image=i"]}, [talk("Why?", "So."), talk([png(0), "Why?"], "So.")], {}),
    "a template of names": ("map", {"7.wav": WAV, "d.json": {"data": records("audio_id q a", (7, "Why?", "So."))}},
                            {"map": ["instruction=q", "response=a"], "file": "{audio_id}.wav"},
                            [talk([WAV, "Why?"], "So.")], {}),
}


@pytest.mark.parametrize("name, files, options, expected, dropped", CASES.values(), ids=CASES)
def test_layouts(tmp_path, name, files, options, expected, dropped):
    report, samples = converted(name, put(tmp_path / "in", files), tmp_path / "out", **options)
    assert samples == expected and lost(report) == dropped


def test_roles_of_columns():
    assert guess(["id", "audio", "sentence"], ["audio"], ["sentence"], {}) == {"audio": "audio", "text": "sentence"}
    assert guess(["image", "question", "answer", "input"], ["image"], ["answer"], {}) == {
        "image": "image", "instruction": "question", "response": "answer", "input": "input"}
    assert guess(["a", "b", "text"], ["a", "b"], ["text"], {"image": "a"}) == {"image": "a", "text": "text"}
    assert guess(["img", "words"], ["img"], [], {"text": "words"}) == {"image": "img", "text": "words"}
    for names, files, named in ((["a", "b", "text"], ["a", "b"], {}), (["img", "words"], ["img"], {}),
                                (["a", "b"], [], {"instruction": "a"})):
        with pytest.raises(UserError, match="--map"):
            guess(names, files, names, named)


def test_roles_given_twice(tmp_path):
    with pytest.raises(UserError, match="image is given twice, a before"):
        convert("map", put(tmp_path, {"d.json": []}), tmp_path / "x", map=["image=a", "image=b", "text=t"])


def test_folders_of_datasets(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    pictures = records("bytes path", (png(0), "a.png"), (None, "gone.png"), (None, "0.png"))
    table = pyarrow.table({"image": [*pictures, None], "text": ["a dog é", "gone", "by its path", "no picture"]})
    put(tmp_path / "in", {"data/test-00000-of-00001.parquet": b"not asked for", "0.png": png(1),
                          "data/train-00001-of-00002.parquet": b"PAR1 damaged"})
    parquet.write_table(table, tmp_path / "in" / "data" / "train-00000-of-00002.parquet")
    expected = [plain(png(0), "a dog é"), plain(png(1), "by its path")]
    report, samples = converted("huggingface", tmp_path / "in", tmp_path / "out", split="train")
    assert samples == expected and report.dropped == {"missing media": 2, "damaged input": 1}
    for new in (pyarrow.ipc.new_stream, pyarrow.ipc.new_file):
        folder = put(tmp_path / new.__name__, {"0.png": png(1), "state.json": {}})
        with new(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
            writer.write_table(table)
        assert converted("huggingface", folder, tmp_path / f"{new.__name__}-out")[1] == expected
    columns = {"key": ["0", "1"], "status": ["success", "failed"], "caption": ["c", "d"], "jpg": [jpg(0), None]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "00000.parquet")
    report, samples = converted("img2dataset", tmp_path / "00000.parquet", tmp_path / "i")
    assert samples == [plain(jpg(0), "c")] and report.dropped == {"not downloaded": 1}


def test_columns_of_datasets(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    source = put(tmp_path / "in", {"notes.md": ""})
    sound = {"path": "a.wav", "array": [0.5, -0.5], "sampling_rate": 8000}
    for file, columns in {
            "a": {"audio": [sound], "text": ["two"]},
            "b": {"image": [{"bytes": png(0), "path": "a.tiff"}], "text": ["x"]},
            "c": {"number": [1]}, "d": {"question": ["?"], "choices": [["x", "y"]], "answer": [1]},
            "e": {"question": ["?"], "answers": [["", "x"]]}}.items():
        parquet.write_table(pyarrow.table(columns), source / f"{file}.parquet")
    report, samples = converted("huggingface", source, tmp_path / "out")
    assert samples[1:] == [plain(png(0), "x"), talk("?", "x")] and samples[0][0][1][1] == "two"
    assert soundfile.read(io.BytesIO(samples[0][0][1][0]))[0].tolist() == [0.5, -0.5]
    assert report.dropped == {"unclear columns": 2} and "say by --map" in report.first["unclear columns"][0]
    with pytest.raises(UserError, match="--map instruction=question --map response=COLUMN"):
        convert("huggingface", source / "d.parquet", tmp_path / "d", progress=False)
    for names, texts in (["question", "answer"], ["question"]), (["question", "answer", "options"], ["answer"]):
        with pytest.raises(UserError, match="answer may be no answer in words"):
            guess(names, [], texts, {})


def test_columns_need_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"onevocab\[convert\]"):
        convert("huggingface", put(tmp_path / "in", {"train.parquet": b"PAR1"}), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
