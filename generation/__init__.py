"""Sampling in every direction."""

from importlib import import_module

__all__ = ["AnyToAny", "Event", "Reply"]


def __getattr__(name: str):
    """Imported when first asked for: `sample.py --help` and a mistyped flag need not wait for torch."""
    if name in __all__:
        return getattr(import_module("onevocab.generation.anytoany"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
