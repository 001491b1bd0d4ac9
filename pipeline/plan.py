"""What `--plan` prints: memory, work, time and energy of a run before a step of it is taken."""

import os
from pathlib import Path

import torch
from pydantic import ValidationError

from onevocab.common.checkpoint_files import list_steps
from onevocab.common.errors import invalid
from onevocab.data.loader import Batch, PackedLoader
from onevocab.model.decoder import Decoder
from onevocab.pipeline.config import LanguageStage, RunConfig
from onevocab.pipeline.run import placed_source
from onevocab.pipeline.sources import open_source
from onevocab.tokenizers.bundle import Tokenizers
from onevocab.tokenizers.modalities import MODALITIES
from onevocab.tokenizers.vocabulary import Vocabulary
from onevocab.training.loop import NextTokenLoss
from onevocab.training.plan import PlanConfig, probe, si, stage_lines


def plan_lines(config: RunConfig, words: list[str]) -> list[str]:
    """What `--plan` prints. Nothing is written, and no weights are made. Raises UserError on another `--plan...`."""
    pairs = [word.removeprefix("--plan").removeprefix(".").partition("=") for word in words if word != "--plan"]
    try:
        supposed = PlanConfig.model_validate({key: value for key, _, value in pairs})
    except ValidationError as error:
        raise invalid(error, "--plan") from None
    folder = Path(config.folder)
    if (folder / "tokenizers" / "vocabulary.json").is_file():
        vocabulary, origin = Tokenizers.load(folder / "tokenizers").vocab, "of the trained tokenizers"
    else:
        source = open_source(config.model.init, config.init_from)
        old = Vocabulary.build(config.text.vocab_size, []) if source is None else source.vocabulary()
        vocabulary = old.extended([MODALITIES[name].tokenizer(getattr(config, name)).layout
                                   for name in config.modalities if name not in old.spans])
        origin = "as configured, no tokenizers yet"
        if source is not None:
            origin = f"{source.rows:,} of {source.folder}, {vocabulary.size - source.rows:,} new"

    def network(layers: int, size: int) -> NextTokenLoss:
        return NextTokenLoss(Decoder(config.model.model_copy(update={"layers": layers}), size), config.pretrain.z_loss)

    with torch.device("meta"):
        model = network(config.model.layers, vocabulary.size)
    lines = [f"{si(sum(p.numel() for p in model.parameters()))} parameters; a vocabulary of {vocabulary.size:,} ids "
             f"({origin})"]
    for name, stage in (("pretrain", config.pretrain), ("instruct", config.instruct)):
        # Everything but the head's weight, which is not among the activations, is the same for a small vocabulary.
        lines += stage_lines(name, stage, stage.rows.global_batch_size, stage.rows.seq_len, model,
                             lambda layers: network(layers, 1024), probe(Batch, 1024), supposed, config.device_flops)
        if list_steps(folder / name):  # its documents are in the token cache then: none is encoded here
            lines += _source_lines(config, stage)
    return lines


def _source_lines(config: RunConfig, stage: LanguageStage) -> list[str]:
    """How often each source is shown."""
    run = Path(config.folder)
    sources = [placed_source(run, source) for source in stage.sources]
    loader = PackedLoader(sources, Tokenizers.load(run / "tokenizers"), stage.rows, seed=config.seed,
                          cache_folder=run / "token_cache", workers=config.data.workers)
    shown = loader.per_source()
    tokens = stage.steps * stage.rows.global_batch_size * stage.rows.seq_len
    epochs = tokens / sum(held * times for _, _, held, times in shown)
    return [f"  data      {os.path.relpath(path, run)}: {documents:,} documents of {si(held)} tokens, each "
            f"{epochs * times:.3g} times" for path, documents, held, times in shown]
