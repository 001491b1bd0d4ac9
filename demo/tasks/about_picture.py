"""One picture, several independent questions about it: captions, boxes and single questions. Training only."""

import numpy as np

from onevocab.demo import world
from onevocab.demo.task import DemoTask, scene_split
from onevocab.demo.tasks import captions, detection, questions

# kind -> how often it is asked
WEIGHTS = {"what": 3, "where": 4, "yes_no": 3.5, "count": 0.6, "count_name": 1.5, "background": 0.6, "tint": 2,
           "caption_short": 1.2, "caption_long": 0.8, "caption_list": 0.7, "detection": 1}


def ask(kind: str, scene: world.Scene, rng: np.random.Generator, wording: str) -> tuple[str, str] | None:
    """(instruction, answer); None when the scene does not allow it."""
    if kind in questions.QUESTIONS:
        return questions.QUESTIONS[kind](scene, rng, wording)
    if kind in captions.CAPTIONS:
        return captions.ask_caption(kind, scene, rng, wording)
    return detection.WORDINGS.pick(rng, wording), detection.boxes(scene)


class AboutPicture(DemoTask):
    name, media, samples, position = "about_picture", ("image",), 7_000, 1
    wordings = (*questions.WORDINGS.values(), *captions.WORDINGS.values(), detection.WORDINGS)

    def example(self, rng, split, wording, asked=6):
        weights = np.array(list(WEIGHTS.values()))
        pairs = []
        while not pairs:
            scene = world.random_scene(rng, scene_split(split))
            chosen = rng.choice(list(WEIGHTS), asked, replace=False, p=weights / weights.sum())
            pairs = [pair for kind in chosen if (pair := ask(str(kind), scene, rng, wording))]
        return questions.conversation(scene, pairs)


TASKS = (AboutPicture(),)
