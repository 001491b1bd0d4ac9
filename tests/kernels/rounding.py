"""What the tests of the CPU's paths share: no more rounding than the reference has itself."""

import pytest
import torch

from onevocab.kernels import c_library
from onevocab.kernels.backend import forced


def no_worse(function, reference, *inputs, seed=0):
    """Output and gradients of `function` in float32 are within twice the reference's own float32 rounding."""
    results = []
    for call, dtype in ((function, torch.float32), (reference, torch.float32), (reference, torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = call(*leaves)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        results.append([out.detach(), *torch.autograd.grad((out * weight.to(dtype)).sum(), leaves)])
    tiny = 1e-6 * max(exact.abs().max() for exact in results[2])  # where the reference happens to be exact
    for got, plain, exact in zip(*results, strict=True):
        assert torch.isfinite(got).all()
        assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max() + tiny
    return results[0]


def chosen_and_torch(operation: str):
    """A fixture that runs every test of a module twice: with the kernels in C where a CPU would take them, and with
    torch alone. Its value says which: "chosen" or "torch"."""

    @pytest.fixture(params=["chosen", "torch"], autouse=True)
    def backend(request):
        if request.param == "chosen" and not c_library.library(operation):
            pytest.skip("no C compiler: torch is what is chosen")
        with forced(None if request.param == "chosen" else "torch"):
            yield request.param

    return backend
