"""The few collective operations that training needs. Without torchrun there is one rank and no process group."""

import hashlib
import os
import sys
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from onevocab.common.errors import UserError

T = TypeVar("T")
START_TIMEOUT = timedelta(minutes=30)  # how long ranks wait for each other at the start
COLLECTIVE_TIMEOUT = timedelta(days=7)  # and while one of them works alone; in the loops a watchdog looks after them


def init(device: str = "auto") -> torch.device:
    """Joins torchrun's process group if there is one (gloo for CPU tensors, nccl for a GPU's); returns this rank's
    device.

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
        store, index, count = next(iter(dist.rendezvous("env://", timeout=START_TIMEOUT)))
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo", timeout=COLLECTIVE_TIMEOUT,
                                store=_fresh(store, index, count), rank=index, world_size=count)
    return chosen


def _fresh(store: dist.Store, index: int, count: int) -> dist.Store:
    """A part of the store that no earlier start has written to.

    With --max-restarts torchrun hands every start the same store, where the addresses of ranks that are gone still
    stand (torch 2.13): gloo then connects to nobody, for hours. So each rank greets with a word of its own, the first
    one proposes what it read, and settles it when all have found their own word in the very same proposal.
    """
    word, deadline = uuid.uuid4().hex, time.monotonic() + START_TIMEOUT.total_seconds()
    store.set(f"start/word/{index}", word)
    while time.monotonic() < deadline:
        if index == 0 and all(store.check([f"start/word/{i}"]) for i in range(1, count)):
            words = ",".join([word, *(store.get(f"start/word/{i}").decode() for i in range(1, count))])
            name = hashlib.sha256(words.encode()).hexdigest()
            store.set("start/proposed", words)
            agreed = [f"start/agreed/{i}" for i in range(1, count)]
            if all(store.check([key]) and store.get(key).decode() == name for key in agreed):
                store.set("start/settled", words)
                return dist.PrefixStore(name, store)
        if index:
            for key in ("start/settled", "start/proposed"):
                words = store.get(key).decode() if store.check([key]) else ""
                if word in words:
                    name = hashlib.sha256(words.encode()).hexdigest()
                    if key == "start/settled":
                        return dist.PrefixStore(name, store)
                    store.set(f"start/agreed/{index}", name)
        time.sleep(0.01)
    raise UserError(f"rank {index} has waited {START_TIMEOUT.total_seconds():.0f} s for {count - 1} other ranks to "
                    "start")


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


def all_to_all(tensor: Tensor) -> Tensor:
    """(ranks, ...) -> (ranks, ...): row r goes to rank r; row r of the result came from rank r."""
    received = torch.empty_like(tensor)
    dist.all_to_all_single(received, tensor.contiguous())
    return received


def count_ranks(*flags: bool) -> list[int]:
    """On how many ranks each flag is true."""
    return all_reduce_sum(torch.tensor([int(flag) for flag in flags])).tolist()


def any_rank(flag: bool) -> bool:
    """True on every rank when it is true on any: how all ranks stop, or skip, together."""
    return count_ranks(flag)[0] > 0


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that FSDP2 has sharded, the same memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank (all must ask); any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def all_or_raise(work: Callable[[], T]) -> T:
    """Calls work() on every rank and returns its result. When it raises UserError or OSError on any rank, raises
    UserError on all of them: nobody waits for a rank that has given up."""
    result, error = None, None
    try:
        result = work()
    except (UserError, OSError) as caught:
        error = str(caught) or repr(caught)
    if any_rank(error is not None):
        raise UserError(next(text for text in gather(error) if text is not None))
    return result


@cache
def cpu_group() -> dist.ProcessGroup | None:
    """A gloo group of its own for a background thread's collectives; None on one rank. The first call is a collective:
    all ranks make it together."""
    return dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if dist.is_initialized() else None


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
        cpu_group.cache_clear()
        dist.destroy_process_group()


def leave() -> None:
    """Ends a process whose work is done. A rank of several ends at once: what torch 2.13 tears down after Python's exit
    aborts now and then once there was a device mesh (3 of 72 ranks), which torchrun takes for a failure."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
