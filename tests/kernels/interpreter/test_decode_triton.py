"""decode_attention in Triton's interpreter: dense and paged caches, any number of parts."""

import pytest
import torch
from oracle import TINY

from onevocab.kernels import tuning
from onevocab.kernels.decode import decode_attention, decode_attention_reference, ops_triton


@pytest.fixture(autouse=True)
def small_blocks():
    torch.manual_seed(0)
    with tuning.forced(decode_attention={"BLOCK_N": 16}):
        yield


def some(batch, heads, kv_heads, queries, keys, dim, kind=torch.float32):
    q = torch.randn(batch, heads, queries, dim).to(kind)
    return q, *(torch.randn(batch, kv_heads, keys, dim).to(kind) for _ in range(2))


def paged(k, v, lengths, page):
    """The same cache in shuffled pages; what no row holds is NaN in the pages and nonsense in the table."""
    batch, heads, keys, dim = k.shape
    per_row = -(-keys // page)
    order = torch.randperm(batch * per_row + 2)
    pages = [torch.full((len(order), heads, page, dim), float("nan"), dtype=k.dtype) for _ in range(2)]
    table = torch.full((batch, per_row), -7, dtype=torch.int32)
    for b, length in enumerate(lengths.tolist()):
        for i in range(-(-length // page)):
            at = table[b, i] = order[b * per_row + i]
            n = min(page, length - i * page)
            for to, x in zip(pages, (k, v), strict=True):
                to[at, :, :n] = x[b, :, i * page : i * page + n]
    return *pages, table


def no_worse(q, k, v, lengths, scale=None, page=None):
    """Against the float64 oracle; the cache behind each length is NaN for ours and 0 for the oracle."""
    dirty, clean = [k.clone(), v.clone()], [k.clone(), v.clone()]
    for b, length in enumerate(lengths.tolist()):
        for x, y in zip(dirty, clean, strict=True):
            x[b, :, length:], y[b, :, length:] = float("nan"), 0
    exact = decode_attention_reference(q.double(), *(x.double() for x in clean), lengths, None, scale)
    plain = decode_attention_reference(q, *clean, lengths, None, scale)
    *cache, table = paged(*dirty, lengths, page) if page else (*dirty, None)
    out = decode_attention(q, *cache, lengths, table, scale, backend="triton")
    assert out.dtype == q.dtype and out.shape == q.shape and torch.isfinite(out).all()
    tiny = TINY[q.dtype] * exact.abs().max()
    assert (out - exact).abs().max() <= 2 * (plain - exact).abs().max() + tiny
    return out


@pytest.mark.parametrize("page", [None, 4, 5, 32], ids=lambda page: f"page{page}")
@pytest.mark.parametrize("heads,kv_heads,queries,dim", [(1, 1, 1, 16), (4, 2, 1, 64), (4, 1, 3, 40), (6, 2, 2, 32)])
def test_decode(heads, kv_heads, queries, dim, page):
    lengths = torch.tensor([0, 1, queries, 37, 16])
    out = no_worse(*some(5, heads, kv_heads, queries, 37, dim), lengths, page=page)
    assert (out[0] == 0).all()


@pytest.mark.parametrize("parts", [1, 2, 3, 9])
def test_any_number_of_parts(parts):
    """Parts that get no key, parts cut in the middle of a block's worth, and parts whose keys no query sees."""
    with tuning.forced(decode_attention={"PARTS": parts}):
        no_worse(*some(4, 4, 2, 3, 70, 16), torch.tensor([2, 17, 65, 70]))
        no_worse(*some(4, 4, 2, 3, 70, 16), torch.tensor([2, 17, 65, 70]), page=7)
        no_worse(*some(4, 4, 2, 3, 70, 16), torch.tensor([2, 17, 65, 70]), page=8)


@pytest.mark.parametrize("page,block,tile", [(1, 16, 16), (16, 16, 16), (48, 32, 16), (24, 16, 16), (20, 16, 16)])
def test_pages_and_tiles_of_any_size(page, block, tile):
    """A key a page; a page a tile; smaller tiles, so that none crosses a page's end; pages that divide nothing."""
    assert ops_triton.keys_per_tile(page, block) == tile
    with tuning.forced(decode_attention={"BLOCK_N": block, "PARTS": 2}):
        no_worse(*some(3, 2, 1, 2, 100, 16), torch.tensor([100, 49, 3]), page=page)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("page", [None, 8], ids=lambda page: f"page{page}")
def test_half_precision(kind, page):
    no_worse(*some(3, 4, 2, 2, 50, 32, kind), torch.tensor([50, 33, 5]), page=page)


def test_scale_and_scores_far_apart():
    q, k, v = some(2, 2, 1, 1, 40, 16)
    no_worse(q, k, v, torch.tensor([40, 23]), scale=0.7)
    no_worse(q * 100, k, v, torch.tensor([40, 23]))


def test_lengths_in_int32_and_a_cache_that_is_not_contiguous():
    """(B, T, Hkv, D) in memory, a cache with room behind, and strides that nothing divides."""
    q, k, v = some(2, 4, 2, 1, 20, 16)
    room = torch.full((2, 30, 2, 16), float("nan"))
    room[:, :20] = k.transpose(1, 2)
    lengths = torch.tensor([20, 11], dtype=torch.int32)
    a = decode_attention(q, k, v, lengths, backend="triton")
    b = decode_attention(q, room.transpose(1, 2)[:, :, :20], v, lengths, backend="triton")
    odd = torch.full((2, 2, 21, 17), float("nan"))
    odd[:, :, :20, :16] = k
    c = decode_attention(q, odd[:, :, :20, :16], v, lengths, backend="triton")
    assert torch.equal(a, b) and torch.equal(a, c)


def test_rows_do_not_see_each_other():
    """Bitwise the same whatever other rows, and one's own keys behind the length, hold."""
    q, k, v = some(3, 4, 2, 2, 40, 16)
    lengths = torch.tensor([40, 18, 7])
    before = decode_attention(q, k, v, lengths, backend="triton")
    k[0], v[0], k[1, :, 18:], v[1, :, 18:] = 1e3, -1e3, 1e3, -1e3
    after = decode_attention(q, k, v, lengths, backend="triton")
    assert torch.equal(before[1:], after[1:]) and not torch.equal(before[0], after[0])


def test_the_newest_key_is_hidden_from_the_earlier_query():
    q, k, v = some(1, 2, 1, 2, 20, 16)
    before = decode_attention(q, k, v, torch.tensor([20]), backend="triton")
    v[:, :, 19] += 1
    after = decode_attention(q, k, v, torch.tensor([20]), backend="triton")
    assert torch.equal(before[:, :, 0], after[:, :, 0]) and not torch.equal(before[:, :, 1], after[:, :, 1])


def test_registration_and_what_the_kernel_does_not_take():
    q, k, v = some(2, 4, 2, 1, 20, 16)
    table = torch.tensor([[1], [0]], dtype=torch.int32)
    torch.library.opcheck(ops_triton.decode_attention, (q, k, v, torch.tensor([20, 3]), None, 0.25))
    torch.library.opcheck(ops_triton.decode_attention, (q, k, v, torch.tensor([20, 3]), table, 0.25))
    with pytest.raises(ValueError, match="128 queries"):
        decode_attention(*some(1, 8, 1, 17, 20, 16), torch.tensor([20]), backend="triton")
    with pytest.raises(ValueError, match="float64"):
        decode_attention(q.double(), k.double(), v.double(), torch.tensor([20, 3]), backend="triton")
