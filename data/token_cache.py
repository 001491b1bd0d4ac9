"""The documents of shards, encoded and flat: what training reads, again and again and in any order.

Encoding takes one pass over the shards. Its result can be kept in a folder, a file for each shard, and is then mapped
into memory: a second process, or the same run started again, reads it at once, and memory does not grow with the data.
"""

import hashlib
import json
import logging
import os
import zlib
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from onevocab.common.errors import UserError
from onevocab.common.files import locked, write_atomic
from onevocab.common.processes import run_processes
from onevocab.data.documents import BadSample, BadSamples, codes_document
from onevocab.data.shards.format import Sample, read_header
from onevocab.data.shards.index import CHANGED, IndexedShard
from onevocab.data.shards.remote import ShardCache, is_remote, local_name, shown
from onevocab.tokenizers.bundle import Tokenizers
from onevocab.tokenizers.document import Document, Segment, encode_document
from onevocab.tokenizers.vocabulary import Vocabulary

LOSS, DROPPABLE = 1, 2  # flags of a stored token
COLUMNS = (LENGTH, SPLIT, TEXT_SECOND, HAS_TEXT, DROP, TEXT_ONLY, CAPTION, MEDIA, TALK, HASH) = range(10)  # of `about`
HASHES = 1 << 31  # values of HASH
VERSION = "4"  # of what a stored document is; another makes kept files be made again
log = logging.getLogger("onevocab.data")


@dataclass
class ShardTokens:
    """One shard's n documents of t tokens in all.

    tokens: int32 (t,); flags: uint8 (t,), LOSS where predicting the token counts, DROPPABLE where guidance may take it
    away; about: int32 (n, 10) with the columns LENGTH in tokens; SPLIT, for a pair where its second part starts, else
    0; TEXT_SECOND, whether the pair's text is its second part; HAS_TEXT, whether it has one; DROP, how many tokens go
    when the words before a medium are dropped; TEXT_ONLY, whether it is a plain text; CAPTION, of a plain document of
    media and one text the tokens of that text, below 0 where it comes first, else 0; MEDIA, a bit for each of the
    vocabulary's ranges that it shows; TALK, whether it is a conversation; HASH, 31 bits of its media, or of its text
    where it has none. A bad sample is a document of length 0. bad: [key, reason] of these, in order; modality_counts:
    tokens of each of the vocabulary's modalities; crc: of tokens and about; doubtful: the
    shard is damaged, which may be mended without its size and time changing.
    """

    tokens: np.ndarray
    flags: np.ndarray
    about: np.ndarray
    bad: list[list[str]]
    modality_counts: list[int]
    doubtful: bool = False

    @property
    def crc(self) -> int:
        return zlib.crc32(self.about, zlib.crc32(self.tokens))


def droppable(ids: np.ndarray, vocab: Vocabulary, pair: bool) -> np.ndarray:
    """Which tokens of a document guidance may drop, bool (n,).

    In a pair of text and a medium the text; in a conversation the user's text right before an answer with a medium.
    """
    media = np.isin(ids, [span.begin for span in vocab.ranges])
    if not media.any():
        return media
    text = ids < vocab.text_size
    if pair:
        return text
    opens = (ids == vocab.user) | (ids == vocab.assistant) | (ids == vocab.system)
    turn, roles = np.cumsum(opens), np.append(vocab.document, ids[opens])
    made = np.bincount(turn, weights=media) > 0
    made = np.append(made[1:] & (roles[1:] == vocab.assistant), False)  # the turn after this one makes a medium
    return text & (made & (roles == vocab.user))[turn]


def encode_sample(sample: Sample, tokenizers: Tokenizers, encode_text) -> tuple[np.ndarray, np.ndarray, tuple]:
    """(tokens, flags, row of `about`) of one sample. Raises BadSample."""
    document, pair, has_text = codes_document(sample, tokenizers.encode_media), False, False
    if not document.is_conversation:
        document = document.normalised()
        parts = [segment.modality for segment in document.segments]
        pair, has_text = len(parts) == 2 and parts[0] != parts[1], "text" in parts
    if pair:  # the loss flags then also say where the second part starts
        first, second = document.segments
        document = Document((Segment(first.modality, first.content, loss=False), second))
    try:
        encoded = encode_document(document, tokenizers.vocab, encode_text)
        if len(encoded.ids) <= 2:
            raise UserError("it is empty")
    except (UserError, KeyError) as error:
        raise BadSample(sample.key, sample.shard, f"it cannot be encoded ({error})") from None
    flags = encoded.loss_mask * np.uint8(LOSS)
    if pair or document.is_conversation:
        flags |= droppable(encoded.ids, tokenizers.vocab, pair) * np.uint8(DROPPABLE)
    split = int(np.argmax(encoded.loss_mask)) if pair else 0
    drop = int(np.count_nonzero(flags & DROPPABLE))
    text_only = not document.is_conversation and parts == ["text"]
    about = (len(encoded.ids), split, pair and parts[1] == "text", pair and has_text, drop, text_only,
             *_described(document, encoded.ids, tokenizers.vocab))
    return encoded.ids, flags, about


def _described(document: Document, ids: np.ndarray, vocab: Vocabulary) -> tuple[int, int, bool, int]:
    """The columns CAPTION, MEDIA, TALK and HASH."""
    parts, text = [segment.modality for segment in document.segments], int(np.count_nonzero(ids < vocab.text_size))
    caption = 0
    if not document.is_conversation and len(parts) > 1 and parts.count("text") == 1 and "text" in (parts[0], parts[-1]):
        caption = text if parts[-1] == "text" else -text
    media = sum(1 << number for number, span in enumerate(vocab.ranges) if span.name in parts)
    hashed = ids[ids >= vocab.ranges[0].start] if media else ids
    digest = hashlib.blake2b(hashed.astype("<i4").tobytes(), digest_size=4).digest()
    return caption, media, document.is_conversation, int.from_bytes(digest) & HASHES - 1


def encode_shard(shard, tokenizers: Tokenizers) -> ShardTokens:
    """Encodes all samples of a shard; of damaged raw media those before the damage. Raises UserError when the shard
    cannot be read, and for damaged codes: they can be made again."""
    path = ShardCache().fetch(shard)
    samples = IndexedShard(path, tokenizers_hash=tokenizers.hash, verify=True, salvage=read_header(path) is None,
                           name=shown(shard))
    encode_text = lru_cache(200_000)(lambda text: np.array(tokenizers.text.encode(text), np.int32))
    tokens, flags, about, bad = [np.empty(0, np.int32)], [np.empty(0, np.uint8)], [], []
    with samples:
        doubtful = bool(samples.index.damage)
        for sample in samples:
            doubtful |= CHANGED in sample.refused.values()
            try:
                one = encode_sample(sample, tokenizers, encode_text)
            except BadSample as error:
                bad.append([error.key, error.reason])
                one = np.empty(0, np.int32), np.empty(0, np.uint8), (0,) * len(COLUMNS)
            tokens.append(one[0])
            flags.append(one[1])
            about.append(one[2])
    joined, vocab = np.concatenate(tokens), tokenizers.vocab
    table = np.array(about, np.int32).reshape(-1, len(COLUMNS))
    counts = np.bincount(vocab.modality_of(joined), minlength=len(vocab.modalities)).tolist()
    return ShardTokens(joined, np.concatenate(flags), table, bad, counts, doubtful)


# ------------------------------------------------------------------------------------------------ kept files


def to_bytes(documents: ShardTokens, identity: str) -> bytes:
    """What is kept: a safetensors file."""
    arrays = {"tokens": documents.tokens, "flags": documents.flags, "about": documents.about}
    summary = {"bad": documents.bad, "crc": documents.crc, "modality_counts": documents.modality_counts}
    return save(arrays, {"identity": identity, "said": json.dumps(summary)})


class _CachedShard:
    """A kept file, mapped: `tokens[a:b]` and `flags[a:b]` read just that."""

    def __init__(self, path: Path, identity: str):
        file = safe_open(path, "numpy")
        metadata = file.metadata() or {}
        if metadata.get("identity") != identity:
            raise ValueError("of another shard, or by other tokenizers")
        self.tokens, self.flags = file.get_slice("tokens"), file.get_slice("flags")
        self.about = file.get_tensor("about")
        summary = json.loads(metadata["said"])
        self.bad, self.crc, self.modality_counts = summary["bad"], summary["crc"], summary["modality_counts"]
        if self.about.dtype != np.int32 or self.about.ndim != 2 or self.about.shape[1] != len(COLUMNS):
            raise ValueError("its table has another form")
        length, split = self.about[:, LENGTH].astype(np.int64), self.about[:, SPLIT]
        caption = np.abs(self.about[:, CAPTION].astype(np.int64))
        if (length < 0).any() or (split < 0).any() or (split > length).any() or (caption > length).any() or not all(
                part.get_shape() == [int(length.sum())] for part in (self.tokens, self.flags)):
            raise ValueError("its numbers do not fit each other")
        if (self.tokens.get_dtype(), self.flags.get_dtype()) != ("I32", "U8"):
            raise ValueError("its tokens are of another type")
        if not all(isinstance(key, str) and isinstance(reason, str) for key, reason in self.bad):
            raise ValueError("its list of bad samples is broken")


def cache_path(shard, tokenizers: Tokenizers, folder: Path) -> tuple[Path, str]:
    """Where a shard's documents are kept, and which documents these are. Raises UserError when there is no shard."""
    identity = [VERSION, tokenizers.hash, str(shard)]
    if not is_remote(shard):  # what an address holds is taken not to change
        try:
            stat = os.stat(shard)
        except OSError as error:
            raise UserError(f"cannot read shard {shard}: {error.strerror}") from None
        identity[2:] = [os.path.abspath(shard), stat.st_size, stat.st_mtime_ns]
    identity = json.dumps(identity)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:24]
    return folder / f"{Path(local_name(shard)).stem}-{digest}.safetensors", identity


def _cached(shard, tokenizers: Tokenizers, folder: Path) -> "_CachedShard | ShardTokens":
    """A shard's documents out of `folder`, made and kept there first unless they are. Where they cannot be kept, that
    is logged and they stay in memory."""
    path, identity = cache_path(shard, tokenizers, folder)

    def load() -> _CachedShard | None:
        try:
            return _CachedShard(path, identity)
        except (OSError, SafetensorError, LookupError, TypeError, ValueError):  # none, or damaged: made again
            return None

    documents = load()
    if documents:
        return documents
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):
            documents = load()  # another process may have made it meanwhile
            if not documents:
                documents = encode_shard(shard, tokenizers)
                if documents.doubtful:
                    return documents
                write_atomic(path, to_bytes(documents, identity))
    except (OSError, SafetensorError) as error:
        log.warning("cannot keep documents in %s (%s): they stay in memory, and every process makes its own", folder,
                    getattr(error, "strerror", None) or error)
        return documents or encode_shard(shard, tokenizers)
    return load() or documents


def _fill_cache(shards: list[str], tokenizers_folder: str, folder: Path) -> None:
    tokenizers = Tokenizers.load(tokenizers_folder)
    for shard in shards:
        _cached(shard, tokenizers, folder)


class TokenCache:
    """The documents of many shards as one sequence of n. After `freeze`, each (n,): length, drop, split, caption,
    media, hash (int64) and text_second, has_text, talk (bool), as in ShardTokens.

    folder: where encoded shards are kept and mapped from; None: in memory, 5 bytes a token.
    """

    def __init__(self, tokenizers: Tokenizers, folder: Path | None = None):
        self.tokenizers, self.folder = tokenizers, folder and Path(folder)
        self._shards: list[_CachedShard | ShardTokens] = []

    def prepare(self, shards: list[str], workers: int, rank: int = 0) -> None:
        """Encodes what is not kept yet by `workers` processes; ranks that do so at the same time share the work."""
        if not self.folder:
            return
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
        if not os.access(self.folder, os.W_OK):
            return  # nothing can be kept; `add` says so
        missing = [shard for shard in shards if not cache_path(shard, self.tokenizers, self.folder)[0].exists()]
        shift = rank * 7919 % max(len(missing), 1)  # so that ranks begin at different shards
        missing = missing[shift:] + missing[:shift]
        if workers > 1 and len(missing) > 1:
            arguments = [(missing[i::workers], str(self.tokenizers.folder), self.folder)
                         for i in range(min(workers, len(missing)))]
            run_processes(_fill_cache, arguments, "a process that encoded shards died; start again: others are kept")
        else:
            for shard in missing:
                _cached(shard, self.tokenizers, self.folder)

    def add(self, shard, bad: BadSamples) -> int:
        """Adds a shard's documents; returns how many samples it has. Raises UserError when it cannot be read, holds
        codes of other tokenizers, or when too many samples are bad."""
        if self.folder:
            documents = _cached(shard, self.tokenizers, self.folder)
        else:
            documents = encode_shard(shard, self.tokenizers)
        bad.good(len(documents.about) - len(documents.bad))
        for key, reason in documents.bad:
            bad.add(BadSample(key, shown(shard), reason))
        self._shards.append(documents)
        return len(documents.about)

    def freeze(self, longest: int | None = None) -> np.ndarray:
        """To be called after the last shard. Plain texts of more than `longest` tokens become several documents of
        equal lengths, one after the other. Returns how many documents each shard has, (shards,)."""
        counts = [len(documents.about) for documents in self._shards]
        ends = [np.cumsum(documents.about[:, LENGTH], dtype=np.int64) for documents in self._shards]
        about = np.concatenate([documents.about for documents in self._shards])
        length = about[:, LENGTH].astype(np.int64)
        pieces = np.ones(len(about), np.int64)
        if longest:
            pieces += about[:, TEXT_ONLY] * (np.maximum(length - 1, 0) // longest)
        whole = np.repeat(np.arange(len(about)), pieces)  # of a piece: its document
        piece = np.arange(len(whole)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        low, high = (n * length[whole] // pieces[whole] for n in (piece, piece + 1))
        self.length = high - low
        self._start = (np.concatenate(ends) - length)[whole] + low  # of a document, within its shard
        self.split, self.drop, self.caption, self.media, self.hash = (
            about[whole, column].astype(np.int64) for column in (SPLIT, DROP, CAPTION, MEDIA, HASH))
        self.text_second, self.has_text, self.talk = (
            about[whole, column].astype(bool) for column in (TEXT_SECOND, HAS_TEXT, TALK))
        of_shard = np.bincount(np.repeat(np.arange(len(counts)), counts)[whole], minlength=len(counts))
        self._first = np.concatenate([[0], np.cumsum(of_shard)])
        self._sample, self._before = whole, np.cumsum([0, *counts])
        self.samples = len(about)
        self.crcs = [documents.crc for documents in self._shards]
        self.modality_counts = np.sum([documents.modality_counts for documents in self._shards], 0)
        return of_shard

    def __len__(self) -> int:
        return len(self.length)

    def sample_of(self, document: int) -> tuple[int, int]:
        """Of a document: (the number of its shard, in the order in which they were added, its sample's place there)."""
        sample = int(self._sample[document])
        shard = int(np.searchsorted(self._before, sample, "right")) - 1
        return shard, sample - int(self._before[shard])

    def __getitem__(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32, flags uint8) of a document that is not empty."""
        shard = self._shards[int(np.searchsorted(self._first, document, "right")) - 1]
        start = int(self._start[document])
        here = slice(start, start + int(self.length[document]))
        return shard.tokens[here], shard.flags[here]
