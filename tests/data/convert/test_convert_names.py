"""What a folder holds and how its files are called: links, hidden files, names with dots. Read, or counted."""

import os

import pytest
from layouts import AB, as_csv, converted, jpg, plain, put
from samples import flac, png, write_tar

from onevocab.common.errors import UserError
from onevocab.data.convert import __main__ as command
from onevocab.data.convert import convert


def link(path, target) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def test_linked_folders(tmp_path):
    source = put(tmp_path, {"disk/a.png": png(0), "disk/a.txt": "linked", "pets/b.png": png(1), "pets/b.txt": "here",
                            "pets/in/c.png": png(2), "pets/in/c.txt": "below"}) / "pets"
    link(source / "train", tmp_path / "disk")
    link(source / "again", source / "in")
    link(source / "in" / "up", source)
    link(source / "gone.png", tmp_path / "nothing")
    report, samples = converted("captions", source, tmp_path / "out")
    assert samples == [plain(png(1), "here"), plain(png(2), "below")]
    assert report.dropped == {"unsafe path": 2, "linked again": 2}
    assert report.first["unsafe path"][1].startswith("train: a link that leads out of the folder; --follow-links")
    link(tmp_path / "disk" / "back", tmp_path)  # a circle over the outside
    report, samples = converted("captions", source, tmp_path / "followed", follow_links=True)
    assert samples == [plain(png(1), "here"), plain(png(2), "below"), plain(png(0), "linked")]
    assert report.dropped["linked again"] >= 3 and report.dropped["unsafe path"] == 1


def test_linked_files(tmp_path):
    """The cache of a hub: every file of a snapshot is a link to its blob."""
    hub = put(tmp_path, {"blobs/0": png(0), "blobs/1": as_csv(("file_name", "text"), ("0.png", "one")),
                         "blobs/2": "words"}) / "snapshots"
    for name, blob in (("p/0.png", "0"), ("p/metadata.csv", "1"), ("t/a.txt", "2")):
        link(hub / name, tmp_path / "blobs" / blob)
    for name, folder in (("captions", "p"), ("text", "t")):
        with pytest.raises(UserError, match="a link that leads out of the folder; --follow-links"):
            convert(name, hub / folder, tmp_path / "refused", progress=False)
    with pytest.raises(UserError, match="unsafe path.*--follow-links"):
        convert("captions", hub / "p" / "metadata.csv", tmp_path / "refused", progress=False)
    command.main(["captions", str(hub / "p"), "--out", str(tmp_path / "o"), "--follow-links"])
    _, samples = converted("captions", hub / "p", tmp_path / "out", follow_links=True)
    assert samples == [plain(png(0), "one")]
    assert converted("text", hub / "t", tmp_path / "words", follow_links=True)[1] == [plain("words")]


def test_what_is_not_walked_is_counted(tmp_path, monkeypatch):
    source = put(tmp_path / "in", AB | {"a.txt": "a", "b.txt": "b", ".hidden.png": png(2), ".git/x.png": png(3),
                                        "locked/c.png": png(4), "c.tiff": b"", "lone.txt": "x", "lone.json": {}})
    scandir = os.scandir

    def refuse(path="."):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    report, samples = converted("captions", source, tmp_path / "out")
    assert samples == [plain(png(0), "a"), plain(png(1), "b")]
    assert report.dropped == {"hidden": 2, "unreadable folder": 1, "unknown ending": 1, "caption of no medium": 1,
                              "beside a .txt": 1}
    assert report.first["unreadable folder"] == ["locked: Permission denied"]
    report, samples = converted("text", put(tmp_path / "texts", {"a.txt": "a", "b.md": "b"}), tmp_path / "t")
    assert samples == [plain("a")] and report.dropped == {"unknown ending": 1}


def test_files_that_share_a_name(tmp_path):
    report, samples = converted("captions", put(tmp_path / "in", {
        "cat.wav": flac(0), "cat.flac": flac(0), "dog.png": png(0), "dog.flac": flac(1), "dog.txt": "barks",
        "cow.png": png(1), "cow.jpg": jpg(2), "cow.TXT": "moos", "cat.txt": "meows"}), tmp_path / "out")
    assert samples == [plain(flac(0), "meows"), plain(jpg(2), "moos"), plain(png(1), "moos"),
                       plain(png(0), flac(1), "barks")]
    assert report.dropped == {"duplicate": 1}


@pytest.mark.parametrize("kind", ["captions", "img2dataset"])
def test_names_with_dots(tmp_path, kind):
    files = {"22.05.png": png(0), "22.05.txt": "may", "22.06.png": png(1), "22.06.txt": "june", "a.b.c.png": png(2),
             "a.b.c.json": {"caption": "deep"}}
    source = put(tmp_path / "in", files)
    if kind == "img2dataset":
        members = [(path.name, path.read_bytes()) for path in sorted(source.iterdir())]
        members += [("s.input.png", png(3)), ("s.output.txt", b"drawn"), ("t.1.txt", b"x"), ("t.2.txt", b"y")]
        source = write_tar(tmp_path / "dots.tar", members)
    report, samples = converted(kind, source, tmp_path / "out")
    expected = [plain(png(0), "may"), plain(png(1), "june"), plain(png(2), "deep")]
    assert samples == expected + [plain(png(3), "drawn")] * (kind == "img2dataset")
    assert report.dropped == ({"missing media": 2} if kind == "img2dataset" else {})


def test_media_that_no_table_names_are_counted(tmp_path):
    rows = [("file_name", "text"), ("a/0.png", "a dog"), ("https://host.org/cafe\u0301.png?w=3", "a cat")]
    put(tmp_path / "in", {"metadata.csv": "\n".join(map(",".join, rows)).encode(), "a/0.png": png(0), "a/1.png": png(1),
                          "host.org/caf\u00e9.png": png(2), "a/notes.txt": b"x"})
    report = convert("captions", tmp_path / "in", tmp_path / "out", progress=False)
    assert report.samples == 2 and report.dropped == {"in no table": 1} and report.first["in no table"][0] == "a/1.png"
