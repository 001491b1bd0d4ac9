"""Kernels compile for GPUs that are not there, and need of the chip what the committed table says."""

import json
import os
import subprocess
import sys
import warnings
from importlib import import_module

import pytest
import torch
from conftest import run_command

from onevocab.kernels import aot, tuning


def committed(folder: str) -> dict:
    """An operation's committed table: triton's version -> name -> target -> a row for each kernel."""
    return json.loads(aot.table_path(folder).read_text())


needs_triton = pytest.mark.skipif(
    not aot.backend._HAS_TRITON or os.environ.get("TRITON_INTERPRET") == "1",
    reason="triton is not installed (pip install triton), or its interpreter is switched on",
)


def compare(name: str, target: int) -> None:
    """Compiles one case and compares it with the table; with another Triton only the rules hold."""
    import triton

    rows = aot.in_process(name, target)
    assert aot.problems({name: {str(target): rows}}) == []
    table = committed(aot.FOLDER_OF[name])
    if triton.__version__ not in table:
        warnings.warn(f"triton {triton.__version__} is installed, the committed tables are of {', '.join(table)}: "
                      "only the rules are checked", stacklevel=2)
    else:
        assert rows == table[triton.__version__][name][str(target)], (
            f"{name} for sm_{target} is not what the committed table says; when that is meant, make it anew: "
            f"python -m onevocab.kernels.aot --write --cases {name}"
        )


@needs_triton
@pytest.mark.parametrize("name", [*aot.MAIN, "decode-128-bf16-paged", "cross_entropy-32768-bf16"])
def test_compiles_as_the_table_says(name):
    compare(name, 90)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("name", list(aot.CASES))
def test_every_case_compiles_as_the_table_says(name, target):
    compare(name, target)


@pytest.mark.slow
@needs_triton
def test_the_oldest_triton_compiles_them_as_the_table_says(tmp_path):
    """In an environment of its own: what GPU machines bring is not what this one has."""
    packages = tmp_path / "packages"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", packages, f"triton=={aot.OLDEST}"]
    run_command(pip)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])}
    for name in [*aot.MAIN, "decode-128-bf16-paged", "cross_entropy-32768-bf16", "vq-64-bf16"]:
        command = [sys.executable, "-m", "onevocab.kernels.aot", "--one", name, "--targets", "90"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=aot.TIMEOUT)
        assert done.returncode == 0, done.stderr[-2000:]
        rows = json.loads(done.stdout.splitlines()[-1])
        assert rows == committed(aot.FOLDER_OF[name])[aot.OLDEST][name]["90"], name


@pytest.mark.parametrize("folder", aot.OPERATIONS)
def test_tables_are_complete_and_keep_the_rules(folder):
    tables = committed(folder)
    assert tables
    for table in tables.values():
        assert list(table) == list(aot.OPERATIONS[folder].CASES)
        for name, targets in table.items():
            assert set(targets) == {str(target) for target in aot.TARGETS}, name
            assert all(targets.values()), f"{name} launches no kernel"
        assert aot.problems(table) == []


def test_every_operation_has_what_belongs_to_it():
    """Whatever has Triton kernels has a reference, a torch form, configs, and cases; no name is used twice."""
    folders = {path.parent.name for path in aot.FOLDER.glob("*/*_triton.py")}
    assert folders == set(aot.OPERATIONS)
    for folder in folders:
        parts = {path.stem for path in (aot.FOLDER / folder).glob("*.py")}
        assert {"__init__", "reference", "torch_form", "configs", "aot"} <= parts, folder
    assert len(aot.CASES) == sum(len(module.CASES) for module in aot.OPERATIONS.values())
    names = [{key[0] for key in table} for table in tables()]
    assert len(set().union(*names)) == sum(map(len, names)), "two operations have configs of one name"


def tables() -> list[dict]:
    """The tuning table of each operation."""
    return [import_module(f"onevocab.kernels.{folder}.configs").TABLE for folder in aot.OPERATIONS]


def test_rules_are_noticed():
    row = {"kernel": "forward_kernel", "shared": 0, "LDL": 0, "STL": 0, "HGMMA": 8, "waits": 4, "products": 4,
           "programs": 2}
    main = aot.MAIN[0]
    assert aot.problems({main: {"90": [row]}}) == []
    for change, word in (({"shared": 232_449}, "shared memory"), ({"STL": 1}, "spills"), ({"HGMMA": 0}, "warpgroup"),
                         ({"waits": 8}, "8 waits for 4 products"), ({"programs": 1}, "1 program a multiprocessor")):
        [problem] = aot.problems({main: {"90": [row | change]}})
        assert word in problem
    assert aot.problems({main: {"80": [row | {"shared": 166_913, "HGMMA": 0, "programs": 1}]}}) == [
        f"{main}, sm_80, forward_kernel: 166,913 B of shared memory, limit 166,912"
    ]
    assert aot.problems({"attention-128-fp32": {"90": [row | {"LDL": 1, "HGMMA": 0, "programs": 1}]}}) == []


def test_programs_of_a_multiprocessor():
    """By registers, by shared memory, by threads: against the guide's occupancy rules."""
    assert aot.programs(128, 0, 8, 90) == 2 and aot.programs(129, 0, 8, 90) == 1
    assert aot.programs(32, 76_000, 4, 90) == 3 and aot.programs(32, 76_000, 4, 80) == 2
    assert aot.programs(16, 0, 8, 80) == 8


@needs_triton
@pytest.mark.parametrize("target", aot.TARGETS)
def test_cases_reach_every_row_of_the_tuning_tables(target):
    """Rows for other architectures, and those for none that a row for this one hides, are not to be reached."""
    asked: set = set()
    for call in aot.CASES.values():
        with aot.recording(target, asked) as launched:
            call()
        assert launched
    major = target // 10
    table = {key for each in tables() for key in each}
    with aot.recording(target):
        found = {tuning.config({key: {"row": key} for key in table}, *each, None)["row"] for each in asked}
    hidden = {(name, widest, size, 0) for name, widest, size, of in table if 0 < of <= major}
    older = {key for key in table if key[3] == 8 and (*key[:3], 9) in table} if major == 9 else set()
    missing = {key for key in table if key[3] <= major} - found - hidden - older
    assert not missing, f"no case of an aot.py reaches {missing}"


@needs_triton
@pytest.mark.parametrize("dim", [64, 128])
def test_packed_rows_compute_little_that_nobody_sees(dim):
    """Pairs computed by each kernel on Hopper against visible ones, on the rows that `benchmarks.attention` times."""
    from benchmarks.attention import PRESETS, packed
    from onevocab.kernels.attention import IntervalMask
    from onevocab.kernels.attention.ops_triton import KERNELS, config_for

    shape = PRESETS["packed"].shapes["cuda"]
    document = packed(shape["rows"], shape["length"], shape["documents"])
    mask = IntervalMask.causal(document, mean_keys=shape["length"] / shape["documents"] / 2)
    q = torch.zeros(1, 8, 16, dim, dtype=torch.bfloat16)
    with aot.recording(90):
        configs = {name: config_for(name, q, mask) for name in KERNELS}
    for name, config in configs.items():
        make = mask.transposed_plan if name == "attention_dkdv" else mask.plan
        plan = make(shape["length"], config["block_q"], config["block_k"])
        computed = int((plan[..., 3] - plan[..., 0]).sum()) * config["block_q"] * config["block_k"]
        assert computed <= 1.35 * mask.pairs(shape["length"]), name


@needs_triton
def test_recording_restores_what_it_replaced():
    from triton.runtime.jit import JITFunction

    before = JITFunction.run, tuning.config, os.environ.get(aot.backend.VARIABLE)
    with pytest.raises(ZeroDivisionError), aot.recording(90):
        raise ZeroDivisionError
    assert before == (JITFunction.run, tuning.config, os.environ.get(aot.backend.VARIABLE))


def test_command_line_lists_and_refuses():
    command = [sys.executable, "-m", "onevocab.kernels.aot"]
    assert run_command([*command, "--list"]).split() == list(aot.CASES)
    with pytest.raises(pytest.fail.Exception, match="error: --cases nothing"):
        run_command([*command, "--cases", "nothing"])
