"""What a conversion kept and dropped, and why: counted, the first of each reason named."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from onevocab.common.errors import UserError
from onevocab.common.files import check_writable, claim_file, read_json, write_json
from onevocab.data.convert.samples import Dropped, printable

NAMED = 5  # of each reason


@dataclass
class Report:
    """One rank's, or all ranks' together.

    samples: written; dropped: records and samples that were not, by reason; left_out: what written samples do without,
    by reason; first: for each reason where the first ones stand, and what is wrong; media: files written, by modality;
    reencoded: those whose bytes are not the source's; bytes: of all files written.
    """

    format: str
    source: str
    state: str = "running"
    samples: int = 0
    shards: list[str] = field(default_factory=list)
    media: dict[str, int] = field(default_factory=dict)
    reencoded: int = 0
    bytes: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[str]] = field(default_factory=dict)

    def add(self, counts: dict[str, int], name: str, dropped: Dropped) -> None:
        """counts: `dropped` or `left_out` of this report."""
        counts[dropped.reason] = counts.get(dropped.reason, 0) + 1
        named = self.first.setdefault(dropped.reason, [])
        if len(named) < NAMED:
            named.append(printable(f"{name}: {dropped.detail}" if dropped.detail else name))

    def lines(self) -> list[str]:
        """For people."""
        media = ", ".join(f"{count:,} {modality}" for modality, count in sorted(self.media.items())) or "text only"
        again = f", {self.reencoded:,} of them encoded anew" if self.reencoded else ""
        lines = [f"{self.format}: {self.samples:,} samples in {len(self.shards):,} shards ({media}{again}, "
                 f"{self.bytes / 1e6:,.1f} MB); {sum(self.dropped.values()):,} dropped"]
        for what, counts in (("dropped", self.dropped), ("left out of kept samples", self.left_out)):
            for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
                lines.append(f"  {what}: {count:,} {reason}, as {self.first[reason][0]}")
        return lines


def report_path(out: Path, rank: int, world: int) -> Path:
    """`report.json`; with several ranks each has its own, and the last one done adds them up."""
    return out / ("report.json" if world == 1 else f"report-{rank:05d}-of-{world:05d}.json")


def finish(report: Report, out: Path, rank: int, world: int) -> Report | None:
    """Writes a rank's report. Returns that of all ranks (written too) if this is the last one, else None. Raises
    UserError when nothing was kept."""
    report.state = "done"
    write_json(report_path(out, rank, world), asdict(report))
    if world > 1:
        parts = [_read(report_path(out, other, world)) for other in range(world)]
        if any(part is None or part.state != "done" for part in parts):
            return None
        report = _sum(parts)
        write_json(out / "report.json", asdict(report))
    if not report.samples:
        why = "; ".join(line.strip() for line in report.lines()[1:4])
        raise UserError(f"nothing of {report.source} was kept; {why or 'it holds no records'}")
    return report


def _read(path: Path) -> Report | None:
    try:
        return Report(**read_json(path))
    except (UserError, TypeError):  # not there yet, or just being made
        return None


def _sum(parts: list[Report]) -> Report:
    whole = Report(parts[0].format, parts[0].source, "done")
    for part in parts:
        whole.samples += part.samples
        whole.shards = sorted(whole.shards + part.shards)
        whole.reencoded += part.reencoded
        whole.bytes += part.bytes
        for name in ("media", "dropped", "left_out"):
            setattr(whole, name, dict(Counter(getattr(whole, name)) + Counter(getattr(part, name))))
        for reason, named in part.first.items():
            whole.first[reason] = (whole.first.get(reason, []) + named)[:NAMED]
    return whole


# ------------------------------------------------------------------------------------------- the output folder

_SHARD = re.compile(r"\.?[a-z0-9-]+-(\d{5,})-\d{6,}\.tar(\.[\w.]+)?")
_LOCK = re.compile(r"\.rank-\d+\.lock")
_REPORT = re.compile(r"\.?report(?:-(\d{5})-of-\d{5})?\.json(\.[0-9a-f]+\.part)?")


@contextmanager
def claimed(out: Path, rank: int, world: int, overwrite: bool) -> Iterator[None]:
    """A folder for one rank's conversion: it holds nothing of its own, or what an earlier one left and may be replaced.

    Part n of a conversion is written by rank n % world, so each file of an earlier one has one rank that may remove
    it. Files of the other ranks, which may have begun, are passed over. After a failure a folder into which nothing
    was written is free again. Raises UserError when the folder holds other files, a conversion of its own, or when
    another one is writing there.
    """
    check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    lock = out / f".rank-{rank:05d}.lock"
    held = claim_file(lock)
    if held is None:
        raise UserError(f"another conversion is writing to {out}: wait for it, or choose another folder")
    with held:
        try:
            _clear(out, rank, world, overwrite)
            path = report_path(out, rank, world)
            path.write_text('{"state": "running"}\n', encoding="utf-8")
            try:
                yield
            except BaseException:
                if not any(_SHARD.fullmatch(other.name) for other in out.iterdir()):
                    path.unlink(missing_ok=True)
                raise
        finally:
            lock.unlink(missing_ok=True)


def _clear(out: Path, rank: int, world: int, overwrite: bool) -> None:
    for path in sorted(out.iterdir(), key=lambda path: (path.name.startswith("."), path.name)):
        if _LOCK.fullmatch(path.name):
            continue
        match = _SHARD.fullmatch(path.name) or _REPORT.fullmatch(path.name)
        mine = match is not None and int(match[1] or 0) % world == rank
        if match is None and (not overwrite or path.suffix == ".tar"):  # other shards would be taken for ours
            raise UserError(f"{out} is not empty (it holds {path.name}, of no conversion): choose another folder")
        if mine and not overwrite:
            raise UserError(f"{out} is not empty (it holds {path.name}): choose another folder, or replace an earlier "
                            "conversion by --overwrite")
        if mine:
            path.unlink(missing_ok=True)
