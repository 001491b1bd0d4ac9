"""Which implementation runs, and which config its kernels get."""

import pytest
import torch

from onevocab.kernels import backend, c_library, tuning
from onevocab.kernels.attention import IntervalMask, attention, attention_reference
from onevocab.kernels.attention.configs import TABLE


def test_the_backend_can_be_asked_for_and_says_what_it_chose(monkeypatch):
    x = [torch.randn(1, heads, 8, 16) for heads in (2, 1, 1)]
    monkeypatch.delenv("ONEVOCAB_KERNELS", raising=False)
    mask = IntervalMask.causal(torch.zeros(1, 8))
    attention(*(each.double() for each in x), mask)
    assert backend.chosen()["attention"] == ("torch", "tensors on cpu; the C kernel has no torch.float64")
    if c_library.library("attention"):
        attention(*x, mask)
        assert backend.chosen()["attention"] == ("c", "tensors on cpu")
    attention(*x)
    assert backend.chosen()["attention"] == ("torch", "tensors on cpu; torch's own kernel is as fast without a mask")
    with pytest.raises(ValueError, match="asks for c, but its C kernel takes head dims .* multiples of 16, not 8"):
        attention(*(each[..., :8] for each in x), mask, backend="c")
    monkeypatch.setenv("ONEVOCAB_KERNELS", "reference")
    assert torch.equal(attention(*x), attention_reference(*x))
    assert backend.chosen()["attention"] == ("reference", "the environment variable ONEVOCAB_KERNELS")
    attention(*x, backend="torch")
    assert backend.chosen()["attention"] == ("torch", "the argument backend")
    monkeypatch.setenv("ONEVOCAB_KERNELS", "fast")
    with pytest.raises(ValueError, match="'fast'; it can be triton, c, torch, reference"):
        attention(*x)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="asks for triton, but"):
        attention(*x, backend="triton")


def test_the_table_of_configs():
    cpu, half = torch.device("cpu"), torch.bfloat16
    row = TABLE["attention_forward", 128, 2, 0]
    wide = tuning.config(TABLE, "attention_forward", 96, half, cpu)
    assert wide == row and wide is not row
    with tuning.forced(attention_forward={"block_q": 16}):
        with tuning.forced(attention_forward={"block_k": 16}, attention_dq={"num_warps": 1}):
            assert tuning.config(TABLE, "attention_forward", 96, half, cpu) == {**wide, "block_q": 16, "block_k": 16}
        assert tuning.config(TABLE, "attention_forward", 96, half, cpu) == {**wide, "block_q": 16}
    assert tuning.config(TABLE, "attention_forward", 96, half, cpu) == wide
    for operation, width in (("attention_forward", 257), ("sideways", 16)):
        with pytest.raises(ValueError, match=f"{operation}: no config for width {width}"):
            tuning.config(TABLE, operation, width, half, cpu)
