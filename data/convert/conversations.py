"""Conversations as LLaVA and its kin publish them, and question-answer sets: VQAv2, ChartQA, MIMIC-IT.

`exchanges` makes conversations of several questions about one picture, so that it is stored and shown once.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from onevocab.common.errors import UserError
from onevocab.data.convert import tables
from onevocab.data.convert.media import check, from_base64
from onevocab.data.convert.samples import (
    Draft,
    Dropped,
    Format,
    Part,
    Row,
    exchanges,
    field_of,
    fill,
    id_of,
    list_of,
    text_of,
)

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SHORT = "Answer with a word, a number or a short phrase."


def conversation(messages, media: dict[str, list[list[Part]]]) -> list[tuple[str, list[Part]]]:
    """[{from, value}] or [{role, content}] -> turns; `<image>` in a text is where the next picture stands.

    media: by kind (image, audio, video), the parts of each file. What no text asks for comes before the first question.
    What is said before the first question, and questions that nobody answers, are left out. Raises Dropped on an empty
    question or answer, on a place without a medium, and where no answer is left.
    """
    waiting = {"image": [], **{kind: list(files) for kind, files in media.items()}}
    place = re.compile(rf"\s*<({'|'.join(waiting)})>\s*")
    turns: list[tuple[str, list[Part]]] = []
    for message in list_of(messages):
        role = ROLES.get(text_of(field_of(message, "from", "role")))
        if role is None:
            raise Dropped("bad record", f"a turn of {field_of(message, 'from', 'role')!r}")
        parts: list[Part] = []
        for i, piece in enumerate(place.split(_said(message, waiting.keys()))):
            if i % 2 == 0:
                parts += [piece.strip()] if piece.strip() else []
            elif waiting[piece]:
                parts += waiting[piece].pop(0)
            else:
                raise Dropped("missing media", f"more <{piece}> than files")
        if role == "assistant" and not parts:
            raise Dropped("empty answer")
        if parts or role == "user":
            turns.append((role, parts))
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    first = next((i for i, (role, _) in enumerate(turns) if role == "user"), None)
    if first is None:
        raise Dropped("empty answer", "no question that is answered")
    turns = [turn for turn in turns[:first] if turn[0] == "system"] + turns[first:]
    asked = next(parts for role, parts in turns if role == "user")
    asked[:0] = [part for files in waiting.values() for parts in files for part in parts]
    if not all(parts for _, parts in turns):
        raise Dropped("empty question")
    return turns


def _said(message, kinds) -> str:
    """A turn's text; parts ({type: text, text}, {type: image}) are written out, media as their places."""
    value = field_of(message, "value", "content")
    if not isinstance(value, list):
        return text_of(value)
    said = []
    for part in value:
        kind = text_of(field_of(part, "type"))
        if kind != "text" and kind not in kinds:
            raise Dropped("bad record", f"a part of type {kind!r}")
        said.append(text_of(field_of(part, "text")) if kind == "text" else f"<{kind}>")
    return "\n".join(said)


def media_of(options, record, *kinds: str) -> dict[str, list[list[Part]]]:
    """The files of a record: under `image` or `images` and so on, one or a list of them. Raises Dropped."""
    return {kind: [options.media.take(file) for file in list_of(field_of(record, kind, f"{kind}s")) if file]
            for kind in kinds}


# ------------------------------------------------------------------------------------------------ LLaVA


def _llava(options, name: str, record) -> Iterator[Draft]:
    said = field_of(record, "conversations", "messages")
    if not isinstance(said, list):
        raise Dropped("bad record", "no list of conversations")
    yield Draft(conversation(said, media_of(options, record, "image", "video")))


# ------------------------------------------------------------------------------------------------ VQAv2


def _answers_of(options, questions: Path) -> Path:
    """`v2_OpenEnded_mscoco_train2014_questions.json` -> `v2_mscoco_train2014_annotations.json`"""
    name = questions.name.replace("OpenEnded_", "").replace("questions", "annotations")
    path = options.annotations or questions.with_name(name)
    if path == questions or not path.is_file():
        raise UserError(f"no answers to {questions} at {path}: give their file by --annotations")
    return path


def _vqa_units(options) -> list[Path]:
    found = tables.files_of(options.source, (".json",), "*questions*")
    for path in found:
        _answers_of(options, path)
    return found


def common_answer(annotation: dict) -> str:
    """What most of the ten said; among as many, what the set calls `multiple_choice_answer`, then the first."""
    said = Counter(filter(None, (text_of(answer.get("answer")) for answer in list_of(annotation.get("answers"))
                                 if isinstance(answer, dict))))
    chosen = text_of(annotation.get("multiple_choice_answer"))
    most = max(said.values(), default=0)
    if not said or said[chosen] == most:
        return chosen
    return next(answer for answer, count in said.items() if count == most)


def _ask(asked: dict, about, question: str, answer: str) -> None:
    """Adds to {what the question is about: {(question, answer): None}}. Raises Dropped."""
    if not question or not answer:
        raise Dropped("empty answer" if question else "empty question")
    said = asked.setdefault(about, {})
    if (question, answer) in said:
        raise Dropped("duplicate", question)
    said[question, answer] = None


def _vqa_rows(options, unit: Path) -> Iterator[Row]:
    """Records are ({image_id, split}, [(question, answer)]): all about one picture."""
    whole = tables.document(unit)
    split = re.search(r"(train|val|test)\d{4}", f"{text_of(field_of(whole, 'data_subtype'))} {unit.name}")
    answers = {id_of(annotation, "question_id"): common_answer(annotation)
               for annotation in tables.objects(_answers_of(options, unit), "annotations")}
    asked: dict = {}
    for question in tables.objects(unit, "questions"):
        number = id_of(question, "question_id")
        try:
            _ask(asked, id_of(question, "image_id"), text_of(question.get("question")), answers.get(number, ""))
        except Dropped as dropped:
            yield f"{unit.name}#{number}", dropped
    for number, said in asked.items():
        yield f"{unit.name}#image-{number}", ({"image_id": number, "split": split[0] if split else ""}, list(said))


def _vqa(options, name: str, row) -> Iterator[Draft]:
    record, asked = row
    file = fill(options.file or "COCO_{split}_{image_id:012d}.jpg", record)
    parts = options.media.parts(file, f"{record['split']}/{file}")
    return exchanges(parts, asked, options.turns, SHORT)


# ------------------------------------------------------------------------------------------------ ChartQA


def _chart_units(options) -> list[Path]:
    """`annotations/` holds what is drawn in each chart, a JSON each."""
    return [path for path in tables.files_of(options.source, (".json",)) if path.parent.name != "annotations"]


def _chart_rows(options, unit: Path) -> Iterator[Row]:
    """Records are (picture, [(question, answer)])."""
    asked: dict[str, dict] = {}
    for name, record in tables.rows(unit):
        try:
            picture = text_of(field_of(record, "imgname"))
            if not picture:
                raise Dropped("bad record", "no imgname")
            _ask(asked, picture, text_of(field_of(record, "query")), text_of(field_of(record, "label")))
        except Dropped as dropped:
            yield name, dropped
    for picture, said in asked.items():
        yield f"{unit.name}#{picture}", (picture, list(said))


def _chart(options, name: str, row) -> Iterator[Draft]:
    picture, asked = row
    return exchanges(options.media.parts(picture, f"png/{picture}"), asked, options.turns, SHORT)


# ------------------------------------------------------------------------------------------------ MIMIC-IT


def _pictures_of(options, instructions: Path) -> Path:
    """`LA/LADD_instructions.json` -> `LA/LA.json`"""
    path = options.images or instructions.with_name(f"{instructions.resolve().parent.name}.json")
    if not path.is_file():
        raise UserError(f"no base64 pictures to {instructions} at {path}: give their JSON by --images")
    return path


def _mimic_units(options) -> list[Path]:
    found = tables.files_of(options.source, (".json",), "*instructions*")
    for path in found:
        _pictures_of(options, path)
    return found


def _mimic_rows(options, unit: Path) -> Iterator[Row]:
    data = field_of(tables.document(unit), "data")
    if not isinstance(data, dict):
        raise Dropped("damaged input", f"{unit.name} has no object 'data'")
    pictures = _pictures_of(options, unit)
    return ((f"{unit.name}#{number}", (pictures, record)) for number, record in data.items())


def _mimic(options, name: str, row) -> Iterator[Draft]:
    store, record = row
    known, parts = tables.document(store), []
    for number in list_of(field_of(record, "image_ids")):
        held = known.get(number) if isinstance(known, dict) and isinstance(number, str) else None
        if not isinstance(held, str):
            raise Dropped("missing media", f"no picture {number} in {store.name}")
        parts.append([check(from_base64(held), "")])
    said = [{"from": "human", "value": field_of(record, "instruction")},
            {"from": "gpt", "value": field_of(record, "answer")}]
    yield Draft(conversation(said, {"image": parts}))


FORMATS = {
    "llava": Format("JSON of id, image and conversations (LLaVA, StableLLaVA, ALLaVA, LVIS-Instruct4V, ShareGPT4V)",
                    tables.units_of(".json", *tables.LINES), tables.rows_of, _llava, ("media", "frames")),
    "vqav2": Format("JSON of questions, beside that of annotations; those about one picture become one conversation",
                    _vqa_units, _vqa_rows, _vqa, ("media", "annotations", "file", "turns")),
    "chartqa": Format("JSON of imgname, query and label, beside png/", _chart_units, _chart_rows, _chart,
                      ("media", "turns")),
    "mimic-it": Format("JSON of instructions and JSON of base64 pictures", _mimic_units, _mimic_rows, _mimic,
                       ("images",)),
}
