"""The boxes of all objects, in words: "dog 03 05 46 47; star 53 52 95 96"."""

from onevocab.demo import world
from onevocab.demo.names import READER
from onevocab.demo.task import STYLE, DemoTask, scene_split
from onevocab.demo.tasks.captions import answer_card
from onevocab.demo.tasks.questions import ABOUT_PICTURES
from onevocab.demo.world import Scene, box
from onevocab.evaluation import metrics
from onevocab.tasks import Metric, Wordings

WORDINGS = Wordings(("Find all objects and give their boxes.", "Where are the objects? Answer with boxes.",
                     "Give a box for each object.", "Detect the objects.",
                     "Can you give a box for each object?", "Give boxes for all objects.",
                     "Find the objects and their boxes."))


def boxes(scene: Scene) -> str:
    return "; ".join(" ".join([thing.name, *(f"{edge:02d}" for edge in box(thing))]) for thing in scene.objects)


def boxes_found(answer: dict, reply: str):
    return metrics.detection_score(READER.boxes(answer["text"]), READER.boxes(reply))


class Detection(DemoTask):
    name, media, controls, section = "detection", ("image",), STYLE, ABOUT_PICTURES
    wordings = (WORDINGS,)
    metrics = (Metric("detection", "boxes right (name, IoU >= 0.5)", boxes_found),)

    def example(self, rng, split, wording):
        scene = world.random_scene(rng, scene_split(split))
        return [("user", [scene, WORDINGS.pick(rng, wording)]), ("assistant", [boxes(scene)])]

    def evaluated(self, rng, split, wording, number, seed):
        messages = self.example(rng, split, wording)
        return messages, {"scene": messages[0][1][0]}

    def card(self, item, reply, verdict):
        return answer_card(item, reply)


TASKS = (Detection(),)
