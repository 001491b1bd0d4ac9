"""The whole evaluation: the tasks with their controls, other wordings, the form of hot samples, reconstructions."""

from collections.abc import Callable

import numpy as np
from PIL import Image
from tqdm import tqdm

from onevocab.common.errors import UserError
from onevocab.demo import speech, world
from onevocab.demo.items import evaluation_items, held_out_scene
from onevocab.demo.picture_judge import to_array
from onevocab.evaluation import metrics
from onevocab.evaluation.metrics import row
from onevocab.evaluation.report import Card
from onevocab.evaluation.tasks import (
    HELD_OUT,
    MEASURES,
    VOICED,
    WORDED,
    Answered,
    Evaluator,
    parts_of,
    pictures_of,
    prompt_text,
    shuffled_media,
)

ORDER = ("caption_objects", "caption_positions", "vqa", "detection", "text_to_image_objects",
         "text_to_image_background", "image_edit", "speech_recognition", "text_to_speech", "spoken_question",
         "image_to_speech", "speech_to_image", "held_out_wordings", "malformed_outputs", "image_reconstruction_psnr",
         "audio_reconstruction_judge")
SHOWN = 12  # cards of a section


def run(evaluator: Evaluator, quiet: bool = False) -> None:
    """Everything, in order; fills the evaluator's rows, notes, sections and drawings."""
    steps = [(name, lambda name=name: task(evaluator, name)) for name in MEASURES]
    steps += [(step.__name__, lambda step=step: step(evaluator)) for step in (wordings, malformed_outputs,
                                                                             reconstructions)]
    bar = tqdm(steps, desc="evaluate", disable=quiet, leave=False)
    for name, step in bar:
        bar.set_postfix_str(name)
        step()
    if not evaluator.answered:
        raise UserError(f"nothing could be asked of this model: {evaluator.notes[0]}")
    evaluator.rows.sort(key=lambda entry: ORDER.index(entry["task"]))


def task(run: Evaluator, name: str) -> None:
    """A task on its held-out split, then its controls: media shuffled, an unseen style, voices of training."""
    c, main = run.config, HELD_OUT["voices" if name in VOICED else "words" if name == "say" else "test"]

    def measure(split: str, items: Callable[[], list], **options) -> Answered | None:
        # What cannot be asked here (no eSpeak, a context too short, no such modality) is null, with the reason.
        try:
            chosen = items()
            answered = run.answer(name, chosen)
            run.add(name, split, answered, run.ceilings(name, chosen) if options else None, **options)
            return answered
        except UserError as error:
            run.missing(name, split, error)

    count = c.captions if name in ("caption", "draw") else c.items
    answered = measure(main, lambda: run.items(name, "test", count), kinds=True)
    if answered is None:
        return
    run.answered[name] = answered
    cards(run, name, answered)
    if any(not isinstance(part, str) for part in parts_of(answered.items[0])):
        some = answered.items[: run.count(c.controls)]
        measure(f"{main}, media shuffled", lambda: shuffled_media(some))
    if any(isinstance(part, Image.Image) for part in parts_of(answered.items[0])):
        measure(HELD_OUT["style"], lambda: run.items(name, "style", c.controls))
    if name in VOICED:
        measure(HELD_OUT["train_voices"], lambda: run.items(name, "train_voices", c.controls))


def malformed(ids, vocabulary, want: str) -> str | None:
    """Why a reply is not well formed, or None. A second reading of the template, apart from grammar and codec:
    texts and whole spans, of the modality that was wanted, and nothing after the end of the turn."""
    ids, at, parts = [int(i) for i in ids], 0, []
    while at < len(ids):
        token, at = ids[at], at + 1
        if token in (vocabulary.end_of_turn, vocabulary.end_of_document):
            if at != len(ids):
                return "it goes on after its end"
            break
        if token < vocabulary.text_size:
            parts += ["text"] if parts[-1:] != ["text"] else []
            continue
        span = next((span for span in vocabulary.ranges if span.begin == token), None)
        if span is None:
            return f"id {token} cannot stand here"
        codes = range(span.codes_start, span.codes_start + span.codes)
        need = None
        if span.sized:
            sides = [token - span.sizes_start + 1 for token in ids[at : at + 2]]
            if len(sides) < 2 or not all(1 <= side <= span.sizes for side in sides):
                return f"{span.name}: no size"
            need, at = sides[0] * sides[1], at + 2
        start = at
        while at < len(ids) and ids[at] in codes:
            at += 1
        if at == len(ids) or ids[at] != span.end:
            return f"{span.name}: never closed"
        count, at = at - start, at + 1
        if count == 0 or (count != need if span.sized else count % span.rows):
            return f"{span.name}: {count} codes"
        parts.append(span.name)
    if want == "text" and set(parts) - {"text"}:
        return f"text was wanted, it holds {parts}"
    if want not in ("any", "text") and parts != [want]:
        return f"one {want} was wanted, it holds {parts}"
    return None


def malformed_outputs(run: Evaluator) -> None:
    """Hot samples in every mode, checked for their form."""
    total = run.count(run.config.malformed)
    prompts = []
    for task in ("draw", "vqa", "caption", "edit", "say"):
        items = evaluation_items(task, "test", min(32, total), run.config.seed + 1)
        prompts += [item.messages for item in items]
    wants, vocabulary = ["any", *run.model.vocab.modalities], run.model.vocab
    scores, reasons = [], []
    for k, want in enumerate(wants):
        n = total // len(wants) + (k < total % len(wants))
        chosen = [prompts[(i * 7 + k) % len(prompts)] for i in range(n)]
        if not n:
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
    for task in WORDED:
        if task not in run.answered or not run.answered[task].items:
            continue
        before = run.answered[task].first(run.count(run.config.controls))
        try:
            items = run.items(task, "wordings", run.config.controls)[: len(before.items)]
            after = run.answer(task, items)
        except UserError as error:
            run.notes.append(f"held_out_wordings of {task}: {error}")
            continue
        for name, metric, scorer in MEASURES[task]:
            pair = before.scores(scorer), after.scores(scorer)
            for split, scores in zip(("seen", "wordings"), pair, strict=True):
                run.rows.append(row("held_out_wordings", HELD_OUT[split], f"{name}: {metric}", scores))
            seen.append(metrics.ratio(pair[0]))
            unseen.append(metrics.ratio(pair[1]))
    for split, values in (("seen", seen), ("wordings", unseen)):
        scores = [(value, 1) for value in values if value is not None]
        mean = row("held_out_wordings", HELD_OUT[split], "mean over tasks", scores)
        run.rows.append({**mean, "interval": None})  # the tasks are not a sample of anything


def reconstructions(run: Evaluator) -> None:
    """How much the tokenizers lose, on pictures and voices that they were not trained on."""
    count = run.count(run.config.reconstructions)
    rng = np.random.default_rng([run.config.seed, 5])
    originals = [world.picture(held_out_scene(rng)) for _ in range(count)]
    again = run.through_tokenizer("image", originals)
    values = [metrics.psnr(to_array(one), to_array(other)) for one, other in zip(originals, again, strict=True)]
    scores = [(value, 1) for value in values]
    run.rows.append(row("image_reconstruction_psnr", HELD_OUT["test"], "dB, mean over pictures", scores))
    cards = run.sections.setdefault("Through the tokenizers", [])
    for one, other, value in list(zip(originals, again, values, strict=True))[:SHOWN]:
        cards.append(Card([("original", one), ("decoded", other)], [("PSNR", f"{value:.1f} dB")]))
    name, metric = "audio_reconstruction_judge", "phrases heard right"
    try:
        if run.ear is None:
            raise UserError("judging speech needs pocketsphinx; run `pip install 'onevocab[judge]'`")
        phrases = [phrase for phrase in world.NAMES if run.ear.knows(phrase)]
        run.pools[name] = phrases
        phrases = [phrases[k % len(phrases)] for k in range(count)]
        sounds = [(speech.speak(phrase, speech.TEST_VOICES[k % 3]), speech.RATE) for k, phrase in enumerate(phrases)]
        decoded = run.through_tokenizer("audio", sounds)
        heard = run.listen(sounds + decoded, phrases * 2, name)
    except UserError as error:
        run.rows.append(row(name, HELD_OUT["voices"], metric, None))
        run.notes.append(f"{name}: {error}")
        return
    scores = [(int(said == phrase), 1) for said, phrase in zip(heard, phrases * 2, strict=True)]
    run.rows.append(row(name, HELD_OUT["voices"], metric, scores[count:], original=scores[:count],
                        chance=1 / min(run.config.candidates, len(run.pools[name]))))
    for k in range(min(SHOWN // 2, count)):
        lines = [("said", phrases[k]), ("heard", heard[count + k] or "none of these")]
        cards.append(Card([("original", sounds[k]), ("decoded", decoded[k])], lines, bool(scores[count + k][0])))


def cards(run: Evaluator, task: str, answered) -> None:
    """The first items of a task, as they came."""
    scorer = MEASURES[task][0][2]
    shown = run.config.gallery if task == "draw" else SHOWN
    for item, reply, said in list(zip(answered.items, answered.replies, answered.said, strict=True))[:shown]:
        got, possible = scorer(item.answer, said)
        right = bool(possible) and got == possible
        prompt, pictures = prompt_text(item), pictures_of(item)
        sounds = [part for m in item.messages for part in m["content"] if isinstance(part, tuple)]
        drawn = reply.images[0] if reply.images else Image.new("RGB", (world.SIDE, world.SIDE))
        if task == "draw":
            section, media = "Drawn from words", [("drawn", drawn)]
            lines = [("prompt", prompt), ("read", ", ".join(said.names) + f" on {said.background or '?'}")]
            run.drawings.append((prompt, drawn))
        elif task == "edit":
            section, lines = "Edited by instruction", [("instruction", prompt)]
            media = [("given", pictures[0]), ("model", drawn), ("exact", world.picture(item.answer["scene"]))]
        elif task == "draw_heard":
            section, media = "Understood by the model", [("heard", sounds[0]), ("drawn", drawn)]
            lines = [("said", item.answer["said"]), ("prompt", prompt), ("read", ", ".join(said.names) or "nothing")]
        elif task in ("say", "say_seen"):
            section = "Spoken by the model"
            media = [("picture", picture) for picture in pictures] + [("model", sound) for sound in reply.audio[:1]]
            lines = [("prompt", prompt), ("wanted", item.answer["say"]), ("heard", said or "none of these")]
        else:
            sections = {"caption": "Descriptions", "hear": "Understood by the model"}
            section = sections.get(task, "Questions about a picture")
            media = [("picture", picture) for picture in pictures] + [("heard", sound) for sound in sounds]
            lines = [("prompt", prompt or item.answer.get("question", "")), ("right answer", item.answer["text"]),
                     ("model", reply.text)]
        run.sections.setdefault(section, []).append(Card(media, lines, right))
