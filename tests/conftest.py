"""What all tests share: few threads, a torchaudio that imports, and one small trained run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Before torch is imported, and inherited by every process that a test starts. Tests use small matrices, and
# beside another job two threads are several times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402

# transformers imports torchaudio, whose native part does not load beside every torch; the guard lets
# the import succeed.
import onevocab.tokenizers.torchaudio_guard  # noqa: E402, F401
from onevocab.common.files import locked  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"].split(",")[0]))


def run_command(command: list, cwd=ROOT, timeout: float = 300, **kwargs) -> str:
    """Runs a command and returns its stdout and stderr. A non-zero exit fails the test with that output."""
    command = [str(part) for part in command]
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            timeout=timeout,
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            **kwargs,
        )
    except subprocess.TimeoutExpired as error:
        output = error.output.decode(errors="replace") if isinstance(error.output, bytes) else error.output or ""
        pytest.fail(
            f"{' '.join(command)}\nstill running after {timeout:.0f} s; its output ends:\n{output[-8000:]}",
            pytrace=False,
        )
    if done.returncode != 0:
        pytest.fail(
            f"{' '.join(command)}\nexit {done.returncode}; its output ends:\n{done.stdout[-8000:]}",
            pytrace=False,
        )
    return done.stdout


def train(*words, launcher=()) -> subprocess.CompletedProcess:
    """train.py in a process of its own, or in several by a launcher, such as torchrun's arguments to Python."""
    return subprocess.run([sys.executable, *launcher, "train.py", *map(str, words)], cwd=ROOT, capture_output=True,
                          text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory) -> Path:
    """The folder of a run of `configs/smoke.toml`, every stage, trained once on two ranks.

    Tests read it; only the report may be written into it. pytest-xdist's workers share the training, not the folder.
    """
    shared, run = tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp("runs") / "smoke"
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    trained = shared / "trained"
    with locked(shared / "trained.lock"):
        if not (trained / "done").exists():
            # --standalone takes a free port.
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            run_command([*launcher, "train.py", "configs/smoke.toml", f"--folder={trained / 'smoke'}"], timeout=420,
                        env={**os.environ, "OMP_NUM_THREADS": "1"})
            (trained / "done").touch()
    shutil.copytree(trained / "smoke", run)
    return run


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Tiny untrained tokenizers, saved."""
    from tiny import tiny_tokenizers

    bundle = tiny_tokenizers()
    bundle.save(tmp_path_factory.mktemp("run") / "tokenizers")
    return bundle


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A folder of raw shards, 24 samples."""
    from samples import raw_samples

    from onevocab.data.shards.writer import ShardWriter

    folder = tmp_path_factory.mktemp("raw")
    with ShardWriter(folder, "s", 5) as writer:
        for key, members in raw_samples(24):
            writer.write(key, members)
    return folder


@pytest.fixture(scope="session")
def peer():
    """Hugging Face's tokenizer, made as Qwen's is."""
    from tiny_qwen import make_tokenizer

    return make_tokenizer()
