"""Tensor descriptors of (B, H, S, D) tensors, made on the host: which tensors they can address, and their making.

A descriptor is what Hopper's copy engine reads by (CUDA programming guide, tensor maps): the base and all strides but
the last are multiples of 16 bytes, and a row's elements lie side by side.
"""

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def obstacle(**tensors: Tensor) -> str | None:
    """Why a descriptor cannot address one of these tensors, or None."""
    for name, x in tensors.items():
        steps = _strides(x)
        if x.data_ptr() % 16:
            return f"{name} does not begin at a multiple of 16 bytes"
        if any(step <= 0 or step * x.element_size() % 16 for step in steps[:-1]) or steps[-1] != 1:
            return f"{name}'s strides {tuple(x.stride())} are not whole multiples of 16 bytes"
    return None


def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of `rows` rows of one head, as wide as a power of two that holds D; zeros beyond the tensor's end."""
    width = max(triton.next_power_of_2(x.shape[-1]), 16)
    return TensorDescriptor(x, list(x.shape), _strides(x), [1, 1, rows, width])


def _strides(x: Tensor) -> list[int]:
    """In elements; a dimension of size 1, whose stride says nothing, gets that of the whole tensor side by side."""
    steps = [step if size > 1 else x.numel() for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    return [*steps, x.stride(-1) if x.shape[-1] > 1 else 1]
