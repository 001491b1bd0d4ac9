"""Kernels compile for GPUs that are not there, and need of the chip what the committed table says."""

import json
import os
import warnings
from importlib import import_module

import pytest
from conftest import run_command

from onevocab.kernels import aot, tuning


def committed(folder: str) -> dict:
    """An operation's committed table: triton's version, and name -> target -> a row for each kernel."""
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
    if triton.__version__ != table["triton"]:
        warnings.warn(f"triton {triton.__version__} is installed, the committed table is of {table['triton']}: "
                      "only its rules are checked", stacklevel=2)
    else:
        assert rows == table["cases"][name][str(target)], (
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


@pytest.mark.parametrize("folder", aot.OPERATIONS)
def test_table_is_complete_and_keeps_the_rules(folder):
    table = committed(folder)
    assert list(table["cases"]) == list(aot.OPERATIONS[folder].CASES)
    for name, targets in table["cases"].items():
        assert set(targets) == {str(target) for target in aot.TARGETS}, name
        assert all(targets.values()), f"{name} launches no kernel"
    assert aot.problems(table["cases"]) == []


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
    row = {"kernel": "forward_kernel", "shared": 0, "LDL": 0, "STL": 0, "HGMMA": 8}
    main = aot.MAIN[0]
    assert aot.problems({main: {"90": [row]}}) == []
    for change, word in (({"shared": 232_449}, "shared memory"), ({"STL": 1}, "spills"), ({"HGMMA": 0}, "warpgroup")):
        [problem] = aot.problems({main: {"90": [row | change]}})
        assert word in problem
    assert aot.problems({main: {"80": [row | {"shared": 166_913, "STL": 1, "HGMMA": 0}]}}) == [
        f"{main}, sm_80, forward_kernel: 166,913 B of shared memory, limit 166,912"
    ]


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
def test_recording_restores_what_it_replaced():
    from triton.runtime.jit import JITFunction

    before = JITFunction.run, tuning.config, os.environ.get(aot.backend.VARIABLE)
    with pytest.raises(ZeroDivisionError), aot.recording(90):
        raise ZeroDivisionError
    assert before == (JITFunction.run, tuning.config, os.environ.get(aot.backend.VARIABLE))


def test_command_line_lists_and_refuses():
    import sys

    command = [sys.executable, "-m", "onevocab.kernels.aot"]
    assert run_command([*command, "--list"]).split() == list(aot.CASES)
    with pytest.raises(pytest.fail.Exception, match="error: --cases nothing"):
        run_command([*command, "--cases", "nothing"])
