"""Sampling in every direction."""

from onevocab.generation.anytoany import AnyToAny, Event, Reply

__all__ = ["AnyToAny", "Event", "Reply"]
