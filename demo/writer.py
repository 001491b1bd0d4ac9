"""Writes the demo world as plain webdataset shards: `pretrain-*` (pairs), `instruct-*` (conversations) and
`phase-*` (conversations of one kind, for [[instruct.phases]]).

Two fresh processes write their own shards in a fixed order, so the bytes do not depend on how many cores there are
(eSpeak carries state from one utterance to the next).
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from onevocab.common.errors import UserError
from onevocab.common.processes import run_processes
from onevocab.data.documents import members_of
from onevocab.data.shards.writer import ShardWriter
from onevocab.demo import demo_tasks as tasks
from onevocab.demo import speech
from onevocab.demo.world import NAMES, Scene, random_scene, render
from onevocab.tokenizers import document
from onevocab.tokenizers.document import MediaFile, Part
from onevocab.tokenizers.media import encode_audio, encode_png


class DemoConfig(BaseModel):
    """[data.demo]: how many samples of each kind. voices: "espeak" needs the speech extra, "tones" plays a melody for
    each text instead."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    seed: int = 0
    voices: Literal["espeak", "tones"] = "espeak"
    # pretrain: pairs, shown in both orders, and speech to text in many voices
    captions: int = Field(default=12_000, ge=0)
    narrated: int = Field(default=1_600, ge=0)
    heard: int = Field(default=9_000, ge=0)
    # instruct: conversations
    about_picture: int = Field(default=7_000, ge=0)
    draw: int = Field(default=8_000, ge=0)
    edit: int = Field(default=3_000, ge=0)
    spoken_question: int = Field(default=3_500, ge=0)
    hear: int = Field(default=3_000, ge=0)
    say: int = Field(default=2_000, ge=0)
    say_seen: int = Field(default=2_000, ge=0)
    draw_heard: int = Field(default=3_000, ge=0)
    look_up: int = Field(default=0, ge=0)
    # phases
    look_up_few: int = Field(default=0, ge=0)
    clips_per_voice: int = Field(default=1, ge=1, description="recordings of each text by each training voice")


class _Studio:
    """Renders each utterance once. A task asks for any speed and pitch; it gets one of the recordings of that text by
    that voice, so the same few thousand clips serve every sample.

    The narrator, whom the model learns to speak like, is left as it is. All others are played a little faster or slower
    (speed perturbation, Ko et al. 2015) and some get breath: what they say is to be understood in new voices too.
    """

    def __init__(self, config: DemoConfig):
        self.takes, self.clips = config.clips_per_voice, {}
        self.perform = speech.tones if config.voices == "tones" else speech.speak

    def record(self, spoken: tasks.Utterance) -> bytes:
        """Utterance -> FLAC"""
        take = (spoken.words_per_minute + spoken.pitch) % self.takes
        key = spoken.text, spoken.voice, take
        if key not in self.clips:
            self.clips[key] = encode_audio(self._perform(spoken, take), speech.RATE)
        return self.clips[key]

    def _perform(self, spoken: tasks.Utterance, take: int) -> np.ndarray:
        settings = spoken.text, spoken.voice, spoken.words_per_minute, spoken.pitch
        if spoken.voice == speech.NARRATOR:
            return self.perform(*settings)
        rng = np.random.default_rng([take, *spoken.text.encode(), *spoken.voice.encode()])
        return speech.vary(self.perform(*settings, float(rng.uniform(0.9, 1.1))), rng)


def to_members(content: list, extra: dict, studio: _Studio | None, conversation: bool) -> dict[str, bytes]:
    """A plain list of parts, or a conversation of them, as a sample's members: `json`, `0.png`, `1.flac`, ..."""

    def part(value) -> Part:
        if isinstance(value, str):
            return "text", value
        if isinstance(value, Scene):
            return "image", MediaFile("png", encode_png(Image.fromarray(render(value))))
        return "audio", MediaFile("flac", studio.record(value))

    if conversation:
        shown = document.conversation([(role, [part(value) for value in parts]) for role, parts in content])
    else:
        shown = document.plain_document([part(value) for value in content])
    return members_of(shown, extra, ensure_ascii=True)


def _name(rng) -> str:
    return str(rng.choice(NAMES))


def _said(rng) -> str:
    """Text that is spoken: a name two times of three, else a whole question."""
    questions = tasks.spoken_questions()
    return _name(rng) if rng.random() < 0.67 else questions[int(rng.integers(len(questions)))]


def _caption_pair(rng) -> list:
    scene = random_scene(rng)
    if rng.random() < 0.65:
        # In random order a place does not follow from what was said before.
        order = rng.permutation(len(scene.objects))
        return [scene, tasks.caption_long(replace(scene, objects=tuple(scene.objects[k] for k in order)))]
    return [scene, tasks.caption_short(scene)]


def _narrated_pair(rng) -> list:
    spoken = tasks.narrated(_name(rng), rng)
    return [spoken, spoken.text]


def _heard(rng) -> list:
    return tasks.hear(rng, tasks.utterance(_said(rng), rng, speech.TRAIN_VOICES))


Maker = Callable[[np.random.Generator], list]

# (shards' prefix, name in DemoConfig, how one sample is made, is it a conversation): pictures, then those with sound.
PICTURES: list[tuple[str, str, Maker, bool]] = [
    ("pretrain", "captions", _caption_pair, False),
    ("instruct", "about_picture", tasks.about_picture, True),
    ("instruct", "draw", tasks.draw, True),
    ("instruct", "edit", tasks.edit, True),
    ("phase", "look_up_few", tasks.look_up_few, True),
    ("instruct", "look_up", tasks.look_up, True),
]
SOUNDS: list[tuple[str, str, Maker, bool]] = [
    ("pretrain", "narrated", _narrated_pair, False),
    ("pretrain", "heard", _heard, True),
    ("instruct", "spoken_question", lambda rng: tasks.spoken_question(rng, speech.TRAIN_VOICES), True),
    ("instruct", "hear", _heard, True),
    ("instruct", "say", lambda rng: tasks.say(rng, _name(rng)), True),
    ("instruct", "say_seen", tasks.say_seen, True),
    ("instruct", "draw_heard", lambda rng: tasks.draw_heard(rng, speech.TRAIN_VOICES), True),
]


def _write(folder: Path, kinds_index: int, config: DemoConfig, samples_per_shard: int) -> None:
    """One process's share: every kind of PICTURES or of SOUNDS."""
    studio = _Studio(config)
    for number, (prefix, kind, make, conversation) in enumerate((PICTURES, SOUNDS)[kinds_index]):
        rng = np.random.default_rng((config.seed, kinds_index, number))
        with ShardWriter(folder, f"{prefix}-{kind}", samples_per_shard, overwrite=True) as writer:
            for i in range(getattr(config, kind)):
                sample = to_members(make(rng), {"task": kind}, studio, conversation)
                writer.write(f"{kind}-{i:06d}", sample)


def write_demo(folder, config: DemoConfig, samples_per_shard: int = 2000) -> None:
    """Writes all shards. Raises UserError when the packages of the pictures or of the voices are not installed."""
    folder = Path(folder)
    render(random_scene(np.random.default_rng(0)))  # says at once, in this process, what is not installed
    if config.voices == "espeak" and not speech.available():
        raise UserError("the demo's voices need the speech extra: pip install -e '.[speech]'; or go on without them: "
                        "--data.demo.voices=tones")
    run_processes(_write, [(folder, index, config, samples_per_shard) for index in (0, 1)],
                  f"writing the demo's shards to {folder} failed; free some space and start again")
