"""What training steps add to a process at their peak: each provider in a fresh one, as the operating system sees it.

    python -m benchmarks.memory train_step mixed float32 '{}' ours

`measure.peak_memory` sees torch's allocator within one step; here the optimiser's state and what libraries take for
themselves count as well. Linux only: elsewhere the answer is null.
"""

import gc
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import torch

from benchmarks import checkout, measure

STEPS = 3  # the first makes the optimiser's state; batches differ
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def of_process(field: str) -> int:
    """Bytes: VmRSS is what the process holds, VmHWM the most that it held since the peak was reset."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def growth(step) -> int | None:
    """Bytes at the peak of STEPS calls of step(i) beyond what the process held before; None where it cannot be told."""
    gc.collect()
    try:
        RESET.write_text("5")  # the peak starts from now
        before = of_process("VmRSS")
    except OSError:
        return None
    for i in range(STEPS):
        step(i)
    return of_process("VmHWM") - before


def of_step(benchmark: str, preset: str, dtype: str, shape: dict, provider: str) -> int | None:
    """`growth` of a provider's steps in a process of its own, with its weights already there.

    shape: what differs from the preset's. None, and a line that says why, where it cannot be told.
    """
    command = [sys.executable, "-m", "benchmarks.memory", benchmark, preset, dtype, json.dumps(shape), provider]
    try:
        done = subprocess.run(command, cwd=checkout.ROOT, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired as error:
        done = subprocess.CompletedProcess(command, 1, "", f"not done after {error.timeout:.0f} s")
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["it ended without a word"]
        print(f"  the memory of {provider} in a process of its own is not known: {words[-1]}")
        return None
    return json.loads(done.stdout.splitlines()[-1])


def main(benchmark: str, title: str, dtype: str, shape: str, provider: str) -> None:
    preset = import_module(f"benchmarks.{benchmark}").PRESETS[title]
    size = preset.shapes["cpu"] | json.loads(shape)
    work = preset.build(size, torch.device("cpu"), getattr(torch, dtype))
    call = work.providers[provider]()
    if hasattr(call, "step"):
        measure.prepare(call, 0)
        step = call.step
    else:  # a loss of its inputs
        inputs = [x.detach().requires_grad_() for x in work.inputs()]

        def step(_):
            torch.autograd.grad(call(*inputs), inputs[: work.differentiable])

    print(json.dumps(growth(step)))


if __name__ == "__main__":
    main(*sys.argv[1:])
