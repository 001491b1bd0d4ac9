"""Converters: files in the published layouts, with what is wrong in the real ones; webdataset reads the result."""

import base64
import csv
import gzip
import io
import json
import re
import sys
import tarfile
import zipfile
from importlib import import_module

import numpy as np
import pytest
import soundfile
import webdataset
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from samples import as_json, flac, png, write_tar

from onevocab.common.errors import UserError
from onevocab.data.convert import __main__ as command
from onevocab.data.convert import convert, video
from onevocab.data.convert.conversations import SHORT
from onevocab.data.convert.corpora import pieces
from onevocab.data.convert.formats import FORMATS, MODULES
from onevocab.data.convert.mapped import guess
from onevocab.data.documents import document_of
from onevocab.data.shards.format import list_shards, read_shard
from onevocab.tokenizers.media import encode_audio


def put(folder, files: dict):
    """Writes files: bytes and texts as they are, anything else as JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = content if isinstance(content, bytes | str) else json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def said(out) -> list:
    """Every sample by webdataset's own reader, as [(role, parts)]: texts, and the bytes of media."""
    found = []
    for shard in list_shards(out):
        for sample in read_shard(shard):
            assert document_of(sample)  # raises what training would
        stages = webdataset.SimpleShardList([str(shard)]), webdataset.tarfile_to_samples()
        for sample in webdataset.DataPipeline(*stages):
            data = json.loads(sample["json"])
            turns = data.get("messages") or [{"role": None, "content": data["content"]}]
            found.append([(turn["role"], [part["text"] if part["type"] == "text" else sample[part["file"]]
                                          for part in turn["content"]]) for turn in turns])
    return found


def converted(name: str, source, out, **options):
    report = convert(name, source, out, progress=False, **options)
    found = said(out)
    assert report.samples == len(found) == json.loads((out / "report.json").read_text())["samples"]
    return report, found


def plain(*parts) -> list:
    return [(None, list(parts))]


def talk(*turns) -> list:
    """User and assistant in turn; each a text or a list of parts."""
    return [(("user", "assistant")[i % 2], turn if isinstance(turn, list) else [turn]) for i, turn in enumerate(turns)]


def jpg(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png(seed))).save(buffer, "JPEG")
    return buffer.getvalue()


def as_csv(*rows) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    return buffer.getvalue()


def as_lines(*records) -> str:
    return "\n".join(map(json.dumps, records)) + "\n"


def records(names: str, *rows) -> list[dict]:
    return [dict(zip(names.split(), row, strict=True)) for row in rows]


def llava(image, *values, first=0) -> dict:
    said = [{"from": ("human", "gpt")[(i + first) % 2], "value": value} for i, value in enumerate(values)]
    return {"id": "1", "conversations": said} | ({} if image is None else {"image": image})


def test_folder_of_media_and_captions(tmp_path):
    gif = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(gif, "GIF")
    put(tmp_path / "in", {
        "a.png": png(0), "a.txt": "a red apple\n\nun café 漢字\r\n", "b.png": png(3), "c.tiff": b"II*\0", "d.jpg": b"",
        "d.txt": "nothing", "e.PNG": png(0), "e.txt": "a red apple", "z é.gif": gif.getvalue(), "z é.json": '"moves"',
        "sub/f.flac": flac(0), "sub/f.json": {"caption": ["rain", "", "water"]}})
    report, found = converted("captions", tmp_path / "in", tmp_path / "out")
    moving = found[2][0][1][0]
    assert Image.open(io.BytesIO(moving)).format == "PNG" and report.reencoded == 1
    assert found == [plain(png(0), "a red apple"), plain(png(0), "un café 漢字"), plain(moving, "moves"),
                     plain(flac(0), "rain"), plain(flac(0), "water")]
    assert report.dropped == {"empty text": 2, "unknown ending": 1, "unreadable media": 1, "duplicate": 1}
    assert report.media == {"image": 3, "audio": 2} and report.first["duplicate"] == ["e.PNG: the same as a.png"]


TABLE = [("file_name", "caption_1", "caption_2"), ("0.png", 'one, "1"', ""), ("/data/train/0.png", "two", "three"),
         ("C:\\train\\0.png", "four", ""), ("../in/0.png", "x", ""), ("none.png", "x", "y")]


@pytest.mark.parametrize("file, content", [
    ("t.csv", "\ufeff" + as_csv(*TABLE)),
    ("t.jsonl", as_lines(*(dict(zip(TABLE[0], row, strict=True)) for row in TABLE[1:]))),
    ("t.json", {file: captions for file, *captions in TABLE[1:]}),
])
def test_tables_of_captions(tmp_path, file, content):
    put(tmp_path / "in", {"0.png": png(0), "train/0.png": png(1), file: content})
    report, found = converted("captions", tmp_path / "in" / file, tmp_path / "out")
    assert found == [plain(png(0), 'one, "1"'), plain(png(1), "two"), plain(png(1), "three"), plain(png(1), "four")]
    assert report.dropped == {"empty text": 2, "unsafe path": 1, "missing media": 1}
    assert report.first["unsafe path"] == [f"{file}#3: ../in/0.png"]


def test_what_strangers_send(tmp_path):
    bomb = io.BytesIO()
    Image.new("1", (8000, 7000)).save(bomb, "PNG")
    outside = put(tmp_path, {"secret.png": png(5)}) / "secret.png"
    files = ["link.png", "sound.png", "bomb.png", "cut.png", "long.flac", "a.exe", "x\0.png", "a" * 5000 + ".png",
             "\ud800.png", "/etc/hostname", "ok.png", 7]
    put(tmp_path / "in", {
        "sound.png": flac(0), "bomb.png": bomb.getvalue(), "cut.png": png(0)[:60], "a.exe": b"MZ", "ok.png": png(0),
        "long.flac": encode_audio(np.zeros(601 * 8000, np.float32), 8000),
        "t.json": [*records("file caption", *((file, "c") for file in files), ("ok.png", "\ud800")), 3, {}]})
    (tmp_path / "in" / "link.png").symlink_to(outside)
    report, found = converted("captions", tmp_path / "in" / "t.json", tmp_path / "out")
    assert found == [plain(png(0), "c")]
    assert report.dropped == {"unsafe path": 1, "wrong ending": 1, "unreadable media": 3, "unknown ending": 1,
                              "missing media": 5, "bad text": 1, "bad record": 2}
    assert "pixels" in report.first["unreadable media"][0] and "600 s" in report.first["unreadable media"][2]


WAV = encode_audio(np.random.default_rng(0).normal(0, 0.1, 800), 16000, "WAV")
DOG = "<image>\nWhat is it?", "A dog.", "Colour?", "red"
CHARTS = records("imgname query label", ("1.png", "Which?", "Blue"), ("2.png", "?", ""), ("1.png", "How much?", 3.5),
                 ("1.png", "Which?", "Blue"))
QUESTIONS = records("question_id image_id question", (90, 9, "What is it?"), (91, 9, "Is it?"), (92, 9, "Empty?"),
                    (93, 9, "What is it?"), (94, 10, "No file?"), (95, 9, "Nobody?"), (96, 9, "How many?"), (97, 9, ""))
ANSWERS = [{"question_id": number, "multiple_choice_answer": chosen, "answers": [
    {"answer": said[i % len(said)], "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)]}
    for number, said, chosen in [(90, ["dog", "cat", "dog"], ""), (91, ["yes", "no"], "no"), (92, [""], ""),
                                 (93, ["dog"], ""), (94, ["x"], ""), (96, ["2", "two", "", "2"], ""), (97, ["x"], "")]]
BASE64 = {"P1": base64.urlsafe_b64encode(png(1)).decode().rstrip("="), "P3": "%%%",
          "P2": "data:image/jpeg;base64," + base64.b64encode(jpg(2)).decode()}
INSTRUCTIONS = records("instruction answer image_ids rel_ins_ids", ("Differ?", "Yes.", ["P1", "P2"], ["I1"]),
                       ("q", "", ["P1"], []), ("q", "a", ["P3"], []), ("q", "a", ["P4"], []))
PAGES = [{"url": "http://x", "text_list": ["One.", "Two.", "Three."], "similarity_matrix": [],
          "image_info": records("image_name matched_text_index", *pictures)}
         for pictures in ([("a.png", 1), ("gone.png", 0)], [("gone.png", 0)], [("a.png", 7)], [])]
PACKED = io.BytesIO()
with zipfile.ZipFile(PACKED, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("docs_no_face_shard_0_v3.jsonl", as_lines(*PAGES))
OBELICS = {"images": [None, "https://x.org/p/b.png?w=3", None, None], "texts": ["Intro", None, "Mid", "End"],
           "metadata": "[]", "general_metadata": "{}"}
CLOTHO = "file_name caption_1 caption_2 caption_3 caption_4 caption_5"
MESSAGES = records("role content", ("system", "Be kind."), ("user", [
    {"type": "image"}, {"type": "text", "text": "What?"}]), ("assistant", "A dog."))
FIELDS = ["instruction=q", "input=more", "response=a", "image=files.picture", "audio=files.sound"]

# format, files, options, what the shards say, what is dropped or left out
CASES = [
    ("captions", {"train/metadata.csv": as_csv(("file_name", "words"), ("a/0.png", "hi")), "train/a/0.png": png(0)},
     {"map": ["caption=words"]}, [plain(png(0), "hi")], {}),
    ("llava", {"coco/1.png": png(1), "2.png": png(2), "data.json": [
        llava("coco/1.png", *DOG), llava("coco/1.png", "What?\n<image>", "Dog"), llava(None, "Hi é", "Hello 漢字"),
        llava(["coco/1.png", "2.png"], "Compare <image> with <image>.", "Same."), llava("2.png", "<image>", "A cat"),
        llava("/data/coco/1.png", "No place", "ok"), llava("2.png", "before", "q?", "a", "nobody answers", first=1),
        llava("gone.png", "<image>\nq", "a"), llava("2.png", "<image>\nq", " "), llava(None, "<image>\nq", "a"),
        llava("coco/1.png", *DOG) | {"id": "2"}, 3, llava(None, " ", "a"), {"conversations": None},
        {"conversations": [{"from": "root", "value": "q"}]}]},
     {}, [talk([png(1), "What is it?"], "A dog.", "Colour?", "red"), talk(["What?", png(1)], "Dog"),
          talk("Hi é", "Hello 漢字"), talk(["Compare", png(1), "with", png(2), "."], "Same."), talk([png(2)], "A cat"),
          talk([png(1), "No place"], "ok"), talk([png(2), "q?"], "a")],
     {"missing media": 2, "empty answer": 1, "duplicate": 1, "bad record": 3, "empty question": 1}),
    ("vqav2", {"v2_OpenEnded_mscoco_train2014_questions.json": {"data_subtype": "train2014", "questions": QUESTIONS},
               "v2_mscoco_train2014_annotations.json": {"annotations": ANSWERS},
               "train2014/COCO_train2014_000000000009.jpg": jpg(9)},
     {"turns": 2}, [talk([jpg(9), f"What is it? {SHORT}"], "dog", "Is it?", "no"),
                    talk([jpg(9), f"How many? {SHORT}"], "2")],
     {"empty answer": 2, "duplicate": 1, "missing media": 1, "empty question": 1}),
    ("chartqa", {"train_human.json": [*CHARTS, {"query": "?"}], "annotations/1.json": {}, "png/1.png": png(1)},
     {}, [talk([png(1), f"Which? {SHORT}"], "Blue", "How much?", "3.5")],
     {"empty answer": 1, "bad record": 1, "duplicate": 1}),
    ("mimic-it", {"LA/LA.json": BASE64, "LA/LADD_instructions.json": {
        "meta": {}, "data": {f"I{i}": record for i, record in enumerate(INSTRUCTIONS)}}},
     {}, [talk([png(1), jpg(2), "Differ?"], "Yes.")], {"empty answer": 1, "unreadable media": 1, "missing media": 1}),
    ("coco-captions", {"1.jpg": jpg(1), "captions.json": {
        "images": [*records("id file_name", (1, "1.jpg"), (2, "2.jpg"), (3, "3.jpg")), {"id": 4}],
        "annotations": [*records("image_id caption", (1, "A dog.\n"), (3, "x"), (1, "Un chien é"), (1, "A dog."),
                                 (99, "nowhere")), "broken"]}},
     {}, [plain(jpg(1), "A dog."), plain(jpg(1), "Un chien é")],
     {"duplicate": 1, "empty text": 1, "missing media": 1, "bad record": 3}),
    ("mmc4", {"docs_no_face_shard_0_v3.jsonl.zip": PACKED.getvalue(), "a.png": png(0)},
     {}, [plain("One.", png(0), "Two. Three.")],
     {"missing media": 2, "bad record": 1, "left out: missing media": 1}),
    ("obelics", {"o.jsonl": as_lines(OBELICS, {"images": [None], "texts": []}), "p/b.png": png(1)},
     {}, [plain("Intro", png(1), "Mid\n\nEnd")], {"bad record": 1}),
    ("clotho", {"clotho.csv": as_csv(CLOTHO.split(), ["a, é.wav", *"54321"], ["gone.wav", *"abcde"]), "a, é.wav": WAV},
     {"captions": 3}, [plain(WAV, c) for c in "543"], {"missing media": 1}),
    ("audiocaps", {"train.csv": as_csv("audiocap_id youtube_id start_time caption".split(), (1, "-0a", 30, "a dog"),
                                       (2, "zz", 0, "lost"), (3, "-0a", 30, "")), "-0a_30.wav": WAV},
     {"file": "{youtube_id}_{start_time}.wav"}, [plain(WAV, "a dog")], {"missing media": 1, "empty text": 1}),
    ("wavcaps", {"as.json": {"num_captions_per_audio": 1, "data": [*records(
        "id caption", ("Yx.wav", "rain"), ("17", ["a", "b"]), ("9", "gone")), {"title": "no id"}]},
        "Yx.flac": flac(0), "17.flac": flac(1)},
     {}, [plain(flac(0), "rain"), plain(flac(1), "a"), plain(flac(1), "b")], {"missing media": 1, "bad record": 1}),
    ("librispeech", {"84/121/84-121.trans.txt": "84-121-0000 GO ON\n84-121-0001 GONE\n84-121-0002\n../../x HOSTILE\n",
                     "84/121/84-121-0000.flac": flac(0), "84/121/84-121-0002.flac": flac(1)},
     {}, [plain(flac(0), "GO ON")], {"missing media": 1, "empty text": 1, "unsafe path": 1}),
    ("text", {"a.txt": "One line\ncontinues\n \n\nSecond é\n\n".encode() + b"\xff bad\n",
              "b.jsonl.gz": gzip.compress(b'{"text": "t"}\n{"text\n{"text": ""}\n{"body": "b"}\n')},
     {}, [plain("One line\ncontinues"), plain("Second é"), plain("t")],
     {"bad text": 1, "bad record": 1, "empty text": 2}),
    ("text", {"a.txt": b"one\ntwo\n\n\xff\n"}, {"by": "line"}, [plain("one"), plain("two")], {"bad text": 1}),
    ("text", {"a.jsonl.gz": gzip.compress(as_lines(*({"body": f"x{i}"} for i in range(9))).encode())[:-9],
              "b.jsonl": '{"body": "b"}'}, {"map": ["text=body"]}, None, {"damaged input": 1}),
    ("map", {"0.png": png(0), "0.flac": flac(0), "t.json": [
        {"q": "Who?", "more": "Say it.", "a": ["", "He."], "files": {"picture": "0.png", "sound": "/x/0.flac"}},
        *records("q a files", ("No file", "ok", None), ("Who?", "", {}), ("", "x", {}), ("?", "x", {"picture": "1"}))]},
     {"map": FIELDS}, [talk([png(0), flac(0), "Who?\nSay it."], "He."), talk("No file", "ok")],
     {"empty answer": 1, "empty question": 1, "missing media": 1}),
    ("map", {"0.png": png(0), "c.jsonl": as_lines({"m": MESSAGES, "i": "0.png"})},
     {"map": ["conversations=m", "image=i"]},
     [[("system", ["Be kind."]), *talk([png(0), "What?"], "A dog.")]], {}),
    ("map", {"0.png": png(0), "p.csv": as_csv(("t", "image"), ("a dog", "0.png"), ("no file", ""))},
     {"map": ["text=t", "image=image"]}, [plain(png(0), "a dog")], {"missing media": 1}),
]


@pytest.mark.parametrize("name, files, options, expected, dropped", CASES, ids=[case[0] for case in CASES])
def test_published_layouts(tmp_path, name, files, options, expected, dropped):
    report, found = converted(name, put(tmp_path / "in", files), tmp_path / "out", **options)
    assert found == expected or (expected is None and found[-1] == plain("b"))
    assert report.dropped | {f"left out: {reason}": n for reason, n in report.left_out.items()} == dropped


def test_coco_boxes(tmp_path):
    sides, lvis = {"file_name": "1.jpg", "width": 9, "height": 9}, {"coco_url": "http://x.org/val/1.jpg", "width": 10}
    put(tmp_path, {"in/1.jpg": jpg(1), "in/i.json": {
        "images": [sides | {"id": 1, "width": 200, "height": 100}, sides | {"id": 2, "width": 0},
                   sides | {"id": 3}, sides | {"id": 4},
                   lvis | {"id": 5, "height": 10, "not_exhaustive_category_ids": [2]}],
        "categories": records("id name", (1, "dog"), (2, "cat")),
        "annotations": [*records("image_id category_id bbox", (1, 1, [100, 50, 100, 50]), (1, 1, [20, 10, 40.5, 20]),
                                 (1, 2, [0, 0, 9, 9]), (2, 1, [0, 0, 1, 1]), (3, 1, [0, 0, 0, 5]), (3, 9, [0, 0, 1, 1]),
                                 (5, 1, [-5, -5, 1e8, 10]), (5, 2, [0, 0, 1, 1])),
                        {"image_id": 1, "category_id": 2, "bbox": [0, 0, 1, 1], "iscrowd": 1}]}})
    report, found = converted("coco-boxes", tmp_path / "in" / "i.json", tmp_path / "out")
    assert [turns[1:] for turns in found] == [
        [("assistant", ["dog 10 10 30 30; dog 50 50 99 99"])], [("assistant", ["dog 00 00 99 50"])]]
    assert all(turns[0][1][0] == jpg(1) and "dog" in turns[0][1][1] for turns in found)
    assert report.dropped == {"bad record": 1, "boxes incomplete": 1, "no boxes": 1}
    assert report.left_out == {"boxes incomplete": 2}


def test_img2dataset_shards(tmp_path):
    link = tarfile.TarInfo("4.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    put(tmp_path / "in", {"00000.parquet": b"PAR1 is not read", "00000_stats.json": {}})
    write_tar(tmp_path / "in" / "00000.tar", [
        ("0.jpg", jpg(0)), ("0.txt", "a dog é".encode()), ("0.json", as_json({"url": "http://x", "status": "success"})),
        ("1.webp", png(1)), ("1.json", as_json({"caption": "in the json"})), ("2.jpg", jpg(2)[:100]), ("2.txt", b"cut"),
        ("3.jpg", jpg(3)), ("3.txt", b"\xff\xfe"), (link, b""), ("4.txt", b"link"), ("5.txt", b"no picture"),
        ("6.jpg", jpg(6)), ("6.txt", b"")])
    whole = write_tar(tmp_path / "whole.tar", [("1.jpg", jpg(7)), ("1.txt", b"x"), ("2.jpg", jpg(8))])
    with tarfile.open(whole) as tar:
        end = tar.getmember("2.jpg").offset + 100
    (tmp_path / "in" / "00001.tar").write_bytes(whole.read_bytes()[:end])
    report, found = converted("img2dataset", tmp_path / "in", tmp_path / "out")
    assert found[:2] == [plain(jpg(0), "a dog é"), plain(png(1), "in the json")]
    assert report.dropped == {"unreadable media": 1, "bad text": 1, "refused member": 1, "missing media": 1,
                              "empty text": 1, "damaged input": 1}


def test_common_voice(tmp_path):
    put(tmp_path / "in", {"clips/b.txt": "", "validated.tsv": (
        'client_id\tpath\tsentence\tup_votes\nx\ta.mp3\tHe said "é\t2\ny\ta\tNo ending"\t2\nz\tgone.mp3\tx\t0\n'
        "z\ta.mp3\tone\tcell\tmore\n")})
    soundfile.write(tmp_path / "in" / "clips" / "a.mp3", np.zeros(8000), 16000)
    report, found = converted("common-voice", tmp_path / "in" / "validated.tsv", tmp_path / "out")
    assert [turns[0][1][1] for turns in found] == ['He said "é', 'No ending"'] and report.reencoded == 2
    assert all(soundfile.info(io.BytesIO(turns[0][1][0])).format == "FLAC" for turns in found)
    assert report.dropped == {"missing media": 1, "bad record": 1}


def test_msrvtt(tmp_path, monkeypatch):
    videos = records("video_id split", ("video0", "train"), ("video1", "test"), ("video2", "train"))
    sentences = records("video_id caption", *((f"video{said[0]}", said[1]) for said in ("0a", "1x", "0b", "2y", "9z")))
    put(tmp_path / "in", {"info.json": {"videos": videos, "sentences": sentences}, "video0.mp4": b"\0\0\0\x18ftypmp42"})
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="needs PyAV"):
        convert("msrvtt", tmp_path / "in" / "info.json", tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").iterdir())  # free for another try
    seen = []

    def frames_and_sound(path, **options):
        seen.append((path.name, options))
        return ["0:00.0\n", Image.new("RGB", (8, 8), "red"), (np.zeros(1600, np.float32), 16000)]

    monkeypatch.setattr(video, "frames_and_sound", frames_and_sound)
    report, found = converted("msrvtt", tmp_path / "in" / "info.json", tmp_path / "out", split="train", frames=4)
    assert seen == [("video0.mp4", {"max_frames": 4})] and report.media == {"image": 2, "audio": 2}
    assert [turns[0][1][::3] for turns in found] == [["0:00.0\n", "a"], ["0:00.0\n", "b"]]
    assert report.dropped == {"other split": 1, "missing media": 1, "bad record": 1}


@given(st.text(alphabet="ab. \n\u3000", max_size=200), st.integers(1, 20))
def test_long_texts_are_cut(text, limit):
    found = list(pieces(text, limit))
    assert "".join("".join(found).split()) == "".join(text.split()) and all(len(piece) <= limit for piece in found)
    assert list(pieces("aaa bbb. ccc ddd", 10)) == ["aaa bbb.", "ccc ddd"]


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


def test_folders_of_datasets(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    pictures = records("bytes path", (png(0), "a.png"), (None, "gone.png"), (None, "0.png"))
    table = pyarrow.table({"image": [*pictures, None], "text": ["a dog é", "gone", "by its path", "no picture"]})
    put(tmp_path / "in", {"data/test-00000-of-00001.parquet": b"not asked for", "0.png": png(1),
                          "data/train-00001-of-00002.parquet": b"PAR1 damaged"})
    parquet.write_table(table, tmp_path / "in" / "data" / "train-00000-of-00002.parquet")
    expected = [plain(png(0), "a dog é"), plain(png(1), "by its path")]
    report, found = converted("huggingface", tmp_path / "in", tmp_path / "out", split="train")
    assert found == expected and report.dropped == {"missing media": 2, "damaged input": 1}
    for new in (pyarrow.ipc.new_stream, pyarrow.ipc.new_file):
        folder = put(tmp_path / new.__name__, {"0.png": png(1), "state.json": {}})
        with new(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
            writer.write_table(table)
        assert converted("huggingface", folder, tmp_path / f"{new.__name__}-out")[1] == expected
    columns = {"key": ["0", "1"], "status": ["success", "failed"], "caption": ["c", "d"], "jpg": [jpg(0), None]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "00000.parquet")
    report, found = converted("img2dataset", tmp_path / "00000.parquet", tmp_path / "i")
    assert found == [plain(jpg(0), "c")] and report.dropped == {"not downloaded": 1}


def test_columns_need_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"onevocab\[convert\]"):
        convert("huggingface", put(tmp_path / "in", {"train.parquet": b"PAR1"}), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def shards(out) -> dict:
    return {path.name: path.read_bytes() for path in out.glob("*.tar")}


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
    assert sorted(turns[0][1][0] for turns in said(tmp_path / "ranks")) == sorted([*lines, "one more"])
    for rank in range(4):  # by default each rank gets a part
        assert convert("text", source / "a.txt", tmp_path / "four", rank, 4, by="line", progress=False).samples >= 30
    assert sorted(turns[0][1][0] for turns in said(tmp_path / "four")) == sorted(lines)


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
