"""The mask of packed rows: at most two intervals of visible keys per query, and what it means for blocks.

Two intervals say: causal, packed documents, windows with sinks, spans that see themselves in full, and documents that
share a prefix (one picture and many questions, one prompt and many answers). Everything here costs O(B * S), once per
batch; all layers and both directions share it. FlashMask (Wang et al. 2024) stores intervals per key column,
MagiAttention and FlexAttention lists of slices or blocks; intervals per query need neither lists nor a compiler.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(eq=False)
class IntervalMask:
    """Query i of row b sees the keys first[b, i] .. last[b, i] and prefix_first[b, i] .. prefix_last[b, i].

    Both ends count, the intervals may overlap. All are int32 (B, S). first > last is an empty interval; a query with
    nothing to see gives zeros, and no gradient. A mask is not changed after its first use.
    """

    first: Tensor
    last: Tensor
    prefix_first: Tensor | None = None
    prefix_last: Tensor | None = None
    document: Tensor | None = None  # (B, S), set by `causal` and `shared_prefix`: a CPU runs document by document
    lengths: Tensor | None = None  # (B,), set by `up_to` for one query a row: a GPU splits the keys between programs
    mean_keys: float | None = None  # keys that a query sees, the mean; None: not known on the host. For block sizes
    _cache: dict = field(default_factory=dict, repr=False)

    @classmethod
    def causal(cls, document: Tensor, mean_keys: float | None = None) -> "IntervalMask":
        """Causal within each run of equal ids in document (B, S); negative is padding, sees nothing.

        mean_keys: how many keys a query sees, the mean, if the caller knows it: where it is small, a GPU takes smaller
        blocks. It is not looked up on the device, where looking would wait for all that runs there.
        """
        padding = document < 0
        return cls(
            _run_starts(document).masked_fill(padding, 1).int(),
            _index(document).masked_fill(padding, 0),
            document=document,
            mean_keys=mean_keys,
        )

    @classmethod
    def shared_prefix(cls, document: Tensor, prefix: Tensor) -> "IntervalMask":
        """Like `causal`; besides, a position sees the whole document whose id stands in prefix (B, S), negative: none.

        document [0 0 0 1 1 2 2] with prefix [-1 -1 -1 0 0 0 0]: 1 and 2 see 0 but not each other. An id that serves as
        a prefix is one run of its row; the same prefix for all of a document. Raises ValueError for shapes that differ
        and, on a CPU (where looking costs nothing), for a prefix that is not in its row.
        """
        if document.shape != prefix.shape:
            raise ValueError(f"shared_prefix: document {tuple(document.shape)}, prefix {tuple(prefix.shape)} differ")
        mask = cls.causal(document)
        ids, order = document.sort(dim=1, stable=True)  # equal ids keep their order: ends of a run are neighbours here
        wanted = prefix.to(ids.dtype).contiguous()
        begin, end = torch.searchsorted(ids, wanted), torch.searchsorted(ids, wanted, right=True)
        used = (prefix >= 0) & (document >= 0)
        seen = used & (begin < end)
        if document.device.type == "cpu" and bool((used & ~seen).any()):
            row, at = (used & ~seen).nonzero()[0].tolist()
            raise ValueError(f"shared_prefix: position {at} of row {row} names prefix {int(prefix[row, at])}, "
                             "which is not in that row")
        if document.device.type == "cpu" and bool((seen & (prefix == document)).any()):
            mask.document = None  # sees itself in full: the intervals overlap, the dense way counts once
        limit = document.shape[1] - 1
        mask.prefix_first = order.gather(1, begin.clamp(max=limit)).masked_fill(~seen, 1).int()
        mask.prefix_last = order.gather(1, (end - 1).clamp(min=0)).masked_fill(~seen, 0).int()
        return mask

    @classmethod
    def windowed(cls, document: Tensor, window: int, sinks: int = 0) -> "IntervalMask":
        """Like `causal`, but only the last `window` keys, oneself included, and the document's first `sinks`.

        Sinks as in StreamingLLM (Xiao et al. 2023). Raises ValueError unless window >= 1 and sinks >= 0.
        """
        if window < 1 or sinks < 0:
            raise ValueError(f"windowed: window {window} must be at least 1, sinks {sinks} at least 0")
        start, index, padding = _run_starts(document), _index(document), document < 0
        first = torch.maximum(start, index - (window - 1)).masked_fill(padding, 1)
        mask = cls(first.int(), index.masked_fill(padding, 0), mean_keys=window + sinks)
        if sinks:
            mask.prefix_first = start.masked_fill(padding, 1).int()
            mask.prefix_last = torch.minimum(start + sinks - 1, index).masked_fill(padding, 0).int()
        return mask

    @classmethod
    def up_to(cls, positions: Tensor) -> "IntervalMask":
        """Every key from 0 to positions (B, S), for decoding from a cache; negative is padding."""
        last = positions.int()
        return cls((last < 0).int(), last.clamp(min=0), lengths=last[:, 0] + 1 if last.shape[1] == 1 else None)

    def dense(self, n_keys: int) -> Tensor:
        """bool (B, 1, S, n_keys), True where a query sees a key; computed once per mask and n_keys."""
        if n_keys not in self._cache:
            keys = torch.arange(n_keys, device=self.first.device, dtype=torch.int32)
            visible = (keys >= self.first[..., None]) & (keys <= self.last[..., None])
            if self.prefix_first is not None:
                visible |= (keys >= self.prefix_first[..., None]) & (keys <= self.prefix_last[..., None])
            self._cache[n_keys] = visible[:, None]
        return self._cache[n_keys]

    def empty(self, n_keys: int) -> Tensor | None:
        """bool (B, 1, S, 1), True where a query sees nothing; None when there is no such query."""
        key = ("empty", n_keys)
        if key not in self._cache:
            empty = ~self.dense(n_keys).any(-1, keepdim=True)
            self._cache[key] = empty if bool(empty.any()) else None
        return self._cache[key]

    def runs(self) -> tuple[list[int], list[bool]]:
        """Lengths of the documents along the flattened (B * S) positions, and which of them are padding."""
        if "runs" not in self._cache:
            starts = self._starts()
            lengths = torch.diff(starts, append=starts.new_tensor([self.document.numel()]))
            self._cache["runs"] = lengths.tolist(), (self.document.flatten()[starts] < 0).tolist()
        return self._cache["runs"]

    def prefixes(self) -> list[tuple[slice, slice]]:
        """(queries, keys) along the flattened positions: neighbouring documents and the prefix that all of them see."""
        if "prefixes" not in self._cache:
            prefixes: list[tuple[slice, slice]] = []
            if self.prefix_first is not None:
                starts, length = self._starts(), self.document.shape[1]
                ends = (x.flatten()[starts].tolist() for x in (self.prefix_first, self.prefix_last))
                for start, n, a, b in zip(starts.tolist(), self.runs()[0], *ends, strict=True):
                    row = start - start % length
                    keys = slice(row + a, row + b + 1)
                    if a > b:
                        continue
                    if prefixes and prefixes[-1][0].stop == start and prefixes[-1][1] == keys:
                        prefixes[-1] = slice(prefixes[-1][0].start, start + n), keys
                    else:
                        prefixes.append((slice(start, start + n), keys))
            self._cache["prefixes"] = prefixes
        return self._cache["prefixes"]

    def intervals(self, n_keys: int) -> Tensor:
        """int32 (B, 2 or 4, S): first, last (, second first, second last), disjoint, sorted, within 0 .. n_keys - 1.

        An empty interval is n_keys .. -1, so that minima and maxima over queries pass it by. Intervals that overlap or
        touch become one, so a kernel may add up both without counting a key twice.
        """
        key = ("intervals", n_keys)
        if key not in self._cache:
            a, b = _clean(self.first, self.last, n_keys)
            parts = [a, b]
            if self.prefix_first is not None:
                c, d = _clean(self.prefix_first, self.prefix_last, n_keys)
                swap = c < a
                a, b, c, d = (torch.where(swap, *pair) for pair in ((c, a), (d, b), (a, c), (b, d)))
                touch = c <= b + 1
                b = torch.where(touch, torch.maximum(b, d), b)
                parts = [a, b, c.masked_fill(touch, n_keys), d.masked_fill(touch, -1)]
            self._cache[key] = torch.stack(parts, 1).int()
        return self._cache[key]

    def pairs(self, n_keys: int) -> int:
        """How many (query, key) pairs of all rows are visible: what a kernel's FLOPs are counted from."""
        return visible_pairs(self.intervals(n_keys))

    def plan(self, n_keys: int, block_q: int, block_k: int) -> Tensor:
        """int32 (B, query blocks, 4 or 8): for each interval lo, full_lo, full_hi, hi in units of key blocks.

        Key blocks outside lo .. hi - 1 are skipped; those in full_lo .. full_hi - 1 are seen in full by every query of
        the block and need no mask arithmetic.
        """
        key = ("plan", n_keys, block_q, block_k)
        if key not in self._cache:
            spans = self.intervals(n_keys)
            pad = -spans.shape[2] % block_q  # queries beyond the end restrict nothing
            # (B, intervals, blocks, block_q); the padding is a minimum's or a maximum's neutral element
            first_low, first_high, last_low, last_high = (
                F.pad(spans[:, kind::2], (0, pad), value=value).unflatten(2, (-1, block_q)).aminmax(dim=-1)[end]
                for kind, value, end in ((0, n_keys, 0), (0, -1, 1), (1, n_keys, 0), (1, -1, 1))
            )
            lo, hi = first_low // block_k, last_high // block_k + 1
            full_lo, full_hi = (first_high + block_k - 1) // block_k, (last_low + 1) // block_k
            nothing = first_low >= n_keys
            lo, hi = lo.masked_fill(nothing, 0), hi.masked_fill(nothing, 0)
            never = full_lo >= full_hi
            full_lo, full_hi = torch.where(never, lo, full_lo), torch.where(never, lo, full_hi)
            self._cache[key] = torch.stack([lo, full_lo, full_hi, hi], -1).transpose(1, 2).flatten(2).int()
        return self._cache[key]

    def transposed_plan(self, n_keys: int, block_q: int, block_k: int) -> Tensor:
        """int32 (B, key blocks, 4 or 8): as `plan`, in units of query blocks, for each block of keys."""
        key = ("transposed", n_keys, block_q, block_k)
        if key not in self._cache:
            n_blocks = -(-n_keys // block_k)
            plan = self.plan(n_keys, block_q, block_k).unflatten(2, (-1, 4)).long()  # (B, query blocks, intervals, 4)
            lo, full_lo, full_hi, hi = plan.permute(3, 0, 2, 1).flatten(1, 2)  # each (B * intervals, query blocks)
            if self.first.shape[1] % block_q:  # the last block is not whole: its queries' ends need checks
                full_hi = torch.cat([full_hi[:, :-1], full_lo[:, -1:]], 1)
            low, high, _ = _transpose(lo, hi, n_blocks)
            full_low, full_high, count = _transpose(full_lo, full_hi, n_blocks)
            whole = (count > 0) & (count == full_high - full_low)  # full query blocks without a gap
            full_low, full_high = torch.where(whole, full_low, low), torch.where(whole, full_high, low)
            parts = torch.stack([low, full_low, full_high, high], -1)
            self._cache[key] = parts.unflatten(0, (len(plan), -1)).transpose(1, 2).flatten(2).int().contiguous()
        return self._cache[key]

    def _starts(self) -> Tensor:
        """Where along the flattened positions a document begins; rows never share one."""
        return _cuts(self.document).flatten().nonzero().squeeze(1)


def visible_pairs(intervals: Tensor) -> int:
    """Visible (query, key) pairs of `IntervalMask.intervals` (B, 2 or 4, S)."""
    return int((intervals[:, 1::2] - intervals[:, ::2] + 1).clamp(min=0).sum())


def _index(document: Tensor) -> Tensor:
    return torch.arange(document.shape[1], device=document.device, dtype=torch.int32).expand_as(document)


def _cuts(document: Tensor) -> Tensor:
    cut = torch.ones_like(document, dtype=torch.bool)
    cut[:, 1:] = document[:, 1:] != document[:, :-1]
    return cut


def _run_starts(document: Tensor) -> Tensor:
    """int32 (B, S): where the run of equal ids begins that a position belongs to."""
    return torch.where(_cuts(document), _index(document), 0).cummax(1).values


def _clean(first: Tensor, last: Tensor, n_keys: int) -> tuple[Tensor, Tensor]:
    first, last = first.clamp(min=0), last.clamp(max=n_keys - 1)
    empty = first > last
    return first.masked_fill(empty, n_keys), last.masked_fill(empty, -1)


def _transpose(lo: Tensor, hi: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ranges lo .. hi - 1 (R, m) within n -> for each of the n places: the first range that holds it, the last one + 1,
    and how many do. Places that none holds give 0, 0, 0.

    A range is covered by two of a power of two's length, as in a sparse table; each level then hands its minimum and
    maximum to the two halves below: O((m + n) log n).
    """
    rows, m = lo.shape
    number = torch.arange(m, device=lo.device).expand(rows, m)
    used = hi > lo
    ends = lo.new_zeros(rows, n + 1).scatter_add_(1, lo, used.long()).scatter_add_(1, hi, -used.long())
    levels = max(n.bit_length(), 1)
    level = sum(((hi - lo) >= 2**power).long() for power in range(1, levels)) if levels > 1 else torch.zeros_like(lo)
    starts = torch.cat([lo, (hi - 2**level).clamp(min=0)], 1) + torch.cat([level, level], 1) * n
    starts = starts.clamp(max=levels * n - 1)
    both, used = torch.cat([number, number], 1), torch.cat([used, used], 1)
    least = lo.new_full((rows, levels * n), m).scatter_reduce_(1, starts, both.masked_fill(~used, m), "amin")
    most = lo.new_full((rows, levels * n), -1).scatter_reduce_(1, starts, both.masked_fill(~used, -1), "amax")
    least, most = least.unflatten(1, (levels, n)), most.unflatten(1, (levels, n))
    for upper in range(levels - 1, 0, -1):
        half = 2 ** (upper - 1)
        for table, meet in ((least, torch.minimum), (most, torch.maximum)):
            above, below = table[:, upper], table[:, upper - 1]
            below.copy_(meet(below, above))
            below[:, half:] = meet(below[:, half:], above[:, : n - half])
    count = ends.cumsum(1)[:, :n]
    held = count > 0
    return least[:, 0].masked_fill(~held, 0), (most[:, 0] + 1).masked_fill(~held, 0), count
