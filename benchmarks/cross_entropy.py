"""The head's matmul and the cross-entropy: ours beside stored logits, torch.compile and torch's own fused function.

    python -m benchmarks.cross_entropy --out cross_entropy.json

`both` is loss and gradients of hidden states and head. `plain` has neither weights per token nor z-loss, which torch's
`linear_cross_entropy` does not know; `weighted` has both.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import command
from benchmarks.work import OURS, Cost, Preset, Target, Unavailable, Work
from onevocab.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

LOGITS, COMPILED = "logits, F.cross_entropy", "torch.compile of logits, F.cross_entropy"
TORCH, TORCH_PLAIN, LIGER = "F.linear_cross_entropy, chunked", "F.linear_cross_entropy", "Liger Kernel"
Z_LOSS = 1e-4


def stored_logits(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, z_loss: float) -> Tensor:
    """What most training scripts do."""
    logits = F.linear(hidden, head).float() if hidden.dtype != torch.float64 else F.linear(hidden, head)
    if z_loss:
        nll = F.cross_entropy(logits, targets, reduction="none")
        return (weights * (nll + z_loss * logits.logsumexp(-1).square())).sum()
    return F.cross_entropy(logits, targets, reduction="sum")


@functools.cache
def compiled():
    return torch.compile(stored_logits, dynamic=False)


def torchs_own(options: bool):
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
    chunked = {"options": torch.nn.LinearCrossEntropyOptions()} if options else {}
    return lambda hidden, head, targets, _: F.linear_cross_entropy(hidden, head, targets, reduction="sum", **chunked)


def liger():
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Function
    except ImportError:
        raise Unavailable("liger-kernel is not installed") from None
    # input, weight, target, bias, class weights, ignored index, z-loss, smoothing, reduction
    return lambda hidden, head, targets, weights: Function.apply(hidden, head, targets, None, None, -100, 0.0, 0.0,
                                                                 "sum")[0]


def in_pieces(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, z_loss: float) -> Tensor:
    """The definition, 512 rows at a time and computed again in the backward pass. Of 16-bit inputs the logits are
    rounded as a matmul rounds them and what follows is float32: a bound from a 16-bit softmax would pass anything."""
    def loss(x, head, targets, weights):
        if x.dtype.itemsize > 2:
            return linear_cross_entropy_reference(x, head, targets, weights, z_loss).loss
        logits = F.linear(x, head).float()
        lse = logits.logsumexp(-1)
        nll = lse - logits.gather(1, targets[:, None]).squeeze(1)
        return (weights.float() * (nll + z_loss * lse.square())).sum()

    def part(x, t, w):
        return checkpoint(loss, x, head, t, w, use_reentrant=False)

    return sum(part(*each) for each in zip(*(x.split(512) for x in (hidden, targets, weights)), strict=True))


def build(weighted: bool):
    def make(shape: dict, device: torch.device, dtype: torch.dtype) -> Work:
        n, width, vocabulary = shape["tokens"], shape["dim"], shape["vocabulary"]
        z_loss = Z_LOSS if weighted else 0.0

        def inputs():
            head = (torch.randn(vocabulary, width, device=device) * width**-0.5).to(dtype)
            weights = 1 - torch.rand(n, device=device) if weighted else torch.ones(n, device=device)
            if weighted:  # prompts and pictures that are only looked at: a quarter counts nothing
                weights[torch.randperm(n, device=device)[: n // 4]] = 0
            hidden = torch.randn(n, width, device=device).to(dtype)
            return hidden, head, torch.randint(vocabulary, (n,), device=device), weights

        providers = {
            OURS: lambda: lambda *given: linear_cross_entropy(*given, z_loss).loss,
            LOGITS: lambda: lambda *given: stored_logits(*given, z_loss),
            COMPILED: lambda: lambda *given: compiled()(*given, z_loss),
        }
        if not weighted:
            providers |= {TORCH: lambda: torchs_own(True), TORCH_PLAIN: lambda: torchs_own(False), LIGER: liger}
        one = n * width + vocabulary * width
        counted = n - n // 4 if weighted else n  # the rest needs no logits
        costs = {"both": Cost(6 * counted * width * vocabulary, 2 * one * dtype.itemsize)}
        return Work(inputs, providers, lambda *given: in_pieces(*given, z_loss), costs, differentiable=2,
                    operations=("linear_cross_entropy",))

    return make


CPU = {"tokens": 8192, "vocabulary": 32768, "dim": 256}
GPU = {"tokens": 16384, "vocabulary": 65536, "dim": 2048}
TINY = {"tokens": 70, "vocabulary": 101, "dim": 16}
SMALL = Target("memory", "both", (LOGITS,), at_least=4.0)

PRESETS = {
    "plain": Preset(
        "every token counts alike", build(False), {"cpu": CPU, "cuda": GPU, "tiny": TINY},
        {"cpu": [SMALL, Target("time", "both", (LOGITS,), at_most=1.1),
                 Target("time", "both", (TORCH, TORCH_PLAIN), at_most=1.1),
                 Target("memory", "both", (TORCH,), at_most=1.1)],
         "cuda": [SMALL, Target("time", "both", (COMPILED,), at_most=1.1)]},
    ),
    "weighted": Preset(
        "weights per token, a quarter of them zero, and z-loss", build(True), {"cpu": CPU, "cuda": GPU, "tiny": TINY},
        {"cpu": [SMALL, Target("time", "both", (LOGITS,), at_most=1.1)],
         "cuda": [SMALL, Target("time", "both", (COMPILED,), at_most=1.1)]},
    ),
}

main = command.main("cross_entropy", __doc__, PRESETS)

if __name__ == "__main__":
    main()
