"""What one can ask about the demo world: natural instructions in several wordings, and their exact answers.

A conversation is a list of (role, parts); a part is a str, a `Scene` (a picture to draw) or an `Utterance` (a sound to
speak). Of each task's wordings the last two are held out: training never sees them, evaluation asks both kinds.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from onevocab.demo.speech import NARRATOR
from onevocab.demo.world import (
    BACKGROUNDS,
    CELLS,
    NAMES,
    NUMBERS,
    Scene,
    SceneObject,
    box,
    held_out,
    plural,
    random_scene,
    with_article,
)

HELD_OUT_WORDINGS = 2


@dataclass(frozen=True)
class Utterance:
    """words_per_minute and pitch (0..99) are eSpeak's."""

    text: str
    voice: str = NARRATOR
    words_per_minute: int = 165
    pitch: int = 50


WORDINGS: dict[str, tuple[str, ...]] = {
    "caption_short": ("What is in the picture?", "Name what you see.", "List the objects in this picture.",
                      "What do you see?", "Give a short caption.", "Which things are in the picture?",
                      "Tell me what is in the picture.", "What can you see here?"),
    "caption_long": ("Describe the picture.", "Describe this picture in detail.", "Write a long caption.",
                     "What is where in this picture?", "Say in full what the picture shows.",
                     "Describe what you see in detail.", "Give a detailed description of the picture."),
    "caption_list": ("Describe the picture as a list.", "List what is where, and the background.",
                     "Make a list of places and objects.", "Give the picture's layout as a list.",
                     "Write a list of what is where.", "Describe the layout as a list."),
    "detection": ("Find all objects and give their boxes.", "Where are the objects? Answer with boxes.",
                  "Give a box for each object.", "Detect the objects.", "Give boxes for all objects.",
                  "Find the objects and their boxes."),
    "what": ("What is at the {cell}?", "Which object is at the {cell}?", "Name the object at the {cell}.",
             "What do you see at the {cell}?", "Tell me what is at the {cell}."),
    "background": ("What colour is the background?", "Name the background colour.", "Which background is it?",
                   "What is the colour of the background?", "Which colour is the background?"),
    "tint": ("What colour is the {name}?", "Which colour does the {name} have?", "Name the colour of the {name}.",
             "What is the colour of the {name}?", "Tell me the colour of the {name}."),
    "count": ("How many objects are there?", "Count the objects.", "How many things do you see?",
              "How many objects are in the picture?", "Tell me how many objects there are."),
    "count_name": ("How many {names} are there?", "Count the {names}.", "How many {names} do you see?",
                   "How many {names} are in the picture?", "Tell me how many {names} there are."),
    "where": ("Where is the {name}?", "In which place is the {name}?", "Find the {name}.",
              "Where do you see the {name}?", "Tell me where the {name} is."),
    "yes_no": ("Is there {a_name}?", "Do you see {a_name}?", "Does the picture show {a_name}?",
               "Is there {a_name} in the picture?", "Can you see {a_name}?"),
    "draw": ("Draw {caption}.", "Paint {caption}.", "Make a picture of {caption}.", "Show me {caption}.",
             "Give me a picture of {caption}.", "I want to see {caption}.", "Let me see {caption}."),
    "edit_grey": ("Make it grey.", "Turn the picture grey.", "Take the colours away.", "Paint it grey.",
                  "Make the picture grey."),
    "edit_mirror": ("Mirror it.", "Flip the picture.", "Show it in a mirror.", "Mirror the picture.", "Flip it."),
    "edit_remove": ("Remove the {name}.", "Take the {name} away.", "Draw it without the {name}.",
                    "Take away the {name}.", "Show it without the {name}."),
    "edit_replace": ("Replace the {name} with {a_other}.", "Put {a_other} in place of the {name}.",
                     "Turn the {name} into {a_other}.", "Make the {name} {a_other}.",
                     "Show {a_other} in place of the {name}."),
    "edit_background": ("Make the background {colour}.", "Put it on a {colour} background.",
                        "Turn the background {colour}.", "Paint the background {colour}.",
                        "Show it on a {colour} background."),
    "hear": ("What is said?", "Write down what you hear.", "What do you hear?", "Write what is said.",
             "Tell me what is said.", "Write down what is said."),
    "say": ("Say {text}", "Speak: {text}", "Read this: {text}", "Say this: {text}", "Speak this: {text}"),
    "say_seen": ("Say what you see.", "Speak the name of the object.", "Say the name of what you see.",
                 "Speak what you see.", "Say what the picture shows."),
    "draw_heard": ("Draw what you hear at the {cell} on a {colour} background.",
                   "Paint it at the {cell} on a {colour} background.",
                   "Draw this at the {cell} on a {colour} background.",
                   "Make a picture of what you hear at the {cell} on a {colour} background.",
                   "Show me what you hear at the {cell} on a {colour} background."),
}


# Which wordings: those of training, those kept for evaluation, or always the first one (what is asked aloud).
SEEN, HELD_OUT, FIRST = "seen", "held_out", "first"


def wordings(task: str, wording: str = SEEN) -> tuple[str, ...]:
    split = len(WORDINGS[task]) - HELD_OUT_WORDINGS
    return {SEEN: WORDINGS[task][:split], HELD_OUT: WORDINGS[task][split:], FIRST: WORDINGS[task][:1]}[wording]


def word(task: str, rng: np.random.Generator, wording: str = SEEN, **blanks) -> str:
    options = wordings(task, wording)
    return options[int(rng.integers(len(options)))].format(**blanks)


# --- captions and answers: all derived from the scene ---------------------------------------------------------------


def _join(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def caption_short(scene: Scene) -> str:
    """"a dog and two stars", in reading order."""
    labels: dict[str, int] = {}
    for thing in scene.objects:
        labels[thing.label] = labels.get(thing.label, 0) + 1
    return _join([with_article(label) if count == 1 else f"{NUMBERS[count]} {_plural_label(label)}"
                  for label, count in labels.items()])


def _plural_label(label: str) -> str:
    *before, name = label.split()
    return " ".join([*before, plural(name)])


def caption_long(scene: Scene) -> str:
    """"a dog at the top left and a star at the bottom right on a blue background"."""
    placed = [f"{with_article(thing.label)} at the {CELLS[thing.cell]}" for thing in scene.objects]
    return f"{_join(placed)} on a {scene.background} background"


def caption_list(scene: Scene) -> str:
    """"top left: dog; bottom right: star; background: blue"."""
    return "; ".join([*(f"{CELLS[thing.cell]}: {thing.label}" for thing in scene.objects),
                      f"background: {scene.background}"])


def boxes(scene: Scene) -> str:
    """"dog 03 05 46 47; star 53 52 95 96"."""
    return "; ".join(" ".join([thing.name, *(f"{edge:02d}" for edge in box(thing))]) for thing in scene.objects)


# --- questions about a picture: (question, answer), or None when the scene does not allow it --------------------------


def _ask_what(scene, rng, wording):
    cell = int(rng.integers(4)) if rng.random() < 0.25 else scene.objects[int(rng.integers(len(scene.objects)))].cell
    thing = scene.at(cell)
    return word("what", rng, wording, cell=CELLS[cell]), with_article(thing.label) if thing else "nothing"


def _ask_background(scene, rng, wording):
    return word("background", rng, wording), scene.background


def _single(scene: Scene) -> list[SceneObject]:
    """Objects whose name stands once in the scene: the ones a question can name."""
    names = [thing.name for thing in scene.objects]
    return [thing for thing in scene.objects if names.count(thing.name) == 1]


def _ask_tint(scene, rng, wording):
    tinted = [thing for thing in _single(scene) if thing.tint]
    if not tinted:
        return None
    thing = tinted[int(rng.integers(len(tinted)))]
    return word("tint", rng, wording, name=thing.name), thing.tint


def _ask_count(scene, rng, wording):
    return word("count", rng, wording), NUMBERS[len(scene.objects)]


def _some_name(scene: Scene, rng) -> str:
    """A name of the scene, or as often one that is not in it."""
    if rng.random() < 0.5:
        return scene.objects[int(rng.integers(len(scene.objects)))].name
    absent = [name for name in NAMES if all(thing.name != name for thing in scene.objects)]
    return absent[int(rng.integers(len(absent)))]


def _ask_count_name(scene, rng, wording):
    name = _some_name(scene, rng) if rng.random() < 0.3 else scene.objects[0].name
    count = sum(thing.name == name for thing in scene.objects)
    return word("count_name", rng, wording, names=plural(name)), NUMBERS[count]


def _ask_where(scene, rng, wording):
    things = _single(scene)
    if not things:
        return None
    return _where(things[int(rng.integers(len(things)))], rng, wording)


def _where(thing, rng, wording):
    return word("where", rng, wording, name=thing.name), f"at the {CELLS[thing.cell]}"


def _ask_yes_no(scene, rng, wording):
    name = _some_name(scene, rng)
    present = any(thing.name == name for thing in scene.objects)
    return word("yes_no", rng, wording, a_name=with_article(name)), "yes" if present else "no"


VQA: dict[str, Callable] = {"what": _ask_what, "where": _ask_where, "yes_no": _ask_yes_no, "count": _ask_count,
                            "count_name": _ask_count_name, "background": _ask_background, "tint": _ask_tint}
CAPTIONS = {"caption_short": caption_short, "caption_long": caption_long, "caption_list": caption_list,
            "detection": boxes}


def ask(task: str, scene: Scene, rng: np.random.Generator, wording: str = SEEN) -> tuple[str, str] | None:
    """(instruction, answer) of one task about a picture; None when the scene does not allow it."""
    if task in VQA:
        return VQA[task](scene, rng, wording)
    return word(task, rng, wording), CAPTIONS[task](scene)


def about_picture(rng: np.random.Generator, split: str = "train", questions: int = 6) -> list:
    """One picture, several independent questions about it."""
    scene = random_scene(rng, split)
    tasks = ["what", "where", "yes_no", "count", "count_name", "background", "tint", "caption_short", "caption_long",
             "caption_list", "detection"]
    weights = np.array([3, 4, 3.5, 0.6, 1.5, 0.6, 2, 1.2, 0.8, 0.7, 1])
    chosen = rng.choice(tasks, questions, replace=False, p=weights / weights.sum())
    pairs = [pair for task in chosen if (pair := ask(str(task), scene, rng))]
    return _conversation(scene, pairs) if pairs else about_picture(rng, split, questions)


def _conversation(scene: Scene, pairs: list[tuple]) -> list:
    """The picture, then (question, answer) after (question, answer)."""
    (first, answer), *others = pairs
    messages = [("user", [scene, first]), ("assistant", [answer])]
    for question, answer in others:
        messages += [("user", [question]), ("assistant", [answer])]
    return messages


# With all names from the start a model answers "where" from what is likely and never begins to compare a name with the
# picture; with a few that look unlike each other it begins at once, and all others follow (docs/log.md). That data in
# which few things are frequent bring such matching about is Chan et al.'s finding (2022, arXiv:2205.05055).
FEW_NAMES = ("owl", "pizza", "key", "bus", "sun", "guitar")


def look_up_few(rng: np.random.Generator) -> list:
    """Four of FEW_NAMES in a picture, and where each of them is."""
    scene = random_scene(rng, objects=4, names=FEW_NAMES)
    return _conversation(scene, _shuffled([_where(thing, rng, SEEN) for thing in scene.objects], rng))


def look_up(rng: np.random.Generator) -> list:
    """Two to four different things in a picture; where each of them is, and whether some name is there."""
    scene = random_scene(rng, objects=int(rng.integers(2, 5)))
    pairs = [_where(thing, rng, SEEN) for thing in scene.objects]
    pairs += [_ask_yes_no(scene, rng, SEEN) for _ in range(2)]
    return _conversation(scene, _shuffled(pairs, rng))


def _shuffled(pairs: list, rng: np.random.Generator) -> list:
    return [pairs[k] for k in rng.permutation(len(pairs))]


# --- pictures as answers ----------------------------------------------------------------------------------------------


def draw(rng: np.random.Generator, split: str = "train", wording: str = SEEN,
         scene: Scene | None = None) -> list:
    scene = scene or random_scene(rng, split)
    return [("user", [word("draw", rng, wording, caption=caption_long(scene))]), ("assistant", [scene])]


EDITS = ("edit_grey", "edit_mirror", "edit_remove", "edit_replace", "edit_background")


def edit(rng: np.random.Generator, split: str = "train", wording: str = SEEN, task: str | None = None) -> list:
    """An instruction, the picture that it changes, the changed picture."""
    while True:
        scene = random_scene(rng, split)
        kind = task or EDITS[int(rng.integers(len(EDITS)))]
        blanks, things = {}, _single(scene)
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
        if split == "test" or not held_out(after):
            instruction = word(kind, rng, wording, **blanks)
            # The instruction first: the new picture then stands at one fixed distance behind the old one, whatever the
            # wording, and copying what stays is easy to learn.
            return [("user", [instruction, scene]), ("assistant", [after])]


# --- speech -----------------------------------------------------------------------------------------------------------

SPOKEN = ("what", "background", "count", "where", "yes_no")


def spoken_questions() -> list[str]:
    """Every question that is asked aloud."""
    texts = [WORDINGS["background"][0], WORDINGS["count"][0]]
    texts += [WORDINGS["what"][0].format(cell=cell) for cell in CELLS]
    texts += [WORDINGS["where"][0].format(name=name) for name in NAMES]
    texts += [WORDINGS["yes_no"][0].format(a_name=with_article(name)) for name in NAMES]
    return texts


def spoken_question(rng: np.random.Generator, voices, split: str = "train", questions: int = 2) -> list:
    """A picture and questions about it that are heard; text answers."""
    scene = random_scene(rng, split)
    chosen = rng.choice(SPOKEN, questions, replace=False, p=(0.35, 0.1, 0.1, 0.225, 0.225))
    pairs = [pair for task in chosen if (pair := VQA[str(task)](scene, rng, FIRST))]
    if not pairs:
        return spoken_question(rng, voices, split, questions)
    return _conversation(scene, [(utterance(question, rng, voices), answer) for question, answer in pairs])


def utterance(text: str, rng: np.random.Generator, voices) -> Utterance:
    """Text in a random voice of `voices`, at a random speed and pitch."""
    return Utterance(text, str(rng.choice(list(voices))), int(rng.integers(140, 191)), int(rng.integers(35, 66)))


def narrated(text: str, rng: np.random.Generator) -> Utterance:
    """Text in the narrator's voice, which the model learns to speak with; speed varies a little."""
    return Utterance(text, NARRATOR, int(rng.integers(155, 176)), 50)


def hear(rng, spoken: Utterance, wording: str = SEEN) -> list:
    return [("user", [spoken, word("hear", rng, wording)]), ("assistant", [spoken.text])]


def say(rng, text: str, wording: str = SEEN) -> list:
    return [("user", [word("say", rng, wording, text=text)]), ("assistant", [narrated(text, rng)])]


def say_seen(rng, split: str = "train", wording: str = SEEN) -> list:
    scene = random_scene(rng, split, objects=1)
    return [("user", [scene, word("say_seen", rng, wording)]),
            ("assistant", [narrated(scene.objects[0].name, rng)])]


def draw_heard(rng, voices, split: str = "train", wording: str = SEEN) -> list:
    scene = random_scene(rng, split, objects=1)
    thing = replace(scene.objects[0], tint=None)
    scene = replace(scene, objects=(thing,))
    text = word("draw_heard", rng, wording, cell=CELLS[thing.cell], colour=scene.background)
    return [("user", [utterance(thing.name, rng, voices), text]), ("assistant", [scene])]
