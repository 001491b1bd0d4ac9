"""The few collective operations that training needs. Without torchrun there is one rank and no process group."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from onevocab.common.errors import UserError


def init(device: str = "auto") -> torch.device:
    """Joins torchrun's process group if there is one (gloo on CPU, nccl on GPU); returns this rank's device.

    device is "auto" (a GPU when there is one), "cpu" or "cuda". Raises UserError when "cuda" is asked for and missing.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch sees no GPU here; use device=cpu or install a CUDA build of torch")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    chosen = torch.device("cpu")
    if use_cuda:
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(chosen)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=timedelta(hours=4))
    return chosen


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sums over ranks in place, and returns the tensor."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather(tensor: Tensor) -> Tensor:
    """The tensors of all ranks, of one shape, joined along the first axis in the order of ranks."""
    joined = tensor.new_empty(world() * len(tensor), *tensor.shape[1:])
    dist.all_gather(list(joined.chunk(world())), tensor.contiguous())
    return joined


def agree(flag: bool, device="cpu") -> bool:
    """True on every rank when it is true on any: how all ranks stop, or skip, together."""
    if world() == 1:
        return bool(flag)
    backend_device = device if dist.get_backend() == "gloo" else torch.device("cuda", torch.cuda.current_device())
    return bool(all_reduce_sum(torch.tensor([int(flag)], device=backend_device)).item())


def broadcast(value, source: int = 0):
    """A JSON-like value of one rank, on every rank."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather(value) -> list:
    """A JSON-like value of each rank, on every rank, in the order of ranks."""
    if world() == 1:
        return [value]
    box = [None] * world()
    dist.all_gather_object(box, value)
    return box


def finish() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
