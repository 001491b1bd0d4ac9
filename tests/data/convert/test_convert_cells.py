"""CSV and TSV of people who do not quote, quote otherwise or break off: nothing is invented, what is lost is said."""

import csv
import io
import zipfile

import pytest
from layouts import AB, as_csv, converted, plain, put
from samples import png

from onevocab.common.errors import UserError
from onevocab.data.convert import cells, convert

PICTURES = {f"{i}.png": png(i) for i in range(6)}


def table(tmp_path, content, name="t.csv", **options):
    """(captions by picture's number, report)"""
    source = put(tmp_path / "in", PICTURES | {name: content}) / name
    report, samples = converted("captions", source, tmp_path / "out", **options)
    numbers = {content: int(name[0]) for name, content in PICTURES.items()}
    return {numbers[picture]: caption for [(_, (picture, caption))] in samples}, report


def test_a_long_caption_is_one_record(tmp_path):
    long = "\n".join(["5.png,a line of a text that is no record"] * 5000)
    assert len(long) > csv.field_size_limit() // 1000 > 16_000
    rows = ("0.png", "a"), ("1.png", long), ("2.png", "b")
    captions, report = table(tmp_path, as_csv(("file_name", "caption"), *rows))
    assert captions == {0: "a", 1: long, 2: "b"} and not report.dropped


def test_records_that_cannot_be_read_are_dropped_alone(tmp_path):
    captions, report = table(tmp_path, 'file_name,caption\n0.png,a 5" disk\n1.png,"red" car\n2.png,b,c\n\n3.png,d\n'
                             '4.png,"open\n5.png,in it\n')
    assert captions == {0: 'a 5" disk', 3: "d"} and report.dropped == {"bad record": 3}
    first, *_, last = report.first["bad record"]
    assert "line 3:" in first and "lines 7 to 8: unexpected end" in last


def test_a_record_without_an_end_ends_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "MAX_RECORD", 1000)
    captions, report = table(tmp_path, 'file_name,caption\n0.png,a\n1.png,"' + "5.png,x\n" * 1000)
    assert captions == {0: "a"} and report.dropped == {"damaged input": 1}
    assert "from line 3 on has more than 1,000 characters" in report.first["damaged input"][0]
    with pytest.raises(UserError, match="its header cannot be read: line 1"):
        convert("captions", put(tmp_path, {"b.csv": '"a"b,c\n'}) / "b.csv", tmp_path / "b", progress=False)


def quoting(style, ending="\n") -> str:
    rows = [("file_name", "caption"), ("0.png", 'a "red" car'), ("1.png", "two\nlines"), ("2.png", "plain"),
            ("3.png", '"Yes, sir."'), ("4.png", "a, b"), ("5.png", '"Oh" he said')]
    buffer = io.StringIO()
    csv.writer(buffer, delimiter="\t", quoting=style, lineterminator=ending).writerows(rows)
    return buffer.getvalue()


@pytest.mark.parametrize("style", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_tsv_of_writers_that_quote(tmp_path, style):
    captions, report = table(tmp_path, quoting(style, "\r\n"), "t.tsv", captions=1)
    assert captions == {0: 'a "red" car', 1: "two\nlines", 2: "plain", 3: '"Yes, sir."', 4: "a, b", 5: '"Oh" he said'}
    assert not report.dropped


@pytest.mark.parametrize("rows, expected", [
    (["0.png\t\"Yes, sir.\"", "1.png\ta, b", "2.png\t\"Oh\" he said", '3.png\ta "b" c'],
     {0: '"Yes, sir."', 1: "a, b", 2: '"Oh" he said', 3: 'a "b" c'}),
    (['0.png\t"open', "1.png\tx", '2.png\tclosed"'], {0: '"open', 1: "x", 2: 'closed"'}),
    (['0.png\t"all of it"', "1.png\tx"], {0: '"all of it"', 1: "x"}),
    (['0.png\t"a, b"', "1.png\tx", '2.png\t"c, d"'], {0: "a, b", 1: "x", 2: "c, d"}),  # Excel
    (['0.png\t"a ""b"""', "1.png\tx", '2.png\t5" disk', '3.png\t"c ""d"""'], {0: 'a "b"', 1: "x", 2: '5" disk',
                                                                            3: 'c "d"'}),  # one line by hand
], ids=["bare", "open", "unclear", "commas", "mixed"])
def test_tsv_by_its_cells(tmp_path, rows, expected):
    captions, report = table(tmp_path, "\n".join(["file_name\tcaption", *rows]), "t.tsv")
    assert captions == expected and not report.dropped


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_marked_encodings_are_read(tmp_path, encoding):
    content = "file_name,caption\n0.png,café 漢\n".encode(encoding)
    assert table(tmp_path / "csv", content)[0] == {0: "café 漢"}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.csv", content)
    assert table(tmp_path / "zip", packed.getvalue(), "t.csv.zip")[0] == {0: "café 漢"}
    sidecar = put(tmp_path / "side", {"a.png": png(0), "a.txt": "café 漢".encode(encoding)})
    assert converted("captions", sidecar, tmp_path / "s")[1] == [plain(png(0), "café 漢")]
    texts = put(tmp_path / "texts", {"a.txt": "é 漢\n\nzwei".encode(encoding)})
    assert converted("text", texts, tmp_path / "t")[1] == [plain("é 漢"), plain("zwei")]


def test_other_encodings_are_counted_with_advice(tmp_path):
    captions, report = table(tmp_path, "file_name,caption\n0.png,ok\n1.png,café\n".encode("cp1252"))
    assert captions == {0: "ok"} and report.dropped == {"bad text": 1}
    assert report.first["bad text"][0].endswith("save the input as UTF-8")
    sidecar = put(tmp_path / "side", AB | {"a.txt": "café".encode("cp1252"), "b.txt": "ok"})
    assert converted("captions", sidecar, tmp_path / "s")[0].first["bad text"][0].endswith("save it as UTF-8")
    cut = put(tmp_path / "cut", {"a.txt": "één\n".encode("utf-16")[:-1], "b.txt": "ok"})
    assert converted("text", cut, tmp_path / "c")[0].dropped == {"damaged input": 1}
