"""RMSNorm, RMSNorm with rotary positions and SwiGLU in Triton's interpreter."""

import pytest
import torch
from oracle import TYPES, no_worse

from onevocab.kernels import elementwise, tuning
from onevocab.kernels.elementwise import ops_triton, qk_norm_rope, rms_norm, swiglu

EPS = 1e-5


@pytest.fixture(autouse=True)
def small_tiles():
    torch.manual_seed(0)
    rows = {"ROWS": 4}
    with tuning.forced(rms_norm=rows, rms_norm_backward=rows, qk_norm_rope=rows, qk_norm_rope_backward=rows,
                       swiglu={"BLOCK": 32}, swiglu_backward={"BLOCK": 32}):  # fmt: skip
        yield


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("rows,width", [(1, 2), (3, 17), (4, 64), (33, 16), (5, 129)])
def test_rms_norm(rows, width, kind):
    no_worse(lambda *a: rms_norm(*a, EPS, backend="triton"), lambda *a: elementwise.rms_norm_reference(*a, EPS),
             torch.randn(rows, width) * 3, torch.rand(width) + 0.5, kinds=kind)  # fmt: skip


@pytest.mark.parametrize("kinds", [[torch.float32] * 3, [torch.bfloat16] * 3,
                                   [torch.bfloat16, torch.float32, torch.float32]], ids=str)  # fmt: skip
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])
def test_rms_norm_with_residual(kinds, used):
    """The gradients of both outputs meet in x and in the residual; either may be missing."""
    out, total, d_x, d_residual, _ = no_worse(
        lambda x, r, w: rms_norm(x, w, EPS, r, backend="triton"),
        lambda x, r, w: elementwise.rms_norm_reference(x, w, EPS, r),
        torch.randn(2, 7, 33), torch.randn(2, 7, 33), torch.rand(33) + 0.5, kinds=kinds, check=used,
    )  # fmt: skip
    assert total.dtype == torch.promote_types(*kinds[:2])
    assert (d_x.dtype, d_residual.dtype) == tuple(kinds[:2])


@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm_under_autocast(residual):
    """Rounded once, at the end; sum and gradients as precise as the definition's with its result rounded."""
    kinds = [torch.bfloat16, torch.float32, torch.float32] if residual else [torch.float32] * 2
    inputs = [torch.randn(5, 33), torch.rand(33) + 0.5]
    inputs.insert(1, torch.randn(5, 33) * 3) if residual else None

    def ours(*given):
        x, *r, w = given
        with torch.autocast("cpu", torch.bfloat16):
            return rms_norm(x, w, EPS, *r, backend="triton")

    def definition(*given):
        x, *r, w = given
        out = elementwise.rms_norm_reference(x, w, EPS, *r)
        normed, *total = out if residual else (out,)
        return normed if x.dtype == torch.float64 else normed.bfloat16(), *total

    normed, *_ = no_worse(ours, definition, *inputs, kinds=kinds)
    assert normed.dtype == torch.bfloat16


def test_a_row_that_is_not_a_number_stays_alone():
    """Padding may hold anything: only the weight's gradient, a sum over rows, sees it, and not where it gets none."""
    x, weight = torch.randn(9, 20), torch.rand(20)
    expected = rms_norm(x, weight, EPS, backend="triton")
    x[4] = float("nan")
    got = rms_norm(x, weight, EPS, backend="triton")
    others = torch.arange(9) != 4
    assert torch.equal(got[others], expected[others])


def test_rms_norm_of_rows_that_are_zero_or_not_contiguous():
    x = torch.randn(6, 2, 20).transpose(0, 2)
    x[3] = 0
    assert not x.is_contiguous()
    no_worse(lambda *a: rms_norm(*a, EPS, backend="triton"), lambda *a: elementwise.rms_norm_reference(*a, EPS),
             x, torch.rand(12)[::2])  # fmt: skip


def rope_inputs(batch, length, heads, dim):
    angle = torch.rand(batch, length, dim // 2) * 6
    return torch.randn(batch, length, heads, dim) * 2, torch.rand(dim) + 0.5, angle.cos(), angle.sin()


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 3, 16), (1, 17, 2, 34), (2, 3, 1, 64)], ids=str)
def test_qk_norm_rope(shape, kind):
    x, weight, cos, sin = rope_inputs(*shape)

    def call(f, **more):
        return lambda x, w: f(x, w, cos.to(kind).to(x.dtype), sin.to(kind).to(x.dtype), EPS, **more)

    no_worse(call(qk_norm_rope, backend="triton"), call(elementwise.qk_norm_rope_reference), x, weight, kinds=kind)


def test_qk_norm_rope_of_autocast():
    """x in bfloat16, norm and angles in float32: the result is rounded once."""
    x, weight, cos, sin = rope_inputs(2, 9, 2, 16)
    x = x.bfloat16()
    exact = elementwise.qk_norm_rope_reference(x.double(), weight.double(), cos.double(), sin.double(), EPS)
    got = qk_norm_rope(x, weight, cos, sin, EPS, backend="triton")
    assert torch.equal(got, exact.bfloat16()) or ((got - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6).all()


def test_qk_norm_rope_of_a_slice_of_one_projection():
    x, weight, cos, sin = rope_inputs(2, 5, 4, 16)
    parts = x.clone(), x.transpose(1, 2).contiguous().transpose(1, 2)
    a, b = (qk_norm_rope(part[:, :, 1:3], weight, cos, sin, EPS, backend="triton") for part in parts)
    assert torch.equal(a, b)
    torch.testing.assert_close(a, elementwise.qk_norm_rope_reference(x, weight, cos, sin, EPS)[:, :, 1:3])


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 11), (4, 32), (2, 3, 65)], ids=str)
def test_swiglu(shape, kind):
    no_worse(lambda *a: swiglu(*a, backend="triton"), elementwise.swiglu_reference,
             torch.randn(shape) * 4, torch.randn(shape), kinds=kind)  # fmt: skip


def test_swiglu_of_halves_of_one_projection():
    both = torch.randn(5, 34)
    no_worse(lambda x: swiglu(*x.chunk(2, -1), backend="triton"),
             lambda x: elementwise.swiglu_reference(*x.chunk(2, -1)), both)  # fmt: skip


def operations():
    x, weight, cos, sin = rope_inputs(1, 5, 2, 8)
    flat, norm = x.flatten(1), torch.rand(80) + 0.5
    yield ops_triton.rms_norm, (flat, norm, EPS, torch.bfloat16)
    yield ops_triton.add_rms_norm, (flat, flat * 2, norm, EPS, torch.float32)
    yield ops_triton.qk_norm_rope, (x, weight, cos, sin, EPS)
    yield ops_triton.swiglu, (x, x * 2)


@pytest.mark.parametrize("which", range(4))
def test_registration(which):
    op, args = list(operations())[which]
    args = [a.clone().requires_grad_() if torch.is_tensor(a) and i < 3 else a for i, a in enumerate(args)]
    if which == 2:
        args[2] = args[2].detach()
    torch.library.opcheck(op, tuple(args))


def test_gradients_are_bitwise_the_same_again():
    x, weight = torch.randn(50, 40), torch.rand(40)

    def grads():
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        return torch.autograd.grad(rms_norm(*leaves, EPS, backend="triton").square().sum(), leaves)

    assert all(torch.equal(a, b) for a, b in zip(grads(), grads(), strict=True))


def test_one_graph_when_compiled():
    x, weight, cos, sin = rope_inputs(1, 5, 2, 8)
    leaves = [each.requires_grad_() for each in (x, weight, torch.rand(16) + 0.5)]

    def block(x, weight, norm):
        y = qk_norm_rope(x, weight, cos, sin, EPS, backend="triton").flatten(2)
        y, total = rms_norm(y, norm, EPS, y * 0.5, backend="triton")
        return swiglu(y, total, backend="triton").sum()

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    plain = torch.autograd.grad(block(*leaves), leaves)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), plain, strict=True):
        torch.testing.assert_close(a, b)


def test_what_the_kernels_do_not_take():
    with pytest.raises(ValueError, match="float64"):
        rms_norm(torch.ones(2, 4).double(), torch.ones(4).double(), EPS, backend="triton")
    with pytest.raises(ValueError, match="at most 32768"):
        rms_norm(torch.ones(1, 32769), torch.ones(32769), EPS, backend="triton")
    with pytest.raises(ValueError, match="do not fit"):
        rms_norm(torch.ones(2, 4), torch.ones(3), EPS, backend="triton")
