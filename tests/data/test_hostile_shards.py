"""What strangers' tars, indexes and kept files may not do: hang, fill the memory, or end in a traceback."""

import io
import json
import os
import tarfile
import time

import numpy as np
import pytest
from safetensors.numpy import load, save
from samples import as_json, image, mixed_codes, png, write_codes, write_tar

from onevocab.common.errors import UserError
from onevocab.common.processes import run_processes
from onevocab.data import token_cache
from onevocab.data.codes import tokenize_shards
from onevocab.data.documents import BadSample
from onevocab.data.loader import LoaderConfig, PackedLoader
from onevocab.data.shards import index as indexes
from onevocab.data.shards.format import read_shard
from onevocab.data.shards.index import build_index, index_path, read_indexed
from onevocab.data.shards.writer import ShardFile

CONFIG = LoaderConfig(seq_len=128, global_batch_size=4, window=16)


def extension(kind: bytes, content: bytes) -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, len(content)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


@pytest.mark.parametrize("start", [
    extension(b"L", b"n\0") * 2000, extension(b"L", b"n" * 600_000), extension(b"x", b"1" * 60_000),
    extension(b"g", b"1" * 60_000), extension(b"x", b"20 a=b\n" * 20_000)],
    ids=["chain", "long", "pax", "global", "many"])
def test_extension_headers_are_bounded(tmp_path, start):
    tail = io.BytesIO()
    with tarfile.open(fileobj=tail, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO(b""))
    (tmp_path / "a.tar").write_bytes(start + tail.getvalue())
    begun = time.process_time()
    for read in (read_shard, read_indexed):
        with pytest.raises(UserError, match="damaged or cut short"):
            list(read(tmp_path / "a.tar"))
    assert time.process_time() - begun < 2


def changed(shard, **arrays) -> None:
    """Another index for the shard, with some of its arrays replaced."""
    path = index_path(shard)
    old = load(path.read_bytes())
    path.write_bytes(save({**old, **arrays}))


def test_an_index_cannot_say_what_is_not_so(tmp_path):
    shard = write_tar(tmp_path / "a.tar", [(f"a.{i}.txt", b"x" * 600) for i in range(4)])
    expected = list(read_shard(shard))
    build_index(shard)
    index = load(index_path(shard).read_bytes())
    about = json.loads(index["about"].tobytes())
    overlapping = np.full(4, index["offset"][0])
    for arrays in ({"offset": overlapping}, {"about": np.frombuffer(json.dumps(
            about | {"endings": {"0.txt": 1, "1.txt": 2}}).encode(), np.uint8)}):
        changed(shard, **arrays)
        assert list(read_indexed(shard)) == expected
    index_path(shard).unlink()
    os.mkfifo(index_path(shard))
    assert list(read_indexed(shard)) == expected  # and does not wait for somebody to write into it
    index_path(shard).unlink()
    index_path(shard).symlink_to("/dev/zero")
    assert list(read_indexed(shard)) == expected
    empty = tmp_path / "b.tar"
    empty.write_bytes(b"")
    index_path(empty).write_bytes(save({**index, "about": np.frombuffer(
        json.dumps(about | {"shard": [0, empty.stat().st_mtime_ns]}).encode(), np.uint8)}))
    with pytest.raises(UserError, match="damaged or cut short"):
        list(read_indexed(empty))


def test_an_index_of_what_was_replaced_is_not_saved(tmp_path, monkeypatch):
    """A reader that was slow, and a writer that put another shard in its place meanwhile."""
    def write(word):
        with ShardFile(tmp_path / "a.tar") as shard:
            shard.write("0", {"txt": word})

    write(b"one")
    index_path(tmp_path / "a.tar").unlink()
    scan = indexes._scan

    def slow(path, file):
        found = scan(path, file)
        monkeypatch.setattr(indexes, "_scan", scan)
        write(b"two")
        return found

    monkeypatch.setattr(indexes, "_scan", slow)
    list(read_indexed(tmp_path / "a.tar"))
    assert [sample.members for sample in read_indexed(tmp_path / "a.tar", verify=True)] == [{"txt": b"two"}]


def test_damage_that_is_mended_is_forgotten(tmp_path, tokenizers):
    with ShardFile(tmp_path / "raw" / "a.tar") as shard:
        for i in range(3):
            shard.write(f"{i}", {"txt": f"word {i}".encode()})
    path = tmp_path / "raw" / "a.tar"
    good = path.read_bytes()
    path.write_bytes(good.replace(b"word 1", b"wort 1"))
    kept = {"cache_folder": tmp_path / "kept", "max_bad_fraction": 0.5}
    assert PackedLoader(path, tokenizers, CONFIG, **kept).bad.bad == 1
    assert not list((tmp_path / "kept").glob("*.safetensors"))
    path.write_bytes(good)
    assert PackedLoader(path, tokenizers, CONFIG, **kept).bad.bad == 0


def test_messages_stay_short_and_processes_end(tmp_path, tokenizers):
    name = "x" * 200_000
    write_tar(tmp_path / "a.tar", [(f"{i}.json", as_json({"content": [image(name)]})) for i in range(12)])
    with pytest.raises(UserError) as caught:
        tokenize_shards(tmp_path / "a.tar", tmp_path / "out", tokenizers, progress=False)
    assert len(str(caught.value)) < 5000
    with pytest.raises(UserError, match="xxx"):
        run_processes(fail, [(100_000,)] * 3, "died")
    with pytest.raises(UserError, match="No such file"):
        run_processes(open, [("/no/such/file",)], "died")


def fail(length: int) -> None:
    raise UserError("x" * length)


def test_names_that_would_not_be_read_back_are_not_written(tmp_path, tokenizers):
    with ShardFile(tmp_path / "a.tar") as shard:
        for members in ({"_0.png": b""}, {"0.png": b"", "_x.txt": b""}):
            with pytest.raises(ValueError, match="may not end in '_"):
                shard.write("k", members)
        with pytest.raises(ValueError, match="characters"):
            shard.write("k" * 4093, {"png": b""})
    write_tar(tmp_path / "b.tar", [("k" * 4090 + ".jpg", png()), ("good.txt", b"word")])
    stats = tokenize_shards(tmp_path / "b.tar", tmp_path / "out", tokenizers, max_bad_fraction=1, progress=False)
    assert (stats.samples, stats.bad) == (1, 1)


def test_a_claimed_file_of_another_writer_is_left_alone(tmp_path):
    first = ShardFile(tmp_path / "a.tar")
    first.close()
    second = ShardFile(tmp_path / "a.tar")
    first.discard()  # after the other has claimed the same name aside
    second.write("0", {"txt": b"word"})
    second.close()
    assert [sample.members for sample in read_indexed(tmp_path / "a.tar")] == [{"txt": b"word"}]


def test_kept_files_of_another_form_are_made_again(tmp_path, tokenizers):
    codes = write_codes(tmp_path / "codes", tokenizers, mixed_codes(6), 100)
    keep = tmp_path / "kept"
    whole = PackedLoader(codes, tokenizers, CONFIG, cache_folder=keep)
    [path] = keep.glob("*.safetensors")
    content = path.read_bytes()
    good = load(content)
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    negative = good["about"].copy()
    negative[0, 0], negative[1, 0] = -5, negative[1, 0] + negative[0, 0] + 5
    for arrays in ({"about": good["about"][:, :2].copy()}, {"about": negative},
                   {"tokens": good["tokens"].astype("f4")}):
        path.write_bytes(save({**good, **arrays}, metadata))
        assert PackedLoader(codes, tokenizers, CONFIG, cache_folder=keep).fingerprint == whole.fingerprint
    said = json.loads(metadata["said"])
    path.write_bytes(save(good, metadata | {"said": json.dumps(said | {"bad": [3]})}))
    assert PackedLoader(codes, tokenizers, CONFIG, cache_folder=keep).fingerprint == whole.fingerprint
    path.write_bytes(save({**good, "tokens": good["tokens"] + 100_000}, metadata))
    with pytest.raises(UserError, match="remove the run's folder token_cache/"):
        PackedLoader(codes, tokenizers, CONFIG, cache_folder=keep).next_batch()


def test_a_bad_sample_is_quoted_in_part():
    error = BadSample("k" * 10_000, "a.tar", "r" * 10_000)
    assert len(str(error)) < 1200 and "10,000 characters" in str(error) and token_cache.VERSION
