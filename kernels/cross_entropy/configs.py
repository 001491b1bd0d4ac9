"""Config of the loss's kernel, see `kernels/tuning.py`. Width: all ids."""

from onevocab.kernels.tuning import ANY, Table

TABLE: Table = {
    ("cross_entropy", 4096, 0, 0): {"BLOCK": 4096, "num_warps": 8},
    ("cross_entropy", ANY, 0, 0): {"BLOCK": 8192, "num_warps": 16},
}
