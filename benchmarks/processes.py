"""Commands side by side, each in a process group of its own, with a limit of time that nothing outlives."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from benchmarks.steps import SIDE_BY_SIDE

LAST_WORDS = 3  # seconds in which a process that is ended may say where it stood


class Outcome(NamedTuple):
    output: str  # stdout and stderr
    failure: str  # what went wrong; "" if nothing did
    late: bool = False  # it was ended, or not begun, because the time was up


class Running(NamedTuple):
    number: int
    process: subprocess.Popen
    log: Path


def run_together(commands: list[list[str]], seconds: float, folder: Path, name: str,
                 environment: dict[str, str]) -> list[Outcome]:
    """Runs all, SIDE_BY_SIDE at once, in `folder`, where `name.log` (or `name-0.log`, ...) keeps what each says. What
    has not ended after so many seconds, or when this is interrupted, is ended with its children."""
    deadline = time.monotonic() + seconds
    waiting, running, outcomes = list(enumerate(commands)), [], {}
    try:
        while waiting or running:
            while waiting and len(running) < SIDE_BY_SIDE:
                running.append(start(*waiting.pop(0), folder, name if len(commands) == 1 else f"{name}-", environment))
            time.sleep(0.05)
            late = time.monotonic() > deadline
            for each in list(running):
                code = each.process.poll()
                if code is None and not late:
                    continue
                end(each.process)
                if code is None:
                    failure = f"not finished within {seconds:.0f} s"
                else:
                    failure = f"exit {code}" if code else ""
                output = each.log.read_text(encoding="utf-8", errors="replace")
                outcomes[each.number] = Outcome(output, failure, code is None)
                running.remove(each)
            if late:
                outcomes |= {number: Outcome("", f"not begun within {seconds:.0f} s", True) for number, _ in waiting}
                waiting = []
    finally:
        for each in running:
            end(each.process)
    return [outcomes[number] for number in range(len(commands))]


def start(number: int, command: list[str], folder: Path, name: str, environment: dict[str, str]) -> Running:
    path = folder / (f"{name}{number}.log" if name.endswith("-") else f"{name}.log")
    with open(path, "wb") as log:
        return Running(number, subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                                                stdout=log, stderr=subprocess.STDOUT, start_new_session=True), path)


def end(process: subprocess.Popen) -> None:
    """SIGABRT, on which Python's faulthandler says where it stands; then SIGKILL for it and all of its children, also
    those that it has left behind."""
    if process.poll() is None:
        process.send_signal(signal.SIGABRT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WORDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # one that a driver holds cannot be waited for
        process.wait(LAST_WORDS)
