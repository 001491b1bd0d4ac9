"""Asks a run of the demo what the README asks, as the README asks it, and says which answers are right:
`python -m onevocab.demo.check runs/demo`."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from onevocab.common.commands import Parser
from onevocab.common.errors import UserError, cli
from onevocab.common.paths import path_argument
from onevocab.demo.judges import Judges
from onevocab.demo.tasks.captions import Caption, caption_short
from onevocab.demo.tasks.spoken_question import SpokenQuestion
from onevocab.demo.world import CELLS, NAMES
from onevocab.evaluation import metrics
from onevocab.evaluation.config import EvaluateConfig
from onevocab.evaluation.report import run_config
from onevocab.generation import AnyToAny

QUESTION = "What is in the picture?"
DRAWN = ("Draw a dog at the top left and a blue star at the bottom right on a yellow background.",
         {"top left": "dog", "bottom right": "star"}, "yellow")
SAID = ("Say elephant", "elephant")


class Answer(NamedTuple):
    """prompt: in words; expected: the right answer; given: the model's, as its judge read it; right: whether."""

    prompt: str
    expected: str
    given: str
    right: bool


def ask(run: Path) -> Iterator[Answer]:
    """The README's prompts, answered with the run's own sampling. Raises UserError where the run or its report's
    examples are missing."""
    model = AnyToAny.load(run)
    config = EvaluateConfig.model_validate(run_config(run).get("evaluate", {}))
    examples, media = run / "report" / "examples", model.tokenizers.media
    judges = Judges(run / "report", config, model.tokenizers, [])
    picture, question = examples / "image-0.png", examples / "audio-0.wav"
    if "image" in media and not picture.is_file():
        command = shlex.join(["python", "-m", "onevocab.evaluation", str(run)])
        raise UserError(f"{examples} holds no examples; run `{command}` first")

    def text(prompt: str, parts: list, right: str) -> Answer:
        given = model.generate(parts).text
        return Answer(prompt, right, given, metrics.normal(given) == metrics.normal(right))

    if "image" in media:
        asked = SpokenQuestion() if question.is_file() else Caption()  # whose items the examples are
        answer = asked.items("test", 1, config.seed)[0].answer
        yield text(f"{picture.name}, {QUESTION}", [picture, QUESTION], caption_short(answer["scene"]))
        if question.is_file():
            yield text(f"{picture.name}, {question.name} ({answer['question']})", [picture, question], answer["text"])
        prompt, objects, background = DRAWN
        reading = judges.look([(model.generate(prompt).images or [None])[0]])[0]
        cells = {CELLS[cell]: name for cell, name in enumerate(reading.cells) if name}
        given = ", ".join(f"{name} at the {cell}" for cell, name in cells.items()) + f" on {reading.background}"
        yield Answer(prompt, "what it says", given, cells == objects and reading.background == background)
    if "audio" in media and judges.ear is not None:
        prompt, word = SAID
        judges.pools["check"] = [name for name in NAMES if judges.ear.knows(name)]
        heard = judges.listen([(model.generate(prompt).audio or [None])[0]], [word], "check")[0]
        yield Answer(prompt, word, heard or "none of these", heard == word)


@cli
def main(arguments=None) -> None:
    parser = Parser(prog="python -m onevocab.demo.check", description=__doc__)
    parser.add_argument("run", type=path_argument, help="a run of the demo, evaluated")
    answers = list(ask(parser.parse_args(arguments).run))
    for answer in answers:
        print(f"{'right' if answer.right else 'WRONG'}  {answer.prompt}  ->  {answer.given}"
              + ("" if answer.right else f"  (expected: {answer.expected})"))
    print(f"The README's prompts: {sum(answer.right for answer in answers)} of {len(answers)} answered right.")


if __name__ == "__main__":
    main()
