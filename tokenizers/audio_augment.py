"""Sounds as other microphones, rooms and speakers would have given them: what is heard is altered in training, what is
to be made is not."""

import numpy as np
from pydantic import BaseModel, ConfigDict, Field


class AudioAugment(BaseModel):
    """[audio.augment]: of the sounds that are altered each change comes to half, by itself; noise as often as said."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    probability: float = Field(0.0, ge=0, le=1, description="share of the sounds that are heard, not made, that are "
                               "altered before they are encoded for training")
    speed: float = Field(0.08, ge=0, lt=0.5, description="at most this share faster or slower (pitch moves along)")
    room: float = Field(0.35, ge=0, le=3, description="longest reverberation, seconds until it has fallen by 60 dB")
    noise: tuple[float, float] = Field((8.0, 40.0), description="noise that is added: lowest and highest "
                                       "signal-to-noise ratio, dB")
    noise_probability: float = Field(0.5, ge=0, le=1, description="share of the altered sounds that get noise")
    silence: float = Field(0.25, ge=0, le=10, description="longest silence before and after, seconds; noise may "
                           "fill it")
    gain: float = Field(12.0, ge=0, le=40, description="at most so many dB above full scale, cut off there")


def augment(samples: np.ndarray, rate: int, config: AudioAugment, rng: np.random.Generator,
            longest: float | None = None) -> np.ndarray:
    """float32 (n,) -> float32 (m,), at most `longest` seconds unless the sound lasts longer itself; None: everything
    stays in its place, so neither speed nor silence changes.

    Speed as in Ko et al. 2015 (resampled), rooms as noise that decays exponentially, behind the sound itself
    (Ko et al. 2017 simulate them in full), noise of a random colour in a random band.
    """
    most = max(len(samples), int((longest or 0) * rate))
    speed, room, silent, noisy, loud = rng.random(5) < (0.5, 0.5, 0.5, config.noise_probability, 0.5)
    if longest is None:
        speed = silent = False
    if speed:
        factor = 1 + rng.uniform(-config.speed, config.speed)
        count = min(most, max(1, round(len(samples) / factor)))
        samples = np.interp(np.arange(count) * factor, np.arange(len(samples)), samples).astype(np.float32)
    if room and config.room:
        samples = _reverberated(samples, rate, config, rng)
    if silent:
        left = min(config.silence, (most - len(samples)) / rate / 2)
        samples = np.pad(samples, tuple(int(rng.uniform(0, left) * rate) for _ in range(2)))
    if noisy:
        signal = float(np.sqrt(np.mean(samples**2)))
        ratio = 10 ** (-rng.uniform(*config.noise) / 20)
        samples = samples + _noise(len(samples), rate, rng) * np.float32(signal * ratio)
    if loud:
        peak = max(float(np.abs(samples).max()), 1e-9)
        samples = np.clip(samples / np.float32(peak) * np.float32(10 ** (rng.uniform(0, config.gain) / 20)), -1, 1)
    return samples.astype(np.float32)


def _reverberated(samples: np.ndarray, rate: int, config: AudioAugment, rng: np.random.Generator) -> np.ndarray:
    """The same length: what a room adds after the end is cut."""
    seconds = rng.uniform(0.2, 1.0) * config.room
    time = np.arange(max(1, int(seconds * rate))) / rate
    tail = rng.standard_normal(len(time)) * 10 ** (-3 * time / seconds)
    tail *= 10 ** (-rng.uniform(0, 15) / 20) / np.sqrt(np.sum(tail**2))  # direct to reverberant: 0 to 15 dB
    tail[0] += 1
    size = len(samples) + len(tail)
    spectrum = np.fft.rfft(samples, size) * np.fft.rfft(tail, size)
    return np.fft.irfft(spectrum, size)[: len(samples)].astype(np.float32)


def _noise(count: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise of RMS 1 whose power falls, or rises, with the frequency (f^-1 to f^1), every other time in a band
    alone: from 20 to 1,000 Hz up to 1,500 Hz or more."""
    spectrum = np.fft.rfft(rng.standard_normal(count))
    frequency = np.maximum(np.fft.rfftfreq(count, 1 / rate), 1.0)
    spectrum *= frequency ** rng.uniform(-0.5, 0.5)
    if rng.random() < 0.5:
        low, high = np.exp(rng.uniform(np.log(20), np.log(1000))), np.exp(rng.uniform(np.log(1500), np.log(rate / 2)))
        spectrum[(frequency < low) | (frequency > high)] = 0
    noise = np.fft.irfft(spectrum, count)
    return (noise / max(float(np.sqrt(np.mean(noise**2))), 1e-9)).astype(np.float32)
