"""What can be known at the start is told at the start: contradictions, what is not there, and inputs that changed."""

import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import pytest
from samples import TEXTS, as_json, audio, flac, image, png, text

from onevocab.common.errors import UserError
from onevocab.common.files import check_writable
from onevocab.data.shards.writer import ShardFile
from onevocab.kernels import c_library
from onevocab.pipeline import checks
from onevocab.pipeline.config import read_config
from onevocab.pipeline.inputs import inspect_shards
from onevocab.pipeline.next_steps import next_steps
from onevocab.pipeline.plan import plan_lines
from onevocab.pipeline.run import Run
from onevocab.pipeline.size import check_disk

SMALL = "steps = 2\nbatch_size = 4\nwidth = 8\nfine_width = 8\nquantizer = { codebook_size = 16, dim = 4 }\n"
MEDIA = {"text": lambda i: (text(TEXTS[i % 5]), {}), "image": lambda i: (image(), {"0.png": png(i)}),
         "audio": lambda i: (audio("1.flac"), {"1.flac": flac(i)})}


def write_shard(path: Path, *kinds: str, first: int = 0, json: bool = True) -> Path:
    with ShardFile(path) as shard:
        for i in range(first, first + 4):
            parts, files = zip(*(MEDIA[kind](i) for kind in kinds), strict=True)
            members = {"json": as_json({"content": list(parts)})} if json else {"txt": TEXTS[i % 5].encode()}
            shard.write(f"{i}", members | {name: content for file in files for name, content in file.items()})
    return path


def config_of(folder: Path, *words: str, more: str = ""):
    """Of a run in folder/run on what lies in folder/shards, with a section for each modality."""
    stage = 'sources = [{ path = "codes/*.tar" }]\nloader = { seq_len = 64, global_batch_size = 2 }\nsteps = 2\n'
    path = folder / "run.toml"
    path.write_text(
        f'folder = "{folder}/run"\n[data]\nshards = ["../shards"]\nworkers = 1\n[text]\nvocab_size = 260\n'
        f"[image]\nsize = [16, 16]\npatch = 4\nmax_side = 8\n{SMALL}[audio]\nmels = 16\n{SMALL}"
        "[model]\ndim = 16\nlayers = 1\nheads = 2\nkv_heads = 1\nhead_dim = 8\nmlp_dim = 16\nmax_length = 128\n"
        f"[pretrain]\n{stage}[instruct]\n{stage}{more}")
    return read_config(path, list(words))


def refused(config, world: int = 1, begins_anew: bool = True) -> str:
    with pytest.raises(UserError) as error:
        checks.check_settings(config, world, begins_anew)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_sections_that_contradict_each_other(tmp_path):
    checks.check_settings(config_of(tmp_path), 1, True)
    assert "pretrain.loader.seq_len = 64 is above model.max_length = 32" in refused(
        config_of(tmp_path, "--model.max_length=32"))
    assert "instruct.loader.seq_len = 256 is above model.max_length" in refused(
        config_of(tmp_path, "--instruct.loader.seq_len=256"))
    with pytest.raises(UserError, match="above model.max_length"):
        plan_lines(config_of(tmp_path, "--model.max_length=32"), ["--plan"])
    line = refused(config_of(tmp_path, "--image.size=[32, 32]"))  # 8x8 codes, 4 ids around them, 2 of the document
    assert "each of the pictures takes 70 tokens" in line and "instruct.loader.seq_len = 64" in line
    checks.check_settings(config_of(tmp_path, "--image.size=[32, 32]", "--instruct.loader.seq_len=70"), 1, True)
    assert "each of the sounds takes 68" in refused(config_of(tmp_path, "--audio.mels=128", "--audio.rows=64"))
    assert "either all have a weight" in refused(config_of(
        tmp_path, "--pretrain.sources=[{path='codes/a.tar', weight=1}, {path='codes/b.tar'}]"))
    assert "of the phase from step 0 on" in refused(config_of(tmp_path, more=(
        "[[instruct.phases]]\nstart = 0\nsteps = 1\nsources = [{ path = 'a', weight = 1 }, { path = 'b' }]\n")))
    assert "pretrain.new_rows_steps" in refused(config_of(tmp_path, "--pretrain.new_rows_steps=1"))
    checks.check_settings(config_of(tmp_path, "--pretrain.new_rows_steps=1"), 1, False)


def test_steps_that_do_not_divide_over_the_ranks(tmp_path):
    checks.check_settings(config_of(tmp_path), 2, True)
    assert "pretrain.loader.global_batch_size: 2 rows a step do not divide over 4 ranks" in refused(
        config_of(tmp_path), 4)
    assert "instruct.batch_tokens: 3 rows a step do not divide over 2" in refused(
        config_of(tmp_path, "--instruct.batch_tokens=192"), 2)
    assert "audio.batch_size = 1 leaves some of the 2 ranks" in refused(config_of(tmp_path, "--audio.batch_size=1"), 2)


def test_packages_and_tasks_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = checks.importlib.util.find_spec
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    assert "the package wandb is not installed" in refused(config_of(tmp_path, "--wandb=mine"))
    assert "[evaluate] tasks = 'my_lost_tasks': there is no module" in refused(
        config_of(tmp_path, "--evaluate.tasks=my_lost_tasks"))
    (tmp_path / "my_broken_tasks.py").write_text("import a_package_that_nobody_has\n")
    assert "it imports a_package_that_nobody_has" in refused(config_of(tmp_path, "--evaluate.tasks=my_broken_tasks"))


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    check_writable(tmp_path / "not" / "yet" / "there")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write into .*: .*file is no folder"):
        check_writable(tmp_path / "file" / "run")

    def full(dir):
        if Path(dir).name == "instruct":
            raise OSError(28, "No space left on device")
        return io.BytesIO()

    monkeypatch.setattr("tempfile.TemporaryFile", full)  # tests may run as root, whom no permission stops
    (tmp_path / "run" / "instruct").mkdir(parents=True)
    checks.check_folder(tmp_path / "run", ["pretrain"])
    with pytest.raises(UserError, match="cannot write into .*instruct: No space left"):
        checks.check_folder(tmp_path / "run", ["pretrain", "instruct"])


def test_a_disk_without_room_for_the_checkpoints(tmp_path):
    config, asked = config_of(tmp_path, "--pretrain.save_every=1", "--pretrain.steps=100"), []

    def free(room: int):
        return lambda path: asked.append(path) or room

    planned = plan_lines(config, ["--plan", "--plan.flops=1e12"])
    one = float(re.search(r"disk +([\d.]+) KiB a checkpoint", "\n".join(planned))[1]) * 1024
    check_disk(config, free(round(4.1 * one)))  # three of pretrain, one of instruct
    with pytest.raises(UserError, match="need .* more, .* left; free some space"):
        check_disk(config, free(round(3.9 * one)))
    assert asked[0] == tmp_path, "the folder that the run's will be in"
    with pytest.raises(UserError):
        check_disk(config_of(tmp_path, "--pretrain.save_every=1", "--pretrain.steps=100", "--pretrain.keep_best"),
                   free(round(4.1 * one)))  # a fourth of pretrain: the best
    (tmp_path / "run" / "pretrain" / "step-1").mkdir(parents=True)
    (tmp_path / "run" / "instruct").mkdir()
    (tmp_path / "run" / "instruct" / "done.json").touch()
    check_disk(config, free(round(2.1 * one)))
    with pytest.raises(UserError):
        check_disk(config, free(round(1.9 * one)))


def test_shards_and_sources_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="no shards at"):
        Run(config_of(tmp_path)).train()
    write_shard(tmp_path / "shards" / "a.tar", "text")
    write_shard(tmp_path / "more" / "a.tar", "text")
    twice = "--data.shards=['../shards', '../shards/*.tar']"
    with pytest.raises(UserError, match="a.tar is there twice"):
        Run(config_of(tmp_path, twice)).train()
    lost = config_of(tmp_path, "--instruct.sources.0.path=codes/pairs-*.tar")
    with pytest.raises(UserError, match=r"instruct.sources: no shard's codes are called codes/pairs-\*.tar; .* a.tar"):
        Run(lost).train()
    assert not (tmp_path / "run").exists(), "nothing is written"
    both = config_of(tmp_path, "--data.shards=['../shards', '../more']", "--instruct.sources.0.path=codes/more-*.tar")
    run = Run(both)
    run._take_in()
    assert list(run.files) == ["shards-a.tar", "more-a.tar"]


@pytest.mark.parametrize("there", [("text",), ("text", "audio"), ("image",), ("image", "audio")])
def test_media_that_the_data_lack_are_left_out(tmp_path, there, capsys):
    write_shard(tmp_path / "shards" / "a.tar", *there)
    run = Run(config_of(tmp_path))
    run._take_in()
    kept = [name for name in ("image", "audio") if name in there]
    assert [stage.name for stage in run.stages] == ["shards", "text", *kept, "codes", "pretrain", "instruct"]
    said = capsys.readouterr().err
    assert said.count("is left out of this run") == 2 - len(kept)
    assert ("shards hold no pictures" in said) == ("image" not in there)


def test_media_without_a_section_are_told_where_no_json_can_leave_them_out(tmp_path):
    config = config_of(tmp_path)
    without = config.model_copy(update={"audio": None})
    write_shard(tmp_path / "shards" / "a.tar", "audio")
    Run(without)._take_in()  # a json may say nothing of them: stage codes knows
    write_shard(tmp_path / "shards" / "b.tar", "audio", json=False)
    with pytest.raises(UserError, match=r"the shards hold sounds \(b.tar\); add a section \[audio\]"):
        Run(without)._take_in()
    Run(config)._take_in()


def test_a_run_without_kernels_in_c_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("ONEVOCAB_KERNELS", raising=False)
    monkeypatch.setattr(c_library, "library", lambda operation: None)
    monkeypatch.setitem(c_library._problems, "attention", "no C kernels: no C compiler")
    write_shard(tmp_path / "shards" / "a.tar", "text")
    Run(config_of(tmp_path)).train(until="text")
    assert capsys.readouterr().err.count("no C kernels: no C compiler; language training runs on torch alone") == 1


# ------------------------------------------------------------------------------------------------ inputs that change


@pytest.fixture
def finished(tmp_path) -> Path:
    """A folder whose run has done all stages, as far as its records say."""
    for name in "ab":
        write_shard(tmp_path / "shards" / f"{name}.tar", "text", "image")
    run = Run(config_of(tmp_path))
    run._take_in()
    for name, record in run._check().items():
        if name != "data":
            (tmp_path / "run" / name).mkdir(parents=True)
            (tmp_path / "run" / name / "done.json").write_text(json.dumps(record))
    (tmp_path / "run" / "shards" / "files.json").write_text(json.dumps(run.files))
    return tmp_path


def check(folder: Path, *words: str) -> None:
    run = Run(config_of(folder, *words))
    run._take_in()
    run._check()


def test_shards_that_are_touched_copied_or_moved_are_the_same(finished, monkeypatch):
    before = inspect_shards([str(finished / "shards" / "a.tar")], finished / "run" / "shards")
    monkeypatch.setattr("onevocab.pipeline.inputs.build_index", None)
    assert inspect_shards([str(finished / "shards" / "a.tar")], finished / "run" / "shards") == before, "not opened"
    monkeypatch.undo()
    os.utime(finished / "shards" / "a.tar")
    check(finished)
    shutil.move(finished / "shards", finished / "moved")
    check(finished, "--data.shards=../moved")
    (finished / "run" / "shards" / "files.json").write_text("{")
    check(finished, "--data.shards=../moved")


@pytest.mark.parametrize(("change", "said"), [
    (lambda shards: write_shard(shards / "a.tar", "text", "image", first=1), "a.tar has other bytes"),
    (lambda shards: write_shard(shards / "c.tar", "text"), "c.tar is new"),
    (lambda shards: (shards / "b.tar").unlink(), "b.tar is gone"),
    (lambda shards: write_shard(shards / "c.tar", "audio"), "c.tar is new"),
])
def test_changed_shards_are_noticed(finished, change, said):
    change(finished / "shards")
    with pytest.raises(UserError) as error:
        check(finished)
    line = str(error.value)
    assert f"stage text of {finished}/run was made from other raw shards ({said})" in line
    assert f"use another --folder, or remove {finished}/run/text and what follows from it (image, " in line
    (finished / "run" / "shards" / "files.json").unlink()
    with pytest.raises(UserError, match="made from other raw shards; use another"):
        check(finished)
    for stage in ("text", "image", "codes", "pretrain", "instruct"):
        shutil.rmtree(finished / "run" / stage)
    check(finished)


def test_limits_and_paths_do_not_make_another_run(finished):
    check(finished, "--data.max_bad_fraction=0.5", "--data.workers=2")
    with pytest.raises(UserError, match="made with other settings .*tokenizer_samples"):
        check(finished, "--data.tokenizer_samples=5")


def test_bad_samples_stop_the_text_tokenizer_by_the_same_limit(tmp_path):
    write_shard(tmp_path / "shards" / "a.tar", "text")
    with tarfile.open(tmp_path / "shards" / "a.tar", "a") as tar:
        info = tarfile.TarInfo("z.json")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"{"))
    for fraction, stops in ((0.01, True), (0.2, False)):
        run = Run(config_of(tmp_path, f"--data.max_bad_fraction={fraction}"))
        if stops:
            with pytest.raises(UserError, match="1 of 5 samples are bad.*sample z: its json"):
                run.train_text()
        else:
            run.train_text()


def test_what_can_be_done_with_a_run_fits_the_run(tmp_path):
    config = config_of(tmp_path)
    lines = next_steps(config, ["image"])
    assert any("--want image" in line for line in lines) and not any("audio" in line for line in lines)
    assert any("--image FILE.png --text" in line for line in lines)
    assert lines[-1].startswith("evaluate: python -m onevocab.evaluation "), "about its own held-out samples"
    demo = config.model_copy(update={"data": config.data.model_copy(update={"demo": {}}), "folder": "runs/a b"})
    assert next_steps(demo, ["image", "audio"])[-1] == "evaluate: python -m onevocab.evaluation 'runs/a b'"
    assert not any("evaluation" in line for line in next_steps(demo, [])), "each of the demo's tasks has a medium"


def test_nothing_is_evaluated_where_nothing_was_held_out(tmp_path):
    config = config_of(tmp_path)
    log = tmp_path / config.folder / "metrics.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    for held, there in (({"valid_loss": 1.0}, True), ({}, False)):
        log.write_text(json.dumps({"stage": "instruct", "step": 20, "loss_text": 1.0} | held) + "\n")
        assert any("evaluation" in line for line in next_steps(config, ["image"])) is there
