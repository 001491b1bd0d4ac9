"""Writes the demo world as plain webdataset shards: `pretrain-*` (pairs), `instruct-*` (conversations) and
`phase-*` (conversations of one kind, for [[instruct.phases]]), one kind for each task that makes samples.

Two fresh processes write their own shards in a fixed order, so the bytes do not depend on how many cores there are
(eSpeak carries state from one utterance to the next).
"""

import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, create_model

from onevocab.common.errors import UserError
from onevocab.common.processes import run_processes
from onevocab.data.documents import members_of
from onevocab.data.shards.writer import ShardWriter
from onevocab.demo import speech
from onevocab.demo.task import DemoTask
from onevocab.demo.tasks import TASKS
from onevocab.demo.utterance import Utterance
from onevocab.demo.world import Scene, random_scene, render
from onevocab.tasks import SEEN, Conversation
from onevocab.tokenizers import document
from onevocab.tokenizers.document import MediaFile, Part
from onevocab.tokenizers.media import encode_audio, encode_png


class _Settings(BaseModel):
    """[data.demo]: how many samples of each task."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    seed: int = Field(0, description="of all samples")
    voices: Literal["espeak", "tones"] = Field("espeak", description="espeak needs the speech extra, tones plays a "
                                               "melody for each text instead")
    clips_per_voice: int = Field(default=1, ge=1, description="recordings of each text by each training voice but the "
                                 "narrator, whom the model learns to speak like")


WRITTEN = tuple(task for task in TASKS if task.samples is not None)
DemoConfig = create_model("DemoConfig", __base__=_Settings, __doc__=_Settings.__doc__, __module__=__name__,
                          **{task.name: (int, Field(task.samples, ge=0, description=f"samples of {task.name}"))
                             for task in WRITTEN})


class _Studio:
    """Renders each utterance once. A task asks for any speed and pitch; it gets one of the recordings of that text by
    that voice, so the same few thousand clips serve every sample.

    The narrator, whom the model learns to speak like, is recorded once and left as it is. All others are played a
    little faster or slower (speed perturbation, Ko et al. 2015) and some get breath: what they say is to be understood
    in new voices too.
    """

    def __init__(self, config: _Settings):
        self.takes, self.clips = config.clips_per_voice, {}
        self.perform = speech.tones if config.voices == "tones" else speech.speak

    def record(self, spoken: Utterance) -> bytes:
        """Utterance -> FLAC"""
        take = 0 if spoken.voice == speech.NARRATOR else (spoken.words_per_minute + spoken.pitch) % self.takes
        key = spoken.text, spoken.voice, take
        if key not in self.clips:
            self.clips[key] = encode_audio(self._perform(spoken, take), speech.RATE)
        return self.clips[key]

    def _perform(self, spoken: Utterance, take: int) -> np.ndarray:
        settings = spoken.text, spoken.voice, spoken.words_per_minute, spoken.pitch
        if spoken.voice == speech.NARRATOR:
            return self.perform(*settings)
        rng = np.random.default_rng([take, *spoken.text.encode(), *spoken.voice.encode()])
        return speech.vary(self.perform(*settings, float(rng.uniform(0.9, 1.1))), rng)


def to_members(conversation: Conversation, extra: dict, studio: _Studio) -> dict[str, bytes]:
    """A conversation, or a plain list of parts (role None), as a sample's members: `json`, `0.png`, `1.flac`, ..."""

    def part(value) -> Part:
        if isinstance(value, str):
            return "text", value
        if isinstance(value, Scene):
            return "image", MediaFile("png", encode_png(Image.fromarray(render(value))))
        return "audio", MediaFile("flac", studio.record(value))

    turns = [(role, [part(value) for value in parts]) for role, parts in conversation]
    shown = document.conversation(turns) if turns[0][0] else document.plain_document(turns[0][1])
    return members_of(shown, extra, ensure_ascii=True)


def _share(process: int) -> list[DemoTask]:
    """The tasks whose samples a process writes, in order: 0 those without sound, 1 those with. A task without a
    position comes last, so that what was there before it stays the same bytes."""
    tasks = [task for task in WRITTEN if ("audio" in task.media) == bool(process)]
    return sorted(tasks, key=lambda task: len(WRITTEN) if task.position is None else task.position)


def _write(folder: Path, process: int, config: _Settings, samples_per_shard: int) -> None:
    """One process's share."""
    studio = _Studio(config)
    for task in _share(process):
        number = zlib.crc32(task.name.encode()) if task.position is None else task.position
        rng = np.random.default_rng((config.seed, process, number))
        about = {"task": task.name} | ({} if task.augmented else {"augment": False})
        with ShardWriter(folder, f"{task.stage}-{task.name}", samples_per_shard, overwrite=True) as writer:
            for i in range(getattr(config, task.name)):
                sample = to_members(task.example(rng, "train", SEEN), about, studio)
                writer.write(f"{task.name}-{i:06d}", sample)


def write_demo(folder, config: _Settings, samples_per_shard: int = 2000) -> None:
    """Writes all shards. Raises UserError when the packages of the pictures or of the voices are not installed."""
    folder = Path(folder)
    render(random_scene(np.random.default_rng(0)))  # says at once, in this process, what is not installed
    if config.voices == "espeak" and not speech.available():
        raise UserError("the demo's voices need the speech extra: pip install -e '.[speech]'; or go on without them: "
                        "--data.demo.voices=tones")
    run_processes(_write, [(folder, index, config, samples_per_shard) for index in (0, 1)],
                  f"writing the demo's shards to {folder} failed; free some space and start again")
