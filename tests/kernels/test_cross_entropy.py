"""The loss on the CPU, against float64 and against torch's own."""

import os

import pytest
import torch
import torch.nn.functional as F
from rounding import chosen_and_torch, no_worse
from torch.utils._python_dispatch import TorchDispatchMode

from onevocab.kernels import aot
from onevocab.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference, rows

backend = chosen_and_torch("cross_entropy")


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunk", [7, 512])
def test_linear_cross_entropy(z_loss, chunk):
    torch.manual_seed(0)
    targets, weights = torch.randint(0, 50, (40,)), torch.rand(40) * (torch.rand(40) > 0.5)
    assert 0 < (weights == 0).sum() < 40

    def loss(f, **kwargs):
        return lambda h, w: f(h, w, targets, weights.to(h.dtype), z_loss, **kwargs).loss * 3

    hidden, head = torch.randn(40, 16), torch.randn(50, 16)
    no_worse(loss(linear_cross_entropy, chunk=chunk), loss(linear_cross_entropy_reference), hidden, head)
    ours = linear_cross_entropy(hidden, head, targets, weights, z_loss, chunk)
    reference = linear_cross_entropy_reference(hidden, head, targets, weights, z_loss)
    torch.testing.assert_close(ours.nll, reference.nll)
    assert not ours.nll.requires_grad


def test_linear_cross_entropy_at_the_edges():
    hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    nothing = linear_cross_entropy(hidden, head, torch.tensor([9, 9, -1, 9]), torch.zeros(4))
    nothing.loss.backward()  # ids where the weight is zero are never looked at
    assert nothing.loss == 0 and (hidden.grad == 0).all() and (head.grad == 0).all()
    with pytest.raises(IndexError, match="do not fit 5 ids"):
        linear_cross_entropy(hidden, head, torch.tensor([0, 5, 0, 0]), torch.ones(4))
    sharp = linear_cross_entropy(hidden * 1e4, head, torch.arange(4), torch.ones(4))
    exact = linear_cross_entropy_reference((hidden * 1e4).double(), head.double(), torch.arange(4), torch.ones(4))
    torch.testing.assert_close(sharp.loss.double(), exact.loss, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, head, torch.arange(4), torch.ones(4)).loss.requires_grad


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_linear_cross_entropy_like_torchs_own(kind):
    """torch.nn.functional.linear_cross_entropy (torch 2.13) without weights and z-loss: same loss, same gradients."""
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    torch.manual_seed(0)
    hidden, head = torch.randn(70, 16).to(kind).requires_grad_(), torch.randn(90, 16).to(kind).requires_grad_()
    targets = torch.randint(0, 90, (70,))
    ours = linear_cross_entropy(hidden, head, targets, torch.ones(70), chunk=32).loss
    theirs = F.linear_cross_entropy(hidden, head, targets, reduction="sum")
    exact = F.cross_entropy(hidden.double() @ head.double().t(), targets, reduction="sum")
    assert (ours - exact).abs() <= 2 * (theirs - exact).abs() + 1e-6 * exact
    for a, b, c in zip(*(torch.autograd.grad(x, [hidden, head]) for x in (ours, theirs, exact)), strict=True):
        assert (a.double() - c.double()).abs().max() <= 2 * (b.double() - c.double()).abs().max() + 1e-6


def test_linear_cross_entropy_names_what_does_not_fit():
    hidden, head, targets, weights = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3).long(), torch.ones(3)
    for bad in ((hidden[:, :3], head, targets, weights), (hidden, head, targets[:2], weights),
                (hidden, head, targets, weights[:, None]), (hidden[:0], head, targets[:0], weights[:0])):  # fmt: skip
        with pytest.raises(ValueError, match="do not fit"):
            linear_cross_entropy(*bad)
    with pytest.raises(ValueError, match="targets are ids"):
        linear_cross_entropy(hidden, head, targets.float(), weights)
    with pytest.raises(ValueError, match="chunk 0"):
        linear_cross_entropy(hidden, head, targets, weights, chunk=0)


class Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operator gave out."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_linear_cross_entropy_never_holds_all_logits(kind):
    rows, vocabulary, dim = 1000, 600, 16
    hidden, head = (torch.randn(n, dim).to(kind).requires_grad_() for n in (rows, vocabulary))
    targets, weights = torch.randint(0, vocabulary, (rows,)), torch.ones(rows)
    with Largest() as ours:
        linear_cross_entropy(hidden, head, targets, weights, 1e-4).loss.backward()
    with Largest() as plain:
        linear_cross_entropy_reference(hidden, head, targets, weights, 1e-4).loss.backward()
    assert plain.elements == rows * vocabulary
    assert ours.elements == 128 * vocabulary


def test_linear_cross_entropy_refuses_a_second_backward():
    hidden, head = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    loss = linear_cross_entropy(hidden, head, torch.tensor([0, 4, 2]), torch.ones(3)).loss * 2
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_linear_cross_entropy_reference_is_what_gradcheck_says():
    torch.manual_seed(0)
    hidden, head = torch.randn(4, 3).double().requires_grad_(), torch.randn(6, 3).double().requires_grad_()
    targets, weights = torch.tensor([0, 5, 2, 2]), torch.tensor([1.0, 0.5, 0.0, 2.0]).double()

    def loss(*leaves):
        return linear_cross_entropy_reference(*leaves, targets, weights, 0.1).loss

    assert torch.autograd.gradcheck(loss, (hidden, head))
    ours = torch.autograd.grad(linear_cross_entropy(hidden, head, targets, weights, 0.1, chunk=3).loss, [hidden, head])
    torch.testing.assert_close(ours, torch.autograd.grad(loss(hidden, head), [hidden, head]))


def test_on_a_gpu_the_sum_of_products_is_never_rounded(monkeypatch):
    """16-bit factors go to the one operator that adds up in float32, in place; CPUs have none."""

    class OnAGPU(torch.Tensor):
        is_cuda = True

    a, b = (torch.randn(shape).bfloat16().as_subclass(OnAGPU) for shape in ((5, 300), (300, 4)))
    total, asked = torch.randn(5, 4), []
    expected = total.double() + a.double() @ b.double()

    def addmm(bias, *factors, out_dtype, out):
        asked.append((bias is total, out is total, out_dtype, *(x.dtype for x in factors)))
        return out.copy_(bias.double() + factors[0].double() @ factors[1].double())

    monkeypatch.setattr(torch, "addmm", addmm)
    rows.add_product_(total, a, b)
    torch.testing.assert_close(total.double(), expected.as_subclass(torch.Tensor), rtol=1e-6, atol=1e-6)
    assert asked == [(True, True, torch.float32, torch.bfloat16, torch.bfloat16)]


@pytest.mark.skipif(not aot.backend._HAS_TRITON or os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton")
def test_a_gpu_is_waited_for_once(monkeypatch):
    """The launcher on tensors without values: `tolist` once, and nothing else that would need one."""
    from onevocab.kernels.cross_entropy import ops_triton

    asked = []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: asked.append(self.shape) or [6000, 0, 99])
    hidden, head = (torch.empty(n, 32, dtype=torch.bfloat16, device="meta") for n in (10_000, 100))
    targets, weights = torch.empty(10_000, dtype=torch.long, device="meta"), torch.empty(10_000, device="meta")
    with aot.recording(90) as launched:
        out = ops_triton.linear_cross_entropy._init_fn(hidden, head, targets, weights, 1e-4, 4096, True, True)
    assert asked == [(3,)] and [x.shape for x in out] == [(), (10_000,), (10_000, 32), (100, 32)]
    assert [args[0].shape for _, args, _ in launched] == [(4096, 100), (1904, 100)]
