"""Questions about a picture that are heard; text answers."""

from onevocab.demo import world
from onevocab.demo.task import HELD_OUT_VOICES, STYLE, VOICES, DemoTask, same_text, scene_split
from onevocab.demo.tasks.captions import answer_card
from onevocab.demo.tasks.questions import ABOUT_PICTURES, QUESTIONS, WORDINGS, askable_scene, conversation
from onevocab.demo.utterance import in_some_voice
from onevocab.demo.world import CELLS, NAMES, with_article
from onevocab.tasks import FIRST, Metric

SPOKEN = {"what": 0.35, "background": 0.1, "count": 0.1, "where": 0.225, "yes_no": 0.225}  # kind -> how often


def spoken_questions() -> list[str]:
    """Every question that is asked aloud."""
    texts = [WORDINGS["background"][0], WORDINGS["count"][0]]
    texts += [WORDINGS["what"][0].format(cell=cell) for cell in CELLS]
    texts += [WORDINGS["where"][0].format(name=name) for name in NAMES]
    texts += [WORDINGS["yes_no"][0].format(a_name=with_article(name)) for name in NAMES]
    return texts


class SpokenQuestion(DemoTask):
    """One picture, two questions in training; one, kinds in turn, in evaluation. Always in the first wording."""

    name, media, samples, position = "spoken_question", ("image", "audio"), 3_500, 2
    held_out, controls, section, reworded = HELD_OUT_VOICES, STYLE | VOICES, ABOUT_PICTURES, False
    metrics = (Metric("spoken_question", "answers right", same_text),)

    def example(self, rng, split, wording, asked=2):
        pairs = []
        while not pairs:
            scene = world.random_scene(rng, scene_split(split))
            chosen = rng.choice(list(SPOKEN), asked, replace=False, p=list(SPOKEN.values()))
            pairs = [pair for kind in chosen if (pair := QUESTIONS[str(kind)](scene, rng, FIRST))]
        return conversation(scene, [(in_some_voice(question, rng, split), answer) for question, answer in pairs])

    def evaluated(self, rng, split, wording, number, seed):
        kind = list(SPOKEN)[number % len(SPOKEN)]
        scene, question, answer = askable_scene(kind, rng, FIRST, lambda: world.held_out_scene(rng))
        spoken = in_some_voice(question, rng, split)
        return conversation(scene, [(spoken, answer)]), {"scene": scene, "kind": kind, "question": question}

    def card(self, item, reply, verdict):
        return answer_card(item, reply)


TASKS = (SpokenQuestion(),)
