"""Media -> codes, once, before training: the same samples, with every medium replaced by its codes.

A shard of codes is a pure function of the raw shard and the tokenizers, and is whole or absent; so ranks share nothing
but the output folder, and a run that was killed goes on with the shards that are missing.
"""

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from onevocab.common.errors import UserError
from onevocab.common.files import read_json, sha256_file, write_json
from onevocab.common.processes import run_processes
from onevocab.data.documents import (
    UNDECODABLE,
    BadSample,
    BadSamples,
    codes_ending,
    document_of,
    is_text,
    may_augment,
    modality_of_ending,
)
from onevocab.data.shards.format import Sample, check_header, codes_to_npy, npy_to_codes, read_header
from onevocab.data.shards.index import READ, IndexedShard, build_index, read_indexed
from onevocab.data.shards.remote import ShardCache, is_remote, list_sources, local_name, shown
from onevocab.data.shards.writer import ShardFile

log = logging.getLogger("onevocab.data")


@dataclass
class TokenizeStats:
    """shards: written now; skipped: shards that were finished before; samples, bad, media: of those written now."""

    shards: int = 0
    skipped: int = 0
    samples: int = 0
    bad: int = 0
    media: int = 0


def codes_names(shards: list[str]) -> list[str]:
    """What the shards of codes are called: as the raw shards are; those of one name with as many of their folders
    before it as tell them apart: cc3m/00000.tar and sbu/00000.tar are cc3m-00000.tar and sbu-00000.tar. Raises
    UserError when a shard is there twice."""
    places = [shown(shard if is_remote(shard) else os.path.abspath(shard)).split("/")[:-1] for shard in shards]
    names, depth = [local_name(shard) for shard in shards], 0
    while double := {name for name, times in Counter(names).items() if times > 1}:
        depth += 1
        at = [i for i, name in enumerate(names) if name in double]
        if depth > max(len(places[i]) for i in at):
            first = next(i for i in at if names[i] == min(double))
            raise UserError(f"{shown(shards[first])} is there twice, or its codes would have another shard's name; "
                            "list it once, or rename it")
        for i in at:
            folders = (re.sub(r"[^\w.-]+", "_", part).strip(".") for part in places[i][-depth:])
            names[i] = "-".join([*filter(None, folders), local_name(shards[i])])
    return names


def tokenize_shards(shards, out_folder, tokenizers, rank: int = 0, world: int = 1, batch: int = 64,
                    max_bad_fraction: float = 0.01, progress: bool = True, overwrite: bool = False) -> TokenizeStats:
    """Writes a shard of codes, called as `codes_names` says, for every `world`-th shard, from the `rank`-th on.

    shards: paths and addresses, or what `list_sources` takes; batch: media encoded at once. Bad samples are left out,
    logged, counted, and listed beside the codes. Raises UserError when more than `max_bad_fraction` are bad, when
    another process is writing a shard, or when `out_folder` holds codes of other tokenizers or of another shard of that
    name, unless `overwrite`.
    """
    shards = list(map(str, shards)) if isinstance(shards, list | tuple) else list_sources(shards)
    stats, bad = TokenizeStats(), BadSamples(max_bad_fraction)
    cache, mine = ShardCache(), list(zip(shards, codes_names(shards), strict=True))[rank::world]
    sizes, done = [_size(shard) for shard, _ in mine], 0
    bar = tqdm(desc="tokenize", unit="B", unit_scale=True, total=None if None in sizes else sum(sizes),
               disable=not progress or rank != 0)
    for (shard, name), size in zip(mine, sizes, strict=True):
        out = Path(out_folder) / name
        if not is_remote(shard) and out.resolve().parent == Path(shard).resolve().parent:
            raise UserError(f"{out_folder} is the folder of the raw shards: choose another for the codes")
        local = cache.fetch(shard)
        made_by = read_header(local)
        if made_by:
            check_header(shown(shard), made_by, tokenizers.hash)
        header = {"tokenizers": tokenizers.hash, "source": _fingerprint(local)}
        if out.exists() and _is_done(out, header, overwrite):
            _count_known(bad, shard, local, out)
            stats.skipped += 1
            done += size or 0
            bar.update(done - bar.n)
            continue
        samples = read_indexed(local, verify=True, salvage=True, name=shown(shard))
        _tokenize_shard(samples, out, header, tokenizers, batch, bad, stats, bar)
        done += size or 0
        bar.set_postfix_str(f"{stats.samples:,} samples, {stats.bad} bad", refresh=False)
        bar.update(max(done - bar.n, 0))
        stats.shards += 1
    bar.close()
    bad.finish(partial=world > 1)
    return stats


def _is_done(out: Path, header: dict, overwrite: bool) -> bool:
    """Whether a shard of codes is whole. Raises UserError when it is of something else, unless `overwrite`."""
    try:
        held = read_header(out)
        if held == header and not any(sample.refused for sample in read_indexed(out, verify=True)):
            return True
    except UserError as error:
        held, reason = header, str(error)
    else:
        reason = f"{out} is damaged"
    if held != header and not overwrite:
        what = "other tokenizers" if held and held.get("source") == header["source"] else "another shard"
        raise UserError(f"{out} was made from {what}; choose another folder for the codes, or overwrite them")
    if held == header:
        log.warning("made again: %s", reason)
    return False


def _bad_path(codes: Path) -> Path:
    """`x.tar` -> `.x.tar.bad`: beside a shard of codes, [key, reason] of each sample that it does without."""
    return codes.with_name(f".{codes.name}.bad")


def _count_known(bad: BadSamples, shard: str, raw: Path, codes: Path) -> None:
    """Counts the samples of a shard that has its codes; those that are not among them are bad."""
    before, after = (len(build_index(path, must_save=False).first) - 1 for path in (raw, codes))
    left_out = []
    if before > after:
        try:
            left_out = [BadSample(str(key), shown(shard), str(reason)) for key, reason in read_json(_bad_path(codes))]
        except (UserError, TypeError, ValueError):
            pass
    if len(left_out) != before - after:  # the list is gone, or another one
        with IndexedShard(raw, salvage=True) as one, IndexedShard(codes) as two:
            there = set(map(two.key, range(after)))
            keys = [key for key in map(one.key, range(before)) if key not in there]
        left_out = [BadSample(key, shown(shard), "it was left out when its codes were made") for key in keys]
    bad.known(before, before - after, left_out)


def check_all(shards, out_folder, max_bad_fraction: float) -> tuple[int, int] | None:
    """(samples, bad ones) of all shards together, once all are there, whoever made them; None before. Raises UserError
    when too many are bad."""
    bad, cache = BadSamples(max_bad_fraction), ShardCache()
    for shard, name in zip(shards, codes_names(shards), strict=True):
        out = Path(out_folder) / name
        if not out.exists():
            return None
        _count_known(bad, shard, cache.fetch(shard), out)
    bad.finish()
    return bad.seen, bad.bad


def check_raw(shards: Iterable, max_bad_fraction: float = 0.01) -> None:
    """What the indexes of raw shards tell before any medium is decoded. Raises UserError when a shard cannot be read,
    or when too many samples of all shards are refused already, as where keys come again."""
    bad, cache = BadSamples(max_bad_fraction), ShardCache()
    for source in shards:
        with IndexedShard(cache.fetch(source), salvage=True, name=shown(source)) as shard:
            members = np.flatnonzero(shard.index.status != READ)
            refused = np.unique(np.searchsorted(shard.index.first, members, "right") - 1).tolist()
            bad.known(len(shard), len(refused), [
                BadSample(shard.key(i), shard.name, next(iter(shard[i].refused.values())))
                for i in refused[: BadSamples.SHOWN]])
    bad.check(bad.seen)


def _size(shard: str) -> int | None:
    """Bytes of a local shard, None where they are not known yet."""
    return None if is_remote(shard) or not os.path.exists(shard) else os.path.getsize(shard)


def _fingerprint(shard: Path) -> str:
    try:
        return sha256_file(shard)
    except OSError as error:
        raise UserError(f"cannot read shard {shard}: {error.strerror}") from None


def _tokenize_shard(samples, out, header, tokenizers, batch, bad, stats, bar) -> None:
    pending: list[tuple[Sample, dict[str, bytes | None]]] = []  # with the digests of its media, None of codes
    known: dict[bytes, bytes | str] = {}  # digest of a medium -> codes: what comes again is encoded once a shard
    waiting: dict[bytes, _Medium] = {}  # by digest
    left_out: list[list[str]] = []

    def leave_out(error: BadSample) -> None:
        left_out.append([error.key, error.reason])
        stats.bad += 1
        bad.add(error)

    with ShardFile(out, header) as writer:
        def flush():
            known.update(_encode(waiting, tokenizers))
            for sample, digests in pending:
                try:
                    writer.write(sample.key, _with_codes(sample, digests, known))
                except (BadSample, ValueError, RecursionError) as error:
                    leave_out(error if isinstance(error, BadSample)
                              else BadSample(sample.key, sample.shard, str(error)))
                else:
                    bad.good()
                    stats.samples += 1
            stats.media += len(waiting)
            bar.update(sum(len(content) + 512 for sample, _ in pending for content in sample.members.values()))
            pending.clear()
            waiting.clear()

        for sample in samples:
            try:
                media = _media_of(sample, tokenizers)
            except BadSample as error:
                leave_out(error)
                continue
            pending.append((sample, {ending: medium and medium.digest for ending, medium in media.items()}))
            waiting |= {medium.digest: medium for medium in media.values() if medium and medium.digest not in known}
            if len(waiting) >= batch or len(pending) >= 4096:
                flush()
        flush()
        if left_out:
            write_json(_bad_path(out), left_out)
        else:
            _bad_path(out).unlink(missing_ok=True)


class _Medium(NamedTuple):
    """A file to be encoded. seed: of its augmentation, None where it stays as it is; digest: equal ones have equal
    codes."""

    modality: str
    content: bytes
    seed: int | None
    digest: bytes


def _media_of(sample: Sample, tokenizers) -> dict[str, _Medium | None]:
    """By ending; None where codes are held already. Raises BadSample.

    What the model is to make is never augmented: media of turns that count, and samples whose JSON says `"augment":
    false`. How a medium is altered depends on the sample's key and the file, on nothing else.
    """
    document, found = document_of(sample), {}
    altered = {name for name, tokenizer in tokenizers.media.items() if tokenizer.augments}
    made = {segment.content.ending for segment in document.media if document.is_conversation and segment.loss}
    for file in dict.fromkeys(segment.content for segment in document.media):
        if file.holds_codes:
            found[file.ending] = None
            continue
        modality, seed = modality_of_ending(file.ending), None
        digest = hashlib.sha256(file.content).digest()
        if modality in altered and file.ending not in made and may_augment(sample):
            digest = hashlib.sha256(digest + sample.key.encode("utf-8", "surrogateescape")).digest()
            seed = int.from_bytes(digest[:16], "big")
        found[file.ending] = _Medium(modality, file.content, seed, digest)
    return found


def _encode(media: dict[bytes, _Medium], tokenizers) -> dict[bytes, bytes | str]:
    """{digest: medium} -> {digest: .npy bytes, or the reason why it cannot be encoded (str)}, in batches."""
    result: dict[bytes, bytes | str] = {}
    for modality in dict.fromkeys(medium.modality for medium in media.values()):
        files = {digest: medium for digest, medium in media.items() if medium.modality == modality}
        if modality not in tokenizers.vocab.spans:
            raise UserError(f"the shards hold {modality}, which this run's tokenizers do not know; add a section "
                            f"[{modality}] to its configuration, or take these samples out")
        n_codes, tokenizer = tokenizers.vocab.spans[modality].codes, tokenizers.media[modality]

        def source(medium: _Medium, tokenizer=tokenizer):
            if medium.seed is None:
                return medium.content
            return tokenizer.augmented(medium.content, np.random.default_rng(medium.seed))

        try:
            encoded = tokenizers.encode_batch(modality, [source(medium) for medium in files.values()])
            result.update(zip(files, [codes_to_npy(codes, n_codes) for codes in encoded], strict=True))
        except UNDECODABLE:  # one bad file spoils a batch: find it
            for digest, medium in files.items():
                try:
                    result[digest] = codes_to_npy(tokenizers.encode_media(modality, source(medium)), n_codes)
                except UNDECODABLE as error:
                    result[digest] = str(error) or type(error).__name__
    return result


def _with_codes(sample: Sample, digests: dict[str, bytes | None], codes: dict) -> dict[str, bytes]:
    """The sample's members with media replaced by codes, and the JSON's `file` rewritten. Raises BadSample."""
    renamed = {ending: codes_ending(ending) for ending in digests}
    if len(set(renamed.values())) < len(renamed):
        raise BadSample(sample.key, sample.shard, f"media that differ only in their kind: {', '.join(digests)}")
    members = {ending: content for ending, content in sample.members.items()
               if ending == "json" or is_text(ending)}
    for ending, new in renamed.items():
        content, digest = sample.members[ending], digests[ending]
        if digest is not None:
            content = codes[digest]
            if isinstance(content, str):
                raise BadSample(sample.key, sample.shard, f"member {ending}: {content}")
        else:
            try:
                npy_to_codes(content)
            except ValueError as error:
                raise BadSample(sample.key, sample.shard, f"member {ending}: {error}") from None
        members[new] = content
    data = json.loads(members["json"]) if "json" in members and renamed else None
    if isinstance(data, dict) and ("messages" in data or "content" in data):  # else metadata beside jpg + txt
        for turn in data.get("messages") or [data]:
            content = turn.get("content")
            for part in content if isinstance(content, list) else []:
                if part.get("file") in renamed:
                    part["file"] = renamed[part["file"]]
        members["json"] = json.dumps(data, ensure_ascii=False).encode()
    return members


def tokenize_in_processes(shards: Iterable, out_folder, tokenizers_folder, processes: int,
                          max_bad_fraction: float = 0.01, **options) -> tuple[int, int]:
    """`tokenize_shards` by `processes` processes of one thread each; returns how many samples there are, and how many
    of them are bad. Raises the first UserError of any process, and when too many of all samples are bad."""
    shards = [str(shard) for shard in shards]
    options["max_bad_fraction"] = max_bad_fraction
    arguments = [(shards, str(out_folder), str(tokenizers_folder), rank, processes, options)
                 for rank in range(processes)]
    run_processes(_worker, arguments, "a process that tokenized shards died; run it again: finished shards are kept")
    return check_all(shards, out_folder, max_bad_fraction)


def _worker(shards, out_folder, tokenizers_folder, rank, world, options) -> None:
    from onevocab.tokenizers.bundle import Tokenizers

    tokenize_shards(shards, out_folder, Tokenizers.load(tokenizers_folder), rank, world, **options)
