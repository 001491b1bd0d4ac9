"""Conversations as LLaVA and its kin publish them, and question-answer sets: VQAv2, ChartQA, MIMIC-IT.

`exchanges` makes conversations of several questions about one picture, so that it is stored and shown once.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from onevocab.common.errors import UserError
from onevocab.data.convert import tables
from onevocab.data.convert.media import check, from_base64, suffix_of
from onevocab.data.convert.options import FILE, FRAMES, MEDIA, TURNS, Format, Option
from onevocab.data.convert.samples import (
    Converted,
    Dropped,
    Row,
    exchanges,
    field_of,
    files_in,
    fill,
    id_of,
    list_of,
    text_of,
)
from onevocab.tokenizers.document import Document, Part, conversation

ANNOTATIONS = Option("annotations", "the file of answers (default: beside the questions, by its usual name)", Path)
IMAGES = Option("images", "the JSON of base64 pictures (default: FOLDER.json beside the instructions)", Path)
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SHORT = "Answer with a word, a number or a short phrase."


def conversation_of(messages, media: dict[str, list[list[Part]]]) -> Document:
    """[{from, value}] or [{role, content}] -> conversation; `<image>` in a text is where the next picture stands.

    media: by kind (image, audio, video), the parts of each file. What no text asks for comes after the last one that a
    text does ask for, else before the first question. `<image>` is also the place of a video if there are no pictures
    (LLaVA-Video); where there are no media at all, it is a text like any other unless it has a line of its own. What is
    said before the first question, and questions that nobody answers at the end, are left out, but not the media in the
    former. Raises Dropped on an empty question or answer, on a place without a medium, and where no answer is left.
    """
    waiting = {"image": [], **{kind: list(files) for kind, files in media.items()}}
    if not waiting["image"] and waiting.get("video"):
        waiting["image"] = waiting["video"]
    kinds = "|".join(waiting)
    place = re.compile(rf"\s*<({kinds})>\s*" if any(waiting.values()) else rf"(?m)^[ \t]*<({kinds})>[ \t]*$")
    turns: list[tuple[str, list[Part]]] = []
    first: list[Part] = []  # of the first question
    last, end, asked = first, 0, False  # what no text asks for goes to last[end:end]
    for message in list_of(messages):
        role = ROLES.get(text_of(field_of(message, "from", "role")))
        if role is None:
            raise Dropped("bad record", f"a turn of {field_of(message, 'from', 'role')!r}")
        unasked = role == "assistant" and not asked
        parts = first if not asked and role != "system" else []
        for i, piece in enumerate(place.split(_written(message, waiting.keys()))):
            if i % 2 == 0:
                parts += [("text", piece.strip())] if piece.strip() and not unasked else []
            elif waiting[piece]:
                parts += waiting[piece].pop(0)
                last, end = parts, len(parts)
            else:
                raise Dropped("missing media", f"more <{piece}> than files")
        if role == "user" or (parts and not unasked) or (role == "assistant" and asked):
            turns.append((role, parts))
        asked = asked or role == "user"
    while turns and (turns[-1][0] != "assistant" or not turns[-1][1]):
        turns.pop()
    if not turns:
        raise Dropped("empty answer", "no question that is answered")
    if waiting["image"] is waiting.get("video"):
        del waiting["video"]
    if all(parts is not last for _, parts in turns):  # it went with the end
        last, end = first, 0
    last[end:end] = [part for files in waiting.values() for parts in files for part in parts]
    for role, parts in turns:
        if not parts:
            raise Dropped("empty answer" if role == "assistant" else "empty question")
    return conversation(turns)


def _written(message, kinds) -> str:
    """A turn's text; parts ({type: text, text}, {type: image}) are written out, media as their places."""
    value = field_of(message, "value", "content")
    if not isinstance(value, list):
        return text_of(value).replace("\r\n", "\n")
    texts = []
    for part in value:
        kind = text_of(field_of(part, "type"))
        if kind != "text" and kind not in kinds:
            raise Dropped("bad record", f"a part of type {kind!r}")
        texts.append(text_of(field_of(part, "text")) if kind == "text" else f"<{kind}>")
    return "\n".join(texts).replace("\r\n", "\n")


def media_of(options, record, *kinds: str) -> dict[str, list[list[Part]]]:
    """The files of a record: under `image` or `images` and so on, one or a list of them. Raises Dropped."""
    return {kind: [options.media.take(file) for file in files_in(field_of(record, kind, f"{kind}s"))]
            for kind in kinds}


# ------------------------------------------------------------------------------------------------ LLaVA


def _llava(options, name: str, record) -> Iterator[Converted]:
    messages, media = field_of(record, "conversations", "messages"), {}
    if messages is None and field_of(record, "question", "answer") is not None:  # LRV, StableLLaVA
        messages = [{"from": "human", "value": field_of(record, "question")},
                    {"from": "gpt", "value": field_of(record, "answer")}]
        if field_of(record, "image") is None and (number := text_of(field_of(record, "image_id"))):
            media = {"image": [options.media.take(number if suffix_of(number) else f"{number}.jpg")]}
    if not isinstance(messages, list):
        raise Dropped("bad record", "no list of conversations")
    yield Converted(conversation_of(messages, media or media_of(options, record, "image", "video")))


# ------------------------------------------------------------------------------------------------ VQAv2


def _answers_of(options, questions: Path) -> Path | None:
    """`v2_OpenEnded_mscoco_train2014_questions.json` -> `v2_mscoco_train2014_annotations.json`, None if it is not
    there, as for the questions of a test."""
    name = questions.name.replace("OpenEnded_", "").replace("questions", "annotations")
    path = options.annotations or questions.with_name(name)
    return path if path != questions and path.is_file() else None


def _vqa_units(options) -> list[Path]:
    questions = tables.files_of(options, (".json",), "*questions*")
    if not any(_answers_of(options, path) for path in questions):
        raise UserError(f"no answers to {questions[0]}: give their file by --annotations")
    return questions


def common_answer(annotation: dict) -> str:
    """What the set calls `multiple_choice_answer`, else what most of the ten said; among as many, the first."""
    given = Counter(filter(None, (text_of(answer.get("answer")) for answer in list_of(annotation.get("answers"))
                                  if isinstance(answer, dict))))
    return text_of(annotation.get("multiple_choice_answer")) or next((answer for answer, _ in given.most_common(1)), "")


def _ask(asked: dict, about, question: str, answer: str) -> None:
    """Adds to {what the question is about: {(question, answer): None}}. Raises Dropped."""
    if not question or not answer:
        raise Dropped("empty answer" if question else "empty question")
    pairs = asked.setdefault(about, {})
    if (question, answer) in pairs:
        raise Dropped("duplicate", question)
    pairs[question, answer] = None


def _vqa_rows(options, unit: Path) -> Iterator[Row]:
    """Records are ({image_id, split}, [(question, answer)]): all about one picture."""
    if not (stored := _answers_of(options, unit)):
        raise Dropped("missing answers", f"no annotations to {unit.name}")
    whole = tables.document(unit)
    split = re.search(r"(train|val|test)\d{4}", f"{text_of(field_of(whole, 'data_subtype'))} {unit.name}")
    answers = {id_of(annotation, "question_id"): common_answer(annotation)
               for annotation in tables.objects(stored, "annotations")}
    asked: dict = {}
    for question in tables.objects(unit, "questions"):
        number = id_of(question, "question_id")
        try:
            _ask(asked, id_of(question, "image_id"), text_of(question.get("question")), answers.get(number, ""))
        except Dropped as dropped:
            yield f"{unit.name}#{number}", dropped
    for number, pairs in asked.items():
        yield f"{unit.name}#image-{number}", ({"image_id": number, "split": split[0] if split else ""}, list(pairs))


def _vqa(options, name: str, row) -> Iterator[Converted]:
    record, asked = row
    file = fill(options.file or "COCO_{split}_{image_id:012d}.jpg", record)
    parts = options.media.parts(file, f"{record['split']}/{file}")
    return exchanges(parts, asked, options.turns, SHORT)


# ------------------------------------------------------------------------------------------------ ChartQA


def _chart_units(options) -> list[Path]:
    """`annotations/` holds what is drawn in each chart, a JSON each."""
    return [path for path in tables.files_of(options, (".json",)) if path.parent.name != "annotations"]


def _chart_rows(options, unit: Path) -> Iterator[Row]:
    """Records are (folder of the file, picture, [(question, answer)])."""
    here = unit.parent.relative_to(options.source).as_posix() if options.source.is_dir() else "."
    asked: dict[str, dict] = {}
    for name, record in tables.rows(unit):
        try:
            picture = text_of(field_of(record, "imgname"))
            if not picture:
                raise Dropped("bad record", "no imgname")
            _ask(asked, picture, text_of(field_of(record, "query")), text_of(field_of(record, "label")))
        except Dropped as dropped:
            yield name, dropped
    for picture, pairs in asked.items():
        yield f"{unit.name}#{picture}", (here, picture, list(pairs))


def _chart(options, name: str, row) -> Iterator[Converted]:
    here, picture, asked = row
    parts = options.media.parts(f"{here}/png/{picture}", picture, f"png/{picture}")
    return exchanges(parts, asked, options.turns, SHORT)


# ------------------------------------------------------------------------------------------------ MIMIC-IT


def _pictures_of(options, instructions: Path) -> Path:
    """`LA/LADD_instructions.json` -> `LA/LA.json`"""
    path = options.images or instructions.with_name(f"{instructions.resolve().parent.name}.json")
    if not path.is_file():
        raise UserError(f"no base64 pictures to {instructions} at {path}: give their JSON by --images")
    return path


def _mimic_units(options) -> list[Path]:
    instructions = tables.files_of(options, (".json",), "*instructions*")
    for path in instructions:
        _pictures_of(options, path)
    return instructions


def _mimic_rows(options, unit: Path) -> Iterator[Row]:
    data = field_of(tables.document(unit), "data")
    if not isinstance(data, dict):
        raise Dropped("damaged input", f"{unit.name} has no object 'data'")
    pictures = _pictures_of(options, unit)
    return ((f"{unit.name}#{number}", (pictures, record)) for number, record in data.items())


def _mimic(options, name: str, row) -> Iterator[Converted]:
    store, record = row
    known, parts = tables.document(store), []
    for number in list_of(field_of(record, "image_ids")):
        held = known.get(number) if isinstance(known, dict) and isinstance(number, str) else None
        if not isinstance(held, str):
            raise Dropped("missing media", f"no picture {number} in {store.name}")
        parts.append([check(from_base64(held), "")])
    messages = [{"from": "human", "value": field_of(record, "instruction")},
                {"from": "gpt", "value": field_of(record, "answer")}]
    yield Converted(conversation_of(messages, {"image": parts}))


FORMATS = {
    "llava": Format("JSON of image and conversations (LLaVA, ALLaVA, LVIS-Instruct4V, ShareGPT4V), or of question and "
                    "answer (LRV, StableLLaVA)",
                    tables.units_of(".json", *tables.LINES), tables.rows_of, _llava, (MEDIA, FRAMES)),
    "vqav2": Format("JSON of questions, beside that of annotations; those about one picture become one conversation",
                    _vqa_units, _vqa_rows, _vqa, (MEDIA, ANNOTATIONS, FILE, TURNS)),
    "chartqa": Format("JSON of imgname, query and label, beside png/", _chart_units, _chart_rows, _chart,
                      (MEDIA, TURNS)),
    "mimic-it": Format("JSON of instructions and JSON of base64 pictures", _mimic_units, _mimic_rows, _mimic,
                       (IMAGES,)),
}
