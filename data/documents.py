"""Samples of shards -> documents; and what to do about the bad ones."""

import json
import logging
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from onevocab.common.errors import UserError
from onevocab.data.shards.format import Sample, npy_to_codes
from onevocab.tokenizers.document import Document, Segment
from onevocab.tokenizers.modalities import MODALITIES, modality_of_ending
from onevocab.tokenizers.vocabulary import ROLES

IMAGE_ENDINGS = ("png", "jpg", "jpeg", "webp")
AUDIO_ENDINGS = ("flac", "wav")
# What reading a stranger's medium raises: our own refusals, and what decoders let slip on damaged files.
UNDECODABLE = (UserError, ArithmeticError, LookupError, EOFError, struct.error, zlib.error)
log = logging.getLogger("onevocab.data")


class BadSample(Exception):
    """A sample that cannot be used: `shard`, `key`, `reason`."""

    def __init__(self, key: str, shard: str, reason: str):
        key, reason = _short(key), _short(reason)
        super().__init__(f"{shard}: sample {key}: {reason}")
        self.key, self.shard, self.reason = key, shard, reason


def _short(text: str, most: int = 500) -> str:
    """What a stranger's file makes us say: not everything, and nothing that a terminal obeys."""
    length, text = len(text), "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:most])
    return text if length <= most else f"{text}... ({length:,} characters)"


class BadSamples:
    """Counts bad samples and logs each; above `max_fraction` of the samples seen, stops the run with the list."""

    SHOWN = 20

    def __init__(self, max_fraction: float):
        self.max_fraction, self.seen, self.bad, self.first = max_fraction, 0, 0, []

    def good(self, samples: int = 1) -> None:
        self.seen += samples

    def known(self, samples: int, bad: int) -> None:
        """Samples of an earlier run, which named the bad ones."""
        self.seen += samples
        self.bad += bad

    def add(self, bad: BadSample) -> None:
        """Raises UserError as soon as the rate cannot be met by the first thousand samples any more."""
        self.seen += 1
        self.bad += 1
        if len(self.first) < self.SHOWN:
            self.first.append(bad)
            log.warning("left out: %s", bad)
        self._check(max(self.seen, 1000))

    def finish(self, partial: bool = False) -> None:
        """To be called after the last sample. Raises UserError when too many were bad; partial: of a part of the
        samples, whose rate says little about that of all while they are few."""
        self._check(max(self.seen, 1000) if partial else self.seen)
        if self.bad:
            log.warning("left out %d bad of %d samples", self.bad, self.seen)

    def _check(self, seen: int) -> None:
        if self.bad > self.max_fraction * seen:
            shown = "; ".join(map(str, self.first[:5])) + ("; ..." if self.bad > 5 else "")
            raise UserError(f"{self.bad} of {self.seen} samples are bad, more than the {self.max_fraction:.1%} allowed "
                            f"(max_bad_fraction): {shown}")


class Part(NamedTuple):
    """text: the text of a text part; ending: the member that holds a medium, else None."""

    modality: str
    text: str = ""
    ending: str | None = None


class Turn(NamedTuple):
    """role: None in a plain document."""

    role: str | None
    parts: tuple[Part, ...]


def turns_of(sample: Sample) -> tuple[Turn, ...]:
    """What a sample says, before anything is decoded.

    Understood: `json` with `content` or `messages`; else media beside `txt` (img2dataset's `jpg + txt`, `flac + txt`;
    a `json` of metadata beside them is passed over); else a lone `txt` or medium. Raises BadSample.
    """
    if sample.refused:
        ending, reason = next(iter(sample.refused.items()))
        raise BadSample(sample.key, sample.shard, f"member {ending} refused: {reason}" if ending else reason)
    try:
        data = json.loads(sample.members["json"].decode("utf-8")) if "json" in sample.members else None
        if isinstance(data, dict) and "messages" in data:
            return tuple(_turn(sample, message) for message in _list(data["messages"], "messages"))
        if isinstance(data, dict) and "content" in data:
            return (Turn(None, tuple(_part(sample, part) for part in _list(data["content"], "content"))),)
        parts = [Part(modality_of_ending(ending), ending=ending)
                 for ending in sorted(sample.members) if modality_of_ending(ending)]
        if "txt" in sample.members:
            parts.append(Part("text", sample.members["txt"].decode("utf-8").strip()))
        if not parts:
            raise ValueError("no json with content or messages, no txt, no medium")
        return (Turn(None, tuple(parts)),)
    except RecursionError:
        raise BadSample(sample.key, sample.shard, "json nested too deeply") from None
    except json.JSONDecodeError as error:
        raise BadSample(sample.key, sample.shard, f"its json is not valid JSON ({error})") from None
    except UnicodeError as error:
        raise BadSample(sample.key, sample.shard, f"its text is not UTF-8 ({error})") from None
    except ValueError as error:
        raise BadSample(sample.key, sample.shard, str(error)) from None


def _list(value, name: str) -> list:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is not a list that holds something")
    return value


def _turn(sample: Sample, message) -> Turn:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ValueError(f"a message needs a role, one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    return Turn(message["role"], tuple(_part(sample, part) for part in _list(content, "a message's content")))


def _part(sample: Sample, part) -> Part:
    if not isinstance(part, dict):
        raise ValueError("a part is not an object")
    kind = part.get("type")
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise ValueError("a text part without a text")
        text.encode("utf-8")  # JSON can spell half a surrogate pair, which no encoding takes
        return Part("text", text)
    if kind not in MODALITIES:
        raise ValueError(f"a part of unknown type {kind!r}")
    ending = part.get("file")
    if not isinstance(ending, str) or ending not in sample.members:
        raise ValueError(f"member {ending!r} is missing")
    if modality_of_ending(ending) != kind:
        raise ValueError(f"member {ending} is no {kind} by its ending")
    return Part(kind, ending=ending)


def codes_ending(ending: str) -> str:
    """Name of the member that replaces a medium: `0.png` -> `0.image.npy`, `flac` -> `audio.npy`."""
    return ".".join([*ending.split(".")[:-1], modality_of_ending(ending), "npy"])


def media_endings(turns: tuple[Turn, ...]) -> Iterator[str]:
    """Endings of the media of a sample, in order, repeated as often as they are shown."""
    return (part.ending for turn in turns for part in turn.parts if part.ending is not None)


def document_of(sample: Sample, encode: Callable[[str, bytes], np.ndarray] | None = None) -> Document:
    """Sample -> document. Loss falls on the assistant's turns, or on everything in a plain document.

    encode: (modality, file's bytes) -> codes, for samples that hold media as files; without it only codes
    (`.image.npy`, `.audio.npy`) are taken. Raises BadSample.
    """
    segments = []
    for number, turn in enumerate(turns_of(sample)):
        loss = turn.role in (None, "assistant")
        for part in turn.parts:
            content = part.text if part.ending is None else _codes(sample, part, encode)
            segments.append(Segment(part.modality, content, turn.role, number, loss))
    return Document(tuple(segments))


def _codes(sample: Sample, part: Part, encode) -> np.ndarray:
    content = sample.members[part.ending]
    codes_already = part.ending.endswith("npy")
    if not codes_already and encode is None:
        raise UserError(f"{sample.shard} holds media, not codes: run `python -m onevocab.data.tokenize` on it")
    try:
        return npy_to_codes(content) if codes_already else encode(part.modality, content)
    except (ValueError, *UNDECODABLE) as error:
        raise BadSample(sample.key, sample.shard, f"member {part.ending}: {error}") from None
