"""The tasks: prompts in, rows of the report and cards to look at out.

Every task runs the same way: items of a held-out split are answered by the model, what a judge makes of the answers
("said": a text, a picture's Reading, or the phrase heard) is scored item by item, and the same scorer gives the chance
(other items' right answers), the ceilings (originals, and originals through the tokenizer) and the controls.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from onevocab.common.errors import UserError
from onevocab.demo import speech, speech_judge, world
from onevocab.demo.items import evaluation_items
from onevocab.demo.picture_judge import TOLERANCE, PictureJudge, Reading, border_colour, to_array
from onevocab.evaluation import metrics
from onevocab.evaluation.config import EvaluateConfig
from onevocab.evaluation.metrics import NameReader, row
from onevocab.evaluation.report import Card

NOTHING = Reading(None, (None,) * 4)
READER = NameReader({spelling: name for name in world.NAMES for spelling in (name, world.plural(name))})
HELD_OUT = {
    "test": "held-out compositions", "style": "unseen drawing style", "wordings": "held-out wordings",
    "seen": "seen wordings", "voices": "held-out voices", "train_voices": "seen voices",
    "words": "nothing held out: seen names",
}


# What is right. Each scorer takes (answer, said) and gives (got, possible).


def cells_of(scene) -> tuple[str | None, ...]:
    """The names of a scene by cell, as it is shown."""
    shown = [None] * 4
    for thing in scene.objects:
        shown[thing.cell ^ 1 if scene.mirrored else thing.cell] = thing.name
    return tuple(shown)


def objects_named(answer: dict, said: str):
    return metrics.overlap({thing.name for thing in answer["scene"].objects}, set(READER.names(said)))


def places_named(answer: dict, said: str):
    if answer.get("kind") == "short":
        return 0, 0  # a short caption names no places
    wanted = {(name, cell) for cell, name in enumerate(cells_of(answer["scene"])) if name}
    return metrics.overlap(wanted, set(READER.placed(said)))


def same_text(answer: dict, said: str):
    return int(metrics.normal(answer["text"]) == metrics.normal(said)), 1


def same_words(answer: dict, said: str):
    return metrics.word_score(answer["text"], said)


def boxes_found(answer: dict, said: str):
    return metrics.detection_score(READER.boxes(answer["text"]), READER.boxes(said))


def objects_drawn(answer: dict, said: Reading):
    return metrics.overlap([name for name in cells_of(answer["scene"]) if name], said.names)


def objects_in_place(answer: dict, said: Reading):
    wanted = [(name, cell) for cell, name in enumerate(cells_of(answer["scene"])) if name]
    return metrics.overlap(wanted, [(name, cell) for cell, name in enumerate(said.cells) if name])


def background_drawn(answer: dict, said: Reading):
    return int(said.background == answer["scene"].background), 1


def edited(answer: dict, said: tuple[Reading, Image.Image | None]):
    """Every cell reads as it should, the background is right, and the picture is nearer to the exact result than to
    what was given (which is what tells grey from colour and mirrored from not)."""
    reading, picture = said
    if picture is None or reading.cells != cells_of(answer["scene"]):
        return 0, 1
    drawn, target, source = (to_array(p).astype(float) for p in (
        picture, world.picture(answer["scene"]), world.picture(answer["source"])))
    colour = np.linalg.norm(border_colour(drawn) - border_colour(target)) <= TOLERANCE
    return int(colour and np.square(drawn - target).mean() < np.square(drawn - source).mean()), 1


def phrase_heard(answer: dict, said: str | None):
    return int(said is not None and speech_judge.spell(said) == speech_judge.spell(answer["say"])), 1


def describe(reading: Reading) -> str:
    """A judge's reading in words, so that it is scored like the model's description."""
    return ", ".join(f"{name} in the {metrics.PLACES[cell]}" for cell, name in enumerate(reading.cells) if name)


Scorer = Callable[[dict, object], tuple[float, float]]
# items.py's task.py -> (row's task, metric, scorer)
MEASURES: dict[str, list[tuple[str, str, Scorer]]] = {
    "caption": [("caption_objects", "objects named", objects_named),
                ("caption_positions", "objects named with their place", places_named)],
    "vqa": [("vqa", "answers right", same_text)],
    "detection": [("detection", "boxes right (name, IoU >= 0.5)", boxes_found)],
    "draw": [("text_to_image_objects", "objects drawn", objects_drawn),
             ("text_to_image_objects", "objects drawn in their place", objects_in_place),
             ("text_to_image_background", "backgrounds right", background_drawn)],
    "edit": [("image_edit", "pictures edited right", edited)],
    "hear": [("speech_recognition", "words right (1 - WER)", same_words),
             ("speech_recognition", "sentences exact", same_text)],
    "say": [("text_to_speech", "phrases heard right", phrase_heard)],
    "spoken_question": [("spoken_question", "answers right", same_text)],
    "say_seen": [("image_to_speech", "phrases heard right", phrase_heard)],
    "draw_heard": [("speech_to_image", "objects drawn", objects_drawn)],
}
VOICED = ("hear", "spoken_question", "draw_heard")  # the prompt holds a voice
WORDED = ("caption", "vqa", "detection", "draw", "edit", "hear", "say")


@dataclass
class Answered:
    """Items with the model's replies, and what the judges made of them."""

    items: list
    replies: list
    said: list

    def scores(self, scorer: Scorer, kind: str | None = None) -> list:
        return [scorer(item.answer, said) for item, said in zip(self.items, self.said, strict=True)
                if kind is None or item.answer.get("kind") == kind]

    def first(self, count: int) -> "Answered":
        return Answered(self.items[:count], self.replies[:count], self.said[:count])


def parts_of(item) -> list:
    """All parts of a prompt, in order."""
    flat = []
    for message in item.messages:
        content = message["content"] if isinstance(message, dict) else message
        flat += content if isinstance(content, list) else [content]
    return flat


def pictures_of(item) -> list[Image.Image]:
    return [part for part in parts_of(item) if isinstance(part, Image.Image)]


def prompt_text(item) -> str:
    return " ".join(part for part in parts_of(item) if isinstance(part, str)).strip()


def shuffled_media(items: list) -> list:
    """The same prompts with the pictures and sounds of the item before: nobody keeps their own."""

    def swap(item, donor):
        media = {kind: [part for part in parts_of(donor) if isinstance(part, kind)] for kind in (Image.Image, tuple)}
        used = {kind: 0 for kind in media}

        def other(part):
            for kind, pool in media.items():
                if isinstance(part, kind) and pool:
                    used[kind] += 1
                    return pool[(used[kind] - 1) % len(pool)]
            return part

        def content(value):
            return [other(part) for part in value] if isinstance(value, list) else other(value)

        messages = [{**m, "content": content(m["content"])} if isinstance(m, dict) else other(m)
                    for m in item.messages]
        return replace(item, messages=messages)

    return [swap(item, items[i - 1]) for i, item in enumerate(items)]


class Evaluator:
    """Asks a model and judges what it gives; `suite.run` fills rows, notes, and the page's cards by section."""

    def __init__(self, model, judge: PictureJudge, config: EvaluateConfig, limit: int | None = None):
        self.model, self.judge, self.config, self.limit = model, judge, config, limit
        self.rows: list[dict] = []
        self.notes: list[str] = []
        self.sections: dict[str, list[Card]] = {}
        self.drawings: list[tuple[str, Image.Image]] = []
        self.candidates: dict[str, list[str]] = {}
        self.answered: dict[str, Answered] = {}
        self.pools: dict[str, list[str]] = {}  # phrases from which candidates are drawn, by task
        self.ear = speech_judge.SpeechJudge() if speech_judge.available() else None

    def count(self, wanted: int) -> int:
        return min(wanted, self.limit) if self.limit else wanted

    # Asking and judging.

    def ask(self, prompts: list, want: str) -> list:
        """Replies of the model; prompt i draws with seed i."""
        c = self.config
        temperature = {"text": c.text_temperature, "image": c.image_temperature, "audio": c.audio_temperature}[want]
        return self.model.generate_batch(
            prompts, want=want, temperature=temperature, top_k=c.top_k or 0, top_p=c.top_p or 1.0, seed=0,
            guidance=c.guidance if want == "image" else 1.0, rows=c.batch,
            max_new_tokens=c.max_text_tokens if want == "text" else None)

    def answer(self, task: str, items: list) -> Answered:
        """Lets the model answer items, and judges what it gave."""
        replies = self.ask([item.messages for item in items], items[0].want)
        if items[0].want == "text":
            said = [reply.text for reply in replies]
        elif items[0].want == "image":
            said = self.look([reply.images[0] if reply.images else None for reply in replies], task)
        else:
            sounds = [reply.audio[0] if reply.audio else None for reply in replies]
            said = self.listen(sounds, [item.answer["say"] for item in items], task)
        return Answered(items, replies, said)

    def look(self, pictures: list, task: str) -> list:
        """Readings of pictures (None: nothing was drawn), with the picture itself for edits."""
        readings = iter(self.judge.read([p for p in pictures if p is not None]))
        found = [NOTHING if picture is None else next(readings) for picture in pictures]
        return list(zip(found, pictures, strict=True)) if task == "edit" else found

    def listen(self, sounds: list, phrases: list[str], task: str) -> list[str | None]:
        """What the speech judge hears, among candidates that the report lists."""
        pool = self.pools[task]
        jobs = []
        for sound, phrase in zip(sounds, phrases, strict=True):
            choice = speech_judge.candidates(phrase, pool, self.config.candidates, self.config.seed)
            self.candidates[f"{task}: {phrase}"] = choice
            jobs.append((*(sound or (np.zeros(1600, np.float32), 16_000)), choice))
        return speech_judge.hear_all(jobs)

    def through_tokenizer(self, kind: str, sources: list) -> list:
        """Media encoded to codes and decoded again."""
        tokenizer = self.model.tokenizers.media[kind]
        return tokenizer.decode_batch(tokenizer.encode_batch(sources))

    def items(self, task: str, split: str, count: int) -> list:
        items = evaluation_items(task, split, self.count(count), self.config.seed)
        if not items:
            raise UserError(f"no items of task {task!r}, split {split!r}")
        if items[0].want != "audio":
            return items
        if self.ear is None:
            raise UserError("judging speech needs pocketsphinx; run `pip install 'onevocab[judge]'`")
        known = [item for item in items if self.ear.knows(item.answer["say"])]
        if len(known) < len(items):
            self.notes.append(f"{task}: {len(items) - len(known)} of {len(items)} phrases hold words that "
                              "pocketsphinx's dictionary lacks; they are left out.")
        self.pools[task] = sorted({*self.pools.get(task, ()), *(item.answer["say"] for item in known)})
        return known

    # Rows.

    def chance(self, items: list, scorer: Scorer, kind: str | None = None) -> list:
        """Scores of the right answers of other items of the same kind: what a blind guess from the task's own
        distribution gets."""
        by_kind: dict[object, list] = {}
        for item in items:
            if kind is None or item.answer.get("kind") == kind:
                by_kind.setdefault(item.answer.get("kind"), []).append(item)
        scores = []
        for group in by_kind.values():
            for shift in range(1, min(9, len(group))):
                for item, other in zip(group, group[shift:] + group[:shift], strict=True):
                    scores.append(scorer(item.answer, self.right(other)))
        return scores

    @staticmethod
    def right(item):
        """What a judge would say of the right answer."""
        scene = item.answer.get("scene")
        if item.want == "text":
            return item.answer["text"]
        if item.want == "audio":
            return item.answer["say"]
        reading = Reading(scene.background, cells_of(scene))
        return (reading, world.picture(scene)) if "source" in item.answer else reading

    def ceilings(self, task: str, items: list) -> tuple[list, list] | None:
        """What the judge says of the originals, and of the originals through the tokenizer; None where the task has
        no judge but the comparison of texts."""
        if task == "caption":
            originals = [pictures_of(item)[0] for item in items]
            return tuple([describe(r) for r in self.look(p, task)]
                         for p in (originals, self.through_tokenizer("image", originals)))
        if items[0].want == "image":
            originals = [world.picture(item.answer["scene"]) for item in items]
            return tuple(self.look(p, task) for p in (originals, self.through_tokenizer("image", originals)))
        if items[0].want == "audio":
            phrases = [item.answer["say"] for item in items]
            originals = [(speech.speak(phrase), speech.RATE) for phrase in phrases]  # the narrator's, as the model's
            both = self.listen(originals + self.through_tokenizer("audio", originals), phrases * 2, task)
            return both[: len(items)], both[len(items) :]
        return None

    def add(self, task: str, split: str, answered: Answered, ceilings=None, kinds: bool = False) -> None:
        """The rows of a task: whole, and by kind of question or edit where there are several."""
        for name, metric, scorer in MEASURES[task]:
            upper = {}
            if ceilings:
                upper = {key: Answered(answered.items, [], said).scores(scorer)
                         for key, said in zip(("original", "tokenizer"), ceilings, strict=True)}
            chance = self.chance(answered.items, scorer)
            if answered.items[0].want == "audio":
                chance = 1 / min(self.config.candidates, len(self.pools[task]))
            self.rows.append(row(name, split, metric, answered.scores(scorer), chance=chance, **upper))
            for kind in sorted({item.answer["kind"] for item in answered.items if item.answer.get("kind")}):
                scores = answered.scores(scorer, kind)
                if kinds and metrics.ratio(scores) is not None:
                    chance = self.chance(answered.items, scorer, kind)
                    self.rows.append(row(name, split, f"{metric}: {kind}", scores, chance=chance))

    def missing(self, task: str, split: str, reason) -> None:
        """Null rows where a task cannot run here, and the reason, once."""
        for name, metric, _ in MEASURES[task]:
            self.rows.append(row(name, split, metric, None))
        if f"{task}: {reason}" not in self.notes:
            self.notes.append(f"{task}: {reason}")
