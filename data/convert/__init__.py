"""Published data sets -> shards: `python -m onevocab.data.convert FORMAT INPUT --out SHARDS`."""

from onevocab.data.convert.writing import Report, convert

__all__ = ["Report", "convert"]
