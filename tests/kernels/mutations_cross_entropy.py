"""Deliberate faults in the loss, as in `mutations_attention.py`."""

KERNELS = "kernels/cross_entropy/kernels_triton.py"
OPS = "kernels/cross_entropy/ops_triton.py"
CPU = "kernels/cross_entropy/torch_form.py"
ROWS = "kernels/cross_entropy/rows.py"
C = "kernels/cross_entropy/kernels.c"
INTERPRETER, FAST = "tests/kernels/interpreter/test_cross_entropy_triton.py", "tests/kernels/test_cross_entropy.py"

MUTATIONS = {
    "the z-loss has no gradient": (
        KERNELS, "scale = weight * (1.0 + 2.0 * z_loss * lse) / total", "scale = weight / total",
        INTERPRETER, "",
    ),
    "what fills up the last block of ids counts as logits of 0": (
        KERNELS, "x = tl.where(inside, x * LOG2E, LOWEST)", "x = x * LOG2E",
        INTERPRETER, "",
    ),
    "the online sum is not brought to a new maximum": (
        KERNELS, "total = total * tl.exp2(top - new_top) + tl.sum", "total = total + tl.sum",
        INTERPRETER, "",
    ),
    "the maximum stays in base 2": (
        KERNELS, "lse = (top + tl.log2(total)) * LN2", "lse = top + tl.log2(total) * LN2",
        INTERPRETER, "",
    ),
    "the target's part of the gradient ignores the token's weight": (
        KERNELS, "start + columns == target, weight, 0.0)", "start + columns == target, 1.0, 0.0)",
        INTERPRETER, "",
    ),
    "gradients land in the rows of the batch that come first, not in those that count": (
        OPS,
        "d_hidden.index_copy_(0, rows[part], ",
        "d_hidden.index_copy_(0, rows[: part.stop - start] * 0 + torch.arange(part.stop - start), ",
        INTERPRETER, "",
    ),
    "d weight of the last chunk only": (
        ROWS, "total.addmm_(a, b)", "total.addmm_(a, b, beta=0)",
        INTERPRETER, "",
    ),
    "the last row that counts is lost": (
        OPS, "slice(start, min(start + chunk, len(rows)))", "slice(start, min(start + chunk, len(rows) - 1))",
        INTERPRETER, "",
    ),
    "on a GPU d weight is rounded to 16 bits at every chunk": (
        ROWS, "elif a.is_cuda:", "elif False:",
        FAST, "rounded",
    ),
    "the device is asked twice which rows count": (
        ROWS, "rows = torch.nonzero_static(counts, size=many).squeeze(1)", "rows = counts.nonzero().squeeze(1)",
        FAST, "waited",
    ),
    "targets of rows that do not count are looked at": (
        ROWS, "torch.where(counts, targets.long(), 0).aminmax()", "targets.long().aminmax()",
        FAST, "edges",
    ),
    "CPU: the z-loss has no gradient": (
        CPU, "mul_((weights * (1 + 2 * z_loss * lse))", "mul_((weights * (lse == lse))",
        FAST, "",
    ),
    "C: the z-loss has no gradient": (
        C, "(1.0f + 2.0f * z_loss * lse[r])", "1.0f",
        FAST, "",
    ),
    "C: the numbers behind the last whole vector are not in the maximum": (
        C, "for (; i < n; i++) top = row[i] > top ? row[i] : top;", "",
        FAST, "",
    ),
    "C: the target's part of the gradient ignores the token's weight": (
        C, "out[targets[r]] -= weights[r]", "out[targets[r]] -= 1.0f",
        FAST, "",
    ),
    "CPU: the gradient that comes from above is ignored": (
        ROWS, "kept.mul_(grad.to(kept.dtype)) if", "kept.mul_(1.0) if",
        FAST, "",
    ),
    "CPU: the largest logit taken for ln Z": (
        CPU, "top - probabilities.amax(-1).log()", "top",
        FAST, "",
    ),
}  # fmt: skip
