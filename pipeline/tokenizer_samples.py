"""What the tokenizers are trained on: texts, pictures and clips of the run's own shards."""

from collections.abc import Iterator

import numpy as np
import torch

from onevocab.common.errors import UserError
from onevocab.data.documents import BadSample, document_of, modality_of_ending
from onevocab.data.shards.format import Sample
from onevocab.data.shards.remote import read_source
from onevocab.tokenizers.audio import HOP, RATE, AudioTokenizer
from onevocab.tokenizers.image import ImageTokenizer


def _samples(shards: list[str], limit: int) -> Iterator[Sample]:
    """About `limit` samples, as many from the start of each shard: their order inside one says nothing."""
    for shard in shards:
        for count, sample in enumerate(read_source(shard)):
            if count >= -(-limit // len(shards)):
                break
            yield sample


def texts(shards: list[str], limit: int) -> Iterator[str]:
    """All texts of about `limit` samples."""
    for sample in _samples(shards, limit):
        try:
            yield from (part.content for part in document_of(sample).segments if part.modality == "text")
        except BadSample:
            continue  # counted and named when the shard is turned to codes


def _media(shards: list[str], limit: int, modality: str) -> Iterator[bytes]:
    """The files of one modality in about `limit` samples that have one."""
    found = 0
    for sample in _samples(shards, limit * 3):
        for ending, content in sample.members.items():
            if modality_of_ending(ending) == modality:
                yield content
                found += 1
        if found >= limit:
            return


def pictures(shards: list[str], limit: int, tokenizer: ImageTokenizer) -> torch.Tensor:
    """uint8 (n, 3, H, W). Raises UserError when no picture can be read."""
    read = []
    for content in _media(shards, limit, "image"):
        try:
            read.append(tokenizer.read(content))
        except UserError:
            continue
    if not read:
        raise UserError(f"no readable picture in {len(shards)} shards from {shards[0]} on; see [data] shards")
    return torch.stack(read)


def clips(shards: list[str], limit: int, tokenizer: AudioTokenizer) -> torch.Tensor:
    """Log-mel pieces of `clip_seconds`, float (n, 1, mels, frames), n = 0 when there is no sound. Short sounds are
    padded with silence, of long ones each piece is taken."""
    frames = round(tokenizer.config.clip_seconds * RATE / HOP / tokenizer.config.column_frames)
    frames = max(1, frames) * tokenizer.config.column_frames
    pieces = []
    for content in dict.fromkeys(_media(shards, limit, "audio")):
        try:
            samples = tokenizer.read(content)
        except UserError:
            continue
        length = frames * HOP
        for start in range(0, len(samples), length):
            piece = samples[start : start + length]
            pieces.append(tokenizer.log_mel(np.pad(piece, (0, length - len(piece)))))
    return torch.stack(pieces).clone() if pieces else torch.empty(0)
