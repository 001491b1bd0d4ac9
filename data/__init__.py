"""Shards, documents, order, packing."""
