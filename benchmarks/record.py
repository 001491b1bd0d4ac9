"""The whole path of a configuration with several seeds: what of its results is luck, and what is not.

    python -m benchmarks.record configs/demo.toml --seeds 5 --out docs/results/demo.json [--section.key=value ...]

A run for each seed below --folder: raw shards (made once, the same for all), tokenizers, both language stages, the
evaluation, each by the commands that a user gives. What is there already is not done again, so an interrupted record
goes on. The file is written anew after each seed: of each number the median, the lowest and the highest, and all of
them. A seed that fails stays in it.
"""

import argparse
import os
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

from onevocab.common.errors import UserError, cli
from onevocab.common.files import read_json, write_json
from onevocab.common.provenance import commit
from onevocab.training.metrics import last_losses

ROOT = Path(__file__).resolve().parent.parent
KEY = ("task", "split", "metric")  # of a row of a report


def share_shards(source: Path, run: Path) -> None:
    """The raw shards of a finished stage for another run, as links to the same files."""
    if (run / "shards").exists() or not (source / "shards" / "done.json").exists():
        return
    for path in sorted((source / "shards").rglob("*")):
        if path.is_file():
            target = run / "shards" / path.relative_to(source / "shards")
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)


def finished(run: Path) -> bool:
    """Whether a run is trained to its end and evaluated since."""
    done, report = run / "instruct" / "done.json", run / "report" / "report.json"
    return done.exists() and report.exists() and report.stat().st_mtime >= done.stat().st_mtime


def commands(config: str, run: Path, seed: int, words: list[str]) -> list[list[str]]:
    launch = ["-m", "torch.distributed.run", "--standalone", "train.py", config]
    return [[sys.executable, *launch, f"--folder={run}", f"--seed={seed}", *words],
            [sys.executable, "-m", "onevocab.evaluation", str(run)]]


def one_seed(config: str, run: Path, seed: int, words: list[str]) -> dict:
    """Trains and evaluates, or finds it done. Returns its part of the record."""
    if not finished(run):
        for command in commands(config, run, seed, words):
            done = subprocess.run(command, cwd=ROOT)
            if done.returncode or not (run / "instruct" / "done.json").exists():
                return {"seed": seed, "failed": f"exit {done.returncode}: {' '.join(command[1:])}"}
    report = read_json(run / "report" / "report.json")
    parts = {key: report[key] for key in ("device", "versions", "config", "seconds", "results", "notes", "judges")}
    return {"seed": seed, **parts, "losses": last_losses(run / "metrics.jsonl")}


def summary(seeds: list[dict]) -> list[dict]:
    """The rows of all reports as one: value is the median, interval the lowest and the highest, values all of them."""
    rows: dict[tuple, list[dict]] = {}
    for report in seeds:
        for row in report["results"]:
            if isinstance(row["value"], (int, float)):
                rows.setdefault(tuple(row[key] for key in KEY), []).append(row)
    return [{**same[0], "value": statistics.median(values), "interval": [min(values), max(values)], "values": values}
            for same in rows.values() for values in [[row["value"] for row in same]]]


def record(seeds: list[dict], command: str) -> dict:
    """What is committed, of the shape of a run's report with more keys."""
    ran = [seed for seed in seeds if "failed" not in seed]
    stages = dict.fromkeys(stage for seed in ran for stage in seed["seconds"])
    seconds = {stage: statistics.median(seed["seconds"][stage] for seed in ran if stage in seed["seconds"])
               for stage in stages}
    first = ran[0] if ran else {}
    each = [{key: seed[key] for key in ("seed", "failed", "seconds", "losses", "notes") if key in seed}
            for seed in seeds]
    return {**{key: first[key] for key in ("device", "versions", "config", "judges", "losses") if key in first},
            "command": command, "date": date.today().isoformat(), "commit": commit(), "seconds": seconds,
            "notes": [], "results": summary(ran), "seeds": each}


@cli
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("config")
    parser.add_argument("--seeds", type=int, default=5, help="so many, from 0")
    parser.add_argument("--folder", type=Path, default=Path("runs/record"), help="of the runs")
    parser.add_argument("--out", type=Path, help="the file; by default docs/results/ and the configuration's name")
    given = sys.argv[1:] if argv is None else argv
    args, words = parser.parse_known_args(given)
    if args.seeds < 1 or not Path(args.config).is_file():
        raise UserError("--seeds is at least 1" if args.seeds < 1 else f"there is no {args.config}")
    if wrong := [word for word in words if not word.startswith("--") or "=" not in word or word.startswith("--seed=")]:
        raise UserError(f"{wrong[0]}: settings are --section.key=value, and the seeds are --seeds")
    name = Path(args.config).stem
    out = args.out or ROOT / "docs" / "results" / f"{name}.json"
    command = " ".join(["python -m benchmarks.record", *given])
    runs = [(args.folder / f"{name}-{seed}").resolve() for seed in range(args.seeds)]
    seeds: list[dict] = []
    for seed, run in enumerate(runs):
        if seed:
            share_shards(runs[0], run)
        print(f"=== seed {seed}: {run}", file=sys.stderr, flush=True)
        seeds.append(one_seed(args.config, run, seed, words))
        write_json(out, record(seeds, command))
    failed = [f"seed {seed['seed']} ({seed['failed']})" for seed in seeds if "failed" in seed]
    print(f"{len(seeds) - len(failed)} of {len(seeds)} seeds: {out}")
    if failed:
        raise UserError(f"{'; '.join(failed)}; the same command goes on with what is missing")


if __name__ == "__main__":
    main()
