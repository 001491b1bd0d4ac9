"""Element-wise kernels: RMSNorm (with residual), RMSNorm of heads with rotary positions, SwiGLU.

    python -m benchmarks.norms --out norms.json

All are bound by memory: the measure is the rate of the bytes that have to move, as a part of the copy bandwidth.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks import command
from benchmarks.attention import REFERENCE
from benchmarks.work import OURS, Cost, Preset, Target, Unavailable, Work, roundings_of_sum
from onevocab.kernels.elementwise import (
    qk_norm_rope,
    qk_norm_rope_reference,
    rms_norm,
    rms_norm_reference,
    rotary_reference,
    swiglu,
    swiglu_reference,
)

EPS = 1e-6
TORCH, COMPILED, LIGER = "torch", "torch.compile of the reference", "Liger Kernel"


@functools.cache
def compiled(function: Callable):
    return torch.compile(function, dynamic=False)


def reference(x, weight):
    return rms_norm_reference(x, weight, EPS)


def residual_reference(x, residual, weight):
    return rms_norm_reference(x, weight, EPS, residual)


def rope_reference(x, weight, cos, sin):
    return qk_norm_rope_reference(x, weight, cos, sin, EPS)


def torch_residual(x, residual, weight):
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, EPS), total


def liger(operation: str) -> Callable:
    """Liger's kernel for it, not in place: gradients from above are used again."""
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    except ImportError:
        raise Unavailable("liger-kernel is not installed") from None
    # weight, epsilon, what is added to the weight, which parts are float32, in place
    if operation == "add_rms_norm":
        return lambda x, r, w: LigerFusedAddRMSNormFunction.apply(x, r, w, EPS, 0.0, "llama", False)
    return lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)


# ours, torch's operators, the definition, tensors of (tokens, dim) that forward and both move at least, gradients
OPERATIONS = {
    "rms_norm": (lambda x, w: rms_norm(x, w, EPS), lambda x, w: F.rms_norm(x, w.shape, w, EPS), reference, 2, 5, 2),
    "add_rms_norm": (lambda x, r, w: rms_norm(x, w, EPS, residual=r), torch_residual, residual_reference, 4, 8, 3),
    "qk_norm_rope": (lambda x, w, c, s: qk_norm_rope(x, w, c, s, EPS),
                     lambda x, w, c, s: rotary_reference(F.rms_norm(x, w.shape, w, EPS), c, s),
                     rope_reference, 2, 5, 2),
    "swiglu": (swiglu, lambda gate, up: F.silu(gate) * up, swiglu_reference, 3, 8, 2),
}


def build(operation: str):
    ours, plain, definition, forward, both, differentiable = OPERATIONS[operation]

    def make(shape: dict, device: torch.device, dtype: torch.dtype) -> Work:
        tokens, dim = shape["tokens"], shape["dim"]

        def random(*size):
            return torch.randn(size, device=device).to(dtype)

        def inputs():
            if operation == "rms_norm":
                return random(tokens, dim), random(dim)
            if operation == "add_rms_norm":
                return random(tokens, dim), random(tokens, dim), random(dim)
            if operation == "swiglu":
                return random(tokens, dim), random(tokens, dim)
            head_dim = shape["head_dim"]
            angle = torch.rand(1, tokens, head_dim // 2, device=device) * 6.28
            x = random(1, tokens, dim // head_dim, head_dim)
            return x, random(head_dim), angle.cos().to(dtype), angle.sin().to(dtype)

        providers = {OURS: lambda: ours, TORCH: lambda: plain, COMPILED: lambda: compiled(definition),
                     REFERENCE: lambda: definition}
        if operation in ("rms_norm", "add_rms_norm"):  # its SwiGLU writes gradients over its inputs
            providers[LIGER] = lambda: liger(operation)
        one = tokens * dim * dtype.itemsize
        costs = {"forward": Cost(tokens * dim * 5, forward * one), "both": Cost(tokens * dim * 15, both * one)}
        # The weight's gradient, the last value, is a sum over all tokens (and their heads).
        terms = tokens * (dim // shape["head_dim"] if operation == "qk_norm_rope" else 1)
        ones = (1.0,) * (differentiable + (operation == "add_rms_norm"))
        roundings = ones + ((1.0,) if operation == "swiglu" else (roundings_of_sum(terms),))
        return Work(inputs, providers, definition, costs, differentiable, roundings=roundings,
                    operations=("rms_norm" if operation == "add_rms_norm" else operation,))

    return make


CPU, GPU, TINY = {"tokens": 4096, "dim": 1024}, {"tokens": 32768, "dim": 4096}, {"tokens": 37, "dim": 64}
HEADS = {"cpu": {"head_dim": 64}, "cuda": {"head_dim": 128}, "tiny": {"head_dim": 16}}
DESCRIPTIONS = {"rms_norm": "RMSNorm", "add_rms_norm": "a residual added, then RMSNorm; both results",
                "qk_norm_rope": "RMSNorm of each head, then rotary positions", "swiglu": "silu(gate) * up"}

PRESETS = {
    name: Preset(
        DESCRIPTIONS[name], build(name),
        {kind: size | (HEADS[kind] if name == "qk_norm_rope" else {})
         for kind, size in (("cpu", CPU), ("cuda", GPU), ("tiny", TINY))},
        {"cuda": [Target("copy", "forward", at_least=0.85), Target("copy", "both", at_least=0.85)]},
    )
    for name in OPERATIONS
}

main = command.main("norms", __doc__, PRESETS)

if __name__ == "__main__":
    main()
