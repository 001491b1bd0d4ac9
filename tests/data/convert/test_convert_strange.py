"""Strangers' texts: marks, null characters, keys and columns that come twice, what stands between cells of a CSV."""

import unicodedata

import pytest
from layouts import converted, plain, put
from samples import png

from onevocab.common.errors import UserError
from onevocab.data.convert import convert
from onevocab.data.documents import BadSample, document_of
from onevocab.data.shards.format import Sample

WORDS = "a red square"
UTF_16 = WORDS.encode("utf-16-le")  # without its mark
PICTURES = {"0.png": png(0), "1.png": png(1)}
CSV = 'file;caption;score\n0.png;a dog, red;0,5\n1.png;"a; b";1\n'
TWICE = '{"file": "0.png", "caption": "a", "caption": "b"}', '{"file": "1.png", "caption": "c"}'

# input, files, captions that are kept, what is dropped
CASES = {
    "UTF-16 without its mark": (".", {"0.txt": UTF_16, "1.txt": "a cat"}, ["a cat"], {"bad text": 1}),
    "semicolons": ("t.csv", {"t.csv": CSV}, ["a dog, red", "a; b"], {}),
    "tabs": ("t.csv", {"t.csv": "file\tcaption\n0.png\ta, b\n1.png\tc\n"}, ["a, b", "c"], {}),
    "semicolons in a caption": ("t.csv", {"t.csv": "file,caption\n0.png,a; b; c\n1.png,d\n"}, ["a; b; c", "d"], {}),
    "spaces after commas": ("t.csv", {"t.csv": 'file, caption\n0.png, a dog\n1.png, "a cat, a dog"\n'},
                            ["a dog", "a cat, a dog"], {}),
    "a key twice in a line": ("t.jsonl", {"t.jsonl": "\n".join(TWICE)}, ["c"], {"bad record": 1}),
    "a key twice in a list": ("t.json", {"t.json": f"[{', '.join(TWICE)}]"}, ["c"], {"bad record": 1}),
}


@pytest.mark.parametrize("source, files, expected, dropped", CASES.values(), ids=CASES)
def test_strange_texts_are_read_or_counted(tmp_path, source, files, expected, dropped):
    put(tmp_path / "in", PICTURES | files)
    report, samples = converted("captions", tmp_path / "in" / source, tmp_path / "out")
    kept = [0, 1] if len(expected) == 2 else [1]
    assert samples == [plain(png(i), text) for i, text in zip(kept, expected, strict=True)]
    assert report.dropped == dropped


@pytest.mark.parametrize("name, content, message", [
    ("t.csv", "file,caption,caption\n0.png,a,b\n", "its header names 'caption' twice"),
    ("t.json", '{"0.png": "a", "0.png": "b"}', "the key '0.png' comes twice"),
])
def test_a_table_that_would_lose_a_part_of_every_record_is_refused(tmp_path, name, content, message):
    put(tmp_path / "in", PICTURES | {name: content})
    with pytest.raises(UserError, match=message):
        convert("captions", tmp_path / "in" / name, tmp_path / "out", progress=False)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_an_e_with_its_accent_may_be_one_character_or_two(tmp_path, form):
    """Names that a Mac has written, beside a table or captions that it has not."""
    name, other = (unicodedata.normalize(each, "été") for each in (form, {"NFC": "NFD", "NFD": "NFC"}[form]))
    put(tmp_path / "in", {f"{name}/{name}.png": png(0), f"{name}/{other}.txt": "summer"})
    assert converted("captions", tmp_path / "in", tmp_path / "pairs")[1] == [plain(png(0), "summer")]
    put(tmp_path, {"t.csv": f"file,caption\n{other}/{other}.png,heat\n"})
    report, samples = converted("captions", tmp_path / "t.csv", tmp_path / "table", media=tmp_path / "in")
    assert samples == [plain(png(0), "heat")] and not report.dropped


def said(**members: bytes) -> str:
    return document_of(Sample("0", members, "shard")).segments[-1].content


def test_the_mark_of_utf_8_is_no_part_of_a_shards_text():
    assert said(txt=WORDS.encode("utf-8-sig")) == WORDS
    assert said(json=b'\xef\xbb\xbf{"content": [{"type": "text", "text": "a red square"}]}') == WORDS


@pytest.mark.parametrize("members, message", [
    ({"txt": UTF_16}, "null characters"),
    ({"json": b'{"content": [{"type": "text", "text": "a\\u0000"}]}'}, "null characters"),
    ({"json": b'{"content": [{"type": "text", "text": "a", "text": "b"}]}'}, "'text' comes twice"),
])
def test_a_text_that_would_be_another_one_makes_a_bad_sample(members, message):
    with pytest.raises(BadSample, match=message):
        said(**members)
