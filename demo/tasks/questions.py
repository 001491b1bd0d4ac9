"""Questions about a scene with a word for an answer: what, where, is there, how many, which colour."""

from collections.abc import Callable

from onevocab.demo import world
from onevocab.demo.task import STYLE, DemoTask, same_text, scene_split
from onevocab.demo.tasks.captions import answer_card
from onevocab.demo.world import CELLS, NAMES, NUMBERS, Scene, plural, with_article
from onevocab.tasks import Metric, Section, Wordings

WORDINGS = {
    "what": Wordings(("What is at the {cell}?", "Which object is at the {cell}?", "Name the object at the {cell}.",
                      "Can you tell me what is at the {cell}?",
                      "What do you see at the {cell}?", "Tell me what is at the {cell}.")),
    "background": Wordings(("What colour is the background?", "Name the background colour.", "Which background is it?",
                            "Can you name the background colour?",
                            "What is the colour of the background?", "Which colour is the background?")),
    "tint": Wordings(("What colour is the {name}?", "Which colour does the {name} have?",
                      "Can you name the colour of the {name}?",
                      "Name the colour of the {name}.", "What is the colour of the {name}?",
                      "Tell me the colour of the {name}.")),
    "count": Wordings(("How many objects are there?", "Count the objects.", "How many things do you see?",
                       "Can you count the objects?",
                       "How many objects are in the picture?", "Tell me how many objects there are.")),
    "count_name": Wordings(("How many {names} are there?", "Count the {names}.", "How many {names} do you see?",
                            "Can you count the {names}?",
                            "How many {names} are in the picture?", "Tell me how many {names} there are.")),
    "where": Wordings(("Where is the {name}?", "In which place is the {name}?", "Find the {name}.",
                       "Tell me the place of the {name}.", "Can you find the {name}?",
                       "Where do you see the {name}?", "Tell me where the {name} is.")),
    "yes_no": Wordings(("Is there {a_name}?", "Do you see {a_name}?", "Does the picture show {a_name}?",
                        "Is {a_name} there?", "Can you find {a_name} here?",
                        "Can you spot {a_name}?", "Can you make out {a_name} in this picture?",
                        "Is there {a_name} in the picture?", "Can you see {a_name}?")),
}
ABOUT_PICTURES = Section("Questions about a picture",
                         "A question in words, or spoken; the answer beside the right one.")

# (question, answer), or None when the scene does not allow it.


def _what(scene, rng, wording):
    cell = int(rng.integers(4)) if rng.random() < 0.25 else scene.objects[int(rng.integers(len(scene.objects)))].cell
    thing = scene.at(cell)
    return WORDINGS["what"].pick(rng, wording, cell=CELLS[cell]), with_article(thing.label) if thing else "nothing"


def _background(scene, rng, wording):
    return WORDINGS["background"].pick(rng, wording), scene.background


def _tint(scene, rng, wording):
    tinted = [thing for thing in scene.single if thing.tint]
    if not tinted:
        return None
    thing = tinted[int(rng.integers(len(tinted)))]
    return WORDINGS["tint"].pick(rng, wording, name=thing.name), thing.tint


def _count(scene, rng, wording):
    return WORDINGS["count"].pick(rng, wording), NUMBERS[len(scene.objects)]


def _some_name(scene: Scene, rng) -> str:
    """A name of the scene, or as often one that is not in it."""
    if rng.random() < 0.5:
        return scene.objects[int(rng.integers(len(scene.objects)))].name
    absent = [name for name in NAMES if all(thing.name != name for thing in scene.objects)]
    return absent[int(rng.integers(len(absent)))]


def _count_name(scene, rng, wording):
    name = _some_name(scene, rng) if rng.random() < 0.3 else scene.objects[0].name
    count = sum(thing.name == name for thing in scene.objects)
    return WORDINGS["count_name"].pick(rng, wording, names=plural(name)), NUMBERS[count]


def _where(scene, rng, wording):
    things = scene.single
    if not things:
        return None
    return ask_where(things[int(rng.integers(len(things)))], rng, wording)


def ask_where(thing, rng, wording):
    """Where one object is, whose name stands once."""
    return WORDINGS["where"].pick(rng, wording, name=thing.name), f"at the {CELLS[thing.cell]}"


def ask_yes_no(scene, rng, wording):
    """Whether there is an object of some name."""
    name = _some_name(scene, rng)
    present = any(thing.name == name for thing in scene.objects)
    return WORDINGS["yes_no"].pick(rng, wording, a_name=with_article(name)), "yes" if present else "no"


QUESTIONS: dict[str, Callable] = {"what": _what, "where": _where, "yes_no": ask_yes_no, "count": _count,
                                  "count_name": _count_name, "background": _background, "tint": _tint}


def askable_scene(kind: str, rng, wording: str, new_scene: Callable) -> tuple:
    """(scene, question, answer) of the first scene of `new_scene()` that allows the question."""
    pair = None
    while pair is None:
        scene = new_scene()
        pair = QUESTIONS[kind](scene, rng, wording)
    return scene, *pair


def conversation(scene: Scene, pairs: list[tuple]) -> list:
    """The picture, then (question, answer) after (question, answer)."""
    (first, answer), *others = pairs
    messages = [("user", [scene, first]), ("assistant", [answer])]
    for question, answer in others:
        messages += [("user", [question]), ("assistant", [answer])]
    return messages


class Vqa(DemoTask):
    """One question about one picture, kinds in turn."""

    name, media, controls, section = "vqa", ("image",), STYLE, ABOUT_PICTURES
    wordings = tuple(WORDINGS.values())
    metrics = (Metric("vqa", "answers right", same_text),)

    def example(self, rng, split, wording, kind=None):
        kind = kind or str(rng.choice(list(QUESTIONS)))
        scene, *pair = askable_scene(kind, rng, wording, lambda: world.random_scene(rng, scene_split(split)))
        return conversation(scene, [tuple(pair)])

    def evaluated(self, rng, split, wording, number, seed):
        kind = list(QUESTIONS)[number % len(QUESTIONS)]
        messages = self.example(rng, split, wording, kind)
        return messages, {"scene": messages[0][1][0], "kind": kind}

    def card(self, item, reply, verdict):
        return answer_card(item, reply)


TASKS = (Vqa(),)
