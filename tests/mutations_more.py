"""Deliberate faults: (file, the text as it is, the text with a fault). Each text occurs once; each fault must make a
test of that file's list fail."""

TESTS = {
    "kernels/cross_entropy_triton.py": ["tests/interpreter/test_cross_entropy.py"],
    "kernels/elementwise_triton.py": ["tests/interpreter/test_elementwise.py"],
    "kernels/decode_triton.py": ["tests/interpreter/test_decode.py"],
    "kernels/vq_triton.py": ["tests/interpreter/test_vq.py"],
    "kernels/cross_entropy.py": ["tests/test_kernels.py", "tests/test_kernels_more.py"],
    "kernels/elementwise.py": ["tests/test_kernels.py", "tests/test_kernels_more.py"],
    "kernels/decode.py": ["tests/test_kernels_more.py"],
    "kernels/vq.py": ["tests/test_kernels_more.py"],
}

_LOSS, _NORM = "kernels/cross_entropy_triton.py", "kernels/elementwise_triton.py"
_DECODE, _VQ = "kernels/decode_triton.py", "kernels/vq_triton.py"

MUTATIONS = [
    # the z-loss has no gradient
    (_LOSS, "scale = weight * (1.0 + 2.0 * z_loss * lse) / total", "scale = weight / total"),
    # what fills up the last block of ids counts as logits of 0
    (_LOSS, "x = tl.where(inside, x * LOG2E, LOWEST)", "x = x * LOG2E"),
    # the online sum is not brought to a new maximum
    (_LOSS, "total = total * tl.exp2(top - new_top) + tl.sum", "total = total + tl.sum"),
    # the maximum stays in base 2
    (_LOSS, "lse = (top + tl.log2(total)) * LN2", "lse = top + tl.log2(total) * LN2"),
    # the target's part of the gradient ignores the token's weight
    (_LOSS, "start + columns == target, weight, 0.0)", "start + columns == target, 1.0, 0.0)"),
    # gradients land in the rows of the batch that come first, not in those that count
    (_LOSS, "d_hidden.index_copy_(0, rows[part], ", "d_hidden.index_copy_(0, rows[: part.stop - start] * 0 + "
            "torch.arange(part.stop - start), "),  # fmt: skip
    # d weight of the last chunk only
    (_LOSS, "d_weight.addmm_(logits.t(), x[part])", "d_weight.addmm_(logits.t(), x[part], beta=0)"),
    # the last row that counts is lost
    (_LOSS, "slice(start, min(start + chunk, len(rows)))", "slice(start, min(start + chunk, len(rows) - 1))"),
    # the backward pass of RMSNorm without the mean
    (_NORM, "d_x = rstd * (grad - x * (tl.sum(grad * x, 1) / width)[:, None])", "d_x = rstd * grad"),
    # the gradient that reached the sum itself is lost
    (_NORM, "d_x += tl.load(grad_total_ptr", "d_x += 0.0 * tl.load(grad_total_ptr"),
    # the residual is not added before the norm
    (_NORM, "x = total.to(tl.float32)", "x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)"),
    # the mean is over the padded width
    (_NORM, "rstd = tl.rsqrt(tl.sum(x * x, 1) / width + eps)\n", "rstd = tl.rsqrt(tl.sum(x * x, 1) / BLOCK + eps)\n"),
    # d weight keeps only the last tile of a slab
    (_NORM, "d_weight += tl.sum(grad * x, 0)", "d_weight = tl.sum(grad * x, 0)"),
    # rows between the programs' slabs
    (_NORM, "return triton.cdiv(n_rows, slab), slab", "return triton.cdiv(n_rows, slab), slab - rows"),
    # the backward pass turns the same way as the forward pass
    (_NORM, "grad_a = turned_a * cos + turned_b * sin", "grad_a = turned_a * cos - turned_b * sin"),
    # the angle of another token
    (_NORM, "    angle_at = (rows // heads)[:, None] * HALF + columns[None, :]\n    a = ",
            "    angle_at = (rows % heads)[:, None] * HALF + columns[None, :]\n    a = "),  # fmt: skip
    # the second half's weight is the first half's
    (_NORM, "weight_b = tl.load(weight_ptr + HALF + columns", "weight_b = tl.load(weight_ptr + columns"),
    # silu's derivative without its second term
    (_NORM, "sigmoid * (1.0 + gate * (1.0 - sigmoid))", "sigmoid"),
    # the last key of each query is hidden from it (the mask's end exclusive)
    (_DECODE, "(keys[None, :] <= last[:, None])", "(keys[None, :] < last[:, None])"),
    # a later query's key is seen by all
    (_DECODE, "last = length - QUERIES + rows % QUERIES", "last = length - 1 + rows % QUERIES"),
    # heads and queries of a tile exchanged
    (_DECODE, "- QUERIES + rows % QUERIES", "- QUERIES + tl.minimum(rows // (ROWS // QUERIES), QUERIES - 1)"),
    # the wrong key head
    (_DECODE, "(program % KV_HEADS).to(tl.int64)", "(program % KV_HEADS * 0).to(tl.int64)"),
    # missing scale
    (_DECODE, '* (scale * 1.4426950408889634)', "* 1.4426950408889634"),
    # natural exponents taken for powers of two
    (_DECODE, "(scale * 1.4426950408889634)", "scale"),
    # the accumulator is not brought to a new maximum
    (_DECODE, "out = out * shrink[:, None] + ", "out = out + "),
    # a part begins a block too late
    (_DECODE, "start, stop = part * per_part * BLOCK_N,", "start, stop = part * (per_part + 1) * BLOCK_N,"),
    # parts are averaged
    (_DECODE, "tl.where(lse > NOTHING, tl.exp2(lse - tl.max(lse, 0)), 0.0)", "tl.where(lse > NOTHING, 1.0, 0.0)"),
    # slots of a page
    (_DECODE, "slot = (keys % page).to(tl.int64)", "slot = ((keys + 1) % page).to(tl.int64)"),
    # the block table of another row
    (_DECODE, "batch * table_row + keys // page", "keys // page"),
    # rows behind a length are read
    (_DECODE, "known = keys < stop", "known = keys < stop + 1"),
    # equal codes go to the highest (within a block the interpreter cannot show it)
    (_VQ, "better = value > best  #", "better = value >= best  #"),
    # inner product instead of distance
    (_VQ, "sum(-1).mul_(0.5)", "sum(-1).mul_(0.0)"),
    # what fills up the last block may win
    (_VQ, "mask=known, other=3.0e38", "mask=known, other=0.0"),
    # the code's index within its block
    (_VQ, "start + index, best_code", "index, best_code"),
    # the CPU's paths
    ("kernels/cross_entropy.py", "(1 + 2 * z_loss * lse)", "1.0 * (lse == lse)"),
    ("kernels/cross_entropy.py", "kept.mul_(grad.to(kept.dtype)) if", "kept.mul_(1.0) if"),
    ("kernels/cross_entropy.py", "top - probabilities.amax(-1).log()", "top"),
    ("kernels/elementwise.py", "value=1 / d)", "value=0)"),
    ("kernels/elementwise.py", "return _rms_norm_torch(total, weight, eps), total", "return _rms_norm_torch(total, "
                               "weight, eps), x"),  # fmt: skip
    ("kernels/decode.py", "lengths.long()[:, None] - queries + torch", "lengths.long()[:, None] - 1 + 0 * torch"),
    ("kernels/decode.py", "mask[:, None].repeat(1, 1, groups, 1)", "mask[:, None].repeat_interleave(groups, 2)"),
    ("kernels/decode.py", "return out.reshape(q.shape).masked_fill(empty[:, None, :, None], 0.0)", "return out.reshape("
                          "q.shape)"),  # fmt: skip
    ("kernels/vq.py", "codebook.square().sum(-1).mul_(0.5)", "codebook.square().sum(-1)"),
]
