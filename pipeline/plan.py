"""What `--plan` prints: memory, work, time and energy of a run before a step of it is taken."""

import os
from pathlib import Path

import torch
from pydantic import BaseModel

from onevocab.common.checkpoint_files import list_steps
from onevocab.data.loader import Batch, PackedLoader
from onevocab.pipeline.checks import check_lengths, language_stages
from onevocab.pipeline.config import LanguageStage, RunConfig
from onevocab.pipeline.settings import overrides, validated
from onevocab.pipeline.size import network, vocabulary_of
from onevocab.tokenizers.bundle import Tokenizers
from onevocab.training.plan import PlanConfig, probe, si, stage_lines


class _Supposed(BaseModel):
    plan: PlanConfig = PlanConfig()


def plan_lines(config: RunConfig, words: list[str]) -> list[str]:
    """What `--plan` prints. Nothing is written, and no weights are made. words: `--plan`, `--plan.key=value`. Raises
    UserError on a wrong one."""
    said = overrides(_Supposed, [word for word in words if word != "--plan"])
    supposed = validated(_Supposed, {}, "--plan", said).plan
    check_lengths(config)
    folder = Path(config.folder)
    vocabulary, origin = vocabulary_of(config)
    with torch.device("meta"):
        model = network(config, config.model.layers, vocabulary.size)
    lines = [f"{si(sum(p.numel() for p in model.parameters()))} parameters; a vocabulary of {vocabulary.size:,} ids "
             f"({origin})"]
    for name, stage in language_stages(config).items():
        # Everything but the head's weight, which is not among the activations, is the same for a small vocabulary.
        lines += stage_lines(name, stage, stage.rows.global_batch_size, stage.rows.seq_len, model,
                             lambda layers: network(config, layers, 1024), probe(Batch, 1024), supposed,
                             config.device_flops)
        if list_steps(folder / name):  # its documents are in the token cache then: none is encoded here
            lines += _source_lines(config, stage)
    return lines


def _source_lines(config: RunConfig, stage: LanguageStage) -> list[str]:
    """How often each source is shown."""
    run = Path(config.folder)
    sources = [source.placed(run) for source in stage.sources]
    loader = PackedLoader(sources, Tokenizers.load(run / "tokenizers"), stage.rows, seed=config.seed,
                          cache_folder=run / "token_cache", workers=config.data.workers,
                          max_bad_fraction=config.data.max_bad_fraction)
    shown = loader.per_source()
    tokens = stage.steps * stage.rows.global_batch_size * stage.rows.seq_len
    epochs = tokens / sum(held * times for _, _, held, times in shown)
    return [f"  data      {os.path.relpath(path, run)}: {documents:,} documents of {si(held)} tokens, each "
            f"{epochs * times:.3g} times" for path, documents, held, times in shown]
