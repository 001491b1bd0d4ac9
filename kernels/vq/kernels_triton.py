"""The Triton kernel of the nearest code: a program holds a tile of latents and walks over the codebook, keeping the
best so far.

The products are in float32 proper, not TF32: a near tie must not depend on the device.
"""

import triton
import triton.language as tl


@triton.jit
def nearest(
    latent_ptr, code_ptr, half_square_ptr, out_ptr, n_latents, n_codes,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (N,) = argmax over codes of latent . code - |code|^2 / 2; of equals the lowest code."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < n_latents)[:, None] & (columns < DIM)[None, :]
    x = tl.load(latent_ptr + rows[:, None] * DIM + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    best = tl.full((BLOCK_N,), -3.0e38, tl.float32)
    best_code = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, n_codes, BLOCK_K):
        codes = start + tl.arange(0, BLOCK_K)
        known = codes < n_codes
        # int64: n_codes * DIM may pass 2 ** 31
        at = codes[None, :].to(tl.int64) * DIM + columns[:, None]
        c = tl.load(code_ptr + at, mask=known[None, :] & (columns < DIM)[:, None], other=0.0).to(tl.float32)
        half_square = tl.load(half_square_ptr + codes, mask=known, other=3.0e38)
        score = tl.dot(x, c, input_precision="ieee") - half_square[None, :]
        value, index = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
        better = value > best  # strictly: an equal code further on does not win
        best = tl.where(better, value, best)
        best_code = tl.where(better, start + index, best_code)
    tl.store(out_ptr + rows, best_code.to(tl.int64), mask=rows < n_latents)
