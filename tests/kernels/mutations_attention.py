"""Deliberate faults in attention and its mask: name -> (file, exact old text, new text, tests that must then fail).

Data for a test that copies `kernels/`, replaces the text, runs those tests and wants them to fail. The tests are a
pytest path and a -k expression; those of the interpreter run under it.
"""

KERNELS = "kernels/attention/kernels_triton.py"
OPS = "kernels/attention/ops_triton.py"
MASK = "kernels/attention/mask.py"
CPU = "kernels/attention/torch_form.py"
INTERPRETER = "tests/kernels/interpreter/test_attention_triton.py"
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
        KERNELS, "(keys[None, :] <= last[:, None])\n        scores", "(keys[None, :] < last[:, None])\n        scores",
        INTERPRETER, "without_a_mask",
    ),
    "mask's end exclusive in dQ": (
        KERNELS, "(keys[None, :] <= last[:, None])\n        p =", "(keys[None, :] < last[:, None])\n        p =",
        INTERPRETER, "without_a_mask",
    ),
    "mask's end exclusive in dK and dV": (
        KERNELS, "keys[:, None] <= last[None, :]", "keys[:, None] < last[None, :]",
        INTERPRETER, "without_a_mask",
    ),
    "second interval read as the first": (
        KERNELS, "tl.where(second, 2 * S, 0)", "tl.where(second, 0, 0)",
        INTERPRETER, "shared_prefix",
    ),
    "second interval's full blocks ignored": (
        KERNELS,
        "full_hi - full_lo + full_hi2 - full_lo2):\n        at = _walk(step, full_lo, full_hi, full_lo2)\n        acc",
        "full_hi - full_lo):\n        at = _walk(step, full_lo, full_hi, full_lo2)\n        acc",
        INTERPRETER, "block_edges",
    ),
    "overlapping intervals counted twice": (
        MASK, "touch = c <= b + 1", "touch = c <= b - 10**6",
        INTERPRETER, "windows",
    ),
    "missing scale in dQ": (
        KERNELS, "dq * scale, D", "dq, D",
        INTERPRETER, "packed_documents",
    ),
    "missing scale in dK": (
        KERNELS, "dk * scale, D", "dk, D",
        INTERPRETER, "packed_documents",
    ),
    "natural scale in base 2": (
        OPS, "plan, scale / math.log(2)", "plan, scale",
        INTERPRETER, "packed_documents",
    ),
    "wrong key head in the forward": (
        KERNELS, "kv_head = head // GROUPS\n    Q += batch * q_batch + head.to(tl.int64) * q_head\n    K += batch * "
        "k_batch + kv_head.to(tl.int64) * k_head\n    V += batch * v_batch + kv_head.to(tl.int64) * v_head\n    Out",
        "kv_head = head % (tl.num_programs(1) // GROUPS)\n    Q += batch * q_batch + head.to(tl.int64) * q_head\n"
        "    K += batch * k_batch + kv_head.to(tl.int64) * k_head\n    V += batch * v_batch + kv_head.to(tl.int64) * "
        "v_head\n    Out",
        INTERPRETER, "shared_prefix",
    ),
    "only the first query head of a group reaches dK and dV": (
        KERNELS, "head = (head0 + step // n)", "head = (head0 + step // n * 0)",
        INTERPRETER, "shared_prefix",
    ),
    "running maximum not faded": (
        KERNELS, "total = total * fade + tl.sum(p, 1)", "total = total + tl.sum(p, 1)",
        INTERPRETER, "without_a_mask",
    ),
    "delta forgotten": (
        KERNELS, "- delta[None, :])", "- 0 * delta[None, :])",
        INTERPRETER, "packed_documents",
    ),
    "an empty row divides by zero": (
        KERNELS, "acc / tl.where(empty, 1.0, total)[:, None]", "acc / total[:, None]",
        INTERPRETER, "empty_rows",
    ),
    "last query block taken for whole in dK and dV": (
        MASK, "if self.first.shape[1] % block_q:", "if False:",
        INTERPRETER, "without_a_mask",
    ),
    "last key of a head dim dropped": (
        KERNELS, "(rows < limit) & (columns < D), other", "(rows < limit) & (columns < D - 1), other",
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
    "CPU: neighbours with different prefixes taken together": (
        MASK, "and prefixes[-1][1] == keys:", "and True:",
        FAST, "shared_prefix",
    ),
}  # fmt: skip
