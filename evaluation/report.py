"""What the evaluation found, as `report.json`, one self-contained `index.html`, and `gallery.png`."""

import json
import textwrap
import tomllib
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from onevocab.common.files import write_atomic, write_json
from onevocab.common.html import data_uri, escape, figure
from onevocab.tasks import Card, Section
from onevocab.tokenizers.media import encode_png
from onevocab.tokenizers.modalities import MODALITIES, modality_of_value
from onevocab.training.metrics import curves, read_metrics


def stage_seconds(run: Path) -> dict[str, float]:
    """Seconds of each stage, from the `done.json` that it left in its folder."""
    seconds = {}
    for path in sorted(run.rglob("done.json"), key=lambda path: path.stat().st_mtime):
        try:
            took = json.loads(path.read_text(encoding="utf-8")).get("seconds")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(took, int | float):
            seconds[path.parent.relative_to(run).as_posix()] = round(float(took), 1)
    return seconds


def run_config(run: Path) -> dict:
    """The run's resolved configuration, {} when there is none to read."""
    try:
        return tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def metrics_lines(run: Path) -> list[dict]:
    """The lines of `metrics.jsonl`; a damaged one is skipped."""
    try:
        return read_metrics(run / "metrics.jsonl")
    except OSError:
        return []


def curve_images(run: Path) -> list[tuple[str, str]]:
    """(stage, PNG data URI) of the losses in `metrics.jsonl`."""
    lines = metrics_lines(run)
    drawn = {stage: curves(lines, stage) for stage in dict.fromkeys(line.get("stage") for line in lines)}
    return [(str(stage), data_uri(data, "image/png")) for stage, data in drawn.items() if data]


def gallery(drawings: list[tuple[str, Image.Image]], path: Path, columns: int = 4, side: int = 160) -> None:
    """Writes a grid of (prompt, picture) as one PNG, in the order given."""
    font, line, margin = ImageFont.load_default(13), 16, 12
    wrapped = [textwrap.wrap(prompt, 25) for prompt, _ in drawings]
    heights = [side + 6 + line * max(map(len, wrapped[k : k + columns])) + margin
               for k in range(0, len(drawings), columns)]
    sheet = Image.new("RGB", (columns * (side + margin) + margin, sum(heights) + margin), "white")
    pen = ImageDraw.Draw(sheet)
    for i, ((_, picture), lines) in enumerate(zip(drawings, wrapped, strict=True)):
        x, y = margin + i % columns * (side + margin), margin + sum(heights[: i // columns])
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y))
        for k, words in enumerate(lines):
            pen.text((x, y + side + 3 + k * line), words, fill=(30, 30, 30), font=font)
    write_atomic(path, encode_png(sheet, level=9))


def show_number(value, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.1f}" if abs(value) > 2 else f"{value:.{digits}f}"


def text_table(results: list[dict]) -> str:
    """The results for a terminal."""
    head = ("task", "split", "metric", "value", "95% interval", "chance", "original", "tokenizer", "n")
    body = [_cells(row) for row in results]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) if i < 3 else cell.rjust(w)
                       for i, (cell, w) in enumerate(zip(line, widths, strict=True))) for line in [head, *body]]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines)


def _cells(row: dict) -> tuple[str, ...]:
    between = "–" if row["interval"] is None else " … ".join(show_number(x) for x in row["interval"])
    numbers = (show_number(row[key]) for key in ("chance", "ceiling_original", "ceiling_tokenizer"))
    return (row["task"], row["split"], row["metric"], show_number(row["value"]), between, *numbers, str(row["n"]))


CSS = """
:root { color-scheme: light dark; --back: #fbfbfa; --text: #1d1d1f; --soft: #6b6b70; --line: #dededb; --card: #fff;
  --good: #1a7f37; --bad: #b3261e; --bar: #3b6fd8; }
@media (prefers-color-scheme: dark) { :root { --back: #151517; --text: #ececee; --soft: #9b9ba2; --line: #333338;
  --card: #1e1e21; --good: #57c274; --bad: #f2837b; --bar: #7ba3f5; } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem 1.2rem 4rem; max-width: 76rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif }
h1 { margin: 0 0 .2rem; font-size: 1.7rem } h2 { margin: 2.6rem 0 .2rem; font-size: 1.2rem }
p { margin: .2rem 0 1rem; color: var(--soft); max-width: 60rem }
nav a { margin-right: 1rem; color: var(--bar) }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .86rem }
th, td { padding: .3rem .6rem; text-align: left; border-bottom: 1px solid var(--line) }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.number b { color: var(--bar) } tr.first td { border-top: 2px solid var(--line) }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .9rem }
.cards.small { grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)) }
.card { padding: .7rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  font-size: .86rem }
.media { display: flex; flex-wrap: wrap; gap: .5rem; margin-bottom: .4rem }
figure { margin: 0; flex: 0 1 7.5rem } figure.only { flex: 1 1 100% } figure.sound { flex: 1 1 100% }
figure img { width: 100%; display: block; border-radius: .25rem; image-rendering: pixelated }
figcaption, .label { color: var(--soft); font-size: .78rem } audio { width: 100%; height: 2rem }
.line { overflow-wrap: anywhere } .right { color: var(--good) } .wrong { color: var(--bad) }
.curves { display: flex; flex-wrap: wrap; gap: 1rem }
.curves img { max-width: 100%; background: #fff; border-radius: .4rem }
pre { overflow-x: auto; padding: .8rem; background: var(--card); border: 1px solid var(--line); border-radius: .4rem;
  font-size: .78rem }
"""


def _card(card: Card) -> str:
    parts = []
    for label, medium in card.media:
        shown = MODALITIES[modality_of_value(medium)].preview(medium)
        only = "only" if len(card.media) == 1 else ""
        parts.append(figure(shown.content, shown.mime, label, only if shown.mime.startswith("image/") else "sound"))
    mark = {None: "", True: ' <span class="right">right</span>', False: ' <span class="wrong">not right</span>'}
    lines = "".join(
        f'<div class="line"><span class="label">{escape(label)}</span> {escape(text)}'
        f"{mark[card.right] if i == len(card.lines) - 1 else ''}</div>"
        for i, (label, text) in enumerate(card.lines)
    )
    return f'<div class="card"><div class="media">{"".join(parts)}</div>{lines}</div>'


def _table(results: list[dict]) -> str:
    heads = ["task", "what was held out", "metric", "value", "95% interval", "chance", "ceiling: original",
             "ceiling: tokenizer", "n"]
    number = ["" if i < 3 else ' class="number"' for i in range(len(heads))]
    rows, before = [], None
    for entry in results:
        cells = [escape(cell) for cell in _cells(entry)]
        cells[3] = f"<b>{cells[3]}</b>"
        first = ' class="first"' if entry["task"] != before else ""
        cells[0] = cells[0] if first else ""
        before = entry["task"]
        rows.append(f"<tr{first}>" + "".join(f"<td{n}>{c}</td>" for n, c in zip(number, cells, strict=True)) + "</tr>")
    head = "".join(f"<th{n}>{h}</th>" for n, h in zip(number, heads, strict=True))
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def page(report: dict, sections: dict[Section, list[Card]], drawn_curves: list[tuple[str, str]]) -> str:
    """The whole report as one HTML page without external files."""
    sections = {section: cards for section, cards in sections.items() if cards}
    anchor = {section: escape(section.title.lower().replace(" ", "-")) for section in sections}
    links = "".join(f'<a href="#{anchor[section]}">{escape(section.title)}</a>' for section in sections)
    blocks = []
    for section, cards in sections.items():
        small = " small" if all(len(card.media) == 1 for card in cards) else ""
        blocks.append(f'<h2 id="{anchor[section]}">{escape(section.title)}</h2><p>{escape(section.intro)}</p>'
                      f'<div class="cards{small}">{"".join(map(_card, cards))}</div>')
    notes = "".join(f"<p>{escape(note)}</p>" for note in report["notes"])
    seconds = "".join(f'<tr><td>{escape(stage)}</td><td class="number">{took:.1f}</td></tr>'
                      for stage, took in report["seconds"].items())
    images = "".join(f'<img src="{uri}" alt="loss of {escape(stage)}">' for stage, uri in drawn_curves)
    packages = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    config = escape(json.dumps(report["config"], indent=1, ensure_ascii=False))
    judges = escape(json.dumps(report["judges"], indent=1, ensure_ascii=False))
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>onevocab: report</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head><body>
<h1>What this model can do</h1><p>{escape(report["device"])}</p>
<nav>{links}<a href="#results">Results</a><a href="#curves">Curves</a><a href="#run">Run</a></nav>
{"".join(blocks)}
<h2 id="results">Results</h2><p>Chance is what a blind guess gets: what the task says, else the score of other items'
right answers. The ceilings are what the same judge reads in the originals, and in the originals after the tokenizer;
answers that are compared as they are have none. Intervals: Wilson for right-or-wrong items, else bootstrap over
items.</p>{notes}{_table(report["results"])}
<h2 id="curves">Curves</h2><p>From metrics.jsonl.</p><div class="curves">{images}</div>
<h2 id="run">Run</h2><p>{escape(packages)}</p>
<table style="width:auto"><tr><th>stage</th><th class="number">seconds</th></tr>{seconds}</table>
<details><summary>Configuration</summary><pre>{config}</pre></details>
<details><summary>Judges and their candidates</summary><pre>{judges}</pre></details></body></html>
"""


def write_examples(folder: Path, items: list) -> None:
    """Media of prompts as files to try the model with: image-0.png, audio-0.wav, ...; a second picture of item 0 is
    image-0-1.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, item in enumerate(items):
        names: list[str] = []
        for part in (part for message in item.messages for part in message["content"] if not isinstance(part, str)):
            modality = MODALITIES[modality_of_value(part)]
            again = f"-{names.count(modality.name)}" if modality.name in names else ""
            names.append(modality.name)
            write_atomic(folder / f"{modality.name}-{number}{again}{modality.suffixes[0]}", modality.save(part))


def write(folder: Path, report: dict, sections: dict[Section, list[Card]], drawings, run: Path) -> Path:
    """Writes report.json, gallery.png and index.html. Returns the page's path."""
    write_json(folder / "report.json", report)
    if drawings:
        gallery(drawings, folder / "gallery.png")
    write_atomic(folder / "index.html", page(report, sections, curve_images(run)))
    return folder / "index.html"
