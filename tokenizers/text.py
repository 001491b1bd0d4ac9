"""Byte-level BPE: trained with rustbpe on the run's own text, or a pretrained model's; used through tiktoken."""

import base64
import re
import unicodedata
from collections.abc import Iterable, Iterator

import rustbpe
import tiktoken
from pydantic import BaseModel, ConfigDict, Field

from onevocab.common.errors import UserError

# Words keep the space before them, digits stand alone (numbers are then read digit by digit), the rest as it comes.
PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# tiktoken's regex engine panics on very long runs of white space (a million; 300,000 pass); this many characters at
# once are safe.
CHUNK = 65_536

# Where so many marks may follow each other that putting them in order, which Python does by insertion, takes long.
MARKS = re.compile(r"[^\w\s\x00-\x7f]{1000,}")


class TextConfig(BaseModel):
    """[text]"""

    model_config = ConfigDict(frozen=True, extra="forbid")
    vocab_size: int = Field(1024, ge=257, le=1_000_000, description="ids asked for, 256 bytes included; a small text "
                            "yields fewer, and their real number counts")


class TextTokenizer:
    """Text <-> ids. `encode` never recognises a special token in a user's text.

    size: ids that belong to text; a pretrained model has more than pieces: its added tokens, and rows that pad its
    embedding. stop: one past the last id that has a piece. nfc: text is put into Unicode's form NFC first.
    """

    def __init__(self, ranks: dict[bytes, int], pattern: str = PATTERN, size: int | None = None, nfc: bool = False):
        """Raises ValueError when the pieces do not fit into `size`, or a byte has none."""
        self.ranks, self.pattern, self.nfc = ranks, pattern, nfc
        self.pieces = {rank: piece for piece, rank in ranks.items()}
        self.stop = max(self.pieces, default=-1) + 1
        self.size = self.stop if size is None else size
        if len(self.pieces) < len(ranks) or self.size < self.stop:
            raise ValueError("two pieces share an id, or an id is too large")
        if not all(bytes([value]) in ranks for value in range(256)):
            raise ValueError("a byte has no id")
        self.encoding = tiktoken.Encoding("onevocab", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    @staticmethod
    def train(texts: Iterable[str], config: TextConfig) -> "TextTokenizer":
        """Learns merges from `texts`."""
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iter(texts), config.vocab_size, pattern=PATTERN)
        return TextTokenizer({bytes(piece): rank for piece, rank in trainer.get_mergeable_ranks()})

    def encode(self, text: str) -> list[int]:
        """str -> ids of the normalised text. Raises UserError when a pattern from elsewhere does not get through it."""
        try:
            return [id for part in _parts(self.normalise(text)) for id in self.encoding.encode_ordinary(part)]
        except BaseException as error:  # tiktoken's regex engine panics where it gives up backtracking
            if type(error).__name__ != "PanicException":
                raise
            raise UserError(f"the tokenizer's regular expression {self.pattern[:80]!r} does not get through a text of "
                            f"{len(text):,} characters") from None

    def normalise(self, text: str) -> str:
        """The text that is encoded, and comes back: lone surrogates, which no UTF-8 text holds, are "?" in it."""
        if text.isascii():
            return text
        text = text.encode("utf-8", "replace").decode()
        return _nfc(text) if self.nfc else text

    def decode(self, ids: Iterable[int]) -> str:
        """ids -> str; bytes that are no UTF-8 become U+FFFD, ids without a piece nothing."""
        return b"".join(self.pieces.get(id, b"") for id in ids).decode("utf-8", "replace")

    def to_json(self) -> dict:
        pieces = [self.pieces.get(id) for id in range(self.stop)]
        data = {"pattern": self.pattern, "pieces": [piece and base64.b64encode(piece).decode() for piece in pieces]}
        # Defaults are left out: the hash of an older run's tokenizers stays.
        return data | ({"size": self.size} if self.size > self.stop else {}) | ({"nfc": True} if self.nfc else {})

    @staticmethod
    def from_json(data: dict) -> "TextTokenizer":
        """Raises UserError when the file is broken."""
        try:
            pieces = [(base64.b64decode(piece), id) for id, piece in enumerate(data["pieces"]) if piece is not None]
            size, nfc = data.get("size"), data.get("nfc", False)
            if not isinstance(size, int | None) or not isinstance(nfc, bool) or len(dict(pieces)) < len(pieces):
                raise ValueError("size, nfc or a piece that comes twice")
            return TextTokenizer(dict(pieces), data["pattern"], size, nfc)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"text.json is broken ({error}); train the tokenizers again") from None


def _parts(text: str) -> Iterator[str]:
    """The text in parts of at most CHUNK characters that give the same ids as the whole: the cuts lie between a letter
    or a digit and white space after it, where every pattern in use ends a piece, and none looks back. A stretch of
    CHUNK characters without such a place is cut anyhow: there ids may differ."""
    start = 0
    while len(text) - start > CHUNK:
        stop = start + CHUNK
        while stop > start and not (text[stop] in " \n" and text[stop - 1].isalnum()):
            stop -= 1
        stop = stop if stop > start else start + CHUNK
        yield text[start:stop]
        start = stop
    yield text[start:]


def _nfc(text: str) -> str:
    """Unicode's form NFC (UAX #15), in about linear time: long runs of marks are brought into their canonical order,
    sorted by combining class, beforehand."""
    def ordered(match: re.Match) -> str:
        parts, marks = [], []
        for character in match[0]:
            if unicodedata.combining(character):
                marks += unicodedata.normalize("NFD", character)
            else:
                parts += [*sorted(marks, key=unicodedata.combining), character]
                marks = []
        return "".join(parts + sorted(marks, key=unicodedata.combining))

    return unicodedata.normalize("NFC", MARKS.sub(ordered, text))
