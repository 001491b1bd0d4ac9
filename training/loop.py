"""The loop of both language stages: one straight line from a batch to an update."""

import math
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onevocab.common.errors import UserError
from onevocab.kernels.attention import IntervalMask
from onevocab.kernels.cross_entropy import linear_cross_entropy
from onevocab.training import checkpoint, distributed
from onevocab.training.config import TrainConfig
from onevocab.training.faults import Stopped, StopSignal, Watchdog
from onevocab.training.held_out import held_out_losses
from onevocab.training.metrics import MetricsLog, Totals, peak_memory, progress
from onevocab.training.muon import build_optimizers
from onevocab.training.parallel import exchange, replicate, shard
from onevocab.training.precision import autocast, select_precision
from onevocab.training.schedule import multiplier

WATCHED = 256  # tokens of a batch whose log(Z) is computed


class NextTokenLoss(nn.Module):
    """The loss of a decoder, which maps ids (B, S), positions (B, S) and an IntervalMask to hidden states (B, S, dim),
    and has `norm`, its last one, and `head_weight` (V, dim).

    While `watch` is on, a forward pass sets two `signals` that rise early when a run is about to diverge (Chameleon,
    2024): `output_norm`, the root mean square of what enters the last norm, and `z`, the mean of log(Z) over the first
    WATCHED tokens with a weight.
    """

    def __init__(self, decoder: nn.Module, z_loss: float):
        super().__init__()
        self.decoder, self.z_loss = decoder, z_loss
        self.watch, self.signals = False, {}
        decoder.norm.register_forward_pre_hook(self._look)

    def _look(self, _, inputs: tuple) -> None:
        if self.watch:
            self.signals["output_norm"] = inputs[0].detach().float().square().mean().sqrt()

    def forward(self, batch) -> tuple[Tensor, Tensor]:
        """Returns (sum over tokens of weight * loss, nll (B * S,) in nats, 0 where the weight is 0)."""
        mask = IntervalMask.causal(batch.document_ids, batch.mean_keys)
        hidden = self.decoder(batch.ids, batch.positions, mask).flatten(0, 1)
        head, weights = self.decoder.head_weight, batch.loss_weights.flatten()
        if self.watch:
            rows = weights.nonzero()[:WATCHED, 0]
            if len(rows):
                logits = F.linear(hidden.detach()[rows], head.detach().to(hidden.dtype))
                self.signals["z"] = logits.float().logsumexp(-1).mean()
        return linear_cross_entropy(hidden, head, batch.targets.flatten(), weights, self.z_loss)


def backward(
    model: nn.Module, batch, scale: Tensor, micro_batch_size: int, precision: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Adds up the gradients of scale * loss, `micro_batch_size` rows at a time (0: all at once), and exchanges them
    between ranks once. Returns (scale * loss, nll (B * S,)), both without a graph.

    The scale is that of the whole step, so parts with few tokens that count do not count more.
    """
    rows = len(batch.ids)
    mean, nlls = torch.zeros((), device=device), []
    for start in range(0, rows, micro_batch_size or rows):
        stop = min(start + (micro_batch_size or rows), rows)
        part = batch if stop - start == rows else batch.part(start, stop)
        with exchange(model, now=stop == rows):
            with autocast(precision, device):
                loss, nll = model(part)
            (loss * scale).backward()
        mean = mean + (loss * scale).detach()
        nlls.append(nll.detach())
    return mean, torch.cat(nlls)


def keep_new_rows(decoder: nn.Module) -> None:
    """Clears all gradients but those of the vocabulary's new rows: of the parameters `decoder.row_parameters`, the rows
    from `decoder.old_rows` on."""
    for name, parameter in decoder.named_parameters():
        if name not in decoder.row_parameters:
            parameter.grad = None
        elif parameter.grad is not None:
            rows = distributed.local(parameter.grad)
            sharded = rows is not parameter.grad  # by FSDP2: as many rows on each rank, fewer on the last ones
            first = distributed.rank() * -(-len(parameter) // distributed.world()) if sharded else 0
            rows[: max(0, decoder.old_rows - first)] = 0


def train_language(
    decoder: nn.Module, loader, config: TrainConfig, folder, model_info: dict, modalities: list[str],
    log: MetricsLog, stage: str, device: torch.device, peak_flops: Callable[[str], float] | None = None,
    held_out: Sequence = (),
) -> None:
    """Trains until `config.steps`, from the newest checkpoint of `folder` if there is one.

    loader: `next_batch()`, `state_dict()`, `load_state_dict()`; a batch has ids, targets, loss_weights, modality,
    positions, document_ids, all (B, S). The loss is the weighted mean over the tokens of all ranks. peak_flops:
    precision -> FLOP/s of a device, for the MFU. held_out: this rank's batches of held-out samples, as many on every
    rank. Raises Stopped after a signal, and UserError when the loss stays non-finite.
    """
    if distributed.is_main():
        checkpoint.sweep(folder)
    resumed = checkpoint.find(folder)
    start = resumed.step if resumed else 0
    # Agreed on by all ranks, and kept on resume, so that a run ends the same wherever it was cut.
    precision = (resumed.state["precision"] if resumed
                 else distributed.broadcast(select_precision(config.precision, device)))
    peak = peak_flops(precision) if peak_flops else 0.0
    decoder.train()
    module = NextTokenLoss(decoder, config.z_loss)
    shard(module, decoder.layers, config, device)
    optimizers = build_optimizers(decoder, config.optimizer)
    totals = Totals(modalities, device)
    if resumed:
        resumed.report_damage()
        checkpoint.restore(resumed, decoder, optimizers)
        distributed.all_or_raise(lambda: loader.load_state_dict(resumed.state["loader"]))
        totals.load(resumed.state["unreported"])
    model = replicate(module)
    distributed.all_or_raise(lambda: log.cut_back(stage, start))
    saver = checkpoint.Saver(folder, background=config.background_save == "on" or (
        config.background_save == "auto" and device.type == "cuda"))

    def save(step: int) -> None:
        watchdog.waits_for("the checkpoint", step)
        log.sync()
        state = {"loader": loader.state_dict(), "precision": precision, "unreported": totals.gathered(),
                 "seconds": time.perf_counter() - began, "waited": waited, "best": best}
        saver.save(step, decoder, model_info, optimizers, state, best and best[1])

    def next_batch():
        batch = loader.next_batch()
        watchdog.waits_for("the other ranks' data", step)
        return batch

    bad, saved, waited, began = 0, start, 0.0, time.perf_counter()
    if resumed:  # the seconds since the last report go on, as the sums of `totals` do
        waited, began = resumed.state["waited"], began - resumed.state["seconds"]
    # Of the lowest held-out loss: [loss, step].
    best = resumed.state.get("best") if resumed else None
    shown: dict[str, str] = {}  # on the bar
    watchdog = Watchdog(config.stall_seconds, stage, distributed.rank())
    with StopSignal() as stop, watchdog, saver, progress(config.steps, start, stage, distributed.is_main()) as bar:
        for step in range(start, config.steps):
            done = step + 1
            report = done % config.log_every == 0 or done == config.steps
            watchdog.waits_for("data", step)
            asked = time.perf_counter()
            batch = distributed.all_or_raise(next_batch).to(device)
            waited += time.perf_counter() - asked
            watchdog.waits_for("the update", step)
            total_weight = distributed.all_reduce_sum(batch.loss_weights.sum())
            optimizers.zero_grad()
            # DDP and FSDP2 average gradients over ranks; times their number is the sum, over the weight of all of them.
            scale = distributed.world() / total_weight.clamp_min(1e-6)
            module.watch = report
            mean, nll = backward(model, batch, scale, config.micro_batch_size, precision, device)
            if step < config.new_rows_steps:
                keep_new_rows(decoder)
            norm = distributed.full_tensor(nn.utils.clip_grad_norm_(decoder.parameters(), config.max_grad_norm))
            rate = multiplier(config.schedule, step, config.steps)
            if distributed.any_rank(not (math.isfinite(mean.item()) and math.isfinite(norm.item()))):
                bad += 1
                log.write(stage, done, skipped="non-finite loss")
                if bad >= config.max_bad_steps:
                    raise UserError(f"{stage}: the loss was not finite {bad} steps in a row, at step {done}; "
                                    f"use lower learning rates, with another --folder or without {folder}")
            else:
                bad = 0
                optimizers.step(rate, decay=1 - step / config.steps)
                if optimizers.average:
                    optimizers.average.step(done)
                totals.add(batch, nll)

            bar.update()
            if report:
                seconds, began = time.perf_counter() - began, time.perf_counter()
                values = totals.report(seconds, decoder.flops, peak)
                shown |= {name.removeprefix("loss_"): f"{value:.2f}" for name, value in values.items()
                          if name.startswith("loss_")} | {"tok/s": f"{values['tokens_per_second']:,.0f}"}
                bar.set_postfix(shown)
                signals = {name: value.item() for name, value in module.signals.items()}
                log.write(stage, done, **values, gradient_norm=norm.item(), **signals, learning_rate=rate,
                          waiting_for_data=waited / seconds, memory_bytes=peak_memory(device))
                waited = 0.0
            improved = False
            if config.valid_every and (done % config.valid_every == 0 or done == config.steps):
                watchdog.waits_for("the loss on held-out data", step)
                asked = time.perf_counter()
                if losses := held_out_losses(module, held_out, modalities, precision, device):
                    log.write(stage, done, **losses)
                    shown |= {f"held out {name.removeprefix('valid_loss_')}": f"{value:.2f}"
                              for name, value in losses.items() if name != "valid_loss"}
                    bar.set_postfix(shown)
                    improved = config.keep_best and (best is None or losses["valid_loss"] < best[0])
                    best = [losses["valid_loss"], done] if improved else best
                began += time.perf_counter() - asked  # tokens a second are those of training
            if done % config.save_every == 0 or done == config.steps or improved:
                save(done)
                saved = done
            asked_to_stop, written = distributed.count_ranks(stop.asked, saver.written)
            if written == distributed.world():
                saver.finish()
            if asked_to_stop:
                if saved < done:
                    save(done)
                raise Stopped(f"{stage} stopped at step {done}; the same command continues")
