"""What a modality is: everything that the rest of the project needs to know about one kind of medium, in one value.

A modality is one file (its configuration, its tokenizer, a `Modality` at the end) and one line in
tokenizers/modalities.py. The tokenizer may stand in a file of its own, as those of pictures and sounds do: reading
flags or a shard then does not import torch. The configuration's section, the stage that trains the tokenizer, the
range of ids, loss weights, temperatures, flags, the reader of files, and the previews of pages are all made from it.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import numpy as np
from pydantic import BaseModel

if TYPE_CHECKING:
    from torch import Tensor

# How a modality without wordings of its own is asked about, and asked for.
DESCRIBE = ("Describe this.", "What is this?", "Put this into words.", "Give a caption.")
MAKE = ("Make this: {caption}", "Give me this: {caption}", "I want {caption}", "Make {caption}")


class Preview(NamedTuple):
    """A value made small enough for a page. label: what it is, in words; mime, content: a file that browsers show."""

    label: str
    mime: str
    content: bytes


class MediaTokenizer(Protocol):
    """Values <-> grids of codes: an `nn.Module` with a `quantizer`, trained by `train_autoencoder`.

    `forward(x, quantize) -> (loss, what to log)` and `latents(x) -> (..., dim)` take what `batch` returns. A value is
    what `Modality.load` returns; `encode_batch` takes paths and bytes of files too.
    """

    name: str
    Config: ClassVar[type[BaseModel]]  # the configuration's section; the tokenizer is built from one
    config: BaseModel  # has steps, batch_size, learning_rate

    @property
    def layout(self) -> dict:
        """What the vocabulary needs to know: name, sizes, codes, rows (see `Vocabulary.build`)."""

    @property
    def max_grid(self) -> tuple[int, int]:
        """The largest grid of codes of a reply, [first axis, second axis]; of a sized modality every reply has it."""

    def training_set(self, files: Iterable[bytes]) -> Tensor:
        """Files of shards -> examples (n, ...) on the CPU, unreadable files left out; n may be 0."""

    def batch(self, examples: Tensor) -> Tensor:
        """Some of `training_set`'s examples -> a batch of the network's input."""

    def encode_batch(self, sources: list) -> list[np.ndarray]:
        """Values, paths or bytes -> codes [first axis, second axis] each. Raises UserError on one that is unusable."""

    @property
    def augments(self) -> bool:
        """Whether `augmented` alters anything."""

    def augmented(self, source, rng: np.random.Generator):
        """What `encode_batch` takes -> a value of which the same is true as of `source`, altered at random as the
        section says; `source` itself where nothing is to be altered. For what a model sees or hears in training."""

    def decode_batch(self, grids: list[np.ndarray]) -> list:
        """Codes [first axis, second axis] each -> values."""


@dataclass(frozen=True)
class Modality:
    """One medium. All functions raise UserError on what they cannot read.

    name: of the configuration's section, the stage, the range of ids, and sample.py's flag; plural: in messages;
    tokenizer_class: a `MediaTokenizer`, as "module:class", imported when it is first used; sized: whether its span of
    ids says height and width (a picture), or is open and ends with an id of its own (a sound); value: what its Python
    values are, in words; accepts: whether a Python value is one; suffixes: endings of files that people give, with the
    dot, the first is the one that `save` writes; shard_endings: endings of shards' members, without the dot, never
    `npy`: those are codes; the first is the one that `to_shard` writes; ending_of: a file's bytes -> which ending of
    `suffixes` they should have, without the dot, None where they are none of this modality's; load: path or bytes of a
    file -> a value, checked; save, to_shard: a value -> the bytes of a file for people, or for a shard; preview: a
    value -> what a page shows of it; measure: a value -> (what its length is measured in, how long it is); describe,
    make: what training asks before a caption, and before a medium that is made from one (data/turns.py).
    """

    name: str
    plural: str
    tokenizer_class: str
    sized: bool
    value: str
    accepts: Callable[[object], bool]
    suffixes: tuple[str, ...]
    shard_endings: tuple[str, ...]
    ending_of: Callable[[bytes], str | None]
    load: Callable[[object], object]
    save: Callable[[object], bytes]
    to_shard: Callable[[object], bytes]
    preview: Callable[[object], Preview]
    measure: Callable[[object], tuple[str, float]]
    describe: tuple[str, ...] = DESCRIBE
    make: tuple[str, ...] = MAKE

    @property
    def tokenizer(self) -> type[MediaTokenizer]:
        """`tokenizer(config)` makes one."""
        return pkgutil.resolve_name(self.tokenizer_class)

    @property
    def config(self) -> type[BaseModel]:
        """The model of the configuration's section."""
        return self.tokenizer.Config
