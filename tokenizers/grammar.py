"""Which ids may follow: a reply that cannot be malformed, at any temperature, within any budget.

The grammar walks beside a reply. `legal` says which ids the next one is chosen from, as ranges, so that
the sampler computes only those rows of the head; `accept` takes the choice. A span starts only if it can
be closed inside the budget.
"""

from collections.abc import Mapping, Sequence

from onevocab.common.errors import UserError
from onevocab.tokenizers.vocabulary import Span, Vocabulary

Grid = tuple[int, int]


class Grammar:
    """The state of one reply.

    want: "any" (the model mixes what it likes), "text" (until its end), or a medium of the vocabulary
    (exactly one span of it). grids: the (height, width) in codes that a picture may have; a mapping gives
    them per sized medium. budget: how many ids the reply may take; the end of the turn is not counted.
    end: the id that ends a reply (default: end_of_turn; end_of_document where the prompt is a plain
    document).

    legal: ranges of ids for the next one, never empty before `done`. run: how many of the next ids share this
    `legal`, so that a sampler may take them without asking. modality: the medium of the open span, or "text".
    done: the reply is whole. cut: the budget ended it, or a sound in it, not the model.
    Raises UserError on an unknown `want`, or when what is wanted cannot fit the budget.
    """

    def __init__(self, vocab: Vocabulary, want: str = "any",
                 grids: Sequence[Grid] | Mapping[str, Sequence[Grid]] = (),
                 budget: int = 1, end: int | None = None):
        self.vocab, self.want, self.left = vocab, want, budget
        self.stop_id = vocab.end_of_turn if end is None else end
        self._stop = range(self.stop_id, self.stop_id + 1)
        if want not in ("any", *vocab.modalities):
            raise UserError(f"cannot make {want!r}; choose any, {', '.join(vocab.modalities)}")
        self._grids: dict[str, list[Grid]] = {}
        for span in vocab.ranges:
            asked = grids.get(span.name, ()) if isinstance(grids, Mapping) else grids
            if span.sized:
                self._grids[span.name] = [(h, w) for h, w in asked
                                          if 1 <= min(h, w) and max(h, w) <= span.sizes]
        self._smallest = {}  # ids that the smallest span of each medium takes
        for span in vocab.ranges:
            shapes = self._grids[span.name] if span.sized else [(1, span.rows)]
            if shapes:
                self._smallest[span.name] = min(span.tokens(shape) for shape in shapes)
        if want in vocab.spans and want not in self._smallest:
            raise UserError(f"cannot make {want!r}: none of the sizes asked for is in the vocabulary")
        needed = self._smallest.get(want, 1)
        if budget < needed:
            raise UserError(f"no room for {want!r}: it takes at least {needed} more tokens and "
                            f"{max(budget, 0)} are left; shorten the prompt or raise the limit on new tokens")
        self.done = self.cut = False
        self.modality = "text"
        self._between()

    def _set(self, *ranges: range, run: int = 1) -> None:
        """Neighbouring ranges become one, so that the head is cut as rarely as possible."""
        merged: list[range] = []
        for part in sorted(ranges, key=lambda part: part.start):
            if merged and merged[-1].stop == part.start:
                merged[-1] = range(merged[-1].start, part.stop)
            else:
                merged.append(part)
        self.legal, self.run = tuple(merged), run

    def _between(self) -> None:
        """Outside any span: text, the start of a span that fits, or the end."""
        self.modality, self._span = "text", None
        if self.left <= 0:
            self.cut = True
            self._finish()
            return
        ranges = [range(span.begin, span.begin + 1) for span in self.vocab.ranges
                  if self.want in ("any", span.name) and span.name in self._smallest
                  and self._smallest[span.name] <= self.left]
        if self.want in ("any", "text"):
            ranges += [self.vocab.text, self._stop]
        self._set(*ranges)

    def _finish(self) -> None:
        self.done, self.legal, self.run = True, (), 0

    def _inside(self) -> None:
        """Inside a span. `left` still counts every id to come, the span's end included."""
        span: Span = self._span
        codes = range(span.codes_start, span.codes_start + span.codes)
        end = range(span.end, span.end + 1)
        if not span.sized:
            place = self._codes % span.rows
            if place:
                self._set(codes, run=span.rows - place)
            elif not self._codes:
                self._set(codes, run=span.rows)
            elif self.left > span.rows:  # another column and the end fit
                self._set(codes, end)
            else:
                self.cut = True
                self._set(end)
        elif len(self._sides) < 2:
            fits = {grid[len(self._sides)] for grid in self._grids[span.name]
                    if list(grid[: len(self._sides)]) == self._sides
                    and grid[0] * grid[1] + 3 - len(self._sides) <= self.left}
            self._set(*(range(span.size_id(side), span.size_id(side) + 1) for side in fits))
        elif self._codes < (total := self._sides[0] * self._sides[1]):
            self._set(codes, run=total - self._codes)
        else:
            self._set(end)

    def accept(self, id: int) -> None:
        """Takes the next id. Raises ValueError when it is not legal: the caller's fault, not the user's."""
        if not any(id in part for part in self.legal):
            raise ValueError(f"id {id} is not legal here: {self.legal}")
        self.left -= 1
        if self._span is None:
            if id == self.stop_id:
                self._finish()
            elif id in self.vocab.span_of_begin:
                self._span = self.vocab.span_of_begin[id]
                self.modality, self._sides, self._codes = self._span.name, [], 0
                self._inside()
            else:
                self._between()
        elif id == self._span.end:
            if self.want == self._span.name:
                self._finish()
            else:
                self._between()
        else:
            if self._span.sized and len(self._sides) < 2:
                self._sides.append(id - self._span.sizes_start + 1)
            else:
                self._codes += 1
            self._inside()

    @property
    def forced(self) -> int | None:
        """The next id where only one is legal, else None: it needs no model."""
        return self.legal[0].start if len(self.legal) == 1 and len(self.legal[0]) == 1 else None

    @property
    def last(self) -> int | None:
        """The id that ends the reply where nothing else is legal, else None: nothing ever attends to it."""
        closes = self._span is not None and self.want == self._span.name and self.forced == self._span.end
        return self.forced if closes else None
