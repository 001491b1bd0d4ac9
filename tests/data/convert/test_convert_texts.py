"""Converters of plain texts and of web pages."""

import gzip
import io
import sys
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layouts import as_lines, converted, lost, plain, put, records
from samples import png

from onevocab.common.errors import UserError
from onevocab.data.convert import convert
from onevocab.data.convert.corpora import pieces

PAGES = [{"url": "http://x", "text_list": ["One.", "Two.", "Three."], "similarity_matrix": [],
          "image_info": records("image_name matched_text_index", *pictures)}
         for pictures in ([("a.png", 1), ("gone.png", 0)], [("gone.png", 0)], [("a.png", 7)], [])]
PACKED = io.BytesIO()
with zipfile.ZipFile(PACKED, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("docs_no_face_shard_0_v3.jsonl", as_lines(*PAGES))
OBELICS = {"images": [None, "https://x.org/p/b.png?w=3", None, None], "texts": ["Intro", None, "Mid", "End"],
           "metadata": "[]", "general_metadata": "{}"}
PAGE_END = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"

# format, files, options, what the shards say, what is dropped or left out
CASES = {
    "mmc4": ("mmc4", {"docs_no_face_shard_0_v3.jsonl.zip": PACKED.getvalue(), "a.png": png(0)},
     {}, [plain("One.", png(0), "Two. Three.")],
     {"missing media": 2, "bad record": 1, "left out: missing media": 1}),
    "obelics": ("obelics", {"o.jsonl": as_lines(OBELICS, {"images": [None], "texts": []}), "p/b.png": png(1)},
     {}, [plain("Intro", png(1), "Mid\n\nEnd")], {"bad record": 1}),
    "text": ("text", {"a.txt": "One line\ncontinues\n \n\nSecond é\n\n".encode() + b"\xff bad\n",
              "b.jsonl.gz": gzip.compress(b'{"text": "t"}\n{"text\n{"text": ""}\n{"body": "b"}\n')},
     {}, [plain("One line\ncontinues"), plain("Second é"), plain("t")],
     {"bad text": 1, "bad record": 1, "empty text": 2}),
    "texts by line":
    ("text", {"a.txt": b"one\ntwo\n\n\xff\n"}, {"by": "line"}, [plain("one"), plain("two")], {"bad text": 1}),
    "pages of several documents": ("obelics", {"a.png": png(0), "b.png": png(1), "o.jsonl": as_lines(
        {"images": [None, "a.png", None, None, "b.png", None, None],
         "texts": ["One", None, f"end.{PAGE_END}Two", f"more{PAGE_END}", None, f"x {PAGE_END} y", PAGE_END]})},
        {}, [plain("One", png(0), "end."), plain(png(1), "x")], {"missing media": 2}),
    "ends of lines": ("text", {"a.txt": "one\r\ntwo\r\n\r\nthree", "b.jsonl": as_lines({"text": "four\r\nfive"})},
                      {}, [plain("one\ntwo"), plain("three"), plain("four\nfive")], {}),
}


@pytest.mark.parametrize("name, files, options, expected, dropped", CASES.values(), ids=CASES)
def test_layouts(tmp_path, name, files, options, expected, dropped):
    report, samples = converted(name, put(tmp_path / "in", files), tmp_path / "out", **options)
    assert samples == expected and lost(report) == dropped


def test_a_file_that_is_cut(tmp_path):
    source = put(tmp_path / "in", {
        "a.jsonl.gz": gzip.compress(as_lines(*({"body": f"x{i}"} for i in range(9))).encode())[:-9],
        "b.jsonl": '{"body": "b"}'})
    report, samples = converted("text", source, tmp_path / "out", map=["text=body"])
    assert samples[-1] == plain("b") and lost(report) == {"damaged input": 1}


@given(st.text(alphabet="ab. \n\u3000", max_size=200), st.integers(1, 20))
def test_long_texts_are_cut(text, limit):
    found = list(pieces(text, limit))
    assert "".join("".join(found).split()) == "".join(text.split()) and all(len(piece) <= limit for piece in found)
    assert list(pieces("aaa bbb. ccc ddd", 10)) == ["aaa bbb.", "ccc ddd"]


def test_zstandard(tmp_path, monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    pack = zstandard.ZstdCompressor().compress
    source = put(tmp_path / "in", {"a.jsonl.zst": pack(as_lines({"text": "one"}).encode()) + pack(b'{"text": "two"}'),
                                   "b.json.zst": pack(b'[{"text": "three"}]'), "c.jsonl.zst": b"no zstd"})
    report, samples = converted("text", source, tmp_path / "out")
    assert samples == [plain("one"), plain("two"), plain("three")] and report.dropped == {"damaged input": 1}
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match="pip install zstandard"):
        convert("text", source, tmp_path / "none", progress=False)


def test_many_small_files_share_shards(tmp_path):
    files = {f"{i % 3}/{i:03d}.txt": f"story {i}\n\nof cats {i}" for i in range(30)}
    source = put(tmp_path / "in", files | {"9/cut.txt.gz": gzip.compress(b"x" * 99)[:-9], "t.jsonl": '{"text": "t"}'})
    report, samples = converted("text", source, tmp_path / "out", samples_per_shard=25)
    assert len(samples) == 61 and samples[:2] == [plain("story 0"), plain("of cats 0")] and samples[-1] == plain("t")
    assert len(report.shards) == 4 and lost(report) == {"damaged input": 1}
    assert report.first["damaged input"][0].startswith("9/cut.txt.gz: ")
