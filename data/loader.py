"""Training batches: documents of codes shards, ordered, packed and masked.

What comes when is a pure function of (seed, epoch, position): the documents of an epoch are permuted, windows of
positions are packed into rows, the rows of a window are permuted, and steps take rows one after another. Ranks take
slices of a step, so every world size sees the same global sequence, and the loader's state is three small numbers.
"""

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, create_model

from onevocab.common.errors import UserError
from onevocab.common.files import hash_json
from onevocab.data.documents import BadSamples
from onevocab.data.draws import permutation, raw, uniform
from onevocab.data.held_out import limits, real
from onevocab.data.packing import pack
from onevocab.data.shards.remote import list_sources, shown
from onevocab.data.source import Source
from onevocab.data.token_cache import DROPPABLE, HASHES, LOSS, TokenCache
from onevocab.data.turns import Entry, Turns, read_wordings
from onevocab.tokenizers.bundle import Tokenizers
from onevocab.tokenizers.modalities import MODALITIES

ORDER, ROWS, EXTRAS, CAPTIONS, SWAPS, WORDINGS = range(6)  # streams of random numbers, one use each


class _LossWeights(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    context_weight: float = Field(0.05, ge=0, description="factor on the weight of tokens that are context, not "
                                  "answer")


# Weight of a predicted token by its modality.
LossWeights = create_model("LossWeights", __base__=_LossWeights, **{
    name: (float, Field(1.0, ge=0, description=f"weight of a predicted token of {name}"))
    for name in ("text", *MODALITIES)})


class LoaderConfig(BaseModel):
    """How documents become the rows of a step."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    seq_len: int = Field(512, ge=8, description="tokens of a row")
    global_batch_size: int = Field(16, ge=1, description="rows of a step, over all ranks")
    window: int = Field(4096, ge=1, description="documents among which those of a row are chosen")
    condition_dropout: float = Field(0.1, ge=0, le=1, description="how often the words before a medium that is made "
                                     "from them are left out, so that guidance can be used")
    text_first: float = Field(0.5, ge=0, le=1, description="share of pairs with a text that show the text first")
    loss: LossWeights = LossWeights()


@dataclass
class Batch:
    """B rows of S tokens; position t predicts token t + 1.

    ids, targets, positions: int64 (B, S), positions restart at 0 in every document; loss_weights: float32 (B, S), 0
    where nothing is to be predicted (padding, a document's last token); modality: uint8 (B, S) of the target, an index
    into the vocabulary's modalities; document_ids: int32 (B, S), a document's number in its row, -1 for padding.
    mean_keys: how many tokens one sees of its document, the mean; known of a batch that was moved to a GPU.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    loss_weights: torch.Tensor
    modality: torch.Tensor
    positions: torch.Tensor
    document_ids: torch.Tensor
    mean_keys: ClassVar[float | None] = None  # no column

    def to(self, device, non_blocking: bool = True) -> "Batch":
        moved = Batch(**{name: value.to(device, non_blocking=non_blocking) for name, value in self._columns().items()})
        if self.mean_keys is not None:
            moved.mean_keys = self.mean_keys
        elif self.ids.device.type == "cpu" != moved.ids.device.type:  # on a GPU looking would wait for it
            moved.mean_keys = float((self.positions + 1)[self.document_ids >= 0].float().mean())
        return moved

    def part(self, start: int, stop: int) -> "Batch":
        """Its rows start .. stop - 1."""
        rows = Batch(**{name: value[start:stop] for name, value in self._columns().items()})
        if self.mean_keys is not None:
            rows.mean_keys = self.mean_keys
        return rows

    def _columns(self) -> dict[str, torch.Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


class PackedLoader:
    """Yields `Batch` for ever, epoch after epoch; `state_dict()` says what was consumed.

    sources: one or several of `Source`, or paths, of which nothing is held out; each a folder, glob or shard of codes,
    or of raw media, which are encoded here (slowly). instruct: whether it is for instruction tuning, which decides what
    `turns = "auto"` is. cache_folder: for encoded documents, which are then read from there (data/token_cache.py);
    without it they are encoded at every start and stay in memory; workers: processes that encode what is not kept yet
    (0 and 1: this one). Plain texts longer than a row are cut into several documents, other documents never. Raises
    UserError when there are no usable samples, a larger share of bad ones than `max_bad_fraction`, codes of other
    tokenizers, or rows that do not divide over the ranks.
    """

    def __init__(self, sources, tokenizers: Tokenizers, config: LoaderConfig | None = None, rank: int = 0,
                 world: int = 1, seed: int = 0, cache_folder: Path | None = None, workers: int = 1,
                 max_bad_fraction: float = 0.01,
                 instruct: bool = False):
        self.config = config = config or LoaderConfig()
        self.rank, self.world, self.seed, self.vocab = rank, world, seed, tokenizers.vocab
        if config.global_batch_size % world:
            raise UserError(f"global_batch_size = {config.global_batch_size} does not divide over {world} ranks; "
                            "choose a multiple")
        sources = [sources] if isinstance(sources, str | Path | Source) else list(sources)
        self.sources = [s if isinstance(s, Source) else Source(path=str(s), valid=0.0) for s in sources]
        self.bad = BadSamples(max_bad_fraction)
        files = [read_wordings(source.wordings) for source in self.sources]
        self._shards = shards = [list_sources(path) for path in [*(source.path for source in self.sources), *(
            source.valid_path for source in self.sources if source.valid_path is not None)]]
        self._cache = TokenCache(tokenizers, cache_folder)
        self._cache.prepare(list(itertools.chain(*shards)), workers, rank)
        for shard in itertools.chain(*shards):
            self._cache.add(shard, self.bad)
        self.bad.finish()
        per_shard = self._cache.freeze(config.seq_len)
        self._take_turns(Turns(tokenizers, files), shards, per_shard, instruct)
        self._hold_out(shards, per_shard)
        self._count_positions()
        names = self.vocab.modalities
        self._modality_of = self.vocab.modality_of(np.arange(self.vocab.size))
        self._weight_of = np.array([getattr(config.loss, name, 1.0) for name in names], np.float32)[self._modality_of]
        self.fingerprint = hash_json([
            seed, config.seq_len, config.window, config.condition_dropout, config.text_first, self._slots,
            self._cache.crcs, [zlib.crc32(documents) for documents in self._trained],
            [file.model_dump() if asks else None for file, asks in zip(files, self.asks, strict=True)]])
        self._epoch, self._window, self._row = 0, 0, 0
        self._plan: tuple | None = None
        self._cached: tuple | None = None

    def _take_turns(self, turns: Turns, shards: list[list[str]], per_shard: np.ndarray, instruct: bool) -> None:
        """Which source each document is of, and which of them are shown as conversations."""
        store, self._turns = self._cache, turns
        apart = [number for number, source in enumerate(self.sources) if source.valid_path is not None]
        of_shard = np.repeat([*range(len(self.sources)), *apart], [len(part) for part in shards])
        self._source = np.repeat(of_shard, per_shard)
        self._for_valid = np.repeat(np.repeat(np.arange(len(shards)) >= len(self.sources), list(map(len, shards))),
                                    per_shard)
        auto = instruct and not store.talk.any()
        self.asks = [source.turns == "captions" or (source.turns == "auto" and auto) for source in self.sources]
        self._asked = np.array(self.asks)[self._source] & (store.caption != 0) & (store.length > 0)
        self._kind = turns.kind(store.media)
        longest = store.length + np.where(self._asked, 4 + turns.longest[self._source, self._kind], 0)
        self._fits = (store.length > 0) & (longest <= self.config.seq_len)
        self.too_long = int((longest > self.config.seq_len).sum())
        self._text_second = np.where(self._asked, store.caption > 0, store.text_second)
        self._both_orders = self._asked | (store.split > 0)
        self._text_share = np.where(self._asked | store.has_text, self.config.text_first, 0.5)

    def _hold_out(self, shards: list[list[str]], per_shard: np.ndarray) -> None:
        """Which documents are trained on, by source (`_trained`), and which never are (`_held`)."""
        usual, places = shards[: len(self.sources)], list(itertools.chain(*shards))
        store, apart = self._cache, [source.valid_path is not None for source in self.sources]
        there = [(self._source == number) & ~self._for_valid for number in range(len(self.sources))]
        self.limits = limits([source.valid for source in self.sources], apart, usual,
                             [store.hash[mine & (store.length > 0)] for mine in there], places[sum(map(len, usual)) :])
        self._shard = np.repeat(np.arange(len(places)), per_shard)
        held = store.hash < np.array([self.limits[path] for path in places])[self._shard]
        self._trained = [np.flatnonzero(mine & ~held) for mine in there]
        self._held = np.flatnonzero(held & self._fits)

    def measure_below(self, limits: dict[str, int]) -> int:
        """Of the held-out samples of these shards only those below their limit stay: others are trained on elsewhere.
        limits: see `held_out.together`. Returns how many are dropped."""
        most = np.array([limits.get(real(path), HASHES) for path in itertools.chain(*self._shards)])[self._shard]
        kept = self._cache.hash[self._held] < most[self._held]
        self._held = self._held[kept]
        return int((~kept).sum())

    def _count_positions(self) -> None:
        """How many times an epoch shows each source's samples: `_slots`, per source its number of positions."""
        self._counts = [len(documents) for documents in self._trained]
        empty = [shown(source.path) for source, n in zip(self.sources, self._counts, strict=True) if not n]
        if empty:
            raise UserError(f"{empty[0]} holds no samples to train on; make its shards again")
        weights = [source.weight for source in self.sources]
        if any(weights) and not all(weights):
            raise UserError("either all sources have a weight or none has")
        total = sum(self._counts)
        self._slots = [max(1, round(total * w / sum(weights) if w else n * source.repeat))
                       for n, w, source in zip(self._counts, weights, self.sources, strict=True)]
        self.epoch_length = sum(self._slots)
        if not self._fits[np.concatenate(self._trained)].any():
            raise UserError(f"no document fits a row of {self.config.seq_len} tokens; make seq_len larger")

    def summary(self) -> dict:
        """Counts for a log: samples, bad, documents too long for a row (dropped), held out, pairs, those shown as
        conversations and those that cannot be although their source says so, tokens per modality."""
        store, asks = self._cache, np.array(self.asks)[self._source]
        counts = {"samples": store.samples, "bad": self.bad.bad, "too_long": self.too_long,
                  "held_out": len(self._held), "pairs": int((store.split > 0).sum())}
        if asks.any():
            counts |= {"captions_with_turns": int(self._asked.sum()),
                       "without_turns": int((asks & ~self._asked & ~store.talk & (store.length > 0)).sum())}
        return counts | {"epoch_length": self.epoch_length, "tokens": dict(
            zip(self.vocab.modalities, store.modality_counts.tolist(), strict=True))}

    def remarks(self) -> list[str]:
        """What was chosen or cannot be done, a line each."""
        store, lines = self._cache, []
        if self._asked.any() and not any(source.turns == "captions" for source in self.sources):
            lines.append('none of its samples is a conversation: captions are shown as requests and answers (turns = '
                         '"auto"; "as_is" shows them as they are)')
        if self._asked.any() and (left := self.summary()["without_turns"]):
            lines.append(f"{left:,} documents are not media with one caption, and are shown as they are, without turns")
        if store.samples and not len(self._held) and any(source.valid != 0 for source in self.sources):
            lines.append("its samples are too few, or too many are alike, to hold some out: no loss on held-out data")
        return lines

    def per_source(self) -> list[tuple[str, int, int, float]]:
        """(path, documents, tokens, how often an epoch shows each) of each source, without what is held out."""
        return [(source.path, n, int(self._cache.length[documents].sum()), slots / n)
                for source, n, documents, slots in zip(self.sources, self._counts, self._trained, self._slots,
                                                       strict=True)]

    # ------------------------------------------------------------------------------------------------ order

    def plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The columns of `Entry` at every position of an epoch."""
        if self._plan is None or self._plan[0] != epoch:
            self._plan = epoch, self._make_plan(epoch)
        return self._plan[1]

    def _make_plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        documents = []
        for number, (trained, slots) in enumerate(zip(self._trained, self._slots, strict=True)):
            n = len(trained)
            extras = permutation(n, self.seed, EXTRAS, epoch, number)[: slots % n]
            documents += [np.tile(trained, slots // n), trained[np.sort(extras)]]
        documents = np.concatenate(documents)
        store, n = self._cache, len(documents)
        # Steps of the golden ratio: over the epochs a pair's two orders come as evenly as the share allows.
        coin = (uniform(raw(n, self.seed, SWAPS)) + epoch * 0.6180339887498949) % 1.0
        swapped, made = self._orders(documents, coin)
        dropped = uniform(raw(n, self.seed, CAPTIONS, epoch)) < self.config.condition_dropout
        dropped &= np.where(self._asked[documents], made,
                            (store.drop[documents] > 0) & ((store.split[documents] == 0) | made))
        wording = self._wording(documents, made, raw(n, self.seed, WORDINGS, epoch) if self._asked.any() else 0)
        order = permutation(n, self.seed, ORDER, epoch)
        return documents[order], swapped[order], dropped[order], wording[order]

    def _orders(self, documents: np.ndarray, coin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(whether a document of two parts is swapped, whether its text then comes first, so that its medium is made
        from it), by a number from 0 to 1 for each."""
        text_first, text_second = coin < self._text_share[documents], self._text_second[documents]
        swapped = self._both_orders[documents] & (text_first == text_second)
        return swapped, text_second == swapped

    def _wording(self, documents: np.ndarray, made: np.ndarray, drawn) -> np.ndarray:
        numbers = self._turns.numbers[self._source[documents], self._kind[documents], made.astype(np.int64)]
        return np.where(self._asked[documents], drawn % numbers.astype(np.uint64), -1).astype(np.int64)

    @property
    def windows(self) -> int:
        """Windows in an epoch."""
        return -(-self.epoch_length // self.config.window)

    def rows(self, epoch: int, window: int) -> list[list[Entry]]:
        """The rows of a window."""
        if self._cached is None or self._cached[0] != (epoch, window):
            here = slice(window * self.config.window, (window + 1) * self.config.window)
            packed, entries = self._pack(*(values[here] for values in self.plan(epoch)))
            order = permutation(len(packed), self.seed, ROWS, epoch, window)
            self._cached = (epoch, window), [[entries[i] for i in packed[row]] for row in order]
        return self._cached[1]

    def _pack(self, documents, swapped, dropped, wording) -> tuple[list[list[int]], list[Entry]]:
        """(rows of places in what is given, the entries at these places)."""
        store = self._cache
        entries = list(map(Entry, documents.tolist(), swapped.tolist(), dropped.tolist(), wording.tolist()))
        lengths = store.length[documents] - np.where(dropped, store.drop[documents], 0)
        for place in np.flatnonzero(self._asked[documents] & self._fits[documents]).tolist():
            lengths[place] = len(self.tokens_of(*entries[place])[0])
        return pack(np.where(self._fits[documents], lengths, 0), self.config.seq_len).rows, entries

    def _next_rows(self) -> list[list[Entry]]:
        """The rows of the next step, over all ranks; moves the state on."""
        rows: list = []
        while len(rows) < self.config.global_batch_size:
            here = self.rows(self._epoch, self._window)
            taken = here[self._row : self._row + self.config.global_batch_size - len(rows)]
            rows += taken
            self._row += len(taken)
            if self._row >= len(here):
                self._row, self._window = 0, self._window + 1
                if self._window >= self.windows:
                    self._window, self._epoch = 0, self._epoch + 1
        return rows

    def state_dict(self) -> dict:
        """What was consumed, as JSON: the next step starts at this row of this window of this epoch."""
        return {"epoch": self._epoch, "window": self._window, "row": self._row, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict) -> None:
        """Goes on where `state` ends, with any world size. Raises UserError when data, order or seed are others."""
        if state.get("fingerprint") != self.fingerprint:
            raise UserError("the data, its order or the seed are not those of the checkpoint's run; restore the "
                            "configuration and the shards, or start the stage anew")
        self._epoch, self._window, self._row = state["epoch"], state["window"], state["row"]

    # ------------------------------------------------------------------------------------------------ batches

    def tokens_of(self, document: int, swapped: bool, dropped: bool,
                  wording: int = -1) -> tuple[np.ndarray, np.ndarray]:
        """A document as it is shown: ids int32 (n,), and whether predicting each counts, bool (n,)."""
        store = self._cache
        (ids, flags), split = store[document], store.split[document]
        if wording >= 0:
            caption = int(store.caption[document])
            return self._turns.tokens(ids, caption, (caption > 0) == swapped, dropped, int(self._source[document]),
                                      int(self._kind[document]), wording)
        if split and (swapped or dropped):
            first, second = (ids[split:-1], ids[1:split]) if swapped else (ids[1:split], ids[split:-1])
            if dropped:
                first = first[:0]
            loss = np.ones(len(first) + len(second) + 2, bool)
            loss[: len(first) + 1] = False
            return np.concatenate([ids[:1], first, second, ids[-1:]]), loss
        if dropped:
            kept = (flags & DROPPABLE) == 0
            ids, flags = ids[kept], flags[kept]
        return ids, (flags & LOSS).astype(bool)

    def next_batch(self) -> Batch:
        """This rank's rows of the next step."""
        rows, share = self._next_rows(), self.config.global_batch_size // self.world
        return self._batch(rows[self.rank * share : (self.rank + 1) * share])

    def held_out_samples(self) -> list[tuple[str, int]]:
        """(shard, place in it) of the held-out samples, those with the lowest hashes first."""
        places = list(itertools.chain(*self._shards))
        order = self._held[np.argsort(self._cache.hash[self._held], kind="stable")]
        found = dict.fromkeys(map(self._cache.sample_of, order.tolist()))
        return [(places[shard], place) for shard, place in found]

    def held_out(self, rows: int, micro_batch_size: int = 0) -> list[Batch]:
        """This rank's batches of at most `rows` rows, over all ranks, of held-out samples: the same ones each time, in
        an order and with a request that follow from the sample. Every rank has as many batches; of a large set those
        with the lowest hashes are taken. micro_batch_size: rows of a batch (0: as many as in a step)."""
        store = self._cache
        chosen = self._held[np.argsort(store.hash[self._held], kind="stable")]
        taken = chosen[np.cumsum(store.length[chosen]) <= rows * self.config.seq_len]
        packed, entries = [], []
        while len(taken):
            mixed = store.hash[taken].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # the low hashes, spread
            swapped, made = self._orders(taken, uniform(mixed))
            packed, entries = self._pack(taken, swapped, np.zeros(len(taken), bool),
                                         self._wording(taken, made, mixed >> np.uint64(17)))
            if len(packed) <= rows:
                break
            taken = taken[: len(taken) * rows // len(packed)]
        mine = [[entries[place] for place in row] for row in packed[self.rank :: self.world]]
        each = micro_batch_size or self.config.global_batch_size // self.world
        mine += [[]] * (-(-len(packed) // self.world) - len(mine))
        return [self._batch(mine[first : first + each]) for first in range(0, len(mine), each)]

    def _batch(self, rows: list[list[Entry]]) -> Batch:
        shape = (len(rows), self.config.seq_len)
        ids = np.full(shape, self.vocab.pad, np.int64)
        targets = np.full(shape, self.vocab.pad, np.int64)
        weights, positions = np.zeros(shape, np.float32), np.zeros(shape, np.int64)
        document = np.full(shape, -1, np.int32)
        context_weight = np.float32(self.config.loss.context_weight)
        for r, row in enumerate(rows):
            start = 0
            for number, entry in enumerate(row):
                tokens, loss = self.tokens_of(*entry)
                stop = start + len(tokens)
                ids[r, start:stop] = tokens
                targets[r, start : stop - 1] = tokens[1:]
                weights[r, start : stop - 1] = np.where(loss[1:], np.float32(1), context_weight)
                positions[r, start:stop] = np.arange(stop - start)
                document[r, start:stop] = number
                start = stop
        if ids.min() < 0 or ids.max() >= self.vocab.size:  # files of a stranger, or a disk that fails
            raise UserError("the token cache is damaged: remove the run's folder token_cache/ and start again")
        weights *= self._weight_of[targets]
        arrays = (ids, targets, weights, self._modality_of[targets], positions, document)
        return Batch(*map(torch.from_numpy, arrays))

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next_batch()
