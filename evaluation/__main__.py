"""Scores a run and writes its report: `python -m onevocab.evaluation runs/demo`."""

# Light on purpose: the speech judge's second process imports this file again.
import argparse
import sys
import time
from pathlib import Path

from onevocab.common.errors import cli, invalid


def evaluate(run: Path, config=None, limit: int | None = None, quiet: bool = False) -> dict:
    """Evaluates a run folder; writes RUN/report. Returns the report. Raises UserError when the run cannot be loaded.

    config: EvaluateConfig, by default the run's own `[evaluate]` section; limit: at most so many items of each task.
    """
    from pydantic import ValidationError

    from onevocab.common import provenance
    from onevocab.demo import speech, speech_judge
    from onevocab.demo.picture_judge import PictureJudge
    from onevocab.evaluation import report as pages
    from onevocab.evaluation import suite
    from onevocab.evaluation.config import EvaluateConfig
    from onevocab.evaluation.tasks import Evaluator
    from onevocab.generation import AnyToAny

    started = time.perf_counter()
    model = AnyToAny.load(run)
    settings = pages.run_config(run)
    if config is None:
        try:
            config = EvaluateConfig.model_validate(settings.get("evaluate", {}))
        except ValidationError as error:
            raise invalid(error, f"{run / 'config.toml'}: [evaluate]") from None
    folder = run / "report"
    judge = PictureJudge.of(folder, config.judge_steps, config.seed, config.judge_floor)
    evaluator = Evaluator(model, judge, config, limit)
    if not speech.available():
        evaluator.notes.append("No speech extra is installed, so what needs eSpeak is not measured.")
    suite.run(evaluator, quiet)
    evaluator.notes.append(
        "caption_*: the ceilings are what the picture judge reads. Recognition, questions and boxes are compared with "
        "the exact answer, which has no judge and so no ceiling.")
    report = {
        "device": provenance.device(), "versions": provenance.versions(), "config": settings,
        "seconds": {**pages.stage_seconds(run), "evaluation": round(time.perf_counter() - started, 1)},
        "results": evaluator.rows, "notes": evaluator.notes,
        "judges": {
            "pictures": {"classes": len(judge.names) + 1, "floor": judge.floor, "steps": config.judge_steps,
                         "trained_on": "renderings of cells, blurred, shrunk, shifted, recoloured, noisy"},
            "speech": {"engine": "pocketsphinx", "chance": 1 / config.candidates,
                       "none_of_these": evaluator.ear.garbage([]) if evaluator.ear else [],
                       "candidates": evaluator.candidates if speech_judge.available() else {}},
        },
    }
    pages.write(folder, report, evaluator.sections, evaluator.drawings, run)
    asked = evaluator.answered.get("spoken_question") or evaluator.answered["caption"]
    pages.write_examples(folder / "examples", asked.items[:4])
    return report


@cli
def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m onevocab.evaluation", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder, for example runs/demo")
    parser.add_argument("--limit", type=int, help="at most so many items of each task: a quick look")
    given = parser.parse_args(arguments)
    if given.limit is not None and given.limit < 1:
        parser.error("--limit must be 1 or more")
    report = evaluate(given.run, limit=given.limit, quiet=not sys.stderr.isatty())

    from onevocab.evaluation.report import text_table

    # By kind of question, edit or wording: on the page.
    print(text_table([row for row in report["results"] if ": " not in row["metric"]]))
    for note in report["notes"]:
        print(note)
    print(f"\n{given.run / 'report' / 'index.html'}  ({report['seconds']['evaluation']:.0f} s)")


if __name__ == "__main__":
    main()
