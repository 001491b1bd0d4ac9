"""Captions of a scene, short, long or as a list: pairs to pretrain on, and descriptions asked for."""

from dataclasses import replace

from onevocab.demo import world
from onevocab.demo.names import READER
from onevocab.demo.picture_judge import Reading
from onevocab.demo.task import STYLE, DemoTask, scene_split
from onevocab.demo.world import CELLS, NAMES, NUMBERS, Scene, plural, with_article
from onevocab.evaluation import metrics
from onevocab.tasks import Card, Metric, Section, Wordings

WORDINGS = {
    "caption_short": Wordings(("What is in the picture?", "Name what you see.", "List the objects in this picture.",
                               "What do you see?", "Give a short caption.", "Which things are in the picture?",
                               "Can you say what you see?", "Tell me which things you see.",
                               "What does the picture show?",
                               "Tell me what is in the picture.", "What can you see here?")),
    "caption_long": Wordings(("Describe the picture.", "Describe this picture in detail.", "Write a long caption.",
                              "Give a description of the picture.", "Give a caption with all details.",
                              "What is where in this picture?", "Write in full what the picture shows.",
                              "Give a full description.", "Give all details of the picture.",
                              "Can you describe the picture?", "Write a description of this picture.",
                              "Give me a description in full.", "Tell me all about the picture.",
                              "Describe what you see in detail.", "Give a detailed description of the picture.")),
    "caption_list": Wordings(("Describe the picture as a list.", "List what is where, and the background.",
                              "Make a list of places and objects.", "Give the picture's layout as a list.",
                              "Write a list of what is where.", "Describe the layout as a list.")),
}
KINDS = ("caption_long", "caption_list", "caption_short")


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


CAPTIONS = {"caption_short": caption_short, "caption_long": caption_long, "caption_list": caption_list}


def ask_caption(kind: str, scene: Scene, rng, wording: str) -> tuple[str, str]:
    """(instruction, caption)"""
    return WORDINGS[kind].pick(rng, wording), CAPTIONS[kind](scene)


class Captions(DemoTask):
    """A picture and its caption, without an instruction."""

    name, media, stage, samples, position = "captions", ("image",), "pretrain", 12_000, 0

    def example(self, rng, split, wording):
        scene = world.random_scene(rng, scene_split(split))
        if rng.random() < 0.65:
            # In random order a place does not follow from what was said before.
            order = rng.permutation(len(scene.objects))
            caption = caption_long(replace(scene, objects=tuple(scene.objects[k] for k in order)))
        else:
            caption = caption_short(scene)
        return [(None, [scene, caption])]


def objects_named(answer: dict, reply: str):
    return metrics.overlap({thing.name for thing in answer["scene"].objects}, set(READER.names(reply)))


def places_named(answer: dict, reply: str):
    if answer.get("kind") == "short":
        return 0, 0  # a short caption names no places
    wanted = {(name, cell) for cell, name in enumerate(answer["scene"].cells) if name}
    return metrics.overlap(wanted, set(READER.placed(reply)))


def describe(reading: Reading) -> str:
    """A judge's reading in words, so that it is scored like the model's description."""
    return ", ".join(f"{name} in the {CELLS[cell]}" for cell, name in enumerate(reading.cells) if name)


class Caption(DemoTask):
    """Kinds in turn; the first items go through all names."""

    name, media, count, controls = "caption", ("image",), "captions", STYLE
    wordings = tuple(WORDINGS.values())
    metrics = (Metric("caption_objects", "objects named", objects_named),
               Metric("caption_positions", "objects named with their place", places_named))
    section = Section("Descriptions", "What the model says about pictures it never saw.")

    def example(self, rng, split, wording, kind=None, scene=None):
        scene = scene or world.random_scene(rng, scene_split(split))
        question, caption = ask_caption(kind or str(rng.choice(KINDS)), scene, rng, wording)
        return [("user", [scene, question]), ("assistant", [caption])]

    def evaluated(self, rng, split, wording, number, seed):
        kind = KINDS[number % len(KINDS)]
        scene = world.held_out_scene(rng, self.name_in_turn(number, seed) if number < len(NAMES) else None)
        return self.example(rng, split, wording, kind, scene), {"scene": scene, "kind": kind.split("_")[1]}

    def ceilings(self, judges, items):
        originals = [item.messages[0]["content"][0] for item in items]
        return tuple([describe(reading) for reading in judges.look(pictures)]
                     for pictures in (originals, judges.through_tokenizer("image", originals)))

    def card(self, item, reply, verdict):
        return answer_card(item, reply)


def answer_card(item, reply) -> Card:
    """A card of a question with a text for an answer: pictures, then what is heard."""
    parts = [part for message in item.messages for part in message["content"]]
    prompt = " ".join(part for part in parts if isinstance(part, str))
    media = [("heard" if isinstance(part, tuple) else "picture", part) for part in parts if not isinstance(part, str)]
    return Card(media, [("prompt", prompt or item.answer.get("question", "")), ("right answer", item.answer["text"]),
                        ("model", reply.text)])


TASKS = (Captions(), Caption())
