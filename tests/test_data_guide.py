"""docs/data.md, "Your own data", is true: its commands, as they stand, on pictures that no other test uses."""

import json
import os
import shlex
import sys

import pytest
from conftest import ROOT, run_command
from PIL import Image, ImageDraw
from test_extending import sections

NAMES = ("cat", "dog", "owl", "hen", "cow")
COLOURS = {"pink": (255, 150, 180), "teal": (0, 128, 128), "gold": (220, 180, 30), "navy": (20, 20, 110)}


def pets(folder) -> None:
    """60 striped flags of four colours and five widths, each with a caption; the first is cat.jpg."""
    folder.mkdir()
    for i in range(60):
        name, colour = NAMES[i % 5], list(COLOURS)[i % 4]
        flag = Image.new("RGB", (60, 44), "white")
        pen = ImageDraw.Draw(flag)
        for x in range(i // 20, 60, 4 + 3 * (i % 5)):
            pen.line((x, 0, x, 44), COLOURS[colour], 2)
        stem = name if i < 5 else f"{name}{i}"
        flag.save(folder / f"{stem}.jpg")
        (folder / f"{stem}.txt").write_text(f"a {name}'s flag, {colour} stripes\n")


def commands() -> list[list[str]]:
    [block] = [block for block in sections((ROOT / "docs" / "data.md").read_text())["Your own data"]
               if block.language == "bash" and "--new" in block.text]
    return [shlex.split(line, comments=True) for line in block.text.splitlines()]


def test_the_guide_is_four_commands():
    assert [words[:2] for words in commands()] == [["python", "-m"], ["python", "train.py"], ["torchrun", "train.py"],
                                                   ["python", "sample.py"]]


@pytest.mark.slow
def test_from_a_folder_to_an_answer(tmp_path):
    pets(tmp_path / "pets")
    outputs = []
    for words in [*commands(), ["python", "-m", "onevocab.evaluation", "runs/pets", "--limit", "4"]]:
        words = [str(ROOT / word) if word in ("train.py", "sample.py") else word for word in words[1:]]
        if "--new" in words:
            words += ["--minutes", "0.05"]  # as few steps as there can be
        outputs.append(run_command([sys.executable, *words], cwd=tmp_path, timeout=900,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"}))
    assert "60 samples" in outputs[0] and "wrote pets.toml" in outputs[1]
    assert "captions are shown" in outputs[2] or "captions_with_turns" in outputs[2]
    assert outputs[3].strip(), "no answer"
    lines = [json.loads(line) for line in (tmp_path / "runs" / "pets" / "metrics.jsonl").read_text().splitlines()]
    for stage in ("pretrain", "instruct"):
        held_out = [line["valid_loss"] for line in lines if line["stage"] == stage and "valid_loss" in line]
        assert held_out and held_out[-1] < 10
    assert "held_out_loss" in outputs[4] and "describe_image" in outputs[4] and "audio" not in outputs[4]
