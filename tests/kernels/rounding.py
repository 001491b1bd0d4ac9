"""What the tests of the CPU's paths share: no more rounding than the reference has itself."""

import torch


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
