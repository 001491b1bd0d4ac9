"""Tests of the Triton kernels under Triton's interpreter, on a CPU.

They need TRITON_INTERPRET=1 before triton is first imported, so `tests/kernels/test_interpreter.py` runs this
folder in a process of its own; without the variable nothing here is collected.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every tensor made without a value starts as NaN: what a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3, 5).transpose(0, 1).new_empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
