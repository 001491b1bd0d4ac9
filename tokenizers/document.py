"""Documents: what a sample says, from the file of a shard to the ids.

A document is a list of segments. With roles it is a conversation; without, plain interleaved content. Its media are
files (`MediaFile`), decoded values or codes, and `Document.map_media` takes them from one stage to the next.
`encode_document` and `decode_document` are exact inverses on normalised documents, and the same template makes
training rows and prompts, so the two cannot drift apart.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from onevocab.tokenizers.vocabulary import ROLES, Vocabulary


@dataclass(frozen=True)
class MediaFile:
    """A medium as the file that lies in a shard. ending: its member's, as `0.png` or `0.image.npy`; `png` alone before
    it has a place."""

    ending: str
    content: bytes

    @property
    def holds_codes(self) -> bool:
        return self.ending.endswith("npy")


@dataclass(frozen=True, eq=False)
class MediaValue:
    """A medium as a Python value, such as a PIL image: told apart from codes, which an array can be as well."""

    value: object


@dataclass(frozen=True, eq=False)
class Segment:
    """A run of one modality.

    content: text as str; a medium as a MediaFile, as a MediaValue, or as an integer array of
    codebook-local codes (picture [rows, columns], sound [columns, rows]), which alone can be encoded to ids; role: None
    in a plain document, else who says it; turn: parts of one turn share a number; loss: whether predicting it counts.
    """

    modality: str
    content: object
    role: str | None = None
    turn: int = 0
    loss: bool = True

    def __eq__(self, other) -> bool:
        same = isinstance(other, Segment) and (self.modality, self.role, self.turn, self.loss) == (
            other.modality, other.role, other.turn, other.loss)
        return same and np.array_equal(self.content, other.content)


@dataclass(frozen=True)
class Document:
    segments: tuple[Segment, ...]

    @property
    def is_conversation(self) -> bool:
        return bool(self.segments) and self.segments[0].role is not None

    @property
    def turns(self) -> list[tuple[str | None, list[Segment]]]:
        """[(role, segments), ...] in order; a plain document is one turn of role None."""
        groups = groupby(self.segments, lambda segment: (segment.role, segment.turn if segment.role else 0))
        return [(role, list(segments)) for (role, _), segments in groups]

    @property
    def media(self) -> list[Segment]:
        """The segments that are no text, as often as they are shown."""
        return [segment for segment in self.segments if segment.modality != "text"]

    def map_media(self, change: Callable[[str, object], object]) -> "Document":
        """The document with `change(modality, content)` in place of each medium's content. One object that is shown
        several times is changed once, and stays one object."""
        changed: dict[int, object] = {}
        for segment in self.media:
            if id(segment.content) not in changed:
                changed[id(segment.content)] = change(segment.modality, segment.content)
        return Document(tuple(segment if segment.modality == "text" else
                              replace(segment, content=changed[id(segment.content)]) for segment in self.segments))

    def normalised(self) -> "Document":
        """Neighbouring texts of one turn merged, empty texts dropped, turns numbered from 0.

        A turn that only holds empty text keeps one empty segment: it exists (guidance drops words so).
        """
        merged: list[Segment] = []
        turn, before = -1, None
        for segment in self.segments:
            here = (segment.role, segment.turn) if segment.role is not None else None
            new_turn = here is not None and here != before
            turn, before = turn + new_turn, here
            segment = replace(segment, turn=max(turn, 0))
            last = merged[-1] if merged and not new_turn else None
            if last is not None and last.modality == "text" and last.content == "":
                merged[-1] = segment
            elif segment.modality == "text" and last is not None and segment.content == "":
                continue
            elif last is not None and last.modality == segment.modality == "text" and last.loss == segment.loss:
                merged[-1] = replace(last, content=last.content + segment.content)
            elif segment.modality == "text" and segment.content == "" and here is None:
                continue
            else:
                merged.append(segment)
        return Document(tuple(merged))


Part = tuple[str, object]  # (modality, content), what a segment is made of


def plain_document(parts: list[Part]) -> Document:
    """[(modality, content), ...] -> Document; loss falls on everything."""
    return Document(tuple(Segment(*part) for part in parts))


def conversation(messages: list[tuple[str, list[Part]]]) -> Document:
    """[(role, [(modality, content), ...]), ...] -> Document; loss falls on the assistant's turns only."""
    return Document(tuple(
        Segment(modality, content, role, turn, role == "assistant")
        for turn, (role, parts) in enumerate(messages) for modality, content in (parts or [("text", "")])))


@dataclass(frozen=True)
class Encoded:
    """ids: int32 (n,); loss_mask: bool (n,), whether predicting that id counts."""

    ids: np.ndarray
    loss_mask: np.ndarray


def encode_document(document: Document, vocabulary: Vocabulary, encode_text, open_role: str | None = None) -> Encoded:
    """Document -> ids by the template

        <|document|> segments <|end_of_document|>                                      plain
        <|document|> (<|role|> segments <|end_of_turn|>)* <|end_of_document|>          conversation

    encode_text: str -> list of ids, never recognising a special. With `open_role` the conversation is left open for
    that role to speak: a prompt. In a turn that counts, its end_of_turn counts too: the model must learn to stop.
    """
    ids: list[np.ndarray] = [np.array([vocabulary.document], np.int32)]
    loss: list[np.ndarray] = [np.zeros(1, bool)]

    def add(values, counts: bool) -> None:
        ids.append(np.asarray(values, np.int32))
        loss.append(np.full(len(ids[-1]), counts))

    document = document.normalised()
    before = None
    for segment in document.segments:
        if document.is_conversation and segment.turn != (before.turn if before else None):
            if before is not None:
                add([vocabulary.end_of_turn], before.loss)
            add([vocabulary.role(segment.role)], False)
        if segment.modality == "text":
            add(encode_text(segment.content), segment.loss)
        else:
            add(vocabulary.spans[segment.modality].wrap(segment.content), segment.loss)
        before = segment
    if document.is_conversation and before is not None:
        add([vocabulary.end_of_turn], before.loss)
    if open_role is None:
        add([vocabulary.end_of_document], before.loss if before and not document.is_conversation else False)
    else:
        add([vocabulary.role(open_role)], False)
    return Encoded(np.concatenate(ids), np.concatenate(loss))


def split_segments(ids: np.ndarray, vocabulary: Vocabulary, decode_text) -> list[Part]:
    """Ids of one turn's content -> [(modality, content)]. Raises ValueError on a malformed span."""
    parts, text, i = [], [], 0

    def flush() -> None:
        if text:
            parts.append(("text", decode_text(text)))
            text.clear()

    while i < len(ids):
        span = vocabulary.span_of_begin.get(int(ids[i]))
        if span is None:
            if ids[i] >= vocabulary.text_size:
                raise ValueError(f"id {ids[i]} cannot stand in a turn's content")
            text.append(int(ids[i]))
            i += 1
            continue
        flush()
        ends = np.flatnonzero(ids[i:] == span.end)
        if not len(ends):
            raise ValueError(f"a {span.name} span is never closed")
        parts.append((span.name, span.unwrap(ids[i : i + ends[0] + 1])))
        i += ends[0] + 1
    flush()
    return parts


def decode_document(ids: np.ndarray, vocabulary: Vocabulary, decode_text) -> Document:
    """The inverse of `encode_document` (loss flags: the assistant's turns, or everything in a plain document).

    Raises ValueError when the ids are not a whole, well-formed document.
    """
    ids = np.asarray(ids)
    if len(ids) < 2 or ids[0] != vocabulary.document or ids[-1] != vocabulary.end_of_document:
        raise ValueError("not a whole document")
    ids = ids[1:-1]
    roles = {vocabulary.role(name): name for name in ROLES}
    if not len(ids) or int(ids[0]) not in roles:
        return plain_document(split_segments(ids, vocabulary, decode_text))
    segments, start, turn = [], 0, 0
    for stop in np.flatnonzero(ids == vocabulary.end_of_turn):
        if int(ids[start]) not in roles:
            raise ValueError("a turn does not start with a role")
        role = roles[int(ids[start])]
        parts = split_segments(ids[start + 1 : stop], vocabulary, decode_text) or [("text", "")]
        segments += [Segment(*part, role, turn, role == "assistant") for part in parts]
        start, turn = stop + 1, turn + 1
    if start != len(ids):
        raise ValueError("a turn is never closed")
    return Document(tuple(segments))
