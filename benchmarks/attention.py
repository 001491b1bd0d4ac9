"""Attention with the masks of packed mixed-modal batches: ours beside SDPA, FlexAttention and the definition.

    python -m benchmarks.attention --preset packed --out attention.json

Steps: forward; backward alone on a GPU, forward + backward ("both") on a CPU; and with a mask made anew ("fresh"), as
once per batch in training. FLOPs are counted from visible (query, key) pairs: 4 * D per pair and head forward, 10 * D
backward, whatever a provider computes beside them.
"""

import functools
import inspect
from collections.abc import Callable
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import command
from benchmarks.work import OURS, Cost, Preset, Target, Unavailable, Work
from onevocab.common.errors import UserError
from onevocab.kernels.attention import IntervalMask, attention, attention_reference

FLASH, CUDNN = "SDPA flash", "SDPA cuDNN"
VARLEN, VARLEN_REPEATED = "flash, variable length", "flash, variable length, keys repeated"
FA3, FA3_VARLEN = "FlashAttention 3", "FlashAttention 3, variable length"
DENSE, DENSE_REPEATED, FLEX = "SDPA dense mask", "SDPA dense mask, keys repeated", "FlexAttention, block mask"
ANY_DENSE = (DENSE, DENSE_REPEATED)
CAUSAL = "SDPA causal"
REFERENCE = "reference"


def packed(rows: int, length: int, documents: int, seed: int = 0) -> Tensor:
    """int64 (rows, length): ids of documents packed into rows, of random lengths 0.5 .. 1.5 of the mean."""
    generator = torch.Generator().manual_seed(seed)
    parts = 0.5 + torch.rand(rows, documents, generator=generator)
    ends = (parts.cumsum(1) / parts.sum(1, keepdim=True) * length).round().long()
    return torch.searchsorted(ends, torch.arange(length).expand(rows, -1).contiguous(), right=True).clamp(
        max=documents - 1
    )


def shared(rows: int, prefix: int, questions: int, question: int) -> tuple[Tensor, Tensor]:
    """(document, prefix), each (rows, prefix + questions * question): one picture, then questions that see only it."""
    document = torch.cat([torch.zeros(prefix), 1 + torch.arange(questions).repeat_interleave(question)]).long()
    return document.expand(rows, -1).contiguous(), torch.where(document > 0, 0, -1).expand(rows, -1).contiguous()


def in_pieces(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask | None) -> Tensor:
    """The definition, one row and head at a time and computed again in the backward pass: scores of S * T numbers
    exist for one head only."""
    groups = q.shape[1] // k.shape[1]

    def row(part: slice) -> Tensor:
        small = mask and IntervalMask(*(x if x is None else x[part] for x in (
            mask.first, mask.last, mask.prefix_first, mask.prefix_last)))  # its dense form is made once for all heads
        heads = []
        for h in range(q.shape[1]):
            key = slice(h // groups, h // groups + 1)
            one = q[part, h : h + 1], k[part, key], v[part, key]
            heads.append(checkpoint(attention_reference, *one, small, use_reentrant=False))
        return torch.cat(heads, 1)

    return torch.cat([row(slice(b, b + 1)) for b in range(len(q))])


def compiled(function: Callable, **options) -> Callable:
    """torch.compile with room for all presets' shapes: beyond its limit of recompilations it goes on uncompiled."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=False, **options)


@functools.cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return compiled(flex_attention, fullgraph=True)


@functools.cache
def compiled_block_mask():
    from torch.nn.attention.flex_attention import create_block_mask

    return compiled(create_block_mask)


def causal(b, h, i, j):
    return i >= j


def within(document: Tensor) -> Callable:
    """Causal within documents, as FlexAttention's own examples write it."""
    return lambda b, h, i, j: (i >= j) & (document[b, i] == document[b, j])


def windowed(document: Tensor, window: int, sinks: int) -> Callable:
    """The last `window` keys of the document and its first `sinks`; ids of a row ascend."""
    start = torch.searchsorted(document, document)
    position = torch.arange(document.shape[1], device=document.device) - start
    return lambda b, h, i, j: ((i >= j) & (document[b, i] == document[b, j])
                               & ((i - j < window) | (position[b, j] < sinks)))


def intervals(mask: IntervalMask) -> Callable:
    """Our two intervals: for what has no shorter way to say it."""
    first, last, second_first, second_last = mask.first, mask.last, mask.prefix_first, mask.prefix_last
    return lambda b, h, i, j: ((j >= first[b, i]) & (j <= last[b, i])) | (
        (j >= second_first[b, i]) & (j <= second_last[b, i]))


def flex(visible: Callable, rows: int | None, length: int, device: torch.device):
    """FlexAttention (Dong et al. 2024), compiled. rows: None when all rows have the same mask."""
    blocks = compiled_block_mask()(visible, rows, None, length, length, device=str(device))
    return lambda q, k, v: compiled_flex()(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])


def sdpa(backend: str | None = None, mask: IntervalMask | None = None, repeat: bool = False):
    """SDPA with one of its backends; causal, or a dense mask in which a query that sees nothing sees itself."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    dense = None
    if mask is not None:
        length = mask.first.shape[1]
        dense = mask.dense(length)
        dense = dense | (~dense.any(-1, keepdim=True) & torch.eye(length, dtype=torch.bool, device=dense.device))

    def call(q, k, v):
        groups = q.shape[1] // k.shape[1]
        if repeat:
            k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        options = {"attn_mask": dense, "is_causal": dense is None, "enable_gqa": groups > 1 and not repeat}
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, **options)
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return call


def on_gpu(document: Tensor, module: str, how: str):
    """The module of a peer, or Unavailable."""
    if document.device.type != "cuda":
        raise Unavailable("needs a GPU")
    try:
        return import_module(module)
    except ImportError as error:
        raise Unavailable(f"{how} ({error})") from None


def end_to_end(document: Tensor, kernel: Callable, repeat: bool = False) -> Callable:
    """kernel(q, k, v, ends, ends, longest, longest) over documents laid end to end, (tokens, heads, dim); it knows
    causal documents and nothing else. repeat: keys and values for every head, in each call."""
    flat = document + torch.arange(len(document), device=document.device)[:, None] * (document.max() + 1)
    lengths = flat.flatten().unique_consecutive(return_counts=True)[1]
    ends = F.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max())

    def call(q, k, v):
        rows, length, groups = q.shape[0], q.shape[2], q.shape[1] // k.shape[1]
        if repeat:
            k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        flat = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        out = kernel(*flat, ends, ends, longest, longest)
        out = out[0] if isinstance(out, tuple) else out
        return out.unflatten(0, (rows, length)).transpose(1, 2)

    return call


def variable_length(document: Tensor, repeat: bool = False) -> Callable:
    """torch's flash attention. Until torch 2.12 it has no word for grouped heads, and whether it takes them is seen by
    trying; so it is also run with keys repeated, whose time counts."""
    theirs = on_gpu(document, "torch.nn.attention.varlen", "not in this torch").varlen_attn
    grouped = "enable_gqa" in inspect.signature(theirs).parameters
    if repeat and grouped:
        raise Unavailable("not needed: it takes grouped heads here")
    options = {"window_size": (-1, 0), **({"enable_gqa": True} if grouped else {})}
    return end_to_end(document, lambda *given: theirs(*given, **options), repeat)


def flash_3(document: Tensor, packed: bool) -> Callable:
    """FlashAttention 3 (Shah et al. 2024), as its authors build it: torch does not have it."""
    theirs = on_gpu(document, "flash_attn_interface", "FlashAttention 3 is not installed")
    if packed:
        return end_to_end(document, lambda *given: theirs.flash_attn_varlen_func(*given, causal=True))

    def call(q, k, v):
        out = theirs.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


def build(kind: str):
    """The `build` of a preset whose mask is of this kind."""
    def make(shape: dict, device: torch.device, dtype: torch.dtype) -> Work:
        rows, heads, kv_heads, dim = (shape[name] for name in ("rows", "heads", "kv_heads", "head_dim"))
        if heads % kv_heads:
            raise UserError(f"heads={heads} must be a multiple of kv_heads={kv_heads}")
        length = shape.get("length") or shape["prefix"] + shape["questions"] * shape["question"]
        if kind == "shared":
            document, prefix = (x.to(device) for x in shared(rows, shape["prefix"], shape["questions"],
                                                             shape["question"]))
        else:
            document = packed(rows, length, shape.get("documents", 1)).to(device)

        mean_keys = length / shape.get("documents", 1) / 2

        def mask() -> IntervalMask | None:
            if kind == "causal":
                return None
            if kind == "shared":
                return IntervalMask.shared_prefix(document, prefix)
            if kind == "window":
                return IntervalMask.windowed(document, shape["window"], shape["sinks"])
            return IntervalMask.causal(document, mean_keys)

        def ours():
            fresh = mask()
            if fresh is None and device.type == "cuda":  # else each call makes its own
                fresh = IntervalMask.causal(document, mean_keys)
            return lambda q, k, v: attention(q, k, v, fresh)

        def flexible():
            visible = {"causal": lambda: causal, "packed": lambda: within(document),
                       "window": lambda: windowed(document, shape["window"], shape["sinks"]),
                       "shared": lambda: intervals(mask())}[kind]()
            return flex(visible, None if kind == "causal" else rows, length, device)

        providers = {OURS: ours, FLEX: flexible}
        if kind == "causal":
            providers |= {CAUSAL: sdpa}
            if device.type == "cuda":
                providers |= {FLASH: lambda: sdpa("FLASH_ATTENTION"), CUDNN: lambda: sdpa("CUDNN_ATTENTION"),
                              FA3: lambda: flash_3(document, packed=False)}
        else:
            providers |= {DENSE: lambda: sdpa(mask=mask()), DENSE_REPEATED: lambda: sdpa(mask=mask(), repeat=True)}
        if kind == "packed":
            providers |= {VARLEN: lambda: variable_length(document)}
            if device.type == "cuda":
                providers |= {VARLEN_REPEATED: lambda: variable_length(document, repeat=True),
                              FA3_VARLEN: lambda: flash_3(document, packed=True)}
        if rows * heads * length**2 * dtype.itemsize <= 2**31:  # else its scores alone do not fit
            fixed = mask()
            providers[REFERENCE] = lambda: lambda q, k, v: attention_reference(q, k, v, fixed)

        def inputs():
            tensors = (torch.randn(rows, length, n, dim, device=device) for n in (heads, kv_heads, kv_heads))
            return tuple(x.to(dtype).transpose(1, 2) for x in tensors)

        whole = mask() or IntervalMask.causal(document)
        pairs = int(sum(row.sum() for row in whole.dense(length)))
        flops = 4 * pairs * heads * dim
        tensors = rows * length * dim * dtype.itemsize
        read = tensors * (2 * heads + 2 * kv_heads)  # q, k, v and out
        forward, backward = Cost(flops, read), Cost(flops * 5 // 2, tensors * (4 * heads + 4 * kv_heads))
        both = Cost(flops * 7 // 2, forward.bytes + backward.bytes)
        costs = {"forward": forward, **({"backward": backward} if device.type == "cuda" else {}), "both": both}
        if kind != "causal":
            costs |= {"fresh": forward, "fresh both": both}
        fixed_mask = mask()
        share = pairs / (rows * length**2)
        return Work(inputs, providers, lambda q, k, v: in_pieces(q, k, v, fixed_mask), costs, 3,
                    notes=[f"{pairs:,} visible pairs, {share:.3f} of all"], operations=("attention",))

    return make


CPU = {"rows": 1, "heads": 8, "kv_heads": 4, "head_dim": 64, "length": 4096}
GPU = {"rows": 4, "heads": 32, "kv_heads": 8, "head_dim": 128, "length": 8192}
TINY = {"rows": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "length": 96}


def without_length(shape: dict) -> dict:
    return {key: value for key, value in shape.items() if key != "length"}


PRESETS = {
    "packed": Preset(
        "causal documents packed into rows", build("packed"),
        {"cpu": CPU | {"documents": 16}, "cuda": GPU | {"documents": 16}, "tiny": TINY | {"documents": 5}},
        {"cpu": [Target("time", step, ANY_DENSE, at_least=2.0) for step in ("forward", "both", "fresh both")],
         "cuda": [Target("time", "fresh both", ANY_DENSE, at_least=3.0),
                  Target("time", "fresh both", (FLEX,), at_least=1.2)]},
    ),
    "causal": Preset(
        "plain causal rows", build("causal"),
        {"cpu": CPU | {"length": 2048}, "cuda": GPU, "tiny": TINY},
        {"cuda": [Target("time", "forward", (FLASH,), at_least=1.3), Target("time", "forward", (CUDNN,), at_least=0.75),
                  Target("time", "forward", (FLEX,), at_least=1.0), Target("time", "backward", (FLASH,), at_least=0.9),
                  Target("time", "backward", (FLEX,), at_least=1.0)]},
    ),
    "shared-prefix": Preset(
        "one picture and independent questions about it in a row", build("shared"),
        {"cpu": without_length(CPU) | {"prefix": 1024, "questions": 8, "question": 64},
         "cuda": without_length(GPU) | {"prefix": 4096, "questions": 8, "question": 512},
         "tiny": without_length(TINY) | {"prefix": 40, "questions": 3, "question": 9}},
        {"cuda": [Target("time", "fresh both", ANY_DENSE, at_least=3.0),
                  Target("time", "fresh both", (FLEX,), at_least=1.2)]},
    ),
    "window": Preset(
        "a window and sinks within documents", build("window"),
        {"cpu": CPU | {"documents": 4, "window": 256, "sinks": 4},
         "cuda": GPU | {"documents": 2, "window": 1024, "sinks": 4},
         "tiny": TINY | {"documents": 3, "window": 16, "sinks": 2}},
        {"cuda": [Target("time", "fresh both", (FLEX,), at_least=1.2)]},
    ),
}

main = command.main("attention", __doc__, PRESETS)

if __name__ == "__main__":
    main()
