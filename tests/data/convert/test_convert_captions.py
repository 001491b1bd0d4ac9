"""Converters of media with captions and boxes, and what strangers send for media."""

import io
import tarfile

import numpy as np
import pytest
from layouts import AB, as_csv, as_lines, converted, jpg, lost, plain, put, records
from PIL import Image
from samples import as_json, flac, png, write_tar

from onevocab.data.convert.media import MediaFolder
from onevocab.data.convert.samples import Dropped
from onevocab.tokenizers.media import encode_audio

TABLE = [("file_name", "caption_1", "caption_2"), ("0.png", 'one, "1"', ""), ("/data/train/0.png", "two", "three"),
         ("C:\\train\\0.png", "four", ""), ("../in/0.png", "x", ""), ("none.png", "x", "y")]
# format, files, options, what the shards say, what is dropped or left out
CASES = {
    "a table in a folder":
    ("captions", {"train/metadata.csv": as_csv(("file_name", "words"), ("a/0.png", "hi")), "train/a/0.png": png(0)},
     {"map": ["caption=words"]}, [plain(png(0), "hi")], {}),
    "coco-captions": ("coco-captions", {"1.jpg": jpg(1), "captions.json": {
        "images": [*records("id file_name", (1, "1.jpg"), (2, "2.jpg"), (3, "3.jpg")), {"id": 4}],
        "annotations": [*records("image_id caption", (1, "A dog.\n"), (3, "x"), (1, "Un chien é"), (1, "A dog."),
                                 (99, "nowhere")), "broken"]}},
     {}, [plain(jpg(1), "A dog."), plain(jpg(1), "Un chien é")],
     {"duplicate": 1, "empty text": 1, "missing media": 1, "bad record": 3}),
    "transcriptions": ("captions", {"metadata.csv": as_csv(("file_name", "transcription"), ("a.flac", "go on")),
                                    "a.flac": flac(0), "sub/metadata.jsonl": as_lines(
                                        {"file_name": "b.flac", "transcript": "stop"}), "sub/b.flac": flac(1)},
                       {}, [plain(flac(0), "go on"), plain(flac(1), "stop")], {}),
    "ends of lines in captions": ("captions", {"a.png": png(0), "a.txt": "one\u2028two\x0cthree\r\nfour\rfive"}, {},
                                  [plain(png(0), said) for said in ("one\u2028two\x0cthree", "four", "five")], {}),
}


@pytest.mark.parametrize("name, files, options, expected, dropped", CASES.values(), ids=CASES)
def test_layouts(tmp_path, name, files, options, expected, dropped):
    report, samples = converted(name, put(tmp_path / "in", files), tmp_path / "out", **options)
    assert samples == expected and lost(report) == dropped


def test_folder_of_media_and_captions(tmp_path):
    gif = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(gif, "GIF")
    put(tmp_path / "in", {
        "a.png": png(0), "a.txt": "a red apple\n\nun café 漢字\r\n", "b.png": png(3), "c.tiff": b"II*\0", "d.jpg": b"",
        "d.txt": "nothing", "e.PNG": png(0), "e.txt": "a red apple", "z é.gif": gif.getvalue(), "z é.json": '"moves"',
        "sub/f.flac": flac(0), "sub/f.json": {"caption": ["rain", "", "water"]}})
    report, samples = converted("captions", tmp_path / "in", tmp_path / "out")
    moving = samples[2][0][1][0]
    assert Image.open(io.BytesIO(moving)).format == "PNG" and report.reencoded == 1
    assert samples == [plain(png(0), "a red apple"), plain(png(0), "un café 漢字"), plain(moving, "moves"),
                     plain(flac(0), "rain"), plain(flac(0), "water")]
    assert report.dropped == {"empty text": 2, "unknown ending": 1, "unreadable media": 1, "duplicate": 1}
    assert report.media == {"image": 3, "audio": 2} and report.first["duplicate"] == ["e.PNG: the same as a.png"]


def test_a_json_beside_a_txt_is_counted(tmp_path):
    put(tmp_path / "in", {"a.png": png(0), "a.json": {"caption": "from the json"}, "a.txt": "from the txt"})
    report, samples = converted("captions", tmp_path / "in", tmp_path / "out")
    assert samples == [plain(png(0), "from the txt")] and report.dropped == {"beside a .txt": 1}


@pytest.mark.parametrize("file, content", [
    ("t.csv", "\ufeff" + as_csv(*TABLE)),
    ("t.jsonl", as_lines(*(dict(zip(TABLE[0], row, strict=True)) for row in TABLE[1:]))),
    ("t.json", {file: captions for file, *captions in TABLE[1:]}),
])
def test_tables_of_captions(tmp_path, file, content):
    put(tmp_path / "in", {"0.png": png(0), "train/0.png": png(1), file: content})
    report, samples = converted("captions", tmp_path / "in" / file, tmp_path / "out")
    assert samples == [plain(png(0), 'one, "1"'), plain(png(1), "two"), plain(png(1), "three"), plain(png(1), "four")]
    assert report.dropped == {"empty text": 2, "unsafe path": 1, "missing media": 1}
    assert report.first["unsafe path"] == [f"{file}#3: ../in/0.png"]


def test_captions_below_a_key(tmp_path):
    source = put(tmp_path / "in", AB | {"d.json": {"data": records("file caption", ("a.png", "x"))}}) / "d.json"
    report, samples = converted("captions", source, tmp_path / "out")
    assert samples == [plain(png(0), "x")] and lost(report) == {}


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
    report, samples = converted("captions", tmp_path / "in" / "t.json", tmp_path / "out")
    assert samples == [plain(png(0), "c")]
    assert report.dropped == {"unsafe path": 1, "wrong ending": 1, "unreadable media": 3, "unknown ending": 1,
                              "missing media": 5, "bad text": 1, "bad record": 2}
    assert "pixels" in report.first["unreadable media"][0] and "600 s" in report.first["unreadable media"][2]


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
    for name in ("P/c.png", "p/C.PNG"):
        with pytest.raises(Dropped) as dropped:
            media.find(name)
        assert ("but c.png" in dropped.value.detail) == (name == "p/C.PNG")


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
    report, samples = converted("coco-boxes", tmp_path / "in" / "i.json", tmp_path / "out")
    assert [turns[1:] for turns in samples] == [
        [("assistant", ["dog 10 10 30 30; dog 50 50 99 99"])], [("assistant", ["dog 00 00 99 50"])]]
    assert all(turns[0][1][0] == jpg(1) and "dog" in turns[0][1][1] for turns in samples)
    assert report.dropped == {"bad record": 1, "boxes incomplete": 1, "no boxes": 1}
    assert report.left_out == {"boxes incomplete": 2}


def test_boxes_of_a_folder(tmp_path):
    boxes = {"images": [{"id": 1, "file_name": "1.jpg", "width": 16.0, "height": 16}],
             "categories": [{"id": 1, "name": "fire_hydrant"}],
             "annotations": [{"image_id": 1, "category_id": 1, "bbox": [4, 4, 4, 4]}]}
    put(tmp_path / "in", {"1.jpg": jpg(1), "instances_val2017.json": boxes, "person_keypoints_val2017.json": boxes})
    report, samples = converted("coco-boxes", tmp_path / "in", tmp_path / "out")
    assert len(samples) == 1 and samples[0][1] == ("assistant", ["fire hydrant 25 25 50 50"]) and report.dropped == {}
    assert "fire hydrant" in samples[0][0][1][1]
    assert converted("coco-boxes", tmp_path / "in" / "person_keypoints_val2017.json", tmp_path / "k")[0].samples == 1


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
    report, samples = converted("img2dataset", tmp_path / "in", tmp_path / "out")
    assert samples[:2] == [plain(jpg(0), "a dog é"), plain(png(1), "in the json")]
    assert report.dropped == {"unreadable media": 1, "bad text": 1, "refused member": 1, "missing media": 1,
                              "empty text": 1, "damaged input": 1}
