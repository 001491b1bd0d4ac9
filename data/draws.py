"""Random numbers that are a function of their names alone: a seed, a stream, and two numbers of its own."""

import numpy as np


def raw(n: int, seed: int, stream: int, a: int = 0, b: int = 0) -> np.ndarray:
    """n random uint64 of Philox (Salmon et al., SC 2011): the raw stream, which no numpy version changes."""
    key = np.array([seed % 2**64, stream << 56 | a], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, b, 0], np.uint64)).random_raw(n)


def uniform(values: np.ndarray) -> np.ndarray:
    """uint64 -> float64 from 0 up to 1."""
    return (values >> np.uint64(11)) * 2.0**-53


def permutation(n: int, seed: int, stream: int, a: int = 0, b: int = 0) -> np.ndarray:
    """0 to n - 1 in a random order."""
    return np.argsort(raw(n, seed, stream, a, b), kind="stable")
