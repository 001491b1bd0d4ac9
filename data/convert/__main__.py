"""`python -m onevocab.data.convert FORMAT INPUT --out SHARDS`: a published data set -> shards.

Under torchrun each rank converts its own parts of the input. Prints what was kept and dropped, and why; the same is in
`report.json` beside the shards. `... FORMAT --help` lists a format's options.
"""

from onevocab.common.commands import Parser
from onevocab.common.errors import cli
from onevocab.common.paths import path_argument
from onevocab.common.processes import rank_and_world
from onevocab.data.convert.formats import FORMATS
from onevocab.data.convert.options import positive
from onevocab.data.convert.writing import convert


def _parser() -> Parser:
    parser = Parser(prog="python -m onevocab.data.convert", description=__doc__.split("\n\n")[0])
    formats = parser.add_subparsers(dest="format", metavar="FORMAT", required=True)
    for name, chosen in FORMATS.items():
        one = formats.add_parser(name, help=chosen.help, description=chosen.help)
        one.add_argument("input", type=path_argument, help="the published file, or a folder of such files")
        one.add_argument("--out", type=path_argument, required=True, help="folder for the shards")
        one.add_argument("--overwrite", action="store_true", help="replace an earlier conversion in that folder")
        one.add_argument("--samples-per-shard", type=positive, default=1000, metavar="N", help="(default: 1000)")
        one.add_argument("--parts", type=positive, metavar="N",
                         help="split each file of the input into N parts (default: as few as give every rank one)")
        one.add_argument("--follow-links", action="store_true",
                         help="also links that lead out of the input's or the media's folder: for folders of your own")
        for option in chosen.options:
            option.add_to(one)
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    args = vars(_parser().parse_args(argv))
    rank, world = rank_and_world()
    report = convert(args.pop("format"), args.pop("input"), args.pop("out"), rank, world, **args)
    for line in report.lines():
        print(line if world == 1 else f"rank {rank}: {line}")


if __name__ == "__main__":
    main()
