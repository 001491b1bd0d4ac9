"""Samples per second out of one plain tar: through its index, beside webdataset's own iterator and megatron-energon,
in one process; what damaged samples cost; and what the loader makes of a million samples.

    python -m benchmarks.data --out results.json [--check]

The shard holds pictures (PNG) with a caption (JSON), made here. "raw" gives a sample's bytes, "decoded" its picture as
an RGB array and its JSON parsed. webdataset is its shortest pipeline, tar to samples; decoded, it is timed with its own
decoder and with ours, and ratios are to the faster of the two. energon, where it is installed, reads the same tar with
its own index. Ours are the samples in order, with and without their checksums, and in random order; the stream without
an index stands beside them. That all give the same samples is checked first, on the very shard that is timed.
Repetitions are interleaved; the shard lies in the page cache and the indexes are there already (how long ours took to
make is told apart). "damaged" is our reading with every check, of a shard of which one sample in a hundred is bad,
beside the same shard before the damage.
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
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import webdataset
from PIL import Image

from benchmarks import measure
from onevocab.common.errors import UserError, cli
from onevocab.common.files import write_json
from onevocab.common.provenance import provenance
from onevocab.data.documents import UNDECODABLE, BadSample, document_of
from onevocab.data.loader import LoaderConfig, PackedLoader
from onevocab.data.shards.format import read_shard
from onevocab.data.shards.index import IndexedShard, build_index, index_path, read_indexed
from onevocab.data.shards.writer import ShardFile
from onevocab.data.token_cache import COLUMNS, LENGTH, LOSS, TEXT_ONLY, ShardTokens, cache_path, to_bytes
from onevocab.tokenizers.media import encode_png, load_image
from onevocab.tokenizers.vocabulary import Vocabulary


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


def energon(path: Path, decode: bool) -> Callable[[], Iterator] | None:
    """megatron-energon's loader over a folder with the same tar; None where it is not installed."""
    try:
        from megatron.energon import (
            Cooker,
            DefaultTaskEncoder,
            WorkerConfig,
            get_loader,
            get_train_dataset,
            stateless,
        )
        from megatron.energon.flavors import BaseWebdatasetFactory
    except ImportError:
        return None
    folder = path.parent / "energon"
    if not folder.exists():
        folder.mkdir()
        (folder / path.name).hardlink_to(path)
        BaseWebdatasetFactory.prepare_dataset(folder, [path.name], split_parts_ratio=[("train", 1.0)], workers=1,
                                              progress_fn=lambda steps, total: steps)
        (folder / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")

    @stateless
    def cook(sample):
        return decoded(sample) if decode else sample

    class Encoder(DefaultTaskEncoder):
        decoder = None
        cookers = [Cooker(cook)]

    def begin() -> Iterator:
        dataset = get_train_dataset(folder, worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
                                    batch_size=None, shuffle_buffer_size=None, max_samples_per_sequence=None,
                                    repeat=False, task_encoder=Encoder())
        return iter(get_loader(dataset))

    return begin


def ways(path: Path) -> dict[str, dict]:
    """{"raw" | "decoded": {name: what begins to read the shard}}; the names of webdataset's begin with its own."""
    readers = {
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
    for kind, decode, name in (("raw", False, "energon"), ("decoded", True, "energon, our decoder")):
        begin = energon(path, decode)
        if begin:
            readers[kind][name] = begin
    return readers


# ------------------------------------------------------------------------------------------------ damaged samples


def damage(path: Path, target: Path) -> int:
    """A copy of the shard in which every hundredth sample is bad, in seven ways in turn; returns how many are."""
    kinds = [lambda m: m | {"0.png": b""}, lambda m: m | {"0.png": m["0.png"][:200]}, lambda m: {"json": m["json"]},
             lambda m: m | {"0.png": m["json"]}, lambda m: m | {"json": m["json"][:-9]},
             lambda m: m | {"json": b"\xff"},
             lambda m: m | {"0.png": m["0.png"][:20] + b"\xff" * 4 + m["0.png"][24:]}]
    bad = 0
    with ShardFile(target) as shard:
        for i, sample in enumerate(read_shard(path)):
            hit = i % 100 == 50
            shard.write(sample.key, kinds[bad % len(kinds)](sample.members) if hit else sample.members)
            bad += hit
    return bad


def usable(path: Path) -> Iterator[tuple]:
    """Every sample with all checks, its picture decoded; a bad one is counted as such."""
    for sample in read_indexed(path, verify=True, salvage=True):
        try:
            document = document_of(sample)
            yield document, [load_image(shown.content.content) for shown in document.media]
        except (BadSample, *UNDECODABLE) as error:
            yield error, None


# ------------------------------------------------------------------------------------------------ the loader


def mixed_documents(vocab: Vocabulary, n: int) -> ShardTokens:
    """n documents of the lengths of a mixed set, ids at random: texts (log-normal, median 300 tokens, some far longer
    than a row), captioned pictures of 16 x 16 codes, sounds of 2 to 15 s at 62 codes a second with words, conversations
    about one to four pictures."""
    generator = np.random.default_rng(0)
    kind = generator.integers(0, 4, n)
    words = generator.integers(10, 60, n)
    lengths = np.select([kind == 0, kind == 1, kind == 2], [
        generator.lognormal(5.7, 1.0, n).astype(np.int64) + 2, 264 + words,
        (62 * generator.uniform(2, 15, n)).astype(np.int64) + words], 262 * generator.integers(1, 5, n) + 4 * words)
    about = np.zeros((n, len(COLUMNS)), np.int32)
    about[:, LENGTH], about[:, TEXT_ONLY] = lengths, kind == 0
    tokens = generator.integers(0, vocab.text_size, int(lengths.sum()), dtype=np.int32)
    return ShardTokens(tokens, np.full(len(tokens), LOSS, np.uint8), about, [], [len(tokens)])


def loader_numbers(folder: Path, samples: int = 1_000_000, shards: int = 10) -> dict:
    """How full rows of 2,048 tokens are, what is left out, and how long a restart in the middle of an epoch takes."""
    tokenizers = SimpleNamespace(vocab=Vocabulary.build(32_000, []), hash="none")
    (folder / "shards").mkdir()
    (folder / "kept").mkdir()
    documents = mixed_documents(tokenizers.vocab, samples // shards)
    for i in range(shards):
        shard = folder / "shards" / f"{i}.tar"
        shard.write_bytes(b"never read: its documents are kept")
        path, identity = cache_path(shard, tokenizers, folder / "kept")
        path.write_bytes(to_bytes(documents, identity))
    config = LoaderConfig(seq_len=2048, global_batch_size=8)

    def start() -> PackedLoader:
        return PackedLoader(folder / "shards", tokenizers, config, cache_folder=folder / "kept")

    loader = start()
    batches = [loader.next_batch() for _ in range(64)]
    total = sum(batch.ids.numel() for batch in batches)
    useful = sum(int((batch.document_ids >= 0).sum()) for batch in batches) / total
    state = loader.state_dict() | {"window": loader.windows // 2, "row": 3}
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        again = start()
        again.load_state_dict(state)
        again.next_batch()
        seconds.append(time.perf_counter() - begun)
    long = documents.about[:, TEXT_ONLY] * documents.about[:, LENGTH] > config.seq_len
    return {"samples": samples, "documents": len(loader._cache), "seq_len": config.seq_len,
            "useful": round(useful, 4), "left_out": loader.too_long / samples, "texts_in_pieces": float(long.mean()),
            "restart_seconds": round(statistics.median(seconds), 3)}


# ------------------------------------------------------------------------------------------------ the whole


def comparable(sample) -> tuple:
    """(key, endings, JSON, what the picture is and a hash of it) of a sample of any of the ways."""
    members = sample if isinstance(sample, dict) else {"__key__": sample.key, **sample.members}
    picture = members["0.png"]
    if isinstance(picture, torch.Tensor):  # energon's loader converts arrays
        picture = picture.numpy()
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
            read_back = [comparable(sample) for sample in begin()]
            if name == "ours, random order":  # the shard's keys are in alphabetical order
                read_back.sort(key=lambda sample: sample[0])
            if read_back != expected:
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
        index_path(path).unlink()  # written with the shard
        started = time.perf_counter()
        build_index(path)
        seconds = time.perf_counter() - started
        size, index_size = path.stat().st_size, index_path(path).stat().st_size
        samples = check(path)
        print(f"{samples:,} samples, {size:,} bytes: all ways give the same samples; the index took {seconds:.2f} s")
        if args.check:
            return
        broken = Path(folder) / "damaged.tar"
        bad = damage(path, broken)
        for kind, readers in ways(path).items():
            calls = {name: lambda _, begin=begin: deque(begin(), maxlen=0) for name, begin in readers.items()}
            times = measure.time_all(calls, torch.device("cpu"), math.inf, args.repetitions)
            results[kind] = ratios({name: [samples / t for t in taken] for name, taken in times.items()})
            for name, row in results[kind].items():
                low, high = row["ratio_quartiles"]
                print(f"{kind:8} {name:24} {row['samples_per_second']:>9,} samples/s   {row['ratio']:.2f}x "
                      f"(quartiles {low:.2f} .. {high:.2f})")
        calls = {name: lambda _, shard=shard: deque(usable(shard), maxlen=0)
                 for name, shard in (("whole", path), ("damaged", broken))}
        times = measure.time_all(calls, torch.device("cpu"), math.inf, args.repetitions)
        n_refused = sum(isinstance(turns, Exception) for turns, _ in usable(broken))
        loss = statistics.median(b / a for a, b in zip(times["whole"], times["damaged"], strict=True)) - 1
        if n_refused != bad:
            raise UserError(f"{n_refused} of {bad} bad samples were noticed")
        print(f"damaged: {bad} of {samples} samples are bad and noticed; time {loss:+.1%}")
        loader = loader_numbers(Path(folder))
        print(f"loader: {loader}")
    about = provenance()
    with suppress(PackageNotFoundError):
        about["versions"]["megatron-energon"] = version("megatron-energon")
    write_json(args.out, {
        "benchmark": "data",
        "what": "samples per second of one shard in the page cache, one process, interleaved; ratios to the faster "
                "webdataset of the same kind",
        **about,
        "command": "python -m benchmarks.data " + " ".join(sys.argv[1:] if argv is None else argv),
        "shard": {"samples": samples, "side": args.side, "bytes": size},
        "index": {"seconds": round(seconds, 3), "bytes": index_size},
        "repetitions": args.repetitions,
        "results": results,
        "damaged": {"bad": bad, "samples": samples, "more_time": round(loss, 4)},
        "loader": loader,
    })
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
