"""What is asked: prompts about the demo world that training never saw, with their right answers.

Splits: "test" (compositions, and voices where there are any, that were held out), "style" (the same with pictures in
another drawing style), "wordings" (the same in held-out wordings), "train_voices" (the same in voices of training).
For one seed the items of all splits are about the same scenes, so they can be compared pair by pair.
"""

import zlib
from dataclasses import dataclass, replace

import numpy as np

from onevocab.demo import demo_tasks, speech, world
from onevocab.demo.demo_tasks import FIRST, HELD_OUT, SEEN, Utterance
from onevocab.demo.world import Scene

CAPTIONS = ("caption_long", "caption_list", "caption_short")
TASKS = ("caption", "vqa", "detection", "draw", "edit", "hear", "say", "spoken_question", "say_seen", "draw_heard")


@dataclass(frozen=True)
class Item:
    """messages: the prompt, as AnyToAny takes it; want: what the reply must be.

    answer: "text", the right reply; "scene", the picture that is asked about or for; "source", the scene before an
    edit; "say", the words that are to be spoken; "kind", the kind of question or edit. Those that apply.
    """

    messages: list
    want: str
    answer: dict


def held_out_scene(rng: np.random.Generator, name: str | None = None) -> Scene:
    """A held-out composition; with `name` one that holds this object, otherwise like any other."""
    if name is None:
        return world.random_scene(rng, "test")
    while True:
        scene = world.random_scene(rng, "train")
        old = scene.objects[0].name
        if any(thing.name == name for thing in scene.objects):
            continue
        tintable = name in world.TINTABLE
        things = tuple(replace(thing, name=name, tint=thing.tint if tintable else None) if thing.name == old else thing
                       for thing in scene.objects)
        scene = replace(scene, objects=things)
        if world.held_out(scene):
            return scene


def hear(said: Utterance):
    """A prompt's sound: (samples, rate)."""
    return speech.speak(said.text, said.voice, said.words_per_minute, said.pitch), speech.RATE


def _show(part, style: str):
    if isinstance(part, Scene):
        return world.picture(part, style)
    return hear(part) if isinstance(part, Utterance) else part


def _item(conversation: list, style: str, **answer) -> Item:
    """A conversation whose last turn is the answer -> Item."""
    *prompt, (_, right) = conversation
    messages = [{"role": role, "content": [_show(part, style) for part in parts]} for role, parts in prompt]
    right = right[0]
    if isinstance(right, Scene):
        return Item(messages, "image", {"scene": right, **answer})
    if isinstance(right, Utterance):
        return Item(messages, "audio", {"say": right.text, **answer})
    return Item(messages, "text", {"text": right, **answer})


def _about(scene: Scene, instruction: str, right: str, style: str, kind: str | None = None) -> Item:
    return _item([("user", [scene, instruction]), ("assistant", [right])], style, scene=scene, kind=kind)


def evaluation_items(task: str, split: str, n: int, seed: int) -> list[Item]:
    """n items of a task. Captions and drawings go through all names in turn, so 100 hold every name.

    Raises UserError when the task needs a package that is not installed.
    """
    style = "openmoji" if split == "style" else "twemoji"
    wording = HELD_OUT if split == "wordings" else SEEN
    voices = speech.TRAIN_VOICES if split == "train_voices" else speech.TEST_VOICES
    base = [seed, zlib.crc32(task.encode())]
    names = np.random.default_rng(base).permutation(world.NAMES)
    items = []
    for i in range(n):
        rng = np.random.default_rng([*base, i])
        name = str(names[i % len(names)])
        if task == "caption":
            kind, scene = CAPTIONS[i % len(CAPTIONS)], held_out_scene(rng, name if i < len(names) else None)
            items.append(_about(scene, *demo_tasks.ask(kind, scene, rng, wording), style, kind.split("_")[1]))
        elif task == "detection":
            scene = held_out_scene(rng)
            items.append(_about(scene, *demo_tasks.ask(task, scene, rng, wording), style))
        elif task == "vqa":
            kind, pair = list(demo_tasks.VQA)[i % len(demo_tasks.VQA)], None
            while pair is None:
                scene = held_out_scene(rng)
                pair = demo_tasks.ask(kind, scene, rng, wording)
            items.append(_about(scene, *pair, style, kind))
        elif task == "draw":
            scene = held_out_scene(rng, name if i < len(names) else None)
            items.append(_item(demo_tasks.draw(rng, "test", wording, scene), style))
        elif task == "edit":
            kind = demo_tasks.EDITS[i % len(demo_tasks.EDITS)]
            conversation = demo_tasks.edit(rng, "test", wording, kind)
            items.append(_item(conversation, style, source=conversation[0][1][1], kind=kind.split("_")[1]))
        elif task == "hear":
            questions = demo_tasks.spoken_questions()
            text = name if i % 2 == 0 else questions[int(rng.integers(len(questions)))]
            said = demo_tasks.utterance(text, rng, voices)
            items.append(_item(demo_tasks.hear(rng, said, wording), style, kind="names" if i % 2 == 0 else "questions"))
        elif task == "say":
            items.append(_item(demo_tasks.say(rng, name, wording), style))
        elif task == "say_seen":
            conversation = demo_tasks.say_seen(rng, "test", wording)
            items.append(_item(conversation, style, scene=conversation[0][1][0]))
        elif task == "spoken_question":
            kind, pair = demo_tasks.SPOKEN[i % len(demo_tasks.SPOKEN)], None
            while pair is None:
                scene = held_out_scene(rng)
                pair = demo_tasks.ask(kind, scene, rng, FIRST)
            said = demo_tasks.utterance(pair[0], rng, voices)
            items.append(_item([("user", [scene, said]), ("assistant", [pair[1]])], style, scene=scene, kind=kind,
                               question=pair[0]))
        elif task == "draw_heard":
            conversation = demo_tasks.draw_heard(rng, voices, "test", wording)
            items.append(_item(conversation, style, said=conversation[0][1][0].text))
        else:
            raise ValueError(f"unknown task {task!r}")
    return items
