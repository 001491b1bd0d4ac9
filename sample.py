"""Ask a trained model: text, pictures and sound in any order in; text, pictures or sound out.

    python sample.py runs/demo --image cat.png --text "What is this?"
    python sample.py runs/demo --text "Draw a red apple." --want image --out drawings
    python sample.py runs/demo --audio question.wav --image cat.png
    python sample.py runs/demo --chat
"""

import argparse
from pathlib import Path

from onevocab.common.commands import Parser
from onevocab.common.errors import UserError, cli
from onevocab.common.paths import path_argument
from onevocab.generation.chat import Chat, say
from onevocab.generation.context import remark
from onevocab.generation.files import load_part, write_new
from onevocab.generation.terminal import printable, show, way_to_show
from onevocab.tokenizers.modalities import MODALITIES


def _numbers(*names: str):
    """-> parser of "2" for all, or "image=2,audio=1.5" for each of `names` its own."""

    def number(value: str) -> float | dict[str, float]:
        if "=" not in value:
            return float(value)
        values = {name.strip(): float(each) for name, _, each in (part.partition("=") for part in value.split(","))}
        if unknown := values.keys() - set(names):
            raise argparse.ArgumentTypeError(f"{min(unknown)!r} is none of {', '.join(names)}")
        return values

    return number


class _Part(argparse.Action):
    """Appends (kind, value): --text and the flags of the media keep the order in which they are given."""

    def __call__(self, parser, namespace, value, option_string=None):
        parts = list(getattr(namespace, "parts", None) or [])
        namespace.parts = [*parts, (self.dest, value)]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python sample.py", description=__doc__, argument_default=argparse.SUPPRESS,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=path_argument, help="a run folder, for example runs/demo")
    for kind in ("text", *MODALITIES):
        parser.add_argument(f"--{kind}", action=_Part, metavar="TEXT" if kind == "text" else "FILE",
                            help=f"a piece of the prompt: {kind}; may be repeated, the order counts")
    parser.add_argument("--want", default="any", help=f"any (default), text, {', '.join(MODALITIES)}")
    parser.add_argument("--out", type=path_argument, default=Path("."), metavar="DIR", help="for media (default: .)")
    usual = "(default: the run's generation.json, else"
    parser.add_argument("--temperature", type=_numbers("text", *MODALITIES), default=None, metavar="T or NAME=T,...",
                        help=f"0: the likeliest; 1: as the model is {usual} 1)")
    parser.add_argument("--top-k", type=int, default=None, help=f"only the k likeliest tokens; 0: all {usual} 0)")
    parser.add_argument("--top-p", type=float, default=None, help=f"the likeliest up to this mass {usual} 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=_numbers(*MODALITIES), default=None, metavar="G or NAME=G,...",
                        help=f"how strongly media follow the words; 1: as trained {usual} 1)")
    parser.add_argument("--max-new-tokens", type=int, default=None, help="media count too")
    parser.add_argument("--count", type=int, default=1, help="answers, from seeds SEED, SEED + 1, ...")
    parser.add_argument("--stage", default=None, help="instruct or pretrain (default: the newest there is)")
    parser.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--no-show", action="store_true", default=False, help="no pictures in the terminal")
    parser.add_argument("--chat", action="store_true", default=False, help="many turns; type /help")
    arguments = parser.parse_args(argv)
    arguments.parts = getattr(arguments, "parts", [])
    return arguments


def option(name: str, value: str):
    """What --NAME VALUE means. Raises UserError as the flag does."""
    return getattr(parse(["", f"--{name.replace('_', '-')}={value}"]), name)


@cli
def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    out = arguments.out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is not a folder; choose another")
    if not arguments.parts and not arguments.chat:
        raise UserError(f"nothing to answer; give --text, {', '.join(f'--{name}' for name in MODALITIES)}, or --chat")
    if arguments.count < 1:
        raise UserError(f"--count is {arguments.count}; it must be 1 or more")
    parts = [load_part(*part) for part in arguments.parts]
    from onevocab.generation import AnyToAny

    names = ("want", "temperature", "top_k", "top_p", "seed", "guidance", "max_new_tokens")
    options = {name: getattr(arguments, name) for name in names}
    model = AnyToAny.load(arguments.run, arguments.stage, arguments.device)
    way = None if arguments.no_show else way_to_show()
    if arguments.chat:
        return Chat(model, out, options, option, way).run(parts)
    for reply in model.generate_batch([parts] * arguments.count, **options):
        if reply.text:
            print(printable(reply.text))
        for name, values in reply.media.items():
            for value in values:
                print(write_new(out, name, value))
                print(show(name, value, way), end="")
        if note := remark(model, reply, arguments.want, arguments.max_new_tokens):
            say(f"note: {note}")


if __name__ == "__main__":
    main()
