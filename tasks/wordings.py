"""Ways to say the same thing. The last two are held out: training never sees them, evaluation asks both kinds."""

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
        """which: SEEN, HELD_OUT or FIRST."""
        return {SEEN: self[:-HELD_OUT_WORDINGS], HELD_OUT: self[-HELD_OUT_WORDINGS:], FIRST: self[:1]}[which]

    def pick(self, rng: np.random.Generator, which: str = SEEN, **blanks) -> str:
        """One of them, filled in."""
        options = self.of(which)
        return options[int(rng.integers(len(options)))].format(**blanks)
