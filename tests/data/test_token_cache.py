"""The token cache: the same batches as from the shards, read once, made again when they do not fit."""

import gc
import itertools
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from samples import as_json, mixed_codes, say, text, write_codes
from tiny import tiny_tokenizers

from onevocab.data import token_cache
from onevocab.data.loader import LoaderConfig, PackedLoader
from onevocab.data.token_cache import ShardTokens, TokenCache

CONFIG = LoaderConfig(seq_len=128, global_batch_size=4, window=16, condition_dropout=0.3)


@pytest.fixture
def codes(tmp_path, tokenizers):
    return write_codes(tmp_path / "codes", tokenizers, mixed_codes(30))


def batches(loader, n=8):
    return [torch.stack([value.double() for value in vars(loader.next_batch()).values()]) for _ in range(n)]


def refuse(*_, **__):
    raise AssertionError("the shard was read again")


def test_same_batches_and_no_second_reading(codes, tokenizers, tmp_path, monkeypatch):
    plain = PackedLoader(codes, tokenizers, CONFIG)
    kept = PackedLoader(codes, tokenizers, CONFIG, cache_folder=tmp_path / "kept")
    monkeypatch.setattr(token_cache, "IndexedShard", refuse)
    again = PackedLoader(codes, tokenizers, CONFIG, cache_folder=tmp_path / "kept")
    assert plain.fingerprint == kept.fingerprint == again.fingerprint
    assert plain.summary() == again.summary()
    for one, two, three in zip(batches(plain), batches(kept), batches(again), strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_bad_samples_are_reported_every_time(tmp_path, tokenizers, caplog):
    samples = list(mixed_codes(8))
    samples[3] = {"json": b"{broken"}
    codes = write_codes(tmp_path / "codes", tokenizers, samples)
    for _ in range(2):
        caplog.clear()
        loader = PackedLoader(codes, tokenizers, CONFIG, cache_folder=tmp_path / "kept", max_bad_fraction=0.5)
        assert loader.bad.bad == 1 and loader.summary()["samples"] == 8
        assert any("bad" in record.getMessage() and "left out" in record.getMessage() for record in caplog.records)


def test_another_shard_other_tokenizers_or_damage_make_it_again(codes, tokenizers, tmp_path):
    keep = tmp_path / "kept"
    first = PackedLoader(codes, tokenizers, CONFIG, cache_folder=keep)
    files = sorted(keep.glob("*.safetensors"))
    assert len(files) == len(list(codes.glob("*.tar")))
    files[0].write_bytes(files[0].read_bytes()[:-7])  # cut short
    files[1].write_bytes(files[2].read_bytes())  # another shard's
    files[2].write_bytes(b"")
    assert PackedLoader(codes, tokenizers, CONFIG, cache_folder=keep).fingerprint == first.fingerprint
    shard = sorted(codes.glob("*.tar"))[0]
    os.utime(shard, ns=(0, 10**18))
    PackedLoader(codes, tokenizers, CONFIG, cache_folder=keep)
    assert len(list(keep.glob("*.safetensors"))) == len(files) + 1
    other = tiny_tokenizers(seed=1)
    other.save(tmp_path / "other")
    with pytest.raises(token_cache.UserError, match="other tokenizers"):
        PackedLoader(codes, other, CONFIG, cache_folder=keep)


def test_where_nothing_can_be_kept_training_goes_on(codes, tokenizers, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    plain = PackedLoader(codes, tokenizers, CONFIG)
    with caplog.at_level(logging.WARNING):
        loader = PackedLoader(codes, tokenizers, CONFIG, cache_folder=tmp_path / "file")
    assert loader.fingerprint == plain.fingerprint and torch.equal(batches(plain, 1)[0], batches(loader, 1)[0])
    assert "cannot keep documents" in caplog.text


KILLED = """
import sys, time
from onevocab.data import token_cache
from onevocab.tokenizers.bundle import Tokenizers
def slow(path, content):
    print("writing", flush=True)
    time.sleep(60)
token_cache.write_atomic = slow
from onevocab.data.loader import PackedLoader
PackedLoader(sys.argv[1], Tokenizers.load(sys.argv[3]), cache_folder=sys.argv[2])
"""


def test_a_killed_process_leaves_no_lock(codes, tokenizers, tmp_path):
    tokenizers.save(tmp_path / "tokenizers")
    process = subprocess.Popen([sys.executable, "-c", KILLED, codes, tmp_path / "kept", tmp_path / "tokenizers"],
                               cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "writing"
    process.kill()
    process.wait()
    begun = time.monotonic()
    PackedLoader(codes, tokenizers, CONFIG, cache_folder=tmp_path / "kept")
    assert time.monotonic() - begun < 30


def keep_synthetic(shard, tokenizers, folder, n: int, length: int) -> None:
    """A cache of n texts of `length` tokens, for a shard that is never read."""
    shard.parent.mkdir(parents=True, exist_ok=True)
    shard.write_bytes(b"never read")
    vocab = tokenizers.vocab
    one = np.arange(length, dtype=np.int32) % vocab.text_size
    tokens = np.tile(one, n)
    about = np.zeros((n, len(token_cache.COLUMNS)), np.int32)
    about[:, token_cache.LENGTH] = length
    counts = [0] * len(vocab.modalities)
    counts[0] = len(tokens)
    documents = ShardTokens(tokens, np.full(len(tokens), token_cache.LOSS, np.uint8), about, [], counts)
    folder.mkdir(exist_ok=True)
    path, identity = token_cache.cache_path(shard, tokenizers, folder)
    path.write_bytes(token_cache.to_bytes(documents, identity))


def test_a_restart_among_a_million_samples_takes_less_than_a_second(tmp_path, tokenizers):
    shards, keep = tmp_path / "shards", tmp_path / "kept"
    for i in range(4):
        keep_synthetic(shards / f"s-{i}.tar", tokenizers, keep, 250_000, 8)
    config = LoaderConfig(seq_len=512, global_batch_size=4, window=4096)
    loader = PackedLoader(shards, tokenizers, config, cache_folder=keep)
    assert len(loader._cache) == 1_000_000
    state = {"epoch": 3, "window": 200, "row": 17, "fingerprint": loader.fingerprint}
    del loader
    begun = time.process_time()
    restarted = PackedLoader(shards, tokenizers, config, cache_folder=keep)
    restarted.load_state_dict(state)
    restarted.next_batch()
    assert time.process_time() - begun < 1.0


def test_a_document_of_any_shard_is_found(tmp_path, tokenizers):
    shards, keep = tmp_path / "shards", tmp_path / "kept"
    for i, (n, length) in enumerate([(3, 4), (1, 7), (5, 2)]):
        keep_synthetic(shards / f"s-{i}.tar", tokenizers, keep, n, length)
    store = TokenCache(tokenizers, keep)
    from onevocab.data.documents import BadSamples

    assert [store.add(shards / f"s-{i}.tar", BadSamples(0)) for i in range(3)] == [3, 1, 5]
    store.freeze()
    assert store.length.tolist() == [4, 4, 4, 7, 2, 2, 2, 2, 2]
    assert [store[d][0].tolist() for d in (0, 2, 3, 8)] == [[0, 1, 2, 3], [0, 1, 2, 3], list(range(7)), [0, 1]]
    assert all(len(store[d][1]) == store.length[d] for d in range(9))


@pytest.mark.parametrize("workers,world", [(0, 4), (1, 2), (2, 1), (4, 2)])
def test_any_number_of_workers_and_ranks_gives_the_same(codes, tokenizers, tmp_path, workers, world):
    """From a restart in the middle of an epoch."""
    plain = PackedLoader(codes, tokenizers, CONFIG)
    batches(plain, 3)
    state = plain.state_dict()
    ranks = [PackedLoader(codes, tokenizers, CONFIG, rank, world, cache_folder=tmp_path / "kept", workers=workers)
             for rank in range(world)]
    for rank in ranks:
        rank.load_state_dict(state)
    for _ in range(8):
        parts = [batches(rank, 1)[0] for rank in ranks]
        assert torch.equal(torch.cat(parts, 1), batches(plain, 1)[0])


def test_long_texts_become_several_documents_and_nothing_else_is_cut(tmp_path, tokenizers):
    words = " ".join(f"{i * 7919 % 1000}" for i in range(300))
    samples = [{"txt": words.encode()}, *mixed_codes(10), {"txt": b"short"}]
    samples.append({"json": as_json({"messages": [say("user", text(words)), say("assistant", text("yes"))]})})
    codes = write_codes(tmp_path / "codes", tokenizers, samples)
    whole = PackedLoader(codes, tokenizers, LoaderConfig(seq_len=4096, global_batch_size=1))
    loader = PackedLoader(codes, tokenizers, CONFIG)
    n = int(whole._cache.length[0])
    pieces = -(-n // CONFIG.seq_len)
    assert pieces > 5 and len(loader._cache) == len(whole._cache) + pieces - 1 == 13 + pieces - 1
    found = [loader._cache[d] for d in range(pieces)]
    assert max(len(ids) for ids, _ in found) - min(len(ids) for ids, _ in found) <= 1
    for part, joined in zip(zip(*found, strict=True), whole._cache[0], strict=True):
        assert np.array_equal(np.concatenate(part), joined)
    for d in range(1, 13):
        assert all(map(np.array_equal, loader._cache[d + pieces - 1], whole._cache[d]))
    assert loader.too_long == 1  # the conversation
    assert loader.summary()["samples"] == whole.summary()["samples"] == 13
    shown = sorted(entry[0] for window in range(loader.windows) for row in loader.rows(0, window) for entry in row)
    assert shown == list(range(len(loader._cache) - 1))


def anonymous_memory() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_stays_flat_over_ten_million_samples(tmp_path, tokenizers):
    shards, keep = tmp_path / "shards", tmp_path / "kept"
    for i in range(10):
        keep_synthetic(shards / f"s-{i}.tar", tokenizers, keep, 1_000_000, 4)
    loader = PackedLoader(shards, tokenizers, LoaderConfig(seq_len=512, global_batch_size=32), cache_folder=keep)
    read, sizes = 0, []
    for step in itertools.count():
        if step % 16 == 0:  # whole batches take long; what is ordered and packed is everything
            read += int((loader.next_batch().positions == 0).sum())
        else:
            read += sum(map(len, loader._next_rows()))
        if step == 50 or step % 500 == 499:
            gc.collect()
            sizes.append(anonymous_memory())
        if loader.state_dict()["epoch"] == 1:
            break
    assert read >= 10_000_000 and len(sizes) > 4
    assert max(sizes) <= 1.02 * sizes[0]
