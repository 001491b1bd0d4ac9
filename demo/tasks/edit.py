"""A picture changed as an instruction says."""

from dataclasses import replace

import numpy as np
from PIL import Image

from onevocab.demo import world
from onevocab.demo.picture_judge import TOLERANCE, Reading, border_colour, to_array
from onevocab.demo.task import STYLE, DrawnTask, scene_split
from onevocab.demo.tasks.draw import drawn_by
from onevocab.demo.world import BACKGROUNDS, NAMES, SceneObject, held_out, with_article
from onevocab.tasks import Card, Metric, Section, Wordings

WORDINGS = {
    "edit_grey": Wordings(("Make it grey.", "Turn the picture grey.", "Take the colours away.",
                           "Can you make it grey?", "Paint it grey.",
                           "Make the picture grey.")),
    "edit_mirror": Wordings(("Mirror it.", "Flip the picture.", "Show it in a mirror.", "Can you mirror it?",
                             "Mirror the picture.",
                             "Flip it.")),
    "edit_remove": Wordings(("Remove the {name}.", "Take the {name} away.", "Draw it without the {name}.",
                             "Can you remove the {name}?",
                             "Take away the {name}.", "Show it without the {name}.")),
    "edit_replace": Wordings(("Replace the {name} with {a_other}.", "Put {a_other} in place of the {name}.",
                              "Turn the {name} into {a_other}.", "Make the {name} {a_other}.",
                              "Show {a_other} in place of the {name}.")),
    "edit_background": Wordings(("Make the background {colour}.", "Put it on a {colour} background.",
                                 "Turn the background {colour}.",
                                 "Can you make the background {colour}?", "Paint the background {colour}.",
                                 "Show it on a {colour} background.")),
}
EDITS = tuple(WORDINGS)


def edited(answer: dict, verdict: tuple[Reading, Image.Image | None]):
    """Every cell reads as it should, the background is right, and the picture is nearer to the exact result than to
    what was given (which is what tells grey from colour and mirrored from not)."""
    reading, picture = verdict
    if picture is None or reading.cells != answer["scene"].cells:
        return 0, 1
    drawn, target, source = (to_array(p).astype(float) for p in (
        picture, world.picture(answer["scene"]), world.picture(answer["source"])))
    colour = np.linalg.norm(border_colour(drawn) - border_colour(target)) <= TOLERANCE
    return int(colour and np.square(drawn - target).mean() < np.square(drawn - source).mean()), 1


class Edit(DrawnTask):
    """Kinds in turn. A verdict is (what the judge reads, the picture)."""

    name, media, samples, position, controls = "edit", ("image",), 3_000, 3, STYLE
    wordings = tuple(WORDINGS.values())
    metrics = (Metric("image_edit", "pictures edited right", edited),)
    section = Section("Edited by instruction", "The picture given, what the model made of it, and the exact result.")

    def example(self, rng, split, wording, kind=None):
        """An instruction, the picture that it changes, the changed picture."""
        wanted = kind
        while True:
            scene = world.random_scene(rng, scene_split(split))
            kind = wanted or EDITS[int(rng.integers(len(EDITS)))]
            blanks, things = {}, scene.single
            if kind == "edit_grey":
                after = replace(scene, grey=True)
            elif kind == "edit_mirror":
                after = replace(scene, mirrored=True)
            elif kind == "edit_background":
                colour = str(rng.choice([name for name in BACKGROUNDS if name != scene.background]))
                after, blanks = replace(scene, background=colour), {"colour": colour}
            elif len(things) < 2:
                continue
            else:
                thing = things[int(rng.integers(len(things)))]
                if kind == "edit_remove":
                    after, blanks = scene.without(thing.cell), {"name": thing.name}
                else:
                    other = str(rng.choice([name for name in NAMES if name != thing.name]))
                    after = scene.with_object(SceneObject(other, thing.cell))
                    blanks = {"name": thing.name, "a_other": with_article(other)}
            if split != "train" or not held_out(after):
                instruction = WORDINGS[kind].pick(rng, wording, **blanks)
                # The instruction first: the new picture then stands at one fixed distance behind the old one, whatever
                # the wording, and copying what stays is easy to learn.
                return [("user", [instruction, scene]), ("assistant", [after])]

    def evaluated(self, rng, split, wording, number, seed):
        kind = EDITS[number % len(EDITS)]
        messages = self.example(rng, split, wording, kind)
        return messages, {"source": messages[0][1][1], "kind": kind.split("_")[1]}

    def look(self, judges, pictures):
        return list(zip(judges.look(pictures), pictures, strict=True))

    def right(self, item):
        return super().right(item), world.picture(item.answer["scene"])

    def card(self, item, reply, verdict):
        instruction, given = item.messages[0]["content"]
        return Card([("given", given), ("model", drawn_by(reply)), ("exact", world.picture(item.answer["scene"]))],
                    [("instruction", instruction)])


TASKS = (Edit(),)
