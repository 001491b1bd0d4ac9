"""The Triton kernels on a CPU: `tests/interpreter` under Triton's interpreter, in a process of its own.

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

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton"
)
def deliberate_faults() -> list:
    """(file, old text, new text, paths of tests, -k expression) of all `mutations_*.py`: dicts, or lists with TESTS."""
    found = []
    for path in sorted(Path(__file__).parent.glob("mutations_*.py")):
        module = importlib.import_module(path.stem)
        if isinstance(module.MUTATIONS, dict):
            for name, (file, old, new, tests, expression) in module.MUTATIONS.items():
                found.append(pytest.param(file, old, new, [tests], expression, id=name))
        else:
            for number, (file, old, new) in enumerate(module.MUTATIONS):
                found.append(pytest.param(file, old, new, module.TESTS[file], "", id=f"{path.stem} {number}"))
    return found


@needs_triton
def test_triton_kernels_under_the_interpreter():
    output = run_command(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreter"],
        timeout=900,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    passed = int(re.search(r"(\d+) passed", output)[1])
    assert passed >= 60 and " skipped" not in output, output[-2000:]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("file,old,new,tests,expression", deliberate_faults())
def test_a_deliberate_fault_is_caught(file, old, new, tests, expression, tmp_path):
    """The tests see a copy of kernels/ with one text replaced, as `onevocab.kernels` of a package before ours."""
    package = tmp_path / "onevocab"
    package.mkdir()
    (package / "__init__.py").touch()
    for folder in ("common", "model", "tokenizers", "data", "training", "generation", "evaluation"):
        (package / folder).symlink_to(ROOT / folder)
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    text = (package / file).read_text()
    assert text.count(old) == 1, f"{file} does not hold {old!r} once"
    (package / file).write_text(text.replace(old, new))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    if any("interpreter" in test for test in tests):
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", "-p", "no:cacheprovider", *tests, "-k", expression],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 1 and re.search(r"\d+ failed", done.stdout), done.stdout[-2000:] + done.stderr[-2000:]
