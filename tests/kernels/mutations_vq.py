"""Deliberate faults in the nearest code, as in `mutations_attention.py`."""

KERNELS = "kernels/vq/kernels_triton.py"
OPS = "kernels/vq/ops_triton.py"
CPU = "kernels/vq/torch_form.py"
INTERPRETER, FAST = "tests/kernels/interpreter/test_vq_triton.py", "tests/kernels/test_vq.py"

MUTATIONS = {
    "equal codes go to the highest (within a block the interpreter cannot show it)": (
        KERNELS, "better = value > best  #", "better = value >= best  #",
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
        KERNELS, "start + index, best_code", "index, best_code",
        INTERPRETER, "",
    ),
    "CPU: norms of codes count twice": (
        CPU, "codebook.square().sum(-1).mul_(0.5)", "codebook.square().sum(-1)",
        FAST, "",
    ),
}  # fmt: skip
