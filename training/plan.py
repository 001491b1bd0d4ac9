"""What a run needs, before a step is taken: parameters, work, memory by part, time and energy."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from onevocab.common.errors import UserError
from onevocab.kernels.backend import forced
from onevocab.training.config import OptimizerConfig, TrainConfig
from onevocab.training.muon import state_bytes
from onevocab.training.parallel import recompute_layers
from onevocab.training.precision import autocast, device_flops, select_precision

PROBE = (2, 128)  # rows and tokens of the batch that the activations are measured on


class PlanConfig(BaseModel):
    """What `--plan` supposes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    devices: int = Field(1, ge=1, description="number of devices, one for each rank")
    mfu: float = Field(0.4, gt=0, le=1, description="part of a device's FLOP/s that training reaches")
    flops: float = Field(0.0, ge=0, description="FLOP/s of a device (0: device_flops, or what is measured here)")
    watts: float = Field(0.0, ge=0, description="power of a device and its share of the rest (0: no energy is printed)")


@dataclass(frozen=True)
class Plan:
    """In bytes, for one device; flops_per_token: forward and backward; checkpoint: on disk, of all devices together."""

    flops_per_token: float
    weights: int
    gradients: int
    optimizer: int
    activations: int
    checkpoint: int

    @property
    def memory(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def saved_bytes(module: nn.Module, batch, precision: str) -> int:
    """Bytes that autograd keeps for the backward pass of module(batch), without the parameters.

    Casts of parameters are counted: one of each, however many tokens there are. With torch's operators, whatever
    kernels this machine has: a plan says the same everywhere, some 15% more than Triton's or C's keep.
    """
    kept: dict[int, Tensor] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with (forced("torch"), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
          autocast(precision, torch.device("cpu"))):
        module(batch)
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def activations(make: Callable[[int], nn.Module], batch, layers: int, tokens: int, precision: str,
                recompute: bool = False) -> int:
    """Bytes kept for the backward pass of `layers` layers over so many tokens, from what one layer and two layers keep
    for a small batch and for a part of it. Exact where layers are alike.

    make: number of layers -> the network with its loss, which has `decoder.layers`; batch: a small one, (rows, tokens).
    recompute: as `activation_checkpointing` does it; the one layer that is computed again at a time is added.
    """
    def needed(n: int, recomputed: bool) -> tuple[float, float]:
        """(bytes a token, bytes that do not grow with the tokens: casts of weights)."""
        with torch.device("meta"):
            module = make(n)
        module.to_empty(device="cpu")  # the values do not matter, only sizes
        if recomputed:
            recompute_layers(module.decoder.layers)
        few, many = (saved_bytes(module, part, precision) for part in small)
        per_token = (many - few) / (counts[1] - counts[0])
        return per_token, few - per_token * counts[0]

    small = [batch.part(0, 1), batch]
    counts = [part.ids.numel() for part in small]
    (token_one, fixed_one), (token_two, fixed_two) = needed(1, recompute), needed(2, recompute)
    per_token = token_one + (layers - 1) * (token_two - token_one)
    fixed = fixed_one + (layers - 1) * (fixed_two - fixed_one)
    if recompute:
        per_token += needed(2, False)[0] - needed(1, False)[0]
    return round(per_token * tokens + max(fixed, 0))


def plan(model: nn.Module, flops: float, kept: int, optimizer: OptimizerConfig, shards: int = 1,
         gathered: int = 0) -> Plan:
    """model: on any device, `meta` too; flops: per token; kept: `activations` of a device's micro-batch; shards: number
    of devices over which FSDP2 shards weights, gradients and optimiser state; gathered: bytes of whole weights that a
    device holds at a time."""
    sizes = [parameter.numel() * parameter.element_size() for parameter in model.parameters()]
    weights, state = sum(sizes), state_bytes(model, optimizer)
    return Plan(flops, weights // shards + gathered, weights // shards, state // shards, kept, weights + state)


def probe(batch_class: type, vocabulary: int) -> object:
    """A small batch of one document a row, to measure on."""
    rows, length = PROBE
    index = torch.arange(length).expand(rows, -1)
    ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    return batch_class(ids=ids, targets=ids, loss_weights=torch.ones(rows, length), positions=index,
                       modality=torch.zeros(rows, length, dtype=torch.uint8),
                       document_ids=torch.zeros_like(index).int())


def si(value: float, unit: str = "", base: float = 1000) -> str:
    """A number with a prefix, as "1.5 M" or "157 MiB" (base 1024): three significant digits."""
    prefixes = ("", "K", "M", "G", "T", "P", "E", "Z")
    step = 0
    while abs(value) >= base and step < len(prefixes) - 1:
        value, step = value / base, step + 1
    prefix = prefixes[step] + ("i" if base == 1024 and step else "")
    return f"{value:.3g} {prefix}{unit}".rstrip()


def stage_lines(name: str, stage: TrainConfig, global_batch_size: int, seq_len: int, model: nn.Module,
                make: Callable[[int], nn.Module], batch, supposed: PlanConfig, known_flops: float) -> list[str]:
    """A stage's plan as lines to print. model: on `meta`, with its `decoder`; make and batch: for `activations`;
    known_flops: FLOP/s of a device where `supposed.flops` is 0 (0: measured here). Raises UserError when the rows of a
    step do not divide over the devices."""
    devices, layers = supposed.devices, model.decoder.layers
    if global_batch_size % devices:
        raise UserError(f"{name}: global_batch_size = {global_batch_size} does not divide over {devices} devices; "
                        "choose a multiple")
    here = torch.device("cpu")
    precision = select_precision(stage.precision, here)
    at_once = min(stage.micro_batch_size or global_batch_size, global_batch_size // devices)
    kept = activations(make, batch, len(layers), at_once * seq_len, precision, stage.activation_checkpointing)
    sharded = stage.parallel == "fsdp2" and devices > 1
    layer = 4 * sum(p.numel() for p in layers[0].parameters())
    outside = 4 * sum(p.numel() for p in model.parameters()) - layer * len(layers)
    gathered = outside + 2 * layer if sharded else 0  # FSDP2 gathers a layer while the one before it computes
    made = plan(model, model.decoder.flops(1, seq_len / 2), kept, stage.optimizer, devices if sharded else 1,
                gathered)
    flops = supposed.flops or known_flops or device_flops(here, precision)
    tokens = stage.steps * global_batch_size * seq_len
    seconds = made.flops_per_token * tokens / (flops * supposed.mfu * devices)
    joules = seconds * devices * supposed.watts
    energy = si(joules / 3.6e6, "kWh") if supposed.watts else "energy: say --plan.watts"
    parts = ", ".join(f"{part} {si(getattr(made, part), 'B', 1024)}"
                      for part in ("weights", "gradients", "optimizer", "activations"))
    return [
        f"{name}: {si(tokens)} tokens, {stage.steps:,} steps of {global_batch_size} rows of {seq_len:,}, {at_once} at "
        "once",
        f"  work      {si(made.flops_per_token, 'FLOP')} a token, {si(made.flops_per_token * tokens, 'FLOP')} in all",
        f"  memory    {si(made.memory, 'B', 1024)} a device: {parts}",
        f"  disk      {si(made.checkpoint, 'B', 1024)} a checkpoint, two are kept, a third while it is written",
        f"  time      {clock(seconds)} on {devices} device(s) of {si(flops, 'FLOP/s')} at {supposed.mfu:.0%} of it, "
        f"{energy}",
    ]


def clock(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours / 24:.1f} days" if hours > 48 else f"{hours:.1f} h" if hours > 2 else f"{minutes:.1f} min"
