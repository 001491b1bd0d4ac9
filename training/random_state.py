"""The state of all random-number generators of a process, as JSON values."""

import base64
import random

import numpy as np
import torch
from torch import Tensor


def random_state() -> dict:
    """Of Python's, numpy's and torch's generators, and of this rank's GPU where there is one."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {"python": [version, list(words), gauss], "numpy": [name, keys.tolist(), position, has_gauss, cached],
             "torch": _to_text(torch.get_rng_state())}
    return state | ({"cuda": _to_text(torch.cuda.get_rng_state())} if torch.cuda.is_available() else {})


def restore_random_state(saved: dict) -> None:
    """Puts back what `random_state` returned."""
    torch.set_rng_state(_to_bytes(saved["torch"]))
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(_to_bytes(saved["cuda"]))
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))


def _to_text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _to_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
