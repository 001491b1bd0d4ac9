"""The evaluation: intervals and scorers against references, judges on what they should and should not recognise, and
the whole of it on a model that always answers right and on one that knows nothing."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_run, tiny_tokenizers

from onevocab.common.errors import UserError
from onevocab.demo import picture_judge, speech, speech_judge, world
from onevocab.demo.conditions import CONDITIONS
from onevocab.demo.names import READER
from onevocab.demo.picture_judge import PictureJudge
from onevocab.demo.world import Scene, SceneObject
from onevocab.evaluation import metrics, suite
from onevocab.evaluation.__main__ import evaluate, main
from onevocab.evaluation.config import EvaluateConfig
from onevocab.evaluation.evaluator import Evaluator, parts_of, shuffled_media
from onevocab.evaluation.form import malformed
from onevocab.generation.anytoany import Reply
from onevocab.tasks import Task, load_tasks
from onevocab.tokenizers.audio_tokenizer import AudioConfig, AudioTokenizer

needs_ears = pytest.mark.skipif(not (speech.available() and speech_judge.available()), reason="speech extras missing")
FAST = EvaluateConfig(judge_steps=120, malformed=40, candidates=20)
DEMO = load_tasks("onevocab.demo.tasks")
ORDER = ("caption_objects", "caption_positions", "vqa", "detection", "several_pictures", "text_to_image_objects",
         "text_to_image_background", "image_edit", "speech_recognition", "names_heard", "text_to_speech",
         "spoken_question", "image_to_speech", "speech_to_image", "held_out_wordings", "chosen_answers",
         "malformed_outputs", "image_reconstruction_psnr", "audio_reconstruction_judge")


def evaluation_items(name: str, *arguments) -> list:
    task, = (task for task in DEMO.tasks if task.name == name)
    return task.items(*arguments)


def prompt_text(item) -> str:
    return " ".join(part for part in parts_of(item) if isinstance(part, str))


def pictures_of(item) -> list:
    return [part for part in parts_of(item) if isinstance(part, Image.Image)]


# Metrics.


def test_wilson_is_the_published_interval():
    low, high = metrics.wilson(8, 10)  # Agresti & Coull 1998 and every table: 0.490 to 0.943
    assert (round(low, 3), round(high, 3)) == (0.49, 0.943)
    assert metrics.wilson(0, 100)[0] == 0 and metrics.wilson(0, 0) == (0, 1)


def test_bootstrap_of_right_and_wrong_items_is_near_wilson():
    got = np.r_[np.ones(70), np.zeros(30)]
    assert metrics.bootstrap(got, np.ones(100)) == pytest.approx(metrics.wilson(70, 100), abs=0.02)


def test_a_row_leaves_out_items_in_which_nothing_was_possible():
    row = metrics.row("caption_positions", "test", "m", [(1, 2), (0, 0), (2, 2)], chance=[(0, 1)], original=1.0)
    assert (row["value"], row["n"], row["chance"], row["ceiling_tokenizer"]) == (0.75, 2, 0.0, None)
    assert metrics.row("t", "s", "m", None)["value"] is None


words = st.lists(st.sampled_from("dog cat red is where".split()), max_size=6)


@given(words, words)
def test_word_score_counts_edits(want, said):
    def edits(a, b):  # the definition, recursively
        if not a or not b:
            return len(a) + len(b)
        return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))

    expected = max(0, len(want) - edits(want, said)), len(want)
    assert metrics.word_score(" ".join(want), " ".join(said)) == expected


@pytest.mark.parametrize("text,pairs", [
    ("A dog at the top left and two stars at the bottom right on a blue background", [("dog", 0), ("star", 3)]),
    ("top left: dog; top right: blue star; background: red", [("dog", 0), ("star", 1)]),
    ("stars at the top left and at the top right", [("star", 0), ("star", 1)]),
    ("a hotdog at the top left", []),
    ("nothing", []),
])
def test_names_and_places_are_read_from_text(text, pairs):
    assert READER.placed(text) == pairs


def test_detection_needs_name_and_overlap_and_counts_extras():
    want = [("dog", (0, 0, 40, 40)), ("cat", (50, 50, 90, 90))]
    assert metrics.iou((0, 0, 9, 9), (0, 0, 9, 9)) == 1 and metrics.iou((0, 0, 9, 9), (20, 20, 30, 30)) == 0
    assert metrics.detection_score(want, READER.boxes("dog 00 00 40 44; cat 10 10 20 20")) == (1, 2)
    assert metrics.detection_score(want, [*want, ("owl", (0, 0, 9, 9))]) == (2, 3)
    assert metrics.detection_score(want, [want[0], want[0]]) == (1, 2)


# Items.


def test_items_are_held_out_and_the_same_scenes_in_every_split():
    for task in ("caption", "vqa", "detection", "draw"):
        items = {split: evaluation_items(task, split, 12, 0) for split in ("test", "wordings", "style")}
        for one, worded, styled in zip(*items.values(), strict=True):
            assert world.held_out(one.answer["scene"])
            assert one.answer == worded.answer == styled.answer
            assert prompt_text(one) == prompt_text(styled)
    assert any(prompt_text(a) != prompt_text(b) for a, b in zip(items["test"], items["wordings"],
                                                                           strict=True))
    pictures = [pictures_of(evaluation_items("vqa", split, 1, 0)[0])[0] for split in ("test", "style")]
    assert np.abs(np.asarray(pictures[0], int) - np.asarray(pictures[1], int)).mean() > 1


def test_captions_go_through_at_least_100_names():
    items = evaluation_items("caption", "test", EvaluateConfig().captions, 0)
    assert len({thing.name for item in items for thing in item.answer["scene"].objects}) == len(world.NAMES) >= 100


def test_shuffling_leaves_nobody_their_own_media():
    items = evaluation_items("edit", "test", 5, 0)
    for item, shuffled in zip(items, shuffled_media(items), strict=True):
        assert prompt_text(item) == prompt_text(shuffled)
        assert not np.array_equal(*(np.asarray(pictures_of(x)[0]) for x in (item, shuffled)))


# Judges.


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("judge")


@pytest.fixture(scope="module")
def judge(folder) -> PictureJudge:
    return PictureJudge.of(folder, FAST.judge_steps)


def read_shares(judge, pictures, labels):
    """(share of objects named right, share of objects named wrong)"""
    found = [name for reading in judge.read(pictures) for name in reading.cells]
    want = [world.NAMES[k] if k < len(world.NAMES) else None for k in labels.reshape(-1)]
    things = [(a, b) for a, b in zip(found, want, strict=True) if b is not None]
    return (np.mean([a == b for a, b in things]), np.mean([a is not None and a != b for a, b in things]))


def test_the_picture_judge_reads_scenes_and_says_none_of_these(judge):
    arrays, labels = picture_judge.training_scenes(100, np.random.default_rng(123))
    pictures = [Image.fromarray(array) for array in arrays]
    right, wrong = read_shares(judge, pictures, labels)
    assert right > 0.9 and wrong < 0.05
    soft = [picture.resize((32, 32)).resize((64, 64)) for picture in pictures]
    assert read_shares(judge, soft, labels)[0] > 0.85
    rng = np.random.default_rng(1)
    blank = Image.new("RGB", (64, 64), world.BACKGROUNDS["blue"])
    noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8))
    assert judge.read([blank])[0].names == [] and judge.read([noise])[0].names == []
    blocks = arrays.reshape(-1, 8, 8, 8, 8, 3).swapaxes(2, 3).reshape(-1, 64, 8, 8, 3)[:, rng.permutation(64)]
    blocks = blocks.reshape(-1, 8, 8, 8, 8, 3).swapaxes(2, 3).reshape(-1, 64, 64, 3)
    scrambled = [name for reading in judge.read([Image.fromarray(b) for b in blocks]) for name in reading.cells]
    assert np.mean([name is not None for name in scrambled]) < 0.1


def test_backgrounds_are_told_apart_and_others_refused(judge):
    for name in world.BACKGROUNDS:
        assert judge.read([world.picture(Scene(name, (SceneObject("dog", 2),)))])[0].background == name
    assert judge.read([Image.new("RGB", (64, 64), (0, 255, 255))])[0].background is None


def test_the_picture_judge_is_cached_and_a_broken_cache_is_made_again(judge, folder, monkeypatch):
    monkeypatch.setattr(picture_judge, "train_cells", lambda *a: pytest.fail("trained again"))
    again = PictureJudge.of(folder, FAST.judge_steps)
    cells = np.zeros((1, 32, 32, 3), np.uint8)
    assert np.array_equal(again.probabilities(cells), judge.probabilities(cells))
    monkeypatch.setattr(picture_judge, "train_cells", lambda *a: judge.network)
    assert PictureJudge.key(FAST.judge_steps, 0) != PictureJudge.key(FAST.judge_steps + 1, 0)
    path, = folder.glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    PictureJudge.of(folder, FAST.judge_steps)
    assert path.read_bytes() == whole


@needs_ears
def test_the_speech_judge_hears_words_and_says_none_of_these():
    ear = speech_judge.SpeechJudge()
    names = [name for name in world.NAMES if ear.knows(name)]
    assert len(names) > 90 and not ear.knows("zqxv") and not ear.knows("")
    right = wrong = 0
    for i, name in enumerate(names[:40]):
        choice = speech_judge.candidates(name, names, 20, 0)
        assert len(choice) == 20 and choice.count(name) == 1
        assert choice == speech_judge.candidates(name, names[::-1], 20, 0)
        heard = ear.hear(speech.speak(name, speech.TEST_VOICES[i % 3]), speech.RATE, choice)
        right, wrong = right + (heard == name), wrong + (heard not in (name, None))
    assert right >= 34 and wrong <= 4
    assert ear.hear(np.zeros(16_000, np.float32), 16_000, names[:20]) is None
    assert ear.hear(np.zeros(0, np.float32), 16_000, names[:20]) is None
    sentence = "where is the dog"
    heard = ear.hear(speech.speak(sentence), 16_000, [f"{sentence}?", "how many objects are there?", "what is it"])
    assert heard == f"{sentence}?"
    with pytest.raises(UserError, match="16 kHz"):
        ear.hear(np.zeros(10, np.float32), 8000, names[:20])


# The whole.


class Oracle:
    """Answers what it is asked about the items it was told of; anything else with nonsense."""

    class Lossless:
        encode_batch = staticmethod(lambda sources: sources)
        decode_batch = staticmethod(lambda codes: codes)

    def __init__(self):
        self.items = {}
        self.vocab = tiny_tokenizers().vocab
        self.tokenizers = SimpleNamespace(media={"image": self.Lossless, "audio": self.Lossless})

    def listen(self, monkeypatch) -> None:
        """From now on it knows the items that any task makes."""
        make = Task.items

        def told(task, *arguments):
            items = make(task, *arguments)
            self.items |= {id(item.messages): item for item in items}
            return items

        monkeypatch.setattr(Task, "items", told)

    def generate_batch(self, prompts, want, **_):
        return [self.reply(self.items.get(id(prompt)), want) for prompt in prompts]

    def reply(self, item, want):
        want = item.want if item and want == "any" else want
        if item is None or want != item.want:
            return Reply(text="no idea", ids=[1])
        if want == "text":
            return Reply(text=item.answer["text"], ids=[1])
        if want == "image":
            return Reply(media={"image": [world.picture(item.answer["scene"])]}, ids=[1])
        return Reply(media={"audio": [(speech.speak(item.answer["say"]), speech.RATE)]}, ids=[1])


@needs_ears
def test_a_model_that_is_always_right_scores_one_and_shuffled_media_nothing(judge, folder, monkeypatch):
    oracle = Oracle()
    oracle.listen(monkeypatch)
    evaluator = Evaluator(oracle, DEMO, FAST, folder, limit=14)
    suite.run(evaluator, quiet=True)
    assert tuple(dict.fromkeys(row["task"] for row in evaluator.rows)) == ORDER
    for row in evaluator.rows:
        assert list(row) == ["task", "split", "metric", "value", "interval", "chance", "ceiling_original",
                             "ceiling_tokenizer", "n"]
        if row["task"] in ("malformed_outputs", "image_reconstruction_psnr") or "Flite" in row["split"]:
            continue  # Flite may not be installed
        if "shuffled" in row["split"]:
            assert row["value"] == 0, row
            continue
        judged = any(word in row["metric"] for word in ("drawn", "edited", "heard", "mean over"))
        assert row["value"] >= (0.7 if judged and ": " not in row["metric"] else 0.3 if judged else 1.0), row
        assert row["interval"] is None or row["interval"][0] <= row["value"] <= row["interval"][1], row
        assert row["n"] < 10 or row["chance"] is None or row["chance"] < 0.7, row
    assert len(evaluator.drawings) == 14 and len(next(iter(evaluator.session.candidates.values()))) <= 20


def test_a_model_that_never_draws_chooses_wrong_wherever_a_picture_is_asked_for(judge, folder, monkeypatch):
    oracle = Oracle()
    oracle.listen(monkeypatch)
    draws = oracle.reply
    monkeypatch.setattr(oracle, "reply", lambda item, want: Reply(text="a dog", ids=[1]) if want == "any" else draws(
        item, want))
    drawing = [task for task in DEMO.tasks if task.name in ("draw", "caption")]
    evaluator = Evaluator(oracle, DEMO._replace(tasks=tuple(drawing)), FAST, folder, limit=2)
    for task in drawing:
        evaluator.answered[task.name] = True
    suite.chosen_answers(evaluator)
    rows = {row["metric"]: row["value"] for row in evaluator.rows if row["split"] == suite.HELD_OUT_WORDINGS}
    assert rows == {"image where image is asked for": 0, "text where text is asked for": 1}
    assert evaluator.rows[-1]["value"] == 0 and "draw: " in evaluator.notes[-1]


@pytest.mark.parametrize("split", CONDITIONS)
def test_recordings_under_every_condition_are_sounds_that_the_tokenizer_takes(split):
    clip = (0.7 * np.sin(np.arange(speech.RATE) / 5) * np.hanning(speech.RATE)).astype(np.float32)
    samples, rate = CONDITIONS[split][1](clip)
    mono = AudioTokenizer(AudioConfig()).read((samples, rate))
    assert 0.8 * speech.RATE < len(mono) < 1.4 * speech.RATE, "silence is cut"
    assert np.abs(mono).max() > 0.05


def test_a_malformed_reply_is_seen():
    vocabulary = tiny_tokenizers().vocab
    image, audio = (vocabulary.spans[name].wrap(np.zeros(shape, int)).tolist() for name, shape in
                    (("image", (4, 4)), ("audio", (3, 2))))
    end = [vocabulary.end_of_turn]
    assert malformed([1, 2, *image, 3, *audio, *end], vocabulary, "any") is None
    assert malformed([*image, *end], vocabulary, "image") is None and malformed([*audio], vocabulary, "audio") is None
    for ids, want in [(image[:-1] + end, "image"), (image[:-2] + image[-1:] + end, "image"),
                      (audio[:-2] + audio[-1:], "any"),
                      ([1, *end, 1], "text"), ([vocabulary.user], "any"), ([*image, *end], "text"), ([1], "image"),
                      ([*image, *image], "image"), ([image[-1]], "any"), (image[:2], "any")]:
        assert malformed(ids, vocabulary, want), (ids, want)


def test_an_untrained_run_gets_a_report(tmp_path, judge, folder, monkeypatch, capsys):
    run = tiny_run(tmp_path / "run", max_length=400)
    lines = ['{"stage": "pretrain", "step": 1, "loss": 3.5}', '{"stage": "pretrain", "step": 2, "loss": 3.1}', "broken"]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    (run / "config.toml").write_text("[evaluate]\njudge_steps = 120\nmalformed = 40\n")
    (run / "instruct" / "done.json").write_text('{"seconds": 12.5}')
    (run / "report").mkdir()
    for path in folder.glob("*.safetensors"):
        (run / "report" / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(picture_judge, "train_cells", lambda *a: pytest.fail("the cached judge was not used"))
    main([str(run), "--limit", "3"])
    printed = capsys.readouterr().out
    assert "caption_objects" in printed and str(run / "report" / "index.html") in printed
    report = json.loads((run / "report" / "report.json").read_text())
    assert {"device", "versions", "config", "seconds", "results"} <= set(report)
    assert report["seconds"]["instruct"] == 12.5
    rows = {row["task"]: row for row in report["results"]}
    assert set(rows) == set(ORDER)
    assert rows["malformed_outputs"]["value"] == 0 and rows["malformed_outputs"]["n"] == 3
    page = (run / "report" / "index.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', page), "the page must not need other files"
    assert page.count("data:image/png") > 10 and "<script" not in page
    assert Image.open(run / "report" / "gallery.png").size[0] > 600


def test_without_the_speech_extras_sound_is_null_with_the_reason(judge, folder, monkeypatch):
    def refuse():
        raise UserError("speech needs eSpeak NG")

    oracle = Oracle()
    oracle.listen(monkeypatch)
    monkeypatch.setattr(speech, "_engine", refuse)
    monkeypatch.setattr(speech_judge, "available", lambda: False)
    evaluator = Evaluator(oracle, DEMO, FAST, folder, limit=3)
    suite.run(evaluator, quiet=True)
    values = {row["task"]: row["value"] for row in evaluator.rows if "shuffled" not in row["split"]}
    sound = ("speech_recognition", "text_to_speech", "spoken_question", "image_to_speech", "speech_to_image",
             "audio_reconstruction_judge")
    assert all(values[task] is None for task in sound) and values["caption_objects"] == 1
    assert any("eSpeak" in note for note in evaluator.notes) and any("pocketsphinx" in n for n in evaluator.notes)


def test_a_missing_run_and_a_bad_limit_are_one_line(tmp_path, capsys):
    for arguments in ([str(tmp_path / "none")], [str(tmp_path), "--limit", "0"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(UserError, match="none"):
        evaluate(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    names = ("caption", "vqa", "detection", "several_pictures", "draw", "edit", "hear", "hear_anyhow", "say",
             "spoken_question", "say_seen", "draw_heard")
    assert tuple(task.name for task in DEMO.tasks if task.metrics) == names
