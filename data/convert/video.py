"""Moving pictures -> frames, pieces of sound and subtitles in time order.

Animated GIF, WebP and PNG are read through Pillow; mp4, mov, mkv, webm through PyAV, the extra `video`. A file's first
bytes say which it is: FFmpeg never chooses among its readers, some of which are playlists that open other files and
addresses. Subtitles are SubRip (SRT) or WebVTT.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from onevocab.common.errors import UserError
from onevocab.data.documents import UNDECODABLE
from onevocab.tokenizers.media import MAX_PIXELS, MAX_SECONDS, RATE, to_rgb

MAX_FRAME_PIXELS = 1 << 24  # of a frame of mp4 and its like, whose decoders keep many at once
MAX_ANIMATION_WORK, MAX_VIDEO_WORK = 10**10, 2 * 10**11  # pixels decoded of one file; ten minutes of 4K fit the second
MAX_SUBTITLES, MAX_CUES = 1 << 20, 20_000  # characters and cues of one file
SHORTEST_PIECE = 0.1  # seconds; a shorter rest at the end of a sound is left out
_UNREADABLE = (*UNDECODABLE, OSError, SyntaxError, ValueError, RuntimeError, AssertionError,
               Image.DecompressionBombError)
_TAG = re.compile(r"</?[A-Za-z0-9][^<>]*>|\{\\[^{}]*\}")  # a try ends at the next opening bracket: linear
_ENTITIES = (("&lt;", "<"), ("&gt;", ">"), ("&nbsp;", " "), ("&lrm;", ""), ("&rlm;", ""), ("&amp;", "&"))


class Moment(NamedTuple):
    """seconds: since the start; part: a text (a subtitle), an RGB picture, or (float32 samples (n,), 16000)."""

    seconds: float
    part: str | Image.Image | tuple[np.ndarray, int]


class Cue(NamedTuple):
    """A subtitle: start and stop in seconds, its text on one line, without markup."""

    start: float
    stop: float
    text: str


def frames_and_sound(path, **options) -> list[str | Image.Image | tuple[np.ndarray, int]]:
    """What `moments` returns, as the parts of one turn, in time order; times are lines of text.

    `["0:00.0\\n", picture, sound, "0:00.7 Hello.\\n0:01.0\\n", picture, ...]`: neighbouring texts are one part. Takes
    the options of `moments` and raises UserError as it does.
    """
    parts, text, before = [], "", None
    for seconds, part in moments(path, **options):
        stamp = timestamp(seconds)
        if isinstance(part, str):
            text += f"{stamp} {part}\n"
        else:
            text += f"{stamp}\n" if stamp != before else ""
            parts += [text, part] if text else [part]
            text = ""
        before = stamp
    return [*parts, text] if text else parts


def moments(path, rate: float = 1.0, max_frames: int = 32, max_side: int = 512, subtitles=None,
            piece_seconds: float = 4.0, max_seconds: float = MAX_SECONDS) -> list[Moment]:
    """A video file -> its moments in time order, to a tenth of a second; at one time the frame, the text, the sound.

    rate: frames a second at most; where that makes more than `max_frames`, every second one goes until they fit, so
    a long video is seen whole; max_side: pixels, larger frames are made smaller; subtitles: an .srt or .vtt file (None:
    the one of the video's name beside it; False: none), cues after the video's end are left out; piece_seconds: how
    long the pieces of sound are, not above the audio tokenizer's `max_seconds`. Raises UserError when a file is
    missing, not a video, damaged, longer than `max_seconds` or too large, and when the extra is not installed.
    """
    path = Path(path)
    for name, value, low, high in (("rate", rate, 1e-3, 1e3), ("max_frames", max_frames, 1, 1000), (
            "max_side", max_side, 1, 8192), ("piece_seconds", piece_seconds, SHORTEST_PIECE, max_seconds)):
        if not low <= value <= high:
            raise UserError(f"{name} of a video is {value}; it must lie in {low:g} to {high:g}")
    frames, start, samples = _Frames(rate, max_frames, max_side), 0.0, np.empty(0, np.float32)
    try:
        with open(path, "rb") as file:
            head = file.read(16)
            file.seek(0)
            if subtitles is None:
                subtitles = subtitles_beside(path)
            cues = read_subtitles(subtitles) if subtitles else []
            if head.startswith((b"GIF87a", b"GIF89a", b"\x89PNG\r\n\x1a\n")) or head[:4] + head[8:12] == b"RIFFWEBP":
                end = _read_animation(path, file, frames, max_seconds)
            elif head[4:8] == b"ftyp" or head.startswith(b"\x1aE\xdf\xa3"):
                kind = "mp4" if head[4:8] == b"ftyp" else "matroska"
                end, start, samples = _read_container(path, file, kind, frames, max_seconds)
            else:
                raise UserError(f"{path} is no video that is understood: animated GIF, WebP, PNG; mp4, mov, mkv, webm")
    except UserError:
        raise
    except _UNREADABLE as error:
        raise UserError(f"cannot read {path} as a video ({getattr(error, 'strerror', None) or error})") from None
    if not frames.kept:
        raise UserError(f"cannot read {path} as a video (it has no frame)")
    piece = round(piece_seconds * RATE)
    parts = [*frames.kept, *(Moment(cue.start, cue.text) for cue in cues if cue.start <= end)]
    parts += [Moment(start + first / RATE, (samples[first : first + piece], RATE))
              for first in range(0, len(samples), piece) if len(samples) - first >= SHORTEST_PIECE * RATE]
    return sorted(parts, key=lambda moment: _tenths(moment.seconds))


def subtitles_beside(path: Path) -> Path | None:
    """The .srt or .vtt file of the video's name."""
    beside = (path.with_suffix(ending) for ending in (".srt", ".vtt"))
    return next((name for name in beside if name.is_file() and not name.is_symlink()), None)


def timestamp(seconds: float) -> str:
    """83.25 -> "1:23.2"."""
    tenths = _tenths(seconds)
    return f"{tenths // 600}:{tenths // 10 % 60:02d}.{tenths % 10}"


def _tenths(seconds: float) -> int:
    return int(seconds * 10 + 1e-3)


class _Frames:
    """At most one frame in each step of time, and at most `limit`: beyond it the step doubles. So memory is bounded and
    nothing depends on the length that a header claims. `picture()` makes an RGB picture, only where it is kept."""

    def __init__(self, rate: float, limit: int, side: int):
        self.step, self.limit, self.side, self.kept = 1 / rate, limit, side, []

    def _tick(self, seconds: float) -> int:
        return int((seconds + 1e-4) / self.step)

    def add(self, seconds: float, picture: Callable[[], Image.Image]) -> None:
        if self.kept and self._tick(seconds) <= self._tick(self.kept[-1].seconds):
            return
        image = picture()
        image.thumbnail((self.side, self.side))
        self.kept.append(Moment(seconds, image))
        while len(self.kept) > self.limit:
            self.step *= 2
            ticks = [self._tick(moment.seconds) for moment in self.kept]
            self.kept = [moment for moment, tick, before in zip(self.kept, ticks, [-1, *ticks], strict=False)
                         if tick > before]


def _check_size(path: Path, size: tuple[int, int], max_pixels: int, work: int, max_work: int) -> int:
    """Adds a frame to the pixels decoded so far. Raises UserError when it is too large, or all together are."""
    if size[0] * size[1] > max_pixels:
        raise UserError(f"{path}: frames of {size[0]}x{size[1]} pixels, over the {max_pixels:,} allowed; shrink them")
    if work + size[0] * size[1] > max_work:
        raise UserError(f"{path} has more than {max_work:,} pixels over all its frames; make it smaller or cut it")
    return work + size[0] * size[1]


def _check_length(path: Path, seconds: float, max_seconds: float) -> None:
    if seconds > max_seconds:
        raise UserError(f"{path} lasts more than the {max_seconds:g} s allowed; cut it")


def _read_animation(path: Path, file, frames: _Frames, max_seconds: float) -> float:
    """Adds the frames; returns when the last one ends. One of less than 20 ms lasts 100 ms, as browsers show it."""
    seconds, work = 0.0, 0
    with Image.open(file, formats=("GIF", "WEBP", "PNG")) as image:
        while True:
            _check_length(path, seconds, max_seconds)
            work = _check_size(path, image.size, MAX_PIXELS, work, MAX_ANIMATION_WORK)
            image.load()
            if image.tell() or not getattr(image, "default_image", False):  # that of APNG is for old readers
                frames.add(seconds, lambda: to_rgb(image))
                milliseconds = image.info.get("duration", 0)
                seconds += milliseconds / 1000 if milliseconds >= 20 else 0.1
            try:
                image.seek(image.tell() + 1)
            except EOFError:
                break
        # A GIF does not say how many frames it has; the other two do, and a cut file ends like a whole one.
        if image.format != "GIF" and image.tell() + 1 < image.n_frames:
            raise UserError(f"cannot read {path} as a video (cut short: {image.tell() + 1} of {image.n_frames} frames)")
    return seconds


def _read_container(path: Path, file, kind: str, frames: _Frames, max_seconds: float) -> tuple:
    """Adds the frames; returns (end, start of the sound in seconds, its samples float32 (n,) at 16 kHz)."""
    try:
        import av
    except ImportError:
        raise UserError(f"{path} needs PyAV: run `pip install 'onevocab[video]'`, from a clone '.[video]'") from None
    pieces, end, start, work, count = [], 0.0, None, 0, 0
    limit = {"max_pixels": str(MAX_FRAME_PIXELS)}
    # Before 19 a tag that is not UTF-8 made a file unreadable, unless told so; since then there is no such option.
    tags = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    try:
        with av.open(file, mode="r", format=kind, options=limit, **tags) as container:
            if not container.streams.video and not container.streams.audio:
                raise UserError(f"cannot read {path} as a video (it holds neither pictures nor sound, or is cut short)")
            if not container.streams.video:
                raise UserError(f"{path} has no pictures; give it as a sound")
            streams = [container.streams.video[0], *container.streams.audio[:1]]
            if any(stream.codec_context is None for stream in streams):
                raise UserError(f"{path} is encoded in a way that PyAV here cannot decode; convert it to H.264, AAC")
            streams[0].codec_context.options = limit
            zero, resampler = (container.start_time or 0) / 1e6, av.AudioResampler("flt", "mono", RATE)
            for packet in container.demux(*streams):
                for frame in packet.decode():
                    seconds = end if frame.time is None else max(0.0, float(frame.time) - zero)
                    _check_length(path, seconds, max_seconds)
                    end = max(end, seconds)
                    if isinstance(frame, av.VideoFrame):
                        work = _check_size(path, (frame.width, frame.height), MAX_FRAME_PIXELS, work, MAX_VIDEO_WORK)
                        frames.add(seconds, lambda frame=frame: _upright(frame))
                        continue
                    start = seconds if start is None else start
                    for piece in resampler.resample(frame):
                        pieces.append(piece.to_ndarray().reshape(-1))
                        count += len(pieces[-1])
                    _check_length(path, count / RATE - 1, max_seconds)  # its last frame may end a little later
            # A resampler that has nothing to do hands the mark of the end back as it came.
            pieces += [piece.to_ndarray().reshape(-1) for piece in resampler.resample(None) if piece is not None]
    except av.error.FFmpegError as error:
        raise UserError(f"cannot read {path} as a video ({error.strerror or error})") from None
    samples = np.concatenate(pieces).astype(np.float32) if pieces else np.empty(0, np.float32)
    if not np.isfinite(samples).all():
        raise UserError(f"{path}: its sound holds values that are not numbers; write it again")
    return max(end, (start or 0.0) + len(samples) / RATE), start or 0.0, samples


def _upright(frame) -> Image.Image:
    """A PyAV frame -> RGB picture, turned as its file says (a telephone's are, held upright)."""
    picture = frame.to_image()
    turn = round(getattr(frame, "rotation", 0) / 90) * 90 % 360  # counterclockwise, as Pillow turns
    return picture.rotate(turn, expand=True) if turn else picture


def read_subtitles(path) -> list[Cue]:
    """An .srt or .vtt file -> its cues in time order. Raises UserError when it is missing, too large or broken."""
    try:
        with open(path, "rb") as file:
            content = file.read(4 * MAX_SUBTITLES + 1)  # a character has at most four bytes
    except OSError as error:
        raise UserError(f"cannot read subtitles {path}: {error.strerror}") from None
    return parse_subtitles(content, str(path))


def parse_subtitles(content: bytes | str, name: str = "the subtitles") -> list[Cue]:
    """The content of an SRT or WebVTT file -> its cues, in time order. Takes time linear in its length.

    Notes, styles, positions and markup are dropped, as are cues without a text and lines that belong to no cue. Bytes
    are UTF-8, or UTF-16 with its mark. Raises UserError, naming the line, on a broken timing; on more than
    MAX_SUBTITLES characters or MAX_CUES cues; and on a text without any timing.
    """
    if isinstance(content, bytes):
        try:
            content = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{name}: neither UTF-8 nor UTF-16; save it as UTF-8") from None
    if len(content) > MAX_SUBTITLES:
        raise UserError(f"{name}: more than the {MAX_SUBTITLES:,} characters allowed for subtitles")
    content = content.removeprefix("\ufeff").replace("\0", "\ufffd").replace("\r\n", "\n").replace("\r", "\n")
    cues, times, texts, timings = [], None, [], 0
    passing = vtt = content.startswith("WEBVTT")  # passing: in a header, note or style, which a timing ends too
    for number, line in enumerate([*content.split("\n"), ""], 1):
        line = line.strip()
        new = _times(line) if "-->" in line else None
        if new or not line:
            if new and times and texts and texts[-1].isdigit():
                texts.pop()  # the next cue's number: the empty line before it is missing
            if times and (text := _plain(texts, vtt)):
                cues.append(Cue(*times, text))
            times, texts, timings, passing = new, [], timings + bool(new), False
            if timings > MAX_CUES:
                raise UserError(f"{name}: more than the {MAX_CUES:,} cues allowed for subtitles")
        elif times:
            texts.append(line)
        elif "-->" in line and not passing:
            raise UserError(f"{name}: line {number}: not a timing: {line[:60]!r}")
        elif vtt and line.split()[0] in ("NOTE", "STYLE", "REGION"):
            passing = True
    if not timings and not vtt and content.strip():
        raise UserError(f"{name}: neither SRT nor WebVTT: no line holds a timing, like 00:00:01,000 --> 00:00:02,000")
    return sorted(cues, key=lambda cue: cue.start)


def _times(line: str) -> tuple[float, float] | None:
    """"00:01:02,500 --> 00:01:04,000 align:start" -> (62.5, 64.0)"""
    left, _, right = line.partition("-->")
    start, stop = _seconds(left.strip()), _seconds((right.split(None, 1) or [""])[0])
    return None if start is None or stop is None else (start, max(start, stop))


def _seconds(stamp: str) -> float | None:
    """"01:02:03,450", "02:03.450" -> seconds, None for anything else."""
    whole, _, fraction = stamp.replace(",", ".").partition(".")
    fields = [*whole.split(":"), fraction or "0"]
    if not 3 <= len(fields) <= 4 or not all(f.isascii() and f.isdigit() and len(f) <= 6 for f in fields):
        return None
    seconds = 0
    for field in fields[:-1]:
        seconds = seconds * 60 + int(field)
    return seconds + int(fields[-1]) / 10 ** len(fields[-1])


def _plain(lines: list[str], vtt: bool) -> str:
    text = _TAG.sub("", " ".join(lines))
    for entity, character in _ENTITIES if vtt else ():
        text = text.replace(entity, character)
    return " ".join(text.split())
