"""Attention with torch alone: what a CPU runs.

A mask of packed documents runs one fused kernel call per document; a dense mask would compute every pair and throw
most away (forward and backward of 3,072 tokens in rows of 256 with three documents each, 2 cores: 8 ms against 12). A
prefix that documents share costs one call more for all of them. A mask of which blocks see a small part, as windows do,
runs block by block (`torch_blocks`); every other one goes to SDPA as a dense mask.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from onevocab.kernels.attention.mask import IntervalMask
from onevocab.kernels.attention.torch_blocks import ByBlock, blocks_of, flash, flash_backward

SPARSE, SHARE = 256, 0.5  # from how many queries, and up to which share of all pairs, a mask runs block by block



def attention_torch(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask | None, scale: float | None) -> Tensor:
    """Like `attention_reference`, on inputs that `attention` has checked."""
    gqa = q.shape[1] != k.shape[1]
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    if q.device.type == "cpu" and mask.document is not None and q.shape[2] == k.shape[2]:
        kind = q.dtype
        if kind in (torch.bfloat16, torch.float16):  # the CPU's flash backward is several times slower in these
            q, k, v = q.float(), k.float(), v.float()
        if torch.compiler.is_compiling() and mask.prefix_first is None:
            return _unflatten(_by_document(q, k, v, mask.document, scale)[0], q.shape).to(kind)
        return _ByDocument.apply(q, k, v, mask.runs(), mask.prefixes(), scale).to(kind)
    if q.device.type == "cpu" and q.shape[2] >= SPARSE and not torch.compiler.is_compiling():
        kind, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
        blocks = blocks_of(mask, k.shape[2], wide)
        if blocks.pairs <= SHARE * q.shape[0] * q.shape[2] * k.shape[2]:
            return ByBlock.apply(q.to(wide), k.to(wide), v.to(wide), blocks, scale).to(kind)
    visible, empty = mask.dense(k.shape[2]), mask.empty(k.shape[2])
    if empty is not None:  # an empty row sees anything, so that no kernel divides 0 by 0; dropped below
        visible = visible | empty
    if q.shape[2] == 1:  # decoding: heads that share a key head become its queries; no key is repeated
        grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=visible, scale=scale).reshape(q.shape)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=gqa)
    return out if empty is None else out.masked_fill(empty, 0.0)


class _ByDocument(torch.autograd.Function):
    """One causal call of the CPU's flash kernel per document, over views, and one more for neighbouring documents
    that share a prefix: nothing between documents is computed, and nothing of a prefix twice.

    Autograd over `split` would do the same in 1.2 to 1.4 times the time.

    A query's own keys and its prefix give two softmaxes, which their log-sum-exps weigh against each other. The flash
    backward is linear in what it is told: given the merged output and log-sum-exp, each part returns its exact share.
    """

    @staticmethod
    def forward(ctx, q, k, v, runs, prefixes, scale):
        ctx.shape, ctx.groups = q.shape, q.shape[1] // k.shape[1]
        ctx.runs, ctx.prefixes, ctx.scale = runs, prefixes, scale
        q, k, v = _flat(q, k, v)
        out, lse = _forward(q, k, v, runs, prefixes, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        return _unflatten(out, ctx.shape)

    @staticmethod
    def backward(ctx, grad):
        grads = _backward(_flatten(grad), *ctx.saved_tensors, ctx.runs, ctx.prefixes, ctx.scale)
        return *_per_key_head(grads, ctx.shape, ctx.groups), None, None, None


def _flat(q, k, v):
    """All (1, H, B * S, D), keys and values repeated for the queries' heads: as (B, S, H, D) it is a single copy."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.transpose(1, 2).repeat_interleave(groups, dim=2).transpose(1, 2) for x in (k, v))
    return tuple(_flatten(x) for x in (q, k, v))


def _per_key_head(grads, shape, groups: int):
    """The inverse of `_flat` for gradients: summed over the heads that share a key head."""
    dq, dk, dv = (_unflatten(x, shape) for x in grads)
    if groups > 1:
        dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def _forward(q, k, v, runs, prefixes, scale):
    lengths, padding = runs
    pieces = zip(*(x.split(lengths, 2) for x in (q, k, v)), padding, strict=True)
    done = [
        (torch.zeros_like(a), a.new_zeros(a.shape[:3], dtype=torch.promote_types(a.dtype, torch.float32)))
        if pad
        else flash(a, b, c, 0.0, True, scale=scale)
        for a, b, c, pad in pieces
    ]
    out, lse = (torch.cat(parts, 2) for parts in zip(*done, strict=True))
    for queries, keys in prefixes:
        own, own_lse = out[:, :, queries], lse[:, :, queries]
        shared, shared_lse = flash(q[:, :, queries], k[:, :, keys], v[:, :, keys], 0.0, False, scale=scale)
        share = torch.sigmoid(shared_lse - own_lse)  # e^a / (e^a + e^b)
        own.lerp_(shared, share[..., None])
        lse[:, :, queries] = torch.logaddexp(own_lse, shared_lse)
    return out, lse


def _backward(grad, q, k, v, out, lse, runs, prefixes, scale):
    lengths, padding = runs
    grads = []
    for *piece, pad in zip(*(x.split(lengths, 2) for x in (grad, q, k, v, out, lse)), padding, strict=True):
        if pad:
            grads.append((torch.zeros_like(piece[0]),) * 3)
        else:
            grads.append(flash_backward(*piece, 0.0, True, scale=scale))
    dq, dk, dv = (torch.cat(parts, 2) for parts in zip(*grads, strict=True))
    for queries, keys in prefixes:
        g, a, o, le = (x[:, :, queries] for x in (grad, q, out, lse))
        b, c = k[:, :, keys], v[:, :, keys]
        part_q, part_k, part_v = flash_backward(g, a, b, c, o, le, 0.0, False, scale=scale)
        dq[:, :, queries] += part_q
        dk[:, :, keys] += part_k
        dv[:, :, keys] += part_v
    return dq, dk, dv


# The same for torch.compile, to which documents must be a tensor: lengths in a list would be compiled anew each time.


@torch.library.custom_op("onevocab::attention_by_document", mutates_args=())
def _by_document(q: Tensor, k: Tensor, v: Tensor, document: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """-> out (1, H, B * S, D), lse (1, H, B * S)."""
    out, lse = _forward(*_flat(q, k, v), IntervalMask.causal(document).runs(), (), scale)
    return out.contiguous(), lse.contiguous()


@_by_document.register_fake
def _(q, k, v, document, scale):
    batch, heads, length, dim = q.shape
    kind = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(1, heads, batch * length, dim), q.new_empty(1, heads, batch * length, dtype=kind)


@torch.library.custom_op("onevocab::attention_by_document_backward", mutates_args=())
def _by_document_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, document: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    runs = IntervalMask.causal(document).runs()
    grads = _backward(grad, *_flat(q, k, v), out, lse, runs, (), scale)
    return tuple(x.contiguous() for x in _per_key_head(grads, q.shape, q.shape[1] // k.shape[1]))


@_by_document_backward.register_fake
def _(grad, q, k, v, out, lse, document, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors[:3], *output, tensors[3])


def _op_backward(ctx, grad, _):
    return *_by_document_backward(grad, *ctx.saved_tensors, ctx.scale), None, None


_by_document.register_autograd(_op_backward, setup_context=_setup)


def _flatten(x: Tensor) -> Tensor:
    """(B, H, S, D) -> (1, H, B * S, D); a view when x is itself a transposed (B, S, H, D)."""
    return x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]


def _unflatten(x: Tensor, shape) -> Tensor:
    """(1, H, B * S, D) -> (B, H, S, D)."""
    return x[0].transpose(0, 1).unflatten(0, (shape[0], shape[2])).transpose(1, 2)
