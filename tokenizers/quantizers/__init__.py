"""The quantizers, each in a file of its own; `quantizer = { kind = "..." }` of a media tokenizer chooses one."""

from importlib import import_module
from typing import Annotated, Union

from pydantic import BeforeValidator, Field

from onevocab.tokenizers.quantizers.base import Quantizer, QuantizerConfig

# kind -> module of this folder and class. A new quantizer is a file and a line here.
QUANTIZERS = {
    "vq": "vq.VectorQuantizer",
    "fsq": "fsq.FiniteScalarQuantizer",
}
DEFAULT = "vq"


def _load(path: str) -> type[Quantizer]:
    module, name = path.split(".")
    return getattr(import_module(f"{__name__}.{module}"), name)


CLASSES: dict[str, type[Quantizer]] = {kind: _load(path) for kind, path in QUANTIZERS.items()}


def _with_kind(value):
    return {"kind": DEFAULT, **value} if isinstance(value, dict) else value


# The config of any kind: `kind` says which one validates the rest, DEFAULT's where it is missing.
AnyQuantizerConfig = Annotated[Union[tuple(cls.Config for cls in CLASSES.values())],  # noqa: UP007 (not known here)
                               Field(discriminator="kind"), BeforeValidator(_with_kind)]
DEFAULT_CONFIG: QuantizerConfig = CLASSES[DEFAULT].Config()


def build_quantizer(config: QuantizerConfig) -> Quantizer:
    return CLASSES[config.kind](config)
