"""decode_attention on the CPU, against float64 and against attention."""

import os

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from onevocab.kernels import aot
from onevocab.kernels.attention import IntervalMask, attention
from onevocab.kernels.backend import chosen
from onevocab.kernels.decode import decode_attention, decode_attention_reference


def cache(batch=4, heads=4, kv_heads=2, queries=1, keys=21, dim=16):
    torch.manual_seed(0)
    return torch.randn(batch, heads, queries, dim), *(torch.randn(batch, kv_heads, keys, dim) for _ in range(2))


def paged(k, v, page):
    """The same cache in pages in reverse order."""
    batch, heads, keys, dim = k.shape
    per_row = -(-keys // page)
    table = torch.arange(batch * per_row, dtype=torch.int32).flip(0).reshape(batch, per_row)
    padded = (F.pad(x, (0, 0, 0, per_row * page - keys)) for x in (k, v))
    pages = [rearrange(x, "b heads (pages page) d -> (b pages) heads page d", page=page).flip(0) for x in padded]
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


def compiled(launched) -> set:
    """What Triton keeps apart by: kernel, constants, and the kinds of its arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend, found = make_backend(GPUTarget("cuda", 90, 32)), set()
    for function, args, options in launched:
        bind = create_function_from_signature(function.signature, function.params, backend)
        _, kinds, rest = bind(*args, **options)
        found.add((function.__name__, str(kinds), str(rest)))
    return found


@pytest.mark.skipif(not aot.backend._HAS_TRITON or os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton")
@pytest.mark.parametrize("kind", ["room", "grown", "pages", "few pages"])
def test_nothing_is_compiled_anew_while_a_row_grows(kind):
    """A view that grows into a cache with room, a cache copied at each token, a table of pages that grows."""
    q, *room = torch.zeros(1, 4, 1, 64), torch.zeros(1, 2, 800, 64), torch.zeros(1, 2, 800, 64)
    pages, found = [x.view(50, 2, 16, 64) for x in room], []
    for length in (*range(1, 36), 255, 256, 257, 511, 512, 513, 640, 799, 800):
        k, v = pages if "pages" in kind else (x[:, :, :length] for x in room)
        if kind == "grown":
            k, v = k.clone(), v.clone()
        table = torch.zeros(1, 50 if kind == "pages" else -(-length // 16), dtype=torch.int32)
        with aot.recording(90) as launched:
            decode_attention(q, k, v, torch.tensor([length]), table if "pages" in kind else None)
        found.append(compiled(launched))
    assert len(found[0]) == 2 and all(each == found[0] for each in found)
    if "pages" not in kind:
        assert len({options["BLOCK_P"] for _, _, options in launched if "BLOCK_P" in options}) == 1
