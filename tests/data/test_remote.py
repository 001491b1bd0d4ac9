"""Shards that are compressed or lie elsewhere: local copies, whole or absent, never under a stranger's name."""

import gzip
import importlib.util
import io
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
from samples import raw_samples, write_tar

from onevocab.common.errors import UserError
from onevocab.common.files import locked
from onevocab.data.shards import remote
from onevocab.data.shards.index import IndexedShard, index_path
from onevocab.data.shards.remote import VARIABLE, ShardCache, list_sources, read_source, shown
from onevocab.data.shards.writer import ShardFile


def plain(samples) -> list[tuple]:
    return [(sample.key, sample.members) for sample in samples]


@pytest.fixture
def shard(tmp_path) -> Path:
    with ShardFile(tmp_path / "in" / "a.tar") as writer:
        for key, members in raw_samples(6):
            writer.write(key, members)
    return tmp_path / "in" / "a.tar"


def kept(cache: ShardCache) -> list[str]:
    """The shards in the folder by the names that they came with; fails when anything unfinished lies there."""
    if not cache.folder.exists():
        return []
    names = [path.name for path in cache.folder.iterdir() if not path.name.endswith((".lock", ".index"))]
    assert not [name for name in names if name.startswith(".")]
    return sorted(name[33:] for name in names)


def test_compressed_shards_are_the_same_samples(shard, tmp_path, monkeypatch):
    content, cache = shard.read_bytes(), ShardCache(tmp_path / "cache")
    assert cache.fetch(shard) == shard and kept(cache) == []
    pieces = gzip.compress(content[:5000]) + gzip.compress(content[5000:])
    files = {"b.tar.gz": gzip.compress(content), "c.tgz": pieces, "no gz at the end.tar": gzip.compress(content)}
    if importlib.util.find_spec("zstandard"):
        files["d.tar.zst"] = importlib.import_module("zstandard").ZstdCompressor().compress(content)
    for name, file in files.items():
        (tmp_path / name).write_bytes(file)
        with cache.open(tmp_path / name, verify=True) as samples:
            assert plain(samples) == list(raw_samples(6)) and samples[0].shard == str(tmp_path / name)
            assert samples.path.parent == cache.folder and index_path(samples.path).exists()
    assert len(kept(cache)) == len(files) and {"b.tar", "c.tar", "no_gz_at_the_end.tar"} <= set(kept(cache))
    with monkeypatch.context() as patch:
        patch.setattr(ShardCache, "_copy", lambda *_: pytest.fail("copied again"))
        assert cache.fetch(tmp_path / "b.tar.gz").read_bytes() == content
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(content[:512] + bytes(1024)))
    assert cache.fetch(tmp_path / "b.tar.gz").stat().st_size == 1536


def test_what_cannot_be_copied_leaves_nothing(shard, tmp_path, monkeypatch):
    cache, packed = ShardCache(tmp_path / "cache", max_bytes=1 << 20), gzip.compress(shard.read_bytes())
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for name, content, reason in [("cut.tar.gz", packed[:-20], "cannot decompress .*cut.tar.gz .EOFError.*cut short"),
                                  ("bad.tar.gz", packed[:60] + b"x" * 99, "cannot decompress .*bad.tar.gz"),
                                  ("bomb.tar.gz", gzip.compress(bytes(1 << 22)), "larger than the 1,048,576 bytes"),
                                  ("a.tar.zst", remote.ZSTD, "pip install zstandard")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=reason):
            cache.fetch(tmp_path / name)
        assert kept(cache) == []
    for source in ("pipe://ls", "file:///etc/passwd", "simplecache::s3://b/a.tar", "ftp://h/a.tar"):
        with pytest.raises(UserError, match="shards come from a local path or from http"):
            cache.fetch(source)
    with pytest.raises(UserError, match="cannot read shard pipe:ls"):
        cache.fetch("pipe:ls")
    packed = tmp_path / "in" / "a.tar.gz"
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(UserError, match="cannot make the folder .* choose another"):
        ShardCache(shard).fetch(packed)


def test_the_folder_keeps_its_bound_and_what_is_not_ours(tmp_path):
    sources = [tmp_path / f"{name}.tar.gz" for name in "abc"]
    for source in sources:
        whole = write_tar(tmp_path / "whole.tar", [("a.txt", source.name[:1].encode() * 3000)]).read_bytes()
        source.write_bytes(gzip.compress(whole))
    cache = ShardCache(tmp_path / "cache", max_bytes=2 * len(whole) + 100, keep_seconds=0)
    cache.folder.mkdir()
    (cache.folder / "mine.tar").write_bytes(bytes(50_000))
    a, b = (cache.fetch(source) for source in sources[:2])
    with IndexedShard(b) as opened:
        time.sleep(0.02)
        assert cache.fetch(sources[0]) == a  # now b was asked for longest ago
        cache.fetch(sources[2])
        assert opened[0].members == {"txt": b"b" * 3000}  # gone, but not for who has it open
    assert not b.exists() and not index_path(b).exists() and a.exists() and index_path(a).exists()
    assert len(kept(cache)) == 3 and (cache.folder / "mine.tar").exists()
    with cache.open(sources[1]) as again:
        assert again[0].members == {"txt": b"b" * 3000}
    patient = ShardCache(tmp_path / "two", max_bytes=len(whole))
    assert all(path.exists() for path in [patient.fetch(source) for source in sources])  # somebody may open them


def test_one_of_many_copies(shard, tmp_path, monkeypatch):
    source, copies, copy = tmp_path / "b.tar.gz", [], ShardCache._copy
    source.write_bytes(gzip.compress(shard.read_bytes()))
    monkeypatch.setattr(ShardCache, "_copy", lambda *a: copies.append(1) or time.sleep(0.05) or copy(*a))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: ShardCache(tmp_path / "cache").fetch(source).read_bytes(), range(4)))
    assert found == [shard.read_bytes()] * 4 and len(copies) == 1


def test_remote_shards(shard, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setitem(remote.PROTOCOLS, "memory", "fsspec")
    storage, cache = fsspec.filesystem("memory"), ShardCache(tmp_path / "cache")
    storage.pipe_file("/set/a.tar", shard.read_bytes())
    storage.pipe_file("/set/b.tar.gz", gzip.compress(shard.read_bytes()))
    sources = list_sources("memory://set/*")
    assert sources == ["memory:///set/a.tar", "memory:///set/b.tar.gz"]
    for source in sources:
        with cache.open(source) as samples:
            assert plain(samples) == list(raw_samples(6)) and samples[0].shard == source
    assert kept(cache) == ["a.tar", "b.tar"]
    with pytest.raises(UserError, match="cannot fetch memory://set/c.tar .FileNotFoundError"):
        cache.fetch("memory://set/c.tar")
    with pytest.raises(UserError, match="no shards at memory://other"):
        list_sources("memory://other/*.tar")


def test_a_download_that_was_cut_is_fetched_again(shard, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setitem(remote.PROTOCOLS, "memory", "fsspec")
    storage, cache = fsspec.filesystem("memory"), ShardCache(tmp_path / "cache")
    whole = shard.read_bytes()
    storage.pipe_file("/cut/a.tar", whole[: len(whole) // 2])
    cut = cache.fetch("memory://cut/a.tar").stat().st_size
    storage.pipe_file("/cut/a.tar", whole)
    assert cache.fetch("memory://cut/a.tar").stat().st_size == len(whole) > cut
    with cache.open("memory://cut/a.tar") as samples:
        assert plain(samples) == list(raw_samples(6))


def test_what_is_being_asked_for_does_not_go(tmp_path):
    sources = [tmp_path / f"{name}.tar.gz" for name in "ab"]
    for source in sources:
        whole = write_tar(tmp_path / "whole.tar", [("a.txt", source.name[:1].encode() * 3000)]).read_bytes()
        source.write_bytes(gzip.compress(whole))
    cache = ShardCache(tmp_path / "cache", max_bytes=len(whole), keep_seconds=0)
    first = cache.fetch(sources[0])
    with locked(first.with_name(f".{first.name}.lock")):  # somebody is within `fetch`
        cache.fetch(sources[1])
    assert first.exists()


def test_failures_of_storage_name_the_source_and_no_secret(shard, tmp_path, monkeypatch):
    cache, source = ShardCache(tmp_path / "cache"), "https://me:word@host/a.tar?sign=secret"
    assert shown(source) == "https://host/a.tar" and shown("/a?b@c") == "/a?b@c"
    short = type("Short", (io.BytesIO,), {"size": 99_999})(shard.read_bytes())
    for opened, reason in [(Mock(return_value=short), "of 99,999 bytes of https://host/a.tar came; try again"),
                           (Mock(side_effect=RuntimeError(f"no {source}")), "a.tar .RuntimeError: no https:"),
                           (Mock(side_effect=RuntimeError("403, url='https://me:word@host/a.tar?sign=secret/x'")),
                            "403, url='https://host/a.tar'")]:
        with monkeypatch.context() as patch, pytest.raises(UserError, match=reason) as error:
            patch.setattr(remote, "_open", opened)
            cache.fetch(source)
        assert "secret" not in str(error.value) and "word" not in str(error.value) and kept(cache) == []
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UserError, match=r"pip install 'fsspec\[s3\]'"):
        cache.fetch("s3://bucket/a.tar")


def test_sources(shard):
    assert list_sources(shard) == list_sources(shard.parent) == [str(shard)]
    assert list_sources("https://host/{08..10}.tar") == [f"https://host/{n}.tar" for n in ("08", "09", "10")]
    (shard.parent / "b.tar.zst").write_bytes(b"")
    assert list_sources(shard.parent) == [str(shard), str(shard.parent / "b.tar.zst")]
    (shard.parent / "a.tgz").write_bytes(b"")
    with pytest.raises(UserError, match="holds a more than once"):
        list_sources(shard.parent)


@pytest.mark.parametrize("name", ["run [v1]", "what?", "all*", "a[b"])
def test_folders_whose_names_look_like_patterns(tmp_path, name):
    for folder in (name, "run v", "whatX", "allX"):  # which the names would match
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "a[1].tar", [])
    shards = [str(tmp_path / name / "a[1].tar")]
    assert list_sources(tmp_path / name / "*.tar") == list_sources(tmp_path / name) == list_sources(shards[0]) == shards
    assert list_sources(tmp_path / name / ".." / "[r]un v" / "a*.tar") == [
        str(tmp_path / name / ".." / "run v" / "a[1].tar")]
    assert len(list_sources(tmp_path / "*" / "a[[]1].tar")) == 4


def test_a_user_without_a_home(shard, tmp_path, monkeypatch):
    """In a container, say. Only what is copied needs a folder."""
    for variable in ("HOME", "XDG_CACHE_HOME", VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pwd.getpwuid", Mock(side_effect=KeyError))
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(shard.read_bytes()))
    assert plain(read_source(shard)) == list(raw_samples(6))
    with pytest.raises(UserError, match=f"no home.* by {VARIABLE}$"):
        list(read_source(tmp_path / "b.tar.gz"))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    assert plain(read_source(tmp_path / "b.tar.gz")) == list(raw_samples(6))
