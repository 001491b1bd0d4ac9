"""How a Triton kernel finds its block sizes, warps and pipeline stages: static tables, no search at run time.

Each operation has its own table, `configs.py` in its folder:
(operation, widest, bytes per element (0: any), compute capability's major) -> config. `config` takes the narrowest row
that is wide enough, of the newest architecture that is not newer than the device. A row for capability 0 serves every
device, and the interpreter. To add one: measure, add a line, let the compile test say what it needs in registers and
shared memory.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

Config = dict[str, int]
Table = Mapping[tuple[str, int, int, int], Config]
ANY = 1 << 40  # a width that no input reaches

_forced: dict[str, Config] = {}


def config(table: Table, operation: str, width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """A copy of the config for `operation` at this width, element type and device.

    Raises ValueError when the table has no row: an unknown operation, or a width or element size beyond it.
    """
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    if capability == 12:  # consumer Blackwell: shared memory as on Ampere, no warpgroup products
        capability = 8
    chosen, best = None, (0, 0)
    for (name, widest, size, major), row in table.items():
        if name == operation and size in (0, dtype.itemsize) and widest >= width and major <= capability:
            if chosen is None or (major, -widest) > best:
                chosen, best = row, (major, -widest)
    if chosen is None:
        raise ValueError(f"{operation}: no config for width {width}, {dtype}, capability {capability}")
    return {**chosen, **_forced.get(operation, {})}


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
