"""The page about shards: what it counts, against brute force; what it shows, through Python's own HTML parser; and that
nothing of a shard gets out of it."""

import base64
import io
import tarfile
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
from PIL import Image
from samples import (
    TEXTS,
    as_json,
    image,
    mixed_codes,
    png,
    raw_samples,
    say,
    text,
    write_codes,
    write_tar,
)
from tiny import tiny_tokenizers

from onevocab.common.errors import UserError
from onevocab.data import survey as page_of_shards
from onevocab.data.codes import tokenize_shards
from onevocab.data.documents import codes_document
from onevocab.data.shards.format import codes_to_npy, list_shards, npy_to_codes, read_shard
from onevocab.data.shards.writer import ShardWriter
from onevocab.data.survey import page, survey
from onevocab.tokenizers.audio import PREVIEW_SECONDS
from onevocab.tokenizers.image import PREVIEW_SIDE
from onevocab.tokenizers.media import encode_audio, load_audio, load_image

VOID = ("meta", "img", "br")
OPTIONAL = ("td", "th")  # their ends may be left out


class Page(HTMLParser):
    """texts: what a reader sees; media: data URIs decoded; open: elements that are not closed."""

    def __init__(self, content: str):
        super().__init__(convert_charrefs=True)
        self.texts, self.media, self.tags, self.attributes, self.open = [], [], Counter(), [], []
        self.feed(content)
        self.close()
        self.text = "\n".join(self.texts)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in (*VOID, *OPTIONAL):
            self.open.append(tag)
        source = dict(attributes).get("src")
        if source:
            kind, _, data = source.partition(";base64,")
            self.media.append((kind, base64.b64decode(data, validate=True)))

    def handle_endtag(self, tag):
        if tag not in OPTIONAL:
            assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def rows(self, title: str) -> str:
        """The text of a section."""
        begin = len(self.texts) - 1 - self.texts[::-1].index(title)  # its first occurrence is a link
        return "\n".join(self.texts[begin + 1 :])


def parsed(found, tokenizers=None) -> Page:
    result = Page(page(found, tokenizers))
    assert not result.open and not set(result.tags) & {"script", "link", "iframe", "object", "base", "form"}
    for _, name, value in result.attributes:  # nothing is fetched, nothing runs
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert value.startswith(("data:image/png;base64,", "data:audio/wav;base64,", "#"))
    policy = [value for tag, name, value in result.attributes if tag == "meta" and name == "content"]
    assert any(value.startswith("default-src 'none'") for value in policy)
    return result


# ------------------------------------------------------------------------------------------------ what is counted


def test_raw_shards_are_counted_and_shown(raw):
    found = survey(list_shards(raw))
    members = [members for _, members in raw_samples(24)]
    assert not found.bad and found.counts["samples"] == 24 and len(found.shown) == 24
    assert found.counts["conversations"] == 8 and found.counts["plain documents"] == 16
    assert (found.counts["parts: image"], found.counts["parts: audio"]) == (
        sum("0.png" in m or "jpg" in m for m in members), sum("flac" in m or "1.flac" in m for m in members))
    assert list(found.lengths["seconds of a sound"]) == [4000 / 16000] * 8
    assert set(found.lengths["pixels of a picture's longer side"]) == {16}
    assert [(name, n) for name, n, *_ in found.shards] == [(str(s), 5) for s in list_shards(raw)[:4]] + [
        (str(list_shards(raw)[4]), 4)]
    result = parsed(found)
    for content in TEXTS:
        assert content in result.text
    pictures = [data for kind, data in result.media if kind == "data:image/png"]
    sounds = [data for kind, data in result.media if kind == "data:audio/wav"]
    expected = [m.get("0.png") or m.get("jpg") for m in members if "0.png" in m or "jpg" in m]
    assert len(pictures) == len(expected)
    for shown, file in zip(pictures, expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(shown))), np.asarray(load_image(file)))
    expected = [m.get("flac") or m.get("1.flac") for m in members if "flac" in m or "1.flac" in m]
    for shown, file in zip(sounds, expected, strict=True):
        samples, rate = soundfile.read(io.BytesIO(shown), dtype="float32")
        assert rate == 16000 and np.abs(samples - load_audio(file)[0]).max() < 1e-4
    classes = Counter(value for _, name, value in result.attributes if name == "class")
    assert classes["turn user"] == classes["turn assistant"] == 8


def test_tokens_are_those_of_training(raw, tmp_path, tokenizers):
    documents = [codes_document(s, tokenizers.encode_media) for shard in list_shards(raw) for s in read_shard(shard)]
    ids = [tokenizers.encode(document).ids for document in documents]
    tokenize_shards(raw, tmp_path, tokenizers, progress=False)
    for folder in (raw, tmp_path):
        found = survey(list_shards(folder), tokenizers)
        assert not found.bad and found.ids.tolist() == np.bincount(np.concatenate(ids),
                                                                   minlength=tokenizers.vocab.size).tolist()
        assert list(found.lengths["tokens of a sample"]) == [len(each) for each in ids]
        modality = np.array(tokenizers.vocab.modalities)[tokenizers.vocab.modality_of(np.concatenate(ids))]
        rows = {row[0]: row for row in page_of_shards._use(found, tokenizers)}
        assert {name: row[1] for name, row in rows.items()} == dict(Counter(modality.tolist()))
        span = tokenizers.vocab.spans["image"]
        codes = np.concatenate([s.content.reshape(-1) for d in documents for s in d.segments if s.modality == "image"])
        counts = np.bincount(codes, minlength=span.codes)
        assert rows["image"][2:5] == (len(codes), span.codes, int((counts > 0).sum()))
        share = counts[counts > 0] / counts.sum()
        assert rows["image"][5] == f"{2 ** -(share * np.log2(share)).sum():.1f}"
        assert rows["image"][6].startswith(f"{counts.argmax()} ({counts.max() / counts.sum():.1%})")
        parsed(found, tokenizers)


def test_codes_are_decoded_with_a_run_and_coloured_without(tmp_path, tokenizers):
    samples = list(mixed_codes(20))
    folder = write_codes(tmp_path, tokenizers, samples)
    grids = [npy_to_codes(m["0.image.npy"]) for m in samples if "0.image.npy" in m]
    sounds = [npy_to_codes(m["0.audio.npy"]) for m in samples if "0.audio.npy" in m]
    found = survey(list_shards(folder))
    assert {whose for *_, whose in found.shards} == {f"codes of tokenizers {tokenizers.hash}"}
    for modality, codes in (("image", grids), ("audio", sounds)):
        came = np.bincount(np.concatenate([each.reshape(-1) for each in codes]))
        assert found.codes[modality].tolist() == came.tolist()
        assert list(found.lengths[f"codes of one {modality}"]) == [each.size for each in codes]
    result = parsed(found)
    assert {kind for kind, _ in result.media} == {"data:image/png"} and len(result.media) == len(grids) + len(sounds)
    first = np.asarray(Image.open(io.BytesIO(result.media[0][1])))
    rows, columns = grids[0].shape
    assert first.shape == (rows * 6, columns * 6, 3)
    places = {int(code): first[3 + 6 * y, 3 + 6 * x].tolist() for (y, x), code in np.ndenumerate(grids[0])}
    assert len({tuple(colour) for colour in places.values()}) == len(places), "codes share a colour"
    assert all(first[3 + 6 * y, 3 + 6 * x].tolist() == places[int(code)] for (y, x), code in np.ndenumerate(grids[0]))
    decoded = parsed(survey(list_shards(folder), tokenizers), tokenizers)
    pictures = [data for kind, data in decoded.media if kind == "data:image/png"]
    assert len(pictures) == len(grids) and sum(kind == "data:audio/wav" for kind, _ in decoded.media) == len(sounds)
    shown = np.asarray(Image.open(io.BytesIO(pictures[0])))
    assert np.array_equal(shown, np.asarray(tokenizers.decode_media("image", grids[0])))


def test_codes_of_other_tokenizers_are_an_error(tmp_path, tokenizers):
    folder = write_codes(tmp_path / "codes", tokenizers, mixed_codes(5))
    other = tiny_tokenizers(seed=1)
    other.save(tmp_path / "other")
    with pytest.raises(UserError, match="holds codes of other tokenizers"):
        survey(list_shards(folder), other)


# ------------------------------------------------------------------------------------------------ bad and double ones


def test_bad_samples_are_named(tmp_path, tokenizers):
    content = as_json({"content": [image()]})
    codes = as_json({"content": [image("0.image.npy")]})
    link = tarfile.TarInfo("link.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [("fine.txt", b"a word"), ("cut.json", content), ("cut.0.png", png()[:60]), ("missing.json", content),
               ("json.json", b"{"), ("utf.txt", b"\xff\xff"), (link, b""), ("sound.flac", b"fLaC"),
               ("endless.json", codes), ("endless.0.image.npy", codes_to_npy(np.full((2, 2), 2**32 - 1), 2**31)),
               ("above.json", codes), ("above.0.image.npy", codes_to_npy(np.full((4, 4), 99), 100))]
    good = write_tar(tmp_path / "a.tar", members)
    (tmp_path / "b.tar").write_bytes(good.read_bytes()[:2100])  # the third member's header is cut
    found = survey(list_shards(tmp_path))
    reasons = {bad.key: bad.reason for bad in found.bad if bad.shard.endswith("a.tar")}
    for key, reason in [("cut", "member 0.png"), ("missing", "missing"), ("json", "not valid"), ("utf", "not UTF-8"),
                        ("link", "a link"), ("sound", "member flac"), ("endless", "above those of any codebook")]:
        assert reason in reasons[key]
    assert set(reasons) == {"cut", "missing", "json", "utf", "link", "sound", "endless"}
    [damaged] = [bad for bad in found.bad if bad.shard.endswith("b.tar")]
    assert damaged.key == "cut" and damaged.reason == "the shard is damaged or cut short here"
    assert "above" in {place.rpartition(": ")[2] for place, _ in found.shown}
    listed = parsed(found).rows("Bad samples")
    for bad in found.bad:
        assert bad.key in listed and bad.shard in listed and bad.reason in listed
    # The run's tokenizers know 16 codes: its training would leave this sample out too.
    [bad] = [bad for bad in survey([good], tokenizers).bad if bad.key == "above"]
    assert "it cannot be encoded" in bad.reason and "0..15" in bad.reason


def test_exact_duplicates(tmp_path):
    same = {"json": as_json({"content": [image(), text("a dog")]}), "0.png": png(1)}
    other = {"json": as_json({"content": [image("1.png"), text("a dog")], "url": "x"}), "1.png": png(1)}
    turned = {"json": as_json({"content": [text("a dog"), image()]}), "0.png": png(1)}
    with ShardWriter(tmp_path, "s", 2) as writer:
        for key, members in zip("abcde", (same, other, turned, {"txt": b"a dog"}, {"txt": b"a cat"}), strict=True):
            writer.write(key, members)
    found = survey(list_shards(tmp_path))
    one, two = (str(tmp_path / f"s-00000{i}.tar") for i in range(2))
    assert [places for places in found.samples.values() if len(places) > 1] == [[f"{one}: a", f"{one}: b"]]
    assert list(found.media.values()) == [[f"{one}: a.0.png", f"{one}: b.1.png", f"{two}: c.0.png"]]
    assert f"{one}: a; {one}: b" in parsed(found).rows("Exact duplicates")


# ------------------------------------------------------------------------------------------------ hostile, and bounds

EVIL = "</div></style><script>alert(1)</script><img src=https://x.example/a onerror=alert(1)>&amp;\"'\u202e"


def test_nothing_of_a_shard_escapes(tmp_path):
    members = {"json": as_json({"messages": [say("user", text(EVIL)), say("assistant", image(), text(EVIL))]}),
               "0.png": png()}
    info = [tarfile.TarInfo(f"{EVIL.replace('.', '').replace('/', '')}.{ending}") for ending in members]
    write_tar(tmp_path / "a.tar", [*zip(info, members.values(), strict=True),
                                   ("bad<script>.json", as_json({"content": [{"type": "image", "file": EVIL}]})),
                                   ("endless.json", as_json({"content": [{"type": "image", "file": "x" * 10**6}]})),
                                   ("b\udcff.txt", b"a name that is no Unicode")])
    found = survey(list_shards(tmp_path))
    assert found.counts["samples"] == 2 and len(found.bad) == 2
    result = parsed(found)
    assert result.texts.count(EVIL) == 2, "the text stands there as it is, and only as a text"
    assert "bad<script>" in result.rows("Bad samples")
    assert len(page(found).encode()) < 100_000
    assert "<script" not in page(found).lower() and "x.example/a onerror" in result.text


def test_files_are_encoded_anew(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (300, 200), (9, 8, 7)).save(picture, "JPEG", comment=b"SECRET PLACE")
    sound = encode_audio(np.zeros(16_000 * 12), 16_000, "WAV")
    write_tar(tmp_path / "a.tar", [("a.jpg", picture.getvalue()), ("a.txt", b"x"), ("b.wav", sound), ("b.txt", b"y")])
    found = survey(list_shards(tmp_path))
    result = parsed(found)
    assert not found.bad and not any(b"SECRET" in data for _, data in result.media)
    [shown] = [Image.open(io.BytesIO(data)) for kind, data in result.media if kind == "data:image/png"]
    [(samples, _)] = [soundfile.read(io.BytesIO(data)) for kind, data in result.media if kind == "data:audio/wav"]
    assert max(shown.size) == PREVIEW_SIDE and len(samples) == 16_000 * PREVIEW_SECONDS
    assert "300x200" in result.text and "12.0 s at 16,000 Hz, the first 10 s" in result.text


def test_what_is_read_and_shown_is_bounded(tmp_path, monkeypatch):
    with ShardWriter(tmp_path, "s", 10) as writer:
        for i in range(40):
            writer.write(f"{i:03d}", {"0.png": png(i), "json": as_json({"content": [image()] * 50 + [text("end")]})})
    found = survey(list_shards(tmp_path), samples=8, show=4)
    assert [n for _, n, *_ in found.shards] == [2] * 4 and found.counts["samples"] == 8
    assert [place.rpartition(": ")[2] for place, _ in found.shown] == [
        f"{i:03d} (its beginning)" for i in (0, 10, 20, 30)]
    assert survey(list_shards(tmp_path), samples=2).counts["samples"] == 2
    assert survey(list_shards(tmp_path), samples=0, show=0).counts["samples"] == 40
    assert len(parsed(found).media) == 4 * page_of_shards.PARTS
    monkeypatch.setattr(page_of_shards, "PAGE_BYTES", 10_000)
    small = parsed(found)
    assert 1 < len(small.media) < 20 and "no room left on this page" in small.text


def test_long_texts_are_cut(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.txt", b"w" * 5000)])
    shown = [words for words in parsed(survey(list_shards(tmp_path))).texts if words.startswith("www")]
    assert shown == ["w" * page_of_shards.TEXT + " … 3,000 more characters"]


def test_histograms():
    result = Page(f"<div>{page_of_shards._histogram('things', np.array([0, 1, 1, 2, 3, 4, 100.0]))}</div>")
    bins = [words for words in result.texts if " to " in words and "up" not in words]
    assert bins == ["1 to 2", "2 to 4", "4 to 8", "8 to 16", "16 to 32", "32 to 64", "64 to 128"]
    counts = [words for words in result.texts if words.isdigit()]
    assert counts == ["2", "2", "1", "0", "0", "0", "1"]
    assert "7 values, of them 1 zeros; smallest 0, median 2" in result.text and "largest 100" in result.text
    assert "0 to" not in page_of_shards._histogram("zeros", np.zeros(3))


# ------------------------------------------------------------------------------------------------ the command


def test_command(raw, tmp_path, tokenizers, capsys):
    tokenizers.save(tmp_path / "run" / "tokenizers")
    out = tmp_path / "page.html"
    shards = [str(shard) for shard in list_shards(raw)]
    page_of_shards.main([*shards[:2], "--out", str(out)])
    assert capsys.readouterr().out.startswith(f"{out}: 10 samples of 2 shards, 0 bad")
    before = out.read_bytes()
    for arguments, reason in [([str(raw)], "exists already"), ([str(tmp_path), "--overwrite"], "no shards at"),
                              ([str(raw), "--overwrite", "--samples", "-1"], "from 0 on"),
                              ([str(raw), "--overwrite", "--run", str(tmp_path)], "no finished tokenizers")]:
        with pytest.raises(SystemExit) as caught:
            page_of_shards.main([*arguments, "--out", str(out)])
        error = capsys.readouterr().err
        assert caught.value.code == 2 and error.startswith("error: ") and reason in error
    assert out.read_bytes() == before
    page_of_shards.main([str(raw), "--run", str(tmp_path / "run"), "--overwrite", "--out", str(out)])
    result = Page(out.read_text(encoding="utf-8"))
    assert "tokens of a sample" in result.text and not result.open
