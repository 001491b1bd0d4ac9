"""benchmarks/sweep.py, for the first minutes on a GPU, tried without one."""

import importlib.util
import json
import os
import sys

import pytest
import torch
from conftest import run_command

from benchmarks import sweep
from onevocab.kernels.attention.configs import TABLE

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton"
)


def run_sweep(*words, **environment) -> str:
    command = [sys.executable, "-m", "benchmarks.sweep", *words]
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return run_command(command, env=inherited | {"OMP_NUM_THREADS": "1"} | environment)


def test_the_first_candidates_are_the_table_s_rows():
    """That for long documents, then that for short ones where there is one."""
    for (kernel, dim), candidates in sweep.CANDIDATES.items():
        rows = [TABLE[name, dim, 2, 9] for name in (f"attention_{kernel}", f"attention_{kernel}_short")
                if (name, dim, 2, 9) in TABLE]
        assert [sweep.Config(**row) for row in rows] == [
            each._replace(descriptors=row["descriptors"]) for each, row in zip(candidates, rows, strict=False)]
        assert len(set(candidates)) == len(candidates)
    assert sweep.Config(**TABLE["attention_fused", 64, 2, 9]) in sweep.CANDIDATES["dkdv", 64]


@needs_triton
def test_sweep_compiles_for_a_gpu_that_is_not_there():
    words = ("--candidates", "1", "--dims", "64", "--kernels", "forward")
    [line] = [line for line in run_sweep("--dry", *words).splitlines() if line.startswith("forward 64")]
    assert "(128, 64, 8, 3, 128, 1, 0, 0): " in line and ", 0 spilled loads, 4 waits, 2 programs" in line


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
