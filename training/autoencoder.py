"""The short loop that trains a media tokenizer's autoencoder: knows a module with a quantizer and tensors."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from onevocab.common.errors import UserError
from onevocab.training import checkpoint, distributed
from onevocab.training.config import OptimizerConfig
from onevocab.training.faults import Stopped, StopSignal
from onevocab.training.metrics import MetricsLog, progress
from onevocab.training.muon import build_optimizers
from onevocab.training.parallel import replicate
from onevocab.training.precision import autocast, select_precision
from onevocab.training.schedule import ScheduleConfig, multiplier

PLAIN = 0.25  # part of the steps before the codebook starts
SAVE_EVERY = 500


def train_autoencoder(
    model: nn.Module, sample: Callable[[torch.Generator], Tensor], steps: int, learning_rate: float, folder,
    log: MetricsLog, stage: str, seed: int,
) -> None:
    """Trains `model(x, quantize) -> (loss, logs)`, the first quarter without its quantizer, whose codebook then starts
    from the latents.

    sample: generator, the same on every rank -> this rank's part of a batch, (B, channels, H, W). Continues from the
    newest checkpoint of `folder`. Raises Stopped after a signal, UserError when the loss is not finite.
    """
    device = next(model.parameters()).device
    optimizers = build_optimizers(model, OptimizerConfig(matrix_lr=learning_rate * 5, other_lr=learning_rate))
    schedule = ScheduleConfig(kind="wsd", warmup=0.02, decay=0.5, floor=0.02)
    resumed = checkpoint.load_latest(folder, model, optimizers)
    start = resumed.step if resumed else 0
    if resumed:
        resumed.report_damage()
    # Kept on resume, so that a run ends the same wherever it was cut.
    precision = resumed.state["precision"] if resumed else distributed.broadcast(select_precision("auto", device))
    optimizers.iterate_in(getattr(torch, precision))
    distributed.all_or_raise(lambda: log.cut_back(stage, start))
    # No find_unused_parameters: every parameter takes part, with the quantizer or without.
    wrapped = replicate(model)
    model.train()
    saved = start

    def save(done: int) -> None:
        checkpoint.save(folder, done, model, {}, optimizers, {"precision": precision})

    with StopSignal() as stop, progress(steps, start, stage, distributed.is_main()) as bar:
        for step in range(start, steps):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            quantize = step >= round(PLAIN * steps)
            if step == round(PLAIN * steps):
                with torch.no_grad():
                    latents = [model.latents(sample(generator)).flatten(0, 2) for _ in range(8)]
                model.quantizer.init_codebook(torch.cat(latents))
            batch = sample(generator)
            count = distributed.all_reduce_sum(torch.tensor(len(batch))).item()
            with autocast(precision, device):
                loss, logs = wrapped(batch, quantize)
            optimizers.zero_grad()
            (loss * (len(batch) * distributed.world() / count)).backward()  # ranks' parts may differ by one
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers.step(multiplier(schedule, step, steps))
            bar.update()
            done = step + 1
            asked_to_stop, bad = distributed.count_ranks(stop.asked, not math.isfinite(loss.item()))
            if bad:
                raise UserError(f"{stage}: the loss is not finite at step {done}; use a lower learning_rate, with "
                                f"another --folder or without {folder}")
            if done % 50 == 0 or done == steps:
                values = {name: float(value) for name, value in logs.items()}
                bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()})
                log.write(stage, done, loss=loss.item(), **values)
            if done % SAVE_EVERY == 0 or done == steps:
                save(done)
                saved = done
            if asked_to_stop:
                if saved < done:
                    save(done)
                raise Stopped(f"{stage} stopped at step {done}; the same command continues")
    model.eval()
