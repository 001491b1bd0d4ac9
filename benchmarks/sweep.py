"""Configs of the attention kernels on this GPU: compiled side by side, checked, timed; torch's peers beside them.

    python -m benchmarks.sweep --out sweep.json --seconds 170
    python -m benchmarks.sweep --dry              compiles every candidate for sm_90 on a machine without a GPU

1. A pool of processes launches each candidate once on a small problem: that fills Triton's cache on disk, and the
   result is compared with float64.
2. One process times what was right on the large shapes, the median of several calls. What there is no time for is left
   out. The fastest belong into kernels/attention/configs.py.

Runs from a plain checkout. On a CPU (`--device cpu --tiny`) it can only be tried out, in Triton's interpreter.
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.attention import packed, sdpa
from benchmarks.check import first_line
from onevocab.common.errors import UserError, cli
from onevocab.common.files import write_json
from onevocab.common.provenance import provenance
from onevocab.kernels.attention import IntervalMask, attention_reference


class Config(NamedTuple):
    block_q: int
    block_k: int
    warps: int
    stages: int
    registers: int = 0  # at most so many a thread; 0: as many as the compiler likes


# (kernel, head dim) -> candidates; the first of each is the table's row. Compiled by Triton 3.6.0 for sm_90 with one
# interval, all are without spills unless marked.
CANDIDATES: dict[tuple[str, int], list[Config]] = {
    ("forward", 128): [
        Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 64, 4, 2), Config(64, 64, 4, 3),
        Config(128, 32, 8, 3, 128), Config(128, 32, 8, 4, 128), Config(128, 128, 8, 2),  # the last: 9 spilled loads
    ],
    ("forward", 64): [
        Config(128, 128, 8, 2), Config(128, 128, 8, 3), Config(128, 64, 8, 3), Config(128, 64, 8, 4),
        Config(64, 64, 4, 3), Config(64, 128, 4, 3), Config(128, 32, 4, 4),
    ],
    ("dq", 128): [
        Config(128, 64, 8, 2), Config(128, 64, 8, 3), Config(64, 64, 4, 2), Config(128, 32, 8, 2, 128),
        Config(64, 32, 4, 3),
    ],
    ("dq", 64): [
        Config(128, 64, 8, 2), Config(128, 64, 8, 2, 128), Config(128, 64, 8, 3, 128), Config(64, 64, 4, 3),
        Config(128, 128, 8, 2), Config(64, 128, 4, 2),
    ],
    ("dkdv", 128): [  # 32 x 64, 64 x 64 and 64 x 128: 4, 3 and 70 spilled loads
        Config(32, 128, 8, 3), Config(32, 128, 8, 2), Config(32, 64, 4, 3), Config(64, 64, 8, 2),
        Config(64, 128, 8, 2), Config(16, 128, 8, 3),
    ],
    ("dkdv", 64): [
        Config(64, 128, 8, 2), Config(64, 128, 8, 3), Config(64, 64, 4, 2), Config(64, 64, 4, 3), Config(32, 64, 4, 3),
        Config(32, 128, 8, 3),
    ],
}  # fmt: skip
DIMS = (128, 64)
SMALL = {"rows": 1, "length": 640, "documents": 3, "heads": 4, "kv_heads": 1}
LARGE = {name: {"rows": 4, "length": 8192, "documents": documents, "heads": 32, "kv_heads": 8}
         for name, documents in (("causal", 1), ("packed", 16))}
TINY = {"rows": 1, "length": 70, "documents": 2, "heads": 2, "kv_heads": 1}
FLOPS = {"forward": 4, "dq": 6, "dkdv": 8}  # executed, per visible pair, head and dim; a fused backward pass has 10
PEERS = {"flash": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION"}
BOUND = 1e-2  # relative error, by norms, of a bfloat16 kernel that is right
SHARED, REGISTERS = 232_448, 65_536  # bytes and 4-byte registers of a multiprocessor of sm_90


class Problem(NamedTuple):
    q: Tensor  # (rows, heads, length, dim), as are k and v with heads of their own
    k: Tensor
    v: Tensor
    grad: Tensor  # the gradient from above, like q
    mask: IntervalMask


class Launch(NamedTuple):
    call: Callable[[], object]  # launches one kernel
    filled: tuple[Tensor, ...]  # by each call


class Job(NamedTuple):
    kernel: str
    dim: int
    config: Config
    shape: dict[str, int]
    device: str


def problem(dim: int, shape: dict[str, int], device: str) -> Problem:
    rows, length, heads, kv_heads = (shape[name] for name in ("rows", "length", "heads", "kv_heads"))
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(rows, length, n, dim, generator=generator).to(device, torch.bfloat16).transpose(1, 2)
               for n in (heads, kv_heads, kv_heads, heads)]
    return Problem(*tensors, IntervalMask.causal(packed(rows, length, shape["documents"]).to(device)))


def launch(kernel: str, config: Config, given: Problem, forward: dict[str, Tensor]) -> Launch:
    """One kernel with this config, ready to launch. forward: lse and delta of the forward pass, for the backward."""
    from onevocab.kernels.attention import kernels_triton as kernels
    from onevocab.kernels.attention.ops_triton import like, sizes

    q, k, v, grad, mask = given
    batch, heads, length = q.shape[:3]
    keys, scale = k.shape[2], q.shape[-1] ** -0.5
    spans, log2 = mask.intervals(keys), scale / math.log(2)
    options = sizes(q, k, spans, list(config[:4])) | ({"maxnreg": config.registers} if config.registers else {})
    strides = [step for x in (q, k, v, grad) for step in x.stride()[:3]]
    if kernel == "forward":
        out, lse = like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        plan = mask.plan(keys, config.block_q, config.block_k)
        return Launch(lambda: kernels.forward_kernel[(plan.shape[1], heads, batch)](
            q, k, v, out, lse, spans, plan, log2, length, keys, *strides[:9], *out.stride()[:3], **options), (out, lse))
    lse, delta = forward["lse"], forward["delta"]
    if kernel == "dq":
        dq, plan = like(q), mask.plan(keys, config.block_q, config.block_k)
        return Launch(lambda: kernels.dq_kernel[(plan.shape[1], heads, batch)](
            q, k, v, grad, lse, delta, dq, spans, plan, scale, log2, length, keys, *strides, *dq.stride()[:3],
            **options), (dq,))
    dk, dv, plan = like(k), like(v), mask.transposed_plan(keys, config.block_q, config.block_k)
    return Launch(lambda: kernels.dkdv_kernel[(plan.shape[1], k.shape[1], batch)](
        q, k, v, grad, lse, delta, dk, dv, spans, plan, scale, log2, length, keys, *strides, *dk.stride()[:3],
        *dv.stride()[:3], **options), (dk, dv))


def forward_results(given: Problem) -> dict[str, Tensor]:
    """lse and delta, by the table's own forward pass."""
    from onevocab.kernels.attention import kernels_triton as kernels

    q, grad = given.q, given.grad
    forward = launch("forward", CANDIDATES["forward", q.shape[-1]][0], given, {})
    forward.call()
    out, lse = forward.filled
    delta = torch.empty_like(lse)
    kernels.delta_kernel[(-(-q.shape[2] // 64), q.shape[1], q.shape[0])](
        out, grad, delta, q.shape[2], *out.stride()[:3], *grad.stride()[:3], D=q.shape[-1], BLOCK_D=q.shape[-1],
        BLOCK_Q=64)  # fmt: skip
    return {"lse": lse, "delta": delta}


def error_of(job: Job) -> tuple[float, str | None]:
    """The relative error against float64, and why there is none. Compiles by launching, in a process of its own."""
    try:
        given = problem(job.dim, job.shape, job.device)
        leaves = [x.double().requires_grad_() for x in given[:3]]
        out = attention_reference(*leaves, given.mask)
        dq, dk, dv = torch.autograd.grad(out, leaves, given.grad.double())
        exact = {"forward": (out.detach(),), "dq": (dq,), "dkdv": (dk, dv)}[job.kernel]
        ready = launch(job.kernel, job.config, given, forward_results(given))
        for x in ready.filled:
            x.fill_(float("nan"))
        ready.call()
        measure.synchronize(given.q.device)
        pairs = zip(ready.filled, exact, strict=False)  # lse is not compared
        errors = [((result.double() - value).norm() / value.norm()).item() for result, value in pairs]
        return max(math.inf if math.isnan(error) else error for error in errors), None
    except Exception as error:
        return math.inf, first_line(error)


def check_all(jobs: list[Job], processes: int) -> dict[tuple[str, int, Config], float]:
    """(kernel, dim, config) -> error, of those that are right; the others are named."""
    right = {}
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=get_context("spawn")) as pool:
        for job, (error, why) in zip(jobs, pool.map(error_of, jobs), strict=True):
            if error < BOUND:
                right[job.kernel, job.dim, job.config] = error
            else:
                name = f"{job.kernel} {job.dim} {tuple(job.config)}"
                print(f"left out: {name}: error {error:.3g} {why or ''}", flush=True)
    print(f"{len(right)} of {len(jobs)} are right", flush=True)
    return right


def median(call: Callable[[], object], device: torch.device, repetitions: int) -> float:
    """Milliseconds, after a call that warms up."""
    call()
    return 1e3 * statistics.median(measure.time_once(lambda _: call(), i, device) for i in range(repetitions))


def time_peers(given: Problem, repetitions: int) -> dict[str, float]:
    """Milliseconds of SDPA's backends on plain causal rows, forward and backward, of those that run here."""
    times = {}
    leaves = [x.detach().requires_grad_() for x in given[:3]]
    for name, backend in PEERS.items():
        try:
            run = sdpa(backend)
            with torch.no_grad():
                times[f"{name} forward"] = median(lambda: run(*leaves), given.q.device, repetitions)  # noqa: B023
            out = run(*leaves)
            times[f"{name} backward"] = median(
                lambda: torch.autograd.grad(out, leaves, given.grad, retain_graph=True),  # noqa: B023
                given.q.device, repetitions)  # fmt: skip
        except Exception as error:
            print(f"  not run: {name}: {first_line(error)}", flush=True)
    return times


def time_shape(title: str, dim: int, given: Problem, right: dict, deadline: float, repetitions: int) -> list[dict]:
    """A row for each peer and for each config that is right, as far as the time goes."""
    device, forward, pairs = given.q.device, forward_results(given), given.mask.pairs(given.k.shape[2])
    rows = []
    if title == "causal":
        times = time_peers(given, repetitions)
        rows += [{"dim": dim, "mask": title, "peer": name, "ms": ms} for name, ms in times.items()]
    for (kernel, of, config), error in right.items():
        if of != dim or time.monotonic() > deadline:
            continue
        ms = median(launch(kernel, config, given, forward).call, device, repetitions)
        rows.append({"dim": dim, "mask": title, "kernel": kernel, "config": config._asdict(), "ms": ms,
                     "tflops": FLOPS[kernel] * pairs * given.q.shape[1] * dim / ms / 1e9, "error": error})
    for row in rows:
        print("  " + " ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()),
              flush=True)
    return rows


def dry(chosen: dict[tuple[str, int], list[Config]]) -> None:
    """Compiles for sm_90 and prints what each candidate needs; no GPU is there."""
    from triton.backends.compiler import GPUTarget

    from onevocab.kernels import aot

    for (kernel, dim), configs in chosen.items():
        given = problem(dim, SMALL, "cpu")
        for config in configs:
            with aot.recording(90) as launched:
                forward = forward_results(given)
                launched.clear()
                launch(kernel, config, given, forward).call()
            compiled, _ = aot.compile_launch(*launched[0], GPUTarget("cuda", 90, 32))
            use = aot.usage(compiled.asm["cubin"])
            a_program = -(-use["reg"] // 8) * 8 * 32 * config.warps  # registers are handed out to a warp by 256
            fit = min(REGISTERS // a_program, SHARED // (compiled.metadata.shared + 1024))
            print(f"{kernel} {dim} {tuple(config)}: {use['reg']} registers, {use['LDL']} spilled loads, "
                  f"{fit} programs a multiprocessor", flush=True)


@cli
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="JSON, written anew after each shape")
    parser.add_argument("--seconds", type=float, default=170, help="for everything; what does not fit is left out")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile and check")
    parser.add_argument("--dims", type=int, nargs="+", choices=DIMS, default=DIMS)
    parser.add_argument("--kernels", nargs="+", choices=tuple(FLOPS), default=tuple(FLOPS))
    parser.add_argument("--candidates", type=int, default=None, metavar="N", help="the first N of each list")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--dry", action="store_true", help="compiles for sm_90 only, without a GPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to try it out")
    parser.add_argument("--tiny", action="store_true", help="shapes for trying it out")
    args = parser.parse_args(argv)
    chosen = {(kernel, dim): CANDIDATES[kernel, dim][: args.candidates] for dim in args.dims for kernel in args.kernels}
    if args.dry:
        dry(chosen)
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU here; --dry compiles for one that is not there")
    if args.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, here and in the pool
    deadline = time.monotonic() + args.seconds
    jobs = [Job(kernel, dim, config, TINY if args.tiny else SMALL, args.device)
            for (kernel, dim), configs in chosen.items() for config in configs]
    right = check_all(jobs, args.jobs)
    rows: list[dict] = []
    for dim in args.dims:
        for title, shape in LARGE.items():
            print(f"{title}, head dim {dim}", flush=True)
            given = problem(dim, TINY | {"documents": shape["documents"]} if args.tiny else shape, args.device)
            rows += time_shape(title, dim, given, right, deadline, args.repetitions)
            if args.out:
                write_json(args.out, {"benchmark": "sweep", **provenance(), "rows": rows})
    if len(right) < len(jobs):
        raise UserError(f"{len(jobs) - len(right)} of {len(jobs)} configs are wrong or do not run here")


if __name__ == "__main__":
    main()
