"""The plan's numbers against what is counted and measured."""

import re

import pytest
import torch
from conftest import ROOT, train
from tiny_training import Batch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from onevocab.model.config import ModelConfig
from onevocab.model.decoder import Decoder, qwen3_config
from onevocab.pipeline.config import read_config
from onevocab.pipeline.plan import plan_lines
from onevocab.training.config import OptimizerConfig
from onevocab.training.loop import NextTokenLoss, backward
from onevocab.training.muon import build_optimizers
from onevocab.training.parallel import recompute_layers
from onevocab.training.plan import activations, plan

CPU = torch.device("cpu")
SHAPES = [ModelConfig(), ModelConfig(dim=256, layers=4, heads=8, kv_heads=4, head_dim=32, mlp_dim=768,
                                     tie_embeddings=False)]


def batch(rows: int, length: int, vocabulary: int, document: int) -> Batch:
    index = torch.arange(length).expand(rows, -1)
    return Batch(torch.randint(vocabulary, (rows, length)), torch.randint(vocabulary, (rows, length)),
                 torch.ones(rows, length), torch.zeros(rows, length, dtype=torch.uint8), index % document,
                 (index // document).int())


@pytest.mark.parametrize("config", SHAPES, ids=["demo", "untied"])
def test_flops_are_those_that_torch_counts(config):
    """In transformers' Qwen3 of the same shape, whose attention computes every pair of a row."""
    transformers = pytest.importorskip("transformers")
    vocabulary, length = 3072, 128
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        **qwen3_config(config, vocabulary), attn_implementation="eager"))
    ids = torch.randint(vocabulary, (2, length))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    planned = Decoder(config, vocabulary).flops(1, length)
    assert planned == pytest.approx(counter.get_total_flops() / ids.numel(), rel=0.03)


def measured_peak(step) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    current = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


@pytest.mark.parametrize(("config", "precision", "recompute"), [
    (SHAPES[0], "float32", False), (SHAPES[1], "float32", False),
    *(pytest.param(*rest, marks=pytest.mark.slow) for rest in (
        (SHAPES[0], "bfloat16", False), (SHAPES[1], "bfloat16", False), (SHAPES[0], "float32", True),
        (SHAPES[1], "float32", True), (SHAPES[0], "bfloat16", True), (SHAPES[1], "bfloat16", True)))])
def test_memory_is_what_is_measured(config, precision, recompute):
    vocabulary, rows, length = 3072, 16, 256
    module = NextTokenLoss(Decoder(config, vocabulary), 1e-5)
    if recompute:
        recompute_layers(module.decoder.layers)
    settings = OptimizerConfig(ema_decay=0.9)
    optimizers, data = build_optimizers(module.decoder, settings), batch(rows, length, vocabulary, 64)

    def make(layers: int) -> NextTokenLoss:
        return NextTokenLoss(Decoder(config.model_copy(update={"layers": layers}), vocabulary), 1e-5)

    kept = activations(make, batch(2, 128, vocabulary, 64), config.layers, rows * length, precision,
                       recompute)
    planned = plan(module, 0.0, kept, settings)

    def step() -> None:
        backward(module, data, 1 / data.loss_weights.sum(), 0, precision, CPU)
        optimizers.step(0.1)

    state = [*optimizers.tensors().values(), *optimizers.averages().values()]
    assert planned.optimizer == sum(x.numel() * x.element_size() for x in state)
    step()
    optimizers.zero_grad()
    measured = measured_peak(step) + planned.weights + planned.optimizer
    assert planned.memory == pytest.approx(measured, rel=0.15)


def test_a_plan_writes_nothing_and_makes_no_weights(tmp_path):
    shape = {"dim": 2048, "layers": 28, "heads": 16, "kv_heads": 8, "head_dim": 128, "mlp_dim": 6144}
    done = train("configs/demo.toml", f"--folder={tmp_path / 'run'}", "--plan", "--plan.devices=8", "--plan.watts=700",
                 "--plan.flops=989e12", *(f"--model.{key}={value}" for key, value in shape.items()),
                 "--pretrain.loader.global_batch_size=64", "--instruct.loader.global_batch_size=64",
                 "--pretrain.steps=100000")
    assert done.returncode == 0, done.stderr
    assert "1.42 G parameters" in done.stdout and "kWh" in done.stdout and not (tmp_path / "run").exists()


SIZES = {"demo": (1e6, 1), "hopper": (3e7, 1), "small": (2e7, 1), "base": (4e8, 8), "large": (2e9, 8), "7b": (7e9, 64)}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in ("large", "7b") else ())
                                  for name in SIZES])
def test_every_size_is_planned(name):
    """In this process; docs/training.md has a row of each. It is of bfloat16, as on a GPU."""
    parameters, devices = SIZES[name]
    config = read_config(ROOT / "configs" / f"{name}.toml", [
        "--device_flops=989e12", "--folder=runs/none", "--pretrain.precision=bfloat16",
        "--instruct.precision=bfloat16"])
    shown = "\n".join(plan_lines(config, [f"--plan.devices={devices}"]))
    size, unit = re.match(r"([\d.]+) (\w) parameters", shown).groups()
    assert 0.7 < float(size) * {"M": 1e6, "G": 1e9}[unit] / parameters < 1.5
    for amount, prefix in re.findall(r"memory +([\d.]+) (\w)iB a device", shown):
        assert float(amount) * {"M": 2**20, "G": 2**30}[prefix] < 80 * 2**30
    tokens, work, memory, disk, time = (re.search(pattern, shown)[1] for pattern in (
        r"pretrain: (\S+ \w) tokens", r"work +(.*?) a token", r"memory +(.*?) a device", r"disk +(.*?) a checkpoint",
        r"time +(.*?) on "))
    row = f"| `{name}` | {size} {unit} | {tokens} | {work} | {memory} | {disk} | {devices} | {time} |"
    assert row in (ROOT / "docs" / "training.md").read_text(), row


def test_a_plan_of_a_run_says_how_often_its_data_are_shown(smoke_run):
    before = {path: path.stat().st_mtime_ns for path in smoke_run.rglob("*.json")}
    done = train("configs/smoke.toml", f"--folder={smoke_run}", "--plan")
    assert done.returncode == 0, done.stderr
    assert "of the trained tokenizers" in done.stdout and "documents of" in done.stdout and "kWh" not in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in smoke_run.rglob("*.json")}
    wrong = train("configs/smoke.toml", "--plan.mfu=7")
    assert wrong.returncode == 2 and "--plan.mfu=7" in wrong.stderr
