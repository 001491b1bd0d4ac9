"""How large a run is before anything of it exists: its vocabulary, its network, and what its checkpoints take."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from onevocab.common.checkpoint_files import list_steps
from onevocab.common.errors import UserError
from onevocab.model.decoder import Decoder
from onevocab.pipeline.checks import language_stages
from onevocab.pipeline.config import RunConfig
from onevocab.pipeline.sources import open_source
from onevocab.tokenizers.bundle import Tokenizers
from onevocab.tokenizers.modalities import MODALITIES
from onevocab.tokenizers.vocabulary import Vocabulary
from onevocab.training.loop import NextTokenLoss
from onevocab.training.plan import plan, si

KEPT = 3  # checkpoints of a stage: two, and one that is being written; and the best, where it is kept


def vocabulary_of(config: RunConfig) -> tuple[Vocabulary, str]:
    """The run's vocabulary, and where it is known from, in words: the tokenizers, or the configuration."""
    folder = Path(config.folder)
    if (folder / "tokenizers" / "vocabulary.json").is_file():
        return Tokenizers.load(folder / "tokenizers").vocab, "of the trained tokenizers"
    source = open_source(config.model.init, config.init_from)
    old = Vocabulary.build(config.text.vocab_size, []) if source is None else source.vocabulary()
    vocabulary = old.extended([MODALITIES[name].tokenizer(getattr(config, name)).layout
                               for name in config.modalities if name not in old.spans])
    if source is None:
        return vocabulary, "as configured, no tokenizers yet"
    return vocabulary, f"{source.rows:,} of {source.folder}, {vocabulary.size - source.rows:,} new"


def network(config: RunConfig, layers: int, size: int) -> NextTokenLoss:
    """The decoder with so many layers and ids, and its loss."""
    return NextTokenLoss(Decoder(config.model.model_copy(update={"layers": layers}), size), config.pretrain.z_loss)


def check_disk(config: RunConfig, free: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free) -> None:
    """Whether the disk has room for the checkpoints that are still to come. Raises UserError."""
    folder, needed, size = Path(config.folder), 0, vocabulary_of(config)[0].size
    with torch.device("meta"):
        model = network(config, config.model.layers, size)
    for name, stage in language_stages(config).items():
        if not (folder / name / "done.json").exists():
            there, saved = len(list_steps(folder / name)), -(-stage.steps // stage.save_every)
            come = max(min(KEPT, saved) + stage.keep_best - there, 1)
            needed += come * plan(model, 0.0, 0, stage.optimizer).checkpoint
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if needed > (left := free(there)):
        raise UserError(f"the checkpoints of {folder} need {si(needed, 'B', 1024)} more, {there} has "
                        f"{si(left, 'B', 1024)} left; free some space, or use another --folder")
