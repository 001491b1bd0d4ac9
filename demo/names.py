"""How names, places and boxes are read out of a text."""

import re

from onevocab.demo.world import CELLS, NAMES, plural


class NameReader:
    """Finds names in free text: whole words, the longest first. names: a name as it is written (a plural, say) ->
    the name it stands for."""

    def __init__(self, names: dict[str, str]):
        self.means = {spelling.lower(): name for spelling, name in names.items()}
        longest_first = "|".join(re.escape(name) for name in sorted(self.means, key=len, reverse=True))
        self.pattern = re.compile(rf"\b({longest_first})\b", re.IGNORECASE)
        self.places = re.compile("|".join(CELLS), re.IGNORECASE)

    def names(self, text: str) -> list[str]:
        """The names said, in order."""
        return [self.means[match.group(1).lower()] for match in self.pattern.finditer(text)]

    def placed(self, text: str) -> list[tuple[str, int]]:
        """(name, cell) pairs said, in order; cell is an index of CELLS.

        Works for "a dog in the top left" as for "top left: a dog": whichever of a name and a place comes first in
        the text tells the order. One name may have several places; a name without a place is left out.
        """
        words = [(m.start(), "name", self.means[m.group(1).lower()]) for m in self.pattern.finditer(text)]
        words += [(m.start(), "place", CELLS.index(m.group(0).lower())) for m in self.places.finditer(text)]
        words.sort()
        name_first = bool(words) and words[0][1] == "name"
        pairs, name = [], None
        for _, kind, value in words if name_first else reversed(words):
            if kind == "name":
                name = value
            elif name is not None:
                pairs.append((name, value))
        return pairs if name_first else pairs[::-1]

    def boxes(self, text: str) -> list[tuple[str, tuple[int, ...]]]:
        """(name, (x0, y0, x1, y1)) said, in order: four numbers belong to the name before them."""
        boxes = []
        names = list(self.pattern.finditer(text))
        for i, match in enumerate(names):
            until = names[i + 1].start() if i + 1 < len(names) else len(text)
            numbers = [int(x) for x in re.findall(r"\d+", text[match.end() : until])[:4]]
            if len(numbers) == 4:
                boxes.append((self.means[match.group(1).lower()], tuple(numbers)))
        return boxes


READER = NameReader({spelling: name for name in NAMES for spelling in (name, plural(name))})
