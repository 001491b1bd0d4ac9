"""What img2dataset makes of CC3M, CC12M, SBU and LAION: shards of `jpg + txt + json`, parquet that holds the pictures,
or folders of files beside parquet. Shards of sounds with texts are read too."""

from collections.abc import Iterator
from pathlib import Path

from onevocab.common.errors import UserError
from onevocab.data.convert import tables
from onevocab.data.convert.media import check
from onevocab.data.convert.options import Format
from onevocab.data.convert.samples import Converted, Dropped, Row, field_of, list_of, pairs, text_of
from onevocab.data.documents import is_text, modality_of_ending
from onevocab.data.shards.format import Sample, read_shard
from onevocab.tokenizers.document import Part
from onevocab.tokenizers.modalities import MODALITIES

PICTURES = MODALITIES["image"].shard_endings


def _units(options) -> list[Path]:
    """Shards, and parquet files that stand for themselves: one beside a shard of its name only describes it."""
    files = tables.files_of(options, (".tar", ".parquet"))
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
        raise Dropped("refused member", f"{ending}: {why}" if ending else why)
    for group in _files_of(sample):
        try:
            yield from _from_files(sample, group)
        except Dropped as dropped:
            yield dropped


def _files_of(sample: Sample) -> list[list[str]]:
    """The members of one file each. A key is a name up to its first dot, so `22.05.jpg` and `22.06.jpg` are one sample
    of two files: members that are alike to their last dot belong together. One medium with one text are one file
    whatever they are called."""
    used = [ending for ending in sorted(sample.members) if modality_of_ending(ending) or is_text(ending)]
    if len({modality_of_ending(ending) for ending in used}) == len(used):
        return [sorted(sample.members)]
    groups: dict[str, list[str]] = {}
    for ending in sorted(sample.members):
        groups.setdefault(ending.rpartition(".")[0], []).append(ending)
    return list(groups.values())


def _from_files(sample: Sample, endings: list[str]) -> Iterator[Converted | Dropped]:
    media = [ending for ending in endings if modality_of_ending(ending) and not ending.endswith("npy")]
    if not media:
        raise Dropped("missing media", f"only {', '.join(endings)}")
    if len({modality_of_ending(ending) for ending in media}) < len(media):
        raise Dropped("bad record", f"{' and '.join(media)} share a name")
    text = next((ending for ending in endings if is_text(ending)), None)
    about = next((ending for ending in endings if ending.rpartition(".")[2] == "json"), None)
    if text:
        captions = [sample.members[text].decode("utf-8-sig", "surrogateescape")]
    else:
        captions = list_of(field_of(tables.record_of(sample.members[about]) if about else {}, "caption", "text"))
    yield from pairs(lambda: [check(sample.members[ending], f"{sample.key}.{ending}") for ending in media], captions)


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
