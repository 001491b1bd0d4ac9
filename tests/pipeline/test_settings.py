"""Settings: each is described, the command line sets them, and a mistake is one line that names what was meant."""

import os
import shutil

import pytest
from conftest import ROOT
from pydantic import BaseModel

from onevocab.common.errors import UserError
from onevocab.pipeline.config import RunConfig, read_config
from onevocab.pipeline.manual import manual
from onevocab.pipeline.settings import sections_of
from onevocab.training.plan import PlanConfig

SMOKE = ROOT / "configs" / "smoke.toml"


def undescribed(config: type[BaseModel], before: set) -> list[str]:
    missing = []
    for name, field in config.model_fields.items():
        below = sections_of(field.annotation)
        if not below and not field.description and name != "kind":  # a quantizer's kind is its class's docstring
            missing.append(f"{config.__name__}.{name}")
        for section in below:
            if section not in before:
                before.add(section)
                missing += undescribed(section, before)
    return missing


def test_every_setting_is_described():
    found: set = set()
    assert undescribed(RunConfig, found) == [] and undescribed(PlanConfig, found) == []
    assert len(found) > 15, "hardly any section was found"


@pytest.mark.parametrize(("words", "said"), [
    ("--model.layers=-2", "--model.layers=-2: must be greater than 0; found '-2'"),
    ("--model.layers=many", "--model.layers=many: must be a valid integer; found 'many'"),
    ("--model.head_dim=3", "--model.head_dim=3: head_dim (3) must be even"),
    ("--model.layrs=2", "--model.layrs: unknown key; did you mean --model.layers?"),
    ("--model.zzz=2", "--model.zzz: unknown key; there are model.dim, model.layers"),
    ("--layers=2", "--layers: unknown key; did you mean --model.layers?"),
    ("--model.layers", "--model.layers: its value is missing"),
    ("--model.layers --seed=1", "--model.layers: its value is missing"),
    ("--model=2", "--model is a section; set one of its keys: --model.dim, "),
    ("--plann", "--plann: unknown; did you mean --plan?"),
    ("stray", "'stray' is not expected here"),
    ("-x", "'-x' is not expected here"),
    ("--device=tpu", "--device=tpu: must be 'auto', 'cpu' or 'cuda'"),
    ("--folder=", "--folder=: must have at least 1 character"),
    ("--pretrain.sources=[{pat='x'}]", "pretrain.sources.0.pat: unknown key; did you mean pretrain.sources"),
    ("--pretrain.sources=[{", "its value is not valid TOML"),
    ("--pretrain.sources.5.repeat=2", "--pretrain.sources.5.repeat=2: there are 1 of these"),
    ("--pretrain.sources.path=x", "--pretrain.sources.path: this is a list"),
    ("--image.quantizer.codebok_size=3", "did you mean --image.quantizer.codebook_size?"),
    ("--pretrain.sources.0", "--pretrain.sources.0 is a section; set one of its keys: --pretrain.sources.0.path"),
    ("--image.quantizer.kind=fsq", "image.quantizer.codebook_size: this is a key of another kind"),
])
def test_a_mistake_on_the_command_line_is_one_line(words, said):
    with pytest.raises(UserError) as error:
        read_config(SMOKE, words.split(" "))
    assert said in str(error.value) and "\n" not in str(error.value) and "http" not in str(error.value)


@pytest.mark.parametrize(("before", "after", "said"), [
    ("layers = 2", 'layers = "two"', "model.layers: must be a valid integer; found 'two'"),
    ("layers = 2", "layrs = 2", "model.layrs: unknown key; did you mean model.layers?"),
    ("[text]\nvocab_size = 512", "text = 3", "text: this is a section; its keys are vocab_size"),
    ('folder = "runs/smoke"', "", "folder: this key is missing"),
    ('sources = [{ path = "codes/pretrain-*.tar" }]', "sources = []", "pretrain.sources: must have at least 1 item"),
    ("[data]", "[dta]", "dta: unknown key; did you mean data?"),
])
def test_a_mistake_in_the_file_is_one_line(tmp_path, before, after, said):
    text = SMOKE.read_text()
    assert before in text
    text = text.replace(before, after, 1) if not after.startswith("text") else after + "\n" + text.replace(before, "")
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(UserError) as error:
        read_config(tmp_path / "a.toml", [])
    assert str(error.value).startswith(f"{tmp_path / 'a.toml'}: ") and said in str(error.value)


def test_what_the_command_line_says_stands_over_the_file():
    config = read_config(SMOKE, [
        "--seed", "7", "--model.no-tie-embeddings", "--pretrain.compile", "--image.size", "32", "32", "--wandb=none",
        '--data.shards=["a", "b"]', "--pretrain.sources.0.repeat=0.5", "--instruct.loader.loss.image=0.5",
        "--image.quantizer.codebook-size=32", "--pretrain.optimizer.betas=[0.8, 0.9]"])
    assert (config.seed, config.model.tie_embeddings, config.pretrain.compile, config.wandb) == (7, False, True, None)
    assert config.image.size == (32, 32) and config.image.width == 32 and config.data.shards == ("a", "b")
    assert config.pretrain.sources[0].repeat == 0.5 and config.pretrain.sources[0].path == "codes/pretrain-*.tar"
    assert config.instruct.loader.loss.image == 0.5 and config.instruct.loader.loss.context_weight == 0
    assert config.image.quantizer.codebook_size == 32 and config.pretrain.optimizer.betas == (0.8, 0.9)
    assert read_config(SMOKE, ["--data.shards=one"]).data.shards == ("one",)


def test_home_is_meant_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(SMOKE, tmp_path / "a.toml")
    config = read_config("~/a.toml", [
        "--folder=~/run", "--data.shards=~/shards", "--pretrain.sources.0.path=~/c/*.tar"])
    assert config.folder == f"{tmp_path}/run" and config.data.shards == (f"{tmp_path}/shards",)
    assert config.pretrain.sources[0].path == f"{tmp_path}/c/*.tar"
    for flag in ("--init-from", "--model.init"):
        with pytest.raises(UserError, match=f"there is no (run|folder) {tmp_path}/other"):
            read_config(SMOKE, [f"{flag}=~/other"])
    with pytest.raises(UserError, match="^~nobody-of-this-name/x: there is no such home folder"):
        read_config(SMOKE, ["--folder=~nobody-of-this-name/x"])


@pytest.mark.parametrize("width", [80, 120])
def test_the_manual_names_every_key_and_fits_the_terminal(width, monkeypatch):
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_: os.terminal_size((width, 24)))
    config = read_config(SMOKE, [])
    lines = manual(config, "smoke.toml").splitlines()
    assert max(map(len, lines)) <= width and len(lines) < 500
    for line in ("--model.layers=2", "--pretrain.sources=[...] (1 of them)", "--audio.max_seconds=8.0",
                 "--image.quantizer.codebook_size=64", "--plan.devices=1", "--pretrain.loader.seq_len=256"):
        assert any(shown.startswith(f"  {line}") for shown in lines), line
    assert "  --instruct.loader.loss.context_weight=0.0" in lines, "what differs from pretrain"


def test_one_of_a_list_is_set_whole(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(SMOKE.read_text().replace("[data]", '[data]\nshards = ["a", "b"]', 1))
    config = read_config(path, ["--data.shards.1=c", '--pretrain.sources.0={path = "x"}'])
    assert config.data.shards == ("a", "c") and config.pretrain.sources[0].path == "x"


@pytest.mark.parametrize("section", ["model = 3", 'model = "abc"', "model = [1]"])
def test_a_section_that_is_none_in_the_file_is_named(section, tmp_path):
    (tmp_path / "my.toml").write_text(f'folder = "x"\n{section}\n')
    with pytest.raises(UserError, match="--model.layers=2: (model is no section in the file|there are 1 of these)"):
        read_config(tmp_path / "my.toml", ["--model.layers=2"])


def test_a_section_that_is_missing_is_called_a_section(tmp_path):
    text = SMOKE.read_text()
    start = text.index("[model]")
    (tmp_path / "a.toml").write_text(text[:start] + text[text.index("\n[", start) + 1 :])
    with pytest.raises(UserError, match="model: this section is missing; its keys are dim, "):
        read_config(tmp_path / "a.toml", [])
