"""Faults in real processes: killed, stopped, starved and restarted, a training ends as if nothing had been."""

import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT
from tiny_training import CONFIG, free_port, run
from tqdm import tqdm

from onevocab.common.checkpoint_files import list_steps
from onevocab.model.weights import load_weights
from onevocab.training import checkpoint
from onevocab.training.metrics import read_metrics

SCRIPT = "tests/tiny_training.py"
STEPS = 30


def start(folder, *options, ranks: int = 1, restarts: int = 0, stderr=subprocess.PIPE, env=None,
          launcher=()) -> subprocess.Popen:
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
                    f"--max-restarts={restarts}"]
    return subprocess.Popen([sys.executable, *launcher, SCRIPT, str(folder), "--steps", str(STEPS), *map(str, options)],
                            cwd=ROOT, stderr=stderr, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}))


def finished(*arguments, seconds: float = 120, **options) -> str:
    process = start(*arguments, **options)
    err = process.communicate(timeout=seconds)[1]
    assert process.returncode == 0, err
    return err


def outcome(folder, steps: int = STEPS):
    """(weights, losses by step) of a finished run."""
    newest = list_steps(folder / "stage")[0]
    assert newest.name == f"step-{steps}"
    return load_weights(newest)[0], read_losses(folder)


def read_losses(folder) -> dict[int, float]:
    return {line["step"]: line["loss_text"] for line in read_metrics(folder / "metrics.jsonl") if "loss_text" in line}


def same(one, two) -> bool:
    (weights, losses), (others, other_losses) = one, two
    return losses == other_losses and weights.keys() == others.keys() and all(
        torch.equal(weights[name], others[name]) for name in weights)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    finished(folder)
    return outcome(folder)


def _train(folder, background: str) -> None:
    tqdm.set_lock(threading.RLock())  # its own one is shared by forked processes: one that is killed would keep it
    run(folder, config=CONFIG.model_copy(update={"steps": STEPS, "save_every": 1, "precision": "float32",
                                                 "background_save": background}))


@pytest.mark.slow
@pytest.mark.parametrize("background", ["off", "on"])
def test_killed_at_twenty_moments(whole, tmp_path, background):
    """kill -9 while it steps and while it saves: it saves after every step. Forked, so that no moment is an import."""
    context, moments, kills, saving = multiprocessing.get_context("fork"), random.Random(0), 0, 0
    begun = time.monotonic()
    (tmp_path / "timed").mkdir()
    _train(tmp_path / "timed", background)
    seconds, folders = time.monotonic() - begun, 0
    while kills < 20:
        folder = tmp_path / f"run-{folders}"
        folder.mkdir()
        folders += 1
        for _ in range(100):
            process = context.Process(target=_train, args=(folder, background))
            process.start()
            process.join(moments.uniform(0, seconds))
            if not process.is_alive():
                break
            process.kill()
            process.join()
            kills += 1
            saving += bool(list(folder.glob("stage/.step-*.part")))
        assert process.exitcode == 0
        assert same(outcome(folder), whole)
        assert not [path.name for path in (folder / "stage").iterdir() if path.name.startswith(".")]
    assert saving  # else none hit a checkpoint that was being written


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow),
                                    pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_stops_after_the_step_and_the_run_goes_on(whole, tmp_path, number):
    err = finished(tmp_path, "--at", 6, "--kill", int(number), "--save-every", 100)
    assert "stopped at step 7" in err  # between two lines of the log, whose losses are to be of all their steps
    assert [path.name for path in list_steps(tmp_path / "stage")] == ["step-7"]
    finished(tmp_path, "--save-every", 100)
    assert same(outcome(tmp_path), whole)


@pytest.mark.slow
def test_one_rank_asked_to_stop_stops_all(tmp_path):
    process = start(tmp_path, "--at", 7, "--on", 1, "--kill", int(signal.SIGTERM), "--save-every", 100, ranks=2)
    err = process.communicate(timeout=120)[1]
    assert err.count("stopped at step 8") == 2 and process.returncode == 0, err
    finished(tmp_path, ranks=2)
    finished(tmp_path / "whole", ranks=2)
    assert same(outcome(tmp_path), outcome(tmp_path / "whole"))


@pytest.mark.slow
def test_torchrun_asked_to_stop_saves(tmp_path):
    process = start(tmp_path, "--save-every", 1000, "--steps", 100_000, ranks=2)
    for line in process.stderr:
        if "stage:" in line:  # the bar is there: it trains
            break
    process.terminate()
    err = process.communicate(timeout=60)[1]
    assert err.count("stage stopped at step") == 2 and "Traceback" not in err.partition("stopped at")[0]
    assert len(list_steps(tmp_path / "stage")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("what", [["--kill", int(signal.SIGKILL)], ["--stall", 4]], ids=["killed", "starved"])
def test_a_rank_that_dies_or_starves_is_started_again(tmp_path, what):
    """torchrun starts all ranks anew; they go on from the last checkpoint."""
    err = finished(tmp_path / "faulty", "--at", 11, "--on", 1, "--save-every", 4, *what, ranks=2, restarts=3)
    assert bool(re.search(r"has waited .* for (the other ranks' )?data at step 11", err)) == ("--stall" in what)
    finished(tmp_path / "whole", "--save-every", 4, ranks=2)
    assert same(outcome(tmp_path / "faulty"), outcome(tmp_path / "whole"))


@pytest.mark.slow
def test_damaged_data_on_one_rank_end_all_with_its_line(whole, tmp_path):
    """And what was being saved becomes a checkpoint."""
    options = "--save-every", 1, "--set", "background_save=on"
    process = start(tmp_path, "--at", 7, "--on", 1, "--fail", *options, ranks=2)
    err = process.communicate(timeout=120)[1]
    own, traceback, torchruns = err.partition("Traceback")
    # torchrun may end the other rank before that has said the same
    assert "error: the data of rank 1 are damaged" in own and traceback not in torchruns, err
    assert "exitcode  : 2" in torchruns
    assert [path.name for path in sorted((tmp_path / "stage").iterdir())] == ["step-6", "step-7"]
    finished(tmp_path, *options, ranks=2)
    finished(tmp_path / "whole", ranks=2)
    assert same(outcome(tmp_path), outcome(tmp_path / "whole"))


@pytest.mark.slow
def test_two_machines(tmp_path):
    """Two torchruns that meet at an address, each with a rank; one rank is killed, and both are started again."""
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3",
                "--rdzv-backend=c10d", "--rdzv-id=job", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    machines = [start(tmp_path / "two", "--at", 11, "--on", 1, launcher=launcher) for _ in range(2)]
    for machine in machines:
        err = machine.communicate(timeout=180)[1]
        assert machine.returncode == 0, err
    assert (tmp_path / "two" / "happened").exists()
    finished(tmp_path / "whole", ranks=2)
    assert same(outcome(tmp_path / "two"), outcome(tmp_path / "whole"))


def test_starved_alone_it_ends_with_one_line(tmp_path):
    process = start(tmp_path, "--at", 5, "--stall", 2)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 3 and "error: stage: rank 0 has waited" in err and "Traceback" not in err
    assert list_steps(tmp_path / "stage")[0].name == "step-5"


def test_the_watchdog_ends_a_process_whose_words_nobody_takes():
    code = """import sys, time
from onevocab.training.faults import Watchdog
sys.stderr = open("/dev/full", "w")
with Watchdog(0.2, "stage") as watchdog:
    watchdog.waits_for("data", 1)
    time.sleep(30)"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 3


@pytest.mark.slow
def test_the_number_of_ranks_may_change(whole, tmp_path):
    """1 -> 2 -> 4 -> 1 ranks, under DDP, sharded by FSDP2, and back: the losses differ from one rank's by no more than
    twice what float32 costs."""
    for ranks, parallel, until in ((1, "ddp", 5), (2, "fsdp2", 10), (2, "ddp", 13), (4, "fsdp2", 18), (4, "ddp", 23),
                                   (2, "fsdp2", 26), (1, "fsdp2", -1)):
        finished(tmp_path / "changing", "--until", until, "--set", f"parallel={parallel}", "optimizer.ema_decay=0.9",
                 ranks=ranks)
    finished(tmp_path / "exact", "--double")
    exact, one = read_losses(tmp_path / "exact"), whole[1]
    changing = read_losses(tmp_path / "changing")
    assert exact.keys() == one.keys() == changing.keys()
    allowed = 2 * max(abs(one[step] - exact[step]) for step in one)
    assert 0 < max(abs(changing[step] - one[step]) for step in one) <= allowed < 1e-4
    finished(tmp_path / "one", "--set", "optimizer.ema_decay=0.9")  # the average of the weights went along
    averages = [load_weights(list_steps(tmp_path / name / "stage")[0])[0]
                for name in ("changing", "one")]
    live = load_weights(list_steps(tmp_path / "exact" / "stage")[0])[0]
    for name, value in averages[0].items():
        apart = (value - averages[1][name]).norm()
        assert apart <= 0.05 * (averages[1][name] - live[name]).norm() + 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_all(tmp_path, parallel):
    finished(tmp_path, "--poison", 9, "--on", 1, "--set", f"parallel={parallel}", "--save-every", 100, ranks=2)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if "skipped" in line] == [10]
    assert all(torch.isfinite(value).all() for value in outcome(tmp_path)[0].values())


@pytest.mark.slow
def test_one_byte_of_any_checkpoint_file_is_noticed(whole, tmp_path):
    finished(tmp_path)
    newest = list_steps(tmp_path / "stage")[0]
    files, places = sorted(path for path in newest.rglob("*") if path.is_file()), random.Random(1)
    assert len(files) == 5
    for path in files:
        content = path.read_bytes()
        few = [0, len(content) - 1, *(places.randrange(len(content)) for _ in range(8))]
        for place in range(len(content)) if path.name == "manifest.json" else few:
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            found = checkpoint.find(tmp_path / "stage")
            assert found.step == STEPS - 1 and path.name in found.damaged[0], (path.name, place)
        path.write_bytes(content)
    assert checkpoint.find(tmp_path / "stage").step == STEPS
    files[2].write_bytes(b"x")
    assert files[2].name in finished(tmp_path)  # goes on from the one before, and says so
    assert same(outcome(tmp_path), whole)


def test_the_disk_is_full_while_it_saves(whole, tmp_path):
    """A small disk of its own: the run stops with one line, the checkpoints before stay; with room it goes on."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        process = start(tmp_path / "run")
        err = process.communicate(timeout=120)[1]
        assert process.returncode == 2 and "error: cannot write the checkpoint" in err and "Traceback" not in err
        kept = checkpoint.find(tmp_path / "run" / "stage")
        assert kept.step > 0 and not kept.damaged
        subprocess.run(["mount", "-o", "remount,size=16m", str(tmp_path)], check=True)
        finished(tmp_path / "run")
        assert same(outcome(tmp_path / "run"), whole)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=False)


def test_the_log_says_what_was_waited_for_and_how_much_memory(whole, tmp_path):
    finished(tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert all(0 <= line["waiting_for_data"] <= 1 and line["memory_bytes"] > 10 << 20 for line in lines)


OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


def test_wandb_offline_leaves_its_files_with_the_run(whole, tmp_path):
    pytest.importorskip("wandb")
    finished(tmp_path, "--wandb", "project", env=OFFLINE)
    [written] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"stage/loss_text" in written.read_bytes() and same(outcome(tmp_path), whole)


@pytest.mark.slow
def test_wandb_that_cannot_be_reached_stops_nothing(whole, tmp_path):
    pytest.importorskip("wandb")
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    err = finished(tmp_path, "--wandb", "project", env=nowhere)
    assert "wandb is left out from here" in err and "Traceback" not in err and same(outcome(tmp_path), whole)


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_whatever_wandb_raises_is_said_once(tmp_path, monkeypatch, capsys, failing):
    def may_fail(name):
        return Mock(side_effect=ZeroDivisionError("by zero") if name == failing else None)

    stand_in = Mock(log=may_fail("log"), finish=may_fail("finish"))
    begin = may_fail("init")
    begin.return_value = stand_in
    monkeypatch.setitem(sys.modules, "wandb", Mock(init=begin))
    run(tmp_path, config=CONFIG.model_copy(update={"precision": "float32"}), wandb="project")
    assert capsys.readouterr().err.count("wandb is left out from here: by zero") == 1
    assert len(read_losses(tmp_path)) == 6
    assert stand_in.log.call_count == {"init": 0, "log": 1, "finish": 6}[failing]
