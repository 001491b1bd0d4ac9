"""A decoder made ready for several ranks, for little memory, and for the compiler. All of it is PyTorch's own."""

from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from onevocab.training import distributed
from onevocab.training.config import TrainConfig


def shard(model: nn.Module, layers: nn.ModuleList, config: TrainConfig, device: torch.device) -> None:
    """In place, before the optimisers are built; model: what computes the loss, `layers` are within it.

    compile: one graph for each layer, so that all layers share its compilation. fsdp2: weights, gradients and optimiser
    state are sharded over the ranks (Zhao et al. 2023); a layer's weights are gathered while it computes, in float32 as
    they are, because FSDP2's own mixed precision would round those of the norms too; autocast does the rest, as
    under DDP.
    """
    if config.compile:
        for layer in layers:
            layer.compile()
    if config.activation_checkpointing:
        recompute_layers(layers)
    if config.parallel == "fsdp2" and distributed.world() > 1:
        mesh = init_device_mesh(device.type, (distributed.world(),))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)


def recompute_layers(layers: nn.ModuleList) -> None:
    """Keeps only each layer's input for the backward pass, which computes the rest again (Chen et al. 2016)."""
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def replicate(model: nn.Module) -> nn.Module:
    """The model wrapped in DDP where there are several ranks and `shard` has not sharded it, else the model itself."""
    if distributed.world() == 1 or isinstance(model, FSDPModule):
        return model
    # A view, or gradients would be held twice. Buffers are the same on all ranks and stay as they are.
    return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)


@contextmanager
def exchange(model: nn.Module, now: bool):
    """A backward pass within exchanges gradients between ranks if `now`, else DDP only adds them up on this rank. FSDP2
    always exchanges: each rank adds up its shards, and never holds whole gradients."""
    if now or not isinstance(model, DistributedDataParallel):
        yield
    else:
        with model.no_sync():
            yield
