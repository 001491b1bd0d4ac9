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
    """Whether the model, asked without `want`, answers with what was asked for and nothing else: a row for each medium
    and kind of wording, and the wording that fares worst."""
    scores: dict[tuple[str, str], list] = {}
    worst = None
    for task in measured(run):
        if not (task.reworded and task.wordings and run.answered.get(task.name)):
            continue
        for kind in task.wordings:
            for wording in kind:
                replies = _unasked(run, task, kind, wording)
                right = [(int(({part.modality for part in reply.segments} or {"text"}) == {task.want}), 1)
                         for reply in replies]
                if right:
                    split = HELD_OUT_WORDINGS if wording in kind.of(HELD_OUT) else SEEN_WORDINGS
                    scores.setdefault((task.want, split), []).extend(right)
                    share = metrics.ratio(right)
                    worst = min(worst or (2.0,), (share, f"{task.name}: {wording}", right))
    for (want, split), right in sorted(scores.items()):
        run.rows.append(row("chosen_answers", split, f"{want} where {want} is asked for", right))
    if worst:
        share, wording, right = worst
        run.rows.append(row("chosen_answers", "the wording that fares worst", "what is asked for", right))
        run.notes.append(f"chosen_answers: the wording that fares worst is that of {wording} ({share:.2f})")


def _unasked(run: Evaluator, task: Task, kind: Wordings, wording: str) -> list:
    """Replies to prompts in one wording, without `want`."""
    count, prompts = run.count(run.config.wants), []
    for item in task.items("test", count * len(task.wordings), run.config.seed + 2, wording):
        texts = [part for message in item.messages for part in message["content"] if isinstance(part, str)]
        if any(kind.matches(wording, text) for text in texts) and len(prompts) < count:
            prompts.append(item.messages)
    return run.ask(prompts, "any") if prompts else []


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
