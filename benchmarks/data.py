"""Samples per second out of one plain tar: through its index, against webdataset's own iterator, in one process.

    python -m benchmarks.data --out results.json [--check]

The shard holds pictures (PNG) with a caption (JSON), made here. "raw" gives a sample's bytes, "decoded" its picture as
an RGB array and its JSON parsed. webdataset is its shortest pipeline, tar to samples; decoded, it is timed with its own
decoder and with ours, and ratios are to the faster of the two. Ours are the samples in order, with and without their
checksums, and in random order; the stream without an index stands beside them. That all give the same samples is
checked first, on the very shard that is timed. Repetitions are interleaved; the shard lies in the page cache and the
index is there already (how long it took to make is told apart).
"""

import argparse
import hashlib
import json
import math
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

from benchmarks import measure
from onevocab.common.errors import UserError, cli
from onevocab.common.files import write_json
from onevocab.common.provenance import provenance
from onevocab.data.index import IndexedShard, build_index, index_path, read_indexed
from onevocab.data.shards import read_shard
from onevocab.data.writing import ShardFile
from onevocab.tokenizers.media import encode_png, load_image


def make_shard(path: Path, samples: int, side: int) -> None:
    """Pictures of side x side pixels: coarse random colours, smoothed, with a little noise."""
    generator = np.random.default_rng(0)
    with ShardFile(path) as shard:
        for i in range(samples):
            coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
            pixels = pixels ^ generator.integers(0, 2, pixels.shape, dtype=np.uint8)
            content = [{"type": "image", "file": "0.png"}, {"type": "text", "text": f"picture number {i} of many"}]
            shard.write(f"{i:08d}", {"0.png": encode_png(Image.fromarray(pixels)),
                                     "json": json.dumps({"content": content}).encode()})


def decoded(sample: dict) -> dict:
    """`0.png` -> uint8 (height, width, 3), `json` -> its value; the rest (`__key__`) as it is."""
    return sample | {"0.png": np.asarray(load_image(sample["0.png"])), "json": json.loads(sample["json"])}


def from_webdataset(path: Path, *stages) -> Iterator[dict]:
    shards = webdataset.SimpleShardList([str(path)])
    return iter(webdataset.DataPipeline(shards, webdataset.tarfile_to_samples(), *stages))


def from_index(path: Path, verify: bool) -> Iterator[dict]:
    return (decoded({"__key__": sample.key, **sample.members}) for sample in read_indexed(path, verify=verify))


def in_random_order(path: Path) -> Iterator:
    with IndexedShard(path) as shard:
        for i in np.random.default_rng(0).permutation(len(shard)).tolist():
            yield shard[i]


def ways(path: Path) -> dict[str, dict]:
    """{"raw" | "decoded": {name: what begins to read the shard}}; the names of webdataset's begin with its own."""
    return {
        "raw": {
            "webdataset": lambda: from_webdataset(path),
            "ours": lambda: read_indexed(path),
            "ours, checksums": lambda: read_indexed(path, verify=True),
            "ours, random order": lambda: in_random_order(path),
            "ours, no index": lambda: read_shard(path),
        },
        "decoded": {
            "webdataset": lambda: from_webdataset(path, webdataset.decode("rgb8")),
            "webdataset, our decoder": lambda: from_webdataset(path, webdataset.map(decoded)),
            "ours": lambda: from_index(path, verify=False),
            "ours, checksums": lambda: from_index(path, verify=True),
        },
    }


def comparable(sample) -> tuple:
    """(key, endings, JSON, what the picture is and a hash of it) of a sample of any of the ways."""
    members = sample if isinstance(sample, dict) else {"__key__": sample.key, **sample.members}
    picture = members["0.png"]
    kind = "file" if isinstance(picture, bytes) else (picture.shape, picture.dtype.str)
    content = picture if isinstance(picture, bytes) else picture.tobytes()
    endings = sorted(name for name in members if not name.startswith("__"))
    return members["__key__"], endings, members["json"], kind, hashlib.sha256(content).digest()


def check(path: Path) -> int:
    """Compares every way with webdataset, sample by sample; returns how many there are. Raises UserError when two
    differ: then nothing is worth timing."""
    for kind, readers in ways(path).items():
        expected = [comparable(sample) for sample in readers["webdataset"]()]
        for name, begin in readers.items():
            found = [comparable(sample) for sample in begin()]
            if name == "ours, random order":  # the shard's keys are in alphabetical order
                found.sort(key=lambda sample: sample[0])
            if found != expected:
                raise UserError(f"{kind}: webdataset and '{name}' give different samples: nothing was timed")
    return len(expected)


def ratios(rates: dict[str, list[float]]) -> dict[str, dict]:
    """Medians of samples per second, and of the ratios, repetition by repetition, to the faster webdataset."""
    base = max((values for name, values in rates.items() if name.startswith("webdataset")), key=statistics.median)
    results = {}
    for name, values in rates.items():
        ratio = sorted(a / b for a, b in zip(values, base, strict=True))
        quartiles = ratio[len(ratio) // 4], ratio[-1 - len(ratio) // 4]
        results[name] = {"samples_per_second": round(statistics.median(values)),
                         "ratio": round(statistics.median(ratio), 2),
                         "ratio_quartiles": [round(x, 2) for x in quartiles]}
    return results


@cli
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/data-cpu.json"))
    parser.add_argument("--check", action="store_true", help="compare the samples, time nothing")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--side", type=int, default=64, help="pixels of a picture each way; 64 is the demo's")
    parser.add_argument("--repetitions", type=int, default=15)
    args = parser.parse_args(argv)
    if min(args.samples, args.side, args.repetitions) < 1:
        raise UserError("--samples, --side and --repetitions must be positive")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pictures.tar"
        make_shard(path, args.samples, args.side)
        started = time.perf_counter()
        build_index(path)
        seconds = time.perf_counter() - started
        size, index_size = path.stat().st_size, index_path(path).stat().st_size
        samples = check(path)
        print(f"{samples:,} samples, {size:,} bytes: all ways give the same samples; the index took {seconds:.2f} s")
        if args.check:
            return
        for kind, readers in ways(path).items():
            calls = {name: lambda _, begin=begin: deque(begin(), maxlen=0) for name, begin in readers.items()}
            times = measure.time_all(calls, torch.device("cpu"), math.inf, args.repetitions)
            results[kind] = ratios({name: [samples / t for t in taken] for name, taken in times.items()})
            for name, found in results[kind].items():
                low, high = found["ratio_quartiles"]
                print(f"{kind:8} {name:24} {found['samples_per_second']:>9,} samples/s   {found['ratio']:.2f}x "
                      f"(quartiles {low:.2f} .. {high:.2f})")
    write_json(args.out, {
        "benchmark": "data",
        "what": "samples per second of one shard in the page cache, one process, interleaved; ratios to the faster "
                "webdataset of the same kind",
        **provenance(),
        "command": "python -m benchmarks.data " + " ".join(sys.argv[1:] if argv is None else argv),
        "shard": {"samples": samples, "side": args.side, "bytes": size},
        "index": {"seconds": round(seconds, 3), "bytes": index_size},
        "repetitions": args.repetitions,
        "results": results,
    })
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
