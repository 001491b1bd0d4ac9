"""Deliberate faults in attention and its mask: name -> (file, exact old text, new text, tests that must then fail).

Data for a test that copies `kernels/`, replaces the text, runs those tests and wants them to fail. The tests are a
pytest path and a -k expression; those of the interpreter run under it.
"""

FORWARD = "kernels/attention/forward_triton.py"
BACKWARD = "kernels/attention/backward_triton.py"
TILES = "kernels/attention/tiles_triton.py"
OPS = "kernels/attention/ops_triton.py"
MASK = "kernels/attention/mask.py"
CPU = "kernels/attention/torch_form.py"
BLOCKS = "kernels/attention/torch_blocks.py"
INTERPRETER = "tests/kernels/interpreter/test_attention_triton.py"
C = "kernels/attention/kernels.c"
IN_C = "tests/kernels/test_c.py"
FAST = "tests/kernels/test_attention.py"

MUTATIONS = {
    "last key of a full block counted before it is visible": (
        MASK, "(last_low + 1) // block_k", "(last_low + 2) // block_k",
        INTERPRETER, "block_edges",
    ),
    "first full block begins one key early": (
        MASK, "(first_high + block_k - 1) // block_k", "(first_high + block_k - 2) // block_k",
        INTERPRETER, "block_edges",
    ),
    "last block of an interval skipped": (
        MASK, "last_high // block_k + 1", "(last_high + block_k - 1) // block_k",
        INTERPRETER, "without_a_mask",
    ),
    "mask's end exclusive in the forward": (
        FORWARD, "(keys[None, :] <= last[:, None])\n        scores", "(keys[None, :] < last[:, None])\n        scores",
        INTERPRETER, "without_a_mask",
    ),
    "mask's end exclusive in dQ": (
        BACKWARD, "(keys[None, :] <= last[:, None])\n        d_scores",
        "(keys[None, :] < last[:, None])\n        d_scores",
        INTERPRETER, "without_a_mask",
    ),
    "mask's end exclusive in dK and dV": (
        BACKWARD, "keys[:, None] <= last[None, :]", "keys[:, None] < last[None, :]",
        INTERPRETER, "without_a_mask",
    ),
    "second interval read as the first": (
        TILES, "tl.where(second, 2 * S, 0)", "tl.where(second, 0, 0)",
        INTERPRETER, "shared_prefix",
    ),
    "second interval's full blocks ignored": (
        FORWARD, "n_full = full_hi - full_lo + full_hi2 - full_lo2", "n_full = full_hi - full_lo",
        INTERPRETER, "block_edges",
    ),
    "overlapping intervals counted twice": (
        MASK, "touch = c <= b + 1", "touch = c <= b - 10**6",
        INTERPRETER, "windows",
    ),
    "missing scale in dQ": (
        BACKWARD, "dq * scale, D", "dq, D",
        INTERPRETER, "packed_documents",
    ),
    "missing scale in dK": (
        BACKWARD, "dk * scale, D", "dk, D",
        INTERPRETER, "packed_documents",
    ),
    "natural scale in base 2": (
        OPS, "plan, scale / math.log(2)", "plan, scale",
        INTERPRETER, "packed_documents",
    ),
    "wrong key head in the forward": (
        FORWARD, "kv_head = head // GROUPS", "kv_head = head % (tl.num_programs(1) // GROUPS)",
        INTERPRETER, "shared_prefix",
    ),
    "only the first query head of a group reaches dK and dV": (
        BACKWARD, "head0 + step // each, at, second", "head0, at, second",
        INTERPRETER, "shared_prefix",
    ),
    "descriptors: always the first head": (
        TILES, "X.load([batch, head, start, 0])", "X.load([batch, head * 0, start, 0])",
        INTERPRETER, "descriptors",
    ),
    "descriptors: tiles of keys as long as those of queries": (
        OPS, 'descriptor(x, config["block_k"])', 'descriptor(x, config["block_q"])',
        INTERPRETER, "descriptors",
    ),
    "descriptors: strides are not looked at": (
        "kernels/attention/descriptors_triton.py", "step <= 0 or step * x.element_size() % 16", "step <= 0",
        INTERPRETER, "descriptor",
    ),
    "ahead: the first block at an edge twice": (
        FORWARD, "after, _ = walk_edges(step + 1,", "after, _ = walk_edges(step,",
        INTERPRETER, "descriptors",
    ),
    "ahead: the first block is one at an edge": (
        FORWARD, "tl.where(n_full > 0, walk(0", "tl.where(n_full > 1, walk(0",
        INTERPRETER, "descriptors",
    ),
    "fused: dQ without the scale": (
        OPS, "like(q).copy_(each.mul_(scale))", "like(q).copy_(each)",
        INTERPRETER, "fused",
    ),
    "fused: dQ of the last block of keys alone": (
        BACKWARD, "DQ.load([batch, head, start, 0]) + tile", "tile",
        INTERPRETER, "fused",
    ),
    "short documents take large blocks": (
        OPS, "mask.mean_keys <= SHORT", "mask.mean_keys > SHORT",
        INTERPRETER, "blocks_follow",
    ),
    "running maximum not faded": (
        FORWARD, "total = total * fade + tl.sum(p, 1)", "total = total + tl.sum(p, 1)",
        INTERPRETER, "without_a_mask",
    ),
    "delta forgotten": (
        BACKWARD, "- delta[None, :])", "- 0 * delta[None, :])",
        INTERPRETER, "packed_documents",
    ),
    "an empty row divides by zero": (
        FORWARD, "acc / tl.where(empty, 1.0, total)[:, None]", "acc / total[:, None]",
        INTERPRETER, "empty_rows",
    ),
    "last query block taken for whole in dK and dV": (
        MASK, "if self.first.shape[1] % block_q:", "if False:",
        INTERPRETER, "without_a_mask",
    ),
    "last key of a head dim dropped": (
        TILES, "(rows < limit) & (columns < D), other", "(rows < limit) & (columns < D - 1), other",
        INTERPRETER, "other_head_dims",
    ),
    "CPU: the prefix's share of the softmax swapped": (
        CPU, "torch.sigmoid(shared_lse - own_lse)", "torch.sigmoid(own_lse - shared_lse)",
        FAST, "shared_prefix",
    ),
    "CPU: log-sum-exp of the own part alone in the backward": (
        CPU, "lse[:, :, queries] = torch.logaddexp(own_lse, shared_lse)", "pass",
        FAST, "shared_prefix",
    ),
    "CPU: the last key of an interval is not gathered": (
        BLOCKS, "(last + 1).flatten(1), -seen", "last.flatten(1), -seen",
        FAST, "block_by_block",
    ),
    "CPU: gradients of a key that two blocks read are not added up": (
        BLOCKS, "total.index_add_(0,", "total.index_copy_(0,",
        FAST, "block_by_block",
    ),
    "CPU: keys of another row of the batch": (
        BLOCKS, "numbers, 0) + row", "numbers, 0) + 0 * row",
        FAST, "block_by_block",
    ),
    "CPU: neighbours with different prefixes taken together": (
        MASK, "and prefixes[-1][1] == keys:", "and True:",
        FAST, "shared_prefix",
    ),
    "C: a lane's last key is hidden from it": (
        C, "(seen->last[c] >= (int32_t)(key + j))", "(seen->last[c] > (int32_t)(key + j))",
        FAST, "packed_documents",
    ),
    "C: blocks go over the beginning of a document": (
        C, "open->count < NQ && shares", "open->count < NQ",
        FAST, "leaks",
    ),
    "C: a chunk that most lanes see in full counts as full": (
        C, "if (first > s.full_low) s.full_low = first;", "",
        IN_C, "windows",
    ),
    "C: what was added up before a new maximum is not faded": (
        C, "ot[d * NV + c] *= fade[c];", ";",
        IN_C, "windows",
    ),
    "C: the second interval is the first again": (
        C, "Seen seen = seen_by(z, block, part);\n    for (long key = seen.low; key < seen.high; key += chunk) {\n"
        "      long n = seen.high - key < chunk ? seen.high - key : chunk;\n      products",
        "Seen seen = seen_by(z, block, 0);\n    for (long key = seen.low; key < seen.high; key += chunk) {\n"
        "      long n = seen.high - key < chunk ? seen.high - key : chunk;\n      products",
        FAST, "two_intervals",
    ),
    "C: the wrong key head": (
        C, "kv = h / z->groups, chunk = dim > 64 ? CHUNK / 2 : CHUNK;\n  vf *qt = scratch, *ot",
        "kv = h % (z->heads / z->groups), chunk = dim > 64 ? CHUNK / 2 : CHUNK;\n  vf *qt = scratch, *ot",
        FAST, "packed_documents",
    ),
    "C: missing scale in dQ": (
        C, "scale[c] = fill(z->scale)", "scale[c] = fill(1.0f)",
        FAST, "packed_documents",
    ),
    "C: delta forgotten": (
        C, "(ds[j * NV + c] - delta[c])", "ds[j * NV + c]",
        FAST, "packed_documents",
    ),
    "C: the last keys of an odd number are not added up": (
        C, "if (n & 1) add_tile", "if (0) add_tile",
        FAST, "packed_documents",
    ),
    "C: a part of the backward pass skips its last block": (
        C, "many * (part + 1) / parts", "many * (part + 1) / parts - 1",
        FAST, "packed_documents",
    ),
}  # fmt: skip
