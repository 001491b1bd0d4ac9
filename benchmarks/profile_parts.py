"""Other parts of `configs/demo.toml` that `profile_step` profiles: untrained, of the demo's sizes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.profiler import record_function

from onevocab.kernels.attention import IntervalMask
from onevocab.model.cache import KVCache
from onevocab.model.decoder import Decoder
from onevocab.pipeline.config import RunConfig, read_config
from onevocab.tokenizers.modalities import MODALITIES
from onevocab.training.config import OptimizerConfig
from onevocab.training.muon import build_optimizers

DEMO = Path(__file__).resolve().parent.parent / "configs" / "demo.toml"
VOCABULARY, ROWS, CONTEXT = 3072, 32, 128  # of the step of decoding
COLUMNS = 16  # of the pictures and sounds of a batch, at most
SECONDS = 1.0  # of the sound
OPTIMIZER = "the optimizer"


def demo() -> RunConfig:
    return read_config(DEMO, [])


def tokenizer_step(name: str, dtype: torch.dtype, tiny: bool) -> tuple[Callable, dict]:
    """A training step of a medium's tokenizer, its codebook in use."""
    config = getattr(demo(), name)
    model = MODALITIES[name].tokenizer(config)
    model.train()
    optimizers = build_optimizers(model, OptimizerConfig())
    rows, columns = sorted(model.max_grid)  # a sound is longer than high, a picture of the demo square
    batch_size, columns = (1, 2) if tiny else (config.batch_size, min(columns, COLUMNS))
    shape = (batch_size, model.channels, rows * model.patch[0], columns * model.patch[1])
    batch = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def step(_):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss, _ = model(batch, True)
        optimizers.zero_grad()
        loss.backward()
        with record_function(OPTIMIZER):
            optimizers.step(1.0)

    return step, {"batch": list(shape)}


def decode_step(dtype: torch.dtype, _: bool) -> tuple[Callable, dict]:
    """One token more for each of ROWS rows, after CONTEXT tokens."""
    config = demo().model.shape
    model = Decoder(config, VOCABULARY).to(dtype)
    cache = KVCache(config, ROWS, config.max_length, dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (ROWS, CONTEXT), generator=generator)
    positions = torch.arange(CONTEXT).expand(ROWS, -1)
    with torch.inference_mode():
        model(ids, positions, IntervalMask.up_to(positions), cache)

    @torch.inference_mode()
    def step(i):
        at = torch.full((ROWS, 1), CONTEXT + i % 64)
        hidden = model(ids[:, i % CONTEXT, None], at, IntervalMask.up_to(at), cache)
        model.logits(hidden[:, 0]).softmax(-1)

    return step, {"rows": ROWS, "context": CONTEXT, "vocabulary": VOCABULARY, **config.model_dump(mode="json")}


def griffin_lim(_: torch.dtype, tiny: bool) -> tuple[Callable, dict]:
    """A sound of SECONDS from its spectrogram."""
    tokenizer = MODALITIES["audio"].tokenizer(demo().audio)
    frames = 8 if tiny else round(SECONDS * 100)
    mel = torch.randn(1, tokenizer.config.mels, frames, generator=torch.Generator().manual_seed(0))
    return lambda i: tokenizer.to_waveform(mel), {"mels": tokenizer.config.mels, "frames": frames}


PARTS = {
    "image": partial(tokenizer_step, "image"),
    "audio": partial(tokenizer_step, "audio"),
    "decode": decode_step,
    "griffin_lim": griffin_lim,
}
