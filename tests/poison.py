"""Memory in which nothing that a kernel forgets to write goes unseen."""

import contextlib

import torch


@contextlib.contextmanager
def poisoned_memory():
    """Within the block every tensor made without a value starts as NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3, 5).transpose(0, 1).new_empty(4).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
