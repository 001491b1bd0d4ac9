"""Pictures and sounds as files: everything that arrives is checked before it is decoded."""

import io
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from onevocab.common.errors import UserError

RATE = 16_000  # samples a second that sounds are brought to
MAX_PIXELS = 50_000_000
MAX_SECONDS = 600.0
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
    """RGB, transparency laid over white, 16 bits a pixel brought to 8 (Pillow would cut them off at 255)."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_audio(source, max_seconds: float = MAX_SECONDS) -> tuple[np.ndarray, int]:
    """path or bytes -> (float32 mono (n,) in -1..1, samples per second).

    Raises UserError when it is missing, not a sound, empty, or longer than `max_seconds` (by its header, then by what
    was decoded).
    """
    file, name = _open(source)
    with file:
        try:
            with soundfile.SoundFile(file) as sound:
                rate, limit = sound.samplerate, int(max_seconds * sound.samplerate)
                if sound.frames > limit:
                    raise UserError(f"{name} lasts {sound.frames / rate:.0f} s, more than the "
                                    f"{max_seconds:.0f} s allowed; cut it")
                samples = sound.read(frames=limit + 1, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, OSError, RuntimeError) as error:
            raise UserError(f"cannot read {name} as a sound ({error})") from None
    if not len(samples):
        raise UserError(f"{name} holds no sound (0 samples)")
    if len(samples) > limit:
        raise UserError(f"{name} is longer than the {max_seconds:.0f} s allowed; cut it")
    mono = samples.mean(axis=1)
    if not np.isfinite(mono).all():
        raise UserError(f"{name} holds values that are not numbers; write it again")
    return mono, rate


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
