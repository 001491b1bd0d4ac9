"""Everything that needs a GPU, in one command and within nine minutes: `make bench-gpu`.

    python -m benchmarks.gpu --out benchmarks/results

Runs from a plain checkout with torch, triton and numpy; nothing has to be installed. Each benchmark checks what it
times and writes `<name>-<device>.json` and `.md` (and `.png` with matplotlib), the most wanted first. Then the kernels
are checked on small shapes in other dtypes, and under compute-sanitizer where it is installed. A benchmark that fails
does not stop the others; the exit code says whether one did. At the end a table of targets and what was measured.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

import torch

from benchmarks import checkout, harness
from benchmarks.plot import number, publish
from onevocab.common.errors import UserError, cli
from onevocab.common.files import write_atomic, write_json

# (module, preset, share of the time): in order of interest; time that one leaves over goes to those after it.
PLAN = (
    ("attention", "causal", 3), ("attention", "packed", 3), ("attention", "shared-prefix", 2), ("decode", "long", 1),
    ("decode", "batch", 1), ("cross_entropy", "plain", 2), ("norms", "rms_norm", 1), ("norms", "swiglu", 1),
    ("norms", "qk_norm_rope", 1), ("norms", "add_rms_norm", 1), ("vq", "small", 1), ("decode", "paged", 1),
    ("cross_entropy", "weighted", 1), ("attention", "window", 1), ("vq", "wide", 1), ("shared_prefix", "questions", 1),
)
CHECKED = ("attention", "decode", "cross_entropy", "norms", "vq")


def small_checks(device: torch.device, dtypes: tuple[str, ...], deadline: float) -> tuple[list[str], list[str]]:
    """Every preset's tiny shape in these dtypes, ours against float64: (what failed, what there was no time for)."""
    failed, left_out = [], []
    for name in CHECKED:
        presets = import_module(f"benchmarks.{name}").PRESETS
        for title in presets:
            for dtype in dtypes:
                if time.monotonic() > deadline:
                    left_out.append(f"check of {name} {title} {dtype}: no time left")
                    continue
                try:
                    harness.run(name, presets, [title], device, dtype=dtype, tiny=True, just_check=True,
                                only=(harness.OURS,))
                except Exception as error:
                    failed.append(f"{name} {title} {dtype}: {harness.first_line(error)}")
    return failed, left_out


def sanitize(seconds: float) -> str:
    """compute-sanitizer's memory check of the tiny shapes: its verdict in a line."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not tool:
        return "not run: compute-sanitizer is not installed"
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all", sys.executable, "-m",
               "benchmarks.attention", "--tiny", "--check", "--providers", harness.OURS]
    try:
        done = subprocess.run(command, cwd=checkout.ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not finished within {seconds:.0f} s"
    found = re.findall(r"ERROR SUMMARY:.*", done.stdout + done.stderr)
    if not found:
        return f"did not run here (exit {done.returncode}): " + (done.stdout + done.stderr).strip()[-200:]
    return found[-1]


def targets_table(results: dict[str, dict]) -> str:
    """All targets beside what was measured, as Markdown."""
    lines = ["| benchmark | what | against | target | measured | |", "|---|---|---|--:|--:|---|"]
    for name, result in results.items():
        for title, preset in result["presets"].items():
            for target in preset["targets"]:
                wanted = f">= {target['at_least']}" if target["at_most"] is None else f"<= {target['at_most']}"
                against = " or ".join(target["against"]) or "copy bandwidth"
                step = harness.LONG_TO_SHORT.get(target["step"], target["step"])
                verdict = {True: "met", False: "not met", None: "not measured"}[target["met"]]
                lines.append(f"| {name}, {title} | {target['quantity']}, {step} | {against} | {wanted} | "
                             f"{number(target['measured'])} | {verdict} |")
    return "\n".join(lines) + "\n"


@cli
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=checkout.ROOT / "benchmarks" / "results", help="folder of results")
    parser.add_argument("--minutes", type=float, default=8.5, help="for everything; what does not fit is left out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to try the command out")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the command out")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU here. On a CPU: python -m benchmarks.attention, and the others one by one")
    device = torch.device(args.device)
    label = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    label = re.sub(r"[^a-z0-9]+", "-", label.lower().replace("nvidia", "")).strip("-")
    deadline = time.monotonic() + 60 * args.minutes
    print(f"{label}, torch {torch.__version__}; {args.minutes:g} minutes", flush=True)
    results: dict[str, dict] = {}
    problems, left_out = [], []
    for i, (name, title, share) in enumerate(PLAN):
        left = deadline - time.monotonic()
        if left < 30:
            left_out.append(f"{name} {title}: no time left")
            continue
        shares = sum(other for _, _, other in PLAN[i:])
        try:
            presets = import_module(f"benchmarks.{name}").PRESETS
            seconds = left * share / shares / 8  # checks, compiling and warming up take the larger part
            found = harness.run(name, presets, [title], device, tiny=args.tiny, seconds=seconds, repetitions=100)
        except ModuleNotFoundError as error:
            left_out.append(f"{name} {title}: {error}")
            continue
        except Exception as error:
            traceback.print_exc()
            problems.append(f"{name} {title}: {harness.first_line(error)}")
            if args.device == "cuda":
                torch.cuda.empty_cache()
            continue
        merged = results.setdefault(name, found)
        merged["presets"] |= found["presets"]
        merged["command"] = "python -m benchmarks.gpu"
        path = args.out / f"{name}-{label}.json"
        write_json(path, merged)  # after each preset: what was measured stays, whatever comes next
        publish(path)

    failed, unchecked = small_checks(device, ("float32",) if args.device == "cpu" else ("float16", "float32"), deadline)
    problems, left_out = problems + failed, left_out + unchecked
    left = deadline - time.monotonic()
    checked = sanitize(left) if left > 20 and args.device == "cuda" else "not run: no GPU, or no time left"
    table = targets_table(results)
    print(f"\n{table}\nmemory checker: {checked}")
    lines = [f"# {label}", "", table, f"Memory checker: {checked}", "",
             *(f"- Failed: {problem}" for problem in problems), *(f"- Left out: {reason}" for reason in left_out)]
    write_atomic(args.out / f"targets-{label}.md", "\n".join(lines) + "\n")
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    print(f"written to {args.out}")
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    main()
