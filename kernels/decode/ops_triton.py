"""The GPU's `decode_attention`: launches the kernels of `kernels_triton`, and registers them with torch."""

import math

import torch
import triton
from torch import Tensor

from onevocab.kernels import tuning
from onevocab.kernels.backend import on_device
from onevocab.kernels.decode.configs import TABLE
from onevocab.kernels.decode.kernels_triton import combine, partial_attention
from onevocab.kernels.rounding_triton import INTERPRET


def parts_for(pairs: int, n_keys: int, block: int, device: torch.device) -> tuple[int, int]:
    """(parts per row that fill the device about twice, none shorter than 4 blocks when all keys are used; a power of
    two that they never pass, however many keys there are)."""
    programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    most = max(1, min(programs // pairs, 64))
    return min(most, triton.cdiv(n_keys, 4 * block)), triton.next_power_of_2(most)


def keys_per_tile(page: int, block: int) -> int:
    """Of pages, the largest tile up to `block` that is whole pages or divides one; none of 16 keys: `block` itself."""
    divides = math.gcd(page, block)
    return block if divides in (page, block) or divides < 16 else divides


@torch.library.custom_op("onevocab::decode_attention", mutates_args=())
@on_device
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, block_table: Tensor | None, scale: float
) -> Tensor:
    q, lengths = q.contiguous(), lengths.contiguous()
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    table = lengths if block_table is None else block_table.contiguous()
    (batch, heads, queries, dim), kv_heads = q.shape, k.shape[1]
    page, n_keys = (0, k.shape[2]) if block_table is None else (k.shape[2], k.shape[2] * block_table.shape[1])
    pairs, rows = batch * kv_heads, heads // kv_heads * queries
    config = tuning.config(TABLE, "decode_attention", dim, q.dtype, q.device)
    if page:  # entries of the table take as many stages as keys: as many tiles are on their way as of a dense cache
        config |= {"BLOCK_N": keys_per_tile(page, config["BLOCK_N"]), "num_stages": 2 * config["num_stages"] - 1}
    parts, most = parts_for(pairs, n_keys, config["BLOCK_N"], q.device)
    if forced := config.pop("PARTS", None):
        parts, most = forced, triton.next_power_of_2(forced)
    block_d = max(16, triton.next_power_of_2(dim))
    part_out = q.new_empty(pairs, parts, rows, dim, dtype=torch.float32)
    lse = q.new_empty(pairs, parts, rows, dtype=torch.float32)
    out = torch.empty_like(q)
    partial_attention[(pairs, parts)](
        q, k, v, lengths, table, part_out, lse, scale, *k.stride()[:3], *v.stride()[:3], table.stride(0),
        KV_HEADS=kv_heads, ROWS=rows, QUERIES=queries, DIM=dim, PAGE=page,
        BLOCK_M=max(16, triton.next_power_of_2(rows)), BLOCK_D=block_d, INTERPRET=INTERPRET, **config,
    )  # fmt: skip
    combine[(pairs, rows)](
        part_out, lse, out, parts, ROWS=rows, DIM=dim, BLOCK_D=block_d, BLOCK_P=most, INTERPRET=INTERPRET,
    )  # fmt: skip
    return out


@decode_attention.register_fake
def _(q, k, v, lengths, block_table, scale):
    return q.new_empty(q.shape)
