"""A picture drawn from its caption."""

from onevocab.demo import world
from onevocab.demo.picture_judge import Reading
from onevocab.demo.task import DrawnTask, objects_drawn, scene_split
from onevocab.demo.tasks.captions import caption_long
from onevocab.demo.world import NAMES
from onevocab.evaluation import metrics
from onevocab.tasks import Card, Metric, Section, Wordings

WORDINGS = Wordings(("Draw {caption}.", "Paint {caption}.", "Make a picture of {caption}.", "Show me {caption}.",
                     "Can you draw {caption}?",
                     "Give me a picture of {caption}.", "I want to see {caption}.", "Let me see {caption}."))


def objects_in_place(answer: dict, reading: Reading):
    wanted = [(name, cell) for cell, name in enumerate(answer["scene"].cells) if name]
    return metrics.overlap(wanted, [(name, cell) for cell, name in enumerate(reading.cells) if name])


def background_drawn(answer: dict, reading: Reading):
    return int(reading.background == answer["scene"].background), 1


class Draw(DrawnTask):
    """The first items go through all names."""

    name, media, samples, position, count = "draw", ("image",), 8_000, 2, "captions"
    wordings = (WORDINGS,)
    metrics = (Metric("text_to_image_objects", "objects drawn", objects_drawn),
               Metric("text_to_image_objects", "objects drawn in their place", objects_in_place),
               Metric("text_to_image_background", "backgrounds right", background_drawn))
    gallery = True
    section = Section("Drawn from words", "Seeds 0, 1, 2, ..., in order, none left out. Under each: the prompt, and "
                      "what the picture judge reads in the drawing.")

    def example(self, rng, split, wording, scene=None):
        scene = scene or world.random_scene(rng, scene_split(split))
        return [("user", [WORDINGS.pick(rng, wording, caption=caption_long(scene))]), ("assistant", [scene])]

    def evaluated(self, rng, split, wording, number, seed):
        scene = world.held_out_scene(rng, self.name_in_turn(number, seed) if number < len(NAMES) else None)
        return self.example(rng, split, wording, scene), {}

    def card(self, item, reply, reading):
        return Card([("drawn", drawn_by(reply))], [
            ("prompt", item.messages[0]["content"][0]),
            ("read", ", ".join(reading.names) + f" on {reading.background or '?'}")])


def drawn_by(reply):
    """The picture of a reply, black where there is none."""
    return reply.images[0] if reply.images else world.blank()


TASKS = (Draw(),)
