"""`python -m onevocab.data.tokenize RUN SHARDS --out CODES`: media -> codes, once, before training.

Under torchrun the shards are split over the ranks; on one machine without it, over `--processes`. Run again after an
interruption, it goes on with the shards that are missing.
"""

import argparse
import os
from pathlib import Path

from onevocab.common.errors import UserError, cli
from onevocab.data.codes import tokenize_in_processes, tokenize_shards
from onevocab.data.remote import list_sources
from onevocab.tokenizers.bundle import Tokenizers


@cli
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m onevocab.data.tokenize", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="run folder whose tokenizers are used")
    parser.add_argument("shards", help="a shard, a folder of them, a glob, or an address (https://, s3://, ...)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards of codes")
    parser.add_argument("--batch", type=int, default=64, help="media encoded at once")
    parser.add_argument("--device", default="cpu", help="where the tokenizers run (cpu, cuda)")
    parser.add_argument("--processes", type=int, default=1, help="processes on this machine, when not under torchrun")
    parser.add_argument("--max-bad-fraction", type=float, default=0.01, help="more bad samples than this stop it")
    parser.add_argument("--overwrite", action="store_true", help="replace codes of other tokenizers or other shards")
    args = parser.parse_args(argv)
    if not args.run.is_dir():
        raise UserError(f"no run folder at {args.run}: train one with `torchrun train.py configs/demo.toml`")
    shards = list_sources(args.shards)
    options = {"batch": args.batch, "max_bad_fraction": args.max_bad_fraction, "overwrite": args.overwrite}
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < world:
        raise UserError(f"RANK {rank} of WORLD_SIZE {world}: ranks go from 0 to {world - 1}")
    if world == 1 and args.processes > 1 and args.device == "cpu":
        tokenize_in_processes(shards, args.out, args.run / "tokenizers", args.processes, **options)
        print(f"codes of {len(shards)} shards are in {args.out}")
        return
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.device == "cuda" else args.device
    tokenizers = Tokenizers.load(args.run / "tokenizers", device)
    stats = tokenize_shards(shards, args.out, tokenizers, rank, world, **options)
    print(f"rank {rank}: {stats.samples} samples, {stats.media} pictures and sounds into {stats.shards} shards in "
          f"{args.out}; {stats.skipped} shards were there already, {stats.bad} bad samples left out")


if __name__ == "__main__":
    main()
