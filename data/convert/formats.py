"""Every format by its name."""

from importlib import import_module

from onevocab.data.convert.options import Format

# The modules whose FORMATS there are, a line each, in the order in which `--help` lists them.
MODULES = (
    "captions",
    "conversations",
    "coco",
    "webshards",
    "recordings",
    "interleaved",
    "corpora",
    "mapped",
)
FORMATS: dict[str, Format] = {
    name: chosen
    for module in MODULES
    for name, chosen in import_module(f"onevocab.data.convert.{module}").FORMATS.items()
}
