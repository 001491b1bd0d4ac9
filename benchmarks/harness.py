"""What the kernel benchmarks share: correctness first, then time, memory and a file that says how it was made.

A benchmark module describes presets; a preset builds a `Work`: inputs, providers that compute the same thing, its
definition and its costs. For each preset:

1. every provider's outputs and gradients are compared with the definition in float64, on the very shapes and inputs
   that are timed. The bound is twice the error of the definition in working precision. Ours must pass; a peer that
   does not is named and not timed;
2. providers are timed in turns, on random inputs in enough copies that no cache holds them all;
3. medians, FLOP/s, bytes/s, shares of the measured ceilings and peak memory (of a whole network on a CPU also that of
   a process that does nothing else) go to JSON, with ratios from neighbouring repetitions. FLOPs are those of the work
   that has to be done (visible pairs), whoever does more.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import checkout, measure, memory  # noqa: F401  checkout: for what it does when imported
from onevocab.common.errors import UserError, cli
from onevocab.common.files import write_json
from onevocab.common.provenance import provenance
from onevocab.kernels.backend import chosen

OURS = "ours"
SLOW_TO_START = ("FlexAttention", "torch.compile")  # a minute of compiling on a CPU: left out of --tiny
LONG_TO_SHORT = {"both": "forward + backward", "fresh": "mask + forward", "fresh both": "mask + forward + backward"}


class Unavailable(Exception):
    """A provider cannot run here; the message says why."""


class Cost(NamedTuple):
    """What one call has to do at least: floating-point operations, bytes read and written once."""

    flops: int
    bytes: int


class Target(NamedTuple):
    """`quantity` of the best of `against` divided by ours must be at least (or ours by theirs at most: `at_most`).

    quantity is "time", "memory", "copy" (our bytes/s as a part of the copy bandwidth) or "mfu" (our FLOP/s as a part of
    what the GPU's data sheet says; Chowdhery et al. 2022, appendix B).
    """

    quantity: str
    step: str
    against: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None


@dataclass
class Work:
    """One workload. Calls take the tensors of `inputs()` and return a tensor or a tuple of tensors."""

    inputs: Callable[[], tuple[Tensor, ...]]
    providers: dict[str, Callable[[], Callable]]  # name -> what prepares (a mask, a cache) and returns the call
    definition: Callable  # the readable reference, for float64 inputs as well
    costs: dict[str, Cost]  # step -> cost; steps: forward, backward, both, fresh, fresh both, step
    differentiable: int = 0  # gradients of the first so many inputs
    compared: Callable = lambda outputs, inputs: outputs  # what of the outputs is compared
    notes: list[str] = field(default_factory=list)
    operations: tuple[str, ...] = ()  # of ours, for saying which backend ran
    # Of the largest value: an error of so many is allowed though the definition made none. For each value, or for all.
    roundings: float | tuple[float, ...] = 1
    whole: bool = False  # a network: errors relative to the value's norm, the worst of all values counts
    tokens: int | None = None  # of one call


def roundings_of_sum(terms: int) -> float:
    """What a sum of `terms` numbers, one after the other, may be off by, in machine epsilons of its value: sqrt(n) / 2.

    Higham and Mary 2019 (A New Approach to Probabilistic Rounding Error Analysis), with lambda = 1 and the sum's value
    instead of the sum of magnitudes, which is never smaller. Definitions add in pairs and so are no bound for it.
    """
    return max(1.0, math.sqrt(terms) / 2)


@dataclass
class Preset:
    """`build(shape, device, dtype)` makes the Work; shapes has "cpu", "cuda" and "tiny" (for tests). A dtype "auto" is
    what `train.py` would choose."""

    description: str
    build: Callable[[dict, torch.device, torch.dtype], Work]
    shapes: dict[str, dict]
    targets: dict[str, list[Target]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=lambda: {"cpu": "float32", "cuda": "bfloat16"})


def as_tuple(outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def backend_note(operations: tuple[str, ...]) -> str:
    """Which of our implementations ran: what `kernels.backend` chose, and why."""
    return "; ".join(f"{name}: {choice.backend} ({choice.reason})" for name, choice in sorted(chosen().items())
                     if name in operations)


def leaves_of(inputs: tuple[Tensor, ...], differentiable: int) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_() if i < differentiable else x for i, x in enumerate(inputs))


def weights_like(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradient that arrives from above: fixed random numbers, 1 for a loss."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return tuple(torch.ones_like(x) if x.dim() == 0 else
                 torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype) for x in outputs)


def differentiated(call: Callable, inputs: tuple[Tensor, ...], differentiable: int) -> tuple[Tensor, ...]:
    """Outputs, and gradients of the first inputs."""
    leaves = leaves_of(inputs, differentiable)
    outputs = as_tuple(call(*leaves))
    if not differentiable:
        return outputs
    smooth = [x for x in outputs if x.requires_grad]
    gradients = torch.autograd.grad(smooth, leaves[:differentiable], weights_like(tuple(smooth)))
    return *(x.detach() for x in outputs), *gradients


def values(work: Work, call: Callable, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What of the call is compared: its outputs as `work.compared` sees them, and its gradients."""
    found = differentiated(call, inputs, work.differentiable)
    n = len(found) - work.differentiable
    return *as_tuple(work.compared(found[:n] if n > 1 else found[0], inputs)), *found[n:]


def require_triton(operations: tuple[str, ...]) -> None:
    """On a GPU what is called ours must be the Triton kernels, not torch's way."""
    for name, choice in chosen().items():
        if name in operations and choice.backend != "triton":
            raise UserError(f"{name} ran as {choice.backend} ({choice.reason}), not as triton: nothing was timed")


def errors_of(work: Work, found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """The error of each value: its largest, or for a network a single relative one."""
    apart = zip(found, exact, strict=True)
    if work.whole:
        return [max(((got.double() - value).norm() / value.norm()).item() for got, value in apart)]
    return [(got.double() - value).abs().max().item() for got, value in apart]


def bounds_of(work: Work, inputs: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """For each compared value the largest error allowed: twice that of the definition in working precision."""
    found = values(work, work.definition, inputs)
    bounds = [2 * error for error in errors_of(work, found, exact)]
    for i in range(len(bounds)):
        kind = found[i].dtype if found[i].is_floating_point() else torch.float32
        if kind == torch.float64 and inputs[0].is_floating_point():
            kind = inputs[0].dtype  # compared in float64, computed from these
        scale = 1.0 if work.whole else exact[i].abs().max().item()
        roundings = work.roundings[i] if isinstance(work.roundings, tuple) else work.roundings
        bounds[i] += roundings * torch.finfo(kind).eps * scale
    if not all(map(math.isfinite, bounds)):
        raise UserError("the definition is not finite in this precision, no bound can be drawn; nothing was timed")
    return bounds


def check(work: Work, calls: dict[str, Callable], inputs: tuple[Tensor, ...]) -> dict[str, dict]:
    """provider -> its worst error over the bound, and why it failed if it did. Raises UserError when ours is wrong."""
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    exact = values(work, work.definition, wide)
    del wide
    bounds = bounds_of(work, inputs, exact)
    outputs = len(exact) - work.differentiable
    labels = [f"output {i}" if i < outputs else f"the gradient of input {i - outputs}" for i in range(len(exact))]
    if work.whole:
        labels = ["the worst of loss and gradients"]
    report: dict[str, dict] = {}
    for name, call in calls.items():
        note, found = {}, None
        try:
            found = values(work, call, inputs)
            if name == OURS and inputs[0].device.type == "cuda":
                require_triton(work.operations)
        except Exception as error:  # a peer that cannot do this, in whatever way; perhaps it can without gradients
            if name == OURS:
                raise
            note = {"forward only": first_line(error)}
        if note:  # outside of the except: its traceback keeps the failed call's tensors
            if inputs[0].device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                with torch.no_grad():
                    found = as_tuple(work.compared(call(*inputs), inputs))
            except Exception:
                report[name] = {"failed": note["forward only"]}
                continue
        # one that is forward only has fewer values: the gradients, which come last, are missing
        expected = exact[: len(found)] if note else exact
        errors = [error / max(bound, 1e-300)
                  for error, bound in zip(errors_of(work, found, expected), bounds, strict=not note)]
        worst, label = max((math.inf if math.isnan(error) else error, label)
                           for error, label in zip(errors, labels[: len(errors)], strict=True))
        report[name] = {"worst_error_over_bound": worst, **note}
        if name == OURS:
            report[name]["backend"] = backend_note(work.operations)
        del found
        if worst > 1:
            if name == OURS:
                raise UserError(f"ours is wrong: {label} is off by {worst:.2f} times the bound; nothing was timed")
            report[name]["failed"] = f"wrong by {worst:.1f} times the bound"
    return report


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"


def step_calls(work: Work, step: str, prepare: Callable, call: Callable, sets: list) -> Callable[[int], object]:
    """The function of the repetition's number that is timed; its attribute `before`, if any, runs before the clock."""
    def forward(i):
        with torch.no_grad():
            return call(*sets[i % len(sets)])

    def fresh(i):
        with torch.no_grad():
            return prepare()(*sets[i % len(sets)])

    if step in ("forward", "fresh"):
        return forward if step == "forward" else fresh
    if step == "step":  # with weights and an optimiser of its own
        def train(i):
            call.step(i)

        train.before = call.step  # as in training: the caches, and what the allocator holds, are those of its own step
        return train
    leaves = [leaves_of(one, work.differentiable) for one in sets]
    # The gradient that comes from above is made once, outside of what is timed.
    probe = [x for x in as_tuple(call(*leaves[0])) if x.requires_grad]
    above = weights_like(tuple(x.detach() for x in probe))

    def gradients(outputs, i):
        smooth = [x for x in as_tuple(outputs) if x.requires_grad]
        return torch.autograd.grad(smooth, leaves[i][: work.differentiable], above)

    if step == "backward":
        graph = []

        def before(i):  # a graph serves once: compiled ones give away what they saved, whatever they are asked to keep
            graph[:] = [call(*leaves[i % len(sets)])]

        def backward(i):
            return gradients(graph.pop(), i % len(sets))

        backward.before = before
        return backward
    if step == "both":
        return lambda i: gradients(call(*leaves[i % len(sets)]), i % len(sets))
    return lambda i: gradients(prepare()(*leaves[i % len(sets)]), i % len(sets))


def measure_preset(work: Work, device: torch.device, seconds: float, repetitions: int, only: tuple[str, ...] | None,
                   just_check: bool, tiny: bool, process: Callable[[str], int | None] | None = None) -> dict:
    """Checks and times all providers of a Work: the body of one preset's results.

    process: what a provider's steps add to a process of their own, where that is to be measured.
    """
    calls, missing = {}, {}
    for name, prepare in work.providers.items():
        if only and name not in only and name != OURS:
            continue
        if tiny and any(each in name for each in SLOW_TO_START):
            missing[name] = "left out of --tiny: slow to start"
            continue
        try:
            calls[name] = prepare()
        except Exception as error:
            if name == OURS:
                raise
            missing[name] = str(error) if isinstance(error, Unavailable) else first_line(error)
    first = work.inputs()
    copies = 1 if just_check else max(1, min(8, -(-2 * measure.cache_bytes(device) // max(measure.size(*first), 1))))
    checked = check(work, calls, first)
    missing |= {name: each["failed"] for name, each in checked.items() if "failed" in each}
    result = {"checked": checked, "not_run": missing, "rows": []}
    if just_check:
        return result
    sets = [first, *(work.inputs() for _ in range(copies - 1))]
    for step, cost in work.costs.items():
        ready = {}
        for name, call in calls.items():
            if name in missing or (step != "forward" and step != "fresh" and "forward only" in checked[name]):
                continue
            try:
                ready[name] = step_calls(work, step, work.providers[name], call, sets)
                measure.prepare(ready[name], 0)
                ready[name](0)
            except Exception as error:
                if name == OURS:
                    raise
                ready.pop(name, None)
                missing[f"{name}, {step}"] = first_line(error)
        times = measure.time_all(ready, device, seconds, repetitions)
        for name, taken in times.items():
            row = {"step": step, "provider": name, **measure.summary(taken)}
            ratios = [theirs / ours for theirs, ours in zip(taken, times[OURS], strict=True)]
            row |= {"times_ours": statistics.median(ratios), "flops": cost.flops, "bytes": cost.bytes,
                    "flops_per_second": cost.flops / row["seconds"], "bytes_per_second": cost.bytes / row["seconds"],
                    "peak_bytes": measure.peak_memory(ready[name], device)}
            if work.tokens:
                row["tokens_per_second"] = work.tokens / row["seconds"]
            if process:
                row["process_bytes"] = process(name)
            result["rows"].append(row)
        ready.clear()
    return result


def judge(targets: list[Target], rows: list[dict], ceilings: dict[str, float]) -> list[dict]:
    """Each target beside what was measured; `met` is None when a side of it did not run."""
    verdicts = []
    for target in targets:
        found = {row["provider"]: row for row in rows if row["step"] == target.step}
        peers = [found[name] for name in target.against if name in found]
        ours, measured = found.get(OURS), None
        if ours and target.quantity == "copy":
            measured = ours["bytes_per_second"] / ceilings["copy_bytes_per_second"]
        elif ours and target.quantity == "mfu" and ceilings["nominal_flops_per_second"]:
            measured = ours["flops_per_second"] / ceilings["nominal_flops_per_second"]
        elif ours and peers and target.quantity == "time":
            measured = min(row["times_ours"] for row in peers)
        elif ours and peers and target.quantity == "memory":
            measured = min(row["peak_bytes"] for row in peers) / max(ours["peak_bytes"], 1)
        if measured is not None and target.at_most is not None:
            measured = 1 / measured
        met = None if measured is None else (measured >= target.at_least if target.at_most is None
                                             else measured <= target.at_most)
        verdicts.append({**target._asdict(), "measured": measured, "met": met})
    return verdicts


def run(name: str, presets: dict[str, Preset], titles: list[str], device: torch.device, *, dtype: str | None = None,
        shape: dict | None = None, tiny: bool = False, seconds: float = 10, repetitions: int = 50,
        only: tuple[str, ...] | None = None, just_check: bool = False) -> dict:
    """Runs presets and returns what is written to the JSON file."""
    result = {"benchmark": name, **provenance(), "cuda": torch.version.cuda, "device_type": device.type,
              "threads": torch.get_num_threads(), "presets": {}}
    limits: dict[str, dict] = {}
    for title in titles:
        preset = presets[title]
        size = {**preset.shapes[device.type], **(preset.shapes["tiny"] if tiny else {}), **(shape or {})}
        kind = dtype or preset.dtypes[device.type]
        if kind == "auto":
            kind = choose(kind, device)
        torch.manual_seed(0)
        work = preset.build(size, device, getattr(torch, kind))
        if not just_check and kind not in limits:
            limits[kind] = measure.ceilings(device, getattr(torch, kind), tiny=tiny)
        print(f"{name} {title}: {', '.join(f'{k} {v}' for k, v in size.items())}, {kind}, {device.type}", flush=True)
        alone = work.whole and device.type == "cpu" and not tiny
        process = partial(memory.of_step, name, title, kind, size) if alone else None
        found = measure_preset(work, device, seconds, repetitions, only, just_check, tiny, process)
        for peer, each in found["checked"].items():
            error = each.get("worst_error_over_bound")
            note = f"; forward only: {each['forward only']}" if "forward only" in each else ""
            print(f"  {peer}: " + (f"error {error:.2f} of the bound{note}" if error is not None else "failed"))
        for peer, reason in found["not_run"].items():
            print(f"  not run: {peer}: {reason}")
        for row in found["rows"]:
            print(f"  {LONG_TO_SHORT.get(row['step'], row['step']):27} {row['provider']:32} "
                  f"{row['seconds'] * 1e3:10.3f} ms  {row['times_ours']:6.2f}x ours  "
                  f"{row['flops_per_second'] / 1e12:8.3f} TFLOP/s {row['bytes_per_second'] / 1e9:8.1f} GB/s "
                  f"{row['peak_bytes'] / 2**20:8.0f} MiB"
                  + (f" {row['tokens_per_second']:10,.0f} tokens/s" if "tokens_per_second" in row else ""), flush=True)
        targets = [] if tiny or just_check else judge(preset.targets.get(device.type, []), found["rows"], limits[kind])
        result["presets"][title] = {
            "description": preset.description, "shape": size, "dtype": kind, "notes": work.notes,
            "backend": found["checked"][OURS]["backend"], "ceilings": limits.get(kind), **found, "targets": targets,
        }
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return result


def shape_of(words: list[str], presets: dict[str, Preset], chosen: list[str]) -> dict:
    """`length=4096 documents=16` as numbers; every name must be one of the presets' own."""
    known = {key for title in chosen for key in presets[title].shapes["cpu"]}
    found = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in known or not value.isdigit() or int(value) < 1:
            raise UserError(f"--shape {word}: takes name=number with a name of {', '.join(sorted(known))}")
        found[key] = int(value)
    return found


def main(name: str, doc: str, presets: dict[str, Preset]) -> Callable[[list[str] | None], None]:
    """The command `python -m benchmarks.<name>`."""
    @cli
    def command(argv: list[str] | None = None) -> None:
        parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=doc.split("\n\n")[0])
        parser.add_argument("--preset", action="append", metavar="NAME", help="may be repeated; all unless given")
        parser.add_argument("--out", type=Path, help="JSON; a table (.md) and a plot (.png) are written beside it")
        parser.add_argument("--check", action="store_true", help="correctness only, nothing is timed")
        parser.add_argument("--list", action="store_true", help="presets, their shapes and providers")
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
        parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
        parser.add_argument("--shape", nargs="+", default=[], metavar="NAME=NUMBER", help="other sizes")
        parser.add_argument("--providers", nargs="+", metavar="NAME", help="ours and these only")
        parser.add_argument("--tiny", action="store_true", help="sizes for trying it out")
        parser.add_argument("--seconds", type=float, default=10, help="per preset and step, about")
        parser.add_argument("--repetitions", type=int, default=50, help="at most; at least 3")
        args = parser.parse_args(argv)
        if args.list:
            for title, preset in presets.items():
                print(f"{title}: {preset.description}")
                for kind, size in preset.shapes.items():
                    print(f"  {kind}: {', '.join(f'{k}={v}' for k, v in size.items())}")
            return
        chosen = args.preset or list(presets)
        unknown = [title for title in chosen if title not in presets]
        if unknown:
            raise UserError(f"--preset {unknown[0]}: choose from {', '.join(presets)}")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no GPU here; without --device the CPU's paths run")
        if args.seconds <= 0 or args.repetitions < 3:
            raise UserError("--seconds must be positive and --repetitions at least 3")
        shape = shape_of(args.shape, presets, chosen)
        if args.device == "cpu":
            print("no GPU: these are the CPU's paths, not the Triton kernels")
        result = run(name, presets, chosen, torch.device(args.device), dtype=args.dtype, shape=shape, tiny=args.tiny,
                     seconds=args.seconds, repetitions=args.repetitions, just_check=args.check,
                     only=tuple(args.providers) if args.providers else None)
        if args.check:
            print("all outputs and gradients of ours are within the bound")
        elif args.out:
            from benchmarks.plot import publish

            words = [*measure.allocator(), f"python -m benchmarks.{name}", *(sys.argv[1:] if argv is None else argv)]
            write_json(args.out, {**result, "command": " ".join(words)})
            print("written: " + ", ".join(str(path) for path in [args.out, *publish(args.out)]))

    return command

