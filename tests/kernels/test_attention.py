"""Attention on the CPU and its mask, against float64."""

import pytest
import torch
from rounding import chosen_and_torch, no_worse

from onevocab.kernels.attention import IntervalMask, attention, attention_reference, torch_blocks

backend = chosen_and_torch("attention")


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


@pytest.mark.parametrize("heads,kv_heads", [(2, 2), (4, 1)])
@pytest.mark.parametrize("window,sinks,length", [(40, 3, 300), (1, 0, 256), (64, 0, 321)])
def test_windows_run_block_by_block_on_a_cpu(window, sinks, length, heads, kv_heads):
    """Rows with documents that end within a block, and with padding; nothing of S * T numbers is made."""
    mask = IntervalMask.windowed(documents(2, length), window, sinks)
    out, *_ = no_worse(lambda *x: attention(*x, mask), lambda *x: attention_reference(*x, mask),
                       *qkv(2, heads, kv_heads, length, length, 16))
    assert (out.transpose(1, 2)[mask.first > mask.last] == 0).all()
    fresh = IntervalMask.windowed(documents(2, length), window, sinks)
    attention(*qkv(2, heads, kv_heads, length, length, 16), fresh)
    assert not any(isinstance(key, int) for key in fresh._cache)  # where the dense mask would be kept
    torch_blocks.blocks_of(mask, length, torch.float32)
    assert mask._cache["blocks", length, torch.float32].pairs < 0.8 * 2 * length**2


def test_any_intervals_run_block_by_block_on_a_cpu(backend):
    """Keys longer than queries, intervals far apart, rows that see nothing; half precision is computed in float32."""
    generator = torch.Generator().manual_seed(0)
    first = torch.arange(256).expand(2, 256) + torch.randint(0, 30, (2, 256), generator=generator)
    mask = IntervalMask(first.int(), (first + 20).int(), torch.zeros_like(first).int(), torch.full_like(first, 5).int())
    nothing = torch.rand(2, 256, generator=generator) < 0.1
    mask.last[nothing], mask.prefix_last[nothing] = mask.first[nothing] - 1, -1
    x = qkv(2, 4, 2, 256, 700, 16)
    out, *_ = no_worse(lambda *x: attention(*x, mask), lambda *x: attention_reference(*x, mask), *x)
    assert (out.transpose(1, 2)[nothing] == 0).all()
    assert (("blocks", 700, torch.float32) in mask._cache) == (backend == "torch")
    half = [each.bfloat16() for each in x]
    assert torch.equal(attention(*half, mask), attention(*(each.float() for each in half), mask).bfloat16())


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


def picture_with_questions(questions=3, picture=20, own=5, batch=1):
    """document, prefix: a document alone, a picture, questions that see it; ids ascend."""
    lengths = torch.tensor([7, picture] + [own] * questions)
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths).expand(batch, -1)
    return document, torch.where(document >= 2, 1, -1)


def test_shared_prefix_says_who_sees_what():
    document = torch.tensor([[0, 0, 1, 1, 2, 2, 3, -1]])
    mask = IntervalMask.shared_prefix(document, torch.tensor([[-1, -1, 0, 0, 0, 0, 2, 0]]))
    seen = [row.nonzero().flatten().tolist() for row in mask.dense(8)[0, 0]]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5], [4, 5, 6], []]
    assert mask.prefixes() == [(slice(2, 6), slice(0, 2)), (slice(6, 7), slice(4, 6))]
    with pytest.raises(ValueError, match="position 2 of row 0 names prefix 9"):
        IntervalMask.shared_prefix(document, torch.tensor([[-1, -1, 9, 9, -1, -1, -1, -1]]))
    with pytest.raises(ValueError, match="differ"):
        IntervalMask.shared_prefix(document, document[:, 1:])


def test_windows_and_sinks_say_who_sees_what():
    mask = IntervalMask.windowed(torch.tensor([[0, 0, 0, 0, 1, 1, -1]]), 2, sinks=1)
    seen = [row.nonzero().flatten().tolist() for row in mask.dense(7)[0, 0]]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [4], [4, 5], []]
    with pytest.raises(ValueError, match="window 0"):
        IntervalMask.windowed(torch.zeros(1, 3), 0)


@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (4, 1)])
@pytest.mark.parametrize("order", ["together", "apart"])
def test_attention_with_a_shared_prefix_on_a_cpu(heads, kv_heads, order):
    document, prefix = (x.clone() for x in picture_with_questions(batch=2))
    if order == "apart":  # two pictures, questions of both in turn, padding
        document[0, -2:] = -1
        prefix[0, 32:37] = 0
        prefix[1, 27:] = torch.where(document[1, 27:] == 3, -1, 0)
    mask = IntervalMask.shared_prefix(document, prefix)
    assert len(mask.prefixes()) == (2 if order == "together" else 5)
    length = document.shape[1]
    no_worse(lambda *x: attention(*x, mask), lambda *x: attention_reference(*x, mask),
             *qkv(2, heads, kv_heads, length, length, 16))
    small = [x.double().requires_grad_() for x in qkv(2, 2, 1, length, length, 4)]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, mask), small, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *x: attention_reference(*x, mask), small, fast_mode=True)


def test_a_picture_with_questions_in_one_row_equals_a_row_for_each():
    document, prefix = picture_with_questions(questions=8)
    q, k, v = (x.double().requires_grad_() for x in qkv(1, 4, 2, document.shape[1], document.shape[1], 16))
    together = attention(q, k, v, IntervalMask.shared_prefix(document, prefix))
    weight = torch.randn_like(together)
    total = 0.0
    for question in range(2, 10):
        at = ((document == 1) | (document == question))[0].nonzero().flatten()
        alone = attention(*(x[:, :, at] for x in (q, k, v)))
        torch.testing.assert_close(alone[:, :, 20:], together[:, :, at[20:]])
        total = total + (alone[:, :, 20:] * weight[:, :, at[20:]]).sum()
    counts = (document >= 2)[0]
    got = torch.autograd.grad((together * weight)[:, :, counts].sum(), (q, k, v))
    for ours, theirs in zip(got, torch.autograd.grad(total, (q, k, v)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_half_precision_on_a_cpu():
    mask = IntervalMask.shared_prefix(*picture_with_questions())
    for dtype in (torch.bfloat16, torch.float16):
        x = [x.to(dtype) for x in qkv(1, 2, 1, 42, 42, 16)]
        exact = attention_reference(*(y.double() for y in x), mask)
        out = attention(*x, mask)
        assert out.dtype == dtype
        assert (out - exact).abs().max() <= 2 * (attention_reference(*x, mask) - exact).abs().max()


def test_plans_against_the_dense_mask():
    """Blocks that a plan skips hold nothing, blocks that it calls full are, in both directions."""
    generator = torch.Generator().manual_seed(0)

    def random(low, high, shape):
        return torch.randint(low, high, shape, generator=generator).int()

    for trial in range(30):
        queries, n_keys = (int(x) for x in random(1, 70, (2,)))
        first, second = random(-2, n_keys, (2, queries)), random(0, n_keys, (2, queries))
        last = first + random(-5, 40, (2, queries)), second + random(-5, 10, (2, queries))
        mask = IntervalMask(first, last[0], second, last[1]) if trial % 2 else IntervalMask(first, last[0])
        spans, keys = mask.intervals(n_keys), torch.arange(n_keys)
        ends = zip(spans[:, ::2].unbind(1), spans[:, 1::2].unbind(1), strict=True)
        parts = [(keys >= a[..., None]) & (keys <= b[..., None]) for a, b in ends]
        dense = mask.dense(n_keys)[:, 0]
        assert torch.equal(sum(part.int() for part in parts), dense.int())
        assert mask.pairs(n_keys) == int(dense.sum())
        plan, transposed = mask.plan(n_keys, 8, 16), mask.transposed_plan(n_keys, 8, 16)
        for c, part in enumerate(parts):
            for b, i, j in torch.cartesian_prod(*map(torch.arange, (2, plan.shape[1], transposed.shape[1]))).tolist():
                tile = part[b, i * 8 : i * 8 + 8, j * 16 : j * 16 + 16]
                lo, full_lo, full_hi, hi = plan[b, i, 4 * c : 4 * c + 4].tolist()
                assert lo <= full_lo <= full_hi <= hi and (lo <= j < hi or not tile.any())
                assert not full_lo <= j < full_hi or (tile.all() and tile.shape[1] == 16)
                lo, full_lo, full_hi, hi = transposed[b, j, 4 * c : 4 * c + 4].tolist()
                assert lo <= full_lo <= full_hi <= hi and (lo <= i < hi or not tile.any())
                assert not full_lo <= i < full_hi or (tile.all() and tile.shape == (8, 16))


def test_plans_visit_no_more_blocks_than_needed():
    document = torch.repeat_interleave(torch.arange(4), 64)[None]
    plan = IntervalMask.causal(document).plan(256, 16, 16)[0]
    assert plan.tolist()[5] == [4, 4, 5, 6]  # documents of 4 blocks: one full, one on the diagonal
    assert IntervalMask.causal(document).transposed_plan(256, 16, 16)[0].tolist()[5] == [5, 6, 8, 8]


def test_attention_names_what_does_not_fit():
    q, k, v = qkv(1, 4, 3, 8, 8, 16)
    with pytest.raises(ValueError, match="do not fit"):
        attention(q, k, v)
    good = qkv(1, 4, 2, 8, 8, 16)
    with pytest.raises(ValueError, match="mask"):
        attention(*good, IntervalMask.causal(torch.zeros(1, 9)))
    with pytest.raises(ValueError, match=r"not all \(B, heads, length, dim\)"):
        attention(*(x[0] for x in good))
    with pytest.raises(ValueError, match="empty"):
        attention(*(x[:, :, :0] for x in good))
    with pytest.raises(ValueError, match="not one floating-point type"):
        attention(good[0], good[1].half(), good[2])
    mask = IntervalMask.up_to(torch.arange(8)[None])
    mask.prefix_first = mask.first
    with pytest.raises(ValueError, match="both of its ends"):
        attention(*good, mask)
    with pytest.raises(ValueError, match="devices|one device"):
        attention(good[0], good[1].to("meta"), good[2])


def test_mask_of_documents():
    mask = IntervalMask.causal(torch.tensor([[0, 0, 1, 1, 1, -1]]))
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[:2, :2] = expected[2:5, 2:5] = True
    assert torch.equal(mask.dense(6)[0, 0], expected.tril())
    assert mask.dense(6) is mask.dense(6)
    assert mask.runs() == ([2, 3, 1], [False, False, True])


def test_a_document_that_sees_itself_in_full_counts_each_key_once():
    document = torch.tensor([[0] * 7 + [1] * 9 + [-1] * 2])
    mask = IntervalMask.shared_prefix(document, document)
    no_worse(lambda *x: attention(*x, mask), lambda *x: attention_reference(*x, mask), *qkv(1, 4, 2, 18, 18, 16))
