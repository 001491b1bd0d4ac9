"""Preparing data where everything goes wrong: ten kinds of damage, kill -9 at any moment, ranks, hostile members."""

import io
import logging
import multiprocessing
import os
import random
import signal
import struct
import tarfile
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from samples import as_json, audio, flac, image, png, text, write_tar

from onevocab.common.errors import UserError
from onevocab.data import tokenize
from onevocab.data.codes import check_all, codes_names, tokenize_in_processes, tokenize_shards
from onevocab.data.documents import BadSample
from onevocab.data.loader import LoaderConfig, PackedLoader
from onevocab.data.shards.format import list_shards, read_shard
from onevocab.data.shards.writer import ShardFile
from onevocab.tokenizers.audio_augment import AudioAugment
from onevocab.tokenizers.audio_tokenizer import AudioTokenizer
from onevocab.tokenizers.bundle import Tokenizers
from onevocab.tokenizers.media import encode_audio, load_image

PER_SHARD = 100
CONFIG = LoaderConfig(seq_len=128, global_batch_size=4, window=64)


def good(i: int) -> dict[str, bytes]:
    if i % 10 == 9:
        return {"json": as_json({"content": [audio(), text(f"sound {i}")]}), "0.flac": flac(i % 7)}
    return {"json": as_json({"content": [image(), text(f"picture {i}")]}), "0.png": png(i % 13)}


def huge_png() -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def sound_bomb() -> bytes:
    """Twenty minutes of silence in a few kilobytes."""
    return encode_audio(np.zeros(20 * 60 * 8000, np.float32), 8000)


def as_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    return buffer.getvalue()


# kind -> members of the one bad sample of its shard, what the log says about it
BAD = {
    "zero length": ({"json": good(0)["json"], "0.png": b""}, "0.png"),
    "huge picture": ({"json": good(0)["json"], "0.png": huge_png()}, "100000x100000"),
    "sound bomb": ({"json": as_json({"content": [audio(), text("a")]}), "0.flac": sound_bomb()}, "allowed"),
    "wrong ending": ({"json": good(0)["json"], "0.png": b"a text"}, "0.png"),
    "missing member": ({"json": good(0)["json"]}, "0.png"),
    "bad JSON": ({"json": b'{"content": [', "0.png": png(0)}, "JSON"),
    "bad UTF-8": ({"txt": b"caf\xe9 \xff\xfe", "png": png(0)}, "UTF-8"),
}


def damaged_shards(folder) -> dict[str, tuple[str, str]]:
    """Ten shards of a hundred samples, in each of which one is bad; returns shard -> (its key, what is said)."""
    folder.mkdir()
    expected = {}
    for number, kind in enumerate([*BAD, "outside", "flipped byte", "cut short"]):
        path, bad = folder / f"{number}.tar", 99 if kind == "cut short" else 37
        key = f"{number}-{bad:03d}"
        samples = {f"{number}-{i:03d}": BAD[kind][0] if i == bad and kind in BAD else good(number * PER_SHARD + i)
                   for i in range(PER_SHARD)}
        if kind == "outside":
            key = f"../{key}"
            write_tar(path, [(f"{'../' if name in key else ''}{name}.{ending}", content)
                             for name, members in samples.items() for ending, content in members.items()])
        else:
            with ShardFile(path) as shard:
                for name, members in samples.items():
                    shard.write(name, members)
        content = bytearray(path.read_bytes())
        if kind == "flipped byte":
            with tarfile.open(path) as tar:
                content[tar.getmember(f"{key}.0.png").offset_data + 40] ^= 4
        if kind == "cut short":
            with tarfile.open(path) as tar:
                del content[tar.getmember(f"{key}.json").offset_data + 10 :]
        path.write_bytes(content)
        expected[path.name] = key, BAD.get(kind, ("", {"outside": "outside the shard", "flipped byte": "checksum"}.get(
            kind, "damaged or cut short")))[1]
    return expected


def test_ten_kinds_of_damage_are_counted_named_and_left_out(tmp_path, tokenizers, caplog):
    expected = damaged_shards(tmp_path / "raw")
    with caplog.at_level(logging.WARNING):
        stats = tokenize_shards(tmp_path / "raw", tmp_path / "codes", tokenizers, progress=False)
    assert (stats.samples, stats.bad) == (990, 10)
    said = [record.getMessage() for record in caplog.records]
    for shard, (key, reason) in expected.items():
        assert any(f"/{shard}: sample {key}:" in line and reason in line for line in said), (shard, key, reason)
    keys = [sample.key for shard in list_shards(tmp_path / "codes") for sample in read_shard(shard)]
    assert len(keys) == 990 and not {key for key, _ in expected.values()} & set(keys)
    # Read without codes: the same samples, the same ids, and the bad ones leave their place empty.
    raw = PackedLoader(tmp_path / "raw", tokenizers, CONFIG)
    codes = PackedLoader(tmp_path / "codes", tokenizers, CONFIG)
    assert raw.bad.bad == 10 and len(raw._cache) == 1000 and len(codes._cache) == 990
    filled = np.flatnonzero(raw._cache.length)
    assert all(np.array_equal(raw._cache[d][0], codes._cache[i][0]) for i, d in enumerate(filled.tolist()))
    shown = [entry[0] for window in range(raw.windows) for row in raw.rows(0, window) for entry in row]
    assert sorted(shown) == filled.tolist()


def test_hostile_members_are_not_executed_and_do_not_reach_the_model(tmp_path, tokenizers):
    link = tarfile.TarInfo("link.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device = tarfile.TarInfo("device.txt")
    device.type = tarfile.CHRTYPE
    pickle = b"cos\nsystem\n(S'touch executed'\ntR."
    members = [("a.txt", b"a good text"), ("a.pyd", pickle), ("a.pickle", pickle), ("b.npy", pickle),
               ("c.json", as_json({"content": [image("pipe:touch executed"), text("x")]})), (link, b""), (device, b"")]
    shard = write_tar(tmp_path / "a.tar", members)
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        stats = tokenize_shards([shard], tmp_path / "codes", tokenizers, max_bad_fraction=1, progress=False)
    finally:
        os.chdir(before)
    assert (stats.samples, stats.bad) == (1, 4) and not (tmp_path / "executed").exists()
    assert [sample.members for sample in read_shard(tmp_path / "codes" / "a.tar")] == [{"txt": b"a good text"}]


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in list_shards(folder)}


def _tokenize(shards, out, tokenizers) -> None:
    tokenize_shards(shards, out, Tokenizers.load(tokenizers), batch=4, progress=False)


@pytest.mark.slow
def test_killed_at_twenty_moments_the_result_is_the_same_to_the_byte(tmp_path, tokenizers):
    tokenizers.save(tmp_path / "tokenizers")
    for number in range(6):
        with ShardFile(tmp_path / "raw" / f"{number}.tar") as shard:
            for i in range(30):
                shard.write(f"{i:03d}", good(100 * number + 3 * i))
    begun = time.monotonic()
    _tokenize(tmp_path / "raw", tmp_path / "whole", tmp_path / "tokenizers")
    seconds, expected = time.monotonic() - begun, contents(tmp_path / "whole")
    moments, unfinished = random.Random(0), 0
    for attempt in range(20):
        out = tmp_path / f"out-{attempt}"
        process = multiprocessing.get_context("fork").Process(
            target=_tokenize, args=(tmp_path / "raw", out, tmp_path / "tokenizers"))
        process.start()
        time.sleep(moments.uniform(0, seconds))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        unfinished += not out.exists() or len(list(out.glob("*.tar"))) < len(expected)
        assert not out.exists() or contents_are_whole(out, expected)
        _tokenize(tmp_path / "raw", out, tmp_path / "tokenizers")
        assert contents(out) == expected and not list(out.glob(".*.tar.part"))
    assert unfinished > 5  # else nothing was interrupted


def contents_are_whole(folder, expected) -> bool:
    return all(path.read_bytes() == expected[path.name] for path in folder.glob("*.tar"))


def bad_texts(folder, bad: int) -> None:
    """Two shards of ten samples, of which `bad` in the first are no documents."""
    for number in range(2):
        with ShardFile(folder / f"{number}.tar") as shard:
            for i in range(10):
                broken = number == 0 and i < bad
                shard.write(f"{i}", {"json": b"{"} if broken else {"txt": f"word {i}".encode()})


def test_too_many_bad_samples_stay_too_many(tmp_path, tokenizers):
    """Started again, by processes, and by ranks: the same verdict over all samples."""
    tokenizers.save(tmp_path / "tokenizers")
    bad_texts(tmp_path / "raw", 3)
    shards = list_shards(tmp_path / "raw")
    for _ in range(2):
        with pytest.raises(UserError, match=r"3 of 20 samples are bad.*0\.tar: sample 0: its json is not valid"):
            tokenize_shards(shards, tmp_path / "a", tokenizers, progress=False)
    with pytest.raises(UserError, match=r"3 of 20 samples are bad.*0\.tar: sample 2: its json is not valid"):
        tokenize_in_processes(shards, tmp_path / "b", tmp_path / "tokenizers", 2, progress=False)
    tokenize_shards(shards, tmp_path / "c", tokenizers, 0, 2, progress=False)
    assert check_all(shards, tmp_path / "c", 0.01) is None  # the other rank has not ended
    tokenize_shards(shards, tmp_path / "c", tokenizers, 1, 2, progress=False)
    with pytest.raises(UserError, match="3 of 20"):
        check_all(shards, tmp_path / "c", 0.01)
    assert check_all(shards, tmp_path / "c", 0.2) == (20, 3)
    (tmp_path / "c" / ".0.tar.bad").unlink()  # codes of an older version, or copied without it
    with pytest.raises(UserError, match=r"0\.tar: sample 0: it was left out when its codes were made; "):
        check_all(shards, tmp_path / "c", 0.01)


def test_codes_made_with_a_larger_limit_are_taken_where_that_is_allowed(tmp_path, tokenizers):
    bad_texts(tmp_path / "raw", 3)
    shards = list_shards(tmp_path / "raw")
    tokenize_shards(shards, tmp_path / "out", tokenizers, max_bad_fraction=0.5, progress=False)
    with pytest.raises(UserError, match=r"3 of 20 samples.*sample 1: its json"):
        tokenize_shards(shards, tmp_path / "out", tokenizers, progress=False)
    assert tokenize_shards(shards, tmp_path / "out", tokenizers, max_bad_fraction=0.15, progress=False).skipped == 2


def test_shards_of_one_name_get_codes_of_names_that_tell_them_apart(tmp_path, tokenizers):
    folders = ["cc3m", "sbu/train", "sbu/test", "more"]
    for number, folder in enumerate(folders):
        with ShardFile(tmp_path / folder / ("00000.tar" if folder != "more" else "1.tar")) as shard:
            shard.write("a", {"txt": f"word {number}".encode()})
    shards = [str(shard) for folder in folders for shard in list_shards(tmp_path / folder)]
    names = ["cc3m-00000.tar", "train-00000.tar", "test-00000.tar", "1.tar"]
    assert codes_names(shards) == names
    tokenize_shards(shards, tmp_path / "out", tokenizers, progress=False)
    for number, name in enumerate(names):
        assert [sample.members["txt"] for sample in read_shard(tmp_path / "out" / name)] == [f"word {number}".encode()]
    assert codes_names(["s3://a/x/0.tar?key=1", "s3://a/y/0.tar.gz"]) == ["x-0.tar", "y-0.tar"]
    assert codes_names(["a/b/0.tar", "c/b/0.tar"]) == ["a-b-0.tar", "c-b-0.tar"]
    with pytest.raises(UserError, match=r"0\.tar is there twice"):
        codes_names([str(tmp_path / "0.tar"), "1.tar", str(tmp_path / "." / "0.tar")])


def test_damaged_codes_are_made_again_and_foreign_ones_are_refused(tmp_path, tokenizers, caplog):
    bad_texts(tmp_path / "raw", 0)
    shards = list_shards(tmp_path / "raw")
    tokenize_shards(shards, tmp_path / "out", tokenizers, progress=False)
    whole = (tmp_path / "out" / "1.tar").read_bytes()
    for damaged in (whole[:3000], b"", whole.replace(b"word 7", b"work 7")):
        (tmp_path / "out" / "1.tar").write_bytes(damaged)
        stats = tokenize_shards(shards, tmp_path / "out", tokenizers, progress=False)
        assert (stats.shards, stats.skipped) == (1, 1) and "made again" in caplog.text
        assert (tmp_path / "out" / "1.tar").read_bytes() == whole
    with ShardFile(tmp_path / "other" / "a.tar", {"tokenizers": "deadbeef", "source": ""}) as shard:
        shard.write("0", {"txt": b"word"})
    with pytest.raises(UserError, match="holds codes of other tokenizers"):
        tokenize_shards(tmp_path / "other", tmp_path / "out2", tokenizers, progress=False)


@pytest.mark.parametrize("words,environment,message", [
    (["--max-bad-fraction", "7"], {}, "from 0 to 1"), (["--batch", "-3"], {}, "from 1 on"),
    ([], {"RANK": "abc"}, "RANK is 'abc'"), ([], {"RANK": "2", "WORLD_SIZE": "2"}, "ranks count from 0"),
    (["--device", "cuda"], {}, "torch sees no GPU here"),
])
def test_tokenize_refuses_what_cannot_be(tmp_path, tokenizers, words, environment, message, capsys, monkeypatch):
    tokenizers.save(tmp_path / "run" / "tokenizers")
    bad_texts(tmp_path / "raw", 0)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        tokenize.main([str(tmp_path / "run"), str(tmp_path / "raw"), "--out", str(tmp_path / "out"), *words])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_messages_obey_nobody():
    error = BadSample("\x1b[31mred\nerror: fake", "a.tar", "\x07")
    assert str(error) == r"a.tar: sample \x1b[31mred\nerror: fake: \x07"


def test_sixteen_bits_a_pixel_are_brought_to_eight():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(np.tile(ramp, (4, 1))).save(buffer, "PNG")
    read = np.asarray(load_image(buffer.getvalue()))
    assert read.shape == (4, 64, 3) and (read[0, :, 0] == np.round(ramp / 257)).all()


def augmented_shard(path) -> None:
    """A sound that is heard, one that is made, both; a pair, and one that is not to be altered."""
    user, assistant = ({"role": role, "content": [audio()]} for role in ("user", "assistant"))
    with ShardFile(path) as shard:
        for key, data in {"heard": {"messages": [user, {"role": "assistant", "content": [text("a")]}]},
                          "made": {"messages": [{"role": "user", "content": [text("a")]}, assistant]},
                          "both": {"messages": [user, assistant]},
                          "pair": {"content": [audio(), text("a")]},
                          "kept": {"content": [audio(), text("a")], "augment": False}}.items():
            for i in range(8):
                shard.write(f"{key}{i}", {"json": as_json(data), "0.flac": flac(i)})


def test_what_is_heard_is_altered_and_what_is_to_be_made_is_not(tmp_path, tokenizers):
    """Whatever the number of ranks, and the batch in which it is encoded."""
    (tmp_path / "raw").mkdir()
    augmented_shard(tmp_path / "raw" / "0.tar")
    plain = tokenizers.media["audio"]
    changed = AudioTokenizer(plain.config.model_copy(update={"augment": AudioAugment(probability=1.0)}))
    changed.load_state_dict(plain.state_dict())
    bundle = Tokenizers(tokenizers.text, {**tokenizers.media, "audio": changed.eval()})
    bundle.save(tmp_path / "tokenizers")
    shards = {}
    for name, made_by, batch in (("plain", tokenizers, 64), ("altered", bundle, 64), ("single", bundle, 1)):
        tokenize_shards(tmp_path / "raw", tmp_path / name, made_by, batch=batch, progress=False)
        shards[name] = {sample.key: sample.members["0.audio.npy"] for sample in read_shard(tmp_path / name / "0.tar")}
    assert shards["altered"] == shards["single"]
    differ = {key for key, codes in shards["altered"].items() if codes != shards["plain"][key]}
    assert {key[:-1] for key in differ} == {"heard", "pair"}
    assert any(shards["altered"][f"heard{i}"] != shards["altered"][f"pair{i}"] for i in range(8)), "each in its own way"
