"""Everything that needs a GPU, in one command and within nine minutes: `make bench-gpu`.

    python -m benchmarks.gpu --out folder
    python -m benchmarks.gpu --list
    python -m benchmarks.gpu --out folder --only checks sweep

Runs from a plain checkout with torch, triton, numpy and einops; nothing has to be installed. Its steps
(benchmarks/steps.py) come in order of worth, each in processes of their own and with a limit: a CUDA context that is
lost, or a kernel that hangs, costs one step. After every step the folder has two files anew: `log`, and `results.tgz`
with a JSON file per step, what each printed, and `targets.md`, all targets beside what was measured. Tables and
pictures are made later, anywhere, by benchmarks.plot. The exit code says whether a step failed; what there was no time
for is named.
"""

import argparse
import os
import re
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import checkout
from benchmarks.processes import run_together
from benchmarks.steps import Step, steps
from benchmarks.targets import page
from onevocab.common.errors import UserError, cli
from onevocab.common.files import read_json, write_atomic
from onevocab.common.provenance import COMMIT, commit, provenance


class Session:
    """One run of the command: the folder that is given, and a work folder whose files end in its results.tgz."""

    def __init__(self, out: Path, device: str, tiny: bool, seconds: float):
        self.out, self.device, self.tiny = out, device, tiny
        self.began, self.deadline = time.monotonic(), time.monotonic() + seconds
        out.mkdir(parents=True, exist_ok=True)
        self.log = open(out / "log", "x", encoding="utf-8")  # noqa: SIM115  as long as the process
        self.work = Path(tempfile.mkdtemp(prefix="bench-gpu-"))
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        self.label = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "")).strip("-") + "-tiny" * tiny
        self.outcomes: list[tuple[str, float, str]] = []  # step, seconds, what came of it
        self.failed: list[str] = []
        self.results = self.work / "results"
        self.results.mkdir()
        # The home folder may not be writable. What one step compiled, the next finds here.
        caches = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
        self.environment = {name: str(self.work / folder) for name, folder in caches.items()} | os.environ | {
            "PYTHONPATH": os.pathsep.join([str(checkout.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}

    def say(self, text: str) -> None:
        print(text, flush=True)
        print(text, file=self.log, flush=True)

    def run(self, step: Step) -> None:
        """One step, unless less than half of its time is left. Whatever becomes of it, the next can follow."""
        left = self.deadline - time.monotonic()
        if left < step.seconds / 2:
            self.outcomes.append((step.name, 0, "left out: no time"))
            self.say(f"== {step.name}: left out, {left:.0f} s are left")
            return
        commands = []
        for module, *words in step.commands:
            words += ["--device", self.device, *(["--tiny"] if self.tiny and "--tiny" not in words else [])]
            words += ["--out", f"{step.name}-{self.label}.json"] if step.measures else []
            commands.append([sys.executable, "-m", module, *words])
        self.say(f"== [{time.monotonic() - self.began:.0f} s] {step.name}: {step.about}")
        began = time.monotonic()
        outcomes = run_together(commands, min(step.seconds, left), self.results, step.name, self.environment)
        for words, outcome in zip(step.commands, outcomes, strict=True):
            self.say(f"{' '.join(words)}\n{outcome.output}")
            if outcome.failure:
                self.say(f"== {outcome.failure}")
                if not (outcome.late and left < step.seconds):  # else the step had less than it takes
                    self.failed.append(f"{step.name}: {' '.join(words)}: {outcome.failure}")
        bad = [outcome for outcome in outcomes if outcome.failure]
        said = [line for line in (bad or outcomes)[-1].output.splitlines() if line.strip()] or [""]
        self.outcomes.append((step.name, time.monotonic() - began,
                              (f"{len(bad)} of {len(outcomes)} failed: {bad[0].failure}: " if bad else "")
                              + said[-1].strip()[:160]))
        self.pack()

    def pack(self) -> str:
        """Writes targets.md and results.tgz anew; returns the page."""
        measured = {}
        for path in sorted(self.results.glob("*.json")):
            result = read_json(path)
            if isinstance(result, dict) and "presets" in result:
                measured[path.stem] = result
        text = page(self.label, measured, self.outcomes, self.failed)
        write_atomic(self.results / "targets.md", text)
        packed = self.work / "results.tgz"
        with tarfile.open(packed, "w:gz") as archive:
            for path in sorted(self.results.iterdir()):
                archive.add(path, path.name)
        write_atomic(self.out / "results.tgz", packed.read_bytes())
        return text

    def close(self) -> None:
        self.log.close()
        shutil.rmtree(self.work, ignore_errors=True)


def chosen(plan: list[Step], names: list[str] | None) -> list[Step]:
    """The steps of these names, in the plan's order."""
    known = [step.name for step in plan]
    if unknown := [name for name in names or () if name not in known]:
        raise UserError(f"--only {unknown[0]}: choose from {', '.join(known)}")
    return [step for step in plan if not names or step.name in names]


@cli
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-gpu"), help="folder of log and results.tgz")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything; what does not fit is left out")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps only; --list names them")
    parser.add_argument("--list", action="store_true", help="the steps and their commands; nothing is run")
    parser.add_argument("--commit", help=f"of this code, for the results, where there is no git; or set {COMMIT}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to try the command out")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the command out")
    args = parser.parse_args(argv)
    plan, problems = steps(args.device)
    plan = chosen(plan, args.only)
    if args.list:
        for step in plan:
            print(f"{step.name}: {step.about}; at most {step.seconds} s")
            print("".join(f"    {' '.join(repr(word) if ' ' in word else word for word in command)}\n"
                          for command in step.commands), end="")
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU here. On a CPU: python -m benchmarks.attention, and the others one by one")
    if not args.minutes > 0:
        raise UserError("--minutes must be positive")
    if (args.out / "log").exists():
        raise UserError(f"{args.out} has the results of another run; choose another folder with --out")
    if args.commit:
        os.environ[COMMIT] = args.commit
    session = Session(args.out, args.device, args.tiny, 60 * args.minutes)
    session.failed += problems
    try:
        measure_all(session, plan)
    finally:
        session.close()
    if session.failed:
        sys.exit(1)


def measure_all(session: Session, plan: list[Step]) -> None:
    """All steps, as far as the time goes; SIGTERM ends them with what there is."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a step that is ended leaves no image of its memory
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    made = provenance()
    versions = ", ".join(f"{name} {made['versions'][name]}" for name in ("python", "torch", "triton", "numpy")
                         if name in made["versions"])
    session.say(f"{made['device']}; {versions}; commit {commit() or 'unknown: pass it with --commit'}; "
                f"{made['date']}; {(session.deadline - session.began) / 60:g} minutes")
    try:
        for step in plan:
            session.run(step)
    finally:
        signal.signal(signal.SIGTERM, before)
        session.say("\n" + session.pack())
    for problem in session.failed:
        print(f"problem: {problem}", file=sys.stderr)
    session.say(f"log and results.tgz are in {session.out}")


if __name__ == "__main__":
    main()
