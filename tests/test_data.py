"""Shards, documents, codes, packing, order and batches. webdataset is the oracle of reading."""

import io
import json
import logging
import tarfile
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_tokenizers

from onevocab.common.errors import UserError
from onevocab.data import tokenize
from onevocab.data.codes import tokenize_in_processes, tokenize_shards
from onevocab.data.documents import BadSample, document_of, turns_of
from onevocab.data.loader import LoaderConfig, LossWeights, PackedLoader, Source
from onevocab.data.packing import pack
from onevocab.data.shards import (
    Sample,
    ShardFile,
    ShardWriter,
    codes_to_npy,
    list_shards,
    npy_to_codes,
    read_header,
    read_shard,
)
from onevocab.tokenizers.document import Document, Segment, conversation
from onevocab.tokenizers.media import encode_audio, encode_png

TEXTS = ["a red apple", "what is in the picture?", "draw a blue dog", "é 漢字 7", "a"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    bundle = tiny_tokenizers()
    bundle.save(tmp_path_factory.mktemp("run") / "tokenizers")
    return bundle


def as_json(value) -> bytes:
    return json.dumps(value).encode()


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def image(file: str = "0.png") -> dict:
    return {"type": "image", "file": file}


def audio(file: str = "0.flac") -> dict:
    return {"type": "audio", "file": file}


def say(role: str, *parts) -> dict:
    return {"role": role, "content": list(parts)}


def png(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    return encode_png(Image.fromarray(pixels))


def flac(seed: int = 0) -> bytes:
    return encode_audio(np.random.default_rng(seed).normal(0, 0.1, 4000), 16000)


def raw_samples(n: int = 12):
    """One of each kind, again and again."""
    for i in range(n):
        yield f"{i:05d}", [
            {"json": as_json({"content": [image(), text(TEXTS[i % 5])], "task": "x"}), "0.png": png(i)},
            {"jpg": png(i), "txt": TEXTS[i % 5].encode(), "json": as_json({"url": "http://x", "key": "1"})},
            {"flac": flac(i), "txt": TEXTS[i % 5].encode()},
            {"json": as_json({"messages": [say("user", text(TEXTS[i % 5])), say("assistant", image())]}),
             "0.png": png(i)},
            {"json": as_json({"messages": [
                say("user", image("0.png"), text("say it")), say("assistant", audio("1.flac"), text("done"))]}),
             "0.png": png(i), "1.flac": flac(i)},
            {"txt": TEXTS[i % 5].encode()},
        ][i % 6]


def write_tar(path, members: list[tuple[str, bytes]]):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_codes(folder, tokenizers, samples, per_shard: int = 7):
    with ShardWriter(folder, "s", per_shard, header={"tokenizers": tokenizers.hash, "source": ""}) as writer:
        for i, members in enumerate(samples):
            writer.write(f"{i:05d}", members)
    return folder


def grid(i: int, shape=(4, 4)) -> bytes:
    return codes_to_npy(np.random.default_rng(i).integers(0, 16, shape), 16)


def mixed_codes(n: int):
    """Pairs, drawings, conversations and texts of many lengths."""
    for i in range(n):
        words = " ".join(TEXTS[: 1 + i % 4])
        yield [
            {"json": as_json({"content": [image("0.image.npy"), text(words)]}), "0.image.npy": grid(i)},
            {"json": as_json({"content": [text(words), audio("0.audio.npy")]}),
             "0.audio.npy": grid(i, (1 + i % 9, 2))},
            {"json": as_json({"messages": [say("user", text(words)), say("assistant", image("0.image.npy"))]}),
             "0.image.npy": grid(i, (2 + i % 3, 4))},
            {"json": as_json({"messages": [say("user", image("0.image.npy"), text(words)),
                                           say("assistant", text(str(i)))]}), "0.image.npy": grid(i)},
            {"txt": (words * (1 + i % 3)).encode()},
        ][i % 5]


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
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["s-000000.tar"]
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
    assert document_of(samples["a"]) == Document((Segment("text", "fine"),))
    for key, reason in [("b", "link"), ("c", "device"), ("d", "special"), ("../e", "outside"), ("/f", "outside"),
                        ("g", "two members"),
                        ("h", "2,000 bytes")]:
        with pytest.raises(BadSample, match=reason):
            turns_of(samples[key])


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


def sample(members: dict) -> Sample:
    return Sample("k", members, "s.tar")


def test_documents_of_every_layout():
    codes, sound = np.arange(16).reshape(4, 4), np.arange(6).reshape(3, 2)
    members = {"0.image.npy": codes_to_npy(codes, 16), "1.audio.npy": codes_to_npy(sound, 16)}
    content = [image("0.image.npy"), text("hi"), audio("1.audio.npy")]
    assert document_of(sample({"json": as_json({"content": content}), **members})) == Document(
        (Segment("image", codes), Segment("text", "hi"), Segment("audio", sound)))
    messages = [say("system", text("s")), say("user", *content[:2]), {"role": "assistant", "content": "yes"}]
    assert document_of(sample({"json": as_json({"messages": messages}), **members})) == conversation(
        [("system", [("text", "s")]), ("user", [("image", codes), ("text", "hi")]), ("assistant", [("text", "yes")])])
    assert document_of(sample({"image.npy": members["0.image.npy"], "txt": b"hi\n", "json": b"{}"})) == Document(
        (Segment("image", codes), Segment("text", "hi")))
    assert document_of(sample({"wav": b"RIFF", "txt": b"hi"}), lambda modality, file: sound) == Document(
        (Segment("audio", sound), Segment("text", "hi")))


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
])
def test_bad_samples_say_why(members, reason):
    with pytest.raises(BadSample, match=reason) as caught:
        document_of(sample(members))
    assert (caught.value.key, caught.value.shard) == ("k", "s.tar")


# ------------------------------------------------------------------------------------------------ codes


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    with ShardWriter(folder, "s", 5) as writer:
        for key, members in raw_samples(24):
            writer.write(key, members)
    return folder


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_codes_are_the_same_documents(raw, tmp_path, tokenizers):
    stats = tokenize_shards(raw, tmp_path / "a", tokenizers, batch=3, progress=False)
    assert (stats.shards, stats.samples, stats.bad) == (5, 24, 0)
    for shard, codes in zip(list_shards(raw), list_shards(tmp_path / "a"), strict=True):
        assert read_header(codes)["tokenizers"] == tokenizers.hash and read_header(shard) is None
        for before, after in zip(read_shard(shard), read_shard(codes, tokenizers.hash), strict=True):
            assert before.key == after.key
            assert document_of(before, tokenizers.encode_media) == document_of(after)
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


# ------------------------------------------------------------------------------------------------ packing


@given(st.lists(st.integers(0, 40), max_size=200), st.integers(1, 32))
def test_packing_loses_nothing_and_cuts_nothing(lengths, row_length):
    packed = pack(lengths, row_length)
    placed = [i for row in packed.rows for i in row]
    assert sorted(placed + packed.dropped) == [i for i, n in enumerate(lengths) if n]
    assert packed.dropped == [i for i, n in enumerate(lengths) if n > row_length]
    sums = [sum(lengths[i] for i in row) for row in packed.rows]
    assert all(0 < n <= row_length for n in sums)
    # No two rows could be joined: less than half of the places is wasted, whatever the lengths.
    assert len(sums) < 2 or sum(sorted(sums)[:2]) > row_length
    assert packed == pack(lengths, row_length)


def test_packing_wastes_little():
    lengths = np.random.default_rng(0).lognormal(4.5, 0.8, 4096).astype(int).clip(5, 2048)
    assert lengths.sum() / (len(pack(lengths, 2048).rows) * 2048) > 0.99


# ------------------------------------------------------------------------------------------------ loader


@pytest.fixture(scope="module")
def codes(tmp_path_factory, tokenizers):
    return write_codes(tmp_path_factory.mktemp("codes"), tokenizers, mixed_codes(60))


CONFIG = LoaderConfig(row_length=128, rows_per_step=4, window=16, caption_drop=0.3)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**63), start=st.integers(0, 30), world=st.sampled_from([1, 2, 4]))
def test_global_sequence_is_the_same_for_any_world_and_restart(codes, tokenizers, seed, start, world):
    whole = PackedLoader(codes, tokenizers, CONFIG, seed=seed)
    for _ in range(start):
        whole.next_batch()
    state = json.loads(json.dumps(whole.state_dict()))
    ranks = [PackedLoader(codes, tokenizers, CONFIG, rank, world, seed) for rank in range(world)]
    for loader in ranks:
        loader.load_state_dict(state)
    for _ in range(3):
        expected, parts = whole.next_batch(), [loader.next_batch() for loader in ranks]
        joined = type(expected)(*(torch.cat(values) for values in zip(*(vars(p).values() for p in parts), strict=True)))
        assert same(expected, joined)
    assert all(loader.state_dict() == whole.state_dict() for loader in ranks)


def test_state_of_other_data_is_refused(codes, tokenizers):
    state = PackedLoader(codes, tokenizers, CONFIG).state_dict()
    for other in (PackedLoader(codes, tokenizers, CONFIG, seed=1),
                  PackedLoader(str(codes / "s-00000[0-3].tar"), tokenizers, CONFIG),
                  PackedLoader(codes, tokenizers, CONFIG.model_copy(update={"window": 17}))):
        with pytest.raises(UserError, match="not those of the checkpoint"):
            other.load_state_dict(state)
    with pytest.raises(UserError, match="does not divide over 3 ranks"):
        PackedLoader(codes, tokenizers, CONFIG, world=3)


def test_every_epoch_shows_every_document_once_in_another_order(codes, tokenizers):
    loader = PackedLoader(codes, tokenizers, CONFIG)
    epochs = [[loader.rows(epoch, w) for w in range(loader.windows)] for epoch in range(3)]
    orders = [[entry[0] for window in windows for row in window for entry in row] for windows in epochs]
    assert loader.too_long == 0 and loader.windows == 4
    assert all(sorted(order) == list(range(60)) for order in orders)
    plans = [loader.plan(epoch)[0].tolist() for epoch in range(3)]
    assert plans[0] != plans[1] != plans[2] != plans[0]
    # The steps take these rows, one after another: none lost, none twice.
    stream = [row for windows in epochs for window in windows for row in window]
    taken = [row for _ in range(len(stream) // 3) for row in loader._next_rows()]
    assert taken[: len(stream)] == stream


def test_repeats_and_weights(tmp_path, tokenizers):
    for name, n in (("a", 10), ("b", 30)):
        write_codes(tmp_path / name, tokenizers, mixed_codes(n))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")

    def counts(*sources, epoch=0):
        loader = PackedLoader(sources, tokenizers, CONFIG)
        return Counter(loader.plan(epoch)[0].tolist())

    shown = [counts(Source(path=a, repeat=2.5), Source(path=b, repeat=0.5), epoch=epoch) for epoch in range(4)]
    for epoch in shown:
        assert sum(epoch[i] for i in range(10)) == 25 and {epoch[i] for i in range(10)} == {2, 3}
        assert sum(epoch[i] for i in range(10, 40)) == 15 and max(epoch[i] for i in range(10, 40)) == 1
    assert shown[0] != shown[1]
    weighted = counts(Source(path=a, weight=3), Source(path=b, weight=1))
    assert sum(weighted.values()) == 40 and sum(weighted[i] for i in range(10)) == 30
    with pytest.raises(UserError, match="weight"):
        counts(Source(path=a, weight=3), Source(path=b))


def test_both_orders_and_caption_drop(codes, tokenizers, tmp_path):
    """Every stored document against the same document written out and encoded anew."""
    loader = PackedLoader(codes, tokenizers, CONFIG)
    shown, documents = set(), [document_of(s) for shard in list_shards(codes) for s in read_shard(shard)]
    for epoch in range(6):
        for number, swapped, dropped in zip(*(values.tolist() for values in loader.plan(epoch)), strict=True):
            segments, kind = list(documents[number].segments), number % 5
            if kind in (0, 1):
                first, second = segments[::-1] if swapped else segments
                if dropped:
                    assert (first.modality, second.modality) == ("text", "image")
                    first = Segment("text", "")
                segments = [Segment(first.modality, first.content, loss=False), second]
            elif dropped:
                assert kind == 2  # user asks, assistant draws
                segments = [Segment("text", "", "user", 0, False), segments[1]]
            expected = tokenizers.encode(Document(tuple(segments)))
            ids, loss = loader.tokens_of(number, swapped, dropped)
            assert ids.tolist() == expected.ids.tolist() and loss.tolist() == expected.loss.tolist()
            shown.add((number, swapped, dropped))
    kinds = {(number % 5, swapped, dropped) for number, swapped, dropped in shown}
    assert kinds == {(0, False, False), (0, True, False), (0, True, True), (1, False, False), (1, True, False),
                     (2, False, False), (2, False, True), (3, False, False), (4, False, False)}
    # Over six epochs each pair came in both orders.
    assert all({s for n, s, _ in shown if n == number} == {False, True} for number in range(60) if number % 5 < 2)
    always = PackedLoader(codes, tokenizers, CONFIG.model_copy(update={"text_first": 1.0, "caption_drop": 1.0}))
    numbers, swapped, dropped = always.plan(0)
    assert (swapped == (numbers % 5 == 0)).all() and (dropped == np.isin(numbers % 5, (0, 2))).all()


def test_only_the_request_before_a_drawing_is_dropped(tmp_path, tokenizers):
    messages = [say("system", text("be kind")), say("user", image("0.image.npy"), text("what?")),
                say("assistant", text("a dog")), say("user", image("0.image.npy"), text("make it grey")),
                say("assistant", text("here: "), image("1.image.npy")), say("user", text("thanks")),
                say("user", image("0.image.npy"))]
    write_codes(tmp_path, tokenizers, [{"json": as_json({"messages": messages}), "0.image.npy": grid(0),
                                        "1.image.npy": grid(1)}])
    loader = PackedLoader(tmp_path, tokenizers, CONFIG.model_copy(update={"row_length": 256}))
    ids, loss = loader.tokens_of(0, False, True)
    messages[3]["content"][1]["text"] = ""
    members = {"json": as_json({"messages": messages}), "0.image.npy": grid(0), "1.image.npy": grid(1)}
    expected = tokenizers.encode(document_of(sample(members)))
    assert ids.tolist() == expected.ids.tolist() and loss.tolist() == expected.loss.tolist()


def test_batch_by_brute_force(codes, tokenizers):
    vocab, weights = tokenizers.vocab, LossWeights(text=2.0, image=0.5, audio=3.0, seen=0.1)
    loader = PackedLoader(codes, tokenizers, CONFIG.model_copy(update={"loss": weights}))
    table = (weights.text, weights.image, weights.audio)
    useful = 0
    for _ in range(5):
        before = SimpleNamespace(**{k.strip("_"): v for k, v in loader.state_dict().items()})
        rows = loader._next_rows()
        loader.load_state_dict(vars(before))
        batch = loader.next_batch()
        assert batch.ids.dtype == batch.targets.dtype == batch.positions.dtype == torch.int64
        assert (batch.weights.dtype, batch.modality.dtype, batch.document.dtype) == (
            torch.float32, torch.uint8, torch.int32)
        for r, row in enumerate(rows):
            at = 0
            for d, entry in enumerate(row):
                ids, loss = loader.tokens_of(*entry)
                for i, token in enumerate(ids.tolist()):
                    assert batch.ids[r, at] == token and batch.positions[r, at] == i and batch.document[r, at] == d
                    if i + 1 < len(ids):
                        modality = vocab.modality_of(ids[i + 1])
                        assert batch.targets[r, at] == ids[i + 1] and batch.modality[r, at] == modality
                        expected = table[modality] * (1.0 if loss[i + 1] else weights.seen)
                        assert batch.weights[r, at].item() == pytest.approx(expected)
                    else:
                        assert batch.weights[r, at] == 0
                    at += 1
                    useful += 1
            assert (batch.document[r, at:] == -1).all() and (batch.weights[r, at:] == 0).all()
            assert (batch.ids[r, at:] == vocab.pad).all()
    assert useful > 0.75 * 5 * 4 * 128


def test_bad_samples_leave_their_position_empty(tmp_path, tokenizers):
    samples = list(mixed_codes(20))
    samples[3] = {"json": as_json({"content": [image("9.image.npy")]})}
    samples[7] = {"json": as_json({"content": [text("")]})}
    samples[11] = {**samples[0], "0.image.npy": codes_to_npy(np.full((4, 4), 99), 100)}
    samples[12] = {"txt": b"word " * 500}
    write_codes(tmp_path, tokenizers, samples)
    with pytest.raises(UserError, match="3 of 20 samples are bad"):
        PackedLoader(tmp_path, tokenizers, CONFIG)
    loader = PackedLoader(tmp_path, tokenizers, CONFIG.model_copy(update={"max_bad_fraction": 0.2}))
    assert loader.summary()["bad"] == 3 and loader.too_long == 1 and loader.epoch_length == 20
    shown = {entry[0] for w in range(loader.windows) for row in loader.rows(0, w) for entry in row}
    assert shown == set(range(20)) - {3, 7, 11, 12}
    with pytest.raises(UserError, match="no document fits a row of 8"):
        PackedLoader(tmp_path, tokenizers, LoaderConfig(row_length=8, max_bad_fraction=0.2))


def test_raw_shards_give_the_same_batches_as_their_codes(raw, tmp_path, tokenizers):
    tokenize_shards(raw, tmp_path, tokenizers, batch=3, progress=False)
    config = CONFIG.model_copy(update={"row_length": 160})
    a, b = PackedLoader(raw, tokenizers, config), PackedLoader(tmp_path, tokenizers, config)
    assert all(same(a.next_batch(), b.next_batch()) for _ in range(4))
