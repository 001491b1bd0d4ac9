"""What the kernel benchmarks share: correctness first, then time, memory and a result that says how it was made.

For each preset of a benchmark (benchmarks/work.py says what that is):

1. every provider's outputs and gradients are compared with the definition in float64, on the very shapes and inputs
   that are timed (benchmarks/check.py);
2. providers are timed in turns, on random inputs in enough copies that no cache holds them all;
3. medians, FLOP/s, bytes/s, shares of the measured ceilings and peak memory (of a whole network on a CPU also that of
   a process that does nothing else) go to JSON, with ratios from neighbouring repetitions. FLOPs are those of the work
   that has to be done (visible pairs), whoever does more.
"""

import statistics
from collections.abc import Callable
from functools import partial

import torch

from benchmarks import measure, memory
from benchmarks.check import check, first_line, leaves_of, weights_like
from benchmarks.work import LONG_TO_SHORT, OURS, Preset, Target, Unavailable, Work, as_tuple
from onevocab.common.provenance import provenance
from onevocab.training.precision import select_precision

SLOW_TO_START = ("FlexAttention", "torch.compile")  # a minute of compiling on a CPU: left out of --tiny


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
        at_target = {row["provider"]: row for row in rows if row["step"] == target.step}
        peers = [at_target[name] for name in target.against if name in at_target]
        ours, measured = at_target.get(OURS), None
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
        only: tuple[str, ...] | None = None, just_check: bool = False,
        save: Callable[[dict], None] = lambda result: None) -> dict:
    """Runs presets and returns what is written to the JSON file. save: is given that after every preset."""
    result = {"benchmark": name, **provenance(), "cuda": torch.version.cuda, "device_type": device.type,
              "threads": torch.get_num_threads(), "presets": {}}
    limits: dict[str, dict] = {}
    for title in titles:
        preset = presets[title]
        size = {**preset.shapes[device.type], **(preset.shapes["tiny"] if tiny else {}), **(shape or {})}
        kind = dtype or preset.dtypes[device.type]
        if kind == "auto":
            kind = select_precision(kind, device)
        torch.manual_seed(0)
        work = preset.build(size, device, getattr(torch, kind))
        if not just_check and kind not in limits:
            limits[kind] = measure.ceilings(device, getattr(torch, kind), tiny=tiny)
        print(f"{name} {title}: {', '.join(f'{k} {v}' for k, v in size.items())}, {kind}, {device.type}", flush=True)
        alone = work.whole and device.type == "cpu" and not tiny
        process = partial(memory.of_step, name, title, kind, size) if alone else None
        measured = measure_preset(work, device, seconds, repetitions, only, just_check, tiny, process)
        for peer, reason in measured["not_run"].items():
            print(f"  not run: {peer}: {reason}")
        for row in measured["rows"]:
            print(f"  {LONG_TO_SHORT.get(row['step'], row['step']):27} {row['provider']:32} "
                  f"{row['seconds'] * 1e3:10.3f} ms  {row['times_ours']:6.2f}x ours  "
                  f"{row['flops_per_second'] / 1e12:8.3f} TFLOP/s {row['bytes_per_second'] / 1e9:8.1f} GB/s "
                  f"{row['peak_bytes'] / 2**20:8.0f} MiB"
                  + (f" {row['tokens_per_second']:10,.0f} tokens/s" if "tokens_per_second" in row else ""), flush=True)
        targets = [] if tiny or just_check else judge(preset.targets.get(device.type, []), measured["rows"],
                                                      limits[kind])
        result["presets"][title] = {
            "description": preset.description, "shape": size, "dtype": kind, "notes": work.notes,
            "backend": measured["checked"][OURS]["backend"], "ceilings": limits.get(kind), **measured,
            "targets": targets,
        }
        save(result)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return result
