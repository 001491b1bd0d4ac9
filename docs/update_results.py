"""Fills the tables of the README and of docs/kernels.md from docs/results/*.json and benchmarks/results/*.json, so that
no number is typed by hand.

    python docs/update_results.py --from runs/demo   copies the run's report (and the demo's gallery), then fills
    python docs/update_results.py                    fills from the committed files

A committed file is the run's report.json with three keys more: `command`, which made it, `date`, the day of the copy,
and `losses`, the last ones of the run's metrics.jsonl. Its name is the run folder's, or --name.
"""

import argparse
import datetime
import json
from pathlib import Path

from onevocab.common import errors, files
from onevocab.training.metrics import last_losses

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
TIMES = ROOT / "benchmarks" / "results"
README, KERNELS, DATA = ROOT / "README.md", ROOT / "docs" / "kernels.md", ROOT / "docs" / "data.md"
PICTURE = ROOT / "docs" / "images" / "demo.png"
BEGIN, END = "<!-- {}:begin -->", "<!-- {}:end -->"
SHOWN = ("demo", "demo-long", "demo-avx2")  # a column each; other files give a line below the table
TITLES = ("task", "split", "metric", *SHOWN, "chance", "ceiling: originals", "ceiling: tokenizer", "n")


def cell(value) -> str:
    """One value of report.json as the table shows it: null is a dash, an interval is `low to high`."""
    if value is None:
        return "–"
    if isinstance(value, (list, tuple)):
        return " to ".join(cell(part) for part in value)
    if isinstance(value, float):
        if value != value:
            return "–"
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _scored(row: dict) -> str:
    return cell(row["value"]) + (f" ({cell(row['interval'])})" if row.get("interval") else "")


def _facts(name: str, report: dict) -> str:
    versions = [f"{key} {value}" for key, value in sorted(report["versions"].items()) if key in ("python", "torch")]
    parts = ", ".join(f"{stage} {value:.0f}" for stage, value in report["seconds"].items())
    text = (f"- **{name}**: `{report['command']}`, {', '.join([report['device'], report['date'], *versions])}. "
            f"{sum(report['seconds'].values()) / 60:.1f} minutes after the installation; seconds: {parts}.")
    if seeds := report.get("seeds"):  # of benchmarks/record.py
        ran = [str(seed["seed"]) for seed in seeds if "failed" not in seed]
        text += (f" Median (lowest to highest) of seeds {', '.join(ran)}; seconds and losses: the median, and those of "
                 f"seed {ran[0]}.")
        text += "".join(f" Seed {seed['seed']} failed: {seed['failed']}." for seed in seeds if "failed" in seed)
    for stage, losses in report.get("losses", {}).items():
        shown = ", ".join(f"{key} {value:.2f}" for key, value in losses.items() if key != "step")
        text += f" Loss at the end of {stage} (step {losses['step']:,}), nats a token: {shown}."
    return text


def table(reports: dict[str, dict]) -> str:
    """The Markdown between the markers; `reports` by name, in the order of SHOWN first."""
    shown = [reports[name] for name in SHOWN if name in reports]
    titles = [title for title in TITLES if title not in SHOWN or title in reports]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * 3 + "---:|" * (len(titles) - 3)]

    def key(row: dict) -> tuple:
        return row["task"], row["split"], row["metric"]

    tables = [{key(row): row for row in report["results"]} for report in shown]
    rows_of_all = {place: row for rows in reversed(tables) for place, row in rows.items()}
    for row in [rows_of_all[place] for place in dict.fromkeys(place for rows in tables for place in rows)]:
        if ": " in row["metric"]:  # by kind of question, edit or wording: in the committed file and on the page
            continue
        same = [rows[key(row)] for rows in tables if key(row) in rows]
        tokenizer = [cell(each.get("ceiling_tokenizer")) for each in same]
        cells = [*key(row), *(_scored(rows[key(row)]) if key(row) in rows else "–" for rows in tables),
                 cell(row.get("chance")), cell(row.get("ceiling_original")),
                 " / ".join(tokenizer) if set(tokenizer) != {"–"} else "–", cell(row.get("n"))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(_facts(name, report) for name, report in reports.items())])


def short(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _speeds(row: dict, others: list[dict]) -> str:
    """The peers of one row, the fastest first: their time over ours."""
    peers = [other for other in others if other["provider"] not in (row["provider"], "reference")]
    return "; ".join(f"{peer['provider']} {peer['times_ours']:.2f}x"
                     for peer in sorted(peers, key=lambda peer: peer["times_ours"]))


def speeds(results: dict[str, dict], folder: str, aims: bool = False) -> str:
    """One row for each step of each preset, a table for each device: our time, and the peers' over ours.

    folder: where a page finds the results; aims: only presets that have one.
    """
    titles = "| benchmark | step | precision | ours, ms | ours, MiB | time of others / ours |"
    lines: list[str] = []
    for device in dict.fromkeys(result["device"] for result in results.values()):
        of_device = {name: result for name, result in results.items() if result["device"] == device}
        lines += [f"{device}:", "", titles, "|---|---|---|---:|---:|---|"]
        commands: dict[str, None] = {}
        for name, result in of_device.items():
            kept = ", memory kept" if result["command"].startswith("MALLOC_") else ""
            for preset, measured in result["presets"].items():
                if aims and not measured["targets"]:
                    continue
                for row in measured["rows"]:
                    if row["provider"] != "ours" or row["step"].startswith(("fresh", "backward")):
                        continue
                    others = [other for other in measured["rows"] if other["step"] == row["step"]]
                    step = {"both": "forward + backward"}.get(row["step"], row["step"])
                    time, memory = short(row["seconds"] * 1e3), short(row["peak_bytes"] / 2**20)
                    lines.append(f"| [{result['benchmark']}]({folder}{name}.md), {preset}{kept} | {step} | "
                                 f"{measured['dtype']} | {time} | {memory} | {_speeds(row, others)} |")
                    commands[f"`{result['command']}`, {result['date']}"] = None
        versions = next(iter(of_device.values()))["versions"]
        lines += ["", f"torch {versions['torch']}; " + "; ".join(commands), ""]
    return "\n".join(lines).rstrip()


def readers(result: dict) -> str:
    """What benchmarks/data.py found, in words and a table."""
    loader, damaged, shard = result["loader"], result["damaged"], result["shard"]
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("webdataset", "megatron-energon")
                         if name in result["versions"])
    lines = [f"{result['device']}, one process, {shard['samples']:,} pictures of {shard['side']} x {shard['side']} "
             "pixels as PNG, with captions, in one tar in the page cache; "
             f"`{result['command'].strip()}`, {result['date']}, {versions}. *decoded* gives RGB arrays and parsed "
             "JSON; ratios are to the faster way of webdataset; energon is read through its loader, which also keeps "
             "what it needs to restore each sample.", "", "| | samples/s | of webdataset's |", "|---|---:|---:|"]
    lines += [f"| {kind}: {name} | {times['samples_per_second']:,} | {times['ratio']:.2f}x |"
              for kind, ways in result["results"].items() for name, times in ways.items()]
    lines += ["", f"- {damaged['bad']} bad samples among {damaged['samples']:,}, all noticed: "
              f"{damaged['more_time']:+.1%} time.",
              f"- Rows of {loader['seq_len']:,} tokens out of {loader['samples']:,} samples of a mixed set (texts, "
              f"captioned pictures, sounds, conversations): {loader['useful']:.2%} of the tokens are useful, "
              f"{loader['left_out']:.2%} of the samples are left out, {loader['texts_in_pieces']:.2%} are texts in "
              "several pieces.",
              f"- A restart in the middle of an epoch of these: {loader['restart_seconds']:.2f} s to the next batch."]
    return "\n".join(lines)


def fill(page: str, blocks: dict[str, str]) -> str:
    """A page's text with the blocks between their markers replaced."""
    for name, text in blocks.items():
        before, begin, rest = page.partition(BEGIN.format(name))
        _, end, after = rest.partition(END.format(name))
        if not begin or not end:
            raise errors.UserError(f"the page lacks {BEGIN.format(name)} ... {END.format(name)}; put both where the "
                                   "table belongs")
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page


def pages() -> dict[Path, dict[str, str]]:
    """What the committed files say: page -> the name of its place there -> text."""
    found = {path.stem: files.read_json(path) for path in sorted(TIMES.glob("*.json"))}
    times = {name: result for name, result in found.items() if "presets" in result}  # not the data's, nor a sweep's
    return {README: {"results": table(committed()), "kernels": speeds(times, "benchmarks/results/", aims=True)},
            KERNELS: {"kernels": speeds(times, "../benchmarks/results/")},
            DATA: {"data": readers(files.read_json(TIMES / "data-cpu.json"))}}


def committed() -> dict[str, dict]:
    """The committed reports by name, those of SHOWN first."""
    names = sorted(path.stem for path in RESULTS.glob("*.json"))
    names.sort(key=lambda name: SHOWN.index(name) if name in SHOWN else len(SHOWN))
    return {name: files.read_json(RESULTS / f"{name}.json") for name in names}


@errors.cli
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="run", type=Path, help="the folder of a run whose report is to be published")
    parser.add_argument("--name", help="of the committed file, if not the run folder's")
    parser.add_argument("--command", default="make demo", help="the command that made that run")
    arguments = parser.parse_args()
    if arguments.run:
        name = arguments.name or arguments.run.resolve().name
        report = files.read_json(arguments.run / "report" / "report.json")
        report |= {"command": arguments.command, "date": datetime.date.today().isoformat(),
                   "losses": last_losses(arguments.run / "metrics.jsonl")}
        if name == "demo":
            files.write_atomic(PICTURE, (arguments.run / "report" / "gallery.png").read_bytes())
        files.write_atomic(RESULTS / f"{name}.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    for path, contents in pages().items():
        files.write_atomic(path, fill(path.read_text(encoding="utf-8"), contents))
    print("filled the tables of " + " and ".join(str(path) for path in pages()))


if __name__ == "__main__":
    main()
