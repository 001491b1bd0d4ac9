"""What is heard, drawn where and on which background the text says."""

from dataclasses import replace

from onevocab.demo import world
from onevocab.demo.task import HELD_OUT_VOICES, VOICES, DrawnTask, objects_drawn, scene_split
from onevocab.demo.tasks.draw import drawn_by
from onevocab.demo.tasks.hear import UNDERSTOOD
from onevocab.demo.utterance import in_some_voice
from onevocab.demo.world import CELLS
from onevocab.tasks import Card, Metric, Wordings

WORDINGS = Wordings(("Draw what you hear at the {cell} on a {colour} background.",
                     "Paint it at the {cell} on a {colour} background.",
                     "Draw this at the {cell} on a {colour} background.",
                     "Make a picture of what you hear at the {cell} on a {colour} background.",
                     "Show me what you hear at the {cell} on a {colour} background."))


class DrawHeard(DrawnTask):
    name, media, samples, position = "draw_heard", ("image", "audio"), 3_000, 6
    held_out, controls, section, reworded = HELD_OUT_VOICES, VOICES, UNDERSTOOD, False
    wordings = (WORDINGS,)
    metrics = (Metric("speech_to_image", "objects drawn", objects_drawn),)

    def example(self, rng, split, wording):
        scene = world.random_scene(rng, scene_split(split), objects=1)
        thing = replace(scene.objects[0], tint=None)
        scene = replace(scene, objects=(thing,))
        text = WORDINGS.pick(rng, wording, cell=CELLS[thing.cell], colour=scene.background)
        return [("user", [in_some_voice(thing.name, rng, split), text]), ("assistant", [scene])]

    def evaluated(self, rng, split, wording, number, seed):
        messages = self.example(rng, split, wording)
        return messages, {"said": messages[0][1][0].text}

    def card(self, item, reply, reading):
        sound, text = item.messages[0]["content"]
        return Card([("heard", sound), ("drawn", drawn_by(reply))], [
            ("said", item.answer["said"]), ("prompt", text), ("read", ", ".join(reading.names) or "nothing")])


TASKS = (DrawHeard(),)
