"""A run whose language stages are trained on a machine that is lent for minutes, has a GPU and no network.

    python -m onevocab.pipeline.away prepare configs/hopper.toml --out runs/gpu       here: all stages up to the codes
    python -m onevocab.pipeline.away train runs/gpu/run.tar.xz runs/hopper --minutes 8 --out DIR         there
    python -m onevocab.pipeline.away take DIR runs/hopper                             here again; then the evaluation

`make demo-gpu-prepare`, `demo-gpu` and `demo-gpu-evaluate` do these. All settings are overridden as those of `train.py`
are. On the way back weights are rounded to bfloat16.
"""

import faulthandler
import importlib.metadata
import os
import signal
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from onevocab.common.commands import Parser
from onevocab.common.errors import UserError, cli
from onevocab.common.files import check_writable, write_atomic
from onevocab.common.paths import path_argument
from onevocab.pipeline.config import RunConfig, read_config
from onevocab.pipeline.inputs import AWAY
from onevocab.pipeline.packed import pack, take_back, unpack, write_back
from onevocab.pipeline.run import Run
from onevocab.training.faults import Stopped
from onevocab.training.metrics import read_metrics

# What travels as wheels, in the versions that are installed here. THERE is what the other machine has to have.
CARRIED = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions", "webdataset",
           "braceexpand", "pyyaml", "rustbpe", "soundfile", "cffi", "pycparser", "tomli-w", "tqdm")
THERE = ("torch", "torchaudio", "triton", "einops", "numpy", "matplotlib", "pillow", "safetensors", "tiktoken")
ENDING = 30.0  # seconds for the last checkpoint and what comes back
BETWEEN = 20.0  # seconds for the start of a second stage, whose layers are compiled again


def prepare(config: RunConfig, out: Path, most: int) -> None:
    """Makes a run up to its codes, packs it, and says which wheels it needs."""
    check_writable(out)
    Run(config).train(until="codes")
    size = pack(Path(config.folder), out / "run.tar.xz", most)
    lines = [f"{name}=={importlib.metadata.version(name)}\n" for name in CARRIED]
    write_atomic(out / "requirements.txt", "".join(lines))
    print(f"{out / 'run.tar.xz'}: {size / 2**20:.1f} MiB of at most {most / 2**20:.0f}; the wheels of "
          f"{out / 'requirements.txt'} travel with it")


def steps_that_fit(lines: list[dict], tokens: int, seconds: float) -> int:
    """How many steps of `tokens` tokens, padding included, take so many seconds, by the metrics of an earlier stage
    whose steps were alike. The first half of the lines waited for the compiler."""
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    if not rates:
        return 1
    return max(1, int(seconds * statistics.median(rates[len(rates) // 2 :]) / tokens))


@contextmanager
def stopping_at(deadline: float):
    """A training that still runs then (time.monotonic) saves and ends, as by SIGTERM; so does one that is asked to."""
    def ask(*_):
        raise Stopped("stopped before a training step; the same command continues")

    def late(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, ask), signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(deadline - time.monotonic(), 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGALRM, before[1])


def train(packed: Path, folder: Path, minutes: float, out: Path, words: list[str], began: float) -> None:
    """Both language stages within so many minutes since `began`, and what is to come back. The second has at most the
    steps of its configuration. Started again, it goes on."""
    deadline = began + 60 * minutes
    check_writable(out)
    if not (folder / "shards" / AWAY).exists():
        unpack(packed, folder)
    config = read_config(folder / "config.toml", [f"--folder={folder}", *words])
    faulthandler.dump_traceback_later(deadline - time.monotonic() + 2 * ENDING, exit=True)
    try:
        with stopping_at(deadline - ENDING):
            Run(config).train(until="pretrain")
            if not (folder / "instruct" / "started.json").exists():
                config = with_steps(config, folder, deadline - ENDING - BETWEEN - time.monotonic())
            Run(config).train()
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
    finally:
        faulthandler.cancel_dump_traceback_later()
    files = write_back(folder, out)
    print("to be taken back: " + ", ".join(f"{path} ({path.stat().st_size / 2**20:.1f} MiB)" for path in files))


def with_steps(config: RunConfig, folder: Path, seconds: float) -> RunConfig:
    """The configuration with as many steps of instruct as fit into what is left."""
    rows = config.instruct.rows
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["stage"] == "pretrain"]
    fit = steps_that_fit(lines, rows.global_batch_size * rows.seq_len, seconds)
    steps = min(fit, config.instruct.steps)
    print(f"instruct: {steps:,} steps ({seconds:.0f} s are left, {fit:,} would fit)", file=sys.stderr, flush=True)
    return config.model_copy(update={"instruct": config.instruct.model_copy(update={"steps": steps})})


@cli
def main(argv: list[str] | None = None) -> None:
    began = time.monotonic()
    parser = Parser(prog="python -m onevocab.pipeline.away", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    here = commands.add_parser("prepare", help="all stages up to the codes, packed", allow_abbrev=False)
    here.add_argument("config", type=path_argument, help="TOML; --section.key=value overrides it")
    here.add_argument("--out", type=path_argument, required=True, help="folder of run.tar.xz and requirements.txt")
    here.add_argument("--most", type=float, default=40, help="MiB that run.tar.xz may have")
    there = commands.add_parser("train", help="both language stages of a packed run", allow_abbrev=False)
    there.add_argument("packed", type=path_argument, help="run.tar.xz")
    there.add_argument("run", type=path_argument, help="the run folder that is made of it")
    there.add_argument("--minutes", type=float, default=8, help="for everything")
    there.add_argument("--out", type=path_argument, required=True, help="folder of what is to be taken back")
    back = commands.add_parser("take", help="the trained weights into the run that was packed", allow_abbrev=False)
    back.add_argument("folder", type=path_argument, help="what `train` wrote to its --out")
    back.add_argument("run", type=path_argument)
    args, words = parser.parse_known_args(argv)
    if args.command == "prepare":
        prepare(read_config(args.config, words), args.out, int(args.most * 2**20))
    elif args.command == "train":
        if not args.minutes * 60 > ENDING:
            raise UserError(f"--minutes must leave more than the {ENDING:.0f} s of the last checkpoint")
        train(args.packed, args.run, args.minutes, args.out, words, began)
    else:
        if words:
            raise UserError(f"unrecognized arguments: {' '.join(words)}; see {parser.prog} take --help")
        print(f"the weights are in {take_back(args.folder, args.run)}")


if __name__ == "__main__":
    main()
