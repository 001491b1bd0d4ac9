"""Synthetic speech for the demo: eSpeak NG through ctypes (package `espeakng-loader`, an optional extra).

eSpeak NG is GPL-3 and stays outside this project: it is loaded from the user's own install, only when speech is made.
"""

import ctypes
import functools
import importlib
import threading
from pathlib import Path

import numpy as np

from onevocab.common.errors import UserError
from onevocab.tokenizers.torchaudio_guard import torchaudio

RATE = 16_000
NARRATOR = "en-us"
# Clear to the judge of speech, and the same bytes every time: f3, Alicia, Demonic, sandro, victor and the whispers draw
# their breath from noise that is not seeded.
_VARIANTS = (
    "f1 f4 m1 m2 m3 m5 m6 m7 m8 Alex Denis Diogo Gene Henrique Hugo Jacky Mario Mike Nguyen Reed Storm "
    "adam anika announcer antonio aunty belinda benjamin caleb croak david ed edward grandma iven john "
    "klatt klatt2 linda max michel mike2 paul pedro quincy steph"
)
TRAIN_VOICES = (NARRATOR, "en-us-nyc", "en-gb-x-rp", "en-gb-x-gbclan",
                *(f"en-us+{variant}" for variant in _VARIANTS.split()))
TEST_VOICES = ("en-us+f2", "en-us+f5", "en-us+m4")

_SYNCHRONOUS, _DONT_EXIT = 2, 0x8000
_RATE, _PITCH = 1, 3
_lock = threading.Lock()


def tones(text: str, voice: str = NARRATOR, words_per_minute: int = 165, pitch: int = 50,
          playback: float = 1.0) -> np.ndarray:
    """A melody instead of speech, one note a letter, for machines without eSpeak NG. Same arguments as `speak`."""
    voices = TRAIN_VOICES + TEST_VOICES
    lowest = 110 * playback * 2 ** (pitch / 50 + voices.index(voice) / len(voices))
    time = np.arange(int(RATE * 11 / words_per_minute)) / RATE
    envelope = np.sin(np.pi * time / time[-1])
    notes = [lowest * 2 ** ((ord(letter) - 97) / 12) for letter in text.lower() if letter.isalpha()]
    melody = [envelope * np.sin(2 * np.pi * frequency * time) for frequency in notes] or [envelope * 0]
    return (0.7 * np.concatenate(melody)).astype(np.float32)


def available() -> bool:
    """Whether the speech extra is installed and loads."""
    try:
        _engine()
    except UserError:
        return False
    return True


class _Engine:
    """One instance a process: a second one would take over the first one's callback."""

    def __init__(self):
        try:
            loader = importlib.import_module("espeakng_loader")
            self.library = ctypes.CDLL(str(loader.get_library_path()))
            self.data = Path(loader.get_data_path())
        except (ImportError, OSError) as error:
            raise UserError(f"speech needs eSpeak NG ({error}); run `pip install 'onevocab[speech]'` "
                            "(from a clone: pip install -e '.[speech]')") from None
        # The folder that HOLDS espeak-ng-data.
        rate = self.library.espeak_Initialize(_SYNCHRONOUS, 0, str(self.data.parent).encode(), _DONT_EXIT)
        if rate <= 0:
            raise UserError(f"eSpeak NG found no voices under {self.data}; reinstall espeakng-loader")
        self.rate, self.pieces = rate, []
        callback_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = callback_type(self._receive)  # kept: ctypes does not hold it
        self.library.espeak_SetSynthCallback(self.callback)

    def _receive(self, samples, count, _events) -> int:
        if samples and count > 0:
            self.pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, words_per_minute: int, pitch: int) -> np.ndarray:
        variant = voice.partition("+")[2]
        # An unknown variant would be accepted silently.
        if variant and not (self.data / "voices" / "!v" / variant).is_file():
            raise UserError(f"eSpeak NG has no voice variant {variant!r}")
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise UserError(f"eSpeak NG has no voice {voice!r}")
        self.library.espeak_SetParameter(_RATE, words_per_minute, 0)
        self.library.espeak_SetParameter(_PITCH, pitch, 0)
        self.pieces.clear()
        data = text.encode() + b"\0"
        self.library.espeak_Synth(data, len(data), 0, 1, 0, 1, None, None)
        return np.concatenate(self.pieces) if self.pieces else np.zeros(1, np.int16)


@functools.cache
def _engine() -> _Engine:
    return _Engine()


@functools.cache
def _resampler(rate: int):
    return torchaudio.transforms.Resample(rate, RATE)


def speak(text: str, voice: str = NARRATOR, words_per_minute: int = 165, pitch: int = 50,
          playback: float = 1.0) -> np.ndarray:
    """Text -> float32 (n,) at 16 kHz, silence at both ends cut, peak 0.7. pitch: 0..99; playback: how much faster the
    recording runs, which moves pitch and formants together, as a smaller speaker would (to the next 500 Hz)."""
    import torch

    with _lock:
        engine = _engine()
        samples = engine.say(text, voice, words_per_minute, pitch).astype(np.float32) / 32768
    rate = engine.rate if playback == 1 else round(engine.rate * playback / 500) * 500
    samples = _resampler(rate)(torch.from_numpy(samples)).numpy()
    loud = np.flatnonzero(np.abs(samples) > 0.01)
    if len(loud):
        # 20 ms of margin: a hard cut would click.
        samples = samples[max(0, loud[0] - RATE // 50) : loud[-1] + RATE // 50]
    return samples * (0.7 / max(1e-6, float(np.abs(samples).max())))


def vary(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Adds breath, noise that follows the loudness of the last 20 ms, of a random strength; half of the time none."""
    strength = rng.uniform(-0.4, 0.4)
    if strength <= 0:
        return samples
    window = np.full(RATE // 50, 50 / RATE, np.float32)
    loudness = np.convolve(np.abs(samples), window)[: len(samples)]
    return samples + np.float32(strength) * loudness * rng.standard_normal(len(samples), dtype=np.float32)
