"""The Triton kernel of the nearest code: a program holds a tile of latents and walks over the codebook, keeping the
best so far of each column of the tile; one reduction at the end picks the best column.

The products are in float32 proper, not TF32: a near tie must not depend on the device. They run in the ordinary cores,
each of whose threads holds its rows and columns of both factors, BLOCK_D numbers at a time: longer vectors spill.
"""

import triton
import triton.language as tl


@triton.jit
def nearest(
    latent_ptr, code_ptr, half_square_ptr, out_ptr, n_latents, n_codes,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """float32 latents, codes -> out (N,) = argmax over codes of latent . code - |code|^2 / 2; of equals the lowest."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    each, columns = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    here = rows < n_latents
    best = tl.full((BLOCK_N, BLOCK_K), -3.0e38, tl.float32)
    best_start = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    for start in range(0, n_codes, BLOCK_K):
        known = start + each < n_codes
        first = (start + each).to(tl.int64) * DIM  # n_codes * DIM may pass 2 ** 31
        score = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for d in range(0, DIM, BLOCK_D):
            inside = d + columns < DIM
            x_at = rows[:, None] * DIM + (d + columns)[None, :]
            x = tl.load(latent_ptr + x_at, mask=here[:, None] & inside[None, :], other=0.0)
            c_at = first[None, :] + (d + columns)[:, None]
            c = tl.load(code_ptr + c_at, mask=known[None, :] & inside[:, None], other=0.0)
            score = tl.dot(x, c, score, input_precision="ieee")
        score -= tl.load(half_square_ptr + start + each, mask=known, other=3.0e38)[None, :]
        better = score > best  # strictly: an equal code further on does not win
        best = tl.where(better, score, best)
        best_start = tl.where(better, start, best_start)
    top = tl.max(best, 1)[:, None]
    code = tl.min(tl.where(best == top, best_start + each[None, :], 2147483647), 1)
    tl.store(out_ptr + rows, code.to(tl.int64), mask=here)
