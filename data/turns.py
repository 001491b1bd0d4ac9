"""Captions as conversations: a document of a medium and a text becomes a request and its answer, in both directions.

    user: <medium> Describe the picture.   assistant: <text>
    user: Draw <text>                      assistant: <medium>

The requests are drawn anew each epoch from the modality's own wordings, or from a file's:

    [image]
    describe = ["What is in the picture?", "Describe the picture."]
    make = ["Draw {caption}", "A picture of {caption}, please."]

A document of several media has those of the section `[any]`.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator

from onevocab.common.errors import UserError, invalid
from onevocab.common.files import read_toml
from onevocab.tokenizers.bundle import Tokenizers
from onevocab.tokenizers.modalities import MODALITIES
from onevocab.tokenizers.modality import DESCRIBE, MAKE

CAPTION = "{caption}"


class Wording(BaseModel):
    """One modality's requests."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    describe: tuple[str, ...] = Field(DESCRIBE, min_length=1, description="what is said after a medium to get its "
                                      "caption")
    make: tuple[str, ...] = Field(MAKE, min_length=1, description="what is said to get a medium; {caption} stands for "
                                  "its caption")

    @field_validator("describe")
    @classmethod
    def _asks(cls, texts):
        for text in texts:
            if not text.strip() or CAPTION in text:
                raise ValueError(f"{text!r} must be a request, without {CAPTION}")
        return texts

    @field_validator("make")
    @classmethod
    def _has_caption(cls, texts):
        for text in texts:
            if text.count(CAPTION) != 1:
                raise ValueError(f"{text!r} must hold {CAPTION} once")
        return texts


WordingsFile = create_model("WordingsFile", __config__=ConfigDict(frozen=True, extra="forbid"), **{
    "any": (Wording, Wording()), **{name: (Wording, Wording(describe=modality.describe, make=modality.make))
                                    for name, modality in MODALITIES.items()}})


def read_wordings(path: str | None):
    """A file's wordings, the built-in ones where it has none (None: everywhere). Raises UserError that names what is
    wrong."""
    if path is None:
        return WordingsFile()
    try:
        data = read_toml(path, f"wordings: {path}")
        for name, section in data.items():  # a list that a section lacks is the built-in one
            if isinstance(section, dict) and name in MODALITIES:
                data[name] = {"describe": MODALITIES[name].describe, "make": MODALITIES[name].make} | section
        return WordingsFile.model_validate(data)
    except OSError as error:
        raise UserError(f"wordings: cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        raise invalid(error, f"wordings: {path}") from None


class Entry(NamedTuple):
    """A document as it is shown: swapped: its two parts in the other order; dropped: without the words that a medium is
    made from; wording: the number of its request, -1 where it is shown as it is."""

    document: int
    swapped: bool
    dropped: bool
    wording: int = -1


class Turns:
    """Puts the tokens of documents and of wordings together to conversations, by the template of
    tokenizers/document.py.

    A request with a caption is encoded as one text, as a prompt is: pieces of text cannot be joined, since a word's
    first token holds the space before it. files: one `WordingsFile` for each source.
    """

    def __init__(self, tokenizers: Tokenizers, files: list):
        self.vocab, self.text = tokenizers.vocab, tokenizers.text
        names = [span.name for span in self.vocab.ranges]
        self._wordings = [[getattr(file, name) for name in (*names, "any")] for file in files]
        self._describe = [[[self._encode(text) for text in one.describe] for one in file] for file in self._wordings]
        self.numbers = np.array([[(len(one.describe), len(one.make)) for one in file] for file in self._wordings])
        self.longest = np.array([[max(len(self._encode(text)) for text in (*one.describe, *(
            text.replace(CAPTION, " ") for text in one.make))) for one in file] for file in self._wordings])
        self._request = lru_cache(8192)(self._make_request)

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self.text.encode(text), np.int32)

    def kind(self, media: np.ndarray) -> np.ndarray:
        """The token cache's column MEDIA, of documents that show some -> a place in the last axis but one of `numbers`:
        the medium's, or that of `[any]`."""
        one = (media & (media - 1)) == 0
        return np.where(one, np.log2(np.maximum(media, 1)).astype(np.int64), self.numbers.shape[1] - 1)

    def _make_request(self, file: int, kind: int, wording: int, caption: bytes) -> np.ndarray:
        text = self.text.decode(np.frombuffer(caption, np.int32).tolist())
        return self._encode(self._wordings[file][kind].make[wording].replace(CAPTION, text))

    def request(self, file: int, kind: int, wording: int, caption: np.ndarray) -> np.ndarray:
        """The ids of a request for what `caption` (int32 ids) says."""
        return self._request(file, kind, wording, caption.tobytes())

    def tokens(self, ids: np.ndarray, caption: int, made: bool, dropped: bool, file: int, kind: int,
               wording: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32, loss bool) of the conversation.

        ids: of the plain document; caption: the token cache's column CAPTION; made: whether the medium is the answer;
        dropped: without the words that it is made from.
        """
        v = self.vocab
        media, text = (ids[1 : -1 - caption], ids[-1 - caption : -1]) if caption > 0 else (
            ids[1 - caption : -1], ids[1 : 1 - caption])
        if not made:
            asked, answer = [media, self._describe[file][kind][wording]], text
        else:
            asked, answer = [] if dropped else [self.request(file, kind, wording, text)], media
        shown = np.concatenate([[v.document, v.user], *asked, [v.end_of_turn, v.assistant], answer,
                                [v.end_of_turn, v.end_of_document]]).astype(np.int32)
        loss = np.zeros(len(shown), bool)
        loss[-len(answer) - 2 : -1] = True
        return shown, loss
