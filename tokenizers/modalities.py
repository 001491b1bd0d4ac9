"""The registered modalities, and the one answer to "which modality is this?"."""

from importlib import import_module
from pathlib import PurePath

from onevocab.common.errors import UserError
from onevocab.tokenizers.modality import Modality

# Modules of tokenizers/ in the order of the vocabulary's ids. Append only: published ids keep their meaning.
MODULES = (
    "image",
    "audio",
)
MODALITIES: dict[str, Modality] = {modality.name: modality for modality in (
    import_module(f"onevocab.tokenizers.{name}").MODALITY for name in MODULES)}


def registered(name: str) -> Modality:
    """Raises UserError on a name that is not registered."""
    if name not in MODALITIES:
        raise UserError(f"this version does not know the modality {name!r}; it knows {', '.join(MODALITIES)}")
    return MODALITIES[name]


def modality_of_path(path) -> str:
    """A modality's name by a file's ending, in capitals or not. Raises UserError on any other ending."""
    suffix = PurePath(path).suffix.lower()
    for modality in MODALITIES.values():
        if suffix in modality.suffixes:
            return modality.name
    kinds = ", ".join(f"{modality.plural} end in {' '.join(modality.suffixes)}" for modality in MODALITIES.values())
    raise UserError(f"{path}: unknown kind of file; {kinds}")


def modality_of_ending(ending: str) -> str | None:
    """A modality's name by the ending of a shard's member: `0.png`, or `0.image.npy` for codes; None for others."""
    *before, last = ending.split(".")
    if last == "npy" and before and before[-1] in MODALITIES:
        return before[-1]
    return next((modality.name for modality in MODALITIES.values() if last in modality.shard_endings), None)


def modality_of_value(value) -> str:
    """A modality's name by a Python value. Raises UserError when it is none that any modality takes."""
    for modality in MODALITIES.values():
        if modality.accepts(value):
            return modality.name
    values = ", ".join(modality.value for modality in MODALITIES.values())
    raise UserError(f"a part is a str, a pathlib.Path, {values}; found {type(value).__name__}")
