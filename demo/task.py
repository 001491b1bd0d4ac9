"""What the demo's tasks have in common: scenes and utterances as parts, how many samples are written, who judges."""

import numpy as np

from onevocab.demo import speech, world
from onevocab.demo.judges import Judges
from onevocab.demo.picture_judge import Reading
from onevocab.demo.utterance import Utterance
from onevocab.demo.world import NAMES, Scene
from onevocab.evaluation import metrics
from onevocab.tasks import Item, Task

STYLE = {"style": "unseen drawing style"}  # splits beside "test"; where prompts hold pictures, where they hold voices
VOICES = {"train_voices": "seen voices"}
HELD_OUT_VOICES = "held-out voices"


class DemoTask(Task):
    """Parts are a str, a `Scene` (a picture) or an `Utterance` (a sound).

    samples: how many are written unless [data.demo] says otherwise; None: none ever. stage: the shards' prefix,
    "pretrain", "instruct" or "phase". position: seeds the samples; the task's number among those with sound, or among
    those without, when the recipes were fixed. A task without one is written after those that have one, and its
    samples are seeded by its name. augmented: whether training may alter what the samples hold.
    """

    samples: int | None = None
    stage: str = "instruct"
    position: int | None = None
    augmented: bool = True
    held_out = "held-out compositions"

    def show(self, part, split: str):
        if isinstance(part, Scene):
            return world.picture(part, "openmoji" if split == "style" else "twemoji")
        if isinstance(part, Utterance):
            return speech.speak(part.text, part.voice, part.words_per_minute, part.pitch), speech.RATE
        return part

    def answer(self, right) -> dict:
        """"text", the right reply; "scene", the picture that is asked for; "say", the words that are to be spoken."""
        if isinstance(right, Scene):
            return {"scene": right}
        return {"say": right.text} if isinstance(right, Utterance) else {"text": right}

    def name_in_turn(self, number: int, seed: int) -> str:
        """The object of item `number`: all names in turn, so that so many items hold every name."""
        names = np.random.default_rng(self.seeds(seed)).permutation(NAMES)
        return str(names[number % len(names)])


def scene_split(split: str) -> str:
    """Of which of the world's splits the scenes of a split are."""
    return "train" if split == "train" else "test"


class DrawnTask(DemoTask):
    """Replies are pictures; their verdict is a Reading."""

    want = "image"

    def look(self, judges: Judges, pictures: list) -> list:
        """Pictures (None: nothing was drawn) -> verdicts."""
        return judges.look(pictures)

    def judge(self, judges: Judges, items: list[Item], replies: list) -> list:
        return self.look(judges, [reply.images[0] if reply.images else None for reply in replies])

    def right(self, item: Item):
        scene = item.answer["scene"]
        return Reading(scene.background, scene.cells)

    def ceilings(self, judges: Judges, items: list[Item]) -> tuple[list, list]:
        originals = [world.picture(item.answer["scene"]) for item in items]
        return self.look(judges, originals), self.look(judges, judges.through_tokenizer("image", originals))


class SpokenTask(DemoTask):
    """Replies are sounds; their verdict is the phrase that was heard, or None."""

    want = "audio"

    def judgeable(self, judges: Judges, items: list[Item]) -> list[Item]:
        return judges.known(self.name, items)

    def judge(self, judges: Judges, items: list[Item], replies: list) -> list:
        sounds = [reply.audio[0] if reply.audio else None for reply in replies]
        return judges.listen(sounds, [item.answer["say"] for item in items], self.name)

    def right(self, item: Item):
        return item.answer["say"]

    def chance(self, judges: Judges) -> float:
        return judges.chance(self.name)

    def ceilings(self, judges: Judges, items: list[Item]) -> tuple[list, list]:
        phrases = [item.answer["say"] for item in items]
        originals = [(speech.speak(phrase), speech.RATE) for phrase in phrases]  # the narrator's, as the model's
        both = judges.listen(originals + judges.through_tokenizer("audio", originals), phrases * 2, self.name)
        return both[: len(items)], both[len(items) :]


# What is right: (answer, verdict) -> (got, possible).


def same_text(answer: dict, reply: str):
    return int(metrics.normal(answer["text"]) == metrics.normal(reply)), 1


def objects_drawn(answer: dict, reading: Reading):
    return metrics.overlap([name for name in answer["scene"].cells if name], reading.names)
