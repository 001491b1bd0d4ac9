"""Configs of attention over a cache, see `kernels/tuning.py`. Width: a head."""

from onevocab.kernels.tuning import Table

TABLE: Table = {
    ("decode_attention", 64, 2, 0): {"BLOCK_N": 128, "num_warps": 4, "num_stages": 3},
    ("decode_attention", 128, 2, 0): {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    ("decode_attention", 256, 2, 0): {"BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
    ("decode_attention", 128, 4, 0): {"BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
    ("decode_attention", 256, 4, 0): {"BLOCK_N": 16, "num_warps": 4, "num_stages": 2},
}
