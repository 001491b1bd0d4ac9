"""decode_attention, vq_assign, the residual norm and the loss on the CPU, against float64 and against their peers."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from onevocab.kernels.attention import IntervalMask, attention
from onevocab.kernels.backend import chosen
from onevocab.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from onevocab.kernels.decode import decode_attention, decode_attention_reference
from onevocab.kernels.elementwise import qk_norm_rope, rms_norm, rms_norm_reference, swiglu
from onevocab.kernels.vq import vq_assign, vq_assign_reference


def cache(batch=4, heads=4, kv_heads=2, queries=1, keys=21, dim=16):
    torch.manual_seed(0)
    return torch.randn(batch, heads, queries, dim), *(torch.randn(batch, kv_heads, keys, dim) for _ in range(2))


def paged(k, v, page):
    """The same cache in pages in reverse order."""
    batch, heads, keys, dim = k.shape
    per_row = -(-keys // page)
    table = torch.arange(batch * per_row, dtype=torch.int32).flip(0).reshape(batch, per_row)
    padded = (F.pad(x, (0, 0, 0, per_row * page - keys)) for x in (k, v))
    pages = [x.unflatten(2, (per_row, page)).transpose(1, 2).flatten(0, 1).flip(0) for x in padded]
    return *pages, table


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("page", [None, 4, 64])
@pytest.mark.parametrize("queries", [1, 3])
def test_decode_attention(queries, page, backend):
    q, k, v = cache(queries=queries)
    lengths = torch.tensor([0, 1, 13, 21])
    exact = decode_attention_reference(q.double(), k.double(), v.double(), lengths)
    for b, length in enumerate(lengths):  # what is behind a length is never used
        k[b, :, length:] = v[b, :, length:] = float("nan")
    stored = paged(k, v, page) if page else (k, v)
    out = decode_attention(q, *stored[:2], lengths, *stored[2:], backend=backend)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)
    assert (out[0] == 0).all() and chosen()["decode_attention"].backend == backend


def test_decode_attention_is_attention_up_to_oneself():
    q, k, v = cache(queries=2)
    lengths = torch.tensor([2, 5, 13, 21])
    positions = lengths[:, None] + torch.tensor([-2, -1])
    torch.testing.assert_close(decode_attention(q, k, v, lengths), attention(q, k, v, IntervalMask.up_to(positions)))


def test_decode_attention_takes_scale_half_precision_and_strides():
    q, k, v = cache()
    lengths = torch.tensor([4, 5, 13, 21])
    k_strided = k.transpose(1, 2).contiguous().transpose(1, 2)
    exact = decode_attention_reference(q.double(), k.double(), v.double(), lengths, scale=0.7)
    out = decode_attention(q, k_strided, v, lengths, scale=0.7)
    torch.testing.assert_close(out.double(), exact, atol=1e-6, rtol=1e-5)
    half = decode_attention(*(x.bfloat16() for x in (q, k, v)), lengths, scale=0.7)
    assert half.dtype == torch.bfloat16 and (half - exact).abs().max() < 0.05


def test_decode_attention_names_what_does_not_fit():
    q, k, v = cache()
    lengths = torch.tensor([1, 2, 3, 4])
    *pages, table = paged(k, v, 4)
    for bad, match in [
        ((q, k, v[:, :, :3], lengths), "do not fit"),
        ((q, k[:2], v[:2], lengths), "do not fit"),
        ((q[:, :3], k, v, lengths), "do not fit"),
        ((q, k, v, lengths[:2]), "do not fit"),
        ((q[:0], k[:0], v[:0], lengths[:0]), "do not fit"),
        ((q, *pages, lengths, table[:2]), "do not fit"),
        ((q.double(), k, v, lengths), "one floating-point type"),
        ((q, k, v, lengths.float()), "takes int32 or int64"),
        ((q, k, v, lengths + 18), "19 .. 22 do not fit"),
        ((q, k, v, lengths - 2), "lengths -1 .. 2"),
        ((q, *pages, lengths, table + 5), "page outside 0 .. 23"),
    ]:
        with pytest.raises(ValueError, match=match):
            decode_attention(*bad)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("n,codes,dim", [(1, 1, 1), (300, 77, 5), (5000, 1024, 16)])
def test_vq_assign(n, codes, dim, backend):
    torch.manual_seed(0)
    latents, codebook = torch.randn(n, dim), torch.randn(codes, dim)
    got = vq_assign(latents, codebook, backend=backend)
    exact = torch.cdist(latents.double(), codebook.double()).argmin(-1)
    assert got.dtype == torch.int64 and got.shape == (n,)
    assert (got == exact).float().mean() >= 0.999
    assert torch.equal(vq_assign(latents.bfloat16(), codebook)[:5], vq_assign(latents.bfloat16().float(), codebook)[:5])


def test_vq_assign_of_equal_codes_and_unit_vectors():
    codebook = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    codebook[[7, 31]] = codebook[[3, 3]]
    assert vq_assign(codebook, codebook)[[3, 7, 31]].tolist() == [3, 3, 3]
    assert vq_assign_reference(codebook, codebook)[[3, 7, 31]].tolist() == [3, 3, 3]
    latents, unit = F.normalize(torch.randn(50, 8), dim=-1), F.normalize(codebook[:20], dim=-1)
    unit[7] = -unit[7]
    assert torch.equal(vq_assign(latents, unit), (latents @ unit.t()).argmax(-1))
    plain = vq_assign(latents, unit)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # near ties must not depend on the precision of training
        assert torch.equal(vq_assign(latents, unit), plain)


def test_vq_assign_names_what_does_not_fit():
    for latents, codebook in [((3, 4), (5, 3)), ((3, 4, 1), (5, 4)), ((0, 4), (5, 4)), ((3, 4), (0, 4))]:
        with pytest.raises(ValueError, match="do not fit"):
            vq_assign(torch.ones(latents), torch.ones(codebook))
    with pytest.raises(ValueError, match="floating-point"):
        vq_assign(torch.ones(3, 4, dtype=torch.int64), torch.ones(5, 4))


@pytest.mark.parametrize("backend", ["torch", "reference"])
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
