"""Deliberate faults in attention over a cache, as in `mutations_attention.py`."""

KERNELS = "kernels/decode/kernels_triton.py"
OPS = "kernels/decode/ops_triton.py"
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
    "slots of a page that holds a tile": (
        KERNELS, "slot = (first % PAGE + tl.arange(0, BLOCK_N))", "slot = tl.arange(0, BLOCK_N)",
        INTERPRETER, "page32",
    ),
    "a tile's pages interleaved": (
        KERNELS, "tl.broadcast_to(row[:, None], (BLOCK_N // PAGE, PAGE))",
        "tl.broadcast_to(row[None, :], (PAGE, BLOCK_N // PAGE))",
        INTERPRETER, "page4",
    ),
    "a tile of pages begins at the row's first": (
        KERNELS, "pages = first // PAGE + tl.arange", "pages = first % PAGE + tl.arange",
        INTERPRETER, "page4",
    ),
    "slots of pages that tiles cross": (
        KERNELS,
        "+ keys // PAGE, mask=known, other=0).to(tl.int64)\n            slot = (keys % PAGE).to(tl.int64)",
        "+ keys // PAGE, mask=known, other=0).to(tl.int64)\n            slot = ((keys + 1) % PAGE).to(tl.int64)",
        INTERPRETER, "page5",
    ),
    "the block table of another row": (
        KERNELS, "batch * table_row + keys // PAGE", "keys // PAGE",
        INTERPRETER, "page5",
    ),
    "tiles smaller than a page that they do not divide": (
        OPS, "return block if divides in (page, block) or divides < 16 else divides", "return block",
        INTERPRETER, "pages_and_tiles",
    ),
    "parts that are never combined": (
        OPS, "parts, most = forced, triton.next_power_of_2(forced)", "parts, most = forced, 1",
        INTERPRETER, "parts",
    ),
    "a kernel for every number of parts": (
        KERNELS, 'do_not_specialize=["parts"]', "do_not_specialize=[]",
        FAST, "anew",
    ),
    "a kernel for every width of a block table": (
        KERNELS, 'do_not_specialize=["table_row"]', "do_not_specialize=[]",
        FAST, "anew",
    ),
    "a kernel for every length of a cache": (
        OPS, "return min(most, triton.cdiv(n_keys, 4 * block)), triton.next_power_of_2(most)",
        "return min(most, triton.cdiv(n_keys, 4 * block)), triton.next_power_of_2(triton.cdiv(n_keys, 4 * block))",
        FAST, "anew",
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
