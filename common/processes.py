"""Several processes of one thread each: on a CPU faster than one process of many threads, for work that splits."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable

from onevocab.common.errors import UserError

MAX_SAID = 10_000  # characters of an error


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are, from torchrun's RANK and WORLD_SIZE (or yours); (0, 1) without.
    Raises UserError when they are no such numbers."""
    numbers = []
    for variable, default in (("RANK", "0"), ("WORLD_SIZE", "1")):
        value = os.environ.get(variable, default)
        if not value.isdecimal():
            raise UserError(f"the environment's {variable} is {value!r}, no number; start with torchrun, or unset it")
        numbers.append(int(value))
    rank, world = numbers
    if rank >= world:
        raise UserError(f"RANK {rank} of WORLD_SIZE {world}: ranks count from 0; set both, or neither")
    return rank, world


def run_processes(work: Callable, arguments: list[tuple], failed: str) -> None:
    """Runs `work(*a)` for each `a` in a process of its own, started afresh (spawn), and waits for all.

    Raises the first UserError of any process; `failed` is the message when one died without a word. When one fails
    the others are stopped. The caller's script needs the `__main__` guard.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    workers = [context.Process(target=_run, daemon=True, args=(queue, work, a)) for a in arguments]
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the child imports torch
    try:
        for worker in workers:
            worker.start()
    finally:
        os.environ.pop("OMP_NUM_THREADS") if threads is None else os.environ.update(OMP_NUM_THREADS=threads)
    messages: list[str] = []
    while any(worker.is_alive() for worker in workers):
        while not queue.empty():  # a full pipe would hold the process that writes
            messages.append(queue.get())
        if any(worker.exitcode not in (None, 0) for worker in workers):
            for worker in workers:
                worker.terminate()
        time.sleep(0.05)
    while not queue.empty():
        messages.append(queue.get())
    if messages:
        raise UserError(messages[0])
    if any(worker.exitcode for worker in workers):
        raise UserError(failed)


def _die_with_parent() -> None:
    """A parent that was killed cannot stop its children; left alone they would write into the next run's folder."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _run(queue, work: Callable, arguments: tuple) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        work(*arguments)
    except (UserError, OSError) as error:
        queue.put(str(error)[:MAX_SAID])
        raise SystemExit(2) from None
