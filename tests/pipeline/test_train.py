"""train.py and the loops: mistakes are one line, finished stages are kept, an interrupted run ends the same."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, train
from tiny_training import Loader, run

from onevocab.common.checkpoint_files import list_steps
from onevocab.common.errors import UserError
from onevocab.common.files import locked
from onevocab.model.weights import load_weights
from onevocab.pipeline.config import read_config
from onevocab.training.faults import Stopped
from onevocab.training.metrics import MetricsLog, curves, read_metrics


@pytest.mark.parametrize(("change", "arguments", "message"), [
    ("", ["--pretrain.steps=none"], "steps"),
    ("[modle]\ndim = 3\n", [], "modle: unknown key"),
    ("[text]\nvocab_size = 3\n", [], "text.vocab_size"),
    ("[text\n", [], "not valid TOML"),
    ("", ["--nosuch.key=3"], "--nosuch.key: unknown key"),
])
def test_a_wrong_configuration_is_one_clear_line(tmp_path, change, arguments, message):
    config = tmp_path / "config.toml"
    text = (ROOT / "configs" / "smoke.toml").read_text()
    if change.startswith("[text]"):
        text = text.replace("[text]\nvocab_size = 512\n", "")
    config.write_text(text + change)
    done = train(str(config), f"--folder={tmp_path / 'run'}", *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "run").exists(), "nothing is written"


def test_no_configuration_and_a_missing_one():
    assert "which configuration" in train().stderr
    done = train("configs/nosuch.toml")
    assert done.returncode == 2 and "configs/nosuch.toml" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "configs").glob("*.toml")))
def test_every_shipped_configuration_is_read(name):
    demo = "[data.demo]" in (ROOT / "configs" / name).read_text()
    config = read_config(ROOT / "configs" / name, [
        "--seed=7", "--pretrain.batch_tokens=3145728",
        *(["--data.demo.voices=tones"] if demo else [])])
    assert config.seed == 7 and (not demo or config.data.demo.voices == "tones")
    assert config.pretrain.rows.global_batch_size * config.pretrain.rows.seq_len == 3 * 2**20


# ------------------------------------------------------------------------------------------------ the loop


def test_a_run_that_was_stopped_ends_bitwise_as_one_that_was_not(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = run(tmp_path / "whole")

    class Interrupted(Loader):
        def next_batch(self):
            if self.taken == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().next_batch()

    with pytest.raises(Stopped, match="step 7"):
        run(tmp_path / "cut", Interrupted())
    assert [p.name for p in list_steps(tmp_path / "cut" / "stage")][0] == "step-7"
    resumed = run(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    def losses(name):
        return {line["step"]: line["loss_text"] for line in read_metrics(tmp_path / name / "metrics.jsonl")}

    assert losses("whole").keys() == losses("cut").keys()
    assert losses("cut")[12] == losses("whole")[12] < losses("whole")[2]


def test_a_damaged_checkpoint_is_passed_over_and_the_end_is_the_same(tmp_path, capsys):
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = run(tmp_path / "whole")
    run(tmp_path / "cut")
    newest = tmp_path / "cut" / "stage" / "step-12" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x01")
    resumed = run(tmp_path / "cut")
    assert "model.safetensors" in capsys.readouterr().err
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_non_finite_step_is_skipped_and_too_many_stop_the_run(tmp_path):
    (tmp_path / "some").mkdir()
    weights = run(tmp_path / "some", Loader(poison={3, 5}))
    assert all(value.isfinite().all() for value in weights.values())
    skipped = [line["step"] for line in read_metrics(tmp_path / "some" / "metrics.jsonl") if "skipped" in line]
    assert skipped == [4, 6]
    losses = [line["loss_text"] for line in read_metrics(tmp_path / "some" / "metrics.jsonl") if "loss_text" in line]
    assert len(losses) == 6 and all(math.isfinite(loss) for loss in losses)
    (tmp_path / "many").mkdir()
    with pytest.raises(UserError, match="not finite 3 steps in a row"):
        run(tmp_path / "many", Loader(poison={6, 7, 8}))
    assert list_steps(tmp_path / "many" / "stage")[0].name == "step-8", "skipped steps change nothing"


def test_curves_are_drawn_and_half_a_line_does_no_harm(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    for step in range(1, 5):
        log.write("stage", step, loss_text=1.0 / step, loss_image=2.0 / step)
    with open(tmp_path / "m.jsonl", "ab") as file:
        file.write(b'{"stbge": "stage", "step": 2}\n[]\n\xff\n{"stage": "sta')
    assert curves(read_metrics(tmp_path / "m.jsonl"), "stage")[:4] == b"\x89PNG"
    assert curves(read_metrics(tmp_path / "m.jsonl"), "another") is None
    log.cut_back("stage", 2)
    assert [line["step"] for line in read_metrics(tmp_path / "m.jsonl")] == [1, 2]


def test_lines_that_the_disk_does_not_take_are_written_later(tmp_path, capsys):
    """A limit on files' sizes stands in for a full disk: a part of the second line is taken before it refuses."""
    log, usual = MetricsLog(tmp_path / "m.jsonl"), resource.getrlimit(resource.RLIMIT_FSIZE)
    log.write("stage", 1, loss=1.0)
    taken = (tmp_path / "m.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (taken + 10, usual[1]))
    try:
        log.write("stage", 2, loss=2.0)
        assert (tmp_path / "m.jsonl").stat().st_size == taken
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert capsys.readouterr().err.count("newest lines wait") == 1
    log.write("stage", 3, loss=3.0)
    assert [line["loss"] for line in read_metrics(tmp_path / "m.jsonl")] == [1, 2, 3]


# ------------------------------------------------------------------------------------------------ a whole run


def test_finished_stages_are_skipped_and_other_settings_are_refused(smoke_run):
    before = {p: p.stat().st_mtime_ns for p in [*smoke_run.rglob("*.safetensors"), *smoke_run.rglob("done.json")]}
    assert {p.parts[-2] for p in before} >= {"tokenizers"}
    again = train("configs/smoke.toml", f"--folder={smoke_run}")
    assert again.returncode == 0, again.stderr
    other = train("configs/smoke.toml", f"--folder={smoke_run}", "--model.dim=96")
    assert other.returncode == 2 and "model.dim: 64 then, 96 now" in other.stderr and "Traceback" not in other.stderr
    assert "dim = 64" in (smoke_run / "config.toml").read_text(), "a refused run leaves the real configuration"
    assert before == {p: p.stat().st_mtime_ns for p in before}


@pytest.mark.slow
def test_a_folder_is_trained_once_at_a_time(smoke_run):
    with locked(smoke_run / ".lock"):
        second = train("configs/smoke.toml", f"--folder={smoke_run}")
    assert second.returncode == 2 and "another process trains" in second.stderr and "Traceback" not in second.stderr


@pytest.mark.slow
def test_what_the_first_rank_cannot_write_all_ranks_say(tmp_path):
    (tmp_path / "file").touch()
    done = train("configs/smoke.toml", f"--folder={tmp_path}/file/run",
                 launcher=["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])
    own, traceback, torchruns = done.stderr.partition("Traceback")
    assert f"error: cannot write into {tmp_path}/file/run: {tmp_path}/file is no folder" in own, done.stderr
    assert traceback not in torchruns, done.stderr
    assert "exitcode  : 2" in torchruns


def test_a_run_says_what_made_it(smoke_run):
    assert (smoke_run / "config.toml").is_file()
    for stage in ("shards", "text", "image", "audio", "codes", "pretrain", "instruct"):
        done = json.loads((smoke_run / stage / "done.json").read_text())
        assert done["seconds"] >= 0 and done["provenance"]["versions"]["torch"] and done["provenance"]["device"]


@pytest.mark.slow
def test_a_run_killed_in_several_stages_ends_with_the_same_weights(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = train("configs/smoke.toml", f"--folder={whole}")
    assert done.returncode == 0, done.stderr
    for stage in ("image", "pretrain", "instruct"):
        process = subprocess.Popen([sys.executable, "train.py", "configs/smoke.toml", f"--folder={cut}"], cwd=ROOT,
                                   stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        for line in process.stderr:
            if line.startswith(f"--- {stage}"):
                break
        deadline = time.monotonic() + 60
        while stage != "image" and not list((cut / stage).glob("step-*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert not (cut / stage / "done.json").exists() or stage == "instruct"
    done = train("configs/smoke.toml", f"--folder={cut}")
    assert done.returncode == 0, done.stderr
    for stage in ("image", "audio", "pretrain", "instruct"):
        weights = [load_weights(list_steps(run / stage)[0])[0] for run in (whole, cut)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]), stage
