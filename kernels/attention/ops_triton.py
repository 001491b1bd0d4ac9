"""Attention under an interval mask on a GPU: launches the kernels of `kernels_triton`, and registers them
with torch as custom operators: shapes for tracing, a backward pass, FLOPs.
"""

import math

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from onevocab.kernels import tuning
from onevocab.kernels.attention.configs import TABLE
from onevocab.kernels.attention.kernels_triton import delta_kernel, dkdv_kernel, dq_kernel, forward_kernel
from onevocab.kernels.attention.mask import IntervalMask, visible_pairs
from onevocab.kernels.backend import on_device

CONFIG = ("block_q", "block_k", "num_warps", "num_stages")  # the order in which a config travels through the ops
KERNELS = ("attention_forward", "attention_dq", "attention_dkdv")


def like(x: Tensor) -> Tensor:
    """An empty (B, H, S, D) that lies in memory as (B, S, H, D): what the model's next projection reads."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _rows_of(x: Tensor) -> Tensor:
    """Kernels take any strides but want a row's D elements side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def sizes(q: Tensor, k: Tensor, intervals: Tensor, config: list[int]) -> dict:
    dim = q.shape[-1]
    return {
        "GROUPS": q.shape[1] // k.shape[1], "D": dim, "BLOCK_D": max(triton.next_power_of_2(dim), 16),
        "TWO": intervals.shape[1] == 4, "BLOCK_Q": config[0], "BLOCK_K": config[1],
        "num_warps": config[2], "num_stages": config[3],
    }  # fmt: skip


@torch.library.custom_op("onevocab::attention", mutates_args=())
@on_device
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, intervals: Tensor, plan: Tensor, plan_dq: Tensor, plan_dkdv: Tensor,
    scale: float, configs: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> out (B, H, S, D), lse (B, H, S). configs: CONFIG of each of KERNELS, in one list."""
    q, k, v = (_rows_of(x) for x in (q, k, v))
    (batch, heads, length, _), out = q.shape, like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    forward_kernel[(plan.shape[1], heads, batch)](
        q, k, v, out, lse, intervals, plan, scale / math.log(2), length, k.shape[2],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        **sizes(q, k, intervals, configs[:4]),
    )  # fmt: skip
    return out, lse


@attention_op.register_fake
def _(q, k, v, intervals, plan, plan_dq, plan_dkdv, scale, configs):
    return like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


@torch.library.custom_op("onevocab::attention_backward", mutates_args=())
@on_device
def attention_backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, intervals: Tensor, plan_dq: Tensor,
    plan_dkdv: Tensor, scale: float, configs: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dq, dk, dv in the shapes of q, k, v."""
    grad, q, k, v, out = (_rows_of(x) for x in (grad, q, k, v, out))
    batch, heads, length, dim = q.shape
    dq, dk, dv, delta = like(q), like(k), like(v), torch.empty_like(lse)
    strides = [step for x in (q, k, v, grad) for step in x.stride()[:3]]
    delta_kernel[(triton.cdiv(length, 64), heads, batch)](
        out, grad, delta, length, *out.stride()[:3], *grad.stride()[:3],
        D=dim, BLOCK_D=max(triton.next_power_of_2(dim), 16), BLOCK_Q=64,
    )  # fmt: skip
    dkdv_kernel[(plan_dkdv.shape[1], k.shape[1], batch)](
        q, k, v, grad, lse, delta, dk, dv, intervals, plan_dkdv, scale, scale / math.log(2), length, k.shape[2],
        *strides, *dk.stride()[:3], *dv.stride()[:3], **sizes(q, k, intervals, configs[8:]),
    )  # fmt: skip
    dq_kernel[(plan_dq.shape[1], heads, batch)](
        q, k, v, grad, lse, delta, dq, intervals, plan_dq, scale, scale / math.log(2), length, k.shape[2],
        *strides, *dq.stride()[:3], **sizes(q, k, intervals, configs[4:8]),
    )  # fmt: skip
    return dq, dk, dv


@attention_backward_op.register_fake
def _(grad, q, k, v, out, lse, intervals, plan_dq, plan_dkdv, scale, configs):
    return like(q), like(k), like(v)


def _save(ctx, inputs, output):
    q, k, v, intervals, _, plan_dq, plan_dkdv, ctx.scale, ctx.configs = inputs
    ctx.save_for_backward(q, k, v, *output, intervals, plan_dq, plan_dkdv)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 9
    return (*attention_backward_op(grad, *ctx.saved_tensors, ctx.scale, ctx.configs), *[None] * 6)


attention_op.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.onevocab.attention, get_raw=True)
def _forward_flops(q, k, v, intervals, *_, **__) -> int:
    """2 matmuls over the visible pairs of each head."""
    return 2 * 2 * visible_pairs(intervals) * q.shape[1] * q.shape[3]


@register_flop_formula(torch.ops.onevocab.attention_backward, get_raw=True)
def _backward_flops(grad, q, k, v, out, lse, intervals, *_, **__) -> int:
    """5 matmuls: the scores again, dP, dQ, dK, dV."""
    return 5 * 2 * visible_pairs(intervals) * q.shape[1] * q.shape[3]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float | None = None) -> Tensor:
    """Like `kernels.attention.attention`, whose checks come before this."""
    configs = [tuning.config(TABLE, name, q.shape[-1], q.dtype, q.device) for name in KERNELS]
    keys = k.shape[2]
    forward, dq, dkdv = ((config["block_q"], config["block_k"]) for config in configs)
    out, _ = attention_op(
        q, k, v, mask.intervals(keys), mask.plan(keys, *forward), mask.plan(keys, *dq),
        mask.transposed_plan(keys, *dkdv), q.shape[-1] ** -0.5 if scale is None else float(scale),
        [config[name] for config in configs for name in CONFIG],
    )  # fmt: skip
    return out
