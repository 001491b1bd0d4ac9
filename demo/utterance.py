"""What is to be spoken: by whom, how fast and how high."""

from dataclasses import dataclass

import numpy as np

from onevocab.demo import speech


@dataclass(frozen=True)
class Utterance:
    """words_per_minute and pitch (0..99) are eSpeak's."""

    text: str
    voice: str = speech.NARRATOR
    words_per_minute: int = 165
    pitch: int = 50


def in_some_voice(text: str, rng: np.random.Generator, split: str) -> Utterance:
    """Text at a random speed and pitch, in a random voice of the split: of training, or held out."""
    voices = speech.TRAIN_VOICES if split in ("train", "train_voices") else speech.TEST_VOICES
    return Utterance(text, str(rng.choice(list(voices))), int(rng.integers(140, 191)), int(rng.integers(35, 66)))


def narrated(text: str, rng: np.random.Generator) -> Utterance:
    """Text in the narrator's voice, which the model learns to speak with; speed varies a little."""
    return Utterance(text, speech.NARRATOR, int(rng.integers(155, 176)), 50)
