"""The whole evaluation: the tasks with their controls, other wordings, the form of hot samples, reconstructions."""

from collections.abc import Callable

from tqdm import tqdm

from onevocab.common.errors import UserError
from onevocab.evaluation import metrics
from onevocab.evaluation.evaluator import Answered, Evaluator, media_of, shuffled_media
from onevocab.evaluation.form import malformed
from onevocab.evaluation.metrics import row
from onevocab.tasks import HELD_OUT, Task, Wordings

SHOWN = 12  # cards of a section
SEEN_WORDINGS, HELD_OUT_WORDINGS = "seen wordings", "held-out wordings"


def measured(run: Evaluator) -> list[Task]:
    return [task for task in run.module.tasks if task.metrics]


def run(evaluator: Evaluator, quiet: bool = False) -> None:
    """Everything, in order; fills the evaluator's rows, notes, sections and drawings."""
    steps = [(each.name, lambda each=each: measure_task(evaluator, each)) for each in measured(evaluator)]
    steps += [(step.__name__, lambda step=step: step(evaluator)) for step in (wordings, chosen_answers,
                                                                             malformed_outputs, reconstructions)]
    bar = tqdm(steps, desc="evaluate", disable=quiet, leave=False)
    for name, step in bar:
        bar.set_postfix_str(name)
        step()
    if not evaluator.answered:
        reason = (*evaluator.notes, "none of the tasks has a metric")[0]
        raise UserError(f"nothing could be asked of this model: {reason}")
    order = [metric.row for each in measured(evaluator) for metric in each.metrics]
    order += ["held_out_wordings", "chosen_answers", "malformed_outputs", *(entry["task"] for entry in evaluator.rows)]
    evaluator.rows.sort(key=lambda entry: order.index(entry["task"]))
    evaluator.notes += evaluator.session.closing()


def measure_task(run: Evaluator, task: Task) -> None:
    """A task on its held-out split, then its controls: media shuffled, and what the task names."""
    c = run.config

    def measure(split: str, items: Callable[[], list], main: bool = False) -> Answered | None:
        # What cannot be asked here (no eSpeak, a context too short, no such modality) is null, with the reason.
        try:
            if reason := run.lacking(task):
                raise UserError(reason)
            chosen = items()
            answered = run.answer(task, chosen)
            run.add(task, split, answered, task.ceilings(run.session, chosen) if main else None, kinds=main)
            return answered
        except UserError as error:
            run.missing(task, split, error)

    answered = measure(task.held_out, lambda: run.items(task, "test", getattr(c, task.count)), main=True)
    if answered is None:
        return
    run.answered[task.name] = answered
    cards(run, task, answered)
    if task.shuffled and media_of(answered.items[0]):
        some = answered.items[: run.count(c.controls)]
        measure(f"{task.held_out}, media shuffled", lambda: shuffled_media(some))
    for split, label in task.controls.items():
        measure(label, lambda split=split: run.items(task, split, getattr(c, task.controls_count)))


def malformed_outputs(run: Evaluator) -> None:
    """Hot samples in every mode, checked for their form."""
    total, prompts, media = run.count(run.config.malformed), [], run.model.tokenizers.media
    hot = [task for name in run.session.hot for task in run.module.tasks if task.name == name] or measured(run)
    for task in hot:
        try:
            items = task.items("test", min(32, total), run.config.seed + 1)
        except UserError:
            continue  # the task's own row says why
        prompts += [item.messages for item in items if media_of(item) <= set(media)]
    wants, vocabulary = ["any", *run.model.vocab.modalities], run.model.vocab
    scores, reasons = [], []
    for k, want in enumerate(wants):
        n = total // len(wants) + (k < total % len(wants))
        chosen = [prompts[(i * 7 + k) % len(prompts)] for i in range(n)] if prompts else []
        if not chosen:
            continue
        replies = run.model.generate_batch(
            chosen, want=want, temperature=run.config.malformed_temperature, seed=1000 * k, rows=run.config.batch,
            max_new_tokens=run.config.max_text_tokens if want in ("any", "text") else None)
        for reply in replies:
            reason = malformed(reply.ids, vocabulary, want)
            scores.append((int(reason is not None), 1))
            reasons += [f"{want}: {reason}"] if reason else []
    split = f"temperature {run.config.malformed_temperature:g}"
    run.rows.append(row("malformed_outputs", split, "share malformed", scores))
    if reasons:
        run.notes.append(f"malformed_outputs: {len(reasons)} of {len(scores)}, first {reasons[0]}")


def wordings(run: Evaluator) -> None:
    """Held-out wordings beside the seen ones, about the same scenes; and the mean over tasks."""
    seen, unseen = [], []
    for task in measured(run):
        if not (task.reworded and task.wordings and run.answered.get(task.name) and run.answered[task.name].items):
            continue
        before = run.answered[task.name].first(run.count(run.config.controls))
        try:
            items = run.items(task, "wordings", run.config.controls)[: len(before.items)]
            after = run.answer(task, items)
        except UserError as error:
            run.notes.append(f"held_out_wordings of {task.name}: {error}")
            continue
        for metric in task.metrics:
            pair = before.scores(metric), after.scores(metric)
            for split, scores in zip((SEEN_WORDINGS, HELD_OUT_WORDINGS), pair, strict=True):
                run.rows.append(row("held_out_wordings", split, f"{metric.row}: {metric.name}", scores))
            seen.append(metrics.ratio(pair[0]))
            unseen.append(metrics.ratio(pair[1]))
    for split, values in ((SEEN_WORDINGS, seen), (HELD_OUT_WORDINGS, unseen)):
        scores = [(value, 1) for value in values if value is not None]
        mean = row("held_out_wordings", split, "mean over tasks", scores)
        run.rows.append({**mean, "interval": None})  # the tasks are not a sample of anything


def chosen_answers(run: Evaluator) -> None:
    """Whether the model, asked without `want`, answers with what was asked for and nothing else: rows for each medium,
    in seen and in held-out wordings, and one for the wording that fares worst."""
    asked: list[tuple[Task, str, str, list]] = []  # task, split, wording, prompt
    kinds: list[Wordings] = []
    for task in measured(run):
        if run.answered.get(task.name):
            for kind in task.wordings:
                if any(kind is other for other in kinds):
                    continue  # as another task asks
                kinds.append(kind)
                for wording in kind:
                    split = HELD_OUT_WORDINGS if wording in kind.of(HELD_OUT) else SEEN_WORDINGS
                    asked += [(task, split, wording, prompt) for prompt in _prompts(run, task, kind, wording)]
    replies = run.ask([prompt for *_, prompt in asked], "any")
    by_medium: dict[tuple[str, str], list] = {}
    by_wording: dict[str, list] = {}
    for (task, split, wording, _), reply in zip(asked, replies, strict=True):
        media = {name for name, values in reply.media.items() if values}
        given = media | ({"text"} if reply.text or not media else set())
        score = int(given == {task.want}), 1
        by_medium.setdefault((task.want, split), []).append(score)
        by_wording.setdefault(f"{task.name}: {wording}", []).append(score)
    for (want, split), scores in sorted(by_medium.items()):
        run.rows.append(row("chosen_answers", split, f"{want} where {want} is asked for", scores))
    if by_wording:
        worst = min(by_wording, key=lambda wording: metrics.ratio(by_wording[wording]))
        run.rows.append(row("chosen_answers", "the wording that fares worst", "what is asked for", by_wording[worst]))
        run.notes.append(f"chosen_answers: the wording that fares worst is that of {worst}")


def _prompts(run: Evaluator, task: Task, kind: Wordings, wording: str) -> list:
    """At most [evaluate] wants of a task's prompts in one wording."""
    count, prompts = run.count(run.config.wants), []
    for item in task.items("test", count * len(task.wordings), run.config.seed + 2, wording):
        texts = [part for message in item.messages for part in message["content"] if isinstance(part, str)]
        if any(kind.matches(wording, text) for text in texts):
            prompts.append(item.messages)
    return prompts[:count]


def reconstructions(run: Evaluator) -> None:
    """How much the tokenizers lose, as the tasks' session measures it."""
    rows, cards = run.session.reconstructions(run.count(run.config.reconstructions))
    run.rows += rows
    for section, new in cards.items():
        run.sections.setdefault(section, []).extend(new)


def cards(run: Evaluator, task: Task, answered: Answered) -> None:
    """The first items of a task, as they came."""
    shown = run.config.gallery if task.gallery else SHOWN
    for item, reply, verdict in list(zip(answered.items, answered.replies, answered.verdicts, strict=True))[:shown]:
        got, possible = task.metrics[0].score(item.answer, verdict)
        card = task.card(item, reply, verdict)
        card.right = bool(possible) and got == possible
        run.sections.setdefault(task.section, []).append(card)
        if task.gallery:
            run.drawings.append((card.lines[0][1], card.media[0][1]))
