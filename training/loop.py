"""The loop of both language stages: one straight line from a batch to an update."""

import math
import time
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from onevocab.common.errors import UserError
from onevocab.kernels.attention import IntervalMask
from onevocab.kernels.cross_entropy import linear_cross_entropy
from onevocab.training import checkpoint, distributed
from onevocab.training.config import TrainConfig
from onevocab.training.faults import Stopped, StopSignal, Watchdog
from onevocab.training.metrics import MetricsLog, peak_memory, progress
from onevocab.training.muon import build_optimizers
from onevocab.training.precision import autocast, choose
from onevocab.training.schedule import multiplier


class NextTokenLoss(nn.Module):
    """decoder: ids (B, S), positions (B, S), IntervalMask -> hidden (B, S, dim), with `head_weight` (V, dim)."""

    def __init__(self, decoder: nn.Module, z_loss: float):
        super().__init__()
        self.decoder, self.z_loss = decoder, z_loss

    def forward(self, batch) -> tuple[Tensor, Tensor]:
        """-> (sum over tokens of weight * loss, nll (B * S,) in nats, 0 where the weight is)."""
        hidden = self.decoder(batch.ids, batch.positions, IntervalMask.causal(batch.document))
        return linear_cross_entropy(hidden.flatten(0, 1), self.decoder.head_weight, batch.targets.flatten(),
                                    batch.weights.flatten(), self.z_loss)


def backward(
    model: nn.Module, batch, scale: Tensor, micro_rows: int, precision: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Adds up the gradients of scale * loss, `micro_rows` rows at a time (0: all at once), and exchanges them between
    ranks once. Returns (scale * loss, nll (B * S,)), both without a graph.

    The scale is that of the whole step, so parts with few tokens that count do not count more.
    """
    columns = vars(batch).values()
    rows = len(batch.ids)
    mean, nlls = torch.zeros((), device=device), []
    for start in range(0, rows, micro_rows or rows):
        stop = min(start + (micro_rows or rows), rows)
        part = batch if stop - start == rows else type(batch)(*(column[start:stop] for column in columns))
        wait = stop < rows and isinstance(model, DistributedDataParallel)
        with model.no_sync() if wait else nullcontext():
            with autocast(precision, device):
                loss, nll = model(part)
            (loss * scale).backward()
        mean = mean + (loss * scale).detach()
        nlls.append(nll.detach())
    return mean, torch.cat(nlls)


def train_language(
    decoder: nn.Module, loader, config: TrainConfig, folder, model_info: dict, modalities: list[str],
    log: MetricsLog, stage: str, device: torch.device,
) -> None:
    """Trains until `config.steps`, from the newest checkpoint of `folder` if there is one.

    loader: `next_batch()`, `state_dict()`, `load_state_dict()`; a batch has ids, targets, weights, modality, positions,
    document, all (B, S). The loss is the weighted mean over the tokens of all ranks. Raises Stopped after a signal,
    and UserError when the loss stays non-finite.
    """
    optimizers = build_optimizers(decoder, config.optimizer)
    if distributed.is_main():
        checkpoint.sweep(folder)
    found = checkpoint.load_latest(folder, decoder, optimizers)
    start = found.step if found else 0
    if found:
        found.report_damage()
        loader.load_state_dict(found.state["loader"])
    log.cut_back(stage, start)
    # Agreed on by all ranks, and kept on resume, so that a run ends the same wherever it was cut.
    precision = found.state["precision"] if found else distributed.broadcast(choose(config.precision, device))

    def save(step: int) -> None:
        watchdog.waits_for("the checkpoint", step)
        unreported = distributed.gather(sums.tolist())
        if distributed.is_main():
            state = {"loader": loader.state_dict(), "precision": precision, "unreported": unreported}
            checkpoint.save(folder, step, decoder, model_info, optimizers, state)
        distributed.barrier()

    module = NextTokenLoss(decoder, config.z_loss)
    model = DistributedDataParallel(module) if distributed.world() > 1 else module
    decoder.train()
    # Weighted nll, weights, tokens of each modality since the last report.
    sums = torch.zeros(3, len(modalities), device=device, dtype=torch.float64)
    if found:  # of another number of ranks: together they are the same
        parts = torch.tensor(found.state["unreported"], device=device, dtype=sums.dtype)
        same_ranks = len(parts) == distributed.world()
        sums += parts[distributed.rank()] if same_ranks else parts.sum(0) * distributed.is_main()
    bad, waited, began, saved = 0, 0.0, time.perf_counter(), start
    watchdog = Watchdog(config.stall_seconds, stage, distributed.rank())
    with StopSignal() as stop, watchdog, progress(config.steps, start, stage, distributed.is_main()) as bar:
        for step in range(start, config.steps):
            watchdog.waits_for("data", step)
            asked = time.perf_counter()
            batch = loader.next_batch().to(device)
            waited += time.perf_counter() - asked
            watchdog.waits_for("the update", step)
            total_weight = distributed.all_reduce_sum(batch.weights.sum())
            optimizers.zero_grad()
            # DDP averages gradients over ranks; times their number is the sum, over the weight of all of them.
            scale = distributed.world() / total_weight.clamp_min(1e-6)
            mean, nll = backward(model, batch, scale, config.micro_rows, precision, device)
            norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), config.clip)
            rate = multiplier(config.schedule, step, config.steps)
            if distributed.agree(not (math.isfinite(mean.item()) and math.isfinite(norm.item())), device):
                bad += 1
                log.write(stage, step + 1, skipped="non-finite loss")
                if bad >= config.max_bad_steps:
                    raise UserError(f"{stage}: the loss was not finite {bad} steps in a row, at step {step + 1}; "
                                    f"start again with lower learning rates from {folder}")
            else:
                bad = 0
                optimizers.step(rate)

            kind, weights = batch.modality.flatten().long(), batch.weights.flatten().to(sums.dtype)
            sums[0].index_add_(0, kind, nll.to(sums.dtype) * weights)
            sums[1].index_add_(0, kind, weights)
            sums[2].index_add_(0, kind, (batch.document.flatten() >= 0).to(sums.dtype))
            bar.update()
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                distributed.all_reduce_sum(sums)
                seconds, began = time.perf_counter() - began, time.perf_counter()
                loss_sums, weight_sums, tokens = sums.tolist()
                means = zip(modalities, loss_sums, weight_sums, strict=True)
                losses = {name: total / weight for name, total, weight in means if weight}
                speed = sum(tokens) / seconds
                bar.set_postfix({name: f"{value:.2f}" for name, value in losses.items()} | {"tok/s": f"{speed:,.0f}"})
                log.write(stage, done, **{f"loss_{name}": value for name, value in losses.items()},
                          tokens_per_second=speed, gradient_norm=norm.item(), learning_rate=rate,
                          waiting_for_data=waited / seconds, memory_bytes=peak_memory(device))
                sums.zero_()
                waited = 0.0
            if done % config.save_every == 0 or done == config.steps:
                save(done)
                saved = done
            if distributed.agree(stop.asked, device):
                if saved < done:
                    save(done)
                raise Stopped(f"{stage} stopped at step {done}; the same command continues")
