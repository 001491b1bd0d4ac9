"""Shards whose members do not make the samples that their author meant: keys that come again, tars joined by `cat`,
names with dots. What is not read as a whole sample is counted and said, the same by every reader."""

import numpy as np
import pytest
from samples import TEXTS, image, png, text, write_tar

from onevocab.common.errors import UserError
from onevocab.data import survey
from onevocab.data.codes import check_raw, tokenize_shards
from onevocab.data.documents import BadSample, codes_document, document_of
from onevocab.data.shards.format import SPLIT, read_shard
from onevocab.data.shards.index import build_index, read_indexed
from onevocab.data.shards.writer import ShardFile


def both(path) -> list:
    """What both readers give, which must agree."""
    samples = list(read_shard(path))
    assert samples == list(read_indexed(path)) == list(read_indexed(path))  # without and with an index
    return samples


def test_pieces_of_a_sample_are_bad_samples(tmp_path, tokenizers, capsys):
    names = [f"{i}.png" for i in range(6)] + [f"{i}.txt" for i in range(5)] + ["whole.png", "whole.txt"]
    members = [(name, png(i) if name.endswith("g") else b"a") for i, name in enumerate(names)]
    shard = write_tar(tmp_path / "a.tar", members)
    samples = both(shard)
    assert [sample.key for sample in samples] == [*"01234501234", "whole"]
    assert [sample.refused for sample in samples] == [{"": SPLIT}] * 5 + [{}] + [{"": SPLIT}] * 5 + [{}]
    with pytest.raises(BadSample, match="sample 0: its key comes again.*--sort=name"):
        document_of(samples[0])
    with pytest.raises(UserError, match="10 of 12 samples are bad.*--sort=name"):
        tokenize_shards(shard, tmp_path / "refused", tokenizers, progress=False)
    stats = tokenize_shards(shard, tmp_path / "codes", tokenizers, max_bad_fraction=1, progress=False)
    assert (stats.samples, stats.bad) == (2, 10)
    with pytest.raises(UserError, match="10 of 12 samples are bad.*a.tar: sample 0: its key comes again"):
        check_raw([shard])
    check_raw([shard, write_tar(tmp_path / "b.tar", [("a.txt", b"a")])], 0.8)
    survey.main([str(shard), "--out", str(tmp_path / "page.html")])
    assert "2 samples of 1 shards, 10 bad ones left out" in capsys.readouterr().out
    assert "--sort=name" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_an_appended_sample_makes_both_bad_and_is_not_written(tmp_path):
    shard = write_tar(tmp_path / "a.tar", [("a.txt", b"old"), ("b.txt", b"x"), ("a.txt", b"new")])
    assert [bool(sample.refused) for sample in both(shard)] == [True, False, True]
    with pytest.raises(ValueError, match="each one once"), ShardFile(tmp_path / "b.tar") as writer:
        for key in "aba":
            writer.write(key, {"txt": b""})


@pytest.mark.parametrize("tail", [b"tar", b"x", bytes(5000) + b"x"], ids=["another tar", "a byte", "far behind"])
def test_what_follows_the_end_marker_is_damage(tmp_path, tail):
    first = write_tar(tmp_path / "a.tar", [("a.txt", b"1"), ("b.txt", b"2")])
    other = write_tar(tmp_path / "b.tar", [("c.txt", b"3")])
    joined = tmp_path / "joined.tar"
    joined.write_bytes(first.read_bytes() + (other.read_bytes() if tail == b"tar" else tail))
    for read in (read_shard, read_indexed):
        with pytest.raises(UserError, match="joined.tar is damaged.*more follows.*tar --concatenate"):
            list(read(joined))
    assert [(sample.key, bool(sample.refused)) for sample in read_indexed(joined, salvage=True)] == [
        ("a", False), ("b", True)]
    joined.write_bytes(first.read_bytes() + bytes(3 << 20))  # the padding of a tape's blocks
    assert [sample.key for sample in both(joined)] == ["a", "b"] and not build_index(joined).damage


def test_names_with_dots_pair_or_are_bad(tmp_path, tokenizers):
    members = {"s.input.png": png(0), "s.output.txt": TEXTS[0].encode(),  # the only text, the only medium
               "22.05.png": png(1), "22.05.txt": b"a", "22.06.png": png(2), "22.06.txt": b"b",
               "img.1.png": png(3), "img.2.png": png(4)}
    shard = write_tar(tmp_path / "a.tar", list(members.items()))
    reasons = {}
    for sample in both(shard):
        try:
            codes = codes_document(sample, tokenizers.encode_media)
            assert [segment.modality for segment in codes.segments] == ["image", "text"]
        except BadSample as error:
            reasons[sample.key] = error.reason
    assert list(reasons) == ["22", "img"] and all("up to its first dot" in reason for reason in reasons.values())
    stats = tokenize_shards(shard, tmp_path / "codes", tokenizers, max_bad_fraction=1, progress=False)
    assert (stats.samples, stats.bad) == (1, 2)
    [kept] = both(tmp_path / "codes" / "a.tar")
    assert codes_document(kept).segments[1].content == TEXTS[0]
    assert np.array_equal(codes_document(kept).segments[0].content, tokenizers.encode_media("image", png(0)))


def test_a_document_of_json_uses_its_members(tmp_path):
    with ShardFile(tmp_path / "a.tar") as writer:
        content = {"content": [text("a"), image("0.png")]}
        writer.write("a", {"json": str(content).replace("'", '"').encode(), "0.png": png(0)})
        writer.write("b", {"json": str(content).replace("'", '"').encode(), "0.png": png(0), "1.png": png(1)})
    good, bad = both(tmp_path / "a.tar")
    assert len(document_of(good).segments) == 2
    with pytest.raises(BadSample, match="does not use member 1.png"):
        document_of(bad)
