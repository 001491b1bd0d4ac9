"""`python -m onevocab.data.tokenize RUN SHARDS --out CODES`: media -> codes, once, before training.

Under torchrun the shards are split over the ranks; on one machine without it, over `--processes`. Run again after an
interruption, it goes on with the shards that are missing.
"""

import os

import torch

from onevocab.common.commands import Parser
from onevocab.common.errors import UserError, cli
from onevocab.common.files import check_writable
from onevocab.common.paths import expand_home, path_argument
from onevocab.common.processes import rank_and_world
from onevocab.data.codes import check_all, tokenize_in_processes, tokenize_shards
from onevocab.data.shards.remote import list_sources
from onevocab.tokenizers.bundle import Tokenizers


@cli
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m onevocab.data.tokenize", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=path_argument, help="run folder whose tokenizers are used")
    parser.add_argument("shards", type=expand_home, help="a shard, a folder of them, a glob, or an address (https://, "
                        "s3://, ...)")
    parser.add_argument("--out", type=path_argument, required=True, help="folder for the shards of codes")
    parser.add_argument("--batch", type=int, default=64, help="media encoded at once")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the tokenizers run")
    parser.add_argument("--processes", type=int, default=1, help="processes on this machine, when not under torchrun")
    parser.add_argument("--max-bad-fraction", type=float, default=0.01, help="more bad samples than this stop it")
    parser.add_argument("--overwrite", action="store_true", help="replace codes of other tokenizers or other shards")
    args = parser.parse_args(argv)
    if not args.run.is_dir():
        raise UserError(f"no run folder at {args.run}: train one with `torchrun train.py configs/demo.toml`")
    if args.batch < 1 or args.processes < 1 or not 0 <= args.max_bad_fraction <= 1:
        raise UserError("--batch and --processes are numbers from 1 on, --max-bad-fraction one from 0 to 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; leave it out, or install a CUDA build of torch")
    check_writable(args.out)
    shards, (rank, world) = list_sources(args.shards), rank_and_world()
    options = {"batch": args.batch, "max_bad_fraction": args.max_bad_fraction, "overwrite": args.overwrite}
    if world == 1 and args.processes > 1 and args.device == "cpu":
        samples, bad = tokenize_in_processes(shards, args.out, args.run / "tokenizers", args.processes, **options)
        print(f"codes of {len(shards)} shards are in {args.out}: {samples - bad:,} samples, {bad:,} bad ones left out")
        return
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.device == "cuda" else args.device
    tokenizers = Tokenizers.load(args.run / "tokenizers", device)
    stats = tokenize_shards(shards, args.out, tokenizers, rank, world, **options)
    print(f"rank {rank}: {stats.samples} samples, {stats.media} media into {stats.shards} shards in "
          f"{args.out}; {stats.skipped} shards were there already, {stats.bad} bad samples left out")
    if world > 1 and (counts := check_all(shards, args.out, args.max_bad_fraction)):
        print(f"all ranks: {counts[0] - counts[1]:,} samples, {counts[1]:,} bad ones left out")


if __name__ == "__main__":
    main()
