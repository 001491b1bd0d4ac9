"""Pictures, sounds and videos that records name or hold: found below one folder, checked, taken as they are.

A record is a stranger's: the path in it may only select a file below the folder of media, and what a file claims to
be is compared with its first bytes before it is decoded. Only what shards do not take (GIF, BMP, MP3, Ogg, videos) is
encoded again.
"""

import base64
import binascii
import io
import os
import re
import unicodedata
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from onevocab.common.errors import UserError
from onevocab.data.convert.samples import Dropped, Medium
from onevocab.data.convert.walking import OUTSIDE, leads_out
from onevocab.data.documents import UNDECODABLE
from onevocab.data.shards.format import MAX_MEMBER
from onevocab.tokenizers.document import Part
from onevocab.tokenizers.media import encode_audio
from onevocab.tokenizers.modalities import MODALITIES
from onevocab.tokenizers.sound import to_mono

VIDEO = "video"  # no modality: it becomes pictures, sounds and texts
_SUFFIXES = {modality.name: modality.suffixes for modality in MODALITIES.values()} | {
    VIDEO: (".mp4", ".mov", ".mkv", ".webm")}
KINDS = tuple(_SUFFIXES)  # of the files that records name
_URL = re.compile(r"((?:.*?://[^?#]*)|.*)(\?[^#]*)?", re.DOTALL)  # (all before the query, the query)
_ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:[/\\]|[A-Za-z][A-Za-z0-9+.-]*://")


def suffix_of(name: str) -> str:
    """".png" of a path or a URL, lower-case, "" without one."""
    return os.path.splitext(_URL.match(name)[1])[1].lower()


def kind_of(name: str) -> str | None:
    """Which of KINDS a file is by its name's ending, None for anything else."""
    suffix = suffix_of(name)
    return next((kind for kind, suffixes in _SUFFIXES.items() if suffix in suffixes), None)


def _check_suffix(name: str) -> None:
    if suffix_of(name) and kind_of(name) is None:
        raise Dropped("unknown ending", name)


def check(content: bytes, name: str, suffix: str | None = None) -> Part:
    """The bytes of a file of media -> (modality, Medium), decoded once to be sure. name: its path, whose
    ending says what it should be unless `suffix` does; without one the bytes decide. Raises Dropped."""
    suffix = suffix_of(name) if suffix is None else suffix
    _check_suffix(suffix and name)
    if len(content) > MAX_MEMBER:
        raise Dropped("too large", f"{name} has {len(content):,} bytes, {MAX_MEMBER:,} are allowed")
    modality, ending = next(((modality, ending) for modality in MODALITIES.values()
                             if (ending := modality.ending_of(content))), (None, ""))
    if modality is None:
        what = "is empty" if not content else "is of no known kind"
        raise Dropped("unreadable media", f"{name} {what}")
    if suffix and suffix not in modality.suffixes:
        raise Dropped("wrong ending", f"{name} holds {ending}")
    try:
        value = modality.load(content)
        if ending in modality.shard_endings:
            return modality.name, Medium(ending, content)
        return modality.name, Medium(modality.shard_endings[0], modality.to_shard(value), True)
    except UNDECODABLE as error:
        raise Dropped("unreadable media", f"{name}: {error}") from None


@lru_cache(maxsize=8)
def names_in(folder: Path) -> tuple[str, ...]:
    """Sorted; none of a folder that cannot be read."""
    try:
        return tuple(sorted(os.listdir(folder)))
    except (OSError, ValueError):  # a name that no file system takes
        return ()


class MediaFolder:
    """The folder below which records' files lie. frames: at most so many of a video; follow_links: whether links may
    lead out of it. Raises UserError when there is no such folder."""

    def __init__(self, root, frames: int = 8, follow_links: bool = False):
        if not Path(root).is_dir():
            raise UserError(f"no folder of media at {root}: give the one that the records' paths start from by --media")
        self.root, self.frames, self.follow_links = Path(root).resolve(), frames, follow_links

    def find(self, name: str) -> Path:
        """A record's path -> the file. Raises Dropped.

        A relative path starts at the folder. Of an absolute one, or a URL, the longest tail that exists below the
        folder is taken; of a URL one of two steps at least, since other hosts have files of that name too. Its query is
        part of the file's name (`b.png?w=3`, as wget writes it) where there is such a file, else it is left out. An é
        may be one character or two (Macs take names apart). A path with `..` is refused, and a link that leads out of
        the folder unless those are followed.
        """
        place, query = _URL.match(name).groups(default="")
        steps = [step for step in re.split(r"[/\\]+", place) if step not in ("", ".")]
        if ".." in steps:
            raise Dropped("unsafe path", name)
        for start in range(len(steps) - ("://" in name) if _ABSOLUTE.match(name) else 1):
            for end in dict.fromkeys((query.replace("/", "%2F"), "")):
                below = f"{os.path.join('', *steps[start:])}{end}"
                for spelled in dict.fromkeys((below, *(unicodedata.normalize(form, below) for form in ("NFC", "NFD")))):
                    path = self.root / spelled
                    if os.path.isfile(path):
                        if not self.follow_links and leads_out(path, self.root):
                            raise Dropped("unsafe path", f"{name} is {OUTSIDE}")
                        return path
        near = self._spelled_otherwise(os.path.join("", *steps))
        raise Dropped("missing media", f"no {name} below {self.root}" + (f", but {near}" if near else ""))

    def _spelled_otherwise(self, below: str) -> str | None:
        """A file that differs in capitals alone: one name where the records were made, two here."""
        folder, name = os.path.split(below)
        return next((found for found in names_in(self.root / folder) if found.casefold() == name.casefold()), None)

    def parts(self, *names: str) -> list[Part]:
        """The first of these files that is there, checked: a picture or a sound as one part, a video as its frames,
        sound and subtitles. Raises Dropped."""
        for i, name in enumerate(names):
            try:
                _check_suffix(name)
                return self._read(self.find(name), name)
            except Dropped as dropped:
                if dropped.reason != "missing media" or i + 1 == len(names):
                    raise
        raise Dropped("missing media", "no file is named")

    def _read(self, path: Path, name: str) -> list[Part]:
        if kind_of(name) == VIDEO:
            return _video(path, name, self.frames)
        try:
            size = path.stat().st_size
            if size > MAX_MEMBER:
                raise Dropped("too large", f"{name} has {size:,} bytes, {MAX_MEMBER:,} are allowed")
            content = path.read_bytes()
        except OSError as error:
            raise Dropped("unreadable media", f"{name}: {error.strerror}") from None
        return [check(content, name)]

    def take(self, value) -> list[Part]:
        """What a record holds where a medium stands: a path, a URL of a file that was fetched, a `data:` URL, bytes, or
        `{bytes, path}` or `{array, sampling_rate}` as `datasets` stores them. Raises Dropped."""
        if isinstance(value, dict):
            path = value.get("path")
            path = path if isinstance(path, str) else ""
            if isinstance(value.get("bytes"), bytes):
                return [check(value["bytes"], path, "")]  # the path is where they once came from
            if value.get("array") is not None:
                return [_sound(value["array"], value.get("sampling_rate"))]
            value = path
        if isinstance(value, bytes):
            return [check(value, "")]
        if not isinstance(value, str) or not value.strip():
            raise Dropped("missing media", "no path and no bytes")
        if value.startswith("data:"):
            return [check(from_base64(value), "")]
        return self.parts(value.strip())


def from_base64(text: str) -> bytes:
    """Base64, of the alphabet for URLs too, with or without `data:image/png;base64,` before it. Raises Dropped."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    if len(text) > MAX_MEMBER * 4 // 3 + 4:
        raise Dropped("too large", f"{len(text):,} letters of base64")
    try:
        text = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Dropped("unreadable media", f"not base64 ({error})") from None


def _sound(samples, rate) -> Part:
    """A decoded sound, as `to_mono` takes it. Raises Dropped."""
    try:
        content = encode_audio(to_mono(np.asarray(samples)), rate)
    except (UserError, TypeError, ValueError, RuntimeError) as error:
        raise Dropped("unreadable media", f"a decoded sound ({error})") from None
    modality, medium = check(content, "a decoded sound", "")
    return modality, replace(medium, reencoded=True)


def _video(path: Path, name: str, frames: int) -> list[Part]:
    """Subtitles that cannot be read are left out."""
    from onevocab.data.convert.video import frames_and_sound, read_subtitles, subtitles_beside

    options, without = {}, None
    try:
        if beside := subtitles_beside(path):
            read_subtitles(beside)
    except UserError as error:
        options, without = {"subtitles": False}, Dropped("unreadable subtitles", str(error))
    try:
        shown = frames_and_sound(path, max_frames=frames, **options)
    except UNDECODABLE as error:
        if isinstance(error.__context__, ImportError):
            raise  # no fault of this file's: without the package that reads them, all would be dropped
        raise Dropped("unreadable media", f"{name}: {error}") from None
    parts = [_encoded(part) for part in shown]
    first = next((i for i, (_, content) in enumerate(parts) if isinstance(content, Medium)), None)
    if first is not None:
        modality, medium = parts[first]
        parts[first] = modality, replace(medium, without=without)
    return parts


def _encoded(part) -> Part:
    """A text, a frame or a piece of sound of a video. Frames become JPEG: what they come from was lossy too."""
    if isinstance(part, str):
        return "text", part
    if isinstance(part, Image.Image):
        buffer = io.BytesIO()
        part.save(buffer, "JPEG", quality=95)
        return "image", Medium("jpg", buffer.getvalue(), True)
    return "audio", Medium("flac", encode_audio(*part), True)
