"""A configuration for one's own data: what is in it follows from the data, and it is read back as it was chosen."""

import numpy as np
import pytest
from PIL import Image
from samples import as_json, grid, image, say, text, write_codes

from onevocab.common.errors import UserError
from onevocab.data.shards.remote import list_sources
from onevocab.data.shards.writer import ShardWriter
from onevocab.pipeline import new
from onevocab.pipeline.checks import check_lengths
from onevocab.pipeline.config import LanguageStage, read_config
from onevocab.pipeline.run import placed
from onevocab.tokenizers.media import encode_audio, encode_png


@pytest.fixture(autouse=True)
def speeds(monkeypatch):
    """A machine that is always as fast."""
    monkeypatch.setattr(new, "language_seconds", lambda config, vocabulary, rows, length, device: rows * length * (
        config.dim**2 * config.layers) / 2e9)
    monkeypatch.setattr(new, "media_seconds", lambda *_: 0.05)


def picture(i: int, side: int = 90) -> bytes:
    return encode_png(Image.new("RGB", (side, 40 + i), (i, 0, 0)))


def sound(seconds: float) -> bytes:
    return encode_audio(np.random.default_rng(0).normal(0, 0.1, int(seconds * 16000)), 16000)


def shards(folder, samples):
    with ShardWriter(folder, "s", 20) as writer:
        for i, members in enumerate(samples):
            writer.write(f"{i:05d}", members)
    return folder


def make(tmp_path, monkeypatch, samples, *words):
    monkeypatch.chdir(tmp_path)
    shards(tmp_path / "shards" / "pets", samples)
    new.new_configuration(["--new", "pets.toml", "--shards", "shards/pets", *words])
    return read_config("pets.toml", [])


def test_pictures_with_captions(tmp_path, monkeypatch, capsys):
    config = make(tmp_path, monkeypatch, [{"png": picture(i), "txt": b"a red thing " * 5} for i in range(50)])
    assert config.modalities == ["image"] and config.folder == "runs/pets" and config.data.demo is None
    assert config.image.size == (64, 64) and config.text.vocab_size == 512
    # Paths start from the run's folder, and find the shards.
    monkeypatch.chdir(tmp_path)
    [place] = config.data.shards
    (tmp_path / config.folder).mkdir(parents=True)
    assert len(list_sources(placed(tmp_path / config.folder, place))) == 3 and place == "../../shards/pets"
    assert config.instruct.sources[0].turns == "captions" and config.pretrain.sources[0].turns == "auto"
    assert config.instruct.keep_best and config.pretrain.valid_every
    content = (tmp_path / "pets.toml").read_text()
    assert "50 samples, 50 of them read" in content and "demo" not in content and "emoji" not in content
    # Every key stands there, below what it means.
    lines = content[content.index("[pretrain]") :].splitlines()
    for name, field in LanguageStage.model_fields.items():
        if name not in ("sources", "loader", "optimizer", "schedule"):
            at = next(i for i, line in enumerate(lines) if line.startswith(f"{name} = "))
            above = " ".join(lines[max(0, at - 3) : at])
            assert lines[at - 1].startswith("# ") and field.description.split()[0] in above
    assert all(f"[{section}]" in content for section in ("data", "text", "image", "model", "instruct.optimizer"))
    assert "next: torchrun train.py pets.toml" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists already"):
        new.new_configuration(["--new", "pets.toml", "--shards", "shards/pets"])
    assert (tmp_path / "pets.toml").read_text() == content


def test_sounds_and_conversations_and_rows_that_hold_them(tmp_path, monkeypatch):
    messages = [say("user", text("which?")), say("assistant", image())]
    talk = {"json": as_json({"messages": messages}), "0.png": picture(1)}
    samples = [talk] * 5 + [{"flac": sound(1 + i % 3), "txt": b"a long whistle"} for i in range(20)]
    config = make(tmp_path, monkeypatch, samples, "--folder", "elsewhere/run", "--minutes", "30")
    assert config.modalities == ["image", "audio"] and config.audio.max_seconds == 3.0
    tokens = int(3 * config.audio.rows * 16000 / 256 / config.audio.column_frames)
    assert config.pretrain.loader.seq_len > tokens + 20
    assert config.model.max_length >= 2 * config.pretrain.loader.seq_len
    assert config.data.shards == ("../../shards/pets",) and config.folder == "elsewhere/run"


def test_more_time_makes_a_larger_model_or_more_steps(tmp_path, monkeypatch):
    samples = [{"txt": f"{i} green bottles hanging on the wall ".encode() * 40} for i in range(300)]
    folder = shards(tmp_path / "s", samples)
    found = new.look(list_sources(folder))
    some = [new.choose(found, [str(folder)], "runs/x", minutes)[0] for minutes in (5, 60, 1000)]
    sizes = [config.model.dim for config in some]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] and some[0].modalities == []
    # A stage never shows a sample more than EPOCHS times.
    stage = some[-1].pretrain
    text_tokens = sum(len(words) for words, _ in found.documents)
    assert stage.steps * stage.loader.seq_len * stage.loader.global_batch_size < new.EPOCHS * 2 * text_tokens


def test_a_machine_that_is_too_slow_is_told(tmp_path, monkeypatch):
    folder = shards(tmp_path / "s", [{"png": picture(i % 90), "txt": f"a red thing {i}".encode()} for i in range(400)])
    found = new.look(list_sources(folder))
    _, why = new.choose(found, [str(folder)], "runs/x", 15)
    assert "too little" not in why[-1]
    monkeypatch.setattr(new, "language_seconds", lambda *_: 100.0)
    config, why = new.choose(found, [str(folder)], "runs/x", 15)
    assert config.pretrain.steps == 20 and "too little" in why[-1] and "give more --minutes" in why[-1]


def test_a_rare_picture_fits_a_row(tmp_path):
    large = encode_png(Image.new("RGB", (128, 128)))
    folder = shards(tmp_path / "s", [{"txt": b"a word"}] * 399 + [{"png": large}])
    config, _ = new.choose(new.look(list_sources(folder)), [str(folder)], "runs/x", 90)
    assert config.image.size == (128, 128)
    check_lengths(config)


def test_what_cannot_be_used(tmp_path, tokenizers, monkeypatch):
    monkeypatch.chdir(tmp_path)
    codes = write_codes(tmp_path / "codes", tokenizers, [{"json": as_json({"content": [image("0.image.npy")]}),
                                                         "0.image.npy": grid(0)}])
    bad = shards(tmp_path / "bad", [{"json": b"{"}])
    for words, message in ((["x.toml", "--shards", str(codes)], "holds codes"),
                           (["x.toml", "--shards", str(bad)], "none of 1 samples can be used"),
                           (["x.toml", "--shards", "nothing"], "no shards at nothing"),
                           (["x.yaml", "--shards", str(bad)], "ends in .toml"),
                           (["x.toml", "--shards", str(bad), "--minutes", "0"], "--minutes")):
        with pytest.raises(UserError, match=message):
            new.new_configuration(["--new", *words])
    assert not (tmp_path / "x.toml").exists()


def test_the_command_that_it_prints_can_be_pasted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = shards(tmp_path / "s", [{"txt": b"a red thing " * 5}] * 10)
    new.new_configuration(["--new", "my pets.toml", "--shards", str(folder)])
    assert "next: torchrun train.py 'my pets.toml'" in capsys.readouterr().out
    assert "# Train: torchrun train.py 'my pets.toml'" in (tmp_path / "my pets.toml").read_text()


def test_a_place_that_cannot_be_written_is_told_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(new, "look", lambda _: pytest.fail("it has begun"))
    folder = shards(tmp_path / "s", [{"txt": b"a red thing"}])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write into .*file is no folder"):
        new.new_configuration(["--new", str(tmp_path / "file" / "x.toml"), "--shards", str(folder)])
