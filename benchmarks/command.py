"""The command of every kernel benchmark: `python -m benchmarks.<name>`."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.harness import run
from benchmarks.plot import publish
from benchmarks.work import Preset
from onevocab.common.errors import UserError, cli
from onevocab.common.files import write_json


def shape_of(words: list[str], presets: dict[str, Preset], chosen: list[str]) -> dict:
    """`length=4096 documents=16` as numbers; every name must be one of the presets' own."""
    known = {key for title in chosen for key in presets[title].shapes["cpu"]}
    sizes = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in known or not value.isdigit() or int(value) < 1:
            raise UserError(f"--shape {word}: takes name=number with a name of {', '.join(sorted(known))}")
        sizes[key] = int(value)
    return sizes


def main(name: str, doc: str, presets: dict[str, Preset]) -> Callable[[list[str] | None], None]:
    """The command `python -m benchmarks.<name>`."""
    @cli
    def command(argv: list[str] | None = None) -> None:
        parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=doc.split("\n\n")[0])
        parser.add_argument("--preset", action="append", metavar="NAME", help="may be repeated; all unless given")
        parser.add_argument("--out", type=Path, help="JSON; a table (.md) and a plot (.png) are written beside it")
        parser.add_argument("--json-only", action="store_true", help="no table and no plot beside --out")
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
        words = [*measure.allocator(), f"python -m benchmarks.{name}", *(sys.argv[1:] if argv is None else argv)]

        def save(result: dict) -> None:  # after every preset: what was measured stays, whatever comes next
            if args.out and not args.check:
                write_json(args.out, {**result, "command": " ".join(words)})

        run(name, presets, chosen, torch.device(args.device), dtype=args.dtype, shape=shape, tiny=args.tiny,
            seconds=args.seconds, repetitions=args.repetitions, just_check=args.check,
            only=tuple(args.providers) if args.providers else None, save=save)
        if args.check:
            print("all outputs and gradients of ours are within the bound")
        elif args.out:
            written = [args.out, *([] if args.json_only else publish(args.out))]
            print("written: " + ", ".join(str(path) for path in written))

    return command
