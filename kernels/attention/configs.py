"""Configs of the attention kernels, see `kernels/tuning.py`. Widths are head dims."""

from onevocab.kernels.tuning import Config, Table


def _blocks(block_q: int, block_k: int, num_warps: int, num_stages: int) -> Config:
    return {"block_q": block_q, "block_k": block_k, "num_warps": num_warps, "num_stages": num_stages}


TABLE: Table = {
    ("attention_forward", 64, 2, 9): _blocks(128, 128, 8, 2),
    ("attention_forward", 128, 2, 9): _blocks(128, 64, 8, 3),
    ("attention_forward", 64, 2, 8): _blocks(128, 64, 4, 3),
    ("attention_forward", 128, 2, 8): _blocks(128, 32, 4, 3),
    ("attention_forward", 128, 4, 8): _blocks(64, 32, 4, 2),
    ("attention_forward", 128, 2, 0): _blocks(64, 32, 4, 1),
    ("attention_forward", 128, 4, 0): _blocks(32, 32, 4, 1),
    ("attention_dq", 64, 2, 9): _blocks(128, 64, 8, 2),
    ("attention_dq", 128, 2, 9): _blocks(128, 64, 8, 2),
    ("attention_dq", 128, 2, 8): _blocks(64, 32, 4, 2),
    ("attention_dq", 128, 4, 8): _blocks(32, 32, 4, 1),
    ("attention_dq", 128, 2, 0): _blocks(64, 32, 4, 1),
    ("attention_dq", 128, 4, 0): _blocks(32, 32, 4, 1),
    ("attention_dkdv", 64, 2, 9): _blocks(64, 128, 8, 2),
    ("attention_dkdv", 128, 2, 9): _blocks(32, 128, 8, 3),
    ("attention_dkdv", 128, 2, 8): _blocks(32, 64, 4, 2),
    ("attention_dkdv", 128, 4, 8): _blocks(32, 32, 4, 1),
    ("attention_dkdv", 128, 2, 0): _blocks(32, 64, 4, 1),
    ("attention_dkdv", 128, 4, 0): _blocks(32, 32, 4, 1),
}
