"""Where is each of several things? Training only; what it teaches is measured by the questions about a picture.

With all names from the start a model answers "where" from what is likely and never begins to compare a name with the
picture; with a few that look unlike each other it begins at once, and all others follow (docs/log.md). That data in
which few things are frequent bring such matching about is Chan et al.'s finding (2022, arXiv:2205.05055).
"""

import numpy as np

from onevocab.demo.task import DemoTask, scene_split
from onevocab.demo.tasks.questions import WORDINGS, ask_where, ask_yes_no, conversation
from onevocab.demo.world import random_scene

FEW_NAMES = ("owl", "pizza", "key", "bus", "sun", "guitar")


def _shuffled(pairs: list, rng: np.random.Generator) -> list:
    return [pairs[k] for k in rng.permutation(len(pairs))]


class LookUpFew(DemoTask):
    """Four of FEW_NAMES in a picture, and where each of them is."""

    name, media, stage, samples, position = "look_up_few", ("image",), "phase", 0, 4
    wordings = (WORDINGS["where"],)

    def example(self, rng, split, wording):
        scene = random_scene(rng, scene_split(split), objects=4, names=FEW_NAMES)
        return conversation(scene, _shuffled([ask_where(thing, rng, wording) for thing in scene.objects], rng))


class LookUp(DemoTask):
    """Two to four different things in a picture; where each of them is, and whether some name is there."""

    name, media, samples, position = "look_up", ("image",), 0, 5
    wordings = (WORDINGS["where"], WORDINGS["yes_no"])

    def example(self, rng, split, wording):
        scene = random_scene(rng, scene_split(split), objects=int(rng.integers(2, 5)))
        pairs = [ask_where(thing, rng, wording) for thing in scene.objects]
        pairs += [ask_yes_no(scene, rng, wording) for _ in range(2)]
        return conversation(scene, _shuffled(pairs, rng))


TASKS = (LookUpFew(), LookUp())
