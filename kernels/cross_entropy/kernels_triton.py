"""The Triton kernel of the loss: everything between the two matmuls.

One program reads one row of logits twice: first for the log-sum-exp, kept online (Milakov and Gimelshein 2018), then
to write d logits over it. Logits, softmax and gradient share one buffer of (chunk, V) (the idea of Liger Kernel).
"""

import triton
import triton.language as tl

from onevocab.kernels.rounding_triton import rounded

LOWEST = tl.constexpr(-3.0e38)  # finite: -inf minus -inf would be NaN
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def cross_entropy_rows(
    logits_ptr, target_ptr, weight_ptr, nll_ptr, loss_ptr, n_ids, row_stride, z_loss,
    BLOCK: tl.constexpr, WRITE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """logits (R, V) -> nll (R,), loss (R,) = w * (nll + z lse^2); with WRITE the logits become d loss / d logits."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * row_stride
    columns = tl.arange(0, BLOCK)
    target = tl.load(target_ptr + row)
    weight = tl.load(weight_ptr + row)
    at_target = tl.load(logits_ptr + target).to(tl.float32)

    top = tl.full((), LOWEST, tl.float32)  # of logits * log2(e)
    total = tl.full((), 0.0, tl.float32)  # sum of 2 ** (logits * log2(e) - top)
    for start in range(0, n_ids, BLOCK):
        inside = start + columns < n_ids
        x = tl.load(logits_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x * LOG2E, LOWEST)
        new_top = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(x - new_top), 0)
        top = new_top
    lse = (top + tl.log2(total)) * LN2
    nll = lse - at_target
    tl.store(nll_ptr + row, nll)
    tl.store(loss_ptr + row, weight * (nll + z_loss * lse * lse))

    if WRITE:
        scale = weight * (1.0 + 2.0 * z_loss * lse) / total
        for start in range(0, n_ids, BLOCK):
            inside = start + columns < n_ids
            x = tl.load(logits_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
            gradient = scale * tl.exp2(x * LOG2E - top) - tl.where(start + columns == target, weight, 0.0)
            tl.store(logits_ptr + start + columns, rounded(gradient, logits_ptr, INTERPRET), mask=inside)
