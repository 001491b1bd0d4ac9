"""Compiles every Triton kernel for GPUs that need not be there, and says what each needs of the chip.

    python -m onevocab.kernels.aot --out docs/kernels-aot.json
    python -m onevocab.kernels.aot --cases attention-128 --targets 90        prints, writes nothing

A case calls a public function on small CPU tensors while launching is replaced by recording, so what is compiled is
what a GPU would run: the launchers' own arguments, the configs of the tuning table, and Triton's own specialisation
(strides and pointers that 16 divides). The results are of no use, the compiled code is: shared memory, registers,
spills (loads and stores of local memory) and the instructions that feed tensor cores, from the disassembly.
Each case is compiled in a process of its own, without the interpreter.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from onevocab.common.errors import UserError, cli
from onevocab.common.files import read_json, write_json
from onevocab.kernels import backend, tuning

TARGETS = (90, 80)
SHARED_LIMIT = {90: 232_448, 80: 166_912}  # bytes a program may have, CUDA programming guide, table of capabilities
# Instructions of the disassembly: matrix products (warpgroup, warp), TMA loads, and spills.
COUNTED = {"HGMMA": "HGMMA", "HMMA": "HMMA", "UTMALDG": "UTMALDG", "LDL": "LDL", "STL": "STL"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TIMEOUT = 600  # seconds for a case


def _leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def _backward(*outputs: Tensor) -> None:
    torch.autograd.backward(outputs, [torch.zeros_like(x) for x in outputs])


def _attention(dim: int, dtype: torch.dtype, two: bool) -> None:
    """Forward and backward, four query heads per key head, rows of 512."""
    from onevocab.kernels.attention import IntervalMask, attention

    q, k, v = (_leaf(1, 512, heads, dim, dtype=dtype) for heads in (8, 2, 2))
    document = torch.arange(512)[None] // 128
    mask = IntervalMask.shared_prefix(document, document.clamp(max=1) - 1) if two else IntervalMask.causal(document)
    _backward(attention(*(x.transpose(1, 2) for x in (q, k, v)), mask))


def _decode(dim: int, dtype: torch.dtype, paged: bool, parts: int | None = None) -> None:
    """parts: into how many the keys are cut; on CPU tensors the launcher itself would cut little."""
    from onevocab.kernels.decode import decode_attention

    keys = torch.zeros(2 * 64, 2, 16, dim, dtype=dtype) if paged else torch.zeros(2, 2, 1024, dim, dtype=dtype)
    table = torch.arange(128, dtype=torch.int32).view(2, 64) if paged else None
    lengths = torch.full((2,), 1024, dtype=torch.int32)
    with tuning.forced(decode_attention={"PARTS": parts}) if parts else contextlib.nullcontext():
        decode_attention(torch.zeros(2, 8, 1, dim, dtype=dtype), keys, keys, lengths, table)


def _cross_entropy(vocabulary: int, dtype: torch.dtype) -> None:
    from onevocab.kernels.cross_entropy import linear_cross_entropy

    targets, weights = torch.zeros(32, dtype=torch.long), torch.ones(32)
    head = _leaf(vocabulary, 16, dtype=dtype)
    linear_cross_entropy(_leaf(32, 16, dtype=dtype), head, targets, weights, 1e-4).loss.backward()


def _rms_norm(width: int, dtype: torch.dtype, residual: bool) -> None:
    from onevocab.kernels.elementwise import rms_norm

    x, weight = _leaf(64, width, dtype=dtype), _leaf(width, dtype=dtype)
    out = rms_norm(x, weight, 1e-6, residual=_leaf(64, width, dtype=dtype) if residual else None)
    _backward(*(out if residual else (out,)))


def _qk_norm_rope(dim: int, dtype: torch.dtype) -> None:
    from onevocab.kernels.elementwise import qk_norm_rope

    angles = (torch.zeros(1, 64, dim // 2, dtype=dtype) for _ in range(2))
    _backward(qk_norm_rope(_leaf(1, 64, 4, dim, dtype=dtype), _leaf(dim, dtype=dtype), *angles, 1e-6))


def _swiglu(width: int, dtype: torch.dtype) -> None:
    from onevocab.kernels.elementwise import swiglu

    _backward(swiglu(_leaf(64, width, dtype=dtype), _leaf(64, width, dtype=dtype)))


def _vq(dim: int, dtype: torch.dtype) -> None:
    from onevocab.kernels.vq import vq_assign

    vq_assign(torch.zeros(64, dim, dtype=dtype), torch.zeros(512, dim, dtype=dtype))


def _cases() -> dict[str, Callable[[], None]]:
    """name -> call: together they reach every row of the tuning table that a target can reach."""
    plan: list[tuple[str, Callable, tuple[int, ...], tuple[str, ...], dict[str, tuple]]] = [
        ("attention", _attention, (64, 128), ("bf16",), {"": (False,), "-two": (True,)}),
        ("attention", _attention, (128,), ("fp16", "fp32"), {"-two": (True,)}),
        ("decode", _decode, (64, 128, 256), ("bf16",), {"": (False,), "-paged": (True,)}),
        ("decode", _decode, (128,), ("bf16",), {"-parts": (False, 64)}),  # as a GPU would cut a long context
        ("decode", _decode, (128, 256), ("fp32",), {"": (False,)}),
        ("cross_entropy", _cross_entropy, (4096, 32768), ("bf16", "fp32"), {"": ()}),
        ("rms_norm", _rms_norm, (256, 1024, 2048, 4096, 16384), ("bf16",), {"": (False,)}),
        ("rms_norm", _rms_norm, (1024, 4096), ("bf16", "fp32"), {"-residual": (True,)}),
        ("qk_norm_rope", _qk_norm_rope, (64, 128, 256), ("bf16",), {"": ()}),
        ("qk_norm_rope", _qk_norm_rope, (128,), ("fp32",), {"": ()}),
        ("swiglu", _swiglu, (4096,), ("bf16", "fp32"), {"": ()}),
        ("vq", _vq, (16, 64, 256), ("fp32", "bf16"), {"": ()}),
    ]
    return {
        f"{name}-{width}-{dtype}{suffix}": lambda call=call, width=width, dtype=dtype, more=more: call(
            width, DTYPES[dtype], *more)
        for name, call, widths, dtypes, kinds in plan
        for width in widths for dtype in dtypes for suffix, more in kinds.items()
    }


CASES = _cases()
# What a model runs most: these have no spills, and their matrix products use warpgroups on Hopper.
MAIN = tuple(name for name in CASES if name.startswith(("attention-64-bf16", "attention-128-bf16")))


@contextlib.contextmanager
def recording(capability: int, rows: set | None = None) -> Iterator[list]:
    """Within it, kernels are not launched but listed as (function, args, kwargs), for CPU tensors that pass as a
    device of this capability; rows collects the (operation, width, dtype) that the tuning table was asked for."""
    from triton.runtime.jit import JITFunction

    launched: list[tuple] = []
    device, look_up = SimpleNamespace(type="cuda"), tuning.config

    def config(operation, width, dtype, _):
        if rows is not None:
            rows.add((operation, width, dtype))
        return look_up(operation, width, dtype, device)

    replaced = [
        (JITFunction, "run", lambda self, *args, grid, warmup, **options: launched.append((self, args, options))),
        (tuning, "config", config),
        (torch.cuda, "get_device_capability", lambda _: divmod(capability, 10)),
        (backend, "interpreting", lambda: True),  # lets CPU tensors through to Triton's launchers
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    forced = os.environ.pop(backend.VARIABLE, None)
    os.environ[backend.VARIABLE] = "triton"
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        yield launched
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)
        os.environ.pop(backend.VARIABLE)
        if forced is not None:
            os.environ[backend.VARIABLE] = forced


def compile_launch(function, args: tuple, options: dict, target):
    """Triton's own way from a launch to compiled code, without the launch."""
    import triton
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    compiler = make_backend(target)
    bind = create_function_from_signature(function.signature, function.params, compiler)
    bound, specialization, _ = bind(*args, **options)
    parsed, signature, constants, attributes = function._pack_args(compiler, options, bound, specialization, options)
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=target, options=parsed.__dict__), constants


def usage(cubin: bytes) -> dict[str, int]:
    """Registers and stack of a thread, and counted instructions, by the tools that come with Triton."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        resources = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", path], capture_output=True, text=True,
                                   check=True).stdout
        code = subprocess.run([tools / "nvdisasm", path], capture_output=True, text=True, check=True).stdout
    found = {key.lower(): int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", resources)}
    return found | {name: len(re.findall(rf"\b{name}\b", code)) for name in COUNTED}


def compile_case(name: str, target: int) -> list[dict]:
    """Every kernel that a case launches, compiled for one target; equal launches once."""
    import triton
    from triton.backends.compiler import GPUTarget

    if triton.knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET is set: kernels cannot be compiled beside the interpreter")
    if name not in CASES:
        raise UserError(f"no case {name}; choose from {', '.join(CASES)}")
    with recording(target) as launched:
        CASES[name]()
    rows: list[dict] = []
    for function, args, options in launched:
        compiled, constants = compile_launch(function, args, options, GPUTarget("cuda", target, 32))
        names = [parameter.name for parameter in function.params]
        sizes = {names[path[0]]: value for path, value in constants.items()
                 if len(path) == 1 and names[path[0]].isupper() and isinstance(value, int)}
        row = {"kernel": function.__name__, "constants": {key: int(value) for key, value in sizes.items()},
               "warps": compiled.metadata.num_warps, "stages": compiled.metadata.num_stages,
               "shared": compiled.metadata.shared, **usage(compiled.asm["cubin"])}
        if row not in rows:
            rows.append(row)
    return rows


def in_process(name: str, target: int) -> list[dict]:
    """`compile_case` in a fresh process. Raises UserError with the end of its output when it fails."""
    command = [sys.executable, "-m", "onevocab.kernels.aot", "--one", name, "--targets", str(target)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment)
    except subprocess.TimeoutExpired:
        raise UserError(f"{name} for sm_{target} was not compiled within {TIMEOUT} s") from None
    if done.returncode:
        raise UserError(f"{name} for sm_{target} does not compile:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def problems(table: dict[str, dict[str, list[dict]]]) -> list[str]:
    """What of the table breaks a rule: too much shared memory; spills, or no warpgroup products, in a main case."""
    found = []
    for name, targets in table.items():
        for target, rows in targets.items():
            for row in rows:
                where = f"{name}, sm_{target}, {row['kernel']}"
                if row["shared"] > SHARED_LIMIT[int(target)]:
                    found.append(f"{where}: {row['shared']:,} B of shared memory, limit {SHARED_LIMIT[int(target)]:,}")
                if name in MAIN and target == "90":
                    if row["LDL"] or row["STL"]:
                        found.append(f"{where}: spills ({row['LDL']} loads, {row['STL']} stores)")
                    if row["kernel"] != "delta_kernel" and not row["HGMMA"]:
                        found.append(f"{where}: no warpgroup matrix products")
    return found


@cli
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m onevocab.kernels.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="JSON table; cases that are not compiled now keep their entries")
    parser.add_argument("--cases", default="", help="regular expression: only cases in whose names it is found")
    parser.add_argument("--targets", type=int, nargs="+", choices=TARGETS, default=TARGETS, help="sm_90, sm_80")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--one", metavar="CASE", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(compile_case(args.one, args.targets[0])))
        return
    chosen = [name for name in CASES if re.search(args.cases, name)]
    if not chosen or args.jobs < 1:
        raise UserError(f"--cases {args.cases} finds none of {', '.join(CASES)}" if not chosen else "--jobs is below 1")
    if args.list:
        print("\n".join(chosen))
        return
    try:
        import triton
    except ImportError:
        raise UserError("triton is not installed: pip install triton") from None

    old = read_json(args.out) if args.out and args.out.exists() else {}
    kept = old.get("cases", {}) if old.get("triton") == triton.__version__ else {}  # of another version: all anew
    table: dict[str, dict] = {name: dict(kept.get(name, {})) for name in CASES if name in kept or name in chosen}
    todo = [(name, target) for name in chosen for target in args.targets]
    with ThreadPoolExecutor(args.jobs) as pool:
        for (name, target), rows in zip(todo, pool.map(lambda each: in_process(*each), todo), strict=True):
            table[name][str(target)] = rows
            for row in rows:
                counts = ", ".join(f"{row[key]} {key}" for key in COUNTED if row[key])
                needs = f"{row['shared']:>8,} B shared, {row['reg']:>3} registers" + (f", {counts}" if counts else "")
                print(f"{name:28} sm_{target} {row['kernel']:20} {needs}", flush=True)
    if args.out:
        write_json(args.out, {"triton": triton.__version__, "main": list(MAIN), "cases": table})
    broken = problems(table)
    if broken:
        raise UserError("\n".join(["rules broken:", *broken]))


if __name__ == "__main__":
    main()
