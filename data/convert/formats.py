"""Every format by its name."""

from onevocab.data.convert import (
    captions,
    coco,
    conversations,
    corpora,
    interleaved,
    mapped,
    recordings,
    webshards,
)
from onevocab.data.convert.samples import Format

FORMATS: dict[str, Format] = {
    name: chosen
    for module in (captions, conversations, coco, webshards, recordings, interleaved, corpora, mapped)
    for name, chosen in module.FORMATS.items()
}
