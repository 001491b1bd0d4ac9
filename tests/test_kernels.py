"""Kernels against their references, with tolerances from a float64 oracle."""

import pytest
import torch

from onevocab.kernels.attention import IntervalMask, attention, attention_reference
from onevocab.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from onevocab.kernels.elementwise import (
    qk_norm_rope,
    qk_norm_rope_reference,
    rms_norm,
    rms_norm_reference,
    swiglu,
    swiglu_reference,
)


def no_worse(function, reference, *inputs, seed=0):
    """Output and gradients of `function` in float32 are within twice the reference's own float32 rounding."""
    results = []
    for call, dtype in ((function, torch.float32), (reference, torch.float32), (reference, torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = call(*leaves)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        results.append([out.detach(), *torch.autograd.grad((out * weight.to(dtype)).sum(), leaves)])
    tiny = 1e-6 * max(exact.abs().max() for exact in results[2])  # where the reference happens to be exact
    for got, plain, exact in zip(*results, strict=True):
        assert torch.isfinite(got).all()
        assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max() + tiny
    return results[0]


def documents(rows, length, seed=0, padding=True):
    """Random runs of ids (rows, length); the last few positions of every other row are padding."""
    generator = torch.Generator().manual_seed(seed)
    document = (torch.rand(rows, length, generator=generator) < 0.08).cumsum(1)
    if padding:
        document[::2, length - length // 5 :] = -1
    return document


def qkv(batch, heads, kv_heads, queries, keys, dim):
    torch.manual_seed(1)
    return torch.randn(batch, heads, queries, dim), *(torch.randn(batch, kv_heads, keys, dim) for _ in range(2))


@pytest.mark.parametrize("heads,kv_heads,dim", [(4, 4, 32), (4, 2, 16), (4, 1, 64)])
@pytest.mark.parametrize("length", [1, 17, 63, 129])
def test_attention_of_packed_documents(heads, kv_heads, dim, length):
    mask = IntervalMask.causal(documents(3, length))
    out, *_ = no_worse(lambda *x: attention(*x, mask), lambda *x: attention_reference(*x, mask),
                       *qkv(3, heads, kv_heads, length, length, dim))
    padding = mask.document < 0
    assert (out.transpose(1, 2)[padding] == 0).all()


@pytest.mark.parametrize("queries", [1, 5, 40])
def test_attention_with_two_intervals_and_empty_rows(queries):
    torch.manual_seed(0)
    first, length = torch.randint(0, 40, (2, queries)).int(), torch.randint(-3, 10, (2, queries)).int()
    prefix = torch.zeros_like(first), torch.randint(-1, 4, (2, queries)).int()
    mask = IntervalMask(first, (first + length).clamp(max=39), *prefix)
    mask.last[0, 0] = mask.first[0, 0] - 1
    mask.prefix_last[0, 0] = -1
    out, *_ = no_worse(lambda *x: attention(*x, mask), lambda *x: attention_reference(*x, mask),
                       *qkv(2, 4, 2, queries, 40, 32))
    assert (out[0, :, 0] == 0).all()


def test_attention_without_a_mask_is_causal():
    no_worse(attention, attention_reference, *qkv(2, 4, 2, 33, 33, 16))


def test_attention_leaks_nothing_between_documents_or_from_the_future():
    mask = IntervalMask.causal(torch.tensor([[0] * 20 + [1] * 30]))
    q, k, v = qkv(1, 4, 2, 50, 50, 32)
    before = attention(q, k, v, mask)
    k[:, :, :20] = v[:, :, :20] = float("nan")
    k[:, :, 25:], v[:, :, 25:] = 1e3, -1e3
    after = attention(q, k, v, mask)
    assert torch.equal(before[:, :, 20:25], after[:, :, 20:25])
    assert not torch.equal(before[:, :, 25:], after[:, :, 25:])


def test_attention_names_shapes_that_do_not_fit():
    q, k, v = qkv(1, 4, 3, 8, 8, 16)
    with pytest.raises(ValueError, match="do not fit"):
        attention(q, k, v)
    with pytest.raises(ValueError, match="mask"):
        attention(*qkv(1, 4, 2, 8, 8, 16), IntervalMask.causal(torch.zeros(1, 9)))


def test_mask_of_documents():
    mask = IntervalMask.causal(torch.tensor([[0, 0, 1, 1, 1, -1]]))
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[:2, :2] = expected[2:5, 2:5] = True
    assert torch.equal(mask.dense(6)[0, 0], expected.tril())
    assert mask.dense(6) is mask.dense(6)
    assert mask.runs() == ([2, 3, 1], [False, False, True])


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


def test_elementwise_kernels():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 7, 4, 32), torch.rand(32) + 0.5
    angle = torch.rand(3, 7, 16) * 6
    no_worse(lambda *a: rms_norm(*a, 1e-6), lambda *a: rms_norm_reference(*a, 1e-6), x, weight)

    def turned(f):
        return lambda x, w: f(x, w, angle.cos().to(x.dtype), angle.sin().to(x.dtype), 1e-6)

    no_worse(turned(qk_norm_rope), turned(qk_norm_rope_reference), x, weight)
    no_worse(swiglu, swiglu_reference, torch.randn(5, 64) * 4, torch.randn(5, 64))
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
