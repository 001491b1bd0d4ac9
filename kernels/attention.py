"""Attention whose mask is at most two intervals of visible keys per query.

Shapes: q (B, H, S, D); k and v (B, Hkv, T, D), H a multiple of Hkv; float32, float64, bfloat16 or float16.
`attention_reference` is the definition. On a CPU a mask of packed documents runs one fused kernel call per
document; a dense mask would compute every pair and throw most away (forward and backward of 3,072 tokens in rows
of 256 with three documents each, 2 cores: 8 ms against 12). Every other mask goes to SDPA as a dense one.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(eq=False)
class IntervalMask:
    """Query i of row b sees the keys first[b, i] .. last[b, i] and prefix_first[b, i] .. prefix_last[b, i].

    Both ends count. All are int32 (B, S_q). first > last is an empty interval; a query with nothing to see gives
    zeros, and no gradient.
    """

    first: Tensor
    last: Tensor
    prefix_first: Tensor | None = None
    prefix_last: Tensor | None = None
    document: Tensor | None = None  # (B, S), set by `causal` alone: it lets a CPU run document by document
    _cache: dict = field(default_factory=dict, repr=False)

    @classmethod
    def causal(cls, document: Tensor) -> "IntervalMask":
        """Causal within each run of equal ids in document (B, S); negative is padding, sees nothing."""
        index = torch.arange(document.shape[1], device=document.device, dtype=torch.int32).expand_as(document)
        starts = torch.ones_like(document, dtype=torch.bool)
        starts[:, 1:] = document[:, 1:] != document[:, :-1]
        first = torch.where(starts, index, 0).cummax(1).values
        padding = document < 0
        return cls(first.masked_fill(padding, 1).int(), index.masked_fill(padding, 0), document=document)

    @classmethod
    def up_to(cls, positions: Tensor) -> "IntervalMask":
        """Every key from 0 to positions (B, S), for decoding from a cache; negative is padding."""
        last = positions.int()
        return cls((last < 0).int(), last.clamp(min=0))

    def dense(self, n_keys: int) -> Tensor:
        """bool (B, 1, S_q, n_keys), True where a query sees a key; computed once per mask and n_keys."""
        if n_keys not in self._cache:
            keys = torch.arange(n_keys, device=self.first.device, dtype=torch.int32)
            visible = (keys >= self.first[..., None]) & (keys <= self.last[..., None])
            if self.prefix_first is not None:
                visible |= (keys >= self.prefix_first[..., None]) & (keys <= self.prefix_last[..., None])
            self._cache[n_keys] = visible[:, None]
        return self._cache[n_keys]

    def empty(self, n_keys: int) -> Tensor | None:
        """bool (B, 1, S_q, 1), True where a query sees nothing; None when there is no such query."""
        key = ("empty", n_keys)
        if key not in self._cache:
            empty = ~self.dense(n_keys).any(-1, keepdim=True)
            self._cache[key] = empty if bool(empty.any()) else None
        return self._cache[key]

    def runs(self) -> tuple[list[int], list[bool]]:
        """Lengths of the documents along the flattened (B * S) positions, and which of them are padding."""
        if "runs" not in self._cache:
            document = self.document
            cut = torch.ones_like(document, dtype=torch.bool)  # rows never share a run
            cut[:, 1:] = document[:, 1:] != document[:, :-1]
            at = cut.flatten().nonzero().squeeze(1)
            lengths = torch.diff(at, append=at.new_tensor([document.numel()]))
            self._cache["runs"] = lengths.tolist(), (document.flatten()[at] < 0).tolist()
        return self._cache["runs"]


def attention_reference(q, k, v, mask: IntervalMask | None = None, scale: float | None = None) -> Tensor:
    """softmax(scale * q k^T) v over the visible keys (B, H, S, D); scale is D ** -0.5 unless given."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is None:
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    else:
        visible = mask.dense(k.shape[2])
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) * visible) @ v


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask | None = None, scale: float | None = None
) -> Tensor:
    """Like `attention_reference`, fused. mask=None means causal and needs S == T.

    Raises ValueError when the shapes of q, k, v and mask do not belong together.
    """
    _check(q, k, v, mask)
    gqa = q.shape[1] != k.shape[1]
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    if q.device.type == "cpu" and mask.document is not None and q.shape[2] == k.shape[2]:
        if q.dtype == torch.bfloat16:  # the CPU's flash backward is several times slower in bfloat16
            return _ByDocument.apply(q.float(), k.float(), v.float(), mask.runs(), scale).to(q.dtype)
        return _ByDocument.apply(q, k, v, mask.runs(), scale)
    visible, empty = mask.dense(k.shape[2]), mask.empty(k.shape[2])
    if empty is not None:  # an empty row sees anything, so that no kernel divides 0 by 0; dropped below
        visible = visible | empty
    if q.shape[2] == 1:  # decoding: heads that share a key head become its queries; no key is repeated
        grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=visible, scale=scale).reshape(q.shape)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=gqa)
    return out if empty is None else out.masked_fill(empty, 0.0)


def _check(q, k, v, mask):
    fits = k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[-1] == k.shape[-1]
    if not fits or q.shape[1] % k.shape[1] or (mask is None and q.shape[2] != k.shape[2]):
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    if mask is not None and mask.first.shape != (q.shape[0], q.shape[2]):
        raise ValueError(f"attention: mask {tuple(mask.first.shape)} is not {(q.shape[0], q.shape[2])}")


class _ByDocument(torch.autograd.Function):
    """One causal call of the CPU's flash kernel per document, over views: nothing between documents is computed.

    Autograd over `split` would do the same in 1.2 to 1.4 times the time.
    """

    @staticmethod
    def forward(ctx, q, k, v, runs, scale):
        lengths, padding = runs
        ctx.shape, ctx.groups = q.shape, q.shape[1] // k.shape[1]
        ctx.lengths, ctx.scale = lengths, scale
        if ctx.groups > 1:
            k, v = (x.repeat_interleave(ctx.groups, dim=1) for x in (k, v))
        q, k, v = (_flatten(x) for x in (q, k, v))
        pieces = zip(*(x.split(lengths, 2) for x in (q, k, v)), padding, strict=True)
        ctx.done = [
            (torch.zeros_like(a), None) if pad else _flash(a, b, c, 0.0, True, scale=scale)
            for a, b, c, pad in pieces
        ]
        ctx.save_for_backward(q, k, v)
        return _unflatten(torch.cat([out for out, _ in ctx.done], 2), ctx.shape)

    @staticmethod
    def backward(ctx, grad):
        grads = []
        tensors = (_flatten(grad), *ctx.saved_tensors)
        for g, a, b, c, (out, lse) in zip(*(x.split(ctx.lengths, 2) for x in tensors), ctx.done, strict=True):
            if lse is None:
                grads.append((torch.zeros_like(g),) * 3)
            else:
                grads.append(_flash_backward(g, a, b, c, out, lse, 0.0, True, scale=ctx.scale))
        dq, dk, dv = (_unflatten(torch.cat(parts, 2), ctx.shape) for parts in zip(*grads, strict=True))
        if ctx.groups > 1:
            dk, dv = (x.unflatten(1, (-1, ctx.groups)).sum(2) for x in (dk, dv))
        return dq, dk, dv, None, None


def _flatten(x: Tensor) -> Tensor:
    """(B, H, S, D) -> (1, H, B * S, D); a view when x is itself a transposed (B, S, H, D)."""
    return x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]


def _unflatten(x: Tensor, shape) -> Tensor:
    """(1, H, B * S, D) -> (B, H, S, D)."""
    return x[0].transpose(0, 1).unflatten(0, (shape[0], shape[2])).transpose(1, 2)
