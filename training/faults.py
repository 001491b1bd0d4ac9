"""Signals and stalls: a run that is asked to stop, or that stands still; and the lock on its folder."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from onevocab.common.errors import UserError
from onevocab.common.files import locked

STALLED = 3  # the exit code of a run that stood still


class Stopped(Exception):
    """The run was asked to stop; everything is saved."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Held by rank 0 while it trains in `folder`: two trainings would mix their checkpoints. Raises UserError when
    another process still holds it after ten seconds, which one that was just killed has to end."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        for _ in range(100):
            with suppress(BlockingIOError):
                held.enter_context(locked(folder / ".lock", wait=False))
                break
            time.sleep(0.1)
        else:
            raise UserError(f"another process trains {folder}; wait for it, or stop it (ranks can outlive a torchrun "
                            "that was killed), or use another --folder")
        yield


class StopSignal:
    """Remembers SIGTERM, SIGINT and SIGUSR1 (SLURM's `--signal=USR1@120`) until the end of a step."""

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __enter__(self):
        self.asked = False
        self._before = {number: signal.signal(number, self._ask) for number in self.NUMBERS}
        return self

    def _ask(self, *_):
        self.asked = True

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Watchdog:
    """Ends the process when it waits longer than `seconds` for one thing: data that do not come, a rank that is gone.

    A thread, because the main one is blocked while it waits. It prints what was waited for and exits with code STALLED,
    so that `torchrun --max-restarts` starts all ranks anew from the last checkpoint. seconds 0: never.
    """

    def __init__(self, seconds: float, stage: str, rank: int = 0):
        self.seconds, self.stage, self.rank = seconds, stage, rank
        self._what, self._since, self._step = "", time.monotonic(), 0
        self._over = threading.Event()

    def __enter__(self):
        if self.seconds:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._over.set()

    def waits_for(self, what: str, step: int) -> None:
        """Call it before everything that may take long: the clock starts anew. what: for the message, e.g. "data",
        "the other ranks' data", "the update", "the checkpoint"."""
        self._what, self._step, self._since = what, step, time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(self.seconds / 4, 10)):
            waited = time.monotonic() - self._since
            if waited > self.seconds:
                try:
                    print(f"error: {self.stage}: rank {self.rank} has waited {waited:.0f} s for {self._what} at step "
                          f"{self._step}; its last checkpoint stays, the same command continues (stall_seconds sets "
                          "how long to wait)", file=sys.stderr, flush=True)
                finally:  # also when nobody reads any more
                    os._exit(STALLED)
