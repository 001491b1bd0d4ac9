"""What the tokenizers are trained on: texts and media of the run's own shards."""

from collections.abc import Iterator

from onevocab.data.documents import BadSample, BadSamples, document_of, modality_of_ending
from onevocab.data.shards.format import Sample
from onevocab.data.shards.remote import read_source


def _samples(shards: list[str], limit: int) -> Iterator[Sample]:
    """About `limit` samples, equally many from the start of each shard: they are taken to lie in no special order."""
    for shard in shards:
        for count, sample in enumerate(read_source(shard)):
            if count >= -(-limit // len(shards)):
                break
            yield sample


def texts(shards: list[str], limit: int, max_bad_fraction: float) -> Iterator[str]:
    """All texts of about `limit` samples. Raises UserError when more than `max_bad_fraction` of them are bad."""
    bad = BadSamples(max_bad_fraction)
    for sample in _samples(shards, limit):
        try:
            yield from (part.content for part in document_of(sample).segments if part.modality == "text")
        except BadSample as error:
            bad.add(error)
        else:
            bad.good()
    bad.finish()


def media_files(shards: list[str], limit: int, modality: str) -> Iterator[bytes]:
    """About `limit` files of one modality, out of at most three times as many samples."""
    count = 0
    for sample in _samples(shards, limit * 3):
        for ending, content in sample.members.items():
            if modality_of_ending(ending) == modality and not sample.refused:
                yield content
                count += 1
        if count >= limit:
            return
