"""What happens to a recording on its way: for evaluation. Nothing here is made as training's augmentation makes it."""

import io
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from onevocab.common.errors import UserError
from onevocab.demo.speech import RATE
from onevocab.tokenizers.torchaudio_guard import torchaudio

FLITE_VOICES = ("kal", "awb", "rms", "slt")
Sound = tuple[np.ndarray, int]


def silence(samples: np.ndarray, seconds: float) -> Sound:
    """At both ends."""
    return np.pad(samples, round(seconds * RATE)), RATE


def noise(samples: np.ndarray, decibels: float) -> Sound:
    """A band of Gaussian noise from 300 to 3,400 Hz, as a telephone line's, its RMS `decibels` of full scale."""
    spectrum = np.fft.rfft(np.random.default_rng(len(samples)).standard_normal(len(samples)))
    frequency = np.fft.rfftfreq(len(samples), 1 / RATE)
    spectrum[(frequency < 300) | (frequency > 3400)] = 0
    band = np.fft.irfft(spectrum, len(samples))
    return (samples + band * 10 ** (decibels / 20) / np.sqrt(np.mean(band**2))).astype(np.float32), RATE


def echoes(samples: np.ndarray) -> Sound:
    """Six walls, each one echo: a small room without a tail."""
    heard = np.pad(samples, (0, RATE // 10))
    for milliseconds, strength in ((7, 0.5), (13, -0.4), (19, 0.35), (29, 0.3), (43, -0.25), (61, 0.2)):
        late = milliseconds * RATE // 1000
        heard[late : late + len(samples)] += np.float32(strength) * samples
    return heard, RATE


def faster(samples: np.ndarray, factor: float) -> Sound:
    """Played at another rate: speed and pitch."""
    return samples, round(RATE * factor)


def stereo(samples: np.ndarray) -> Sound:
    """44.1 kHz, 16 bits, two channels."""
    import torch

    wide = torchaudio.functional.resample(torch.from_numpy(samples), RATE, 44_100).numpy()
    return (np.stack([wide, wide], axis=1).clip(-1, 1) * 32767).astype(np.int16), 44_100


def mp3(samples: np.ndarray) -> Sound:
    """There and back at 64 kbit/s (LAME's level 0.6 of libsndfile, at 16 kHz)."""
    packed = io.BytesIO()
    soundfile.write(packed, samples, RATE, format="MP3", subtype="MPEG_LAYER_III", compression_level=0.6,
                    bitrate_mode="CONSTANT")
    packed.seek(0)
    return soundfile.read(packed, dtype="float32")


# Split -> (what is new in it, for the report; a clip of peak 0.7 at 16 kHz -> the clip under this condition)
CONDITIONS: dict[str, tuple[str, Callable[[np.ndarray], Sound]]] = {
    "silence_0.2": ("0.2 s of silence at both ends", lambda clip: silence(clip, 0.2)),
    "silence_0.5": ("0.5 s of silence at both ends", lambda clip: silence(clip, 0.5)),
    "silence_2": ("2 s of silence at both ends", lambda clip: silence(clip, 2.0)),
    "half": ("half as loud", lambda clip: (clip * np.float32(0.5), RATE)),
    "tenth": ("a tenth as loud", lambda clip: (clip * np.float32(0.1), RATE)),
    "clipped": ("twice as loud, clipped", lambda clip: (np.clip(clip * 2, -1, 1), RATE)),
    "noise": ("noise at -30 dB of full scale", lambda clip: noise(clip, -30)),
    "stereo": ("44.1 kHz, stereo, 16 bits", stereo),
    "mp3": ("MP3 at 64 kbit/s", mp3),
    "echoes": ("a small room's echoes", echoes),
    "slower": ("10% slower", lambda clip: faster(clip, 0.9)),
    "faster": ("10% faster", lambda clip: faster(clip, 1.1)),
}


def flite(text: str, voice: str) -> Sound:
    """Another synthesiser, Flite (Black and Lenzo 2001), where its command is installed; as it comes. Raises
    UserError without it."""
    if shutil.which("flite") is None:
        raise UserError("the other synthesiser is Flite: install it (apt install flite) to measure this")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "said.wav"
        said = subprocess.run(["flite", "-voice", voice, "-t", text, "-o", str(out)], capture_output=True, text=True)
        if said.returncode or not out.is_file():
            raise UserError(f"flite failed: {said.stderr.strip()[:200]}")
        return soundfile.read(out, dtype="float32")
