"""A task: what is asked, what is right, and how an answer is scored. Whoever evaluates knows this class and no task.

One method, `example`, makes training samples and evaluation items alike; a metric's `score` is a number from 0 to 1 for
each answer, whatever it is used for.
"""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from onevocab.tasks.session import Session
from onevocab.tasks.wordings import HELD_OUT, SEEN, Wordings

# (role, parts), the last turn the answer; the role None: a plain document. A part is a str, or what `Task.show` shows.
Conversation = list[tuple[str | None, list]]


@dataclass(frozen=True)
class Item:
    """messages: the prompt, as AnyToAny takes it; want: what the reply must be, "text" or a modality; answer: what
    the task's metrics need to know of the right reply. Where answer["kind"] is there, rows are also made by kind."""

    messages: list
    want: str
    answer: dict


class Metric(NamedTuple):
    """row: the report's name of what is measured; name: what the number is; score: (Item.answer, what the judge made of
    the reply) -> (got, possible); (0, 0) where the item says nothing."""

    row: str
    name: str
    score: Callable[[dict, object], tuple[float, float]]


class Section(NamedTuple):
    """Of the report's page."""

    title: str
    intro: str = ""


@dataclass
class Card:
    """One thing to look at or to listen to. media: (label, a value of a modality); lines: (label, text) below;
    right: whether a judge found it right (None: not judged)."""

    media: list[tuple[str, object]] = field(default_factory=list)
    lines: list[tuple[str, str]] = field(default_factory=list)
    right: bool | None = None


class Task(ABC):
    """Subclasses set what follows and write `example`; the other methods do where replies are compared as they are.

    name: unique, also seeds the items. want: "text" or a modality. media: the modalities but text that prompts or
    replies hold; a model without them gets null rows. wordings: all instructions. reworded: whether held-out wordings
    are compared with the seen ones. metrics: none for a task that is only trained on; the first decides what a card
    calls right. count, controls_count: the keys of [evaluate] that say how many items, and how many of each control.
    held_out: what is new in the split "test", in words. controls: further splits -> what is new in them. shuffled:
    whether prompts are also asked with the media of other prompts. section: where its cards stand. gallery: gallery.png
    shows its replies (the first medium of a card, under it the first line).
    """

    name: str
    want: str = "text"
    media: tuple[str, ...] = ()
    wordings: tuple[Wordings, ...] = ()
    reworded: bool = True
    metrics: tuple[Metric, ...] = ()
    count: str = "items"
    controls_count: str = "controls"
    held_out: str = "held-out examples"
    controls: dict[str, str] = {}
    shuffled: bool = True
    section: Section = Section("Answers")
    gallery: bool = False

    # Asking.

    @abstractmethod
    def example(self, rng: np.random.Generator, split: str, wording: str) -> Conversation:
        """One conversation. split: "train", which holds nothing that is held out, "test", or one of `controls`;
        wording: SEEN or HELD_OUT."""

    def evaluated(self, rng: np.random.Generator, split: str, wording: str, number: int,
                  seed: int) -> tuple[Conversation, dict]:
        """The example of item `number`, and what its Item.answer holds beside `answer`. For tasks that go through kinds
        or names in turn."""
        return self.example(rng, split, wording), {}

    def show(self, part, split: str):
        """A part of a conversation as AnyToAny takes it: a str, or a value of a modality."""
        return part

    def answer(self, right) -> dict:
        """The part that is the right reply -> Item.answer."""
        return {self.want: right}

    def items(self, split: str, n: int, seed: int, wording: str | None = None) -> list[Item]:
        """n items of a split: "test", "wordings" (the same in held-out wordings) or one of `controls`. For one seed
        those of all splits are about the same things. wording: as `Wordings.of` takes it. Raises UserError when what
        they need is not installed."""
        items = []
        for number in range(n):
            rng = np.random.default_rng([*self.seeds(seed), number])
            which = wording or (HELD_OUT if split == "wordings" else SEEN)
            conversation, more = self.evaluated(rng, split, which, number, seed)
            *prompt, (_, right) = conversation
            messages = [{"role": role, "content": [self.show(part, split) for part in parts]} for role, parts in prompt]
            items.append(Item(messages, self.want, {**self.answer(right[0]), **more}))
        return items

    def seeds(self, seed: int) -> list[int]:
        return [seed, zlib.crc32(self.name.encode())]

    # Judging. A verdict is what a judge makes of one reply, and what metrics score: a text, a picture's reading, ...

    def judgeable(self, session: Session, items: list[Item]) -> list[Item]:
        """The items whose replies can be judged. Raises UserError where a judge is missing."""
        return items

    def judge(self, session: Session, items: list[Item], replies: list) -> list:
        """generation's `Reply` of each item -> verdicts."""
        if self.want == "text":
            return [reply.text for reply in replies]
        media = [reply.media.get(self.want) for reply in replies]
        return [of_reply[0] if of_reply else None for of_reply in media]

    def right(self, item: Item):
        """The verdict on the right reply."""
        return item.answer[self.want]

    def chance(self, session: Session) -> float | None:
        """What a blind guess scores; None: it is measured, with the right answers of other items."""
        return None

    def ceilings(self, session: Session, items: list[Item]) -> tuple[list, list] | None:
        """Verdicts on the originals, and on the originals through the tokenizer; None where nothing but exact answers
        is compared."""
        return None

    def card(self, item: Item, reply, verdict) -> Card:
        """One item to look at, without `right`."""
        parts = [part for message in item.messages for part in message["content"]]
        prompt = " ".join(part for part in parts if isinstance(part, str))
        media = [("given", part) for part in parts if not isinstance(part, str)]
        media += [("model", values[0]) for values in reply.media.values() if values]
        lines = [("prompt", prompt)]
        if self.want == "text":
            lines += [("right answer", str(item.answer["text"])), ("model", reply.text)]
        return Card(media, lines)
