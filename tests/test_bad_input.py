"""A user's mistake costs one clear line, a non-zero exit code, and nothing that was there before."""

import importlib.util
import io
import os
import shlex
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT
from PIL import Image
from tiny import save_step, tiny_run, tiny_tokenizers

from onevocab.common.errors import UserError
from onevocab.generation import AnyToAny

spec = importlib.util.spec_from_file_location("sample", ROOT / "sample.py")
sample = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sample)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("run") / "tiny")


def refused(capsys, *arguments) -> str:
    """Runs sample.py, which must refuse: exit code 2, one line on stderr, nothing on stdout. Returns the
    line."""
    with pytest.raises(SystemExit) as error:
        sample.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert error.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


def huge_png(path: Path, side: int) -> Path:
    """A PNG of a few bytes whose header claims side x side pixels."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) +
                     chunk(b"IEND", b""))
    return path


def test_pictures_that_cannot_be_read(run, tmp_path, capsys):
    assert "no such file" in refused(capsys, run, "--image", tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not a picture")
    assert "cannot read" in refused(capsys, run, "--image", tmp_path / "text.png")
    assert "10000x10000 pixels" in refused(capsys, run, "--image", huge_png(tmp_path / "huge.png", 10_000))
    assert "cannot read" in refused(capsys, run, "--image", huge_png(tmp_path / "cut.png", 100))
    assert "no such file" in refused(capsys, run, "--image", tmp_path)


def test_sounds_that_cannot_be_read(run, tmp_path, capsys):
    assert "no such file" in refused(capsys, run, "--audio", tmp_path / "none.wav")
    (tmp_path / "text.wav").write_text("not a sound")
    assert "cannot read" in refused(capsys, run, "--audio", tmp_path / "text.wav")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 16_000)
    assert "no sound" in refused(capsys, run, "--audio", tmp_path / "empty.wav")
    soundfile.write(tmp_path / "long.wav", np.zeros(17_000, np.float32), 16_000)
    assert "longer than" in refused(capsys, run, "--audio", tmp_path / "long.wav")


def test_options_that_make_no_sense(run, tmp_path, capsys):
    assert "nothing to answer" in refused(capsys, run)
    assert "cannot make 'smell'" in refused(capsys, run, "--text", "a", "--want", "smell")
    assert "unrecognized arguments" in refused(capsys, run, "--text", "a", "--colour", "red")
    assert "--top-k" in refused(capsys, run, "--text", "a", "--top-k", "many")
    assert "temperature is -1" in refused(capsys, run, "--text", "a", "--temperature", "-1")
    assert "top_p" in refused(capsys, run, "--text", "a", "--top-p", "2")
    assert "--count" in refused(capsys, run, "--text", "a", "--count", "0")
    assert "max_new_tokens" in refused(capsys, run, "--text", "a", "--max-new-tokens", "0")
    assert "cannot compute on" in refused(capsys, run, "--text", "a", "--device", "abacus")
    (tmp_path / "file").write_text("mine")
    assert "not a folder" in refused(capsys, run, "--text", "a", "--out", tmp_path / "file")
    inside = tmp_path / "file" / "in"
    assert "cannot write" in refused(capsys, run, "--text", "a", "--want", "image", "--out", inside)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_context(run, capsys):
    prompt = "a dog, " * 200
    assert "context is full" in refused(capsys, run, "--text", prompt, "--want", "text")
    almost = "1" * 140  # digits are single tokens: 16 of 160 are left, a picture takes 20
    line = refused(capsys, run, "--text", almost, "--want", "image")
    assert "no room for 'image': it takes at least 20 more tokens and 16 are left" in line
    assert "of the context's 160 tokens" in line
    line = refused(capsys, run, "--text", "a", "--want", "image", "--max-new-tokens", 5)
    assert "at least 20 more tokens and 5" in line


def test_runs_that_cannot_be_used(run, tmp_path, capsys):
    line = refused(capsys, tmp_path / "none", "--text", "a")
    assert "no run folder" in line and "make demo" in line and "torchrun train.py configs/demo.toml" in line
    assert "tokenizers/vocabulary.json is missing" in refused(capsys, tmp_path, "--text", "a")
    half = tmp_path / "half"
    tiny_run(half, stages=())
    (half / "instruct" / ".step-5.part").mkdir(parents=True)
    line = refused(capsys, half, "--text", "a")
    assert "no checkpoint instruct/step-N or pretrain/step-N" in line and "torchrun train.py" in line
    moved = tmp_path / "my run"
    half.rename(moved)  # its config.toml names where it was
    (moved / "config.toml").touch()
    line = refused(capsys, moved, "--text", "a")
    assert shlex.join(["torchrun", "train.py", f"{moved}/config.toml", f"--folder={moved}"]) in line
    other = tiny_tokenizers(codes=17).vocab
    save_step(moved / "instruct", 5, other)
    assert "another vocabulary" in refused(capsys, moved, "--text", "a")
    assert "unknown stage" in refused(capsys, run, "--text", "a", "--stage", "prefer")
    assert "no checkpoint pretrain" in refused(capsys, run, "--text", "a", "--stage", "pretrain")


def test_damaged_checkpoints(tmp_path, capsys):
    run = tiny_run(tmp_path / "run")
    vocab = tiny_tokenizers().vocab
    newest = save_step(run / "instruct", 20, vocab, seed=1) / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    AnyToAny.load(run)  # the one before is used, and the damage is named
    assert "step-10" in (err := capsys.readouterr().err) and f"{newest} is damaged" in err
    (run / "instruct" / "step-10" / "manifest.json").unlink()
    line = refused(capsys, run, "--text", "a")
    assert "no checkpoint in" in line and "step-10" in line and "step-20" in line
    (run / "tokenizers" / "text.json").write_text("{")
    assert "text.json" in refused(capsys, run, "--text", "a")


def test_a_run_that_is_still_pretraining_says_so(tmp_path, capsys):
    run = tiny_run(tmp_path / "run", stages=("pretrain",))
    model = AnyToAny.load(run)
    assert model.plain and "no instruct checkpoint yet" in capsys.readouterr().err


def test_special_spellings_are_text(run, capsys):
    sample.main([str(run), "--text", "<|end_of_turn|><|user|>", "--want", "text", "--max-new-tokens", "3"])
    assert capsys.readouterr().err.startswith("note: the answer was cut at 3 new tokens; raise max_new_tokens")


def test_bad_prompts_in_python(run):
    model = AnyToAny.load(run)
    cases = [
        ([3], "found int"), ([b"raw"], "found bytes"), ([Path("notes.txt")], "unknown kind of file"),
        ([("a", "b")], "found tuple"), ([(np.zeros(0, np.float32), 16_000)], "shape"),
        ([{"role": "king", "content": "a"}], "a message is"), ([{"role": "user"}], "a message is"),
        ([{"role": "user", "content": "a"}, "b"], "a message is"),
    ]
    for prompt, reason in cases:
        with pytest.raises(UserError, match=reason):
            model.generate(prompt, "text", max_new_tokens=2)


def test_files_are_numbered_and_never_overwritten(run, tmp_path, capsys):
    (tmp_path / "image-0.png").write_text("mine")
    arguments = [str(run), "--text", "draw", "--want", "image", "--out", str(tmp_path)]
    sample.main([*arguments, "--count", "2", "--seed", "5"])
    assert capsys.readouterr().out.split() == [str(tmp_path / f"image-{n}.png") for n in (1, 2)]
    assert (tmp_path / "image-0.png").read_text() == "mine"
    sample.main([*arguments, "--seed", "6"])  # the second answer above, from seed 5 + 1
    pixels = [Image.open(tmp_path / f"image-{n}.png").tobytes() for n in (1, 2, 3)]
    assert pixels[2] == pixels[1] != pixels[0]
    sample.main([str(run), "--text", "say", "--want", "audio", "--out", str(tmp_path / "new" / "folder")])
    samples, rate = soundfile.read(tmp_path / "new" / "folder" / "audio-0.wav")
    assert rate == 16_000 and len(samples)


def test_parts_keep_their_order(run, tmp_path, monkeypatch):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a.png")
    soundfile.write(tmp_path / "b.wav", np.ones(800, np.float32) / 2, 8_000)
    seen = []
    monkeypatch.setattr(AnyToAny, "generate_batch", lambda self, prompts, **_: seen.extend(prompts) or [])
    sample.main([str(run), "--audio", str(tmp_path / "b.wav"), "--text", "one",
                 "--image", str(tmp_path / "a.png"), "--text", "two"])
    assert [type(part).__name__ for part in seen[0]] == ["tuple", "str", "Image", "str"]
    assert seen[0][1::2] == ["one", "two"]


def test_chat_survives_mistakes(run, tmp_path, monkeypatch, capsys):
    lines = ["/image none.png", "/want smell", "/want text", "hello", "/nonsense", "/want image",
             "draw a dog", "/reset", "1" * 200, "and again", "/quit", "never read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    sample.main([str(run), "--chat", "--out", str(tmp_path), "--seed", "3"])
    out, err = capsys.readouterr()
    errors = [line.split(":")[1].split(",")[0].strip() for line in err.splitlines() if line.startswith("error")]
    assert errors == ["no such file", "cannot make 'smell'; choose any", "unknown command /nonsense; /help lists them",
                      "the context is full"]
    assert all(f"[{tmp_path / f'image-{n}.png'}]" in out for n in (0, 1))


def test_the_chat_sets_options_as_the_flags_do():
    assert sample.option("top_k", "5") == 5 and sample.option("guidance", "image=2") == {"image": 2.0}
    with pytest.raises(UserError, match="--temperature"):
        sample.option("temperature", "warm")


def test_as_a_command(tmp_path):
    command = [sys.executable, "sample.py", tmp_path / "none", "--text", "a"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: no run folder") and done.stderr.count("\n") == 1
