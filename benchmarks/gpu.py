"""Everything that needs a GPU, in one command and within nine minutes: `make bench-gpu`.

    python -m benchmarks.gpu --out benchmarks/results

Runs from a plain checkout with torch, triton, numpy and einops; nothing has to be installed. Every benchmark of presets
takes part (`Preset` says when, and for how long), checks what it times and writes `<name>-<device>.json` and `.md` (and
`.png` with matplotlib), the most wanted first. Then the kernels are checked on small shapes in other dtypes, and under
compute-sanitizer where it is installed. A benchmark that fails does not stop the others; the exit code says whether one
did. After each a table of targets and what was measured.

After a CUDA error that stays (an illegal address) nothing runs in its process any more: a new one goes on with what is
left of the plan and of the time.
"""

import argparse
import faulthandler
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

from benchmarks import checkout, harness, modules
from benchmarks.check import first_line
from benchmarks.plot import number, publish
from benchmarks.work import LONG_TO_SHORT, OURS, Preset
from onevocab.common.errors import UserError, cli
from onevocab.common.files import read_json, write_atomic, write_json

LEAST = {"cuda": 75, "cpu": 5}  # seconds: less is not enough for a preset's checks and compiling
RESERVED = 75  # seconds for the memory checker, on a GPU


def discover() -> tuple[dict[str, dict[str, Preset]], list[str]]:
    """benchmark -> its presets, of every module that has some; and what kept others from being imported."""
    benchmarks, problems = {}, []
    for name in modules.names():
        try:
            benchmarks[name] = modules.presets(name)
        except Exception as error:
            problems.append(f"{name}: {first_line(error)}")
    return benchmarks, problems


def plan(benchmarks: dict[str, dict[str, Preset]]) -> list[tuple[str, str, int]]:
    """(benchmark, preset, share of the time) by turn; time that one leaves over goes to those after it."""
    turns = [(preset.turn, name, title, preset.share) for name, presets in benchmarks.items()
             for title, preset in presets.items() if preset.turn is not None]
    return [(name, title, share) for _, name, title, share in sorted(turns)]


def small_checks(benchmarks: dict[str, dict[str, Preset]], device: torch.device, dtypes: tuple[str, ...],
                 deadline: float) -> tuple[list[str], list[str]]:
    """Every kernel's tiny shapes in these dtypes, ours against float64: (what failed, what there was no time for)."""
    failed, left_out = [], []
    for name, presets in benchmarks.items():
        for title, preset in presets.items():
            if not preset.kernel:
                continue
            for dtype in dtypes:
                if time.monotonic() > deadline:
                    left_out.append(f"check of {name} {title} {dtype}: no time left")
                    continue
                try:
                    harness.run(name, presets, [title], device, dtype=dtype, tiny=True, just_check=True,
                                only=(OURS,))
                except Exception as error:
                    failed.append(f"{name} {title} {dtype}: {first_line(error)}")
                    if not alive(device):
                        return failed, [*left_out, f"checks after {name} {title} {dtype}: the GPU's context is lost"]
    return failed, left_out


def alive(device: torch.device) -> bool:
    """Whether the device still works in this process; frees cached memory."""
    if device.type == "cpu":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def sanitize(kernels: list[str], seconds: float) -> tuple[str, bool]:
    """compute-sanitizer's memory check of these benchmarks' tiny shapes: its verdict, whether it found something."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not tool:
        return "not run: compute-sanitizer is not installed", False
    words = ["--tiny", "--check", "--device", "cuda", "--providers", OURS]
    script = (f"from importlib import import_module\nfor name in {kernels}:\n"
              f"    import_module('benchmarks.' + name).main({words})")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all",
               sys.executable, "-c", script]
    # Each tensor an allocation of its own: within a cached block the checker sees no bounds.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, cwd=checkout.ROOT, capture_output=True, text=True, timeout=seconds,
                              env=environment)
    except subprocess.TimeoutExpired:
        return f"not finished within {seconds:.0f} s", False
    output = done.stdout + done.stderr
    summaries = re.findall(r"ERROR SUMMARY:.*", output)
    if not summaries:
        return f"did not run here (exit {done.returncode}): " + output.strip()[-200:], False
    wrong = [line for line in summaries if " 0 errors" not in line]
    if not wrong and done.returncode:
        return f"{summaries[-1]}, but exit {done.returncode}: " + output.strip()[-200:], True
    return (wrong or summaries)[-1], bool(wrong)


def targets_table(results: dict[str, dict]) -> str:
    """All targets beside what was measured, as Markdown."""
    lines = ["| benchmark | what | against | target | measured | |", "|---|---|---|--:|--:|---|"]
    for name, result in results.items():
        for title, preset in result["presets"].items():
            for target in preset["targets"]:
                wanted = f">= {target['at_least']}" if target["at_most"] is None else f"<= {target['at_most']}"
                ceiling = "data sheet" if target["quantity"] == "mfu" else "copy bandwidth"
                against = " or ".join(target["against"]) or ceiling
                step = LONG_TO_SHORT.get(target["step"], target["step"])
                verdict = {True: "met", False: "not met", None: "not measured"}[target["met"]]
                lines.append(f"| {name}, {title} | {target['quantity']}, {step} | {against} | {wanted} | "
                             f"{number(target['measured'])} | {verdict} |")
    return "\n".join(lines) + "\n"


def write_targets(path: Path, label: str, results: dict, checked: str, problems: list, left_out: list) -> str:
    """The page of targets as far as it is known; returns its table."""
    table = targets_table(results)
    lines = [f"# {label}", "", table, f"Memory checker: {checked}", "",
             *(f"- Failed: {problem}" for problem in problems), *(f"- Left out: {reason}" for reason in left_out)]
    write_atomic(path, "\n".join(lines) + "\n")
    return table


def go_on(args: argparse.Namespace, start: int, minutes: float, kept: list, problems: list, left_out: list) -> None:
    """Replaces this process by a new one that goes on at plan()[start]; with a problem it ends with exit code 1."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(args.out.resolve()), "--minutes", f"{minutes:.3f}",
               "--device", args.device, "--start", str(start)]
    command += ["--tiny"] * args.tiny + ["--json-only"] * args.json_only
    for word, values in (("--kept", kept), ("--problem", problems), ("--left-out", left_out)):
        command += [f"{word}={value}" for value in values]
    print("the GPU's context is lost: going on in a new process", flush=True)
    sys.stderr.flush()
    os.chdir(checkout.ROOT)
    os.execv(sys.executable, command)


@cli
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=checkout.ROOT / "benchmarks" / "results", help="folder of results")
    parser.add_argument("--minutes", type=float, default=8.5, help="for everything; what does not fit is left out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to try the command out")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the command out")
    parser.add_argument("--json-only", action="store_true", help="no table and picture per benchmark")
    # What a process that lost its GPU tells the next one.
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    for word in ("--kept", "--problem", "--left-out"):
        parser.add_argument(word, action="append", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU here. On a CPU: python -m benchmarks.attention, and the others one by one")
    if not args.minutes > 0:
        raise UserError("--minutes must be positive")
    faulthandler.dump_traceback_later(60 * args.minutes + 20, exit=True, file=sys.__stderr__)  # a kernel that hangs
    try:
        measure_all(args)
    finally:
        faulthandler.cancel_dump_traceback_later()


def measure_all(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    deadline = time.monotonic() + 60 * args.minutes
    timed = deadline - (RESERVED if args.device == "cuda" else 0)
    label = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    label = re.sub(r"[^a-z0-9]+", "-", label.lower().replace("nvidia", "")).strip("-") + "-tiny" * args.tiny
    page = args.out / f"targets-{label}.md"
    print(f"{label}, torch {torch.__version__}; {args.minutes:g} minutes", flush=True)
    results = {name: read_json(args.out / f"{name}-{label}.json") for name in args.kept}
    benchmarks, missing = discover()
    problems, left_out = list(dict.fromkeys([*args.problem, *missing])), list(args.left_out)
    queue = plan(benchmarks)
    for i, (name, title, share) in enumerate(queue):
        if i < args.start:
            continue
        left = timed - time.monotonic()
        if left < LEAST[args.device]:
            left_out.append(f"{name} {title}: no time left")
            continue
        shares = sum(other for _, _, other in queue[i:])
        broken = False
        try:
            seconds = left * share / shares / 8  # checks, compiling and warming up take the larger part
            new = harness.run(name, benchmarks[name], [title], device, tiny=args.tiny, seconds=seconds, repetitions=100)
            merged = results.setdefault(name, new)
            merged["presets"] |= new["presets"]
            merged["command"] = "python -m benchmarks.gpu"
            write_json(args.out / f"{name}-{label}.json", merged)  # what was measured stays, whatever comes next
            if not args.json_only:
                publish(args.out / f"{name}-{label}.json")
        except Exception as error:
            traceback.print_exc()
            problems.append(f"{name} {title}: {first_line(error)}")
            broken = True
        write_targets(page, label, results, "not run yet", problems, left_out)
        if broken and not alive(device):
            go_on(args, i + 1, max((deadline - time.monotonic()) / 60, 0.1), list(results), problems, left_out)
    if not results:
        problems.append("nothing was measured")

    dtypes = ("float32",) if args.device == "cpu" else ("float16", "float32")
    failed, unchecked = small_checks(benchmarks, device, dtypes, timed)
    problems, left_out = problems + failed, left_out + unchecked
    left, checked = deadline - time.monotonic(), "not run: no GPU, or no time left"
    if left > 20 and args.device == "cuda":
        kernels = [name for name, presets in benchmarks.items() if any(each.kernel for each in presets.values())]
        checked, wrong = sanitize(kernels, left)
        problems += [f"memory checker: {checked}"] * wrong
    table = write_targets(page, label, results, checked, problems, left_out)
    print(f"\n{table}\nmemory checker: {checked}")
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    print(f"written to {args.out}")
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    main()
