"""Samples of shards <-> documents; and what to do about the bad ones."""

import json
import logging
import struct
import zlib
from collections.abc import Callable

import numpy as np

from onevocab.common.errors import UserError
from onevocab.common.files import single_keys
from onevocab.data.shards.format import Sample, npy_to_codes
from onevocab.tokenizers.document import Document, MediaFile, Part, conversation, plain_document
from onevocab.tokenizers.modalities import MODALITIES, modality_of_ending
from onevocab.tokenizers.vocabulary import ROLES

# What reading a stranger's medium raises: our own refusals, and what decoders let slip on damaged files.
UNDECODABLE = (UserError, ArithmeticError, LookupError, EOFError, struct.error, zlib.error)
log = logging.getLogger("onevocab.data")


class BadSample(Exception):
    """A sample that cannot be used: `shard`, `key` ("": the whole shard), `reason`."""

    def __init__(self, key: str, shard: str, reason: str):
        key, reason = _short(key), _short(reason)
        super().__init__(f"{shard}: sample {key}: {reason}" if key else f"{shard}: {reason}")
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

    def known(self, samples: int, bad: int, named: list[BadSample]) -> None:
        """Samples of an earlier run or of another process, which logged the bad ones; named: some of these."""
        self.seen += samples
        self.bad += bad
        self.first += named[: self.SHOWN - len(self.first)]

    def add(self, bad: BadSample) -> None:
        """Raises UserError as soon as the rate cannot be met by the first thousand samples any more."""
        self.seen += 1
        self.bad += 1
        if len(self.first) < self.SHOWN:
            self.first.append(bad)
            log.warning("left out: %s", bad)
        self.check(max(self.seen, 1000))

    def finish(self, partial: bool = False) -> None:
        """To be called after the last sample. Raises UserError when too many were bad; partial: of a part of the
        samples, whose rate says little about that of all while they are few."""
        self.check(max(self.seen, 1000) if partial else self.seen)
        if self.bad:
            log.warning("left out %d bad of %d samples", self.bad, self.seen)

    def check(self, seen: int) -> None:
        """Raises UserError when so many samples have too many bad ones among them."""
        if self.bad > self.max_fraction * seen:
            shown = "; ".join(map(str, self.first[:5])) + ("; ..." if self.bad > 5 else "")
            raise UserError(f"{self.bad} of {self.seen} samples are bad, more than the {self.max_fraction:.1%} allowed "
                            f"(max_bad_fraction): {shown}")


# ------------------------------------------------------------------------------------------------ reading


def document_of(sample: Sample) -> Document:
    """What a sample says, its media as MediaFiles: nothing is decoded. A file that is shown twice is one object.

    Understood: `json` with `content` or `messages`; else one medium of a modality beside one text (img2dataset's
    `jpg + txt`, `flac + txt`; a `json` of metadata beside them is passed over); else a lone text or medium. A text or
    medium that none of these uses makes the sample a bad one: the names of several files, cut at their first dot, are
    one key. Loss falls on the assistant's turns, or on everything in a plain document. Raises BadSample.
    """
    if sample.refused:
        ending, reason = next(iter(sample.refused.items()))
        raise BadSample(sample.key, sample.shard, f"member {ending} refused: {reason}" if ending else reason)
    files = {ending: MediaFile(ending, content) for ending, content in sample.members.items()}
    try:
        data = _document_json(sample.members.get("json"))
        if "messages" in data:
            read = conversation([_message(message, files) for message in _list(data["messages"], "messages")])
        elif "content" in data:
            read = plain_document([_part(part, files) for part in _list(data["content"], "content")])
        else:
            read = plain_document(_parts(files))
        if any(segment.modality == "text" and "\0" in segment.content for segment in read.segments):
            raise ValueError("its text holds null characters, as UTF-16 without its mark does")
        if data:
            used = {medium.content.ending for medium in read.media}
            for ending in sorted(files.keys() - used):
                if modality_of_ending(ending) or is_text(ending):
                    raise ValueError(f"its json does not use member {ending}")
        for ending in files:
            if ending.endswith(".json") and _document_json(sample.members[ending]):
                raise ValueError(f"member {ending} holds content or messages, but only json is read so")
        return read
    except RecursionError:
        raise BadSample(sample.key, sample.shard, "json nested too deeply") from None
    except json.JSONDecodeError as error:
        raise BadSample(sample.key, sample.shard, f"its json is not valid JSON ({error})") from None
    except UnicodeError as error:
        raise BadSample(sample.key, sample.shard, f"its text is not UTF-8 ({error})") from None
    except ValueError as error:
        raise BadSample(sample.key, sample.shard, str(error)) from None


def may_augment(sample: Sample) -> bool:
    """Whether the sample's media may be altered in training: unless its JSON, which `document_of` took, says
    `"augment": false`."""
    data = json.loads(sample.members["json"]) if "json" in sample.members else None
    return not isinstance(data, dict) or data.get("augment") is not False


def _document_json(content: bytes | None) -> dict:
    """A member's JSON if it says what the document is; {} where there is none, or one of metadata."""
    data = None if content is None else json.loads(content.decode("utf-8-sig"), object_pairs_hook=single_keys)
    return data if isinstance(data, dict) and ("messages" in data or "content" in data) else {}


def _parts(files: dict[str, MediaFile]) -> list[Part]:
    """The parts of a sample without a json that says them: at most one medium of each modality, then its text."""
    media: dict[str, str] = {}  # modality -> ending
    for ending in sorted(files):
        if modality := modality_of_ending(ending):
            if media.setdefault(modality, ending) != ending:
                raise ValueError(f"members {media[modality]} and {ending} of one key, which is a name up to its first "
                                 "dot, and no json that says how they belong together: rename the files, or convert "
                                 "their folder")
    texts = [ending for ending in files if is_text(ending)]
    if len(texts) > 1:
        raise ValueError(f"texts {' and '.join(sorted(texts)[:2])} of one key, which is a name up to its first dot: "
                         "rename the files, or convert their folder")
    if not media and not texts:
        raise ValueError("no json with content or messages, no txt, no medium")
    parts: list[Part] = [(modality, files[ending]) for modality, ending in media.items()]
    return parts + [("text", files[ending].content.decode("utf-8-sig").strip()) for ending in texts]


def is_text(ending: str) -> bool:
    """Whether a member is a text: `txt`, or `output.txt` where a file's name has more dots."""
    return ending.rpartition(".")[2] == "txt"


def _list(value, name: str) -> list:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is not a list that holds something")
    return value


def _message(message, files: dict[str, MediaFile]) -> tuple[str, list[Part]]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ValueError(f"a message needs a role, one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    return message["role"], [_part(part, files) for part in _list(content, "a message's content")]


def _part(part, files: dict[str, MediaFile]) -> Part:
    if not isinstance(part, dict):
        raise ValueError("a part is not an object")
    kind = part.get("type")
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise ValueError("a text part without a text")
        text.encode("utf-8")  # JSON can spell half a surrogate pair, which no encoding takes
        return "text", text
    if not isinstance(kind, str) or kind not in MODALITIES:
        raise ValueError(f"a part of unknown type {kind!r}")
    ending = part.get("file")
    if not isinstance(ending, str) or ending not in files:
        raise ValueError(f"member {ending!r} is missing")
    if modality_of_ending(ending) != kind:
        raise ValueError(f"member {ending} is no {kind} by its ending")
    return kind, files[ending]


def read_media(sample: Sample, document: Document, read: Callable[[str, MediaFile], object]) -> Document:
    """A sample's document with `read(modality, file)` in place of each file. Raises BadSample, which names the member,
    where that raises what damaged media do."""

    def one(modality: str, file: MediaFile):
        try:
            return read(modality, file)
        except (ValueError, *UNDECODABLE) as error:
            raise BadSample(sample.key, sample.shard, f"member {file.ending}: {error}") from None

    return document.map_media(one)


def codes_document(sample: Sample, encode: Callable[[str, bytes], np.ndarray] | None = None) -> Document:
    """Sample -> document whose media are codes, which can be encoded to ids.

    encode: (modality, file's bytes) -> codes, for samples that hold media as files; without it only codes
    (`0.image.npy` and the like) are taken. Raises BadSample; UserError on media where only codes are taken.
    """
    document = document_of(sample)
    if encode is None and not all(shown.content.holds_codes for shown in document.media):
        raise UserError(f"{sample.shard} holds media, not codes: run `python -m onevocab.data.tokenize` on it")

    def read(modality: str, file: MediaFile) -> np.ndarray:
        return npy_to_codes(file.content) if file.holds_codes else encode(modality, file.content)

    return read_media(sample, document, read)


# ------------------------------------------------------------------------------------------------ writing


def members_of(document: Document, extra: dict, ensure_ascii: bool = False) -> dict[str, bytes]:
    """Document whose media are MediaFiles -> a sample's members: `json`, `0.png`, `1.flac`, ..., numbered in the order
    in which they are shown; a file that is shown twice (one object) is stored once.

    extra: other keys of the JSON; ensure_ascii: whether it is ASCII alone, as `json.dumps` takes it. Raises
    UnicodeEncodeError on text that no encoding takes.
    """
    members: dict[str, bytes] = {}
    names: dict[int, str] = {}  # id of a file -> its member

    def entry(segment) -> dict:
        if segment.modality == "text":
            return {"type": "text", "text": segment.content}
        file = segment.content
        if id(file) not in names:
            last = f"{segment.modality}.npy" if file.holds_codes else file.ending.rpartition(".")[2]
            names[id(file)] = f"{len(names)}.{last}"
            members[names[id(file)]] = file.content
        return {"type": segment.modality, "file": names[id(file)]}

    contents = [(role, [entry(segment) for segment in segments]) for role, segments in document.turns]
    if document.is_conversation:
        data = {"messages": [{"role": role, "content": content} for role, content in contents]}
    else:
        data = {"content": [part for _, content in contents for part in content]}
    members["json"] = json.dumps(data | extra, ensure_ascii=ensure_ascii).encode()
    return members


def codes_ending(ending: str) -> str:
    """Name of the member that replaces a medium: `0.png` -> `0.image.npy`, `flac` -> `audio.npy`."""
    return ".".join([*ending.split(".")[:-1], modality_of_ending(ending), "npy"])
