"""What img2dataset makes of CC3M, CC12M, SBU and LAION: shards of `jpg + txt + json`, parquet that holds the pictures,
or folders of files beside parquet. Shards of sounds with texts are read too."""

from collections.abc import Iterator
from pathlib import Path

from onevocab.common.errors import UserError
from onevocab.data.convert import tables
from onevocab.data.convert.media import check
from onevocab.data.convert.options import Format
from onevocab.data.convert.samples import Converted, Dropped, Row, field_of, list_of, pairs, text_of
from onevocab.data.documents import modality_of_ending
from onevocab.data.shards.format import Sample, read_shard
from onevocab.tokenizers.document import Part
from onevocab.tokenizers.modalities import MODALITIES

PICTURES = MODALITIES["image"].shard_endings


def _units(options) -> list[Path]:
    """Shards, and parquet files that stand for themselves: one beside a shard of its name only describes it."""
    files = tables.files_of(options.source, (".tar", ".parquet"))
    shards = {path.with_suffix("") for path in files if path.suffix == ".tar"}
    return [path for path in files if path.suffix == ".tar" or path.with_suffix("") not in shards]


def _rows(options, unit: Path) -> Iterator[Row]:
    if unit.suffix != ".tar":
        yield from ((name, (unit.stem, record)) for name, record in tables.rows(unit))
        return
    try:
        for sample in read_shard(unit):
            yield f"{unit.name}#{sample.key}", sample
    except UserError as error:  # cut short, for example: the samples before are used
        raise Dropped("damaged input", str(error)) from None


def _make(options, name: str, row) -> Iterator[Converted | Dropped]:
    return _from_shard(row) if isinstance(row, Sample) else _from_parquet(options, *row)


def _from_shard(sample: Sample) -> Iterator[Converted | Dropped]:
    if sample.refused:
        ending, why = next(iter(sample.refused.items()))
        raise Dropped("refused member", f"{ending}: {why}")
    media = [ending for ending in sorted(sample.members) if modality_of_ending(ending) and not ending.endswith("npy")]
    if not media:
        raise Dropped("missing media", f"only {', '.join(sample.members)}")
    if "txt" in sample.members:
        captions = [sample.members["txt"].decode("utf-8", "surrogateescape")]
    else:
        captions = list_of(field_of(tables.record_of(sample.members.get("json", b"{}")), "caption", "text"))
    return pairs(lambda: [check(sample.members[ending], f"{sample.key}.{ending}") for ending in media], captions)


def _from_parquet(options, stem: str, record) -> Iterator[Converted | Dropped]:
    status = text_of(field_of(record, "status"))
    if status and status != "success":
        raise Dropped("not downloaded", text_of(field_of(record, "error_message")))
    key = text_of(field_of(record, "key"))

    def parts() -> list[Part]:
        for ending in PICTURES:
            if isinstance(held := field_of(record, ending), bytes):
                return [check(held, f"{key}.{ending}")]
        return options.media.parts(*(f"{stem}/{key}.{ending}" for ending in PICTURES))

    return pairs(parts, list_of(field_of(record, "caption", "text")))


FORMATS = {
    "img2dataset": Format("what img2dataset writes (CC3M, CC12M, SBU, LAION), and other shards of media and texts",
                          _units, _rows, _make),
}
