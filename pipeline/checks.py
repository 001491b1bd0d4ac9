"""What can be known before the first stage: settings that contradict each other, and what is not there."""

import importlib.util
import os
import sys
from fnmatch import fnmatch
from pathlib import Path

from onevocab.common.errors import UserError
from onevocab.common.files import check_writable
from onevocab.data.shards.remote import is_remote
from onevocab.pipeline.config import LanguageStage, RunConfig
from onevocab.tasks import load_tasks
from onevocab.tokenizers.modalities import MODALITIES
from onevocab.tokenizers.vocabulary import Vocabulary

AROUND = 2  # ids of the shortest document around a medium


def language_stages(config: RunConfig) -> dict[str, LanguageStage]:
    return {"pretrain": config.pretrain, "instruct": config.instruct}


def check_lengths(config: RunConfig) -> None:
    """Rows, the model's context and the media that must fit into them. Raises UserError that names both keys."""
    rows = {f"{name}.loader.seq_len": stage.loader.seq_len for name, stage in language_stages(config).items()}
    for key, length in rows.items():
        if length > config.model.max_length:
            raise UserError(f"{key} = {length} is above model.max_length = {config.model.max_length}: the model would "
                            "learn places that it is never asked about; make one of them fit")
    for name in config.modalities:
        modality, tokenizer = MODALITIES[name], MODALITIES[name].tokenizer(getattr(config, name))
        span = Vocabulary.build(256, [tokenizer.layout]).spans[name]
        least = span.tokens(tokenizer.max_grid if modality.sized else (1, span.rows)) + AROUND
        if least > max(rows.values()):
            raise UserError(f"[{name}]: each of the {modality.plural} takes {least} tokens and more, and no row holds "
                            f"one ({', '.join(f'{key} = {length}' for key, length in rows.items())}); make the rows "
                            f"longer, or the {modality.plural} smaller")


def check_settings(config: RunConfig, world: int, begins_anew: bool) -> None:
    """Settings that contradict each other, or that this machine cannot follow; world: number of ranks; begins_anew:
    from no other weights. Raises UserError."""
    check_lengths(config)
    for name, stage in language_stages(config).items():
        if stage.rows.global_batch_size % world:
            key = "batch_tokens" if stage.batch_tokens else "loader.global_batch_size"
            raise UserError(f"{name}.{key}: {stage.rows.global_batch_size} rows a step do not divide over {world} "
                            "ranks; choose a multiple")
        for at, sources in (("", stage.sources), *((f" of the phase from step {phase.start} on", phase.sources)
                                                   for phase in stage.phases)):
            if len({source.weight is None for source in sources}) > 1:
                raise UserError(f"{name}.sources{at}: either all have a weight or none has")
        if stage.new_rows_steps and begins_anew:
            raise UserError(f"{name}.new_rows_steps is for a run that starts from other weights (model.init, "
                            "init_from) and adds rows to their vocabulary; leave it out")
    for name in config.modalities:
        batch_size = getattr(config, name).batch_size
        if batch_size < world:
            raise UserError(f"{name}.batch_size = {batch_size} leaves some of the {world} ranks without a part; make "
                            f"it larger, or train up to stage {name} on fewer ranks")
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(f"wandb = {config.wandb!r}, but the package wandb is not installed: pip install wandb, or "
                        "leave the key out")
    if config.evaluate.tasks:
        _check_tasks(config.evaluate.tasks)


def _check_tasks(name: str) -> None:
    """Imports them as `python -m onevocab.evaluation` will, which also looks into the working directory."""
    before = list(sys.path)
    sys.path.append(os.getcwd())
    try:
        load_tasks(name)
    except UserError as error:
        raise UserError(f"[evaluate] {error}") from None
    finally:
        sys.path[:] = before


def check_folder(folder: Path, stages: list[str]) -> None:
    """Whether the stages can write. Raises UserError."""
    for path in (folder, *(folder / name for name in (*stages, "tokenizers", "token_cache"))):
        if path == folder or path.exists():
            check_writable(path)


def check_sources(config: RunConfig, names: list[str]) -> None:
    """Whether each source below the run's `codes/` will have codes, when the raw shards' are called `names`. Raises
    UserError."""
    folder = Path(config.folder)
    for stage, settings in language_stages(config).items():
        for source in settings.every_source:
            if is_remote(source.path):
                continue
            path = os.path.relpath(os.path.abspath(folder / source.path), os.path.abspath(folder))
            inside = path.removeprefix("codes").lstrip("/")
            if path.partition("/")[0] != "codes" or "/" in inside or not inside or (folder / path).exists():
                continue
            if not any(fnmatch(name, inside) for name in names):
                raise UserError(f"{stage}.sources: no shard's codes are called {source.path}; the raw shards become "
                                f"{', '.join(names[:4])}{', ...' * (len(names) > 4)}")
