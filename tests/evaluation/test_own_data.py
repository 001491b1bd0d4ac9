"""A run without tasks of its own is asked about its held-out samples: any media, never a traceback."""

import io
import json
import tomllib

import numpy as np
import pytest
from PIL import Image
from samples import as_json, image, say, text
from test_own_tasks import run_with

from onevocab.common.errors import UserError
from onevocab.data.codes import tokenize_shards
from onevocab.data.shards.writer import ShardWriter
from onevocab.evaluation import metrics
from onevocab.evaluation.__main__ import main
from onevocab.evaluation.own_data import read_held_out, task_module
from onevocab.generation import AnyToAny
from onevocab.tokenizers.bundle import Tokenizers
from onevocab.tokenizers.media import encode_audio, encode_png

COLOURS = ("red", "green", "blue", "white", "black", "grey")
CONFIG = """
[data]
shards = ["raw"]
[instruct]
sources = [{ path = "codes/*.tar", valid = 0.4 }]
loader = { seq_len = 256 }
[evaluate]
malformed = 8
"""


def picture(i: int) -> bytes:
    return encode_png(Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)))


def sound(i: int) -> bytes:
    return encode_audio(np.random.default_rng(i).normal(0, 0.02 * (i + 1), 3000 + 400 * i), 16000)


def own_run(folder, samples, *media: str):
    run_with(folder, *media)
    with ShardWriter(folder / "raw", "s", 20) as writer:
        for i, members in enumerate(samples):
            writer.write(f"{i:05d}", members)
    tokenize_shards(folder / "raw", folder / "codes", Tokenizers.load(folder / "tokenizers"), progress=False)
    (folder / "config.toml").write_text(CONFIG)
    return folder


def evaluated(run, capsys) -> dict:
    main([str(run), "--limit", "6"])
    capsys.readouterr()
    report = json.loads((run / "report" / "report.json").read_text())
    return {(row["task"], row["metric"]): row for row in report["results"]} | {"notes": report["notes"]}


def pairs(n: int):
    """Each picture twice, with two captions."""
    return [{"png": picture(i // 2), "txt": f"{COLOURS[i % 6]} noise number {i}".encode()} for i in range(n)]


def test_pictures_with_captions_and_no_sound(tmp_path, capsys):
    run = own_run(tmp_path / "run", pairs(40), "image")
    found = evaluated(run, capsys)
    for metric in ("exact match", "words shared (F1)", "ROUGE-L"):
        row = found["describe_image", metric]
        assert row["n"] >= 4 and 0 <= row["value"] <= 1 and row["chance"] is not None
    # Each held-out caption shares "noise number" with the others: chance is what that alone gives.
    assert 0.3 < found["describe_image", "words shared (F1)"]["chance"] < 0.9
    assert found["make_image", "replies that hold one"]["value"] == 1.0  # it was wanted
    assert 0 < found["image_reconstruction_psnr", "dB of the tokenizer's input, mean"]["value"] < 60
    assert found["held_out_loss", "nats a token of text"]["n"] > 6
    assert {"nats a token of image", "nats a token of text"} == {m for t, m in found.keys() - {"notes"}
                                                                if t == "held_out_loss"}
    assert not any("audio" in task for task, _ in found.keys() - {"notes"})
    page = (run / "report" / "index.html").read_text()
    assert "Descriptions of pictures" in page and "Made from words: pictures" in page
    assert "Through the tokenizers" in page and (run / "report" / "examples" / "image-0.png").exists()


def test_what_is_asked_is_what_the_loader_holds_out(tmp_path):
    run = own_run(tmp_path / "run", pairs(40), "image")
    settings = {"data": {"shards": ["raw"]}, "instruct": {"sources": [{"path": "codes/*.tar", "valid": 0.4}]}}
    tokenizers = Tokenizers.load(run / "tokenizers")
    held = read_held_out(run, settings, tokenizers)
    texts = [document.segments[1].content for document in held.documents]
    assert len(texts) == len(held.loader._held) and not held.decoded
    spelled = {tokenizers.decode(held.loader._cache[number][0]).segments[1].content for number in held.loader._held}
    assert set(texts) == spelled
    originals = [Image.open(io.BytesIO(content)).tobytes() for content in held.files["image"]]
    shown = [document.segments[0].content.tobytes() for document in held.documents]
    assert originals == list(dict.fromkeys(shown)) and len(originals) < len(shown), "a picture of two captions once"
    # Without the raw shards their codes are decoded, and that is counted.
    held = read_held_out(run, settings | {"data": {"shards": ["elsewhere"]}}, tokenizers)
    assert held.decoded == len(held.documents) == len(texts)


def test_raw_shards_of_one_name_and_a_limit_of_ones_own(tmp_path):
    """Their codes have other names than they; a source of raw media has bad samples still, as many as [data] allows."""
    run = run_with(tmp_path / "run", "image")
    for folder in ("one", "two"):
        with ShardWriter(run / folder, "s", 20) as writer:
            for i, members in enumerate(pairs(20)):
                writer.write(f"{folder}{i:05d}", members if i else {"png": b"no picture", "txt": b"a"})
    tokenizers, data = Tokenizers.load(run / "tokenizers"), {"shards": ["one", "two"], "max_bad_fraction": 0.3}
    shards = [run / "one" / "s-000000.tar", run / "two" / "s-000000.tar"]
    tokenize_shards(shards, run / "codes", tokenizers, progress=False, max_bad_fraction=0.3)
    for path in ("codes", "one"):
        settings = {"data": data, "instruct": {"sources": [{"path": path, "valid": 0.4}], "loader": {"seq_len": 256}}}
        held = read_held_out(run, settings, tokenizers)
        assert held.documents and held.decoded == 0


def test_sounds_conversations_and_texts(tmp_path, capsys):
    talk = [{"json": as_json({"messages": [say("user", image(), text("which?")), say("assistant", text(f"the {i}"))]}),
             "0.png": picture(i)} for i in range(20)]
    sounds = [{"flac": sound(i), "txt": f"tone {i}".encode()} for i in range(20)]
    found = evaluated(own_run(tmp_path / "a", talk + sounds, "image", "audio"), capsys)
    assert {"describe_audio", "make_audio", "answers", "audio_reconstruction_psnr", "held_out_loss"} <= {
        key[0] for key in found}
    texts = [{"txt": f"{i} green bottles hanging on the wall".encode()} for i in range(40)]
    found = evaluated(own_run(tmp_path / "b", texts), capsys)
    assert {"texts", "held_out_loss"} <= {key[0] for key in found}


def asked(folder, samples, *media: str) -> dict:
    """The tasks of such a run by their names."""
    run = own_run(folder, samples, *media)
    module = task_module(AnyToAny.load(run), run, tomllib.loads(CONFIG))
    return {task.name: task for task in module.tasks}


def test_whatever_is_held_out_there_is_something_to_ask(tmp_path):
    both = [{"png": picture(i), "flac": sound(i), "txt": f"{COLOURS[i % 6]} {i}".encode()} for i in range(20)]
    tasks = asked(tmp_path / "both", both, "image", "audio")
    assert tasks.keys() == {"describe_any"} and len(tasks["describe_any"].found[0].messages[0]["content"]) == 3
    draw = [{"json": as_json({"messages": [say("user", text(f"draw {i}")), say("assistant", image())]}),
             "0.png": picture(i)} for i in range(20)]
    tasks = asked(tmp_path / "draw", draw, "image")
    assert tasks.keys() == {"answers_image"} and tasks["answers_image"].right(tasks["answers_image"].found[0]).size
    alone = [{"png": picture(i)} if i % 2 else {"txt": f"{i} green bottles on the wall".encode()} for i in range(40)]
    tasks = asked(tmp_path / "alone", alone, "image")
    assert tasks.keys() == {"texts", "make_image"}
    assert all(isinstance(item.messages[0]["content"][0], str) for task in tasks.values() for item in task.found)


def test_media_without_words_and_texts_longer_than_the_context(tmp_path, capsys):
    found = evaluated(own_run(tmp_path / "a", [{"png": picture(i)} for i in range(20)], "image"), capsys)
    assert found["make_image", "replies that hold one"]["value"] == 1.0
    book = [{"txt": f"chapter {i} {'and so on ' * 300}".encode()} for i in range(20)]
    found = evaluated(own_run(tmp_path / "b", book), capsys)
    assert found["texts", "ROUGE-L"]["n"] > 0


def test_a_run_that_holds_nothing_out(tmp_path):
    run = own_run(tmp_path / "run", pairs(6), "image")
    (run / "config.toml").write_text(CONFIG.replace("valid = 0.4", "valid = 0"))
    with pytest.raises(SystemExit):
        main([str(run)])
    from onevocab.evaluation.__main__ import evaluate
    with pytest.raises(UserError, match="holds no samples out"):
        evaluate(run)


def test_metrics_of_texts():
    assert metrics.token_f1("a red dog", "the red cat") == 0.5 and metrics.token_f1("x", "") == 0
    assert metrics.token_f1("", "a") == 1.0 == metrics.token_f1("Red, dog!", "dog red")
    assert metrics.rouge_l("red dog", "dog red") == 0.5 and metrics.rouge_l("red dog runs", "red cat runs") == 4 / 6
    assert metrics.rouge_l("one two three", "one two three") == 1 and metrics.rouge_l("x", "y") == 0
