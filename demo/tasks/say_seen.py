"""The name of the object of a picture, spoken."""

from onevocab.demo import world
from onevocab.demo.judges import same_phrase
from onevocab.demo.task import STYLE, SpokenTask, scene_split
from onevocab.demo.tasks.say import SPOKEN, spoken_card
from onevocab.demo.utterance import narrated
from onevocab.tasks import Metric, Wordings

WORDINGS = Wordings(("Say what you see.", "Speak the name of the object.", "Say the name of what you see.",
                     "Say what this is.", "Speak: what is in the picture?", "Say what the picture is of.",
                     "Speak the name of what the picture shows.",
                     "Speak what you see.", "Say what the picture shows."))


class SaySeen(SpokenTask):
    name, media, samples, position = "say_seen", ("image", "audio"), 2_000, 5
    controls, section, reworded = STYLE, SPOKEN, False
    wordings = (WORDINGS,)
    metrics = (Metric("image_to_speech", "phrases heard right", same_phrase),)

    def example(self, rng, split, wording):
        scene = world.random_scene(rng, scene_split(split), objects=1)
        return [("user", [scene, WORDINGS.pick(rng, wording)]), ("assistant", [narrated(scene.objects[0].name, rng)])]

    def evaluated(self, rng, split, wording, number, seed):
        messages = self.example(rng, split, wording)
        return messages, {"scene": messages[0][1][0]}

    def card(self, item, reply, heard):
        return spoken_card(item, reply, heard)


TASKS = (SaySeen(),)
