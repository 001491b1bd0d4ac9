"""One preparation of a sound, the same for training and prompts: mono, of a stated loudness, without silence around it.

    samples = prepare(to_mono(anything), rate)

A clip of a microphone then looks like the clips that a model was trained on: what is said counts, not how far away the
speaker sat or when recording began.
"""

import numpy as np

from onevocab.common.errors import UserError

MAX_CHANNELS = 8
LOUDNESS = -20.0  # dB of full scale: of the frames that are heard, as ITU-T P.56 measures active speech
SOUNDING, SILENT = 30.0, 40.0  # dB below the loudest frame: down to the first it counts as heard, below the second not
MARGIN = 0.05  # seconds of (near) silence that are left, or added, at both ends
FRAME = 0.02  # seconds
OFFSET = 0.1  # of its RMS: a mean above this is the microphone's or the converter's, which nobody hears
QUIETEST = 1e-5  # level below which there is nothing to make louder: a 16-bit file's last bit is 3e-5

_INTEGERS = {np.dtype(kind): (middle, 1 << (bits - 1)) for kind, middle, bits in (
    ("int8", 0, 8), ("uint8", 128, 8), ("int16", 0, 16), ("int32", 0, 32))}


def to_mono(samples) -> np.ndarray:
    """Samples as they come -> float32 (n,) in -1..1.

    samples: an array, or what numpy takes for one (a torch tensor), (n,), (n, channels) or (channels, n) of at most
    `MAX_CHANNELS`, mixed by `mix`. int16, int32, int8 and uint8 are scaled by their full range; floats louder than full
    scale are brought down to it. Raises UserError on other types and shapes, and on values that are not numbers.
    """
    if isinstance(samples, list | tuple) or not hasattr(samples, "__array__"):
        raise UserError(f"the samples of a sound are a numpy array or a torch tensor, found {type(samples).__name__}")
    samples = np.asarray(samples)
    if samples.dtype in _INTEGERS:
        middle, scale = _INTEGERS[samples.dtype]
        samples = (samples.astype(np.float32) - middle) / np.float32(scale)
    elif samples.dtype.kind != "f":
        raise UserError(f"the samples of a sound are floats in -1..1, int16, int32, int8 or uint8, found "
                        f"{samples.dtype}; convert them")
    if not np.isfinite(samples).all():
        raise UserError("a sound holds values that are not numbers (NaN or infinite)")
    if samples.ndim == 2:
        samples = mix(_channels_first(samples))
    if samples.ndim != 1 or not samples.size:
        raise UserError(f"a sound is samples (n,), (n, channels) or (channels, n), found shape {samples.shape}")
    samples = samples / max(1.0, float(np.abs(samples).max()))
    return samples.astype(np.float32)


def _channels_first(samples: np.ndarray) -> np.ndarray:
    few, many = sorted(samples.shape)
    if few == 0 or few > MAX_CHANNELS or few == many:
        raise UserError(f"a sound of shape {samples.shape}: which axis are the channels (at most {MAX_CHANNELS})? Pass "
                        "one channel, (n,)")
    return samples if samples.shape[0] == few else samples.T


def mix(channels: np.ndarray) -> np.ndarray:
    """(channels, n) -> (n,): their mean, or the loudest one where they cancel each other out."""
    mono, power = channels.mean(axis=0), (channels.astype(np.float64) ** 2).mean(axis=1)
    cancelled = np.mean(mono.astype(np.float64) ** 2) < 0.01 * power.max()
    return channels[int(power.argmax())] if cancelled else mono


def levels(samples: np.ndarray, rate: int) -> np.ndarray:
    """RMS of the `FRAME` seconds around each sample, float64 (n,). Hop 1: silence before a sound moves nothing."""
    half = max(1, round(FRAME * rate / 2))
    power = np.cumsum(np.pad(samples.astype(np.float64) ** 2, (half + 1, half)))
    return np.sqrt(np.maximum(power[2 * half + 1 :] - power[: -2 * half - 1], 0) / (2 * half + 1))


def prepare(samples: np.ndarray, rate: int, loudness: bool = True, trim: bool = True,
            longest: int | None = None) -> np.ndarray:
    """float32 (n,) -> float32 (m,): silence at both ends cut to `MARGIN` seconds, or filled up to it, and the loudness
    brought to `LOUDNESS`. A constant offset is taken away first. A sound without anything in it is left as it is.
    longest: samples; of a sound that only its margins make longer, these give way."""
    mean = samples.mean(dtype=np.float64)
    if abs(mean) > OFFSET * np.sqrt(np.mean(samples.astype(np.float64) ** 2)):
        samples = samples - np.float32(mean)
    edge = round(FRAME * rate) if trim else 0  # a sound that begins at once has windows that begin before it
    level = levels(np.pad(samples, edge), rate)
    loudest = float(level.max())
    if loudest < QUIETEST:
        return samples
    if loudness:
        heard = level[level > loudest * 10 ** (-SOUNDING / 20)]
        samples = samples * np.float32(10 ** (LOUDNESS / 20) / np.sqrt(np.mean(heard**2)))
    if trim:
        first, last = np.flatnonzero(level > loudest * 10 ** (-SILENT / 20))[[0, -1]] - edge
        margin = round(MARGIN * rate)
        start, stop = first - margin, last + 1 + margin
        over = 0 if longest is None else stop - start - longest
        if 0 < over <= 2 * (margin + edge // 2):  # a window hears half its length before a sound, and behind it
            start, stop = start + over // 2, stop - (over - over // 2)
        samples = np.pad(samples[max(0, start) : stop], (max(0, -start), max(0, stop - len(samples))))
    return samples
