"""The kernels in C: types, shapes and threads, against float64; and a machine that cannot compile them."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import run_command
from poison import poisoned_memory

from onevocab.kernels import c_library
from onevocab.kernels.attention import IntervalMask, attention, attention_reference
from onevocab.kernels.elementwise import (
    qk_norm_rope,
    qk_norm_rope_reference,
    rms_norm,
    rms_norm_reference,
    swiglu,
    swiglu_reference,
)

needs_c = pytest.mark.skipif(not (c_library.library("attention") and c_library.library("elementwise")),
                             reason="no C compiler")


@pytest.fixture(autouse=True)
def nothing_unwritten():
    with poisoned_memory():
        yield


def compare(function, reference, *inputs):
    """In the inputs' types, against the reference in float64: an error of at most twice the reference's own."""
    results = []
    for call, kind in ((function, None), (reference, None), (reference, torch.float64)):
        leaves = [x.detach().to(kind or x.dtype).requires_grad_() for x in inputs]
        out = call(*leaves)
        towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, towards)])
    for got, plain, exact in zip(*results, strict=True):
        assert got.dtype == plain.dtype and got.shape == exact.shape
        step = torch.finfo(got.dtype).eps * exact.abs().max()
        assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max() + step


@needs_c
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 7, 32, 100, 1030])
def test_norms_and_gate_of_any_width(dim, kind):
    torch.manual_seed(0)
    x, weight = (torch.randn(5, 9, dim) * 3).to(kind), torch.rand(dim).to(kind) + 0.5
    compare(lambda *a: rms_norm(*a, 1e-6, backend="c"), lambda *a: rms_norm_reference(*a, 1e-6), x, weight)
    compare(lambda *a: swiglu(*a, backend="c"), swiglu_reference, x, torch.randn(5, 9, dim).to(kind))
    gate = x[..., :1] * x  # rounded once
    assert torch.equal(swiglu(gate, x, backend="c"), swiglu(gate.float(), x.float(), backend="c").to(kind))
    far = torch.tensor([-1e4, -100.0, -88.0, 0.0, 88.0, 1e4])
    torch.testing.assert_close(swiglu(far, torch.ones(6), backend="c"), far.sigmoid() * far)


@needs_c
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads,dim", [(1, 2), (3, 10), (4, 64)])
def test_heads_that_are_a_part_of_wider_rows(heads, dim, kind):
    """q as it lies in a joined product: a token's heads side by side, other numbers behind them."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 7, heads * dim + 12).to(kind), torch.rand(dim).to(kind) + 0.5
    angle = torch.rand(2, 7, dim // 2) * 6

    def heads_of(f, **options):
        return lambda x, w: f(x[..., : heads * dim].unflatten(-1, (heads, dim)), w, angle.cos().to(w.dtype),
                              angle.sin().to(w.dtype), 1e-6, **options)

    compare(heads_of(qk_norm_rope, backend="c"), heads_of(qk_norm_rope_reference), x, weight)


@needs_c
def test_mixed_types_of_a_residual():
    """Under autocast a layer gives bfloat16 and the sum is float32."""
    torch.manual_seed(0)
    x, residual, weight = torch.randn(6, 40).bfloat16(), torch.randn(6, 40), torch.rand(40)
    leaves = [each.requires_grad_() for each in (x, residual, weight)]
    normed, total = rms_norm(x, weight, 1e-6, residual, backend="c")
    assert torch.equal(total, x + residual) and normed.dtype == total.dtype == torch.float32
    ours = torch.autograd.grad((normed * 2 + total).sin().sum(), leaves, retain_graph=True)
    exact = (x.double() + residual.double(), weight.double())
    plain = rms_norm_reference(*exact, 1e-6)
    theirs = torch.autograd.grad((plain * 2 + exact[0]).sin().sum(), leaves)
    assert [each.dtype for each in ours] == [torch.bfloat16, torch.float32, torch.float32]
    for got, right, tolerance in zip(ours, theirs, (2**-8, 1e-5, 1e-5), strict=True):
        torch.testing.assert_close(got.float(), right.float(), rtol=tolerance, atol=tolerance)
    total.sum().backward()  # the norm itself is not used
    assert torch.equal(residual.grad, torch.ones_like(residual)) and weight.grad is None


@needs_c
@pytest.mark.parametrize("dim", [16, 48, 128])
def test_attention_in_layouts_of_all_kinds(dim):
    """Tensors as projections leave them, dense ones, and one whose last dimension is not dense; many blocks, two parts
    of a backward pass."""
    torch.manual_seed(0)
    mask = IntervalMask.causal((torch.rand(2, 700) < 0.01).cumsum(1))
    q, k, v = (torch.randn(2, 700, heads, dim).transpose(1, 2) for heads in (4, 2, 2))
    for tensors in ((q, k, v), (q.contiguous(), k.contiguous(), v), (q, k, v.mT.contiguous().mT)):
        compare(lambda *x: attention(*x, mask, backend="c"), lambda *x: attention_reference(*x, mask), *tensors)
    compare(lambda *x: attention(*x, mask, scale=-0.3, backend="c"),
            lambda *x: attention_reference(*x, mask, scale=-0.3), q, k, v)


@needs_c
def test_windows_longer_than_the_keys_taken_at_a_time():
    mask = IntervalMask.windowed(torch.zeros(1, 300), 100, sinks=3)
    q, k, v = (torch.randn(1, 2, 300, 16) for _ in range(3))
    compare(lambda *x: attention(*x, mask, backend="c"), lambda *x: attention_reference(*x, mask), q, k, v)


@needs_c
def test_nan_is_not_hidden():
    """What a query sees is not a number: the result is none either, of this query alone."""
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    k[:, :, 30, 3] = float("nan")
    out = attention(q, k, v, IntervalMask.causal(torch.zeros(1, 40)), backend="c")
    assert out[:, :, 30:].isnan().all() and out[:, :, :16].isfinite().all()
    assert rms_norm(k, torch.ones(16), 1e-6, backend="c")[:, :, 30].isnan().all()
    assert swiglu(k, v, backend="c").isnan().sum() == 2


SCRIPT = """
import torch
from onevocab.kernels.attention import IntervalMask, attention
from onevocab.kernels.elementwise import qk_norm_rope, rms_norm, swiglu
torch.manual_seed(0)
mask = IntervalMask.causal((torch.rand(3, 600) < 0.01).cumsum(1))
x = torch.randn(3, 600, 8, 32, requires_grad=True)
weight, angle = torch.rand(32, requires_grad=True), torch.rand(3, 600, 16)
y = qk_norm_rope(x, weight, angle.cos(), angle.sin(), 1e-6)
q, k, v = y[:, :, :4].transpose(1, 2), y[:, :, 4:6].transpose(1, 2), y[:, :, 6:].transpose(1, 2)
out = attention(q, k, v, mask)
out = rms_norm(swiglu(out, out * 2), weight, 1e-6)
out.sin().sum().backward()
torch.save((out.detach(), x.grad, weight.grad), "PATH")
import onevocab.kernels.backend as b
print(sorted({c.backend for c in b.chosen().values()}))
print(sum("libgomp" in line or "libiomp" in line for line in {l.split()[-1] for l in open("/proc/self/maps")}))
"""


@needs_c
def test_results_do_not_depend_on_the_threads_which_are_torchs(tmp_path):
    results = []
    for threads in (1, 3):
        path = tmp_path / f"{threads}.pt"
        out = run_command([sys.executable, "-c", SCRIPT.replace("PATH", str(path))],
                          env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        assert out.split("\n")[0] == "['c']"
        assert out.split("\n")[1] == "1"  # one OpenMP runtime, that of torch
        results.append(torch.load(path))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_machine_that_cannot_compile_runs_on_torch_and_says_why(tmp_path):
    """No compiler, one that fails, a cache folder that others can write to."""
    fails = tmp_path / "fails"
    fails.write_text("#!/bin/sh\necho 'error: this compiler knows no C' >&2\nexit 1\n")
    fails.chmod(0o755)
    shared = tmp_path / "shared"
    (shared / "onevocab").mkdir(parents=True)
    (shared / "onevocab").chmod(0o777)
    code = """
import torch
from onevocab.kernels.attention import IntervalMask, attention
from onevocab.kernels.backend import chosen
x = torch.randn(1, 2, 8, 16)
attention(x, x, x, IntervalMask.causal(torch.zeros(1, 8)))
print(*chosen()["attention"], sep=": ")
"""
    empty = tmp_path / "empty"
    empty.mkdir()
    for settings, reason in (
        ({"PATH": str(empty)}, "no C compiler (cc, gcc, clang, or what CC names)"),
        ({"CC": str(fails)}, "failed: error: this compiler knows no C"),
    ):
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")} | settings
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.stdout.startswith("torch: tensors on cpu; no C kernels: ") and reason in done.stdout, done
    with pytest.raises(OSError, match="not a folder that only its owner can write to"):
        c_library._private(shared / "onevocab")
