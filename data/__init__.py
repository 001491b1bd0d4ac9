"""Shards, documents, order, packing, and the demo world."""
