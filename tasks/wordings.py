"""Ways to say the same thing. The last two are held out: training never sees them, evaluation asks both kinds."""

import re

import numpy as np

HELD_OUT_WORDINGS = 2
# Which wordings: those of training, those kept for evaluation, or always the first one (what is asked aloud).
SEEN, HELD_OUT, FIRST = "seen", "held_out", "first"


class Wordings(tuple):
    """Texts with {blanks}: Wordings(("Draw {caption}.", ...)). At least one more than are held out."""

    def __new__(cls, texts: tuple[str, ...]):
        if isinstance(texts, str) or len(texts) <= HELD_OUT_WORDINGS:
            raise ValueError(f"{texts!r}: at least {HELD_OUT_WORDINGS + 1} wordings, the last {HELD_OUT_WORDINGS} are "
                             "held out")
        return super().__new__(cls, texts)

    def of(self, which: str) -> tuple[str, ...]:
        """which: SEEN, HELD_OUT, FIRST, or one of them, word for word: that alone (SEEN where it is of others)."""
        if which not in (SEEN, HELD_OUT, FIRST):
            return (which,) if which in self else self.of(SEEN)
        return {SEEN: self[:-HELD_OUT_WORDINGS], HELD_OUT: self[-HELD_OUT_WORDINGS:], FIRST: self[:1]}[which]

    def pick(self, rng: np.random.Generator, which: str = SEEN, **blanks) -> str:
        """One of them, filled in."""
        options = self.of(which)
        return options[int(rng.integers(len(options)))].format(**blanks)

    def matches(self, wording: str, text: str) -> bool:
        """Whether a text is this wording, filled in."""
        pattern = "(.+)".join(map(re.escape, re.split(r"{\w+}", wording)))
        return re.fullmatch(pattern, text, re.DOTALL) is not None
