"""Shards: plain webdataset tars, their indexes, copies of remote ones."""
