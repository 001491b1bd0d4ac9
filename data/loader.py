"""Training batches: documents of codes shards, ordered, packed and masked.

What comes when is a pure function of (seed, epoch, position): the documents of an epoch are permuted, windows of
positions are packed into rows, the rows of a window are permuted, and steps take rows one after another. Ranks take
slices of a step, so every world size sees the same global sequence, and the loader's state is three small numbers.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, create_model

from onevocab.common.errors import UserError
from onevocab.common.files import hash_json
from onevocab.common.paths import HomePath
from onevocab.data.documents import BadSamples
from onevocab.data.packing import pack
from onevocab.data.shards.remote import list_sources, shown
from onevocab.data.token_cache import DROPPABLE, LOSS, TokenCache
from onevocab.tokenizers.bundle import Tokenizers
from onevocab.tokenizers.modalities import MODALITIES

ORDER, ROWS, EXTRAS, CAPTIONS, SWAPS = range(5)  # streams of random numbers, one use each


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


class Source(BaseModel):
    """Shards that a stage reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: HomePath = Field(description="shards: a file, a folder, a glob or an address (https://, s3://, ...)")
    repeat: float = Field(1.0, gt=0, description="how often an epoch shows each sample (2.5: twice, and a changing "
                          "half of them once more)")
    weight: float | None = Field(None, gt=0, description="instead of repeat, this source's share of an epoch's samples")


@dataclass
class Batch:
    """B rows of S tokens; position t predicts token t + 1.

    ids, targets, positions: int64 (B, S), positions restart at 0 in every document; loss_weights: float32 (B, S), 0
    where nothing is to be predicted (padding, a document's last token); modality: uint8 (B, S) of the target, an index
    into the vocabulary's modalities; document_ids: int32 (B, S), a document's number in its row, -1 for padding.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    loss_weights: torch.Tensor
    modality: torch.Tensor
    positions: torch.Tensor
    document_ids: torch.Tensor

    def to(self, device, non_blocking: bool = True) -> "Batch":
        return Batch(**{name: value.to(device, non_blocking=non_blocking) for name, value in vars(self).items()})


def _raw(n: int, seed: int, stream: int, a: int = 0, b: int = 0) -> np.ndarray:
    """n random uint64 of Philox (Salmon et al., SC 2011): the raw stream, which no numpy version changes."""
    key = np.array([seed % 2**64, stream << 56 | a], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, b, 0], np.uint64)).random_raw(n)


def _uniform(raw: np.ndarray) -> np.ndarray:
    return (raw >> np.uint64(11)) * 2.0**-53


def _permutation(n: int, seed: int, stream: int, a: int = 0, b: int = 0) -> np.ndarray:
    return np.argsort(_raw(n, seed, stream, a, b), kind="stable")


class PackedLoader:
    """Yields `Batch` for ever, epoch after epoch; `state_dict()` says what was consumed.

    sources: one or several of `Source`, or paths; each a folder, glob or shard of codes, or of raw media, which are
    encoded here (slowly). cache_folder: for encoded documents, which are then read from there (data/token_cache.py);
    without it they are encoded at every start and stay in memory; workers: processes that encode what is not kept yet
    (0 and 1: this one). Plain texts longer than a row are cut into several documents, other documents never. Raises
    UserError when there are no usable samples, a larger share of bad ones than `max_bad_fraction`, codes of other
    tokenizers, or rows that do not divide over the ranks.
    """

    def __init__(self, sources, tokenizers: Tokenizers, config: LoaderConfig | None = None, rank: int = 0,
                 world: int = 1, seed: int = 0, cache_folder: Path | None = None, workers: int = 1,
                 max_bad_fraction: float = 0.01):
        self.config = config = config or LoaderConfig()
        self.rank, self.world, self.seed, self.vocab = rank, world, seed, tokenizers.vocab
        if config.global_batch_size % world:
            raise UserError(f"global_batch_size = {config.global_batch_size} does not divide over {world} ranks; "
                            "choose a multiple")
        sources = [sources] if isinstance(sources, str | Path | Source) else list(sources)
        self.sources = [s if isinstance(s, Source) else Source(path=str(s)) for s in sources]
        self.bad = BadSamples(max_bad_fraction)
        shards = [list_sources(source.path) for source in self.sources]
        self._cache = TokenCache(tokenizers, cache_folder)
        self._cache.prepare(list(itertools.chain(*shards)), workers, rank)
        for shard in itertools.chain(*shards):
            self._cache.add(shard, self.bad)
        self.bad.finish()
        per_shard = self._cache.freeze(config.seq_len)
        self._counts = [int(part.sum()) for part in np.split(per_shard, np.cumsum([len(s) for s in shards])[:-1])]
        self._count_positions()
        names = self.vocab.modalities
        self._modality_of = self.vocab.modality_of(np.arange(self.vocab.size))
        self._weight_of = np.array([getattr(config.loss, name, 1.0) for name in names], np.float32)[self._modality_of]
        self.fingerprint = hash_json([
            seed, config.seq_len, config.window, config.condition_dropout, config.text_first, self._slots,
            self._cache.crcs])
        self._epoch, self._window, self._row = 0, 0, 0
        self._plan: tuple | None = None
        self._cached: tuple | None = None

    def _count_positions(self) -> None:
        """How many times an epoch shows each source's samples: `_slots`, per source its number of positions."""
        empty = [shown(source.path) for source, n in zip(self.sources, self._counts, strict=True) if not n]
        if empty:
            raise UserError(f"{empty[0]} holds no samples; make its shards again")
        weights = [source.weight for source in self.sources]
        if any(weights) and not all(weights):
            raise UserError("either all sources have a weight or none has")
        total = sum(self._counts)
        self._slots = [max(1, round(total * w / sum(weights) if w else n * source.repeat))
                       for n, w, source in zip(self._counts, weights, self.sources, strict=True)]
        self.epoch_length = sum(self._slots)
        usable = (self._cache.length > 0) & (self._cache.length <= self.config.seq_len)
        self.too_long = int((self._cache.length > self.config.seq_len).sum())
        if not usable.any():
            raise UserError(f"no document fits a row of {self.config.seq_len} tokens; make seq_len larger")

    def summary(self) -> dict:
        """Counts for a log: samples, bad, documents too long for a row (dropped), tokens per modality."""
        return {"samples": self._cache.samples, "bad": self.bad.bad, "too_long": self.too_long,
                "pairs": int((self._cache.split > 0).sum()), "epoch_length": self.epoch_length,
                "tokens": dict(zip(self.vocab.modalities, self._cache.modality_counts.tolist(), strict=True))}

    def per_source(self) -> list[tuple[str, int, int, float]]:
        """(path, documents, tokens, how often an epoch shows each) of each source."""
        counts, first = [], 0
        for source, n, slots in zip(self.sources, self._counts, self._slots, strict=True):
            counts.append((source.path, n, int(self._cache.length[first : first + n].sum()), slots / n))
            first += n
        return counts

    # ------------------------------------------------------------------------------------------------ order

    def plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(document, swapped, words dropped) at every position of an epoch."""
        if self._plan is None or self._plan[0] != epoch:
            self._plan = epoch, self._make_plan(epoch)
        return self._plan[1]

    def _make_plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        documents, first = [], 0
        for number, (n, slots) in enumerate(zip(self._counts, self._slots, strict=True)):
            extras = _permutation(n, self.seed, EXTRAS, epoch, number)[: slots % n]
            documents.append(first + np.concatenate([np.tile(np.arange(n), slots // n), np.sort(extras)]))
            first += n
        documents = np.concatenate(documents)
        store, n = self._cache, len(documents)
        # Steps of the golden ratio: over the epochs a pair's two orders come as evenly as the share allows.
        coin = (_uniform(_raw(n, self.seed, SWAPS)) + epoch * 0.6180339887498949) % 1.0
        text_first = coin < np.where(store.has_text[documents], self.config.text_first, 0.5)
        swapped = (store.split[documents] > 0) & (text_first == store.text_second[documents])
        dropped = _uniform(_raw(n, self.seed, CAPTIONS, epoch)) < self.config.condition_dropout
        text_leads = store.text_second[documents] == swapped  # of a pair: only then the medium is made from it
        dropped &= (store.drop[documents] > 0) & ((store.split[documents] == 0) | text_leads)
        order = _permutation(n, self.seed, ORDER, epoch)
        return documents[order], swapped[order], dropped[order]

    @property
    def windows(self) -> int:
        """Windows in an epoch."""
        return -(-self.epoch_length // self.config.window)

    def rows(self, epoch: int, window: int) -> list[list[tuple[int, bool, bool]]]:
        """The rows of a window: lists of (document, swapped, words dropped)."""
        if self._cached is None or self._cached[0] != (epoch, window):
            here = slice(window * self.config.window, (window + 1) * self.config.window)
            documents, swapped, dropped = (values[here] for values in self.plan(epoch))
            lengths = self._cache.length[documents] - np.where(dropped, self._cache.drop[documents], 0)
            packed = pack(lengths, self.config.seq_len).rows
            entries = list(zip(documents.tolist(), swapped.tolist(), dropped.tolist(), strict=True))
            order = _permutation(len(packed), self.seed, ROWS, epoch, window)
            self._cached = (epoch, window), [[entries[i] for i in packed[row]] for row in order]
        return self._cached[1]

    def _next_rows(self) -> list[list[tuple[int, bool, bool]]]:
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

    def tokens_of(self, document: int, swapped: bool, dropped: bool) -> tuple[np.ndarray, np.ndarray]:
        """A document as it is shown: ids int32 (n,), and whether predicting each counts, bool (n,)."""
        store = self._cache
        (ids, flags), split = store[document], store.split[document]
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
        rows = rows[self.rank * share : (self.rank + 1) * share]
        shape = (share, self.config.seq_len)
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
