"""Faults one after another while it trains, for SOAK_SECONDS (five minutes here; before a release half an
hour, a fault a minute)."""

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_faults import finished, outcome, same, start

from onevocab.common.checkpoint_files import list_steps
from onevocab.training.metrics import read_metrics

SECONDS = float(os.environ.get("SOAK_SECONDS", "300"))
BETWEEN = min(60.0, max(20.0, SECONDS / 12))  # seconds from fault to fault; a start takes ten on a busy machine
RANKS, PAUSE = 2, 0.1


def ranks_of(launcher: int) -> list[int]:
    """Processes that torchrun started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == launcher:
                found.append(int(path.parent.name))
        except (OSError, ValueError):  # it has just ended
            continue
    return found


def hurt(what: str, process, folder: Path, choice: random.Random) -> bool:
    """One fault; returns whether the whole run ends by it and has to be started again."""
    ranks = ranks_of(process.pid)
    if what == "kill one" and ranks:
        os.kill(choice.choice(ranks), signal.SIGKILL)
    elif what == "freeze one" and ranks:  # until the watchdogs of the others see it
        os.kill(choice.choice(ranks), signal.SIGSTOP)
    elif what == "stop":
        process.terminate()
    elif what == "kill all":
        for pid in [process.pid, *ranks]:
            os.kill(pid, signal.SIGKILL)
    elif what == "flip a byte":
        process.terminate()
        process.wait()
        newest = list_steps(folder / "stage")[:1]
        for path in choice.sample(sorted(path for path in newest[0].rglob("*") if path.is_file()), 1) if newest else []:
            content = bytearray(path.read_bytes())
            content[choice.randrange(len(content))] ^= 1
            path.write_bytes(content)
    return what in ("stop", "kill all", "flip a byte")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_nothing_is_lost_whatever_comes(tmp_path):
    steps = int(SECONDS / PAUSE / 2)  # the other half goes into starting again
    options = ["--steps", steps, "--save-every", 20, "--stall-seconds", 8]
    finished(tmp_path / "whole", *options, ranks=RANKS, seconds=SECONDS + 120)

    choice, faults, folder = random.Random(0), [], tmp_path / "hurt"
    kinds = ["kill one", "stop", "kill all", "flip a byte", "freeze one"]
    begun = time.monotonic()
    while True:
        assert time.monotonic() < begun + 10 * SECONDS, f"not done after {len(faults)} faults"
        process = start(folder, *options, "--pause", PAUSE, ranks=RANKS, restarts=100,
                        stderr=subprocess.DEVNULL)  # nobody reads, and a full pipe would stop it
        while process.poll() is None:
            time.sleep(choice.uniform(0.8, 1.2) * BETWEEN)
            if process.poll() is None:
                faults.append(kinds[len(faults) % len(kinds)])
                if hurt(faults[-1], process, folder, choice):
                    break
        process.communicate()
        if process.returncode == 0 and (folder / "stage" / f"step-{steps}").exists():
            break
    print(f"{len(faults)} faults in {time.monotonic() - begun:.0f} s, {steps} steps")
    assert len(set(faults)) >= min(len(kinds), SECONDS / 40), faults
    assert same(outcome(folder, steps), outcome(tmp_path / "whole", steps))
    for name, early in (("whole", 10), ("hurt", 2)):
        sizes = [line["memory_bytes"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        assert max(sizes) <= 1.02 * max(sizes[: len(sizes) // early]), name
    assert not [path.name for path in (folder / "stage").iterdir() if not re.fullmatch(r"step-\d+", path.name)]
