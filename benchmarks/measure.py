"""Clocks, memory and ceilings: what the harness measures with, on a CPU and on a GPU."""

import functools
import gc
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts a CPU's memory, writes to stderr

# A GPU that sleeps lets the CPU run ahead with its launches: at least half a millisecond, at most 20, at 2 GHz.
CLOCK, SLEEP_LEAST, SLEEP_MOST = 2e9, 1_000_000, 40_000_000


def size(*tensors: Tensor) -> int:
    """Bytes of the tensors' elements."""
    return sum(x.numel() * x.element_size() for x in tensors)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def cache_bytes(device: torch.device) -> int:
    """The last cache that data could hide in: the GPU's L2, or a usual CPU's share of its L3."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return 32 << 20


def allocator() -> list[str]:
    """What glibc's malloc was told before the start, as the words in front of a command: by default it gives freed
    memory back to the kernel, and a step of a CPU pays for the same pages again."""
    return [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")]


def prepare(call: Callable[[int], object], i: int) -> None:
    """What a call needs done before the clock starts: its attribute `before`, if it has one."""
    getattr(call, "before", lambda i: None)(i)


def sleep_cycles(call: Callable[[int], object], device: torch.device) -> int:
    """How long the GPU has to sleep to hide the launches of this call: 1.5 times what they take. 0 on a CPU."""
    if device.type == "cpu":
        return 0
    prepare(call, 0)
    synchronize(device)
    begin = time.perf_counter()
    call(0)
    cycles = 1.5 * CLOCK * (time.perf_counter() - begin)
    synchronize(device)
    return int(min(max(cycles, SLEEP_LEAST), SLEEP_MOST))


def time_once(call: Callable[[int], object], i: int, device: torch.device, sleep: int = SLEEP_LEAST) -> float:
    """Seconds of call(i). On a GPU between two events, the queue kept full by a sleep of so many cycles, so that
    launching is not what is timed (except for calls that wait for the GPU themselves)."""
    prepare(call, i)
    if device.type == "cpu":
        begin = time.perf_counter()
        call(i)
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(sleep)
    begin.record()
    call(i)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def time_all(calls: dict[str, Callable[[int], object]], device: torch.device, seconds: float, most: int) -> dict:
    """name -> seconds of every repetition, for calls that take the number of the repetition.

    Repetitions of all calls are interleaved and their order turns around, so that what else happens on the machine
    meets all of them alike. Between 3 and `most` repetitions, as many as fit into `seconds`.
    """
    for call in calls.values():  # the first call compiles, tunes, and fills allocators
        prepare(call, 0)
        call(0)
    synchronize(device)
    sleeps = {name: sleep_cycles(call, device) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for i in range(most):
        for name in list(calls)[:: 1 if i % 2 else -1]:
            times[name].append(time_once(calls[name], i, device, sleeps[name]))
        spent = time.perf_counter() - begin
        if i >= 2 and spent + spent / (i + 1) > seconds:
            break
    return times


def summary(times: list[float]) -> dict:
    """Median and quartiles in seconds."""
    ordered = sorted(times)
    return {"seconds": statistics.median(ordered), "repetitions": len(ordered),
            "quartiles": [ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]]}


def peak_memory(call: Callable[[int], object], device: torch.device) -> int:
    """Bytes that call(0) allocates at its peak beyond what was allocated before it; its results count.

    From torch's allocators: the GPU's own statistics, or the CPU's as the profiler sees them (scratch space inside a
    matmul library is not among them).
    """
    prepare(call, 0)
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(0)
        synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call(0)
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    del kept
    return peak


# FLOP/s of dense bfloat16 and float16 products, from NVIDIA's data sheets.
NOMINAL = (("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("H200", 989e12), ("A100", 312e12))


def nominal_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """What the GPU's data sheet says, None where that is not known here."""
    if device.type != "cuda" or dtype.itemsize != 2:
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in NOMINAL if part in name), None)


@functools.cache
def ceilings(device: torch.device, dtype: torch.dtype, seconds: float = 2.0, tiny: bool = False) -> dict[str, float]:
    """What this machine can do, measured: bytes/s of a copy (read + written), FLOP/s of a large square matmul."""
    numbers = 1 << (16 if tiny else 28 if device.type == "cuda" else 25)
    n = 128 if tiny else 8192 if device.type == "cuda" else 2048
    source = torch.ones(numbers, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = time_all({"copy": lambda i: target.copy_(source), "matmul": lambda i: a @ b}, device, seconds, 50)
    return {"nominal_flops_per_second": nominal_flops(device, dtype),
            "copy_bytes_per_second": 2 * size(source) / statistics.median(times["copy"]),
            "matmul_flops_per_second": 2 * n**3 / statistics.median(times["matmul"])}
