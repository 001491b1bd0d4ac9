"""Deliberate faults in the norms, the rotation and the gate, as in `mutations_attention.py`."""

KERNELS = "kernels/elementwise/kernels_triton.py"
OPS = "kernels/elementwise/ops_triton.py"
CPU = "kernels/elementwise/torch_form.py"
PUBLIC = "kernels/elementwise/__init__.py"
C = "kernels/elementwise/kernels.c"
IN_C = "tests/kernels/test_c.py"
INTERPRETER, FAST = "tests/kernels/interpreter/test_elementwise_triton.py", "tests/kernels/test_elementwise.py"

MUTATIONS = {
    "the backward pass of RMSNorm without the mean": (
        KERNELS, "d_x = rstd * (grad - x * (tl.sum(grad * x, 1) / width)[:, None])", "d_x = rstd * grad",
        INTERPRETER, "",
    ),
    "the gradient that reached the sum itself is lost": (
        KERNELS, "d_x += tl.load(grad_total_ptr", "d_x += 0.0 * tl.load(grad_total_ptr",
        INTERPRETER, "",
    ),
    "the residual is not added before the norm": (
        KERNELS, "x = total.to(tl.float32)", "x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)",
        INTERPRETER, "",
    ),
    "the mean is over the padded width": (
        KERNELS,
        "rstd = tl.rsqrt(tl.sum(x * x, 1) / width + eps)\n",
        "rstd = tl.rsqrt(tl.sum(x * x, 1) / BLOCK + eps)\n",
        INTERPRETER, "",
    ),
    "d weight keeps only the last tile of a slab": (
        KERNELS, "d_weight += tl.sum(grad * x, 0)", "d_weight = tl.sum(grad * x, 0)",
        INTERPRETER, "",
    ),
    "rows between the programs' slabs": (
        OPS, "return triton.cdiv(n_rows, slab), slab", "return triton.cdiv(n_rows, slab), slab - rows",
        INTERPRETER, "",
    ),
    "the backward pass turns the same way as the forward pass": (
        KERNELS, "grad_a = turned_a * cos + turned_b * sin", "grad_a = turned_a * cos - turned_b * sin",
        INTERPRETER, "",
    ),
    "the angle of another token": (
        KERNELS,
        "    angle_at = (rows // heads)[:, None] * HALF + columns[None, :]\n    a = ",
        "    angle_at = (rows % heads)[:, None] * HALF + columns[None, :]\n    a = ",
        INTERPRETER, "",
    ),
    "the second half's weight is the first half's": (
        KERNELS, "weight_b = tl.load(weight_ptr + HALF + columns", "weight_b = tl.load(weight_ptr + columns",
        INTERPRETER, "",
    ),
    "silu's derivative without its second term": (
        KERNELS, "sigmoid * (1.0 + gate * (1.0 - sigmoid))", "sigmoid",
        INTERPRETER, "",
    ),
    "CPU: RMSNorm's backward pass without the mean": (
        CPU, "value=1 / d)", "value=0)",
        FAST, "",
    ),
    "CPU: the sum given out is without the residual": (
        PUBLIC, "return normed if residual is None else (normed, total)",
        "return normed if residual is None else (normed, x)",
        FAST, "",
    ),
    "under autocast the norm stays float32": (
        PUBLIC, "kind = autocast_type(x.device) or kind", "pass",
        FAST, "autocast",
    ),
    "under autocast the norm is of rounded numbers": (
        CPU, "return F.rms_norm(x, weight.shape, weight, eps).to(kind)\n\n    @staticmethod",
        "return F.rms_norm(x.to(kind).float(), weight.shape, weight, eps).to(kind)\n\n    @staticmethod",
        FAST, "autocast",
    ),
    "C: RMSNorm's backward pass without the mean": (
        C, "scaled[i] = factor * (scaled[i] - row[i] * mean);", "scaled[i] = factor * scaled[i];",
        FAST, "elementwise_kernels",
    ),
    "C: the gradient that reached the sum itself is lost": (
        C, "scaled[i] += more[i];", ";",
        FAST, "residual",
    ),
    "C: the last slab of a weight's gradient is lost": (
        C, "add_slabs(sums, slabs, dim, d_weight);\n  free(sums);\n  return failed;\n}\n\n// x (tokens",
        "add_slabs(sums, slabs - 1, dim, d_weight);\n  free(sums);\n  return failed;\n}\n\n// x (tokens",
        FAST, "elementwise_kernels",
    ),
    "C: the backward pass turns the same way as the forward pass": (
        C, "back[i] = a * c[i] + b * s[i];", "back[i] = a * c[i] - b * s[i];",
        FAST, "elementwise_kernels",
    ),
    "C: heads of a wider row as if it were dense": (
        C, "read_row(x, wide, t * stride + h * dim, dim, scratch);",
        "read_row(x, wide, (t * heads + h) * dim, dim, scratch);",
        IN_C, "wider_rows",
    ),
    "C: the numbers behind the last whole vector are not gated": (
        C, "for (; i < n; i++) out[i] = gate[i] *", "for (; i < n; i++) out[i] = 0 *",
        IN_C, "any_width",
    ),
    "C: silu's derivative without its second term": (
        C, "* (1.0f + x * (1.0f - s))", "",
        FAST, "elementwise_kernels",
    ),
    "C: bfloat16 is cut off, not rounded": (
        "kernels/vector.h", "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16", "bits >> 16",
        IN_C, "any_width",
    ),
    "C: e^x beyond the largest float32 is not held back": (
        "kernels/vector.h", "choose(x > high, high, x)", "x",
        IN_C, "any_width",
    ),
}  # fmt: skip
