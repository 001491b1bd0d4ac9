"""The norms, the rotation and the gate on the CPU, against float64."""

import json

import pytest
import torch
from rounding import no_worse

from onevocab.kernels import aot, c_library
from onevocab.kernels.backend import forced
from onevocab.kernels.elementwise import (
    qk_norm_rope,
    qk_norm_rope_reference,
    rms_norm,
    rms_norm_reference,
    swiglu,
    swiglu_reference,
)

needs_c = pytest.mark.skipif(not c_library.library("elementwise"), reason="no C compiler")
CPU = [pytest.param("c", marks=needs_c), "torch"]


@pytest.mark.parametrize("backend", CPU)
def test_elementwise_kernels(backend):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 7, 4, 32), torch.rand(32) + 0.5
    angle = torch.rand(3, 7, 16) * 6

    def turned(f):
        return lambda x, w: f(x, w, angle.cos().to(x.dtype), angle.sin().to(x.dtype), 1e-6)

    with forced(backend):
        no_worse(lambda *a: rms_norm(*a, 1e-6), lambda *a: rms_norm_reference(*a, 1e-6), x, weight)
        no_worse(turned(qk_norm_rope), turned(qk_norm_rope_reference), x, weight)
        no_worse(swiglu, swiglu_reference, torch.randn(5, 64) * 4, torch.randn(5, 64))
        with torch.no_grad():
            torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))


@pytest.mark.parametrize("backend", [*CPU, "reference"])
def test_rms_norm_with_residual(backend):
    torch.manual_seed(0)
    leaves = [each.requires_grad_() for each in (torch.randn(3, 5, 8), torch.randn(3, 5, 8), torch.rand(8))]
    x, residual, weight = leaves
    normed, total = rms_norm(x, weight, 1e-6, residual, backend=backend)
    assert torch.equal(total, x + residual)
    exact = rms_norm_reference((x + residual).double(), weight.double(), 1e-6)
    torch.testing.assert_close(normed.double(), exact)
    ours = torch.autograd.grad((normed * 2 + total).sin().sum(), leaves)
    torch.testing.assert_close(ours, torch.autograd.grad((exact * 2 + x + residual).sin().sum(), leaves))


def test_elementwise_kernels_name_what_does_not_fit():
    x, weight = torch.ones(2, 3, 4, 8), torch.ones(8)
    angle = torch.ones(2, 3, 4)
    for call in (
        lambda: rms_norm(x, torch.ones(4), 1e-6),
        lambda: rms_norm(x, weight, 1e-6, x[:1]),
        lambda: qk_norm_rope(x, weight, angle[:, :2], angle[:, :2], 1e-6),
        lambda: qk_norm_rope(x[..., :7], torch.ones(7), angle, angle, 1e-6),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            call()
    with pytest.raises(ValueError, match="differ"):
        swiglu(x, x[:1])
    with pytest.raises(ValueError, match="not empty"):
        swiglu(x[:0], x[:0])
    with pytest.raises(ValueError, match="not empty"):
        rms_norm(x.long(), weight, 1e-6)


@pytest.mark.parametrize("backend", [*CPU, "reference"])
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm_under_autocast_is_rounded_once(residual, backend):
    """The norm comes out in bfloat16, the sum in float32; float64 and 16-bit inputs keep their type."""
    torch.manual_seed(0)
    leaves = [torch.randn(4, 7, 32, requires_grad=True), torch.rand(32, requires_grad=True)]
    more = (torch.randn(4, 7, 32, requires_grad=True),) if residual else ()
    towards = torch.randn(4, 7, 32).bfloat16()

    def gradients(function, kind, low):
        x, weight, *r = (each.to(kind) for each in (*leaves, *more))
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            out = function(x, weight, 1e-6, *r)
        normed, total = out if residual else (out, x * 0)
        return normed, total, torch.autograd.grad((normed * towards).sum() + total.sum(), [*leaves, *more])

    normed, total, grads = gradients(lambda *a: rms_norm(*a, backend=backend), torch.float32, True)
    with torch.autocast("cpu", torch.bfloat16):
        other = None if backend == "c" else backend  # C has neither
        assert rms_norm(leaves[0].double(), leaves[1].double(), 1e-6, backend=other).dtype == torch.float64
        assert rms_norm(leaves[0].half(), leaves[1].half(), 1e-6, backend=other).dtype == torch.float16
    exact, exact_total, exact_grads = gradients(rms_norm_reference, torch.float64, False)
    assert (normed.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert ((normed - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6).all()
    torch.testing.assert_close(total.double(), exact_total)
    for a, b in zip(grads, exact_grads, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)


def test_backward_passes_have_a_tile_on_its_way_and_do_not_spill():
    """The widest rows alone have no registers left. A tile that is on its way lies in shared memory."""
    tables = json.loads(aot.table_path("elementwise").read_text())
    for name, targets in [case for table in tables.values() for case in table.items()]:
        for row in targets["90"]:
            if "backward" in row["kernel"] and "norm" in name and "16384" not in name:
                assert row["constants"]["STAGES"] == 2 and not row["LDL"] and not row["STL"], name
                assert row["shared"] > row["constants"]["ROWS"] * row["constants"]["BLOCK"] * 2 * 2, name
