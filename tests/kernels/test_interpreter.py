"""The Triton kernels on a CPU: `tests/kernels/interpreter` under Triton's interpreter, in a process of its own.

And the tests' test: each deliberate fault of `mutations_*.py` must make one of them fail.
"""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_command
from scratch import link_package

INTERPRETED = Path(__file__).parent / "interpreter"
# So many tests at least: nothing passes because nothing was collected.
FEWEST = {"attention": 48, "cross_entropy": 28, "decode": 26, "elementwise": 42, "vq": 12}
LIMIT = 300  # seconds for the tests of one file, or of one fault; one that makes them hang has not been noticed
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton"
)


def mutations() -> dict[str, tuple[str, str, str, str, str]]:
    """name and operation -> (file, old text, new text, path of tests, -k expression), of all `mutations_*.py`."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("mutations_*.py")):
        operation = path.stem.removeprefix("mutations_")
        found |= {f"{operation}: {name}": fault for name, fault in importlib.import_module(path.stem).MUTATIONS.items()}
    return found


def listed_faults() -> list[str]:
    """A line of docs/kernels.md per file with the names of its faults."""
    names: dict[str, list[str]] = {}
    for name, (file, *_) in mutations().items():
        names.setdefault(file, []).append(name.partition(": ")[2])
    return [f"- `{file}`: {'; '.join(each)}." for file, each in names.items()]


def test_the_page_lists_all_deliberate_faults():
    page = (ROOT / "docs" / "kernels.md").read_text()
    missing = [line for line in listed_faults() if line not in page.splitlines()]
    assert not missing, "docs/kernels.md lacks these lines:\n" + "\n".join(missing)


def passed_under_the_interpreter(path, marked: str) -> int:
    output = run_command(
        [sys.executable, "-m", "pytest", "-q", "-m", marked, "-p", "no:cacheprovider", path],
        timeout=LIMIT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert " skipped" not in output, output[-2000:]
    return int(re.search(r"(\d+) passed", output)[1])


@needs_triton
@pytest.mark.parametrize("path", sorted(INTERPRETED.glob("test_*_triton.py")), ids=lambda path: path.stem)
def test_triton_kernels_under_the_interpreter(path):
    operation = path.stem.removeprefix("test_").removesuffix("_triton")
    assert passed_under_the_interpreter(path, "not slow") >= FEWEST.get(operation, 1)


@needs_triton
@pytest.mark.slow
def test_attention_of_longer_rows_under_the_interpreter():
    assert passed_under_the_interpreter(INTERPRETED / "test_attention_triton.py", "slow") >= 29


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("fault", mutations().values(), ids=mutations().keys())
def test_a_deliberate_fault_is_caught(fault, tmp_path, request):
    """The tests see a copy of kernels/ with one text replaced, as `onevocab.kernels` of a package before ours."""
    file, old, new, tests, expression = fault
    package = link_package(ROOT, tmp_path, leave_out=("kernels",))
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    text = (package / file).read_text()
    assert text.count(old) == 1, f"{file} does not hold {old!r} once"
    (package / file).write_text(text.replace(old, new))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path)}
    if "interpreter" in tests:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", "-p", "no:cacheprovider", tests]
    command += ["-m", "slow or not slow", "-k", expression]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{request.node.callspec.id}: no test failed within {LIMIT} s", pytrace=False)
    assert done.returncode == 1 and re.search(r"\d+ failed", done.stdout), done.stdout[-2000:] + done.stderr[-2000:]
