"""Block sizes, warps and pipeline stages of the Triton kernels: a static table, no search at run time.

A row is found by (operation, width, bytes per element, compute capability): the narrowest row that is wide enough,
of the newest architecture that is not newer than the device. A row for 0 serves every device, and the interpreter.
To add one: measure, add a line, let the compile test say what it needs in registers and shared memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

Config = dict[str, int]
ANY = 1 << 40  # a width that no input reaches


def _blocks(block_q: int, block_k: int, num_warps: int, num_stages: int) -> Config:
    return {"block_q": block_q, "block_k": block_k, "num_warps": num_warps, "num_stages": num_stages}


# (operation, widest, bytes per element (0: any), capability major) -> config. Widths of attention are head dims.
TABLE: dict[tuple[str, int, int, int], Config] = {
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

# Elementwise kernels are bound by memory: some 4,096 numbers a program. Widths: a row, half a head, a row.
for _direction in ("", "_backward"):
    TABLE |= {
        (f"rms_norm{_direction}", 256, 0, 0): {"ROWS": 16, "num_warps": 4},
        (f"rms_norm{_direction}", 1024, 0, 0): {"ROWS": 4, "num_warps": 4},
        (f"rms_norm{_direction}", 2048, 0, 0): {"ROWS": 2, "num_warps": 8},
        (f"rms_norm{_direction}", 8192, 0, 0): {"ROWS": 1, "num_warps": 8},
        (f"rms_norm{_direction}", 32768, 0, 0): {"ROWS": 1, "num_warps": 16},
        (f"qk_norm_rope{_direction}", 64, 0, 0): {"ROWS": 32, "num_warps": 4},
        (f"qk_norm_rope{_direction}", 256, 0, 0): {"ROWS": 8, "num_warps": 4},
        (f"swiglu{_direction}", ANY, 0, 0): {"BLOCK": 2048, "num_warps": 4},
    }

# Widths: all ids, a latent, a head.
TABLE |= {
    ("cross_entropy", 4096, 0, 0): {"BLOCK": 4096, "num_warps": 8},
    ("cross_entropy", ANY, 0, 0): {"BLOCK": 8192, "num_warps": 16},
    ("vq_assign", 32, 0, 0): {"BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    ("vq_assign", 64, 0, 0): {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
    ("vq_assign", 256, 0, 0): {"BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
    ("decode_attention", 64, 2, 0): {"BLOCK_N": 128, "num_warps": 4, "num_stages": 3},
    ("decode_attention", 128, 2, 0): {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    ("decode_attention", 256, 2, 0): {"BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
    ("decode_attention", 128, 4, 0): {"BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
    ("decode_attention", 256, 4, 0): {"BLOCK_N": 16, "num_warps": 4, "num_stages": 2},
}

_forced: dict[str, Config] = {}


def config(operation: str, width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """A copy of the config for `operation` at this width, element type and device.

    Raises ValueError when the table has no row: an unknown operation, or a width or element size beyond it.
    """
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    if capability == 12:  # consumer Blackwell: shared memory as on Ampere, no warpgroup products
        capability = 8
    found, best = None, (0, 0)
    for (name, widest, size, major), row in TABLE.items():
        if name == operation and size in (0, dtype.itemsize) and widest >= width and major <= capability:
            if found is None or (major, -widest) > best:
                found, best = row, (major, -widest)
    if found is None:
        raise ValueError(f"{operation}: no config for width {width}, {dtype}, capability {capability}")
    return {**found, **_forced.get(operation, {})}


@contextmanager
def forced(**operations: Config) -> Iterator[None]:
    """Within it, `forced(attention_forward={"block_q": 16})` overrides entries of the table: tests and sweeps."""
    before = dict(_forced)
    _forced.update({name: {**before.get(name, {}), **config} for name, config in operations.items()})
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
