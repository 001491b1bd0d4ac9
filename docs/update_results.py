"""Fills the README's table of results from docs/results/demo.json, so that no number is typed by hand.

    python docs/update_results.py --from runs/demo   copies the run's report and gallery, then fills the table
    python docs/update_results.py                    fills the table from the committed file

The committed file is the run's report.json with three keys more: `command`, which made it, `date`, the
day of the copy, and `losses`, the last ones of the run's metrics.jsonl.
"""

import argparse
import datetime
import json
from pathlib import Path

from onevocab.common import errors, files
from onevocab.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "demo.json"
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "images" / "demo.png"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
COLUMNS = (
    "task",
    "split",
    "metric",
    "value",
    "interval",
    "chance",
    "ceiling_original",
    "ceiling_tokenizer",
    "n",
)
TITLES = (
    "task",
    "split",
    "metric",
    "value",
    "interval",
    "chance",
    "ceiling: originals",
    "ceiling: tokenizer",
    "n",
)


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


def table(report: dict) -> str:
    """The Markdown between the markers. Raises KeyError for a report without results."""
    lines = ["| " + " | ".join(TITLES) + " |", "|" + "---|" * 3 + "---:|" * (len(TITLES) - 3)]
    # By kind of question, edit or wording: in the committed file and on the report's page.
    rows = [row for row in report["results"] if ": " not in row["metric"]]
    lines += ["| " + " | ".join(cell(row.get(name)) for name in COLUMNS) + " |" for row in rows]
    seconds = report.get("seconds") or {}
    versions = report.get("versions") or {}
    facts = [f"`{report['command']}`", str(report.get("device") or "device not recorded"), report["date"]]
    facts += [f"{name} {version}" for name, version in sorted(versions.items()) if name in ("python", "torch")]
    lines += ["", "Measured: " + ", ".join(facts) + "."]
    if seconds:
        parts = ", ".join(f"{stage} {value:.0f}" for stage, value in seconds.items())
        lines += [f"Seconds per stage: {parts}; {sum(seconds.values()) / 60:.1f} minutes together."]
    for stage, losses in report.get("losses", {}).items():
        shown = ", ".join(f"{name} {value:.2f}" for name, value in losses.items() if name != "step")
        lines += [f"Loss at the end of {stage} (step {losses['step']:,}), nats a token: {shown}."]
    return "\n".join(lines)


def fill(readme: str, report: dict) -> str:
    """The README's text with the block between the markers replaced."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise errors.UserError(f"README.md lacks {BEGIN} ... {END}; put both markers where the table belongs")
    return f"{before}{BEGIN}\n{table(report)}\n{END}{after}"


@errors.cli
def last_losses(metrics: Path) -> dict[str, dict[str, float]]:
    """Of each language stage: its last losses by modality, nats a token."""
    losses = {}
    for line in read_metrics(metrics):
        found = {name.removeprefix("loss_"): value for name, value in line.items() if name.startswith("loss_")}
        if found:
            losses[line["stage"]] = {"step": line["step"], **found}
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="run", type=Path, help="the folder of a run whose report is to be published")
    parser.add_argument("--command", default="make demo", help="the command that made that run")
    arguments = parser.parse_args()
    if arguments.run:
        report = files.read_json(arguments.run / "report" / "report.json")
        report |= {"command": arguments.command, "date": datetime.date.today().isoformat(),
                   "losses": last_losses(arguments.run / "metrics.jsonl")}
        files.write_atomic(PICTURE, (arguments.run / "report" / "gallery.png").read_bytes())
        files.write_atomic(RESULTS, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    files.write_atomic(README, fill(README.read_text(encoding="utf-8"), files.read_json(RESULTS)))
    print(f"filled the table of {README}")


if __name__ == "__main__":
    main()
