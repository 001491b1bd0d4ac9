"""Converters of conversations and of questions with answers."""

import base64
import gzip
import json

import pytest
from layouts import AB, as_lines, converted, jpg, llava, lost, put, records, talk
from samples import png

from onevocab.data.convert.conversations import SHORT

DOG = "<image>\nWhat is it?", "A dog.", "Colour?", "red"
CHARTS = records("imgname query label", ("1.png", "Which?", "Blue"), ("2.png", "?", ""), ("1.png", "How much?", 3.5),
                 ("1.png", "Which?", "Blue"))
QUESTIONS = records("question_id image_id question", (90, 9, "What is it?"), (91, 9, "Is it?"), (92, 9, "Empty?"),
                    (93, 9, "What is it?"), (94, 10, "No file?"), (95, 9, "Nobody?"), (96, 9, "How many?"), (97, 9, ""))
ANSWERS = [{"question_id": number, "multiple_choice_answer": chosen, "answers": [
    {"answer": said[i % len(said)], "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)]}
    for number, said, chosen in [(90, ["dog", "cat", "dog"], ""), (91, ["yes", "no"], "no"), (92, [""], ""),
                                 (93, ["dog"], ""), (94, ["x"], ""), (96, ["2", "two", "", "2"], ""), (97, ["x"], "")]]
BASE64 = {"P1": base64.urlsafe_b64encode(png(1)).decode().rstrip("="), "P3": "%%%",
          "P2": "data:image/jpeg;base64," + base64.b64encode(jpg(2)).decode()}
INSTRUCTIONS = records("instruction answer image_ids rel_ins_ids", ("Differ?", "Yes.", ["P1", "P2"], ["I1"]),
                       ("q", "", ["P1"], []), ("q", "a", ["P3"], []), ("q", "a", ["P4"], []))
VQA = {"v2_OpenEnded_mscoco_train2014_questions.json": {"questions": records(
    "question_id image_id question", (90, "9", "What?"), (91, "9", "Is it?"))},
    "v2_mscoco_train2014_annotations.json": {"annotations": [
        {"question_id": 90, "multiple_choice_answer": "cat", "answers": [{"answer": "dog"}] * 10},
        {"question_id": 91, "multiple_choice_answer": "", "answers": [{"answer": "no"}, *[{"answer": "yes"}] * 2]}]},
    "v2_OpenEnded_mscoco_test2015_questions.json": {"questions": []}, "COCO_train2014_000000000009.jpg": jpg(9)}
CHART = records("imgname query label", ("1.png", "?", "x"))

# format, files, options, what the shards say, what is dropped or left out
CASES = {
    "llava": ("llava", {"coco/1.png": png(1), "2.png": png(2), "data.json": [
        llava("coco/1.png", *DOG), llava("coco/1.png", "What?\n<image>", "Dog"), llava(None, "Hi é", "Hello 漢字"),
        llava(["coco/1.png", "2.png"], "Compare <image> with <image>.", "Same."), llava("2.png", "<image>", "A cat"),
        llava("/data/coco/1.png", "No place", "ok"), llava("2.png", "before", "q?", "a", "nobody answers", first=1),
        llava("gone.png", "<image>\nq", "a"), llava("2.png", "<image>\nq", " "), llava(None, "<image>\nq", "a"),
        llava("coco/1.png", *DOG) | {"id": "2"}, 3, llava(None, " ", "a"), {"conversations": None},
        {"conversations": [{"from": "root", "value": "q"}]}]},
     {}, [talk([png(1), "What is it?"], "A dog.", "Colour?", "red"), talk(["What?", png(1)], "Dog"),
          talk("Hi é", "Hello 漢字"), talk(["Compare", png(1), "with", png(2), "."], "Same."), talk([png(2)], "A cat"),
          talk([png(1), "No place"], "ok"), talk([png(2), "q?"], "a")],
     {"missing media": 2, "empty answer": 1, "duplicate": 1, "bad record": 3, "empty question": 1}),
    "vqav2":
    ("vqav2", {"v2_OpenEnded_mscoco_train2014_questions.json": {"data_subtype": "train2014", "questions": QUESTIONS},
               "v2_mscoco_train2014_annotations.json": {"annotations": ANSWERS},
               "train2014/COCO_train2014_000000000009.jpg": jpg(9)},
     {"turns": 2}, [talk([jpg(9), f"What is it? {SHORT}"], "dog", "Is it?", "no"),
                    talk([jpg(9), f"How many? {SHORT}"], "2")],
     {"empty answer": 2, "duplicate": 1, "missing media": 1, "empty question": 1}),
    "chartqa":
    ("chartqa", {"train_human.json": [*CHARTS, {"query": "?"}], "annotations/1.json": {}, "png/1.png": png(1)},
     {}, [talk([png(1), f"Which? {SHORT}"], "Blue", "How much?", "3.5")],
     {"empty answer": 1, "bad record": 1, "duplicate": 1}),
    "mimic-it": ("mimic-it", {"LA/LA.json": BASE64, "LA/LADD_instructions.json": {
        "meta": {}, "data": {f"I{i}": record for i, record in enumerate(INSTRUCTIONS)}}},
     {}, [talk([png(1), jpg(2), "Differ?"], "Yes.")], {"empty answer": 1, "unreadable media": 1, "missing media": 1}),
    "pictures without a place": ("llava", AB | {"d.json": [
        llava(["a.png", "b.png"], "<image> Why?", "So."), llava(["a.png", "b.png"], "Why?", "So."),
        llava(["a.png", "b.png"], "Hm", "<image>", "Why?", "So."), llava(["a.png", "b.png"], "Q", "A", "<image>")]},
        {}, [talk([png(0), png(1), "Why?"], "So.")]
        + [talk("Hm", [png(0), png(1)], "Why?", "So."), talk([png(1), "Q"], "A")], {"duplicate": 1}),
    "a picture before the first question": ("llava", AB | {"d.json": [
        llava("a.png", "Look: <image>", "Why?", "So.", first=1), llava(["a.png", "b.png"], "", "<image>", "Why?", "So.")
    ]}, {}, [talk([png(0), "Why?"], "So.")], {"empty question": 1}),
    "an empty answer": ("llava", {"d.json": [
        llava(None, "Why?", "So.", "And?", " "), llava(None, "Why?", "", "And?", "B")]},
                        {}, [talk("Why?", "So.")], {"empty answer": 1}),
    "tags in a text": ("llava", {"d.json": [llava(None, "What does <image> do in\r\nSVG, <video>?", "It shows a file."),
                                            llava(None, "<image>\nWhat?", "A"), llava(None, "What?\n<image>", "A")]},
                       {}, [talk("What does <image> do in\nSVG, <video>?", "It shows a file.")], {"missing media": 2}),
    "LRV": ("llava", {"7.jpg": jpg(7), "8.png": png(8), "d.json": records(
        "image_id question answer task", ("7", "Why?", "So.", "t"), ("8.png", "Why?", "So.", "t"), (6, "?", "x", "t"))},
        {}, [talk([jpg(7), "Why?"], "So."), talk([png(8), "Why?"], "So.")], {"missing media": 1}),
    "StableLLaVA": ("llava", AB | {"d.json": records("id image prompt question answer",
                                                     (1, "a.png", "a red dog", "Why?", "So."))},
                    {}, [talk([png(0), "Why?"], "So.")], {}),
    "splits of charts": ("chartqa", {f"{split}/h.json": CHART for split in ("train", "val")} | {
        "train/png/1.png": png(1), "val/png/1.png": png(2)},
                         {}, [talk([png(1), f"? {SHORT}"], "x"), talk([png(2), f"? {SHORT}"], "x")], {}),
    "questions without answers": ("vqav2", VQA, {}, [talk([jpg(9), f"What? {SHORT}"], "cat", "Is it?", "yes")],
                                  {"missing answers": 1}),
    "a compressed list": ("llava", {
        "d.json.gz": gzip.compress(json.dumps([llava(None, "Why?", "So.")], indent=1).encode()),
        "e.json.gz": gzip.compress(as_lines(llava(None, "What?", "A")).encode()),
        "f.json.gz": gzip.compress(b"[{}, ")},
                          {}, [talk("Why?", "So."), talk("What?", "A")], {"damaged input": 1}),
}


@pytest.mark.parametrize("name, files, options, expected, dropped", CASES.values(), ids=CASES)
def test_layouts(tmp_path, name, files, options, expected, dropped):
    report, samples = converted(name, put(tmp_path / "in", files), tmp_path / "out", **options)
    assert samples == expected and lost(report) == dropped


def test_a_picture_shown_twice_is_stored_once(tmp_path):
    """By its bytes: under two names too. Beside another one, it is the same sample's other file."""
    source = put(tmp_path / "in", AB | {"c.png": png(0), "d.json": [
        llava(["a.png", "b.png", "c.png"], "<image> or <image>?", "The first.", "<image>", "So it is.")]}) / "d.json"
    report, samples = converted("llava", source, tmp_path / "out")
    assert samples == [talk([png(0), "or", png(1), "?"], "The first.", [png(0)], "So it is.")]
    assert report.media == {"image": 2} and report.bytes < 3 * len(png(0))
