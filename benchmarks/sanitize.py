"""The kernels' tiny shapes under compute-sanitizer's memory checker, where that is installed.

    python -m benchmarks.sanitize --kernels attention vq

Its last line is the verdict; the exit code is 1 when it found something, 0 also where it could not run.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys

from benchmarks import checkout
from benchmarks.work import OURS
from onevocab.common.errors import cli


def sanitize(kernels: list[str], seconds: float) -> tuple[str, bool]:
    """The checker's verdict on these benchmarks' tiny shapes, and whether it found something."""
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
        return f"did not run here (exit {done.returncode}): {' '.join(output[-200:].split())}", False
    wrong = [line for line in summaries if " 0 errors" not in line]
    if not wrong and done.returncode:
        return f"{summaries[-1]}, but exit {done.returncode}: {' '.join(output[-200:].split())}", True
    return (wrong or summaries)[-1], bool(wrong)


@cli
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__.split("\n\n")[0])
    parser.add_argument("--kernels", nargs="+", required=True, metavar="NAME", help="benchmarks")
    parser.add_argument("--seconds", type=float, default=80)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="they are tiny anyway")
    args = parser.parse_args(argv)
    verdict, wrong = sanitize(args.kernels, args.seconds) if args.device == "cuda" else ("not run: no GPU", False)
    print(verdict)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
