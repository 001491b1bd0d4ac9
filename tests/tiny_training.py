"""The language loop on a tiny decoder: for tests, and as a script for processes that are killed.

    python tests/tiny_training.py FOLDER --steps 12 --save-every 1     (or under torchrun)
"""

import argparse
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from onevocab.common.errors import UserError, cli
from onevocab.data.loader import Batch
from onevocab.model.config import ModelConfig
from onevocab.model.decoder import Decoder
from onevocab.training import distributed
from onevocab.training.config import TrainConfig
from onevocab.training.faults import Stopped
from onevocab.training.loop import train_language
from onevocab.training.metrics import MetricsLog


class Loader:
    """Four rows that follow from how many batches were taken, shared out over the ranks; `poison` is a step whose
    weights are not finite."""

    def __init__(self, poison=(), rank: int = 0, world: int = 1, dtype: torch.dtype = torch.float32):
        self.taken, self.poison, self.rank, self.world, self.dtype = 0, poison, rank, world, dtype

    def next_batch(self) -> Batch:
        generator = torch.Generator().manual_seed(self.taken)
        ids = torch.randint(20, (4, 17), generator=generator).sort().values
        weights = torch.full((4, 16), float("nan") if self.taken in self.poison else 1.0)
        weights[:, : self.taken % 5] = 0  # rows and ranks whose tokens count differently
        self.taken += 1
        return self.batch(ids, weights)

    def batch(self, ids, weights) -> Batch:
        """This rank's part."""
        columns = ids[:, :-1], ids[:, 1:], weights.to(self.dtype), torch.zeros(4, 16, dtype=torch.uint8), \
            torch.arange(16).expand(4, 16), torch.zeros(4, 16, dtype=torch.int32)
        share = 4 // self.world
        return Batch(*(column[self.rank * share : (self.rank + 1) * share] for column in columns))

    def state_dict(self):
        return {"taken": self.taken}

    def load_state_dict(self, state):
        self.taken = state["taken"]


CONFIG = TrainConfig(steps=12, save_every=4, log_every=2, max_bad_steps=3)


def run(folder: Path, loader=None, config=CONFIG, old_rows: int = 0, wandb: str | None = None,
        **more) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig(dim=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp_dim=64, max_length=32), 20)
    decoder.to(loader.dtype if loader else torch.float32)
    decoder.old_rows = old_rows
    log = MetricsLog(folder / "metrics.jsonl" if distributed.is_main() else None, wandb)
    train_language(decoder, loader or Loader(), config, folder / "stage", {"model": 1}, ["text"], log, "stage",
                   torch.device("cpu"), **more)
    log.close()
    return decoder.state_dict()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def on_two_ranks(work, folder: Path) -> None:
    """work(rank) in two processes, which have what `distributed.init` needs, and `finish` for them."""
    torch.multiprocessing.spawn(_rank, (free_port(), work, folder), nprocs=2)
    assert {path.name for path in folder.iterdir()} == {"0", "1"}


def _rank(rank: int, port: int, work, folder: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    work(rank)
    distributed.barrier()
    distributed.finish()
    (folder / str(rank)).write_text("done")


class Misfortune(Loader):
    """What befalls one rank before a step: it is killed, gets a signal, or its data are damaged or do not come. Once: a
    file in the folder remembers."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        super().__init__(poison=[args.poison] if distributed.rank() == args.on else [], rank=distributed.rank(),
                         world=distributed.world(),
                         dtype=torch.float64 if args.double else torch.float32)
        self.mark, self.args = folder / "happened", args

    def next_batch(self) -> Batch:
        time.sleep(self.args.pause)
        if self.taken + 1 == self.args.until:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.taken == self.args.at and self.rank == self.args.on and not self.mark.exists():
            self.mark.touch()
            if self.args.fail:
                raise UserError(f"the data of rank {self.rank} are damaged")
            if self.args.stall:
                time.sleep(3600)
            os.kill(os.getpid(), self.args.kill)
        return super().next_batch()


@cli
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--save-every", type=int, default=1)
    parser.add_argument("--until", type=int, default=-1, help="asked to stop after this step")
    parser.add_argument("--stall-seconds", type=float, default=600)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", 
                        help="of TrainConfig, or of a section of it")
    parser.add_argument("--wandb", help="a project")
    parser.add_argument("--poison", type=int, default=-1, help="this step's weights are not finite on rank `on`")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds that a batch takes to come")
    parser.add_argument("--double", action="store_true", help="float64")
    parser.add_argument("--at", type=int, default=-1, help="before which step")
    parser.add_argument("--on", type=int, default=0, help="which rank")
    parser.add_argument("--kill", type=int, default=signal.SIGKILL, help="by which signal")
    parser.add_argument("--fail", action="store_true", help="the data are damaged")
    parser.add_argument("--stall", type=float, help="the data do not come; seconds after which that is an error")
    args = parser.parse_args()
    torch.set_num_threads(1)
    distributed.init("cpu")
    args.folder.mkdir(parents=True, exist_ok=True)
    settings = CONFIG.model_dump() | {"steps": args.steps, "save_every": args.save_every, "precision": "float32",
                                      "stall_seconds": args.stall or args.stall_seconds}
    for key, _, value in (word.partition("=") for word in args.set):
        section, _, inner = key.rpartition(".")
        (settings[section] if section else settings)[inner] = value
    config = TrainConfig.model_validate(settings)
    try:
        run(args.folder, Misfortune(args.folder, args), config, wandb=args.wandb)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
    finally:
        distributed.finish()
    distributed.leave()


if __name__ == "__main__":
    main()
