"""The whole way of somebody else's data: converted, looked at, turned to codes by ranks, trained on, asked about."""

import json
import os
import re
import sys

import pytest
import real_data
from conftest import ROOT, run_command

from onevocab.data.loader import LoaderConfig, PackedLoader
from onevocab.data.shards.format import list_shards, read_shard
from onevocab.tokenizers.bundle import Tokenizers
from onevocab.tokenizers.media import load_audio
from onevocab.tokenizers.sound import prepare

pytestmark = pytest.mark.slow


def python(*words) -> str:
    return run_command([sys.executable, *map(str, words)], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=900)


def convert(*words) -> dict:
    python("-m", "onevocab.data.convert", *words, "--samples-per-shard", 100)
    return json.loads((words[words.index("--out") + 1] / "report.json").read_text())


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """(converted shards, pictures, what the two conversions said)."""
    folder = tmp_path_factory.mktemp("others")
    table, clips = real_data.speech(folder / "speech")
    names, drawn = real_data.pictures(folder / "pictures", 300)
    shards = folder / "shards"
    said = convert("captions", table, "--media", clips, "--out", shards / "speech")
    seen = convert("map", names, "--media", drawn, "--map", "image=image", "--map", "text=name", "--out",
                   shards / "pictures")
    return shards, drawn, said, seen


def test_speech_and_pictures_of_other_projects(others, tmp_path):
    shards, drawn, said, seen = others
    assert said["media"] == {"audio": said["samples"]} and said["samples"] > 500 and said["reencoded"] == 0
    assert seen["media"] == {"image": seen["samples"]} and seen["samples"] > 280

    # A run's own configuration, with these shards in place of the demo's.
    smoke = (ROOT / "configs" / "smoke.toml").read_text()
    smoke = re.sub(r"\[data\.demo\].*?\n\n", "", smoke, flags=re.DOTALL)
    smoke = smoke.replace("[data]\n", f"[data]\nshards = ['{shards}/speech', '{shards}/pictures']\n")
    smoke = re.sub(r"codes/(pretrain|instruct)-\*\.tar", "codes/*.tar", smoke)
    smoke = smoke.replace("[audio]\n", "[audio]\nmax_seconds = 30.0\n").replace("max_length = 512", "max_length = 2048")
    smoke = smoke.replace("seq_len = 256", "seq_len = 2048").replace("global_batch_size = 4", "global_batch_size = 2")
    config = tmp_path / "own.toml"
    config.write_text(smoke)
    run = tmp_path / "run"
    python("-m", "torch.distributed.run", "--standalone", "train.py", config, f"--folder={run}")
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"pretrain", "instruct"} <= {line["stage"] for line in losses if "loss_audio" in line}

    raw = [sample for shard in list_shards(shards / "*" / "*.tar") for sample in read_shard(shard)]
    long = {sample.key for sample in raw if "0.flac" in sample.members and
            len(prepare(*load_audio(sample.members["0.flac"]))) > 30 * 16000}
    assert 0 < len(long) < 5  # announcements of half a minute and more, which are left out

    # Codes made again, by two ranks: the same bytes as the run's own.
    python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "onevocab.data.tokenize", run,
           shards / "speech", "--out", tmp_path / "codes")
    for shard in list_shards(tmp_path / "codes"):
        assert shard.read_bytes() == (run / "codes" / shard.name).read_bytes()
    tokenizers = Tokenizers.load(run / "tokenizers")
    keys = [sample.key for shard in list_shards(run / "codes") for sample in read_shard(shard, tokenizers.hash)]
    assert sorted(keys) == sorted({sample.key for sample in raw} - long)
    assert len(raw) == said["samples"] + seen["samples"]
    loader = PackedLoader(run / "codes", tokenizers, LoaderConfig(seq_len=2048, global_batch_size=2))
    assert loader.too_long == 0 and loader.bad.bad == 0

    page = tmp_path / "page.html"
    out = python("-m", "onevocab.data.inspect", shards / "speech", shards / "pictures", "--run", run, "--out", page,
                 "--samples", 0)
    assert f"{len(keys):,} samples" in out and f" {len(long)} bad" in out
    text = page.read_text()
    assert "<audio" in text and "<img" in text and "http" not in re.sub(r"http-equiv|http://www.w3.org", "", text)
    python("sample.py", run, "--image", drawn / "0023-fe0f-20e3.png", "--text", "what is this?", "--want", "text")


def test_the_configuration_of_a_gpu_on_two_cpu_ranks(others, tmp_path):
    """configs/base.toml with its own stages (FSDP2, bfloat16, parts of a batch, compiled layers), a small model and
    small tokenizers."""
    def section(text: str, name: str) -> str:
        return re.search(rf"^\[{name}\]\n.*?(?=^\[|\Z)", text, re.DOTALL | re.MULTILINE)[0]

    shards, base = others[0], (ROOT / "configs" / "base.toml").read_text()
    smoke = (ROOT / "configs" / "smoke.toml").read_text()
    for name in ("text", "image", "audio", "model"):
        base = base.replace(section(base, name), section(smoke, name))
    base = base.replace("[audio]\n", "[audio]\nmax_seconds = 30.0\n")
    base = re.sub(r"^shards = .*$", f"shards = ['{shards}/speech', '{shards}/pictures']", base, flags=re.MULTILINE)
    base = re.sub(r'path = "codes/\w+-\*\.tar"', 'path = "codes/*.tar"', base)
    config, run = tmp_path / "base.toml", tmp_path / "run"
    config.write_text(base)
    python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py", config,
           f"--folder={run}", "--data.workers=1", "--data.tokenizer_samples=300", "--model.max_length=2048",
           *(f"--{stage}.{key}" for stage in ("pretrain", "instruct") for key in
             ("steps=6", "log_every=2", "save_every=3", "batch_tokens=8192", "micro_batch_size=1",
              "loader.seq_len=2048")),
           "--instruct.no-compile", "--instruct.activation-checkpointing")
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for stage in ("pretrain", "instruct"):
        values = [line for line in losses if line["stage"] == stage and "mfu" in line]
        assert values[-1]["step"] == 6 and values[-1]["mfu"] > 0 and values[-1]["loss_text"] < values[0]["loss_text"]
        saved = sorted(path.name for path in (run / stage / "step-6" / "optimizer").iterdir())
        assert len(saved) == 2  # a file of each rank
    python("sample.py", run, "--text", "what is this?", "--want", "text")
