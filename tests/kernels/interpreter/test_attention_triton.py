"""Triton attention, forward and backward, against the same formula in float64."""

import pytest
import torch

from onevocab.kernels import tuning
from onevocab.kernels.attention import DETERMINISTIC, IntervalMask, attention, attention_reference
from onevocab.kernels.attention.configs import TABLE
from onevocab.kernels.backend import chosen

KERNELS = ("attention_forward", "attention_dq", "attention_dkdv")


def some_slow(fast: list, slow: list) -> list:
    """Parameters, of which the slow ones, seconds each under the interpreter, are left to the slow tests."""
    marked = [pytest.param(*each if isinstance(each, tuple) else (each,), marks=pytest.mark.slow) for each in slow]
    return [*fast, *marked]


LENGTHS = some_slow([1, 17, 65], [63, 129])


@pytest.fixture(autouse=True)
def small_blocks():
    """16 queries by 32 keys, and the other way round for dK and dV: short rows still have many blocks."""
    with tuning.forced(
        attention_forward={"block_q": 16, "block_k": 32},
        attention_dq={"block_q": 32, "block_k": 16},
        attention_dkdv={"block_q": 16, "block_k": 32},
    ):
        yield


def blocks(block_q, block_k):
    return tuning.forced(**{name: {"block_q": block_q, "block_k": block_k} for name in KERNELS})


def qkv(heads, kv_heads, queries, keys, dim, batch=2, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def documents(length, batch=2, seed=0):
    """Runs of ids (batch, length); the end of the first row is padding."""
    generator = torch.Generator().manual_seed(seed)
    document = (torch.rand(batch, length, generator=generator) < 0.08).cumsum(1)
    document[0, length - length // 5 :] = -1
    return document


def triton(*x, **kwargs):
    return attention(*x, backend="triton", **kwargs)


def results(function, leaves):
    """Output, dq, dk, dv for a fixed random gradient of the output."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(leaves[0].dtype).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check(leaves, mask, scale=None, rounding=0.0):
    """Out, dq, dk, dv are off by at most twice what the plain formula in the same precision is off, and by `rounding`
    of the largest."""
    ours = results(lambda *x: triton(*x, mask, scale), leaves)
    plain = results(lambda *x: attention_reference(*x, mask, scale), leaves)
    doubles = [x.double() for x in leaves]
    exact = results(lambda *x: attention_reference(*x, mask, scale), doubles)
    tiny = 1e-6 * max(x.abs().max() for x in exact)
    for name, got, near, want in zip(("out", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        assert got.dtype == leaves[0].dtype and got.isfinite().all(), name
        error, allowed = (got - want).abs().max(), 2 * (near - want).abs().max() + tiny + rounding * want.abs().max()
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"
    return ours


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("heads,kv_heads,dim", [(2, 2, 16), (2, 1, 32), (4, 1, 64)])
def test_packed_documents(length, heads, kv_heads, dim):
    mask = IntervalMask.causal(documents(length))
    out, dq, *_ = check(qkv(heads, kv_heads, length, length, dim), mask)
    padding = mask.document < 0
    assert (out.transpose(1, 2)[padding] == 0).all() and (dq.transpose(1, 2)[padding] == 0).all()


@pytest.mark.parametrize("length", LENGTHS)
def test_without_a_mask_it_is_causal(length):
    check(qkv(2, 1, length, length, 16), None)


@pytest.mark.parametrize("dtype", some_slow([torch.bfloat16], [torch.float16]))
@pytest.mark.parametrize("heads,kv_heads,dim", [(2, 2, 64), (4, 1, 32)])
def test_half_precision(dtype, heads, kv_heads, dim):
    check(qkv(heads, kv_heads, 65, 65, dim, dtype=dtype), IntervalMask.causal(documents(65)))


@pytest.mark.parametrize("dim", some_slow([24, 96, 128], [80, 256]))
def test_other_head_dims(dim):
    check(qkv(2, 1, 40, 40, dim, batch=1), IntervalMask.causal(documents(40)[1:]))


@pytest.mark.parametrize("block_q,block_k", some_slow([(16, 64), (64, 16)], [(16, 16), (32, 32)]))
def test_block_sizes(block_q, block_k):
    with blocks(block_q, block_k):
        check(qkv(2, 1, 100, 100, 16), IntervalMask.causal(documents(100)))


@pytest.mark.parametrize("length", some_slow([48], [65, 130]))
@pytest.mark.parametrize("heads,kv_heads", [(2, 2), (4, 2)])
def test_shared_prefix(length, heads, kv_heads):
    """A picture and questions: the prefix ends within a block, one document sees none, another comes before it."""
    cuts = [0, length // 8, length // 2 - 3, length // 2 + 4, length - 20, length - 6, length]
    document = torch.repeat_interleave(torch.arange(6), torch.tensor(cuts).diff())[None].repeat(2, 1)
    document[1, -6:] = -1
    prefix = torch.where((document == 2) | (document == 4), 1, -1)  # documents 2 and 4 see document 1
    check(qkv(heads, kv_heads, length, length, 16), IntervalMask.shared_prefix(document, prefix))


@pytest.mark.parametrize("window,sinks", some_slow([(1, 0), (17, 1), (70, 9)], [(16, 0), (5, 4)]))
def test_windows_and_sinks(window, sinks):
    check(qkv(2, 1, 97, 97, 16), IntervalMask.windowed(documents(97), window, sinks))


@pytest.mark.parametrize("queries,keys", [(1, 40), (5, 33), (40, 40), (70, 50), (33, 1)])
def test_two_random_intervals_and_empty_rows(queries, keys):
    """Any intervals, overlapping ones too, more queries than keys and fewer; a third of the rows sees nothing."""
    generator = torch.Generator().manual_seed(queries)

    def random(low, high):
        return torch.randint(low, high, (2, queries), generator=generator).int()

    first, prefix_first = random(0, keys), random(0, keys)
    mask = IntervalMask(first, (first + random(-3, 20)), prefix_first, (prefix_first + random(-4, 6)))
    nothing = random(0, 3) == 0
    nothing[0, 0] = True
    mask.last[nothing], mask.prefix_last[nothing] = mask.first[nothing] - 1, mask.prefix_first[nothing] - 1
    out, dq, *_ = check(qkv(2, 1, queries, keys, 16), mask)
    assert (out.transpose(1, 2)[nothing] == 0).all() and (dq.transpose(1, 2)[nothing] == 0).all()


@pytest.mark.parametrize("edge", some_slow([15, 16, 17, 32], [12, 14, 28, 30, 31, 33, 48]))
def test_intervals_that_end_at_block_edges(edge):
    """Every query sees the keys edge - 16 .. edge, and edge + 4 .. edge + 20: one too many or too few is seen."""
    first, last = torch.full((1, 80), edge - 16).clamp(min=0).int(), torch.full((1, 80), edge).int()
    with blocks(16, 16):
        check(qkv(1, 1, 80, 80, 16, batch=1), IntervalMask(first, last, last + 4, last + 20))


@pytest.mark.parametrize("start,stop", [(0, 40), (10, 70), (33, 34)])
def test_spans_that_see_themselves_in_full(start, stop):
    index = torch.arange(80).expand(2, 80)
    inside = (index >= start) & (index < stop)
    check(qkv(2, 1, 80, 80, 16), IntervalMask(torch.zeros(2, 80).int(), torch.where(inside, stop - 1, index).int()))


def test_decoding_into_a_longer_cache():
    positions = torch.tensor([[30, 31, 32], [-1, 0, 1]])
    out, *_ = check(qkv(4, 2, 3, 50, 32), IntervalMask.up_to(positions))
    assert (out[1, :, 0] == 0).all()


@pytest.mark.parametrize("scale", [1.0, 0.01, 5.0])
def test_scale(scale):
    """The backward pass makes probabilities anew, exp(score - log-sum-exp): the two, each rounded to float32, change
    one by 2 |score| / 2**24 of itself. The plain formula need not pay that; how much it pays differs between CPUs."""
    q, k, v = qkv(2, 1, 40, 40, 16)
    largest = (scale * q @ k.transpose(-1, -2)).abs().max().item()
    check([q, k, v], IntervalMask.causal(documents(40)), scale, rounding=2 * largest / 2**24)


def test_large_scores_neither_overflow_nor_underflow():
    """A log-sum-exp of thousands is rounded by 1e-4, and the backward's probabilities inherit that."""
    (q, k, v), mask = qkv(2, 1, 50, 50, 16), IntervalMask.causal(documents(50))
    ours = results(lambda *x: triton(*x, mask), [q * 30, k * 30, v])
    exact = results(lambda *x: attention_reference(*x, mask), [q.double() * 30, k.double() * 30, v.double()])
    for got, want in zip(ours, exact, strict=True):
        assert (got - want).abs().max() <= 1e-3 * want.abs().max()


@pytest.mark.parametrize("kind", some_slow(["documents"], ["future", "prefix"]))
def test_nothing_leaks_bitwise(kind):
    """Change all keys and values that a query must not see: its output and gradients keep every bit."""
    document = torch.tensor([[0] * 21 + [1] * 30 + [2] * 26])
    prefix = torch.where(document == 2, 0, -1)
    mask = IntervalMask.shared_prefix(document, prefix) if kind == "prefix" else IntervalMask.causal(document)
    watched, changed = {
        "documents": (slice(21, 51), [slice(0, 21), slice(51, 77)]),
        "future": (slice(0, 10), [slice(10, 77)]),
        "prefix": (slice(51, 77), [slice(21, 51)]),
    }[kind]
    q, k, v = qkv(2, 1, 77, 77, 16, batch=1)
    grad = torch.zeros(1, 2, 77, 16)
    grad[:, :, watched] = 1.0

    def run():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = triton(*leaves, mask)
        return [out[:, :, watched].detach(), torch.autograd.grad(out, leaves, grad)]

    before, grads_before = run()
    for part in changed:
        k[:, :, part], v[:, :, part] = -50.0, 1e4
        assert all((g[:, :, part] == 0).all() for g in grads_before)  # and nothing flows there
    after, grads_after = run()
    assert torch.equal(before, after)
    assert torch.equal(grads_before[0], grads_after[0])
    k[:, :, watched] += 1
    assert not torch.equal(before, run()[0])


MASKS = {
    "one document": lambda: IntervalMask.causal(torch.zeros(1, 100, dtype=torch.long)),  # with blocks seen in full
    "documents": lambda: IntervalMask.causal(documents(70)),
    "windows": lambda: IntervalMask.windowed(documents(70), 20, 3),
    "prefix": lambda: IntervalMask.shared_prefix(documents(70, seed=3).clamp(min=0), documents(70, seed=3) * 0),
    "cache": lambda: IntervalMask.up_to(torch.tensor([[30, 31, 32], [-1, 0, 1]])),
}


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("kind,dim", some_slow([("one document", 16), ("documents", 32), ("cache", 16)],
                                                [("prefix", 24), ("windows", 96)]))
def test_descriptors_give_the_same_bits(kind, dim, ahead):
    """Also where a row ends within a block, and where the head dim is no power of two. The same by pointers where a
    descriptor cannot address a tensor, and then `chosen()` says so."""
    mask = MASKS[kind]()
    queries = mask.first.shape[1]
    leaves = [x.transpose(1, 2).contiguous().transpose(1, 2)
              for x in qkv(2, 1, queries, 50 if kind == "cache" else queries, dim, batch=len(mask.first))]
    want = results(lambda *x: triton(*x, mask), leaves)
    odd = [torch.cat([x, x[..., :1]], -1)[..., :-1] for x in leaves]  # rows of dim + 1 numbers
    with tuning.forced(**{name: {"descriptors": 1, "ahead": ahead} for name in KERNELS}):
        got = results(lambda *x: triton(*x, mask), leaves)
        assert chosen()["attention"].reason == "the argument backend"
        by_pointers = results(lambda *x: triton(*x, mask), odd)
        assert "by pointers: q's strides" in chosen()["attention"].reason
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(want, by_pointers, strict=True))


def test_what_a_descriptor_cannot_address():
    from onevocab.kernels.attention.descriptors_triton import obstacle

    x = torch.zeros(2, 3, 8, 16, dtype=torch.bfloat16)
    assert obstacle(x=x) is None and obstacle(x=x.transpose(1, 2)) is None and obstacle(x=x[:1, :, :, :7]) is None
    assert "begin" in obstacle(x=x.flatten()[1:-511].view(-1, 1, 1, 1)) and "begin" in obstacle(x=x[:, :, :, 1:])
    for odd in (x[..., :15].contiguous(), x[:, :, :1].expand(2, 3, 8, 16), x.transpose(2, 3), x[..., ::2]):
        assert "strides" in obstacle(x=odd)


@pytest.mark.parametrize("descriptors", [0, 1])
def test_fused_backward(descriptors, monkeypatch):
    """What is allowed to be not deterministic adds dQ by atomics; the interpreter runs programs one after another."""
    mask, leaves = IntervalMask.causal(documents(70)), qkv(4, 2, 70, 70, 16)
    exact = results(lambda *x: attention_reference(*x, mask), [x.double() for x in leaves])
    row = {"block_q": 16, "block_k": 32, "num_warps": 4, "num_stages": 1, "fused": 1, "descriptors": descriptors}
    monkeypatch.setitem(TABLE, ("attention_fused", 64, 4, 0), row)
    got = results(lambda *x: triton(*x, mask, deterministic=False), leaves)
    monkeypatch.setenv(DETERMINISTIC, "0")
    again = results(lambda *x: triton(*x, mask), leaves)
    with tuning.forced(attention_dq={"block_q": -1}):  # the kernel of dQ alone does not run
        assert all((a - b).abs().max() < 1e-5 for a, b in zip(got, exact, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    monkeypatch.delitem(TABLE, ("attention_fused", 64, 4, 0))
    results(lambda *x: triton(*x, mask), leaves)
    assert "deterministic: attention_fused: no config" in chosen()["attention"].reason


def test_blocks_follow_the_lengths_of_documents():
    """Short documents take the table's rows for short documents, where it has some; what is not known is long."""
    from onevocab.kernels.attention.configs import SHORT
    from onevocab.kernels.attention.ops_triton import config_for

    q, document = torch.zeros(1, 2, 32, 16), documents(32, batch=1)
    row = {"block_q": 16, "block_k": 16, "num_warps": 4, "num_stages": 1}
    TABLE["attention_forward_short", 64, 4, 0] = row
    try:
        for mask, short in ((IntervalMask.causal(document), False), (IntervalMask.causal(document, SHORT + 1), False),
                            (IntervalMask.causal(document, SHORT), True), (IntervalMask.windowed(document, 8), True)):
            assert (config_for("attention_forward", q, mask) == row) == short
            assert config_for("attention_dq", q, mask) == config_for("attention_dq", q, IntervalMask.causal(document))
    finally:
        del TABLE["attention_forward_short", 64, 4, 0]


def test_backward_is_the_same_bit_for_bit():
    leaves, mask = qkv(4, 1, 129, 129, 16), IntervalMask.causal(documents(129))
    first, second = (results(lambda *x: triton(*x, mask), leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
def test_other_layouts():
    """Tensors of the model, which are (B, S, H, D) transposed; slices; columns apart; an expanded gradient."""
    mask, (q, k, v) = IntervalMask.causal(documents(33)), qkv(2, 1, 33, 33, 16)
    want = results(lambda *x: triton(*x, mask), (q, k, v))
    layouts = (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.cat([x, x], 2)[:, :, :33],
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.stack([x, x], -1)[..., 0],
    )
    for layout in layouts:
        odd = [layout(x) for x in (q, k, v)]
        assert all(torch.equal(a, b) for a, b in zip(want, results(lambda *x: triton(*x, mask), odd), strict=True))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    by_sum = torch.autograd.grad(triton(*leaves, mask).sum(), leaves)
    by_ones = torch.autograd.grad(triton(*leaves, mask), leaves, torch.ones_like(q))
    assert all(torch.equal(a, b) for a, b in zip(by_sum, by_ones, strict=True))


def test_one_plan_serves_all_layers():
    mask, leaves = IntervalMask.causal(documents(40)), qkv(2, 1, 40, 40, 16)
    results(lambda *x: triton(*x, mask), leaves)
    made = dict(mask._cache)
    results(lambda *x: triton(*x, mask), leaves)
    assert all(mask._cache[key] is value for key, value in made.items()) and len(made) == len(mask._cache)
    assert not any(isinstance(key, int) for key in made)  # and nothing dense


@pytest.mark.slow
def test_operator_is_registered_as_torch_wants_it():
    from onevocab.kernels.attention.ops_triton import CONFIG, attention_op

    mask = IntervalMask.causal(documents(40))
    q, k, v = (x.requires_grad_() for x in qkv(2, 1, 40, 40, 16))
    config = [{"block_q": 16, "block_k": 16, "num_warps": 4, "num_stages": 1}.get(name, 0) for name in CONFIG] * 3
    plan, transposed = mask.plan(40, 16, 16), mask.transposed_plan(40, 16, 16)
    # a copy each: an operator's inputs may not share memory in this check
    args = (q, k, v, mask.intervals(40), plan, plan.clone(), transposed, 0.25, config)
    torch.library.opcheck(attention_op, args)


def test_torch_compile_keeps_it_in_one_graph():
    mask, leaves = IntervalMask.shared_prefix(*[documents(40, seed=3).clamp(min=0)] * 2), qkv(2, 1, 40, 40, 16)
    want = results(lambda *x: triton(*x, mask), leaves)
    fresh = IntervalMask(mask.first, mask.last, mask.prefix_first, mask.prefix_last)
    compiled = torch.compile(lambda *x: triton(*x, fresh), backend="aot_eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(want, results(compiled, leaves), strict=True))


def test_flops_count_visible_pairs():
    from torch.utils.flop_counter import FlopCounterMode

    mask, leaves = IntervalMask.causal(documents(40)), qkv(4, 2, 40, 40, 16)
    with FlopCounterMode(display=False) as counter:
        results(lambda *x: triton(*x, mask), leaves)
    assert counter.get_total_flops() == (2 + 5) * 2 * int(mask.dense(40).sum()) * 4 * 16


def test_what_the_kernels_cannot_do_is_one_clear_error():
    good = qkv(2, 1, 20, 20, 16)
    for bad, message in (
        ([x.double() for x in good], "float32, bfloat16 and float16, not torch.float64"),
        (qkv(2, 1, 20, 20, 8), "head dims 16 to 256, not 8"),
        (qkv(2, 1, 20, 20, 260), "head dims 16 to 256, not 260"),
    ):
        with pytest.raises(ValueError, match=message):
            triton(*bad)
    with pytest.raises(ValueError, match="positive scale, not -1"):
        triton(*good, scale=-1.0)
