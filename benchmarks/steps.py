"""What `make bench-gpu` does, in order of worth: the steps of benchmarks/gpu.py, each with a limit of its own.

A step is one process, or several side by side. Which benchmarks there are is found: one that no step names comes
before the last, and every kernel is checked. Seconds are estimates, nothing here has met a GPU yet.
"""

from typing import NamedTuple

from benchmarks import attention, cross_entropy, decode, modules, norms, train_step, vq
from benchmarks.check import first_line
from benchmarks.work import OURS

SIDE_BY_SIDE = 6  # processes that share the GPU's memory: attention's check takes about 12 GiB for its float64


class Step(NamedTuple):
    name: str
    about: str
    seconds: int  # after so many it is ended; all together are more than there are, what comes last may be left out
    commands: tuple[tuple[str, ...], ...]  # a module and its words; several run side by side
    measures: bool = True  # its one command writes a JSON file, to --out


def timed(name: str, about: str, seconds: int, *words: str, module: str = "") -> Step:
    return Step(name, about, seconds, ((f"benchmarks.{module or name}", "--json-only", *words),))


def discover() -> tuple[list[str], list[str], list[str]]:
    """Benchmarks of presets, those that are of kernels only, and what kept others from being imported."""
    found, kernels, problems = [], [], []
    for name in modules.names():
        try:
            presets = modules.presets(name)
        except Exception as error:
            problems.append(f"{name}: {first_line(error)}")
            continue
        found.append(name)
        kernels += [name] * all(preset.kernel for preset in presets.values())
    return found, kernels, problems


def check_commands(kernels: list[str]) -> tuple[tuple[str, ...], ...]:
    """Ours against float64 on the timed shapes. What has to be compiled takes part where it is timed later: so the
    compilers of several processes work side by side, and leave their results in the caches on the disk."""
    compiled = {"cross_entropy": cross_entropy.COMPILED, "norms": norms.COMPILED}
    commands = [("benchmarks.attention", "--check", "--preset", preset, *size, "--providers", attention.FLEX)
                for size in ((), ("--shape", "head_dim=64")) for preset in ("causal", "packed")]
    commands += [(f"benchmarks.{name}", "--check", "--providers", compiled.get(name, OURS))
                 for name in kernels if name != "attention"]
    commands += [("benchmarks.attention", "--check", "--preset", preset, "--providers", OURS)
                 for preset in ("shared-prefix", "window")]
    return tuple(commands)


def attention_steps() -> list[Step]:
    """Against all peers, at both head dims."""
    peers = {"causal": (attention.FLASH, attention.CUDNN, attention.FA3, attention.FLEX),
             "packed": (attention.VARLEN, attention.VARLEN_REPEATED, attention.FA3_VARLEN, attention.FLEX,
                        attention.DENSE_REPEATED)}
    found = []
    for dim, size in (("", ()), ("-64", ("--shape", "head_dim=64"))):
        for preset, providers in peers.items():
            found.append(timed(f"attention-{preset}{dim}", f"{preset} rows, head dim {dim[1:] or 128}, and its peers",
                               70, "--preset", preset, *size, "--seconds", "2", "--repetitions", "20", "--providers",
                               *providers, module="attention"))
    return found


def steps(device: str) -> tuple[list[Step], list[str]]:
    """All steps in their order, and what kept benchmarks from being imported. On a CPU they can only be tried out."""
    found, kernels, problems = discover()
    small = tuple((f"benchmarks.{name}", "--check", "--tiny", "--dtype", dtype, "--providers", OURS)
                  for name in kernels for dtype in (("float16", "float32") if device == "cuda" else ("float32",)))
    sweep = ("--seconds", "125") if device == "cuda" else ("--jobs", "1", "--dims", "64", "--candidates", "1",
                                                          "--repetitions", "1")
    plan = [
        Step("checks", "every kernel on the timed shapes against float64", 75, check_commands(kernels), False),
        Step("types", "every kernel on tiny shapes in other types against float64", 40, small, False),
        Step("sweep", "configs of the attention kernels, checked and timed", 145, (("benchmarks.sweep", *sweep),)),
        *attention_steps(),
        timed("decode", "dense and paged caches", 40, "--seconds", "1", "--providers", decode.SDPA_GROUPED,
              decode.SDPA_PLAIN),
        timed("norms", "norms, rotary positions, SwiGLU", 40, "--seconds", "0.6", "--providers", norms.TORCH,
              norms.COMPILED, norms.LIGER),
        timed("cross_entropy", "the head and its loss", 50, "--seconds", "2"),
        timed("vq", "the nearest code", 25, "--seconds", "1", "--providers", vq.CDIST, vq.MATMUL),
        timed("train_step", "a whole step of 340 M weights, its MFU", 70, "--preset", "packed", "--seconds", "4",
              "--repetitions", "8", "--providers", train_step.MUON, train_step.THEIRS, train_step.TORCH),
        timed("train_step-compiled", "the same beside torch.compile's layers", 60, "--preset", "packed", "--seconds",
              "3", "--repetitions", "8", "--providers", train_step.COMPILED, module="train_step"),
        timed("attention-other", "a shared prefix; a window", 70, "--preset", "shared-prefix", "--preset", "window",
              "--seconds", "1", "--repetitions", "20", "--providers", attention.FLEX, attention.DENSE_REPEATED,
              module="attention"),
    ]
    named = {command[0].removeprefix("benchmarks.") for step in plan for command in step.commands if step.measures}
    plan += [timed(name, "found beside the others", 40, "--seconds", "1") for name in found if name not in named]
    plan.append(Step("memory", "compute-sanitizer over every kernel's tiny shapes", 90,
                     (("benchmarks.sanitize", "--kernels", *kernels),), False))
    return plan, problems
