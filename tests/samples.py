"""Small samples, shards and codes that the tests of the data floor share."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from onevocab.data.shards.format import Sample, codes_to_npy
from onevocab.data.shards.writer import ShardWriter
from onevocab.tokenizers.media import encode_audio, encode_png

TEXTS = ["a red apple", "what is in the picture?", "draw a blue dog", "é 漢字 7", "a"]


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


def sample(members: dict) -> Sample:
    return Sample("k", members, "s.tar")
