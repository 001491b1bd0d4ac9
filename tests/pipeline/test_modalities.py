"""A run trains the modalities that its configuration names: none, one, or several, in any mixture."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, train
from samples import TEXTS, as_json, audio, flac, image, png, say, text
from scratch import copy_checkout

from onevocab.data.shards.writer import ShardWriter
from onevocab.generation import AnyToAny
from onevocab.tokenizers.modalities import MODALITIES

pytestmark = pytest.mark.slow

SECTIONS = {
    "image": "[image]\nsize = [16, 16]\npatch = 4\nmax_side = 8\n",
    "audio": "[audio]\nmels = 32\nrows = 2\nmax_seconds = 1.0\nclip_seconds = 0.25\n",
}
SMALL = """width = 16
fine_width = 8
encoder_blocks = 0
decoder_blocks = 0
fine_blocks = 0
steps = 6
batch_size = 4
quantizer = { codebook_size = 16, dim = 4 }
"""
PARTS = {"text": lambda i: (text(TEXTS[i % 5]), {}), "image": lambda i: (image(), {"0.png": png(i)}),
         "audio": lambda i: (audio("1.flac"), {"1.flac": flac(i)})}


def write_run(folder: Path, media: tuple[str, ...], asked: tuple[str, ...]) -> Path:
    """Shards of conversations between all kinds of parts in `asked`, and a configuration with sections for `media`."""
    with ShardWriter(folder / "shards", "s", 20) as writer:
        for i in range(24):
            (ask, one), (answer, other) = (PARTS[asked[(i + k) % len(asked)]](i) for k in (0, 1))
            turns = {"messages": [say("user", ask), say("assistant", answer)]}
            writer.write(f"{i:04d}", {"json": as_json(turns)} | one | other)
    stage = 'sources = [{ path = "codes/*.tar" }]\nloader = { seq_len = 128, global_batch_size = 2 }\nsteps = 4\n'
    config = folder / "run.toml"
    config.write_text(
        f'folder = "{folder / "run"}"\nthreads = 1\n[data]\nshards = ["../shards"]\nworkers = 1\n[text]\n'
        "vocab_size = 260\n" + "".join(SECTIONS[name] + SMALL for name in media)
        + "[model]\ndim = 32\nlayers = 1\nheads = 2\nkv_heads = 1\nhead_dim = 16\nmlp_dim = 64\nmax_length = 128\n"
        f"[pretrain]\n{stage}[instruct]\n{stage}")
    return config


@pytest.mark.parametrize("media", [(), ("image",), ("audio", "image")])
def test_any_mixture_of_modalities(tmp_path, media):
    """Text alone; text and pictures; pictures and sound without a text: sections may stand in any order."""
    asked = ("text", *media) if len(media) < 2 else media
    done = train(write_run(tmp_path, media, asked), "--plan")
    assert done.returncode == 0, done.stderr
    done = train(tmp_path / "run.toml")
    assert done.returncode == 0, done.stderr
    stages = re.findall(r"^--- (\w+)$", done.stderr, re.MULTILINE)
    named = [name for name in MODALITIES if name in media]
    assert stages == ["shards", "text", *named, "codes", "pretrain", "instruct"]
    assert not [name for name in MODALITIES if name not in media and (tmp_path / "run" / name).exists()]
    model = AnyToAny.load(tmp_path / "run")
    assert model.vocab.modalities == ["text", *named]
    for want in model.vocab.modalities:
        reply = model.generate("hello", want=want, max_new_tokens=100)
        assert list(reply.media) == ([want] if want in media else [])
    done = train(tmp_path / "run.toml")
    assert done.returncode == 0 and "---" not in done.stderr, "all stages are finished"


def test_a_modality_more_comes_behind_those_that_were_there(tmp_path):
    """Also one that is registered before them: the ids of the run that it starts from keep their meaning."""
    assert train(write_run(tmp_path / "a", ("audio",), ("text", "audio"))).returncode == 0
    config = write_run(tmp_path / "b", ("image", "audio"), ("text", "image", "audio"))
    done = train(config, f"--init-from={tmp_path / 'a' / 'run'}")
    assert done.returncode == 0, done.stderr
    before, after = (AnyToAny.load(tmp_path / name / "run") for name in "ab")
    assert after.vocab.modalities == ["text", "audio", "image"] and before.vocab.is_prefix_of(after.vocab)
    assert list(after.generate("hello", want="image").media) == ["image"]


def test_a_section_without_data_and_data_without_a_section(tmp_path):
    config = write_run(tmp_path / "a", ("image", "audio"), ("text", "image"))
    for _ in range(2):
        done = train(config)
        assert done.returncode == 0, done.stderr
        assert "[audio] is left out of this run: the shards of [data] shards hold no sounds" in done.stderr
    assert "---" not in done.stderr and "--want image" in done.stdout and "audio" not in done.stdout
    assert AnyToAny.load(tmp_path / "a" / "run").vocab.modalities == ["text", "image"]
    done = train(write_run(tmp_path / "b", ("image",), ("image", "audio")))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the shards hold audio" in done.stderr and "[audio]" in done.stderr


def blocks_of(title: str) -> list:
    import test_extending

    return test_extending.SECTIONS[title]


def test_a_new_modality_is_killed_and_goes_on_as_if_nothing_had_been(tmp_path):
    """The point clouds of docs/extending.md, two ranks, one of them killed while it learns to speak of them: the
    weights end bit for bit as those of a run that nobody disturbed."""
    import test_extending

    scratch = copy_checkout(ROOT, tmp_path / "checkout")
    test_extending.write(blocks_of("A modality"), test_extending.BARS["A modality"], scratch)
    variables = test_extending.environment(scratch, tmp_path / "links")
    scripts = [block.text for block in blocks_of("A modality") if block.language == "bash"]
    test_extending.run(scripts[0], scratch, variables)
    test_extending.run(scripts[1].replace("torchrun", "true #"), scratch, variables)

    def command(folder: str) -> list[str]:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py",
                "shapes.toml", f"--folder=runs/{folder}", "--points.steps=20", "--instruct.save-every=10",
                "--instruct.log-every=1", "--instruct.steps=60", "--pretrain.steps=4"]

    test_extending.run(" ".join(command("whole")), scratch, variables)
    with open(tmp_path / "log", "w") as log:
        disturbed = subprocess.Popen(command("killed"), cwd=scratch, env=variables, stdout=log, stderr=log)
        folder, deadline = scratch / "runs" / "killed" / "instruct", time.monotonic() + 240
        while not (folder / "step-20").exists():
            assert disturbed.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.02)
        for child in _children(disturbed.pid)[:1]:
            os.kill(child, signal.SIGKILL)
        assert disturbed.wait(120) != 0
    assert not (folder / "done.json").exists()
    test_extending.run(" ".join(command("killed")), scratch, variables)
    whole, killed = (json.loads((scratch / "runs" / name / "instruct" / "step-60" / "manifest.json").read_text())
                     for name in ("whole", "killed"))
    assert whole["files"]["model.safetensors"] == killed["files"]["model.safetensors"]


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]
