"""Asks a model the items of tasks, and makes rows of the report of what their judges say.

Every task runs the same way: items of a held-out split are answered by the model, what a judge makes of the replies
(the verdicts) is scored item by item, and the same scores give the chance (other items' right answers), the ceilings
(originals, and originals through the tokenizer) and the controls. What is particular to a task is a method of it.
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from onevocab.common.errors import UserError
from onevocab.evaluation import metrics
from onevocab.evaluation.config import EvaluateConfig
from onevocab.evaluation.metrics import row
from onevocab.tasks import Card, Item, Metric, Section, Task
from onevocab.tasks.registry import TaskModule
from onevocab.tokenizers.modalities import modality_of_value


@dataclass
class Answered:
    """Items with the model's replies, and a judge's verdict on each."""

    items: list[Item]
    replies: list
    verdicts: list

    def scores(self, metric: Metric, kind: str | None = None) -> list:
        return [metric.score(item.answer, verdict) for item, verdict in zip(self.items, self.verdicts, strict=True)
                if kind is None or item.answer.get("kind") == kind]

    def first(self, count: int) -> "Answered":
        return Answered(self.items[:count], self.replies[:count], self.verdicts[:count])


def parts_of(item: Item) -> list:
    """All parts of a prompt, in order."""
    flat = []
    for message in item.messages:
        content = message["content"] if isinstance(message, dict) else message
        flat += content if isinstance(content, list) else [content]
    return flat


def media_of(item: Item) -> set[str]:
    """The modalities of a prompt's media."""
    return {modality_of_value(part) for part in parts_of(item) if not isinstance(part, str)}


def shuffled_media(items: list[Item]) -> list[Item]:
    """The same prompts with the media of the item before: nobody keeps their own."""

    def swap(item, donor):
        media: dict[str, list] = {}
        for part in parts_of(donor):
            if not isinstance(part, str):
                media.setdefault(modality_of_value(part), []).append(part)
        used: Counter = Counter()

        def other(part):
            modality = None if isinstance(part, str) else modality_of_value(part)
            if modality not in media:
                return part
            used[modality] += 1
            return media[modality][(used[modality] - 1) % len(media[modality])]

        def content(value):
            return [other(part) for part in value] if isinstance(value, list) else other(value)

        messages = [{**m, "content": content(m["content"])} if isinstance(m, dict) else other(m)
                    for m in item.messages]
        return replace(item, messages=messages)

    return [swap(item, items[i - 1]) for i, item in enumerate(items)]


class Evaluator:
    """Asks a model and judges what it gives; `suite.run` fills rows, notes, and the page's cards by section.

    folder: where judges keep what they learned.
    """

    def __init__(self, model, module: TaskModule, config: EvaluateConfig, folder: Path, limit: int | None = None):
        self.model, self.module, self.config, self.limit = model, module, config, limit
        self.rows: list[dict] = []
        self.notes: list[str] = []
        self.sections: dict[Section, list[Card]] = {}
        self.drawings: list[tuple[str, Image.Image]] = []
        self.answered: dict[str, Answered] = {}
        self.session = module.session(folder, config, model.tokenizers, self.notes)

    def count(self, wanted: int) -> int:
        return min(wanted, self.limit) if self.limit else wanted

    # Asking and judging.

    def lacking(self, task: Task) -> str | None:
        """Why this model cannot be asked at all, or None."""
        lacking = [name for name in task.media if name not in self.model.tokenizers.media]
        return f"this model has no {' and no '.join(lacking)}" if lacking else None

    def ask(self, prompts: list, want: str) -> list:
        """Replies of the model; prompt i draws with seed i."""
        c = self.config
        return self.model.generate_batch(
            prompts, want=want, seed=0, rows=c.batch, **c.sampling,
            max_new_tokens=c.max_text_tokens if want in ("any", "text") else None)

    def answer(self, task: Task, items: list[Item]) -> Answered:
        """Lets the model answer items, and judges what it gave."""
        replies = self.ask([item.messages for item in items], task.want)
        return Answered(items, replies, task.judge(self.session, items, replies))

    def items(self, task: Task, split: str, count: int) -> list[Item]:
        """At most so many of the items that can be judged. Raises UserError when there is none, or no judge."""
        items = task.judgeable(self.session, task.items(split, self.count(count), self.config.seed))
        if not items:
            raise UserError(f"no items of task {task.name!r}, split {split!r}")
        return items

    # Rows.

    def chance(self, task: Task, items: list[Item], metric: Metric, kind: str | None = None) -> list:
        """Scores of the right answers of other items of the same kind: what a blind guess from the task's own
        distribution gets."""
        by_kind: dict[object, list] = {}
        for item in items:
            if kind is None or item.answer.get("kind") == kind:
                by_kind.setdefault(item.answer.get("kind"), []).append(item)
        scores = []
        for group in by_kind.values():
            for shift in range(1, min(9, len(group))):
                for item, other in zip(group, group[shift:] + group[:shift], strict=True):
                    scores.append(metric.score(item.answer, task.right(other)))
        return scores

    def add(self, task: Task, split: str, answered: Answered, ceilings=None, kinds: bool = False) -> None:
        """The rows of a task: whole, and by kind of question or edit where there are several."""
        for metric in task.metrics:
            upper = {}
            if ceilings:
                upper = {key: Answered(answered.items, [], verdicts).scores(metric)
                         for key, verdicts in zip(("original", "tokenizer"), ceilings, strict=True)}
            chance = task.chance(self.session)
            if chance is None:
                chance = self.chance(task, answered.items, metric)
            self.rows.append(row(metric.row, split, metric.name, answered.scores(metric), chance=chance, **upper))
            for kind in sorted({item.answer["kind"] for item in answered.items if item.answer.get("kind")}):
                scores = answered.scores(metric, kind)
                if kinds and metrics.ratio(scores) is not None:
                    chance = task.chance(self.session)
                    if chance is None:
                        chance = self.chance(task, answered.items, metric, kind)
                    self.rows.append(row(metric.row, split, f"{metric.name}: {kind}", scores, chance=chance))

    def missing(self, task: Task, split: str, reason) -> None:
        """Null rows where a task cannot run here, and the reason, once."""
        for metric in task.metrics:
            self.rows.append(row(metric.row, split, metric.name, None))
        if f"{task.name}: {reason}" not in self.notes:
            self.notes.append(f"{task.name}: {reason}")
