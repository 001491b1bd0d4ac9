"""Tasks that are not the demo's, and models that lack a modality: rows, null rows and a page, never a traceback."""

import json

import pytest
from tiny import save_step, tiny_run, tiny_tokenizers

from onevocab.common.errors import UserError
from onevocab.demo import speech, speech_judge
from onevocab.evaluation.__main__ import evaluate, main
from onevocab.evaluation.config import EvaluateConfig
from onevocab.tokenizers.bundle import Tokenizers

QUICK = {"judge_steps": 20, "malformed": 8, "candidates": 4}
OWN = '''
from PIL import Image
from onevocab.tasks import Metric, Section, Task, Wordings

WORDINGS = Wordings(("Which <b>colour</b>?", "What colour is it?", "Name the colour.", "Say the colour."))
COLOURS = ("red", "green", "blue")

class Colour(Task):
    name, media, wordings, section = "colour", ("image",), (WORDINGS,), Section("<script>Colours", "Of </p> pictures.")
    controls = {"large": "large pictures"}
    metrics = (Metric("colour", "right", lambda answer, reply: (int(answer["text"] == reply), 1)),)

    def example(self, rng, split, wording):
        colour = COLOURS[int(rng.integers(3))]
        picture = Image.new("RGB", (32, 32) if split == "large" else (16, 16), colour)
        return [("user", [picture, WORDINGS.pick(rng, wording)]), ("assistant", [colour])]

class Paint(Task):
    name, media, want, gallery = "paint", ("image",), "image", True
    metrics = (Metric("paint", "right corner", lambda answer, drawn: (
        int(drawn is not None and drawn.getpixel((0, 0)) == answer["image"].getpixel((0, 0))), 1)),)

    def example(self, rng, split, wording):
        colour = COLOURS[int(rng.integers(3))]
        return [("user", [colour]), ("assistant", [Image.new("RGB", (16, 16), colour)])]

TASKS = (Paint(), Colour())
'''


def run_with(folder, *media: str):
    """A run of an untrained model that knows these media."""
    whole = tiny_tokenizers()
    tokenizers = Tokenizers(whole.text, {name: whole.media[name] for name in media})
    tokenizers.save(folder / "tokenizers")
    save_step(folder / "instruct", 10, tokenizers.vocab, max_length=400)
    return folder


def test_tasks_of_ones_own_are_named_in_the_configuration(tmp_path, monkeypatch, capsys):
    (tmp_path / "colour_tasks.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    run = tiny_run(tmp_path / "run", max_length=400)
    (run / "config.toml").write_text('[evaluate]\ntasks = "colour_tasks"\nmalformed = 8\n')
    main([str(run), "--limit", "4"])
    assert "large pictures" in capsys.readouterr().out
    report = json.loads((run / "report" / "report.json").read_text())
    rows = {(row["task"], row["split"]): row for row in report["results"]}
    assert list(rows)[:4] == [("paint", "held-out examples"), ("colour", "held-out examples"),
                              ("colour", "held-out examples, media shuffled"), ("colour", "large pictures")]
    assert {task for task, _ in list(rows)[4:]} == {"held_out_wordings", "chosen_answers", "malformed_outputs"}
    assert all(row["n"] == 4 for row in list(rows.values())[:4]) and rows["colour", "large pictures"]["value"] == 0
    assert 0 < rows["colour", "held-out examples"]["chance"] < 1
    page = (run / "report" / "index.html").read_text()
    assert "<script" not in page and "<b>colour" not in page and "&lt;script&gt;Colours" in page
    assert len(list((run / "report" / "examples").glob("image-*.png"))) == 0, "the first task's prompts are words"
    assert (run / "report" / "gallery.png").exists()


@pytest.mark.parametrize("media", [("image",), ("audio",)], ids=str)
def test_what_a_model_lacks_is_null_with_the_reason(media, tmp_path):
    if media == ("audio",) and not (speech.available() and speech_judge.available()):
        pytest.skip("all that could be asked needs the speech extras")
    run = run_with(tmp_path / "run", *media)
    report = evaluate(run, EvaluateConfig(**QUICK), limit=2, quiet=True)
    lacking, = {"image", "audio"} - {*media}
    values = {}
    for row in report["results"]:
        values.setdefault(row["task"], []).append(row["value"])
    null = {"audio": {"speech_recognition", "text_to_speech", "spoken_question", "image_to_speech", "speech_to_image",
                      "audio_reconstruction_judge"},
            "image": {"caption_objects", "caption_positions", "vqa", "detection", "text_to_image_objects",
                      "text_to_image_background", "image_edit", "spoken_question", "image_to_speech", "speech_to_image",
                      "image_reconstruction_psnr"}}[lacking]
    assert {task for task, found in values.items() if found == [None] * len(found)} >= null
    answered = {"image": "vqa", "audio": "text_to_speech"}[media[0]]
    assert None not in values[answered] and values["malformed_outputs"] == [0]
    assert f"hear: this model has no {lacking}" in report["notes"] or lacking == "image"
    assert f"spoken_question: this model has no {lacking}" in report["notes"]
    assert (run / "report" / "index.html").stat().st_size > 1000


def test_a_model_that_nothing_can_be_asked_of_is_one_line(tmp_path):
    with pytest.raises(UserError, match="nothing could be asked.*this model has no image"):
        evaluate(run_with(tmp_path / "run"), EvaluateConfig(**QUICK), limit=2, quiet=True)
    with pytest.raises(UserError, match="no module no_such_tasks"):
        evaluate(tmp_path / "run", EvaluateConfig(tasks="no_such_tasks"), quiet=True)
