"""Several pictures in one conversation, each asked about when it is shown, and one of them again at the end."""

from onevocab.demo import world
from onevocab.demo.task import DemoTask, same_text, scene_split
from onevocab.demo.tasks.captions import CAPTIONS, answer_card, ask_caption
from onevocab.demo.tasks.questions import ABOUT_PICTURES
from onevocab.tasks import Metric, Wordings

NTH = ("first", "second", "third")
WORDINGS = Wordings(("What is in the {nth} picture?", "Name what the {nth} picture shows.",
                     "What do you see in the {nth} picture?",
                     "Can you name what the {nth} picture shows?", "What was in the {nth} picture?",
                     "Tell me what is in the {nth} picture.", "Which things are in the {nth} picture?"))
KINDS = ("newest", "earlier")  # which picture the last question is about


class SeveralPictures(DemoTask):
    """Two or three pictures; kinds in turn."""

    name, media, samples, section, shuffled = "several_pictures", ("image",), 2_500, ABOUT_PICTURES, False
    wordings = (WORDINGS,)
    metrics = (Metric("several_pictures", "answers right", same_text),)

    def example(self, rng, split, wording, kind=None):
        kind = kind or KINDS[int(rng.integers(2))]
        scenes = [world.random_scene(rng, scene_split(split)) for _ in range(int(rng.integers(2, 4)))]
        messages = []
        for scene in scenes:
            question, answer = ask_caption("caption_short", scene, rng, wording)
            messages += [("user", [scene, question]), ("assistant", [answer])]
        if kind == "earlier":
            which = int(rng.integers(len(scenes) - 1))
            messages += [("user", [WORDINGS.pick(rng, wording, nth=NTH[which])]),
                         ("assistant", [CAPTIONS["caption_short"](scenes[which])])]
        return messages

    def evaluated(self, rng, split, wording, number, seed):
        kind = KINDS[number % len(KINDS)]
        return self.example(rng, split, wording, kind), {"kind": kind}

    def card(self, item, reply, verdict):
        return answer_card(item, reply)


TASKS = (SeveralPictures(),)
