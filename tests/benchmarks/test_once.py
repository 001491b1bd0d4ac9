"""benchmarks/sweep.py and benchmarks/once.sh, for the first minutes on a GPU, tried without one."""

import importlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_command

from benchmarks import modules, sweep
from onevocab.kernels.attention.configs import TABLE

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton"
)


def run_sweep(*words, **environment) -> str:
    command = [sys.executable, "-m", "benchmarks.sweep", *words]
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return run_command(command, env=inherited | {"OMP_NUM_THREADS": "1"} | environment)


def test_the_first_candidate_is_the_table_s_row():
    for (kernel, dim), candidates in sweep.CANDIDATES.items():
        row, first = TABLE[f"attention_{kernel}", dim, 2, 9], candidates[0]
        assert [row[name] for name in ("block_q", "block_k", "num_warps", "num_stages")] == list(first[:4])
        assert first.registers == 0 and len(set(candidates)) == len(candidates)


@needs_triton
def test_sweep_compiles_for_a_gpu_that_is_not_there():
    words = ("--candidates", "1", "--dims", "64", "--kernels", "forward")
    [line] = [line for line in run_sweep("--dry", *words).splitlines() if line.startswith("forward 64")]
    assert "(128, 128, 8, 2, 0): " in line and ", 0 spilled loads, 1 programs" in line


@needs_triton
def test_sweep_checks_and_times_in_the_interpreter(tmp_path):
    """All three kernels at a tiny shape: right in float64's eyes, timed, written."""
    words = ("--device", "cpu", "--tiny", "--dims", "64", "--candidates", "1", "--jobs", "1", "--repetitions", "1")
    output = run_sweep(*words, "--out", tmp_path / "sweep.json", TRITON_INTERPRET="1")
    result = json.loads((tmp_path / "sweep.json").read_text())
    assert "3 of 3 are right" in output and {"versions", "device", "commit"} <= set(result)
    rows = [row for row in result["rows"] if "kernel" in row]
    assert {(row["mask"], row["kernel"]) for row in rows} == {
        (mask, kernel) for mask in ("causal", "packed") for kernel in ("forward", "dq", "dkdv")}
    assert all(row["ms"] > 0 and row["error"] < sweep.BOUND and row["config"]["block_q"] for row in rows)


def test_sweep_names_what_is_wrong(monkeypatch):
    """Without the interpreter, on a CPU, nothing can be launched: an error of infinity and a reason."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    job = sweep.Job("forward", 64, sweep.CANDIDATES["forward", 64][0], sweep.TINY, "cpu")
    error, reason = sweep.error_of(job)
    assert error == float("inf") and reason
    with pytest.raises(SystemExit):
        sweep.main(["--dims", "64"] if not torch.cuda.is_available() else ["--dims", "1"])


def listed() -> list[list[str]]:
    """The commands of once.sh, as words."""
    script = ROOT / "benchmarks" / "once.sh"
    output = run_command(["bash", script], env=os.environ | {"LIST": "1", "PYTHON": "python"})
    return [shlex.split(line) for line in output.splitlines()]


def test_once_is_a_script_that_names_what_is_missing():
    script = ROOT / "benchmarks" / "once.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    environment = {key: value for key, value in os.environ.items() if key not in ("OUT", "LIST")}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "OUT is not set" in done.stderr and not done.stdout


def test_once_runs_what_is_there(capsys):
    """Every module, flag, preset, size and provider that it names exists."""
    commands = listed()
    assert len(commands) >= 13 and all(command[:2] == ["python", "-m"] for command in commands)
    known: dict[str, str] = {}
    for _, _, module, *words in commands:
        name = module.removeprefix("benchmarks.")
        if name not in known:
            with pytest.raises(SystemExit) as stop:
                importlib.import_module(module).main(["--help"])
            known[name] = capsys.readouterr().out
            assert stop.value.code == 0 and f"python -m {module}" in known[name]
        flags = [word for word in words if word.startswith("--")]
        assert flags and all(f"{flag} " in known[name] or f"{flag}]" in known[name] for flag in flags), words
        if name not in modules.names():
            continue
        given: dict[str, list[str]] = {}
        for word in words:
            if word.startswith("--"):
                values = given.setdefault(word, [])
            else:
                values.append(word)
        presets = modules.presets(name)
        titles = given.get("--preset", list(presets))
        assert set(titles) <= set(presets), words
        shapes = {key for title in titles for key in presets[title].shapes["cuda"]}
        assert {word.partition("=")[0] for word in given.get("--shape", [])} <= shapes, words
        providers = set().union(*(constants(name) for name in ("attention", name)))
        assert set(given.get("--providers", [])) <= providers | {"ours"}, words


def constants(name: str) -> set[str]:
    """The strings that a benchmark's constants hold: its providers' names among them."""
    module = importlib.import_module(f"benchmarks.{name}")
    return {value for key, value in vars(module).items() if key.isupper() and isinstance(value, str)}
