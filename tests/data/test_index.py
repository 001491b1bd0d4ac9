"""Indexed shards and their local copies: webdataset, GNU tar and tarfile as oracles, and what strangers may send."""

import errno
import functools
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save
from samples import as_json, image, png, raw_samples, write_tar

from onevocab.common.errors import UserError
from onevocab.data.documents import BadSample, document_of
from onevocab.data.shards import index
from onevocab.data.shards.format import list_shards, read_shard
from onevocab.data.shards.index import IndexedShard, build_index, build_indexes, index_path, read_indexed
from onevocab.data.shards.writer import ShardFile

USTAR, GNU, PAX = tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT
NAMES = ["a.json", "a.0.PNG", "dir.d/a.txt", "b.txt", "a.txt", "é漢.txt", "x" * 150 + "/b.0.json", "noending", "c.tXt",
         ".hidden.txt", "dir/.hidden.txt", "__meta__/x.json", "__x__.txt", "__y__", "d..txt"]
LONG = ["z" * 120 + ".txt", "z" * 300 + "/" + "é" * 90 + ".0.json"]


def plain(samples) -> list[tuple]:
    return [(sample.key, sample.members) for sample in samples]


def by_webdataset(path) -> list[tuple]:
    stages = webdataset.SimpleShardList([str(path)]), webdataset.tarfile_to_samples()
    return [(sample["__key__"], {k: v for k, v in sample.items() if not k.startswith("__")})
            for sample in webdataset.DataPipeline(*stages)]


def outcome(read, path):
    """The samples, or None where the shard is refused."""
    try:
        return list(read(path))
    except UserError as error:
        assert str(path) in str(error)
        return None


def indexed(path) -> list:
    """All samples, read in every way, which must agree with read_shard."""
    with IndexedShard(path) as shard:
        samples = [shard[i] for i in range(len(shard))]
        assert [shard.key(i) for i in range(len(shard))] == [sample.key for sample in samples]
    assert list(read_indexed(path)) == list(read_indexed(path, verify=True)) == samples == list(read_shard(path))
    return samples


def gnu_tar(out: Path, folder: Path, *options: str) -> Path:
    command = shutil.which("tar")
    if not command or "GNU tar" not in subprocess.run([command, "--version"], capture_output=True, text=True).stdout:
        pytest.skip("no GNU tar")
    subprocess.run([command, *options, "--sort=name", "-cf", out, "-C", folder, "."], check=True)
    return out


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def head(name: str, size: int, format: int = USTAR, pax: dict | None = None) -> bytes:
    """The header of a file, with those that extend it."""
    info = tarfile.TarInfo(name)
    info.size, info.pax_headers = size, pax or {}
    return info.tobuf(format)


def patched(header: bytes, place: int, content: bytes, signed: bool = False) -> bytes:
    """A header with other bytes at a place, its checksum put right (of signed bytes, as some wrote it)."""
    header = header[:place] + content + header[place + len(content) :]
    rest = header[:148] + header[156:]
    total = sum(rest) + 256 - (256 * sum(byte > 127 for byte in rest) if signed else 0)
    return header[:148] + b"%06o\0 " % total + header[156:]


@pytest.mark.parametrize("format", [USTAR, GNU, PAX])
def test_every_format_of_tarfile(tmp_path, monkeypatch, format):
    names = NAMES + (LONG if format != USTAR else [])
    monkeypatch.setattr(tarfile.TarFile, "format", format)
    shard = write_tar(tmp_path / "a.tar", [(name, name.encode() * (1 + len(name) % 99)) for name in names])
    assert plain(indexed(shard)) == by_webdataset(shard)


def test_what_webdataset_writes(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        for key, members in raw_samples():
            writer.write({"__key__": key, **members})
    assert plain(indexed(tmp_path / "a.tar")) == list(raw_samples())
    assert list_shards(str(tmp_path / "*")) == [tmp_path / "a.tar"]  # the index is not taken for a shard


@pytest.mark.parametrize("format", ["gnu", "oldgnu", "pax", "ustar", "v7"])
def test_what_gnu_tar_writes(tmp_path, format):
    """img2dataset's files (jpg, txt, json of one key), packed by hand, folders included."""
    folder = tmp_path / "00000"
    deep = folder if format == "v7" else folder / ("f" * 60) / ("g" * 60)
    deep.mkdir(parents=True)
    for number in range(3):
        for ending, content in (("jpg", png(number)), ("txt", "é 漢".encode()), ("json", as_json({"key": number}))):
            (deep / f"{number:09d}{'n' * 110 * (format in ('gnu', 'pax'))}.{ending}").write_bytes(content)
    shard = gnu_tar(tmp_path / "00000.tar", folder, f"--format={format}")
    samples = indexed(shard)
    assert {f"{sample.key}.{ending}": content for sample in samples for ending, content in sample.members.items()} == {
        f"./{path.relative_to(folder)}": path.read_bytes() for path in deep.iterdir()}
    assert plain(samples) == by_webdataset(shard) and len(samples) == 3


@pytest.mark.parametrize("version", [None, "0.0", "0.1", "1.0"])
def test_sparse_files_are_refused_and_named(tmp_path, version):
    (tmp_path / "in").mkdir()
    with open(tmp_path / "in" / "a.txt", "wb") as file:
        for start in range(0, 64 << 20, 4 << 20):  # more pieces than one header of the old kind describes
            file.seek(start)
            file.write(b"x" * 4096)
        file.truncate(64 << 20)
    (tmp_path / "in" / "b.txt").write_bytes(b"after")
    if (tmp_path / "in" / "a.txt").stat().st_blocks > 8192:
        pytest.skip("this file system keeps no holes")
    options = ["--format=pax", f"--sparse-version={version}"] if version else ["--format=gnu"]
    shard = gnu_tar(tmp_path / "a.tar", tmp_path / "in", "--sparse", *options)
    assert shard.stat().st_size < 1 << 20
    samples = list(read_indexed(shard))
    assert plain(samples) == [("./a", {}), ("./b", {"txt": b"after"})] and list(samples[0].refused) == ["txt"]
    with pytest.raises(BadSample, match="a.tar: sample ./a: member txt refused: a link, device or other special"):
        document_of(samples[0])


@pytest.mark.parametrize("start", [
    patched(head("a.txt", 0), 124, b"\x80" + (300).to_bytes(11, "big")),
    head("a.txt", 0, PAX, {"size": "300"}),  # what holds more than 8 GiB says its size here alone
    head("b.json", 300, PAX, {"path": "a.txt"}),
    head("a.txt", 300, PAX, {"comment": "size=5\n7 a=b\n"}),
    tarfile.TarInfo.create_pax_global_header({"comment": "of git archive"}) + head("a.txt", 300),
    patched(head("a.txt", 300), 257, bytes(8)),
    patched(head("a.txt", 300), 100, b"\xff", signed=True),
], ids=["base256", "size", "path", "comment", "global", "v7", "signed"])
def test_headers_that_tarfile_does_not_write(tmp_path, start):
    shard = tmp_path / "a.tar"
    shard.write_bytes(start + padded(b"x" * 300) + head("c.txt", 2) + padded(b"hi") + bytes(1024))
    assert plain(indexed(shard)) == [("a", {"txt": b"x" * 300}), ("c", {"txt": b"hi"})]


@pytest.mark.parametrize("start", [
    tarfile.TarInfo.create_pax_global_header({"path": "a.txt"}),
    tarfile.TarInfo.create_pax_global_header({"size": "1"}),
    patched(head("x", 5), 156, b"x") + padded(b"9 a=b"), patched(head("x", 5), 156, b"x") + padded(b"99999"),
    patched(patched(head("x", 0), 156, b"x"), 124, b"\x80" + b"\xff" * 11),
    patched(head("a.txt", 0), 124, b"\x80" + b"\xff" * 11), patched(head("a.txt", 0), 124, b"\xff" * 12),
    head("a.txt", 0, PAX, {"size": "-5"}), head("a.txt", 0, PAX, {"size": "9" * 30}),
    head("a.txt", 0)[:10] + b"x" + head("a.txt", 0)[11:], head("a" * 5000 + ".txt", 0, GNU),
    head("a" * 2_000_000 + ".txt", 0, GNU), head("a" * 120 + ".txt", 0, GNU)[:1024],
], ids=len)
def test_hostile_headers_are_refused(tmp_path, start):
    (tmp_path / "a.tar").write_bytes(start + bytes(1024))
    with pytest.raises(UserError, match=r"a\.tar is damaged or cut short \("):
        IndexedShard(tmp_path / "a.tar")


def test_hostile_members_are_refused(tmp_path):
    kinds = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "device": tarfile.CHRTYPE, "pipe": tarfile.FIFOTYPE,
             "sparse": tarfile.GNUTYPE_SPARSE, "unknown": b"Q"}
    special = [tarfile.TarInfo(f"{name}.0.png") for name in kinds]
    for info, kind in zip(special, kinds.values(), strict=True):
        info.type, info.linkname = kind, "/etc/passwd"
    names = ["a.txt", "a.pyd", "a.pickle", "a.json", "../e.txt", "/f.txt", "g.txt", "g.txt", "g.TXT", "h/../i.txt"]
    shard = write_tar(tmp_path / "a.tar", [(info, b"") for info in special] + [(n, n.encode() * 50) for n in names])
    samples = indexed(shard)
    assert {sample.key: list(sample.refused) for sample in samples} == dict.fromkeys(kinds, ["0.png"]) | {
        "a": [], "../e": ["txt"], "/f": ["txt"], "g": ["txt"], "h/../i": ["txt"]}
    assert list(samples[6].members) == ["txt", "json"]
    assert list(read_indexed(shard, max_member=260)) == list(read_shard(shard, max_member=260)) != samples


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text("ab./_é", max_size=6), st.sampled_from([".txt", ".0.png", ".JSON", ".pyd", "__"]),
                          st.binary(max_size=600)), max_size=8), st.sampled_from([USTAR, GNU, PAX]))
def test_any_names_give_the_samples_of_read_shard(members, format):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tarfile.TarFile, "format", format)
        indexed(write_tar(Path(folder) / "a.tar", [(start + end, content) for start, end, content in members]))


def test_every_cut_is_noticed_and_costs_one_sample(tmp_path):
    members = [(f"{i}.{ending}", f"{i}{ending}".encode() * 100) for i in range(4) for ending in ("json", "txt")]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    expected = plain(read_shard(tmp_path / "whole.tar"))
    for cut in range(0, 9000, 151):
        shard = tmp_path / f"{cut}.tar"
        shard.write_bytes(whole[:cut])
        samples = outcome(read_indexed, shard)
        assert samples == outcome(read_shard, shard) and (samples is None) == (cut < 8 * 1024 + 512)
        if cut < 512:
            assert outcome(functools.partial(read_indexed, salvage=True), shard) is None
        elif samples is None:
            *good, last = read_indexed(shard, salvage=True)
            assert len(good) == min(3, (cut - 512) // 2048)  # those that another header follows
            assert plain(good) == expected[: len(good)] and last.key == expected[len(good)][0]
            with pytest.raises(BadSample, match=rf"{cut}\.tar: sample {last.key}: .*damaged or cut short here"):
                document_of(last)


def test_a_flipped_byte_is_named(tmp_path):
    members = [m for i in range(3) for m in ((f"{i}.json", as_json({"content": [image()]})), (f"{i}.0.png", png(i)))]
    shard = write_tar(tmp_path / "a.tar", members)
    build_index(shard)
    stat, content = shard.stat(), bytearray(shard.read_bytes())
    content[content.index(png(1)) + 60] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    samples = list(read_indexed(shard, verify=True))
    assert [list(sample.refused) for sample in samples] == [[], ["0.png"], []]
    assert [list(sample.members) for sample in samples] == [["json", "0.png"], ["json"], ["json", "0.png"]]
    with pytest.raises(BadSample, match=r"a\.tar: sample 1: member 0\.png refused: its checksum"):
        document_of(samples[1])
    assert list(read_indexed(shard)) == list(read_shard(shard))


def test_damage_is_noticed_after_a_copy_and_a_new_shard_is_none(tmp_path):
    def write(words):
        with ShardFile(tmp_path / "a.tar") as shard:
            for i, word in enumerate(words):
                shard.write(f"{i}", {"txt": word})

    write([b"one", b"two", b"six"])
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[content.index(b"two")] ^= 1
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "a.tar").write_bytes(content)  # at another time
    index.index_path(copy / "a.tar").write_bytes(index.index_path(tmp_path / "a.tar").read_bytes())
    for _ in range(2):  # and it stays so when the index is made anew
        samples = list(read_indexed(copy / "a.tar"))
        assert [sample.members.get("txt") for sample in samples] == [b"one", None, b"six"]
        assert "damaged after it was written" in samples[1].refused["txt"]
        os.utime(copy / "a.tar", ns=(0, 0))
    write([b"ten", b"hot", b"red"])  # of the same sizes: nothing is damaged
    found = [sample.members["txt"] for sample in read_indexed(tmp_path / "a.tar", verify=True)]
    assert found == [b"ten", b"hot", b"red"]


def test_an_index_is_made_once_and_again_when_the_shard_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "_scan", scan := Mock(wraps=index._scan))
    shard = write_tar(tmp_path / "a.tar", [("a.txt", b"1"), ("b.txt", b"2")])
    for _ in range(3):
        assert plain(read_indexed(shard)) == [("a", {"txt": b"1"}), ("b", {"txt": b"2"})]
    with IndexedShard(shard) as samples:
        assert len(samples) == 2 and samples[-1].key == samples[np.int64(1)].key == "b"
        with pytest.raises(IndexError):
            samples[2]
    assert build_indexes([shard]) == {} and scan.call_count == 1
    os.utime(shard, ns=(0, 0))
    assert len(list(read_indexed(shard))) == 2 and scan.call_count == 2
    write_tar(shard, [("a.txt", bytes(20_000))])
    assert len(list(read_indexed(shard))) == 1 and scan.call_count == 3
    assert indexed(write_tar(tmp_path / "empty.tar", [("readme", b"x")])) == []


def test_damaged_and_hostile_indexes_are_made_again(tmp_path):
    shard = write_tar(tmp_path / "a.tar", [("a.txt", b"1"), ("a.json", b"{}"), ("b.txt", b"2")])
    build_index(shard)
    good, expected, huge = index_path(shard).read_bytes(), list(read_shard(shard)), np.iinfo(np.int64).max
    arrays = load(good)

    def other(about=None, **changes) -> bytes:
        text = json.dumps(json.loads(arrays["about"].tobytes()) | (about or {}))
        changed = {name: np.array(value, arrays[name].dtype) for name, value in changes.items()}
        return save(arrays | changed | {"about": np.frombuffer(text.encode(), np.uint8)})

    bad = [b"", b"x" * 100, good[:-1], good + b"x" * 200_000, save({"first": np.zeros(3)}),
           save({name: array.astype(np.float64) for name, array in arrays.items()}),
           other(first=[0, 3, 1]), other(first=[0, 2]), other(first=[[0, 2, 3]]), other(key_stop=[0, 1, 9]),
           other(key_stop=[0, 2, 1]), other(offset=[-1, 512, 512]), other(offset=[huge] * 3), other(size=[huge] * 3),
           other(size=[-1] * 3), other(ending=[0, 1, 9]), other(status=[0, 0, 99]), other(crc=[0]), other(header=[1]),
           other({"endings": ["pyd", "json"]}), other({"endings": [1, 2]}), other({"version": 2}),
           other({"shard": [1, 2]}), other({"damage": 5}), other({"more": 5})]
    for content in bad:
        index_path(shard).write_bytes(content)
        assert list(read_indexed(shard, verify=True)) == expected
        assert build_index(shard).endings == ["txt", "json"]
    index_path(shard).write_bytes(fine := other())
    assert list(read_indexed(shard)) == expected and index_path(shard).read_bytes() == fine  # a good one stays


def test_an_index_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(index, "write_atomic", Mock(side_effect=full))
    shard = write_tar(tmp_path / "a.tar", [("a.txt", b"1")])
    with pytest.raises(UserError, match=r"a\.tar\.index: No space left on device; make room"):
        build_index(shard)
    assert plain(read_indexed(shard)) == [("a", {"txt": b"1"})] and "No space left" in caplog.text
    with pytest.raises(UserError, match="cannot read shard .*none.tar"):
        build_index(tmp_path / "none.tar")


def test_headers_of_codes_are_checked(tmp_path):
    with ShardFile(tmp_path / "a.tar", {"tokenizers": "mine", "source": ""}) as writer:
        writer.write("a", {"txt": b"1"})
    assert list(read_indexed(tmp_path / "a.tar", tokenizers_hash="mine")) == indexed(tmp_path / "a.tar")
    with pytest.raises(UserError, match=r"a\.tar holds codes of other tokenizers"):
        IndexedShard(tmp_path / "a.tar", "other")
    shard = write_tar(tmp_path / "b.tar", [("__header__/tokenizers.json", b"{"), ("a.txt", b"1")])
    with pytest.raises(UserError, match="b.tar: its __header__/tokenizers.json is broken"):
        IndexedShard(shard)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_many_shards_and_the_damaged_among_them(tmp_path, workers):
    shards = [write_tar(tmp_path / f"{i}.tar", [("a.txt", b"x" * i)]) for i in range(4)]
    shards[2].write_bytes(shards[2].read_bytes()[:700])
    assert build_indexes(shards, workers) == {shards[2]: "unexpected end of data"}
    for i in (0, 1, 3):
        assert plain(read_indexed(shards[i], verify=True)) == [("a", {"txt": b"x" * i})]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f".{i}.tar.index" for i in range(4)), *(f"{i}.tar" for i in range(4))]


def test_benchmark_compares_before_it_times(capsys):
    from benchmarks.data import main

    main(["--check", "--samples", "7", "--side", "16"])
    assert "7 samples" in capsys.readouterr().out
