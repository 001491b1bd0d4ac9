"""Writes the samples of any format as shards: the one place that counts, drops duplicates and splits the work.

The records of the input are split into parts; part n becomes the shards `FORMAT-n-*.tar`, whoever writes it. So ranks
share nothing but the output folder, and the same parts give the same bytes for any number of ranks.
"""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from onevocab.common.errors import UserError
from onevocab.data.convert import cells, tables
from onevocab.data.convert.formats import FORMATS
from onevocab.data.convert.options import Format, options_of
from onevocab.data.convert.report import Report, claimed, finish
from onevocab.data.convert.samples import Converted, Dropped, list_of, printable, sample_of
from onevocab.data.documents import modality_of_ending
from onevocab.data.shards.writer import ShardWriter
from onevocab.tokenizers.document import Document

BLOCK = 50  # neighbouring records that stay together when a file is split into parts


def convert(name: str, source, out, rank: int = 0, world: int = 1, parts: int | None = None,
            samples_per_shard: int = 1000, overwrite: bool = False, progress: bool = True, follow_links: bool = False,
            **given) -> Report:
    """Converts `source`, a file or folder of the format `name`, into shards in the folder `out`.

    rank, world: this process does every `world`-th part, from the `rank`-th on; parts: how many each file of the input
    is split into (default: as few as give every rank one; the result depends on it); follow_links: also out of the
    input's and the media's folder; given: the format's options.
    Duplicates are found within a part. Returns the report of this rank, of all when it is the last. Raises UserError on
    a wrong option or path, on a folder that is not empty, and when nothing was kept.
    """
    if name not in FORMATS:
        raise UserError(f"unknown format {name!r}: choose one of {', '.join(FORMATS)}")
    chosen, out = FORMATS[name], Path(out)
    options = options_of(name, chosen, source, given, follow_links)
    here, there = options.source.resolve(), out.resolve()
    if (here.is_dir() and there.is_relative_to(here)) or here.is_relative_to(there):
        raise UserError(f"{out} lies in the input, or the input in it: choose another folder for the shards")
    units = chosen.units(options)
    if not units:
        raise UserError(f"{source} holds no file of the format {name}")
    _check_map(chosen, options, units[0])
    split = parts or -(-world // len(units))
    todo = [(unit, turn) for unit in units for turn in range(split)]
    report = Report(name, printable(str(source)))
    for place, why in sorted(options.passed_over.items()) if rank == 0 else ():
        report.add(report.dropped, place, why)
    with claimed(out, rank, world, overwrite):
        try:
            with tqdm(desc=name, unit=" samples", disable=not progress or rank != 0) as bar:
                for number in range(rank, len(todo), world):
                    prefix = f"{name}-{number:05d}"
                    with ShardWriter(out, prefix, samples_per_shard) as writer:
                        _write(writer, prefix, _samples(chosen, options, *todo[number], split), report, bar)
                    report.shards += [path.name for path in writer.shards]
            return finish(report, out, rank, world) or report
        finally:
            tables.document.cache_clear()
            cells.quoted.cache_clear()


def _check_map(chosen: Format, options, unit: Path) -> None:
    """Raises UserError when a mapped field is in none of the first records: a slip of the pen would cost every
    picture."""
    wanted = dict(getattr(options, "map", None) or {})
    fields: set[str] = set()
    with suppress(Dropped):  # of a file that cannot be read, which is counted later
        for _, record in islice(chosen.rows(options, unit), 100 if wanted else 0):
            record = record[1] if isinstance(record, tuple) and len(record) == 2 else record
            if isinstance(record, dict):
                fields |= set(map(str, record))
    wrong = [f"{role}={field}" for role, names in wanted.items() for field in list_of(names)
             if field not in fields and field.partition(".")[0] not in fields]
    if fields and wrong:
        raise UserError(f"--map {wrong[0]}: {unit.name} has no such field; its fields are {', '.join(sorted(fields))}")


def _samples(chosen: Format, options, unit: Path, turn: int, split: int) -> Iterator[tuple[str, Converted | Dropped]]:
    """What a file's blocks of records number turn, turn + split, ... become."""
    try:
        for number, (name, record) in enumerate(chosen.rows(options, unit)):
            if number // BLOCK % split != turn:
                continue
            if isinstance(record, Dropped):
                yield name, record
                continue
            try:
                for made in chosen.make(options, name, record):
                    yield name, made
            except Dropped as dropped:
                yield name, dropped
    except Dropped as dropped:  # the file cannot be read any further; every part of it sees that, one counts it
        if turn == 0:
            yield unit.name, dropped


def _write(writer: ShardWriter, prefix: str, samples: Iterator[tuple[str, Converted | Dropped]], report: Report,
           bar: tqdm) -> None:
    seen: dict[bytes, str] = {}
    for name, made in samples:
        bar.update()
        try:
            if isinstance(made, Dropped):
                raise made
            members, digest = sample_of(made.document, name), _digest(made.document)
            if digest in seen:
                raise Dropped("duplicate", f"the same as {seen[digest]}")
        except Dropped as dropped:
            report.add(report.dropped, name, dropped)
            continue
        writer.write(f"{prefix}-{len(seen):06d}", members)
        seen[digest] = name
        _count(report, name, made, members)


def _digest(document: Document) -> bytes:
    """Of all that a sample says and shows: equal for duplicates."""
    digest = hashlib.blake2b(digest_size=16)
    for number, (role, segments) in enumerate(document.turns):
        for segment in segments:
            content = segment.content.encode() if segment.modality == "text" else segment.content.content
            digest.update(f"{number} {role} {segment.modality} {len(content)}\n".encode())
            digest.update(content)
    return digest.digest()


def _count(report: Report, name: str, made: Converted, members: dict[str, bytes]) -> None:
    report.samples += 1
    for ending, content in members.items():
        report.bytes += len(content)
        if modality := modality_of_ending(ending):
            report.media[modality] = report.media.get(modality, 0) + 1
    media = [segment.content for segment in made.document.media]
    report.reencoded += len({medium.content for medium in media if medium.reencoded})
    for dropped in [*made.left_out, *(medium.without for medium in media if medium.without)]:
        report.add(report.left_out, name, dropped)
