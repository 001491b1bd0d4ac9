"""Byte-level BPE: trained with rustbpe on the run's own text, used through tiktoken."""

import base64
from collections.abc import Iterable

import rustbpe
import tiktoken
from pydantic import BaseModel, ConfigDict, Field

from onevocab.common.errors import UserError

# Words keep the space before them, digits stand alone (numbers are then read digit by digit), the rest as it comes.
PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# tiktoken's regex engine panics on very long runs of one character; pieces of this length are safe.
CHUNK = 4096


class TextConfig(BaseModel):
    """[text]: vocab_size: ids asked for, 256 bytes included. A small text yields fewer; the real number counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    vocab_size: int = Field(default=1024, ge=257, le=1_000_000)


class TextTokenizer:
    """Text <-> ids. `encode` never recognises a special token in a user's text."""

    def __init__(self, ranks: dict[bytes, int], pattern: str = PATTERN):
        self.ranks, self.pattern = ranks, pattern
        self.encoding = tiktoken.Encoding("onevocab", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.size = len(ranks)

    @staticmethod
    def train(texts: Iterable[str], config: TextConfig) -> "TextTokenizer":
        """Learns merges from `texts`."""
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iter(texts), config.vocab_size, pattern=PATTERN)
        return TextTokenizer({bytes(piece): rank for piece, rank in trainer.get_mergeable_ranks()})

    def encode(self, text: str) -> list[int]:
        """str -> ids. Lone surrogates, which no UTF-8 text holds, become U+FFFD."""
        text = text.encode("utf-8", "replace").decode() if not text.isascii() else text
        if len(text) <= CHUNK:
            return self.encoding.encode_ordinary(text)
        return [token for i in range(0, len(text), CHUNK) for token in
                self.encoding.encode_ordinary(text[i : i + CHUNK])]

    def decode(self, ids: Iterable[int]) -> str:
        """ids -> str; bytes that are no UTF-8 become U+FFFD."""
        return self.encoding.decode_bytes(list(ids)).decode("utf-8", "replace")

    def to_json(self) -> dict:
        pieces = sorted(self.ranks, key=self.ranks.__getitem__)
        return {"pattern": self.pattern, "pieces": [base64.b64encode(piece).decode() for piece in pieces]}

    @staticmethod
    def from_json(data: dict) -> "TextTokenizer":
        """Raises UserError when the file is broken."""
        try:
            ranks = {base64.b64decode(piece): rank for rank, piece in enumerate(data["pieces"])}
            return TextTokenizer(ranks, data["pattern"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"text.json is broken ({error}); train the tokenizers again") from None
