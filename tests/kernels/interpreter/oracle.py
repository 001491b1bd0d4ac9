"""What the tests of these kernels share: a float64 oracle."""

import torch

TINY = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of the largest: one rounding
TYPES = [torch.float32, torch.bfloat16]


def no_worse(function, reference, *inputs, kinds=None, check=None):
    """Outputs and gradients of `function` are within twice the rounding of `reference` in the same precision.

    Both get `inputs` in `kinds` (one type, or one per input), the oracle the same numbers in float64. Returns the
    outputs and gradients of `function`. With `check`, the indices of the outputs that are given a gradient.
    """
    kinds = [kinds or torch.float32] * len(inputs) if not isinstance(kinds, list) else kinds
    inputs = [x.to(kind) for x, kind in zip(inputs, kinds, strict=True)]
    results = []
    for call, double in ((function, False), (reference, False), (reference, True)):
        leaves = [x.detach().double() if double else x.detach().clone() for x in inputs]
        leaves = [x.requires_grad_() for x in leaves]
        outs = call(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        loss = 0
        for i, out in enumerate(outs):
            if check is None or i in check:
                towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
                loss = loss + (out * towards.to(out.dtype)).sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=check is not None)
        results.append([*(out.detach() for out in outs), *grads])
    tiny = TINY[min(kinds, key=lambda kind: kind.itemsize)]
    for got, plain, exact in zip(*results, strict=True):
        if exact is None:
            assert got is None or (got == 0).all()
            continue
        assert got.shape == plain.shape and (got.dtype == plain.dtype or got.dtype == torch.float32)
        assert torch.isfinite(got).all()
        assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max() + tiny * exact.abs().max()
    return results[0]
