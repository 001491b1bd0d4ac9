"""Where the CPU time of our training step goes, by kind of work; and of a tokenizer's, of a step of decoding, of
Griffin-Lim.

    python -m benchmarks.profile_step --preset mixed --out profile.json
    python -m benchmarks.profile_step --preset image    # or audio, decode, griffin_lim: of the demo's sizes

One row for each kind, in milliseconds of a step as `train.py` runs it (forward, backward, Muon and AdamW): time inside
operators, from torch's profiler, which slows small operators down a little. What is left of the step is Python between
operators. The first kinds are arithmetic; moving numbers, fresh memory, views and Python are not.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import train_step
from benchmarks.profile_parts import OPTIMIZER, PARTS
from onevocab.common.errors import UserError, cli
from onevocab.common.files import write_json
from onevocab.common.provenance import provenance
from onevocab.training.precision import select_precision

STEP = "training step"
# An operator belongs to the first scope around it that is named here; matmuls and what is not arithmetic to themselves.
SCOPES = ((OPTIMIZER, "optimizer"), ("_ByDocument", "attention"),
          ("flash_attention", "attention"), ("AttentionC", "attention"), ("LinearCrossEntropy", "loss"),
          ("QKNormRope", "norms, rotary"), ("RMSNorm", "norms, rotary"), ("SwiGLU", "SwiGLU"),
          ("embedding", "embedding"), ("scaled_dot_product", "attention"), ("rms_norm", "norms, rotary"),
          ("silu", "SwiGLU"), ("convolution", "convolution"), ("gelu", "GELU"), ("fft", "Fourier transforms"))
MATMULS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::baddbmm_", "aten::linear",
           "aten::matmul", "aten::mkldnn_linear", "aten::_addmm_activation")
NOT_ARITHMETIC = {
    "copies and casts": ("aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::contiguous", "aten::cat",
                         "aten::index", "aten::index_select", "aten::index_copy_", "aten::stack",
                         "aten::repeat_interleave"),
    "fresh memory": ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::zeros", "aten::zeros_like",
                     "aten::zero_", "aten::fill_", "aten::new_empty", "aten::new_zeros", "aten::ones_like",
                     "aten::resize_"),
    "views": ("aten::view", "aten::as_strided", "aten::transpose", "aten::t", "aten::slice", "aten::select",
              "aten::unsqueeze", "aten::expand", "aten::reshape", "aten::split", "aten::split_with_sizes",
              "aten::narrow", "aten::flatten", "aten::unflatten", "aten::chunk", "aten::_unsafe_view", "aten::detach",
              "aten::squeeze", "aten::permute", "aten::alias", "aten::_reshape_alias", "aten::unbind"),
    "waits for a number": ("aten::item", "aten::_local_scalar_dense", "aten::nonzero"),
}
KIND = {name: kind for kind, names in NOT_ARITHMETIC.items() for name in names} | dict.fromkeys(MATMULS, "matmul")
PYTHON = "Python, autograd and the rest between operators"
ARITHMETIC = ("matmul", "attention", "norms, rotary", "SwiGLU", "loss", "optimizer", "embedding", "convolution", "GELU",
              "Fourier transforms", "other arithmetic")


def kind_of(event) -> str:
    """Of one profiled operator or scope."""
    scope, where = event, None
    while scope is not None and where is None:
        where = next((kind for part, kind in SCOPES if part in scope.name), None)
        scope = scope.cpu_parent
    kind = KIND.get(event.name)
    if kind == "matmul":
        return "matmul" if where != "optimizer" else "optimizer"
    if kind:
        return kind
    # A scope's own time is what is between the operators in it, but for one that calls a kernel in C.
    if not event.name.startswith(("aten::", "onevocab::")) and not event.name.endswith(("C", "CBackward")):
        return PYTHON
    return where or "other arithmetic"


def named(trainable):
    """The same step, its optimiser's part under a name that the profiler sees."""
    inner = trainable.optimizers

    def step():
        with record_function(OPTIMIZER):
            inner.step()

    trainable.optimizers = SimpleNamespace(step=step, zero_grad=inner.zero_grad)
    return trainable.step


def measure_kinds(call, steps: int) -> tuple[dict[str, float], float]:
    """call(i) is a step -> (seconds of a step by kind, seconds of a step without the profiler)."""
    for i in range(2):
        call(i)
    begin = time.perf_counter()
    for i in range(steps):
        call(i)
    plain = (time.perf_counter() - begin) / steps
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for i in range(steps):
            with record_function(STEP):
                call(i)
    kinds: dict[str, float] = {}
    for event in profiler.events():
        kind = kind_of(event)
        kinds[kind] = kinds.get(kind, 0.0) + event.self_cpu_time_total / 1e6 / steps
    return kinds, plain


@cli
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_step", description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", default="mixed", choices=[*train_step.PRESETS, *PARTS])
    parser.add_argument("--provider", default=train_step.MUON, help="of a training step")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="unless given, what train.py would choose")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="sizes for trying it out")
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise UserError("--steps is at least 1")
    device = torch.device("cpu")
    dtype = args.dtype or select_precision("auto", device)
    if args.preset in PARTS:
        call, shape = PARTS[args.preset](getattr(torch, dtype), args.tiny)
    else:
        preset = train_step.PRESETS[args.preset]
        shape = preset.shapes["cpu"] | (preset.shapes["tiny"] if args.tiny else {})
        work = preset.build(shape, device, getattr(torch, dtype))
        if args.provider not in work.providers:
            raise UserError(f"--provider is one of {', '.join(work.providers)}")
        call = named(work.providers[args.provider]())
    kinds, plain = measure_kinds(call, args.steps)
    total = sum(kinds.values())
    print(f"{args.preset}, {dtype}, {torch.get_num_threads()} threads: {plain * 1e3:.1f} ms a step, "
          f"{total * 1e3:.1f} ms with the profiler, of which:")
    rows = sorted(kinds.items(), key=lambda item: (item[0] not in ARITHMETIC, -item[1]))
    for kind, seconds in rows:
        print(f"  {kind:48} {seconds * 1e3:8.2f} ms {seconds / total:6.1%}")
    idle = sum(seconds for kind, seconds in rows if kind not in ARITHMETIC)
    print(f"  not arithmetic: {idle / total:.1%}")
    if args.out:
        command = shlex.join(["python", "-m", "benchmarks.profile_step", *(sys.argv[1:] if argv is None else argv)])
        of_what = {"command": command, "preset": args.preset}
        of_what |= {} if args.preset in PARTS else {"provider": args.provider}
        write_json(args.out, {**provenance(), **of_what, "dtype": dtype, "shape": shape,
                              "threads": torch.get_num_threads(), "seconds": plain, "kinds": kinds,
                              "not_arithmetic": idle / total})


if __name__ == "__main__":
    main()
