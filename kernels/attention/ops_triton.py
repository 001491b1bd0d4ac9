"""Attention under an interval mask on a GPU: launches the kernels of `forward_triton` and `backward_triton`,
and registers them with torch as custom operators: shapes for tracing, a backward pass, FLOPs.
"""

import contextlib
import math

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from onevocab.kernels import tuning
from onevocab.kernels.attention.backward_triton import delta_kernel, dkdv_kernel, dq_kernel
from onevocab.kernels.attention.configs import SHORT, TABLE
from onevocab.kernels.attention.descriptors_triton import descriptor, obstacle
from onevocab.kernels.attention.forward_triton import forward_kernel
from onevocab.kernels.attention.mask import IntervalMask, visible_pairs
from onevocab.kernels.backend import note, on_device

# The order in which a config travels through the ops.
CONFIG = ("block_q", "block_k", "num_warps", "num_stages", "maxnreg", "descriptors", "ahead", "fused")
KERNELS = ("attention_forward", "attention_dq", "attention_dkdv")


def like(x: Tensor) -> Tensor:
    """An empty (B, H, S, D) that lies in memory as (B, S, H, D): what the model's next projection reads."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _rows_of(x: Tensor) -> Tensor:
    """Kernels take any strides but want a row's D elements side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def config_for(kernel: str, q: Tensor, mask: IntervalMask) -> tuning.Config:
    """The table's row; that for short documents where there is one and the mask is known to be of such."""
    if mask.mean_keys is not None and mask.mean_keys <= SHORT:
        with contextlib.suppress(ValueError):
            return tuning.config(TABLE, f"{kernel}_short", q.shape[-1], q.dtype, q.device)
    return tuning.config(TABLE, kernel, q.shape[-1], q.dtype, q.device)


def complete(config: tuning.Config) -> dict[str, int]:
    """All of CONFIG; what a table's row does not name is 0."""
    return {name: config.get(name, 0) for name in CONFIG}


def settings(configs: list[int], kernel: str) -> dict[str, int]:
    """One kernel's config from the list of all."""
    at = KERNELS.index(kernel) * len(CONFIG)
    return dict(zip(CONFIG, configs[at : at + len(CONFIG)], strict=True))


def operands(config: dict[str, int], queries: dict[str, Tensor], keys: dict[str, Tensor]) -> tuple[list, bool]:
    """What a kernel reads tiles from, and whether these are descriptors: where the config asks for them and they can
    address every tensor. Where they cannot, pointers give the same results, and `chosen()` says so."""
    tensors = queries | keys
    if config["descriptors"]:
        why = obstacle(**tensors)
        if why is None:
            return [descriptor(x, config["block_q"]) for x in queries.values()] + \
                   [descriptor(x, config["block_k"]) for x in keys.values()], True
        note("attention", f"by pointers: {why}")
    return list(tensors.values()), False


def launch_options(q: Tensor, k: Tensor, intervals: Tensor, config: dict[str, int], descriptors: bool) -> dict:
    dim = q.shape[-1]
    return {
        "GROUPS": q.shape[1] // k.shape[1], "D": dim, "BLOCK_D": max(triton.next_power_of_2(dim), 16),
        "TWO": intervals.shape[1] == 4, "BLOCK_Q": config["block_q"], "BLOCK_K": config["block_k"],
        "DESCRIPTORS": descriptors, "num_warps": config["num_warps"], "num_stages": config["num_stages"],
        **({"maxnreg": config["maxnreg"]} if config["maxnreg"] else {}),
    }  # fmt: skip


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, intervals: Tensor, plan: Tensor, scale: float, config: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """-> out, lse. Here and below: rows of q, k, v and grad lie side by side; config has all of CONFIG."""
    out, lse = like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    tiles, descriptors = operands(config, {"q": q}, {"k": k, "v": v})
    forward_kernel[(plan.shape[1], q.shape[1], len(q))](
        *tiles, out, lse, intervals, plan, scale / math.log(2), q.shape[2], k.shape[2], *_steps(q, k, v, out),
        AHEAD=bool(config["ahead"] and descriptors), **launch_options(q, k, intervals, config, descriptors),
    )  # fmt: skip
    return out, lse


def launch_delta(out: Tensor, grad: Tensor) -> Tensor:
    """-> delta (B, H, S)."""
    batch, heads, length, dim = out.shape
    delta = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    delta_kernel[(triton.cdiv(length, 64), heads, batch)](
        out, grad, delta, length, *_steps(out, grad), D=dim, BLOCK_D=max(triton.next_power_of_2(dim), 16), BLOCK_Q=64,
    )  # fmt: skip
    return delta


def launch_dq(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, intervals: Tensor, plan: Tensor,
    scale: float, config: dict[str, int],
) -> Tensor:  # fmt: skip
    dq = like(q)
    (q_tile, grad_tile, k_tile, v_tile), descriptors = operands(config, {"q": q, "grad": grad}, {"k": k, "v": v})
    dq_kernel[(plan.shape[1], q.shape[1], len(q))](
        q_tile, k_tile, v_tile, grad_tile, lse, delta, dq, intervals, plan, scale, scale / math.log(2), q.shape[2],
        k.shape[2], *_steps(q, k, v, grad, dq), **launch_options(q, k, intervals, config, descriptors),
    )  # fmt: skip
    return dq


def launch_dkdv(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, intervals: Tensor, plan: Tensor,
    scale: float, config: dict[str, int],
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> dk, dv; where the config is fused also dq."""
    dk, dv = like(k), like(v)
    sums = {"sums": q.new_zeros(q.shape, dtype=torch.float32)} if config["fused"] else {}
    tiles, descriptors = operands(config, {"q": q, "grad": grad, **sums}, {"k": k, "v": v})
    q_tile, grad_tile, *sums_tile, k_tile, v_tile = tiles
    dkdv_kernel[(plan.shape[1], k.shape[1], len(q))](
        q_tile, k_tile, v_tile, grad_tile, lse, delta, dk, dv, *(sums_tile or [None]), intervals, plan, scale,
        scale / math.log(2), q.shape[2], k.shape[2], *_steps(q, k, v, grad, dk, dv), FUSED=bool(sums),
        **launch_options(q, k, intervals, config, descriptors),
    )  # fmt: skip
    return dk, dv, *(like(q).copy_(each.mul_(scale)) for each in sums.values())


def _steps(*tensors: Tensor) -> list[int]:
    """The first three strides of each."""
    return [step for x in tensors for step in x.stride()[:3]]


@torch.library.custom_op("onevocab::attention", mutates_args=())
@on_device
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, intervals: Tensor, plan: Tensor, plan_dq: Tensor, plan_dkdv: Tensor,
    scale: float, configs: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> out (B, H, S, D), lse (B, H, S). configs: CONFIG of each of KERNELS, in one list."""
    q, k, v = (_rows_of(x) for x in (q, k, v))
    return launch_forward(q, k, v, intervals, plan, scale, settings(configs, "attention_forward"))


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
    given = q, k, v, grad, lse, launch_delta(out, grad), intervals
    dk, dv, *dq = launch_dkdv(*given, plan_dkdv, scale, settings(configs, "attention_dkdv"))
    if not dq:
        dq = [launch_dq(*given, plan_dq, scale, settings(configs, "attention_dq"))]
    return *dq, dk, dv


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


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float | None = None, deterministic: bool = True
) -> Tensor:
    """Like `kernels.attention.attention`, whose checks come before this."""
    configs = {name: config_for(name, q, mask) for name in KERNELS}
    if not deterministic:
        try:
            configs["attention_dkdv"] = tuning.config(TABLE, "attention_fused", q.shape[-1], q.dtype, q.device)
        except ValueError as error:
            note("attention", f"deterministic: {error}")
    keys = k.shape[2]
    forward, dq, dkdv = ((config["block_q"], config["block_k"]) for config in configs.values())
    out, _ = attention_op(
        q, k, v, mask.intervals(keys), mask.plan(keys, *forward), mask.plan(keys, *dq),
        mask.transposed_plan(keys, *dkdv), q.shape[-1] ** -0.5 if scale is None else float(scale),
        [value for config in configs.values() for value in complete(config).values()],
    )  # fmt: skip
    return out
