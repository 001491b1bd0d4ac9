"""What can be done with a run once it is trained."""

import shlex
from pathlib import Path

from onevocab.evaluation.config import DEMO_TASKS
from onevocab.pipeline.config import RunConfig
from onevocab.tasks import load_tasks
from onevocab.tokenizers.modalities import MODALITIES
from onevocab.training.metrics import read_metrics


def next_steps(config: RunConfig, media: list[str]) -> list[str]:
    """Commands that fit a run which knows the modalities `media`, one a line."""
    ask = f"python sample.py {shlex.quote(config.folder)}"
    lines = [f"done: {config.folder}. Try:", f"  {ask} --chat"]
    for name in media:
        lines += [f'  {ask} --text "..." --want {name}',
                  f'  {ask} --{name} FILE{MODALITIES[name].suffixes[0]} --text "..."']
    if _can_be_asked(config, media):
        lines.append(f"evaluate: python -m onevocab.evaluation {shlex.quote(config.folder)}")
    return lines


def _can_be_asked(config: RunConfig, media: list[str]) -> bool:
    """Whether the evaluation has something to ask: without tasks of its own, the run's shards are asked about,
    which must hold some samples out."""
    name = config.evaluate.tasks or (None if config.data.demo is None else DEMO_TASKS)
    if name is None:
        return _held_out(config)
    return any(task.metrics and set(task.media) <= set(media) for task in load_tasks(name).tasks)


def _held_out(config: RunConfig) -> bool:
    """Whether the run measured a loss on held-out samples; where it was not to, they may be there."""
    try:
        lines = read_metrics(Path(config.folder) / "metrics.jsonl")
    except OSError:
        lines = []
    lines = [line for line in lines if line.get("stage") == "instruct"]
    return not (config.instruct.valid_every and lines) or any("valid_loss" in line for line in lines)
