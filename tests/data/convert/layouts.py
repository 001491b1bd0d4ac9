"""Files in the published layouts, and what the shards made of them say by webdataset's own reader."""

import csv
import io
import json

import numpy as np
import webdataset
from PIL import Image
from samples import png

from onevocab.data.convert import convert
from onevocab.data.documents import document_of
from onevocab.data.shards.format import list_shards, read_shard
from onevocab.tokenizers.media import encode_audio

WAV = encode_audio(np.random.default_rng(0).normal(0, 0.1, 800), 16000, "WAV")
AB = {"a.png": png(0), "b.png": png(1)}


def put(folder, files: dict):
    """Writes files: bytes and texts as they are, anything else as JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = content if isinstance(content, bytes | str) else json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def written(out) -> list:
    """Every sample by webdataset's own reader, as [(role, parts)]: texts, and the bytes of media."""
    samples = []
    for shard in list_shards(out):
        for sample in read_shard(shard):
            assert document_of(sample)  # raises what training would
        stages = webdataset.SimpleShardList([str(shard)]), webdataset.tarfile_to_samples()
        for sample in webdataset.DataPipeline(*stages):
            data = json.loads(sample["json"])
            turns = data.get("messages") or [{"role": None, "content": data["content"]}]
            samples.append([(turn["role"], [part["text"] if part["type"] == "text" else sample[part["file"]]
                                          for part in turn["content"]]) for turn in turns])
    return samples


def converted(name: str, source, out, **options):
    report = convert(name, source, out, progress=False, **options)
    samples = written(out)
    assert report.samples == len(samples) == json.loads((out / "report.json").read_text())["samples"]
    return report, samples


def lost(report) -> dict[str, int]:
    """What was dropped, and what was left out of kept samples."""
    return report.dropped | {f"left out: {reason}": n for reason, n in report.left_out.items()}


def plain(*parts) -> list:
    return [(None, list(parts))]


def talk(*turns) -> list:
    """User and assistant in turn; each a text or a list of parts."""
    return [(("user", "assistant")[i % 2], turn if isinstance(turn, list) else [turn]) for i, turn in enumerate(turns)]


def jpg(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png(seed))).save(buffer, "JPEG")
    return buffer.getvalue()


def as_csv(*rows) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    return buffer.getvalue()


def as_lines(*records) -> str:
    return "\n".join(map(json.dumps, records)) + "\n"


def records(names: str, *rows) -> list[dict]:
    return [dict(zip(names.split(), row, strict=True)) for row in rows]


def llava(image, *values, first=0) -> dict:
    said = [{"from": ("human", "gpt")[(i + first) % 2], "value": value} for i, value in enumerate(values)]
    return {"id": "1", "conversations": said} | ({} if image is None else {"image": image})


def shards(out) -> dict:
    return {path.name: path.read_bytes() for path in out.glob("*.tar")}
