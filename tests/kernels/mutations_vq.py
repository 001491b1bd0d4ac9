"""Deliberate faults in the nearest code, as in `mutations_attention.py`."""

KERNELS = "kernels/vq/kernels_triton.py"
OPS = "kernels/vq/ops_triton.py"
CPU = "kernels/vq/torch_form.py"
INTERPRETER, FAST = "tests/kernels/interpreter/test_vq_triton.py", "tests/kernels/test_vq.py"

MUTATIONS = {
    "equal codes go to the highest": (
        KERNELS, "better = score > best  #", "better = score >= best  #",
        INTERPRETER, "",
    ),
    "equal codes of a block go to the highest": (
        KERNELS, "tl.min(tl.where(best == top, best_start + each[None, :], 2147483647), 1)",
        "tl.max(tl.where(best == top, best_start + each[None, :], -1), 1)",
        INTERPRETER, "",
    ),
    "only the first numbers of a long vector": (
        KERNELS, "for d in range(0, DIM, BLOCK_D):", "for d in range(0, BLOCK_D, BLOCK_D):",
        INTERPRETER, "",
    ),
    "the last numbers of a vector are read past it": (
        KERNELS, "inside = d + columns < DIM", "inside = d + columns >= 0",
        INTERPRETER, "",
    ),
    "a column keeps the best of its last block": (
        KERNELS, "best = tl.where(better, score, best)", "best = score",
        INTERPRETER, "",
    ),
    "inner product instead of distance": (
        OPS, "sum(-1).mul_(0.5)", "sum(-1).mul_(0.0)",
        INTERPRETER, "",
    ),
    "what fills up the last block may win": (
        KERNELS, "mask=known, other=3.0e38", "mask=known, other=0.0",
        INTERPRETER, "",
    ),
    "the code's index within its block": (
        KERNELS, "best_start + each[None, :], 21", "0 * best_start + each[None, :], 21",
        INTERPRETER, "",
    ),
    "CPU: norms of codes count twice": (
        CPU, "codebook.square().sum(-1).mul_(0.5)", "codebook.square().sum(-1)",
        FAST, "",
    ),
}  # fmt: skip
