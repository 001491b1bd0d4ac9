"""`python -m onevocab.data.inspect SHARDS`: what is in shards, raw or codes, as one self-contained page to look at.

Shards are a stranger's: media are decoded and encoded anew, texts are escaped, and the page forbids itself scripts and
the network.
"""

import hashlib
from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from onevocab.common.commands import Parser
from onevocab.common.errors import UserError, cli
from onevocab.common.files import check_writable, write_atomic
from onevocab.common.html import escape, media_element
from onevocab.common.paths import expand_home, path_argument
from onevocab.data.documents import BadSample, codes_document, document_of, read_media
from onevocab.data.shards.format import Sample, check_header, npy_to_codes, read_header
from onevocab.data.shards.index import read_indexed
from onevocab.data.shards.remote import ShardCache, list_sources, shown
from onevocab.tokenizers.bundle import Tokenizers
from onevocab.tokenizers.document import MediaFile, Segment
from onevocab.tokenizers.media import encode_png
from onevocab.tokenizers.modalities import MODALITIES
from onevocab.tokenizers.modality import Modality, Preview

TEXT, PARTS, COLUMNS = 2000, 40, 160  # what is shown: characters, parts of a turn and turns, columns of codes
LISTED, PAGE_BYTES, MAX_CODE = 100, 48 << 20, 1 << 24  # rows of a table; media of a page; more than any codebook has


@dataclass
class Survey:
    """What `survey` found; of bad samples nothing but `bad`.

    shards: (path, samples read, bytes, whose codes it holds); counts: samples, turns, parts by modality, ...; shown:
    (place, turns), a turn is (role, parts), a part (label, text, Preview or None); lengths: what was
    measured -> its values; codes: modality -> how often each came, int64 (n,); ids: the same of the vocabulary's;
    samples, media: hash of the content -> where it is.
    """

    shards: list[tuple[str, int, int, str]] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    bad: list[BadSample] = field(default_factory=list)
    shown: list[tuple[str, list]] = field(default_factory=list)
    lengths: dict[str, array] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    codes: dict[str, np.ndarray] = field(default_factory=lambda: defaultdict(lambda: np.zeros(0, np.int64)))
    ids: np.ndarray | None = None
    samples: dict[bytes, list[str]] = field(default_factory=lambda: defaultdict(list))
    media: dict[bytes, list[str]] = field(default_factory=lambda: defaultdict(list))


def survey(shards: list, tokenizers: Tokenizers | None = None, samples: int = 2000, show: int = 60) -> Survey:
    """Reads about `samples` samples (0: all), as many from the start of each shard, decodes their media, and keeps at
    most `show` of them to look at. With tokenizers everything is encoded, as training would. Raises UserError when a
    shard holds codes of others; a damaged shard is listed with the bad samples.
    """
    summary = Survey()
    shards = shards[:: max(1, len(shards) // (samples or len(shards)))][: samples or None]
    each, show_each = -(-samples // len(shards)) or None, -(-show // len(shards))
    for source in shards:
        read, whose, name = 0, "raw", shown(source)
        try:
            path = ShardCache().fetch(source)
            if header := read_header(path):
                whose = f"codes of tokenizers {header['tokenizers']}"
        except UserError as error:
            summary.bad.append(BadSample("", name, str(error)))
            continue
        if header and tokenizers:
            check_header(path, header, tokenizers.hash)
        try:
            samples_of = read_indexed(path, verify=True, salvage=True, name=name)
            for read, sample in enumerate(islice(samples_of, each), 1):
                try:
                    _look(summary, sample, tokenizers, read <= show_each and len(summary.shown) < show)
                except BadSample as error:
                    summary.bad.append(error)
        except UserError as error:
            summary.bad.append(BadSample(f"after {read} samples", name, str(error)))
        summary.shards.append((name, read, path.stat().st_size, whose))
    return summary


def _look(summary: Survey, sample: Sample, tokenizers: Tokenizers | None, show: bool) -> None:
    """Adds a sample to the summary. Raises BadSample, and then adds nothing."""
    document = document_of(sample)
    values = read_media(sample, document, _open)
    files = {medium.content.ending: medium.content for medium in document.media}
    opened = {file.content.ending: value for file, value in zip(document.media, values.media, strict=True)}
    ids = None if tokenizers is None else _ids(sample, files, opened, tokenizers)
    place = f"{sample.shard}: {sample.key}"
    digests = {ending: hashlib.sha256(file.content).digest()[:16] for ending, file in files.items()}
    for ending, digest in digests.items():
        summary.media[digest].append(f"{place}.{ending}")
    turns = document.turns
    contents = [(role, [(part.modality, part.content if part.modality == "text" else digests[part.content.ending])
                        for part in segments]) for role, segments in turns]
    summary.samples[hashlib.sha256(repr(contents).encode()).digest()[:16]].append(place)
    summary.counts.update(["samples", "conversations" if document.is_conversation else "plain documents"])
    summary.counts["turns"] += len(turns)
    summary.counts.update(f"parts: {segment.modality}" for segment in document.segments)
    summary.lengths["characters of text in a sample"].append(
        sum(len(segment.content) for segment in document.segments if segment.modality == "text"))
    for ending, (modality, medium) in ((ending, (value.modality, value.content)) for ending, value in opened.items()):
        if files[ending].holds_codes:
            summary.lengths[f"codes of one {modality}"].append(medium.size)
            came, before = np.bincount(medium.reshape(-1)), summary.codes[modality]
            summary.codes[modality] = np.pad(before, (0, max(0, len(came) - len(before))))
            summary.codes[modality][: len(came)] += came
        else:
            what, size = MODALITIES[modality].measure(medium)
            summary.lengths[what].append(size)
    if ids is not None:
        summary.lengths["tokens of a sample"].append(len(ids))
        came = np.bincount(ids, minlength=tokenizers.vocab.size)
        summary.ids = came if summary.ids is None else summary.ids + came
    if show:
        cards = [(role, [_part(segment, opened, tokenizers) for segment in segments[:PARTS]])
                 for role, segments in turns[:PARTS]]
        cut = max(len(turns), *(len(segments) for _, segments in turns)) > PARTS
        summary.shown.append((place + " (its beginning)" * cut, cards))


def _open(modality: str, file: MediaFile):
    """A medium of a sample -> codes, or the modality's value. Raises what `read_media` takes for damage."""
    if not file.holds_codes:
        return MODALITIES[modality].load(file.content)
    codes = npy_to_codes(file.content)
    if codes.max() >= MAX_CODE:
        raise ValueError(f"code {codes.max():,} is above those of any codebook")
    return codes


def _ids(sample: Sample, files: dict[str, MediaFile], opened: dict[str, Segment], tokenizers: Tokenizers) -> np.ndarray:
    """The sample as training would read it, int32 (n,). Raises BadSample."""
    by_bytes = {file.content: opened[ending].content for ending, file in files.items()}
    try:
        document = codes_document(sample, lambda modality, file: tokenizers.encode_media(modality, by_bytes[file]))
        return tokenizers.encode(document).ids
    except (UserError, KeyError) as error:
        raise BadSample(sample.key, sample.shard, f"it cannot be encoded ({error})") from None


def _part(segment: Segment, opened: dict[str, Segment],
          tokenizers: Tokenizers | None) -> tuple[str, str, Preview | None]:
    """(label, text, what a page shows of a medium) of a segment; opened: by ending, what the files hold."""
    text = segment.content
    if segment.modality == "text":
        more = f" … {len(text) - TEXT:,} more characters" if len(text) > TEXT else ""
        return "", text[:TEXT] + more, None
    file = segment.content
    medium, modality = opened[file.ending].content, MODALITIES[segment.modality]
    shown = _codes_preview(medium, modality, tokenizers) if file.holds_codes else modality.preview(medium)
    return f"{file.ending}: {shown.label}", "", shown


def _codes_preview(codes: np.ndarray, modality: Modality, tokenizers: Tokenizers | None) -> Preview:
    """Codes are decoded where tokenizers are given; else they are a grid of colours, one for each code, that of an open
    span with time to the right and low rows at the bottom."""
    label = " x ".join(map(str, codes.shape)) + " codes"
    if tokenizers is None:
        picture = _colours(codes if modality.sized else codes.T[::-1])
        return Preview(label, "image/png", encode_png(picture, level=9))
    decoded = modality.preview(tokenizers.decode_media(modality.name, codes if modality.sized else codes[:COLUMNS]))
    return decoded._replace(label=f"{label}, decoded: {decoded.label}")


def _colours(codes: np.ndarray) -> Image.Image:
    mixed = codes[:64, :128].astype(np.uint32) * np.uint32(2654435761)  # Knuth's multiplier: neighbours lie far apart
    colours = np.stack([mixed >> 24, mixed >> 16 & 255, mixed >> 8 & 255], axis=-1).astype(np.uint8)
    return Image.fromarray(colours).resize((colours.shape[1] * 6, colours.shape[0] * 6), Image.Resampling.NEAREST)


CSS = """
:root { color-scheme: light dark } * { box-sizing: border-box } h2 { margin: 2.6rem 0 .2rem; font-size: 1.2rem }
body { margin: 0 auto; padding: 2rem 1.2rem; max-width: 76rem; font: 15px/1.5 system-ui, "Segoe UI", sans-serif }
p, .soft { opacity: .65; font-size: .8rem } nav a { margin-right: 1rem } th, .number { white-space: nowrap }
.number { text-align: right }
table { border-collapse: collapse; width: 100% } td, th { padding: .2rem .6rem; border-bottom: 1px solid #8884 }
td, th, .card { overflow-wrap: anywhere; font-size: .86rem } th { text-align: left } audio { width: 100% }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .9rem }
.card { padding: .7rem; border: 1px solid #8884; border-radius: .5rem } .turn.assistant { border-color: #3b6fd8 }
.turn { border-left: 3px solid; padding-left: .6rem; margin: .4rem 0 } .bar { height: .8rem; background: #3b6fd8 }
.text { white-space: pre-wrap; unicode-bidi: isolate } img { max-width: 100%; image-rendering: pixelated }
"""
# Nothing of a shard can fetch, run or send anything, even where escaping had failed.
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"


def _t(value) -> str:
    """Escaped, and cut where it is endless."""
    return escape(str(value)[: 2 * TEXT])


def _table(heads: tuple[str, ...], rows: list[tuple]) -> str:
    def line(cells, tag: str) -> str:
        shown = (f"<{tag} class=number>{cell:,}" if isinstance(cell, int) else f"<{tag}>{_t(cell)}" for cell in cells)
        return f"<tr>{''.join(shown)}</tr>"
    more = f"<p>and {len(rows) - LISTED:,} more</p>" if len(rows) > LISTED else ""
    return f"<table>{line(heads, 'th')}{''.join(line(row, 'td') for row in rows[:LISTED])}</table>{more}"


def _histogram(title: str, values: np.ndarray) -> str:
    """A bar for each power of two; zeros have none."""
    at = np.floor(np.log2(values[values > 0])).astype(int)
    first, counts = (int(at.min()), np.bincount(at - at.min())) if len(at) else (0, np.zeros(0, int))
    bars = "".join(f"<tr><td class=number>{2.0 ** (first + i):g} to {2.0 ** (first + i + 1):g}</td>"
                   f'<td class=number>{n:,}</td><td style="width:70%"><div class=bar style="width:'
                   f'{100 * n / counts.max():.1f}%"></div></td></tr>' for i, n in enumerate(counts.tolist()))
    low, middle, high, top = np.quantile(values, (0, 0.5, 0.95, 1))
    return (f"<h3>{_t(title)}</h3><p>{len(values):,} values, of them {(values == 0).sum():,} zeros; smallest {low:g}, "
            f"median {middle:.4g}, 95% up to {high:.4g}, largest {top:.4g}</p><table>{bars}</table>")


def _use(summary: Survey, tokenizers: Tokenizers | None) -> list[tuple]:
    """How the vocabulary is used, a row for each modality."""
    came, tokens = dict(summary.codes), {}
    if summary.ids is not None:
        vocab = tokenizers.vocab
        came = {"text": summary.ids[: vocab.text_size]}
        came |= {name: summary.ids[span.codes_start :][: span.codes] for name, span in vocab.spans.items()}
        sums = np.bincount(vocab.modality_of(np.arange(vocab.size)), summary.ids, minlength=len(vocab.modalities))
        tokens = dict(zip(vocab.modalities, sums.astype(int).tolist(), strict=True))
    rows = []
    for modality, counts in came.items():
        total, share = int(counts.sum()), counts[counts > 0] / max(1, counts.sum())
        often = [i for i in np.argsort(-counts, kind="stable")[:8].tolist() if counts[i]]
        names = (f"{tokenizers.text.decode([i])!r}" if modality == "text" else str(i) for i in often)
        rows.append((modality, tokens.get(modality, "–"), total, len(counts) if tokens else "–", len(share),
                     f"{np.exp(-(share * np.log(share)).sum()):.1f}" if total else "–",
                     ", ".join(f"{name} ({counts[i] / total:.1%})" for name, i in zip(names, often, strict=True))))
    return rows


def page(summary: Survey, tokenizers: Tokenizers | None = None) -> str:
    """The whole page: HTML without external files."""
    cards, room = [], PAGE_BYTES
    for place, turns in summary.shown:
        card = f"<div class=soft>{_t(place)}</div>"
        for role, parts in turns:
            card += f'<div class="turn {role or ""}"><div class=soft>{role or ""}</div>'
            for label, text, small in parts:
                figure = "" if small is None else "(no room left on this page)"
                if small is not None and room > 0:
                    figure = media_element(small.content, small.mime)
                room -= len(figure)
                card += f"{figure}<div class={'soft' if label else 'text'} dir=auto>{_t(label or text)}</div>"
            card += "</div>"
        cards.append(f"<div class=card>{card}</div>")
    again = [(kind, len(places), "; ".join(places[:4]) + ("; ..." if len(places) > 4 else ""))
             for kind, same in (("sample", summary.samples), ("medium", summary.media))
             for places in sorted(same.values(), key=len, reverse=True) if len(places) > 1]
    sections = {
        "What is there": _table(("what", "how many"), sorted(summary.counts.items())),
        "Vocabulary": _table(("modality", "tokens", "of them codes or words", "codebook", "of it used", "perplexity",
                              "most frequent"), _use(summary, tokenizers)),
        "Lengths": "".join(_histogram(title, np.array(values)) for title, values in sorted(summary.lengths.items())),
        "Samples": f"<div class=cards>{''.join(cards)}</div>",
        "Bad samples": _table(("shard", "key", "reason"), [(bad.shard, bad.key, bad.reason) for bad in summary.bad]),
        "Exact duplicates": _table(("what", "times", "where"), again),
        "Shards": _table(("shard", "samples read", "bytes", "what it holds"), summary.shards)}
    links = "".join(f'<a href="#{i}">{title}</a>' for i, title in enumerate(sections))
    blocks = "".join(f'<h2 id="{i}">{title}</h2>{block}' for i, (title, block) in enumerate(sections.items()))
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
            f'content="{POLICY}"><title>onevocab: shards</title><meta name="viewport" content="width=device-width, '
            f'initial-scale=1"><style>{CSS}</style></head><body><nav>{links}</nav>{blocks}</body></html>\n')


@cli
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m onevocab.data.inspect", description=__doc__.split("\n\n")[0])
    parser.add_argument("shards", nargs="+", type=expand_home, help="a shard, a folder of them, a glob, or an address")
    parser.add_argument("--run", type=path_argument, help="run folder whose tokenizers count tokens and decode codes")
    parser.add_argument("--out", type=path_argument, default=Path("inspect.html"),
                        help="the page (default: inspect.html)")
    parser.add_argument("--overwrite", action="store_true", help="write over an older page")
    parser.add_argument("--samples", type=int, default=2000, help="how many are read (default: 2000; 0: all)")
    parser.add_argument("--show", type=int, default=60, help="how many are shown (default: 60)")
    args = parser.parse_args(argv)
    if args.samples < 0 or args.show < 0:
        raise UserError("--samples and --show are numbers from 0 on")
    if args.out.exists() and not args.overwrite:
        raise UserError(f"{args.out} exists already: choose another --out, or --overwrite")
    shards = [shard for path in args.shards for shard in list_sources(path)]
    tokenizers = Tokenizers.load(args.run / "tokenizers") if args.run else None
    if args.out.is_dir():
        raise UserError(f"{args.out} is a folder: name the page's file")
    check_writable(args.out.parent)
    summary = survey(shards, tokenizers, args.samples, args.show)
    if not summary.counts["samples"] and summary.bad:
        raise UserError(f"nothing could be read, no page was written: {summary.bad[0]}")
    write_atomic(args.out, page(summary, tokenizers))
    duplicates = sum(map(len, summary.samples.values())) - len(summary.samples)
    print(f"{args.out}: {summary.counts['samples']:,} samples of {len(summary.shards)} shards, {len(summary.bad):,} "
          f"bad ones left out, {duplicates:,} exact duplicates")

