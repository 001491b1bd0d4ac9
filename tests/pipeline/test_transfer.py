"""Starting from pretrained weights and from another run: nothing that was learned changes before training, and a folder
that cannot be used is one line. The peers are transformers' Qwen3 and Hugging Face's own tokenizers."""

import json
import re
from pathlib import Path

import pytest
import tomli_w
import torch
from conftest import ROOT, train
from safetensors.torch import load_file, save_file
from tiny import save_step, tiny_tokenizers
from tiny_qwen import PIECES, ROWS, edit, write_qwen

from onevocab.common.checkpoint_files import list_steps
from onevocab.common.errors import UserError
from onevocab.generation import AnyToAny
from onevocab.model.config import ModelConfig
from onevocab.model.decoder import Decoder, qwen3_config, to_qwen3_state_dict
from onevocab.model.pretrained import agreed, check_weights, read_shape, weight_files
from onevocab.pipeline.config import read_config
from onevocab.pipeline.plan import plan_lines
from onevocab.pipeline.sources import OldRun, PretrainedFolder, open_source
from onevocab.tokenizers.bundle import Tokenizers
from onevocab.tokenizers.pretrained_text import read_tokenizer
from onevocab.tokenizers.vocabulary import Vocabulary


@pytest.fixture
def folder(tmp_path, peer) -> Path:
    write_qwen(tmp_path / "qwen", peer)
    return tmp_path / "qwen"


def extended(folder: Path) -> tuple[Decoder, Vocabulary]:
    """The decoder that a run on this folder starts training with."""
    source = PretrainedFolder(folder)
    source.check()
    text = source.text()
    layouts = [tokenizer.layout for tokenizer in tiny_tokenizers().media.values()]
    vocabulary = Vocabulary.build(text.size, layouts, text.size - text.stop)
    decoder = Decoder(source.config, vocabulary.size)
    source.load(decoder, vocabulary)
    return decoder.eval(), vocabulary


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("tied, dtype, shard", [
    (True, torch.float32, "5GB"), (False, torch.bfloat16, "60KB"), (False, torch.float32, "100KB"),
    (True, torch.float16, "5GB")])
@torch.no_grad()
def test_text_logits_are_those_of_transformers_and_new_rows_the_mean(tmp_path, peer, tied, dtype, shard):
    theirs = write_qwen(tmp_path, peer, tied, dtype, shard)
    assert (len(weight_files(tmp_path)) > 1) == (shard != "5GB")
    decoder, vocabulary = extended(tmp_path)
    ids = torch.randint(0, ROWS, (2, 60))
    ours = decoder.logits(decoder(ids, torch.arange(60).expand(2, 60), None))
    assert (ours[..., :ROWS] - theirs(ids).logits).abs().max() <= 1e-5
    assert vocabulary.text_size == ROWS and vocabulary.text == range(PIECES)
    assert decoder.old_rows == ROWS
    for name in decoder.row_parameters:
        weight = decoder.get_parameter(name)
        torch.testing.assert_close(weight[ROWS:], weight[:PIECES].mean(0).expand(vocabulary.size - ROWS, -1))
    assert len(decoder.row_parameters) == (1 if tied else 2)
    # and back, with the new rows
    from transformers import Qwen3Config, Qwen3ForCausalLM

    back = Qwen3ForCausalLM(Qwen3Config(**qwen3_config(decoder.config, vocabulary.size))).eval()
    assert back.load_state_dict(to_qwen3_state_dict(decoder), strict=True)
    ids = torch.randint(0, vocabulary.size, (2, 60))
    ours = decoder.logits(decoder(ids, torch.arange(60).expand(2, 60), None))
    assert (ours - back(ids).logits).abs().max() <= 1e-5


def test_the_shape_is_read_in_both_spellings(folder):
    new = read_shape(folder)
    assert new == (ModelConfig(dim=48, layers=2, heads=4, kv_heads=2, head_dim=16, mlp_dim=64, rope_theta=5e4,
                               tie_embeddings=True, max_length=512), ROWS)

    def old(data):
        del data["rope_parameters"], data["layer_types"], data["head_dim"]
        data.update(rope_theta=50_000, rope_scaling=None)

    edit(folder / "config.json", old)
    assert read_shape(folder) == (new[0].model_copy(update={"head_dim": 128}), ROWS)


def test_what_model_says_must_agree():
    shape = ModelConfig(dim=64, max_length=512)
    assert agreed(shape, {"dim": 64, "max_length": 100}, "x") == ModelConfig(dim=64, max_length=100)
    for key, value in (("dim", 128), ("tie_embeddings", False), ("max_length", 1024)):
        with pytest.raises(UserError, match=f"model.{key} = {value}"):
            agreed(shape, {key: value}, "x")


@pytest.mark.parametrize("change, message", [
    ({"model_type": "qwen2"}, "model_type = qwen2"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"attention_bias": True}, "attention_bias"),
    ({"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ({"hidden_size": "48"}, "hidden_size"),
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": 10**30}, "hidden_size"),
    ({"num_attention_heads": 3}, "multiple of kv_heads"),
    ({"head_dim": 15}, "even"),
    ({"vocab_size": -1}, "vocab_size"),
    ({"vocab_size": 10**12}, "vocab_size"),
    ({"vocab_size": ROWS + 1}, "embed_tokens.weight has the shape"),
    ({"num_hidden_layers": 1_000_000}, "num_hidden_layers = 1000000"),
    ({"num_hidden_layers": 1}, "num_hidden_layers = 1"),
    ({"intermediate_size": 65}, "mlp"),
    ({"tie_word_embeddings": False}, "lm_head.weight"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
])
def test_a_configuration_that_is_not_supported_is_one_line(folder, change, message):
    edit(folder / "config.json", lambda data: data.update(change))
    with pytest.raises(UserError) as error:
        PretrainedFolder(folder).check()
    assert message in str(error.value) and "\n" not in str(error.value) and str(folder) in str(error.value)


def test_damaged_and_hostile_weights_are_one_line(tmp_path, peer):
    def refused(message, prepare):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        write_qwen(folder, peer, shard="60KB")
        prepare(folder, folder / "model.safetensors.index.json")
        with pytest.raises(UserError) as error:
            check_weights(folder, *read_shape(folder))
        assert message in str(error.value) and "\n" not in str(error.value), error.value

    def moved(name):
        return lambda folder, index: edit(index, lambda data: data["weight_map"].update({"model.norm.weight": name}))

    def replaced(change):
        def apply(folder, index):
            path = weight_files(folder)[-1]
            tensors = load_file(path)
            change(tensors)
            save_file(tensors, path)
        return apply

    for name in ("../out.safetensors", "/etc/x.safetensors", "model.bin", "a/b.safetensors", 3):
        refused("not the name of a safetensors file", moved(name))
    refused("is missing", moved("other.safetensors"))
    refused("weight_map", lambda folder, index: index.write_text("[]"))
    refused("not valid JSON", lambda folder, index: index.write_text("{"))
    refused("cannot be read", lambda folder, index: weight_files(folder)[0].write_bytes(b"\xff" * 100))
    refused("no weight of Qwen3", replaced(lambda t: t.update({"evil": torch.zeros(2)})))
    refused("has the shape [3]", replaced(lambda t: t.update({"model.norm.weight": torch.zeros(3)})))
    refused("I8", replaced(lambda t: t.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)})))
    refused("is in none", replaced(lambda t: t.pop("model.norm.weight")))
    refused("not there", replaced(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})))
    refused("is missing", lambda folder, index: index.unlink())


# ------------------------------------------------------------------------------------------------ another run


def old_run(folder: Path) -> Path:
    """A run that knows pictures and no sound."""
    bundle = tiny_tokenizers()
    bundle = Tokenizers(bundle.text, {"image": bundle.media["image"]})
    bundle.save(folder / "tokenizers")
    save_step(folder / "pretrain", 5, bundle.vocab, seed=1)
    save_step(folder / "instruct", 10, bundle.vocab)
    return folder


@torch.no_grad()
def test_a_run_gets_another_medium_and_forgets_nothing(tmp_path):
    run = old_run(tmp_path / "old")
    before = AnyToAny.load(run)
    source = open_source(None, str(run))
    source.check()
    new = source.vocabulary().extended([tiny_tokenizers().media["audio"].layout])
    assert before.vocab.is_prefix_of(new) and list(new.spans) == ["image", "audio"]
    decoder = Decoder(source.config, new.size)
    source.load(decoder, new)
    ids, positions = torch.randint(0, before.vocab.size, (2, 50)), torch.arange(50).expand(2, 50)
    old = before.model.logits(before.model(ids, positions, None))
    assert torch.equal(decoder.logits(decoder(ids, positions, None), 0, before.vocab.size), old)
    used = torch.from_numpy(before.vocab.in_use())
    assert used.sum() == before.vocab.size - 64
    weight = decoder.embed_tokens.weight
    torch.testing.assert_close(weight[before.vocab.size :], weight[: len(used)][used].mean(0).expand(
        new.size - len(used), -1))
    assert decoder.old_rows == before.vocab.size < new.size


def test_a_run_that_cannot_be_the_start_is_one_line(tmp_path):
    with pytest.raises(UserError, match="there is no run"):
        open_source(None, str(tmp_path / "nosuch"))
    with pytest.raises(UserError, match="one of them"):
        open_source("a", "b")
    run = old_run(tmp_path / "old")
    source = OldRun(run)
    reordered = Vocabulary.build(source.vocabulary().text_size, [
        media.layout for media in reversed(tiny_tokenizers().media.values())])
    with pytest.raises(UserError, match="another vocabulary"):
        source.load(Decoder(source.config, reordered.size), reordered)
    wider = Decoder(source.config.model_copy(update={"dim": 40}), source.vocabulary().size)
    with pytest.raises(UserError, match="of another model: embed_tokens.weight"):
        source.load(wider, source.vocabulary())
    weights = run / "instruct" / "step-10" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="step-10.*damaged"):
        OldRun(run).check()
    save_step(run / "instruct", 20, tiny_tokenizers().vocab)
    with pytest.raises(UserError, match="another vocabulary"):
        OldRun(run)


# ------------------------------------------------------------------------------------------------ train.py


def smoke(tmp_path: Path, *left_out: str) -> Path:
    """configs/smoke.toml without these lines of [model], and with as little sound."""
    lines = (ROOT / "configs" / "smoke.toml").read_text().splitlines()
    start = lines.index("[model]")
    path = tmp_path / "smoke.toml"
    path.write_text("\n".join(line for at, line in enumerate(lines)
                              if not (at > start and line.split(" ")[0] in left_out)))
    return path


SHAPE = ("dim", "layers", "heads", "kv_heads", "head_dim", "mlp_dim")


def test_the_configuration_takes_its_shape_from_the_folder(tmp_path, folder):
    config = read_config(smoke(tmp_path, *SHAPE), [f"--model.init={folder}", "--model.max-length=256"])
    assert config.model.shape == read_shape(folder)[0].model_copy(update={"max_length": 256})
    planned = plan_lines(config, ["--plan.flops=1e12"])
    assert f"{ROWS:,} of {folder}" in planned[0]
    with pytest.raises(UserError, match="model.dim = 64"):
        read_config(smoke(tmp_path), [f"--model.init={folder}"])
    with pytest.raises(UserError, match="model.kv_heads = 1"):
        read_config(smoke(tmp_path, *SHAPE), [f"--model.init={folder}", "--model.kv-heads=1"])
    with pytest.raises(UserError, match="there is no folder"):
        read_config(smoke(tmp_path), ["--model.init=nosuch"])
    assert read_config(smoke(tmp_path), []).model.shape.dim == 64
    # a resolved configuration says it all, and is read again
    (tmp_path / "resolved.toml").write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))
    assert read_config(tmp_path / "resolved.toml", []) == config


SILENT = [f"--data.demo.{kind}=0" for kind in ("narrated", "heard", "spoken-question", "hear", "say", "say-seen",
                                               "draw-heard")]


@pytest.mark.slow
def test_a_whole_run_from_pretrained_weights_and_one_that_adds_sound_to_it(tmp_path, peer):
    folder, first, second = tmp_path / "qwen", tmp_path / "first", tmp_path / "second"
    write_qwen(folder, peer)
    arguments = [str(smoke(tmp_path, *SHAPE)), "--data.demo.voices=tones"]
    silent = tmp_path / "silent.toml"
    silent.write_text(re.sub(r"\[audio\]\n[^\[]*", "", Path(arguments[0]).read_text()))
    done = train(silent, arguments[1], f"--folder={first}", f"--model.init={folder}", *SILENT)
    assert done.returncode == 0, done.stderr
    one = AnyToAny.load(first)
    assert one.vocab.modalities == ["text", "image"] and one.vocab.text_size == ROWS
    assert one.tokenizers.text.to_json() == read_tokenizer(folder, ROWS).to_json()
    text = one.generate("What is this?", want="text", max_new_tokens=8)
    assert all(id < PIECES or id == one.vocab.end_of_turn for id in text.ids)
    assert "init" not in json.loads((list_steps(first / "instruct")[0] / "model.json").read_text())["config"]
    again = train(str(first / "config.toml"))
    assert again.returncode == 0, again.stderr
    edit(folder / "tokenizer.json", lambda data: data.update(version="1.1"))
    other = train(str(first / "config.toml"))
    assert other.returncode == 2 and "tokenizer.json" in other.stderr and "Traceback" not in other.stderr

    done = train(*arguments, f"--folder={second}", f"--init-from={first}")
    assert done.returncode == 0, done.stderr
    two = AnyToAny.load(second)
    assert two.vocab.modalities == ["text", "image", "audio"] and one.vocab.is_prefix_of(two.vocab)
    for name in ("text.json", "image.json", "image.safetensors"):
        assert (first / "tokenizers" / name).read_bytes() == (second / "tokenizers" / name).read_bytes(), name
    assert not list((second / "image").glob("step-*")), "its tokenizer is not trained again"
    itself = train(*arguments, f"--folder={first}", f"--init-from={first}")
    assert itself.returncode == 2 and "itself" in itself.stderr, itself.stderr
