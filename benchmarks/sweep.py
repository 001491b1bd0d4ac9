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
from contextlib import contextmanager
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
    """A row of the tuning table, in its order."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    maxnreg: int = 0  # at most so many registers a thread; 0: as many as the compiler likes
    descriptors: int = 1
    ahead: int = 0  # scores a block ahead of the softmax
    fused: int = 0  # dQ by atomics, not deterministic


# (kernel, head dim) -> candidates; the first of each is the table's row, then, where there is one, that for short
# documents. Compiled for sm_90 with one interval by Triton 3.6.0, all are without spills and without products that wait
# for themselves unless marked.
CANDIDATES: dict[tuple[str, int], list[Config]] = {
    ("forward", 128): [
        Config(128, 32, 8, 3, 128), Config(64, 64, 4, 2), Config(128, 64, 8, 3), Config(128, 128, 8, 2),
        Config(64, 64, 4, 2, ahead=1), Config(128, 64, 8, 3, ahead=1), Config(64, 64, 4, 3), Config(64, 128, 4, 2),
        Config(128, 128, 8, 2, ahead=1), Config(128, 64, 8, 3, descriptors=0),
    ],
    ("forward", 64): [
        Config(128, 64, 8, 3, 128), Config(64, 64, 4, 3), Config(128, 128, 8, 2), Config(64, 128, 4, 2),
        Config(64, 64, 4, 3, ahead=1), Config(128, 128, 8, 2, ahead=1), Config(128, 64, 4, 3),
        Config(128, 128, 8, 2, descriptors=0),
    ],
    ("dq", 128): [
        Config(64, 64, 4, 2), Config(128, 64, 8, 2), Config(128, 32, 8, 2, 128), Config(64, 32, 4, 3),
        Config(128, 64, 8, 2, descriptors=0),
    ],
    ("dq", 64): [
        Config(128, 64, 8, 2, 128), Config(64, 64, 4, 2), Config(64, 64, 4, 3), Config(128, 128, 8, 2),
        Config(128, 64, 8, 2, descriptors=0),
    ],
    ("dkdv", 128): [  # 64 x 64: 18 spilled loads
        Config(32, 64, 4, 3), Config(32, 128, 8, 3), Config(32, 64, 4, 2), Config(64, 64, 4, 2),
        Config(32, 128, 8, 3, descriptors=0),
    ],
    ("dkdv", 64): [
        Config(64, 64, 4, 2), Config(64, 128, 8, 2), Config(64, 64, 4, 3), Config(64, 128, 8, 2, fused=1),
        Config(64, 128, 8, 2, descriptors=0),
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


class Problem(NamedTuple):
    q: Tensor  # (rows, heads, length, dim), as are k and v with heads of their own
    k: Tensor
    v: Tensor
    grad: Tensor  # the gradient from above, like q
    mask: IntervalMask


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


def launch(
    kernel: str, config: Config, given: Problem, forward: dict[str, Tensor]
) -> Callable[[], tuple[Tensor, ...]]:
    """One kernel with this config: each call returns what it filled. forward: lse and delta of the forward pass, for
    the backward."""
    from onevocab.kernels.attention import ops_triton as ops

    q, k, v, grad, mask = given
    keys, scale, settings = k.shape[2], q.shape[-1] ** -0.5, config._asdict()
    make_plan = mask.transposed_plan if kernel == "dkdv" else mask.plan
    plan, spans = make_plan(keys, config.block_q, config.block_k), mask.intervals(keys)
    if kernel == "forward":
        return lambda: ops.launch_forward(q, k, v, spans, plan, scale, settings)
    backward = q, k, v, grad, forward["lse"], forward["delta"], spans, plan, scale, settings
    if kernel == "dq":
        return lambda: (ops.launch_dq(*backward),)
    return lambda: ops.launch_dkdv(*backward)


def forward_results(given: Problem) -> dict[str, Tensor]:
    """lse and delta, by the table's own forward pass."""
    from onevocab.kernels.attention.ops_triton import launch_delta

    out, lse = launch("forward", CANDIDATES["forward", given.q.shape[-1]][0], given, {})()
    return {"lse": lse, "delta": launch_delta(out, given.grad)}


@contextmanager
def memory_of_nan():
    """New tensors hold NaN until they are written: what a kernel forgets is seen."""
    deterministic, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic
    before = fill.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        fill.fill_uninitialized_memory = before


def error_of(job: Job) -> tuple[float, str | None]:
    """The relative error against float64, and why there is none. Compiles by launching, in a process of its own."""
    try:
        given = problem(job.dim, job.shape, job.device)
        leaves = [x.double().requires_grad_() for x in given[:3]]
        out = attention_reference(*leaves, given.mask)
        dq, dk, dv = torch.autograd.grad(out, leaves, given.grad.double())
        exact = {"forward": (out.detach(),), "dq": (dq,), "dkdv": (dk, dv, dq)}[job.kernel]
        with memory_of_nan():
            filled = launch(job.kernel, job.config, given, forward_results(given))()
        measure.synchronize(given.q.device)
        pairs = zip(filled, exact, strict=False)  # lse is not compared, and dQ is there where it is fused
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
        ms = median(launch(kernel, config, given, forward), device, repetitions)
        flops = (FLOPS[kernel] + 2 * config.fused) * pairs * given.q.shape[1] * dim
        rows.append({"dim": dim, "mask": title, "kernel": kernel, "config": config._asdict(), "ms": ms,
                     "tflops": flops / ms / 1e9, "error": error})
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
                launch(kernel, config, given, forward)()
            compiled, _ = aot.compile_launch(*launched[0], GPUTarget("cuda", 90, 32))
            use = aot.usage(compiled.asm["cubin"])
            fit = aot.programs(use["reg"], compiled.metadata.shared, config.num_warps, 90)
            print(f"{kernel} {dim} {tuple(config)}: {use['reg']} registers, {use['LDL']} spilled loads, "
                  f"{use['waits']} waits, {fit} programs a multiprocessor", flush=True)


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
