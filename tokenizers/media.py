"""Pictures and sounds as files: everything that arrives is checked before it is decoded."""

import io
from contextlib import suppress
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, ImageOps

from onevocab.common.errors import UserError
from onevocab.tokenizers.sound import mix, to_mono

RATE = 16_000  # samples a second that sounds are brought to
MAX_PIXELS = 50_000_000
MAX_SECONDS = 600.0
SLACK = 1024  # bytes that the writer of a WAV may miscount
UNKNOWN = 0x7FFF_0000  # a WAV's size from here on says that it was written as a stream
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
# (where, first bytes, ending)
_IMAGE_SIGNATURES = ((0, b"\x89PNG\r\n\x1a\n", "png"), (0, b"\xff\xd8\xff", "jpg"), (0, b"GIF8", "gif"),
                     (8, b"WEBP", "webp"), (0, b"BM", "bmp"))
_AUDIO_SIGNATURES = ((8, b"WAVE", "wav"), (0, b"fLaC", "flac"), (0, b"OggS", "ogg"), (0, b"ID3", "mp3"))


def _open(source):
    """path or bytes -> (file-like, how to call it in a message)."""
    if isinstance(source, bytes):
        return io.BytesIO(source), "picture or sound in memory"
    path = Path(source)
    if not path.is_file():
        raise UserError(f"no such file: {path}; check the path")
    return open(path, "rb"), str(path)


def _signed(content: bytes, signatures) -> str | None:
    return next((ending for start, signature, ending in signatures
                 if content[start : start + len(signature)] == signature), None)


def image_ending(content: bytes) -> str | None:
    """"png", "jpg", ... by a file's first bytes, None where they begin no picture."""
    return _signed(content, _IMAGE_SIGNATURES)


def audio_ending(content: bytes) -> str | None:
    """"wav", "flac", ... by a file's first bytes, None where they begin no sound."""
    # An MP3 without tags starts with a frame: eleven bits that are set.
    frame = len(content) > 1 and content[0] == 0xFF and content[1] & 0xE0 == 0xE0
    return _signed(content, _AUDIO_SIGNATURES) or ("mp3" if frame else None)


def load_image(source, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """path or bytes -> RGB picture; transparency is laid over white.

    Raises UserError when it is missing, not a picture, or larger than `max_pixels` (read from the header: a few
    kilobytes can claim gigabytes).
    """
    file, name = _open(source)
    with file:
        try:
            # Pillow's own limit is off in this call: ours speaks first, from the same header.
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image = Image.open(file, formats=IMAGE_FORMATS)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
            if image.width * image.height > max_pixels:
                raise UserError(f"{name} has {image.width}x{image.height} pixels, more than the "
                                f"{max_pixels:,} allowed; make it smaller")
            image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"cannot read {name} as a picture ({error})") from None
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, upright (EXIF's orientation applied), transparency laid over white.

    More than 8 bits are brought to 8, where Pillow would cut them off at 255: 32-bit integers above 255 count as 16-bit
    ones, floats as 0..1, or as 0..255 if one is above 1. Raises UserError on values outside of these.
    """
    with suppress(Exception):  # Pillow raises many kinds on broken EXIF, which then says nothing about the picture
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(np.asarray(image), image.mode))
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.upper())
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """(height, width) of any number -> uint8"""
    low, high = float(values.min()), float(values.max())
    most = {"F": 1.0 if high <= 1 else 255.0, "I": 255.0 if high <= 255 else 65535.0}.get(mode, 65535.0)
    if not (0 <= low and high <= most):  # so that NaN is caught too
        raise UserError(f"a picture of mode {mode} holds values from {low:g} to {high:g}; scale them to 0..1 (F) or "
                        "0..65535 (I)")
    return np.round(values.astype(np.float64) * (255 / most)).astype(np.uint8)


def load_audio(source, max_seconds: float = MAX_SECONDS) -> tuple[np.ndarray, int]:
    """path or bytes -> (float32 mono (n,) in -1..1, samples per second).

    Raises UserError when it is missing, not a sound, empty, cut short, or longer than `max_seconds` (by its header,
    then by what was decoded).
    """
    file, name = _open(source)
    with file:
        cut = _cut_wav(file)
        try:
            with soundfile.SoundFile(file) as sound:
                rate, frames, limit = sound.samplerate, sound.frames, int(max_seconds * sound.samplerate)
                if frames > limit:
                    raise UserError(f"{name} lasts {frames / rate:.0f} s, more than the "
                                    f"{max_seconds:.0f} s allowed; cut it")
                samples = sound.read(frames=limit + 1, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, OSError, RuntimeError) as error:
            raise UserError(f"cannot read {name} as a sound ({error})") from None
    if not len(samples):
        raise UserError(f"{name} holds no sound (0 samples)")
    if cut or len(samples) < 0.98 * frames:
        raise UserError(f"{name} is cut short: its header promises more than its {len(samples) / rate:.2f} s; fetch it "
                        "again, or write it again as it is")
    if len(samples) > limit:
        raise UserError(f"{name} is longer than the {max_seconds:.0f} s allowed; cut it")
    try:
        return to_mono(mix(samples.T)), rate
    except UserError as error:
        raise UserError(f"{name}: {error}; write it again") from None


def _cut_wav(file) -> bool:
    """Whether a WAV's header says that it is longer; libsndfile reads what is there without a word."""
    start, size = file.read(12), file.seek(0, io.SEEK_END)
    file.seek(0)
    promised = int.from_bytes(start[4:8], "little")
    return start[:4] == b"RIFF" and size - 8 + SLACK < promised < UNKNOWN


def encode_png(image: Image.Image, level: int = 1) -> bytes:
    """Picture -> PNG bytes; level: zlib's, 1 is fastest."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()


def encode_audio(samples: np.ndarray, rate: int, format: str = "FLAC") -> bytes:
    """float (n,) in -1..1 -> 16-bit FLAC or WAV bytes."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(samples, -1, 1), rate, format=format, subtype="PCM_16")
    return buffer.getvalue()
