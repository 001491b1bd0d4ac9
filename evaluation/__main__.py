"""Scores a run and writes its report: `python -m onevocab.evaluation runs/demo`."""

# Light on purpose: the speech judge's second process imports this file again.
import sys
import time
from pathlib import Path

from onevocab.common.commands import Parser
from onevocab.common.errors import UserError, cli, invalid
from onevocab.common.files import check_writable
from onevocab.common.paths import path_argument


def evaluate(run: Path, config=None, limit: int | None = None, quiet: bool = False) -> dict:
    """Evaluates a run folder; writes RUN/report. Returns the report. Raises UserError, before anything is asked, when
    the run or its tasks cannot be loaded, or the report could not be written.

    config: EvaluateConfig, by default the run's own `[evaluate]` section; limit: at most so many items of each task.
    """
    from pydantic import ValidationError

    from onevocab.common import provenance
    from onevocab.evaluation import report as pages
    from onevocab.evaluation import suite
    from onevocab.evaluation.config import DEMO_TASKS, EvaluateConfig
    from onevocab.evaluation.evaluator import Evaluator
    from onevocab.evaluation.own_data import task_module
    from onevocab.generation import AnyToAny
    from onevocab.tasks import load_tasks
    from onevocab.training.held_out import memorising

    started = time.perf_counter()
    settings, folder = pages.run_config(run), run / "report"
    if config is None:
        try:
            config = EvaluateConfig.model_validate(settings.get("evaluate", {}))
        except ValidationError as error:
            raise invalid(error, f"{run / 'config.toml'}: [evaluate]") from None
    for place in (folder, folder / "examples") if run.is_dir() else ():
        check_writable(place)
    own = config.tasks is None and "demo" not in settings.get("data", {"demo": {}})
    tasks = None if own else load_tasks(config.tasks or DEMO_TASKS)
    model = AnyToAny.load(run)
    evaluator = Evaluator(model, tasks or task_module(model, run, settings), config, folder, limit)
    suite.run(evaluator, quiet)
    lines = pages.metrics_lines(run)
    stages = dict.fromkeys(line.get("stage") for line in lines)
    evaluator.notes += filter(None, (memorising(lines, stage) for stage in stages))
    report = {
        "device": provenance.device(), "versions": provenance.versions(), "config": settings,
        "seconds": {**pages.stage_seconds(run), "evaluation": round(time.perf_counter() - started, 1)},
        "results": evaluator.rows, "notes": evaluator.notes,
        "judges": evaluator.session.judges(),
    }
    pages.write(folder, report, evaluator.sections, evaluator.drawings, run)
    examples = (*evaluator.session.examples, *evaluator.answered)
    asked = next(evaluator.answered[name] for name in examples if name in evaluator.answered)
    pages.write_examples(folder / "examples", asked.items[:4])
    return report


@cli
def main(arguments=None) -> None:
    parser = Parser(prog="python -m onevocab.evaluation", description=__doc__)
    parser.add_argument("run", type=path_argument, help="a run folder, for example runs/demo")
    parser.add_argument("--limit", type=int, help="at most so many items of each task: a quick look")
    given = parser.parse_args(arguments)
    if given.limit is not None and given.limit < 1:
        raise UserError("--limit must be 1 or more")
    report = evaluate(given.run, limit=given.limit, quiet=not sys.stderr.isatty())

    from onevocab.evaluation.report import text_table

    # By kind of question, edit or wording: on the page.
    print(text_table([row for row in report["results"] if ": " not in row["metric"]]))
    for note in report["notes"]:
        print(note)
    print(f"\n{given.run / 'report' / 'index.html'}  ({report['seconds']['evaluation']:.0f} s)")


if __name__ == "__main__":
    main()
