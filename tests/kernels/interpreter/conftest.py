"""Tests of the Triton kernels under Triton's interpreter, on a CPU.

They need TRITON_INTERPRET=1 before triton is first imported, so `tests/kernels/test_interpreter.py` runs this
folder in a process of its own; without the variable nothing here is collected.
"""

import os

import pytest
from poison import poisoned_memory

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def nothing_unwritten():
    with poisoned_memory():
        yield
