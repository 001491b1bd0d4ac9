"""Config of the nearest code's kernel, see `kernels/tuning.py`. Width: a latent; BLOCK_D of its numbers are a step."""

from onevocab.kernels.tuning import Table

TABLE: Table = {
    ("vq_assign", 256, 0, 0): {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_D": 16, "num_warps": 8, "num_stages": 3},
}
