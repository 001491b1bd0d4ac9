"""Shards, documents and codes: the webdataset reader as the oracle, and what strangers may send."""

import errno
import io
import json
import logging
import os
import tarfile
from unittest.mock import Mock

import numpy as np
import pytest
import webdataset
from samples import (
    TEXTS,
    as_json,
    audio,
    image,
    png,
    raw_samples,
    sample,
    say,
    text,
    write_tar,
)
from tiny import tiny_tokenizers

from onevocab.common.errors import UserError
from onevocab.data import tokenize
from onevocab.data.codes import tokenize_in_processes, tokenize_shards
from onevocab.data.documents import BadSample, codes_document, document_of
from onevocab.data.loader import PackedLoader
from onevocab.data.shards.format import (
    codes_to_npy,
    list_shards,
    npy_to_codes,
    read_header,
    read_shard,
)
from onevocab.data.shards.writer import ShardFile, ShardWriter
from onevocab.tokenizers.document import Document, Segment, conversation

# ------------------------------------------------------------------------------------------------ shards


def oracle(path):
    """{key: members} by webdataset's own pipeline."""
    stages = webdataset.SimpleShardList([str(path)]), webdataset.tarfile_to_samples()
    return [(sample["__key__"], {k: v for k, v in sample.items() if not k.startswith("__")})
            for sample in webdataset.DataPipeline(*stages)]


def test_reads_what_webdataset_reads(tmp_path):
    with ShardWriter(tmp_path, "s", 5) as writer:
        for key, members in raw_samples():
            writer.write(key, members)
    shards = list_shards(tmp_path)
    assert [s.name for s in shards] == ["s-000000.tar", "s-000001.tar", "s-000002.tar"] and shards == writer.shards
    ours = [(s.key, s.members) for shard in shards for s in read_shard(shard)]
    assert ours == [sample for shard in shards for sample in oracle(shard)] == list(raw_samples())


def test_groups_strange_names_as_webdataset_does(tmp_path):
    names = ["a.json", "a.0.PNG", "dir.d/a.txt", "b.txt", "a.txt", "é漢.txt", "x" * 150 + "/b.0.json", "noending",
             ".hidden.txt", "__meta__/x.json", "__header__/tokenizers.json", "__x__.txt", "c.tXt", "__y__", "d..txt"]
    header = as_json({"tokenizers": "x"})
    shard = write_tar(tmp_path / "a.tar", [(n, header if "header" in n else n.encode()) for n in names])
    assert [(s.key, s.members) for s in read_shard(shard)] == oracle(shard)


def test_same_samples_same_bytes_and_nothing_after_an_exception(tmp_path):
    for name in "ab":
        with ShardFile(tmp_path / f"{name}.tar") as shard:
            for key, members in raw_samples():
                shard.write(key, dict(reversed(members.items())))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "c", "s", 2) as writer:
        for key, members in list(raw_samples())[:3]:
            writer.write(key, members)
        raise RuntimeError
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [".s-000000.tar.index", "s-000000.tar"]
    with pytest.raises(UserError, match="exists already"):
        ShardWriter(tmp_path / "c", "s", 2)
    with ShardFile(tmp_path / "d.tar") as shard:
        for key, ending in [("a.b", "txt"), ("a", "pickle"), ("../a", "txt"), ("a", "x/y.txt"), ("__a__", "txt")]:
            with pytest.raises(ValueError):
                shard.write(key, {ending: b""})


def test_hostile_members_are_refused(tmp_path):
    link, device, sparse = (tarfile.TarInfo(name) for name in ("b.0.png", "c.0.png", "d.0.png"))
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device.type, sparse.type = tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE
    shard = write_tar(tmp_path / "a.tar", [
        ("a.txt", b"fine"), ("a.pyd", b"cposix\nsystem\n"), ("a.pickle", b"x"), ("a.pth", b"x"),
        ("b.txt", b"t"), (link, b""), ("c.txt", b"t"), (device, b""), ("d.txt", b"t"), (sparse, b""),
        ("../e.txt", b"t"), ("/f.txt", b"t"), ("g.txt", b"t"), ("g.txt", b"u"), ("h.txt", b"t" * 2000),
    ])
    samples = {s.key: s for s in read_shard(shard, max_member=1000)}
    assert samples["a"].members == {"txt": b"fine"} and not samples["a"].refused
    assert codes_document(samples["a"]) == Document((Segment("text", "fine"),))
    for key, reason in [("b", "link"), ("c", "device"), ("d", "special"), ("../e", "outside"), ("/f", "outside"),
                        ("g", "two members"),
                        ("h", "2,000 bytes")]:
        with pytest.raises(BadSample, match=reason):
            document_of(samples[key])


@pytest.mark.parametrize("cut", [700, 1024, 1536, 1700, 2048, 2560])
def test_truncated_shard_is_named(tmp_path, cut):
    whole = write_tar(tmp_path / "whole.tar", [(f"{i}.txt", b"x" * 300) for i in range(4)]).read_bytes()
    shard = tmp_path / "cut.tar"
    shard.write_bytes(whole[:cut])
    with pytest.raises(UserError, match="cut.tar is damaged or cut short"):
        list(read_shard(shard))
    shard.write_bytes(whole[:1024] + b"\xff" * 512 + whole[1536:])  # a header overwritten in the middle
    with pytest.raises(UserError, match="cut.tar is damaged"):
        list(read_shard(shard))


def test_no_shards_and_no_tar(tmp_path):
    with pytest.raises(UserError, match="no shards at"):
        list_shards(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    for content in (b"", b"x" * 5000):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(UserError, match="a.tar is damaged"):
            list(read_shard(tmp_path / "a.tar"))


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def test_npy_is_checked():
    for n_codes, dtype in [(65536, np.uint16), (65537, np.uint32)]:
        codes = np.arange(12).reshape(3, 4)
        back = npy_to_codes(codes_to_npy(codes, n_codes))
        assert back.dtype == dtype and (back == codes).all()
    good = npy(np.ones((2, 3), np.uint16))
    bomb = good.replace(b"(2, 3)", b"(2,9**9)"[:6])
    for bad in [npy(np.array([[object]], dtype=object)), npy(np.ones((2, 3))), npy(np.ones(3, np.uint16)), bomb,
                npy(np.ones((2, 3, 4), np.uint16)), npy(np.asfortranarray(np.ones((2, 3), np.uint16))), good[:-1],
                npy(np.ones((0, 3), np.uint16)), npy(np.ones((2, 3), ">u2")), b"", b"\x93NUMPY\x01\x00", good + b"x"]:
        with pytest.raises(ValueError):
            npy_to_codes(bad)


# ------------------------------------------------------------------------------------------------ documents


def test_documents_of_every_layout():
    codes, sound = np.arange(16).reshape(4, 4), np.arange(6).reshape(3, 2)
    members = {"0.image.npy": codes_to_npy(codes, 16), "1.audio.npy": codes_to_npy(sound, 16)}
    content = [image("0.image.npy"), text("hi"), audio("1.audio.npy")]
    assert codes_document(sample({"json": as_json({"content": content}), **members})) == Document(
        (Segment("image", codes), Segment("text", "hi"), Segment("audio", sound)))
    messages = [say("system", text("s")), say("user", *content[:2]), {"role": "assistant", "content": "yes"}]
    one = {"0.image.npy": members["0.image.npy"]}
    assert codes_document(sample({"json": as_json({"messages": messages}), **one})) == conversation(
        [("system", [("text", "s")]), ("user", [("image", codes), ("text", "hi")]), ("assistant", [("text", "yes")])])
    assert codes_document(sample({"image.npy": members["0.image.npy"], "txt": b"hi\n", "json": b"{}"})) == Document(
        (Segment("image", codes), Segment("text", "hi")))
    assert codes_document(sample({"wav": b"RIFF", "txt": b"hi"}), lambda modality, file: sound) == Document(
        (Segment("audio", sound), Segment("text", "hi")))
    # A file's name with more dots, metadata beside it.
    assert codes_document(sample({"input.image.npy": members["0.image.npy"], "output.txt": b"hi", "x.json": b"{}",
                                  "clip.npy": b""})) == Document((Segment("image", codes), Segment("text", "hi")))


@pytest.mark.parametrize("members, reason", [
    ({"json": b"{"}, "Expecting"),
    ({"json": b"\xff\xfe"}, "codec"),
    ({"json": b"[" * 100_000}, "nested"),
    ({"json": b"3"}, "no json"),
    ({"txt": b"\xff\xff"}, "codec"),
    ({"json": as_json({"content": []})}, "holds something"),
    ({"json": as_json({"content": "x"})}, "not a list"),
    ({"json": as_json({"content": [3]})}, "not an object"),
    ({"json": as_json({"content": [{"type": "text", "text": 3}]})}, "without a text"),
    ({"json": b'{"content": [{"type": "text", "text": "\\ud800"}]}'}, "surrogates"),
    ({"json": as_json({"content": [{"type": "pipe:ls"}]})}, "unknown type"),
    ({"json": as_json({"content": [image()]})}, "missing"),
    ({"json": as_json({"content": [image("../../etc/passwd")]})}, "missing"),
    ({"json": as_json({"content": [audio("0.png")]}), "0.png": b""}, "no audio"),
    ({"json": as_json({"messages": [{"role": "root", "content": []}]})}, "role"),
    ({"json": as_json({"messages": [{"role": "user", "content": None}]})}, "not a list"),
    ({"json": as_json({"content": [image("0.image.npy")]}), "0.image.npy": b"PK"}, "not a .npy"),
    ({"json": as_json({"content": [text("a")]}), "0.png": b""}, "does not use member 0.png"),
    ({"json": as_json({"content": [text("a")]}), "txt": b"b"}, "does not use member txt"),
    ({"1.png": b"", "2.png": b""}, "members 1.png and 2.png of one key"),
    ({"05.png": b"", "05.txt": b"a", "06.txt": b"b"}, "texts 05.txt and 06.txt of one key"),
    ({"05.png": b"", "05.json": as_json({"content": [image("05.png")]})}, "05.json holds content"),
])
def test_bad_samples_say_why(members, reason):
    with pytest.raises(BadSample, match=reason) as caught:
        codes_document(sample(members))
    assert (caught.value.key, caught.value.shard) == ("k", "s.tar")


# ------------------------------------------------------------------------------------------------ codes


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in list_shards(folder)}


def test_codes_are_the_same_documents(raw, tmp_path, tokenizers):
    stats = tokenize_shards(raw, tmp_path / "a", tokenizers, batch=3, progress=False)
    assert (stats.shards, stats.samples, stats.bad) == (5, 24, 0)
    for shard, codes in zip(list_shards(raw), list_shards(tmp_path / "a"), strict=True):
        assert read_header(codes)["tokenizers"] == tokenizers.hash and read_header(shard) is None
        for before, after in zip(read_shard(shard), read_shard(codes, tokenizers.hash), strict=True):
            assert before.key == after.key
            assert codes_document(before, tokenizers.encode_media) == codes_document(after)
            assert not any(ending.endswith(("png", "jpg", "flac")) for ending in after.members)
            if before.key == "00000":  # other keys of the JSON stay
                content = [image("0.image.npy"), text(TEXTS[0])]
                assert json.loads(after.members["json"]) == {"content": content, "task": "x"}
                assert after.members["0.image.npy"] == codes_to_npy(tokenizers.encode_media("image", png(0)), 16)
    # Ranks and restarts give the same bytes; finished shards are not touched.
    ranks = [tokenize_shards(raw, tmp_path / "b", tokenizers, rank, 2, batch=3, progress=False) for rank in (1, 0)]
    assert [stats.shards for stats in ranks] == [2, 3]
    (tmp_path / "b" / "s-000002.tar").unlink()
    kept = (tmp_path / "b" / "s-000000.tar").stat().st_mtime_ns
    stats = tokenize_shards(raw, tmp_path / "b", tokenizers, batch=3, progress=False)
    assert (stats.shards, stats.skipped) == (1, 4)
    assert (tmp_path / "b" / "s-000000.tar").stat().st_mtime_ns == kept
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_other_tokenizers_are_refused(raw, tmp_path, tokenizers):
    tokenize_shards(raw, tmp_path / "a", tokenizers, progress=False)
    other = tiny_tokenizers(seed=1)
    other.save(tmp_path / "other")
    with pytest.raises(UserError, match="holds codes of other tokenizers"):
        PackedLoader(tmp_path / "a", other)
    with pytest.raises(UserError, match="was made from other tokenizers"):
        tokenize_shards(raw, tmp_path / "a", other, progress=False)
    assert tokenize_shards(raw, tmp_path / "a", other, progress=False, overwrite=True).skipped == 0
    assert len(list(PackedLoader(tmp_path / "a", other)._cache.length)) == 24
    with pytest.raises(UserError, match="folder of the raw shards"):
        tokenize_shards(raw, raw, tokenizers, progress=False)


def test_bad_media_are_left_out_and_counted(tmp_path, tokenizers, caplog):
    members = [(f"{i}.json", as_json({"content": [image()]})) for i in range(6)]
    files = [png(0), b"", png(1)[:60], b"RIFFxxxx", png(2)]
    shard = [m for i, file in enumerate(files) for m in (members[i], (f"{i}.0.png", file))] + [members[5]]
    write_tar(tmp_path / "a.tar", shard)
    with caplog.at_level(logging.WARNING, "onevocab.data"):
        stats = tokenize_shards(tmp_path / "a.tar", tmp_path / "out", tokenizers, max_bad_fraction=0.7, progress=False)
    assert (stats.samples, stats.bad) == (2, 4)
    assert all(any(f"a.tar: sample {i}: " in r.message for r in caplog.records) for i in (1, 2, 3, 5))
    assert [s.key for s in read_shard(tmp_path / "out" / "a.tar")] == ["0", "4"]
    with pytest.raises(UserError, match=r"4 of 6 samples are bad.*a\.tar: sample 5"):
        tokenize_shards(tmp_path / "a.tar", tmp_path / "two", tokenizers, max_bad_fraction=0.5, progress=False)


def test_tokenize_command(raw, tmp_path, tokenizers, capsys):
    tokenizers.save(tmp_path / "run" / "tokenizers")
    tokenize.main([str(tmp_path / "run"), str(raw), "--out", str(tmp_path / "a")])
    assert "24 samples" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        tokenize.main([str(tmp_path / "none"), str(raw), "--out", str(tmp_path / "b")])
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("error: no run folder at")


@pytest.mark.slow
def test_processes_give_the_same_bytes(raw, tmp_path, tokenizers):
    tokenizers.save(tmp_path / "t")
    tokenize_shards(raw, tmp_path / "a", tokenizers, progress=False)
    tokenize_in_processes(list_shards(raw), tmp_path / "b", tmp_path / "t", 2, progress=False)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with pytest.raises(UserError, match="no finished tokenizers"):
        tokenize_in_processes(list_shards(raw), tmp_path / "c", tmp_path / "none", 2, progress=False)


def test_two_writers_and_a_full_disk(tmp_path, monkeypatch):
    first = ShardFile(tmp_path / "a.tar")
    with pytest.raises(UserError, match="another process is writing .*a.tar"):
        ShardFile(tmp_path / "a.tar")
    first.write("0", {"txt": b"one"})
    first.close()
    with pytest.raises(UserError, match="cannot write .*b.tar: No space left"), ShardFile(tmp_path / "b.tar") as shard:
        monkeypatch.setattr(shard._tar, "write", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        shard.write("0", {"txt": b"one"})
    shard = ShardFile(tmp_path / "c.tar")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UserError, match="cannot write .*c.tar: No space left"):
        shard.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.tar.index", "a.tar"]
    monkeypatch.undo()
    (tmp_path / ".d.tar.part").write_bytes(b"left by a killed process")
    with ShardFile(tmp_path / "d.tar") as shard:
        shard.write("0", {"txt": b"one"})
    assert (tmp_path / "d.tar").read_bytes() == (tmp_path / "a.tar").read_bytes()
