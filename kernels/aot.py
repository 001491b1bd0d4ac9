"""Compiles every Triton kernel for GPUs that need not be there, and says what each needs of the chip.

    python -m onevocab.kernels.aot --write                                   writes kernels/*/aot.json
    python -m onevocab.kernels.aot --cases attention-128 --targets 90        prints, writes nothing

Each operation's folder has its cases, `aot.py`, and the table of what they need, `aot.json`: version of Triton -> case
-> target -> kernels. Both are found, not listed. The tables have two versions, the oldest that GPU machines bring and
the one that wrote last.

A case calls a public function on small CPU tensors while launching is replaced by recording, so what is compiled is
what a GPU would run: the launchers' own arguments, the configs of the tuning tables, and Triton's own specialisation
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from onevocab.common.errors import UserError, cli
from onevocab.common.files import read_json, write_json
from onevocab.kernels import backend, tuning

TARGETS = (90, 80)
OLDEST = "3.6.0"  # Triton as the CUDA builds of torch 2.11 bring it
# CUDA programming guide, table of capabilities. Bytes of shared memory: of a program, of a multiprocessor.
SHARED_LIMIT = {90: 232_448, 80: 166_912}
SHARED, SHARED_RESERVED, REGISTERS, THREADS = {90: 233_472, 80: 167_936}, 1024, 65_536, 2048
# Instructions of the disassembly, name in the table -> expression: matrix products of a warpgroup and of a warp, waits
# for those of a warpgroup, asynchronous copies into shared memory (by address, by descriptor), and spills.
COUNTED = {"HGMMA": r"HGMMA", "waits": r"WARPGROUP\.DEPBAR", "HMMA": r"HMMA", "LDGSTS": r"LDGSTS",
           "UTMALDG": r"UTMALDG", "LDL": r"LDL", "STL": r"STL"}
FOLDER = Path(__file__).resolve().parent
TIMEOUT = 600  # seconds for a case


def operations() -> dict[str, ModuleType]:
    """folder -> its `aot` module, of every folder of `kernels/` that has one."""
    folders = sorted(path.parent.name for path in FOLDER.glob("*/aot.py"))
    return {folder: import_module(f"onevocab.kernels.{folder}.aot") for folder in folders}


OPERATIONS = operations()
CASES = {name: call for module in OPERATIONS.values() for name, call in module.CASES.items()}
FOLDER_OF = {name: folder for folder, module in OPERATIONS.items() for name in module.CASES}
# Cases whose matrix products use warpgroups on Hopper, but for the kernels that multiply nothing.
MAIN = tuple(name for module in OPERATIONS.values() for name in getattr(module, "MAIN", ()))
WITHOUT_PRODUCTS = {name for module in OPERATIONS.values() for name in getattr(module, "WITHOUT_PRODUCTS", ())}
MAY_SPILL = {name for module in OPERATIONS.values() for name in getattr(module, "MAY_SPILL", ())}
TWO_PROGRAMS = {name for module in OPERATIONS.values() for name in getattr(module, "TWO_PROGRAMS", ())}


def table_path(folder: str) -> Path:
    """Where an operation's committed table lies."""
    return FOLDER / folder / "aot.json"


@contextlib.contextmanager
def recording(capability: int, rows: set | None = None) -> Iterator[list]:
    """Within it, kernels are not launched but listed as (function, args, kwargs), for CPU tensors that pass as a
    device of this capability; rows collects the (operation, width, dtype) that a tuning table was asked for."""
    from triton.runtime.jit import JITFunction

    launched: list[tuple] = []
    device, look_up = SimpleNamespace(type="cuda"), tuning.config

    def config(table, operation, width, dtype, _):
        found = look_up(table, operation, width, dtype, device)
        if rows is not None:
            rows.add((operation, width, dtype))
        return found

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
    counts = {key.lower(): int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", resources)}
    return counts | {name: len(re.findall(rf"\b{instruction}\b", code)) for name, instruction in COUNTED.items()}


def programs(registers: int, shared: int, warps: int, target: int) -> int:
    """How many programs a multiprocessor holds at a time: registers are given out in steps of 8 a thread."""
    threads = 32 * warps
    return min(REGISTERS // (-(-registers // 8) * 8 * threads), SHARED[target] // (shared + SHARED_RESERVED),
               THREADS // threads)


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
               "shared": compiled.metadata.shared, **usage(compiled.asm["cubin"]),
               "products": compiled.asm["ttgir"].count("ttng.warp_group_dot ")}
        row["programs"] = programs(row["reg"], row["shared"], row["warps"], target)
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
    """What of case -> target -> kernels breaks a rule. Of all: no more shared memory than there is. On Hopper: no
    spills in 16-bit types, and no product by warpgroups that waits for itself; of main cases, products are by
    warpgroups, and of kernels that a module names a multiprocessor holds two programs, so that one computes while the
    other waits."""
    faults = []
    for name, targets in table.items():
        for target, rows in targets.items():
            for row in rows:
                where = f"{name}, sm_{target}, {row['kernel']}"
                if row["shared"] > SHARED_LIMIT[int(target)]:
                    faults.append(f"{where}: {row['shared']:,} B of shared memory, limit {SHARED_LIMIT[int(target)]:,}")
                if target == "90" and (row["LDL"] or row["STL"]) and not ("fp32" in name or name in MAY_SPILL):
                    faults.append(f"{where}: spills ({row['LDL']} loads, {row['STL']} stores)")
                if row["waits"] > row["products"]:
                    faults.append(f"{where}: {row['waits']} waits for {row['products']} products by warpgroups")
                if name in MAIN and target == "90":
                    if row["kernel"] not in WITHOUT_PRODUCTS and not row["HGMMA"]:
                        faults.append(f"{where}: no warpgroup matrix products")
                    if row["kernel"] in TWO_PROGRAMS and row["programs"] < 2:
                        faults.append(f"{where}: {row['programs']} program a multiprocessor, not 2")
    return faults


def write_table(folder: str, version: str, compiled: dict[str, dict[str, list[dict]]]) -> None:
    """The committed table of one operation: what was found now, the other cases' entries of the same Triton, and those
    of the oldest."""
    path = table_path(folder)
    old = read_json(path) if path.exists() else {}
    kept = old.get(version, {})
    cases = {name: {**kept.get(name, {}), **compiled.get(name, {})} for name in OPERATIONS[folder].CASES}
    others = {other: table for other, table in old.items() if OLDEST in (other, version)}
    now = {name: targets for name, targets in cases.items() if targets}
    write_json(path, dict(sorted({**others, version: now}.items())))


@cli
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m onevocab.kernels.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="kernels/*/aot.json; other cases keep their entries")
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

    table: dict[str, dict] = {name: {} for name in chosen}
    todo = [(name, target) for name in chosen for target in args.targets]
    with ThreadPoolExecutor(args.jobs) as pool:
        for (name, target), rows in zip(todo, pool.map(lambda each: in_process(*each), todo), strict=True):
            table[name][str(target)] = rows
            for row in rows:
                counts = ", ".join(f"{row[key]} {key}" for key in COUNTED if row[key])
                needs = f"{row['shared']:>8,} B shared, {row['reg']:>3} registers, {row['programs']:>2} programs" + (
                    f", {counts}" if counts else "")
                print(f"{name:28} sm_{target} {row['kernel']:20} {needs}", flush=True)
    if args.write:
        for folder in {FOLDER_OF[name]: None for name in chosen}:
            write_table(folder, triton.__version__, table)
    broken = problems(table)
    if broken:
        raise UserError("\n".join(["rules broken:", *broken]))


if __name__ == "__main__":
    main()
