"""Configs of the nearest code's kernel, see `kernels/tuning.py`. Width: a latent."""

from onevocab.kernels.tuning import Table

TABLE: Table = {
    ("vq_assign", 32, 0, 0): {"BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    ("vq_assign", 64, 0, 0): {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
    ("vq_assign", 256, 0, 0): {"BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
}
