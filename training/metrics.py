"""What a run writes down: metrics.jsonl, curves, a progress bar, and wandb when it is asked for."""

import io
import json
import os
import re
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from onevocab.common.files import sync, write_atomic
from onevocab.training import distributed

WANDB_SECONDS = 30  # to begin; then the run goes on without


class Totals:
    """Sums by modality since the last report, in float64: weighted nll, weights, tokens, keys that these see."""

    def __init__(self, modalities: list[str], device: torch.device):
        self.modalities = modalities
        self.sums = torch.zeros(4, len(modalities), device=device, dtype=torch.float64)

    def add(self, batch, nll: Tensor) -> None:
        """A step of this rank; nll (B * S,) in nats."""
        kind, weights = batch.modality.flatten().long(), batch.loss_weights.flatten().to(self.sums.dtype)
        real = (batch.document_ids.flatten() >= 0).to(self.sums.dtype)
        keys = (batch.positions.flatten() + 1) * real
        for total, values in zip(self.sums, (nll.to(weights.dtype) * weights, weights, real, keys), strict=True):
            total.index_add_(0, kind, values)

    def report(self, seconds: float, flops: Callable[[float, float], float], peak_flops: float) -> dict[str, float]:
        """Losses and tokens a second, by modality and together, of all ranks, then starts anew. flops: tokens and keys
        -> FLOPs of a step; peak_flops: of a device, in FLOP/s; with it also `mfu`, their part of it."""
        losses, weights, tokens, keys = self.summed()
        self.sums.zero_()
        values = {f"loss_{name}": loss / weight
                  for name, loss, weight in zip(self.modalities, losses, weights, strict=True) if weight}
        values["tokens_per_second"] = sum(tokens) / seconds
        values |= {f"tokens_per_second_{name}": number / seconds
                   for name, number in zip(self.modalities, tokens, strict=True) if number}
        if peak_flops:
            values["mfu"] = flops(sum(tokens), sum(keys)) / seconds / (peak_flops * distributed.world())
        return values

    def summed(self) -> list[list[float]]:
        """The sums of all ranks together; all of them call it."""
        return distributed.all_reduce_sum(self.sums.clone()).tolist()

    def gathered(self) -> list:
        """The sums of every rank, for `load`; all ranks call it."""
        return distributed.gather(self.sums.tolist())

    def load(self, gathered: list) -> None:
        """Adds what `gathered` returned. On another number of ranks rank 0 takes it all: the sum over ranks stays."""
        parts = torch.tensor(gathered, device=self.sums.device, dtype=self.sums.dtype)
        same_ranks = len(parts) == distributed.world()
        self.sums += parts[distributed.rank()] if same_ranks else parts.sum(0) * distributed.is_main()


class MetricsLog:
    """Appends JSON lines {"stage", "step", ...} to a file; active on one rank only (path None: does nothing).

    wandb: a project's name, or None; its files lie beside the log, also with WANDB_MODE=offline. wandb can never stop a
    run: its first error is printed, then it is left out. Lines that the disk does not take are reported too, and
    written with the next ones.
    """

    def __init__(self, path=None, wandb: str | None = None, run_name: str = ""):
        self.path, self._wandb, self._waiting = Path(path) if path else None, None, ""
        if self.path and wandb:
            def begin():
                import wandb as library

                self.path.parent.mkdir(parents=True, exist_ok=True)
                settings = library.Settings(init_timeout=WANDB_SECONDS, silent=True)
                return library.init(project=wandb, name=run_name, dir=self.path.parent, settings=settings)

            self._wandb = self._attempt(begin)

    def write(self, stage: str, step: int, **values) -> None:
        if self.path is None:
            return
        self._waiting += json.dumps({"stage": stage, "step": step, **values}) + "\n"
        self._write_waiting()
        if self._wandb is not None:
            named = {f"{stage}/{name}": value for name, value in {"step": step, **values}.items()}
            self._attempt(lambda: self._wandb.log(named))

    def _write_waiting(self) -> None:
        size = None
        try:
            size = self.path.stat().st_size if self.path.exists() else 0
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(self._waiting)
            self._waiting = ""
        except OSError as error:
            print(f"{self.path} cannot be written, its newest lines wait: {error.strerror}", file=sys.stderr)
            with suppress(OSError):  # the part of them that was written
                if size is not None:
                    os.truncate(self.path, size)

    def sync(self) -> None:
        """Waits until the disk has all lines. Called before a checkpoint: a run that resumes from it does not write the
        lines before it again."""
        if self.path is not None and self.path.exists():
            with suppress(OSError):
                sync(self.path)

    def close(self) -> None:
        """Writes the lines that wait, or prints how many are lost; lets wandb send its own."""
        if self._waiting:
            self._write_waiting()
        if self._waiting:
            print(f"{self._waiting.count(chr(10))} lines of {self.path} are lost", file=sys.stderr)
        if self._wandb is not None:
            self._attempt(lambda: self._wandb.finish())

    def _attempt(self, work):
        try:
            return work()
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else repr(error)
            print(f"wandb is left out from here: {reason}", file=sys.stderr)
            self._wandb = None

    def cut_back(self, stage: str, step: int) -> None:
        """Forgets a stage's lines after `step`: a resumed run writes them again."""
        if self.path is None or not self.path.exists():
            return
        kept = [line for line in read_metrics(self.path) if line["stage"] != stage or line["step"] <= step]
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept))


def read_metrics(path) -> list[dict]:
    """The lines of a metrics.jsonl; one that a crash cut short, or that is damaged, is left out."""
    lines = []
    for text in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and {"stage", "step"} <= line.keys():
                lines.append(line)
    return lines


def last_losses(path) -> dict[str, dict[str, float]]:
    """Of each language stage: its last losses by modality, nats a token."""
    losses = {}
    for line in read_metrics(path):
        values = {name.removeprefix("loss_"): value for name, value in line.items() if name.startswith("loss_")}
        if values:
            losses[line["stage"]] = {"step": line["step"], **values}
    return losses


# The panels of a picture of curves: title, pattern of the names drawn in it, whether on a logarithmic scale.
PANELS = [
    ("loss (nats a token)", r"(valid_)?loss(_\w+)?", True),
    ("gradient norm", r"gradient_norm", True),
    ("norm of the last layer's output, z", r"output_norm|z", False),
    ("tokens a second", r"tokens_per_second(_\w+)?", False),
]


def curves(lines: list[dict], stage: str) -> bytes | None:
    """A stage's losses and signals over its steps, from the lines of a metrics.jsonl, as a PNG; None when there are no
    losses. Panels without values are left out."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no state

    lines = [line for line in lines if line.get("stage") == stage]
    names = {name for line in lines for name in line}
    drawn = [(title, members, log) for title, pattern, log in PANELS
             if (members := sorted(name for name in names if re.fullmatch(pattern, name)))]
    if not any(re.fullmatch(PANELS[0][1], name) for name in names):
        return None
    columns = min(len(drawn), 2)
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(6 * columns, 3.5 * rows), dpi=110, layout="constrained")
    figure.suptitle(stage)
    for place, (title, members, log) in enumerate(drawn, 1):
        axes = figure.add_subplot(rows, columns, place)
        for name in members:
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            held_out = name.startswith("valid_")
            label = re.sub("^(loss|tokens_per_second)_", "", name.removeprefix("valid_")) + ", held out" * held_out
            axes.plot(*zip(*points, strict=True), "--" if held_out else "-", label=label, linewidth=1.2)
        axes.set(title=title, xlabel="step", yscale="log" if log else "linear")
        axes.grid(alpha=0.3)
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def peak_memory(device: torch.device) -> int:
    """Peak memory so far in bytes: of torch's allocator on a GPU, of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def progress(total: int, done: int, label: str, active: bool) -> tqdm:
    """A bar with rate and time left; on a log file it writes a line now and then instead of many."""
    interactive = sys.stderr.isatty()
    return tqdm(total=total, initial=done, desc=label, disable=not active, dynamic_ncols=True,
                mininterval=0.5 if interactive else 15.0, maxinterval=60.0, unit="step")
