"""The loss on held-out data: measured now and then in training, and what it says at the end."""

import torch
from torch import nn

from onevocab.training.metrics import Totals
from onevocab.training.precision import autocast

RISE = 0.05  # of the lowest held-out loss: so far above it a model is said to memorise


@torch.no_grad()
def held_out_losses(module: nn.Module, batches: list, modalities: list[str], precision: str,
                    device: torch.device) -> dict[str, float]:
    """`valid_loss`, the weighted mean over the tokens of all ranks, and `valid_loss_NAME` of each modality; {} without
    batches. All ranks call it with as many batches. module: a NextTokenLoss."""
    if not batches:
        return {}
    totals, watch, module.watch = Totals(modalities, device), module.watch, False
    for batch in batches:
        batch = batch.to(device)
        with autocast(precision, device):
            _, nll = module(batch)
        totals.add(batch, nll)
    module.watch = watch
    losses, weights = totals.summed()[:2]
    means = {f"valid_loss_{name}": loss / weight for name, loss, weight in zip(modalities, losses, weights, strict=True)
             if weight}
    return {"valid_loss": sum(losses) / sum(weights)} | means if sum(weights) else {}


def memorising(lines: list[dict], stage: str) -> str | None:
    """One line when a stage ended as a model does that memorises: of a modality the held-out loss is RISE above the
    lowest that it had, and the training loss fell since then. lines: of a metrics.jsonl."""
    lines = [line for line in lines if line.get("stage") == stage]
    found = []
    for name in dict.fromkeys(key.removeprefix("valid_loss_") for line in lines for key in line
                              if key.startswith("valid_loss_")):
        held = [(line[f"valid_loss_{name}"], line["step"]) for line in lines if f"valid_loss_{name}" in line]
        trained = [(line["step"], line[f"loss_{name}"]) for line in lines if f"loss_{name}" in line]
        (low, step), (last, _) = min(held), held[-1]
        before = [loss for at, loss in trained if at <= step] or [loss for _, loss in trained[:1]]
        if trained and last > low * (1 + RISE) and trained[-1][1] < before[-1]:
            found.append(f"{name} (held out {low:.3g} at step {step:,}, {last:.3g} at the end; in training "
                         f"{before[-1]:.3g}, then {trained[-1][1]:.3g})")
    if not found:
        return None
    return (f"{stage} is memorising its samples: the loss on held-out ones rose while that of training fell: "
            f"{'; '.join(found)}; train fewer steps, a smaller model or on more data, or keep the best (keep_best)")
