"""Configs of the attention kernels, see `kernels/tuning.py`. Widths are head dims.

Rows for architecture 9 read by descriptors. They were chosen by what the compiled kernels need (`aot.json`): two
programs a multiprocessor, no spills, no product that waits for itself. Names that end in `_short` are for masks whose
queries see few keys: smaller blocks compute less that nobody sees. `attention_fused`: dK, dV and dQ in one, by atomics.
"""

from onevocab.kernels.tuning import Config, Table

SHORT = 512  # mean number of visible keys up to which the rows for short documents are taken


def _blocks(block_q: int, block_k: int, num_warps: int, num_stages: int, **more: int) -> Config:
    """more: maxnreg, the most registers a thread may have; descriptors, ahead, fused: 1 for yes."""
    return {"block_q": block_q, "block_k": block_k, "num_warps": num_warps, "num_stages": num_stages, **more}


def _described(*blocks: int, **more: int) -> Config:
    return _blocks(*blocks, descriptors=1, **more)


TABLE: Table = {
    ("attention_forward", 64, 2, 9): _described(128, 64, 8, 3, maxnreg=128),
    ("attention_forward", 128, 2, 9): _described(128, 32, 8, 3, maxnreg=128),
    ("attention_forward", 256, 2, 9): _described(64, 32, 4, 2),
    ("attention_forward_short", 64, 2, 9): _described(64, 64, 4, 3),
    ("attention_forward_short", 128, 2, 9): _described(64, 64, 4, 2),
    ("attention_forward", 64, 2, 8): _blocks(128, 64, 8, 3),
    ("attention_forward", 128, 2, 8): _blocks(64, 32, 4, 3),
    ("attention_forward", 256, 2, 8): _blocks(64, 32, 8, 2),
    ("attention_forward", 128, 4, 8): _blocks(64, 32, 4, 2),
    ("attention_forward", 128, 2, 0): _blocks(64, 32, 4, 1),
    ("attention_forward", 256, 2, 0): _blocks(32, 32, 4, 1),
    ("attention_forward", 256, 4, 0): _blocks(16, 16, 4, 1),
    ("attention_dq", 64, 2, 9): _described(128, 64, 8, 2, maxnreg=128),
    ("attention_dq", 128, 2, 9): _described(64, 64, 4, 2),
    ("attention_dq", 256, 2, 9): _described(64, 32, 4, 2),
    ("attention_dq_short", 64, 2, 9): _described(64, 64, 4, 2),
    ("attention_dq", 128, 2, 8): _blocks(64, 32, 4, 2),
    ("attention_dq", 128, 2, 0): _blocks(64, 32, 4, 1),
    ("attention_dq", 256, 2, 0): _blocks(32, 32, 4, 1),
    ("attention_dq", 256, 4, 0): _blocks(16, 16, 4, 1),
    ("attention_dkdv", 64, 2, 9): _described(64, 64, 4, 2),
    ("attention_dkdv", 128, 2, 9): _described(32, 64, 4, 3),
    ("attention_dkdv", 256, 2, 9): _described(16, 64, 8, 3),
    ("attention_dkdv", 128, 2, 8): _blocks(32, 64, 4, 2),
    ("attention_dkdv", 256, 2, 8): _blocks(16, 64, 8, 2),
    ("attention_dkdv", 128, 2, 0): _blocks(32, 64, 4, 1),
    ("attention_dkdv", 256, 2, 0): _blocks(32, 32, 4, 1),
    ("attention_dkdv", 256, 4, 0): _blocks(16, 16, 4, 1),
    ("attention_fused", 64, 2, 9): _described(64, 128, 8, 2, fused=1),
}
