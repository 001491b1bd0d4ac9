"""Converters: layouts that differ from the usual ones, and records that come with a surprise."""

import gzip
import io
import json
import sys

import numpy as np
import pytest
import soundfile
from PIL import Image
from samples import flac, png
from test_convert import SHORT, WAV, as_csv, as_lines, converted, jpg, llava, plain, put, records, talk

from onevocab.common.errors import UserError
from onevocab.data.convert import convert, video
from onevocab.data.convert.mapped import guess
from onevocab.data.convert.media import MediaFolder
from onevocab.data.convert.samples import Dropped, fill

PAGE_END = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"
VQA = {"v2_OpenEnded_mscoco_train2014_questions.json": {"questions": records(
    "question_id image_id question", (90, "9", "What?"), (91, "9", "Is it?"))},
    "v2_mscoco_train2014_annotations.json": {"annotations": [
        {"question_id": 90, "multiple_choice_answer": "cat", "answers": [{"answer": "dog"}] * 10},
        {"question_id": 91, "multiple_choice_answer": "", "answers": [{"answer": "no"}, *[{"answer": "yes"}] * 2]}]},
    "v2_OpenEnded_mscoco_test2015_questions.json": {"questions": []}, "COCO_train2014_000000000009.jpg": jpg(9)}
CHART = records("imgname query label", ("1.png", "?", "x"))
AB = {"a.png": png(0), "b.png": png(1)}

# format, files, options, what the shards say, what is dropped or left out
CASES = {
    "pages of several documents": ("obelics", {"a.png": png(0), "b.png": png(1), "o.jsonl": as_lines(
        {"images": [None, "a.png", None, None, "b.png", None, None],
         "texts": ["One", None, f"end.{PAGE_END}Two", f"more{PAGE_END}", None, f"x {PAGE_END} y", PAGE_END]})},
        {}, [plain("One", png(0), "end."), plain(png(1), "x")], {"missing media": 2}),
    "pictures without a place": ("llava", AB | {"d.json": [
        llava(["a.png", "b.png"], "<image> Why?", "So."), llava(["a.png", "b.png"], "Why?", "So."),
        llava(["a.png", "b.png"], "Hm", "<image>", "Why?", "So."), llava(["a.png", "b.png"], "Q", "A", "<image>")]},
        {}, [talk([png(0), png(1), "Why?"], "So.")]
        + [talk("Hm", [png(0), png(1)], "Why?", "So."), talk([png(1), "Q"], "A")], {"duplicate": 1}),
    "a picture before the first question": ("llava", AB | {"d.json": [
        llava("a.png", "Look: <image>", "Why?", "So.", first=1), llava(["a.png", "b.png"], "", "<image>", "Why?", "So.")
    ]}, {}, [talk([png(0), "Why?"], "So.")], {"empty question": 1}),
    "an empty answer": ("llava", {"d.json": [
        llava(None, "Why?", "So.", "And?", " "), llava(None, "Why?", "", "And?", "B")]},
                        {}, [talk("Why?", "So.")], {"empty answer": 1}),
    "tags in a text": ("llava", {"d.json": [llava(None, "What does <image> do in\r\nSVG, <video>?", "It shows a file."),
                                            llava(None, "<image>\nWhat?", "A"), llava(None, "What?\n<image>", "A")]},
                       {}, [talk("What does <image> do in\nSVG, <video>?", "It shows a file.")], {"missing media": 2}),
    "LRV": ("llava", {"7.jpg": jpg(7), "8.png": png(8), "d.json": records(
        "image_id question answer task", ("7", "Why?", "So.", "t"), ("8.png", "Why?", "So.", "t"), (6, "?", "x", "t"))},
        {}, [talk([jpg(7), "Why?"], "So."), talk([png(8), "Why?"], "So.")], {"missing media": 1}),
    "StableLLaVA": ("llava", AB | {"d.json": records("id image prompt question answer",
                                                     (1, "a.png", "a red dog", "Why?", "So."))},
                    {}, [talk([png(0), "Why?"], "So.")], {}),
    "records below a key": ("map", AB | {"d.json": {"info": {"n": 1}, "annotations": records(
        "q a i", ("Why?", "So.", "None"), ("Why?", "So.", "a.png"))}},
        {"map": ["instruction=q", "response=a", "image=i"]}, [talk("Why?", "So."), talk([png(0), "Why?"], "So.")], {}),
    "a template of names": ("map", {"7.wav": WAV, "d.json": {"data": records("audio_id q a", (7, "Why?", "So."))}},
                            {"map": ["instruction=q", "response=a"], "file": "{audio_id}.wav"},
                            [talk([WAV, "Why?"], "So.")], {}),
    "transcriptions": ("captions", {"metadata.csv": as_csv(("file_name", "transcription"), ("a.flac", "go on")),
                                    "a.flac": flac(0), "sub/metadata.jsonl": as_lines(
                                        {"file_name": "b.flac", "transcript": "stop"}), "sub/b.flac": flac(1)},
                       {}, [plain(flac(0), "go on"), plain(flac(1), "stop")], {}),
    "captions below a key": ("captions", AB | {"d.json": {"data": records("file caption", ("a.png", "x"))}},
                             {}, None, {}),
    "splits of charts": ("chartqa", {f"{split}/h.json": CHART for split in ("train", "val")} | {
        "train/png/1.png": png(1), "val/png/1.png": png(2)},
                         {}, [talk([png(1), f"? {SHORT}"], "x"), talk([png(2), f"? {SHORT}"], "x")], {}),
    "questions without answers": ("vqav2", VQA, {}, [talk([jpg(9), f"What? {SHORT}"], "cat", "Is it?", "yes")],
                                  {"missing answers": 1}),
    "numbers in a CSV": ("audiocaps", {"t.csv": as_csv("youtube_id start_time caption".split(), ("007", 30, "a"),
                                                       ("x", "?", "b")), "007_000030.wav": WAV},
                         {"file": "{youtube_id}_{start_time:06d}.wav"}, [plain(WAV, "a")], {"bad record": 1}),
    "ends of lines": ("text", {"a.txt": "one\r\ntwo\r\n\r\nthree", "b.jsonl": as_lines({"text": "four\r\nfive"})},
                      {}, [plain("one\ntwo"), plain("three"), plain("four\nfive")], {}),
    "ends of lines in captions": ("captions", {"a.png": png(0), "a.txt": "one\u2028two\x0cthree\r\nfour\rfive"}, {},
                                  [plain(png(0), said) for said in ("one\u2028two\x0cthree", "four", "five")], {}),
    "a compressed list": ("llava", {
        "d.json.gz": gzip.compress(json.dumps([llava(None, "Why?", "So.")], indent=1).encode()),
        "e.json.gz": gzip.compress(as_lines(llava(None, "What?", "A")).encode()),
        "f.json.gz": gzip.compress(b"[{}, ")},
                          {}, [talk("Why?", "So."), talk("What?", "A")], {"damaged input": 1}),
}


@pytest.mark.parametrize("name, files, options, expected, dropped", CASES.values(), ids=CASES)
def test_layouts(tmp_path, name, files, options, expected, dropped):
    source = put(tmp_path / "in", files)
    if expected is None:
        source, expected = source / "d.json", [plain(png(0), "x")]
    report, found = converted(name, source, tmp_path / "out", **options)
    assert found == expected
    assert report.dropped | {f"left out: {reason}": n for reason, n in report.left_out.items()} == dropped


def test_addresses(tmp_path):
    media = MediaFolder(put(tmp_path, {"b.png": "", "zz/b.png": "", "x.org/c.png": "", "p/c.png": "", "p/c.png?w=1": "",
                                       "p/c.png?u=%2Fzz%2Fb.png": ""}))
    for name, file in (("https://x.org/zz/b.png?w=3#top", "zz/b.png"), ("https://x.org/c.png", "x.org/c.png"),
                       ("https://x.org/p/c.png?w=1", "p/c.png?w=1"), ("https://x.org/p/c.png?w=2", "p/c.png"),
                       ("https://x.org/p/c.png?u=/zz/b.png", "p/c.png?u=%2Fzz%2Fb.png"), ("/data/b.png", "b.png")):
        assert media.find(name) == media.root / file
    for name in ("https://other.org/b.png", "https://other.org/yy/b.png", "https://b.png", "https://x.org/?u=zz/b.png",
                 "b.png?w=1"):
        with pytest.raises(Dropped, match="missing media"):
            media.find(name)


def test_decoded_sounds():
    take, sound = MediaFolder(".").take, np.sin(np.arange(1600) / 9).tolist()
    for array, length in ((sound, 1600), ([sound, sound], 1600)):
        (_, medium), = take({"path": "gone.wav", "array": array, "sampling_rate": 16000})
        samples, rate = soundfile.read(io.BytesIO(medium.content))
        assert medium.ending == "flac" and medium.reencoded and rate == 16000
        assert len(samples) == length and np.allclose(samples, sound, atol=1e-4)
    for array, rate in (([0.0] * 6010, 10), ([], 16000), ([0.1, float("nan")], 16000), ([3, 4], 16000), ([0.1], None),
                        ([[0.1], []], 16000), ("x", 16000), ([0.1], -1)):
        with pytest.raises(Dropped, match="unreadable media"):
            take({"path": None, "array": array, "sampling_rate": rate})


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
    report, found = converted("huggingface", source, tmp_path / "out")
    assert found[1:] == [plain(png(0), "x"), talk("?", "x")] and found[0][0][1][1] == "two"
    assert soundfile.read(io.BytesIO(found[0][0][1][0]))[0].tolist() == [0.5, -0.5]
    assert report.dropped == {"unclear columns": 2} and "say by --map" in report.first["unclear columns"][0]
    with pytest.raises(UserError, match="--map instruction=question --map response=COLUMN"):
        convert("huggingface", source / "d.parquet", tmp_path / "d", progress=False)
    for names, texts in (["question", "answer"], ["question"]), (["question", "answer", "options"], ["answer"]):
        with pytest.raises(UserError, match="answer may be no answer in words"):
            guess(names, [], texts, {})


def test_boxes_of_a_folder(tmp_path):
    boxes = {"images": [{"id": 1, "file_name": "1.jpg", "width": 16.0, "height": 16}],
             "categories": [{"id": 1, "name": "fire_hydrant"}],
             "annotations": [{"image_id": 1, "category_id": 1, "bbox": [4, 4, 4, 4]}]}
    put(tmp_path / "in", {"1.jpg": jpg(1), "instances_val2017.json": boxes, "person_keypoints_val2017.json": boxes})
    report, found = converted("coco-boxes", tmp_path / "in", tmp_path / "out")
    assert len(found) == 1 and found[0][1] == ("assistant", ["fire hydrant 25 25 50 50"]) and report.dropped == {}
    assert "fire hydrant" in found[0][0][1][1]
    assert converted("coco-boxes", tmp_path / "in" / "person_keypoints_val2017.json", tmp_path / "k")[0].samples == 1


def test_videos(tmp_path, monkeypatch):
    """A cp1252 .srt costs a video its subtitles and nothing else; LLaVA-Video writes `<image>` for a video."""
    seen = []

    def frames_and_sound(path, **options):
        seen.append((path.name, options))
        return ["0:00.0\n", Image.new("RGB", (8, 8), (10 * len(seen), 0, 0))]

    monkeypatch.setattr(video, "frames_and_sound", frames_and_sound)
    cue = "1\n00:00:01,000 --> 00:00:02,000\ncafé\n"
    put(tmp_path / "in", {f"{name}.mp4": name for name in "ab"} | {f"{name}.txt": name for name in "ab"}
        | {"a.srt": cue.encode("cp1252"), "b.srt": cue, "c.srt": cue})
    report, found = converted("captions", tmp_path / "in", tmp_path / "out")
    assert [turns[0][1][2] for turns in found] == ["a", "b"] and report.dropped == {"unknown ending": 1}
    assert report.left_out == {"unreadable subtitles": 1} and report.first["unknown ending"] == ["c.srt: c.srt"]
    assert [options for _, options in seen] == [{"max_frames": 8, "subtitles": False}, {"max_frames": 8}]
    put(tmp_path / "in", {"v.json": [llava(None, "<image>\nWhy?", "So.") | {"video": "b.mp4"}]})
    report, found = converted("llava", tmp_path / "in" / "v.json", tmp_path / "v")
    assert [part for part in found[0][0][1] if isinstance(part, str)] == ["0:00.0\n", "Why?"]
    assert report.media == {"image": 1}


def test_zstandard(tmp_path, monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    pack = zstandard.ZstdCompressor().compress
    source = put(tmp_path / "in", {"a.jsonl.zst": pack(as_lines({"text": "one"}).encode()) + pack(b'{"text": "two"}'),
                                   "b.json.zst": pack(b'[{"text": "three"}]'), "c.jsonl.zst": b"no zstd"})
    report, found = converted("text", source, tmp_path / "out")
    assert found == [plain("one"), plain("two"), plain("three")] and report.dropped == {"damaged input": 1}
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match="pip install zstandard"):
        convert("text", source, tmp_path / "none", progress=False)


def test_roles_given_twice(tmp_path):
    with pytest.raises(UserError, match="image is given twice, a before"):
        convert("map", put(tmp_path, {"d.json": []}), tmp_path / "x", map=["image=a", "image=b", "text=t"])


def test_names_by_template():
    assert fill("{a}_{b:04d}_{c:>3}", {"a": "007", "b": "7", "c": "x"}) == "007_0007_  x"
    with pytest.raises(Dropped, match="bad record"):
        fill("{a:04d}", {"a": "x"})
