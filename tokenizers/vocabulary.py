"""Which id means what: the only place that knows.

One vocabulary of contiguous ranges: `[ text | specials, 64 of them spare | image | audio | ... ]`. A new modality
appends a range, so that every id of an older vocabulary keeps its meaning. Two kinds of media span exist:

* sized (a picture):  `begin  height  width  code * height * width  end`, codes in row-major order;
* open (a sound):     `begin  (code * rows) * columns  end`, column by column in time, so its length is free.

A sized span's range is `[begin, end, sizes, codes]`. An open span's is `[begin, codes, end]`: after a whole column
both "another code" and "the end" are legal, and standing side by side they are one slice of the head.
"""

from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from onevocab.common.errors import UserError
from onevocab.common.files import hash_json

# Frozen: a published checkpoint depends on these spellings and on their order.
SPECIALS = ("end_of_turn", "document", "end_of_document", "system", "user", "assistant", "pad")
SPARE = 64
ROLES = ("system", "user", "assistant")


def special_spelling(name: str) -> str:
    """How a special is shown to people: `<|user|>`. Text that holds this spelling is still only text."""
    return f"<|{name}|>"


@dataclass(frozen=True)
class Span:
    """A modality's range of ids.

    start: first id of the range; sizes: how many size ids (0: an open span); codes: codebook entries;
    rows: codes per column of an open span (0 for a sized one).
    """

    name: str
    start: int
    sizes: int
    codes: int
    rows: int

    @property
    def sized(self) -> bool:
        return self.sizes > 0

    @property
    def begin(self) -> int:
        return self.start

    @property
    def end(self) -> int:
        return self.start + 1 if self.sized else self.start + 1 + self.codes

    @property
    def sizes_start(self) -> int:
        """Id of size 1."""
        return self.start + 2

    @property
    def codes_start(self) -> int:
        return self.start + 2 + self.sizes if self.sized else self.start + 1

    @property
    def stop(self) -> int:
        """One past the last id of the range."""
        return self.start + 2 + self.sizes + self.codes

    def size_id(self, size: int) -> int:
        """Id of a height or width of `size` codes. Raises UserError when the vocabulary has no such size."""
        if not 1 <= size <= self.sizes:
            raise UserError(f"a {self.name} side of {size} codes does not fit: sizes are 1 to {self.sizes}")
        return self.sizes_start + size - 1

    def tokens(self, shape: tuple[int, int]) -> int:
        """How many ids a span around a grid of this shape takes."""
        return shape[0] * shape[1] + (4 if self.sized else 2)

    def wrap(self, codes: np.ndarray) -> np.ndarray:
        """Codes [first axis, second axis] -> ids of the whole span, int32 (n,).

        A picture is [rows, columns]; a sound is [columns, rows]. Raises UserError on codes that do not fit.
        """
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.size == 0 or (not self.sized and codes.shape[1] != self.rows):
            raise UserError(f"{self.name} codes of shape {codes.shape} do not fit this vocabulary")
        if codes.min() < 0 or codes.max() >= self.codes:
            raise UserError(f"{self.name} codes must lie in 0..{self.codes - 1}, found {codes.max()}")
        header = [self.begin]
        if self.sized:
            header += [self.size_id(codes.shape[0]), self.size_id(codes.shape[1])]
        ids = np.empty(len(header) + codes.size + 1, np.int32)
        ids[: len(header)] = header
        ids[len(header) : -1] = codes.reshape(-1).astype(np.int32) + self.codes_start
        ids[-1] = self.end
        return ids

    def unwrap(self, ids: np.ndarray) -> np.ndarray:
        """Ids of a whole span -> its codes, the inverse of `wrap`. Raises ValueError on a malformed span."""
        ids = np.asarray(ids)
        first = 3 if self.sized else 1
        if len(ids) <= first + 1 or ids[0] != self.begin or ids[-1] != self.end:
            raise ValueError(f"malformed {self.name} span: {ids[:4]}...")
        codes = ids[first:-1] - self.codes_start
        if codes.min() < 0 or codes.max() >= self.codes:
            raise ValueError(f"a {self.name} span holds ids that are no codes")
        if not self.sized:
            shape = (-1, self.rows)
            whole = codes.size % self.rows == 0
        else:
            shape = (int(ids[1]) - self.sizes_start + 1, int(ids[2]) - self.sizes_start + 1)
            whole = all(1 <= side <= self.sizes for side in shape) and codes.size == shape[0] * shape[1]
        if not whole:
            raise ValueError(f"a {self.name} span holds {codes.size} codes, its size says otherwise")
        return codes.reshape(shape)


@dataclass(frozen=True)
class Vocabulary:
    """text_size: ids of the text encoding (all padded rows of a pretrained one); ranges: the media spans, in order;
    text_unused: how many at the end of the text's ids no text is written with."""

    text_size: int
    ranges: tuple[Span, ...] = ()
    text_unused: int = 0

    @staticmethod
    def build(text_size: int, media: list[dict], text_unused: int = 0) -> "Vocabulary":
        """media: dicts of name, sizes, codes, rows, appended in that order."""
        start, ranges = text_size + len(SPECIALS) + SPARE, []
        for layout in media:
            ranges.append(Span(start=start, **layout))
            start = ranges[-1].stop
        return Vocabulary(text_size, tuple(ranges), text_unused)

    def extended(self, media: list[dict]) -> "Vocabulary":
        """This one with more ranges: it is a prefix of the result."""
        layouts = [{key: getattr(span, key) for key in ("name", "sizes", "codes", "rows")} for span in self.ranges]
        return Vocabulary.build(self.text_size, layouts + media, self.text_unused)

    def __getattr__(self, name: str) -> int:
        # `vocabulary.user` is the id of <|user|>; end_of_turn stands first, so that text + end_of_turn is one slice.
        if name in SPECIALS:
            return self.text_size + SPECIALS.index(name)
        raise AttributeError(name)

    @property
    def size(self) -> int:
        return self.ranges[-1].stop if self.ranges else self.text_size + len(SPECIALS) + SPARE

    @property
    def text(self) -> range:
        """The ids that text is written with."""
        return range(self.text_size - self.text_unused)

    @cached_property
    def spans(self) -> dict[str, Span]:
        return {span.name: span for span in self.ranges}

    @property
    def modalities(self) -> list[str]:
        return ["text", *self.spans]

    @cached_property
    def span_of_begin(self) -> dict[int, Span]:
        return {span.begin: span for span in self.ranges}

    def role(self, name: str) -> int:
        """Id that opens a turn of this role. Raises UserError on an unknown role."""
        if name not in ROLES:
            raise UserError(f"unknown role {name!r}: use one of {', '.join(ROLES)}")
        return getattr(self, name)

    def modality_of(self, ids: np.ndarray) -> np.ndarray:
        """Index into `modalities` of each id, uint8, same shape. Begin, end and size ids belong to their medium."""
        starts = np.array([span.start for span in self.ranges])
        return np.searchsorted(starts, ids, side="right").astype(np.uint8)

    def in_use(self) -> np.ndarray:
        """Which ids mean something, bool (size,): not those that pad a pretrained text, nor the spare specials."""
        used = np.ones(self.size, bool)
        used[self.text.stop : self.text_size] = False
        spare = self.text_size + len(SPECIALS)
        used[spare : spare + SPARE] = False
        return used

    def to_json(self) -> dict:
        layout = {"text_size": self.text_size, "specials": list(SPECIALS), "spare": SPARE,
                  "ranges": [asdict(span) for span in self.ranges]}
        return layout | ({"text_unused": self.text_unused} if self.text_unused else {})  # older hashes stay

    @staticmethod
    def from_json(data: dict) -> "Vocabulary":
        """Raises UserError when the file was made by another template of specials."""
        try:
            if tuple(data["specials"]) != SPECIALS or data["spare"] != SPARE:
                raise UserError("this vocabulary has other special tokens than this version of onevocab")
            text_size, unused = int(data["text_size"]), int(data.get("text_unused", 0))
            if not 0 <= unused < text_size:
                raise ValueError("text_unused")
            return Vocabulary(text_size, tuple(Span(**span) for span in data["ranges"]), unused)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"this vocabulary file is broken ({error}); train the tokenizers again") from None

    @property
    def hash(self) -> str:
        return hash_json(self.to_json())

    def is_prefix_of(self, other: "Vocabulary") -> bool:
        """Whether every id of this vocabulary means the same in `other`."""
        mine, theirs = self.to_json(), other.to_json()
        same_text = all(mine.get(key) == theirs.get(key) for key in ("text_size", "text_unused", "specials", "spare"))
        return same_text and theirs["ranges"][: len(mine["ranges"])] == mine["ranges"]
