"""Deliberate faults in attention over a cache, as in `mutations_attention.py`."""

KERNELS = "kernels/decode/kernels_triton.py"
CACHE = "kernels/decode/cache.py"
CPU = "kernels/decode/torch_form.py"
INTERPRETER, FAST = "tests/kernels/interpreter/test_decode_triton.py", "tests/kernels/test_decode.py"

MUTATIONS = {
    "the last key of each query is hidden from it (the mask's end exclusive)": (
        KERNELS, "(keys[None, :] <= last[:, None])", "(keys[None, :] < last[:, None])",
        INTERPRETER, "",
    ),
    "a later query's key is seen by all": (
        KERNELS, "last = length - QUERIES + rows % QUERIES", "last = length - 1 + rows % QUERIES",
        INTERPRETER, "",
    ),
    "heads and queries of a tile exchanged": (
        KERNELS, "- QUERIES + rows % QUERIES", "- QUERIES + tl.minimum(rows // (ROWS // QUERIES), QUERIES - 1)",
        INTERPRETER, "",
    ),
    "the wrong key head": (
        KERNELS, "(program % KV_HEADS).to(tl.int64)", "(program % KV_HEADS * 0).to(tl.int64)",
        INTERPRETER, "",
    ),
    "missing scale": (
        KERNELS, "* (scale * 1.4426950408889634)", "* 1.4426950408889634",
        INTERPRETER, "",
    ),
    "natural exponents taken for powers of two": (
        KERNELS, "(scale * 1.4426950408889634)", "scale",
        INTERPRETER, "",
    ),
    "the accumulator is not brought to a new maximum": (
        KERNELS, "out = out * shrink[:, None] + ", "out = out + ",
        INTERPRETER, "",
    ),
    "a part begins a block too late": (
        KERNELS, "start, stop = part * per_part * BLOCK_N,", "start, stop = part * (per_part + 1) * BLOCK_N,",
        INTERPRETER, "",
    ),
    "parts are averaged": (
        KERNELS, "tl.where(lse > NOTHING, tl.exp2(lse - tl.max(lse, 0)), 0.0)", "tl.where(lse > NOTHING, 1.0, 0.0)",
        INTERPRETER, "",
    ),
    "slots of a page": (
        KERNELS, "slot = (keys % page).to(tl.int64)", "slot = ((keys + 1) % page).to(tl.int64)",
        INTERPRETER, "",
    ),
    "the block table of another row": (
        KERNELS, "batch * table_row + keys // page", "keys // page",
        INTERPRETER, "",
    ),
    "rows behind a length are read": (
        KERNELS, "known = keys < stop", "known = keys < stop + 1",
        INTERPRETER, "",
    ),
    "CPU: every query sees the newest key": (
        CACHE, "lengths.long()[:, None] - queries + torch", "lengths.long()[:, None] - 1 + 0 * torch",
        FAST, "",
    ),
    "CPU: the masks of heads and queries exchanged": (
        CPU, "mask[:, None].repeat(1, 1, groups, 1)", "mask[:, None].repeat_interleave(groups, 2)",
        FAST, "",
    ),
    "CPU: an empty row gives what it happened to see": (
        CPU, "return out.reshape(q.shape).masked_fill(empty[:, None, :, None], 0.0)", "return out.reshape(q.shape)",
        FAST, "",
    ),
}  # fmt: skip
