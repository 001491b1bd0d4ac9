"""The benchmarks' harness: every preset runs at a tiny size, wrong results are noticed, files can be read again."""

import json
import os
import sys
from importlib import import_module

import pytest
import torch
from conftest import run_command

from benchmarks import check, harness, measure, modules, plot
from benchmarks.work import Cost, Preset, Target, Unavailable, Work
from onevocab.common.errors import UserError
from onevocab.kernels import c_library
from onevocab.kernels.backend import Choice

NAMES = modules.names()
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", NAMES)
def test_checks_every_preset(name, capsys):
    module = import_module(f"benchmarks.{name}")
    module.main(["--check", "--tiny", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "not the Triton kernels" in out and "within the bound" in out
    for title in module.PRESETS:
        assert f"{name} {title}: " in out


@pytest.mark.parametrize("name", NAMES)
def test_lists_presets(name, capsys):
    module = import_module(f"benchmarks.{name}")
    module.main(["--list"])
    out = capsys.readouterr().out
    assert all(f"{title}: {preset.description}" in out for title, preset in module.PRESETS.items())


def test_runs_as_a_command_and_writes_table_and_picture(tmp_path):
    out = tmp_path / "packed.json"
    command = [sys.executable, "-m", "benchmarks.attention", "--preset", "packed", "--tiny", "--device", "cpu",
               "--repetitions", "3", "--out", out]
    assert "written" in run_command(command, env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "4294967296"})
    result = json.loads(out.read_text())
    assert {"versions", "device", "date", "commit", "command"} <= set(result) and "--preset packed" in result["command"]
    assert result["command"].startswith("MALLOC_TRIM_THRESHOLD_=4294967296 python -m benchmarks.attention --preset ")
    [preset] = result["presets"].values()
    steps = {row["step"] for row in preset["rows"] if row["provider"] == "ours"}
    assert steps == {"forward", "both", "fresh", "fresh both"}
    chosen = "c" if c_library.library("attention") else "torch"
    assert f"attention: {chosen}" in preset["backend"] and preset["ceilings"]["copy_bytes_per_second"] > 0
    assert all(row["seconds"] > 0 and row["peak_bytes"] >= 0 and row["repetitions"] >= 3 for row in preset["rows"])
    table = out.with_suffix(".md").read_text()
    assert "not the Triton kernels" in table and "| **ours** |" in table
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_nearly_as_near_code_passes_and_a_farther_one_does_not():
    """Codes that float32 cannot tell apart may be exchanged; 1e-4 it can tell."""
    from benchmarks import vq

    def calls(gap):
        codebook = torch.eye(4)[:2] * torch.tensor([[1.0], [1 + gap]])
        latents = torch.zeros(3, 4)  # nearest to code 0
        return (latents, codebook), {"ours": lambda x, c: torch.ones(3, dtype=torch.long)}

    work = vq.build({"latents": 3, "dim": 4, "codes": 2}, CPU, torch.float32)
    inputs, ours = calls(1.2e-7)
    assert 0 < check.check(work, ours, inputs)["ours"]["worst_error_over_bound"] <= 1
    inputs, ours = calls(1e-4)
    with pytest.raises(UserError, match="output 0"):
        check.check(work, ours, inputs)


def test_ours_that_cannot_start_stops_the_benchmark():
    def cannot():
        raise RuntimeError("no kernel")

    presets = addition()
    build = presets["add"].build

    def broken(*given):
        work = build(*given)
        work.providers["ours"] = cannot
        return work

    presets["add"].build = broken
    with pytest.raises(RuntimeError, match="no kernel"):
        harness.run("addition", presets, ["add"], CPU, just_check=True)


def test_a_bound_that_is_not_finite_is_refused():
    work = Work(lambda: (), {}, lambda x: x / 0, {})
    with pytest.raises(UserError, match="not finite"):
        check.check(work, {"ours": lambda x: x}, (torch.ones(3),))


def test_ours_on_a_gpu_must_be_triton(monkeypatch):
    monkeypatch.setattr(check, "chosen", lambda: {"attention": Choice("torch", "head dims"),
                                                    "other": Choice("triton", "")})
    check.require_triton(("other",))
    with pytest.raises(UserError, match="attention ran as torch .*nothing was timed"):
        check.require_triton(("attention", "other"))


def test_backward_builds_its_graph_before_the_clock():
    work = addition()["add"].build({"n": 5}, CPU, torch.float32)
    backward = harness.step_calls(work, "backward", None, torch.mul, [work.inputs(), work.inputs()])
    for i in range(3):
        measure.prepare(backward, i)
        assert len(backward(i)) == 2
    with pytest.raises(IndexError):
        backward(3)  # its graph is used up
    assert len(measure.time_all({"ours": backward}, CPU, 0.01, 5)["ours"]) >= 3


def addition(wrong: float = 0.0, broken: bool = False) -> dict[str, Preset]:
    """A benchmark of x + y whose own result can be wrong, beside a peer that can raise."""
    def peer(x, y):
        if broken:
            raise RuntimeError("cannot do this\nand a second line")
        return y + x

    def build(shape, device, dtype):
        return Work(lambda: tuple(torch.randn(shape["n"], dtype=dtype) for _ in range(2)),
                    {"ours": lambda: lambda x, y: x + y + wrong, "peer": lambda: peer}, torch.add,
                    {"both": Cost(1000, 1000)}, differentiable=2)

    return {"add": Preset("addition", build, {"cpu": {"n": 50}, "tiny": {"n": 5}},
                          {"cpu": [Target("time", "both", ("peer",), at_least=1e-6)]})}


def test_a_wrong_result_stops_the_benchmark():
    with pytest.raises(UserError, match="ours is wrong"):
        harness.run("addition", addition(wrong=1e-3), ["add"], CPU, seconds=0.1)
    with pytest.raises(UserError, match="ours is wrong"):
        harness.run("addition", addition(wrong=float("nan")), ["add"], CPU, just_check=True)


def test_a_peer_that_cannot_is_named_and_left_out():
    result = harness.run("addition", addition(broken=True), ["add"], CPU, seconds=0.1, repetitions=3)
    preset = result["presets"]["add"]
    assert preset["not_run"] == {"peer": "RuntimeError: cannot do this"}
    assert [row["provider"] for row in preset["rows"]] == ["ours"]
    assert preset["targets"][0]["met"] is None
    assert "not measured" in plot.markdown(result)


def test_targets_are_judged():
    result = harness.run("addition", addition(), ["add"], CPU, seconds=0.2, repetitions=5)
    [verdict] = result["presets"]["add"]["targets"]
    assert verdict["met"] and verdict["measured"] > 0
    rows = [{"step": "both", "provider": name, "times_ours": times, "peak_bytes": peak, "bytes_per_second": 50.0}
            for name, times, peak in (("ours", 1.0, 100), ("slow", 4.0, 900), ("fast", 2.0, 400))]
    targets = [Target("time", "both", ("slow", "fast"), at_least=2.0), Target("time", "both", ("fast",), at_most=0.4),
               Target("memory", "both", ("slow", "fast"), at_least=4.0), Target("copy", "both", at_least=0.6),
               Target("time", "both", ("absent",), at_least=1.0)]
    found = harness.judge(targets, rows, {"copy_bytes_per_second": 100.0})
    assert [(each["measured"], each["met"]) for each in found] == [
        (2.0, True), (0.5, False), (4.0, True), (0.5, False), (None, None)]


def test_memory_is_what_a_call_allocates():
    kept = []
    found = measure.peak_memory(lambda i: kept.append((torch.ones(1 << 20) + 1).sum()), CPU)
    assert 2 * 4 << 20 <= found < 2.2 * 4 * 2**20


def test_a_step_s_memory_in_a_process_of_its_own(capsys):
    """More than the optimiser's two moments, and growing with the model."""
    from benchmarks import memory, train_step

    size = train_step.TINY | {"vocabulary": 50_000}
    found = memory.of_step("train_step", "mixed", "float32", size, "ours")
    assert 2 * 4 * size["dim"] * size["vocabulary"] < found < 2**29 if found else not memory.RESET.exists()
    assert memory.of_step("nothing", "mixed", "float32", size, "ours") is None
    assert "benchmarks.nothing" in capsys.readouterr().out


LANGUAGE = {"matmul", "attention", "norms, rotary", "SwiGLU", "loss", "optimizer", "embedding"}


@pytest.mark.parametrize("preset,kinds", [
    ("mixed", LANGUAGE), ("image", {"convolution", "GELU", "optimizer"}),
    ("audio", {"convolution", "GELU", "optimizer"}), ("decode", {"matmul", "attention", "norms, rotary", "SwiGLU"}),
    ("griffin_lim", {"Fourier transforms"}),
])
def test_a_profile_by_kind_of_work(preset, kinds, tmp_path, capsys):
    from benchmarks import profile_step

    profile_step.main(["--preset", preset, "--tiny", "--steps", "1", "--out", str(tmp_path / "profile.json")])
    found = json.loads((tmp_path / "profile.json").read_text())
    assert kinds <= set(found["kinds"]) and found["preset"] == preset
    assert 0 < found["not_arithmetic"] < 1 and "not arithmetic" in capsys.readouterr().out


def test_mixed_documents_are_packed_and_padded_alike():
    """The same documents, the same weights; and in float64 the same loss and gradients, computed by our definition."""
    from torch.func import functional_call

    from benchmarks import batches, train_step

    shape = train_step.PRESETS["mixed"].shapes["cpu"] | {"rows": 8}
    packed = batches.mixed_batches(2, shape, torch.Generator().manual_seed(0))[0]
    lengths = [n for row in packed["document"] for d, n in zip(*row.unique_consecutive(return_counts=True), strict=True)
               if d >= 0]
    assert max(lengths) <= 256 and min(lengths) >= 20 and sum(lengths) > 0.98 * packed["document"].numel()
    assert 0.4 < (packed["weights"].sum() / sum(lengths)) < 0.9  # what is only looked at does not count
    one = batches.padded(packed)
    assert one["ids"].shape == (len(lengths), max(lengths)) and one["weights"].sum() == packed["weights"].sum()
    assert one["attention_mask"].sum(1).tolist() == [int(n) for n in lengths]

    work = train_step.PRESETS["mixed"].build(shape | train_step.TINY, CPU, torch.float64)
    rows = train_step.mixed_batches(1, shape | train_step.TINY, torch.Generator().manual_seed(1))[0]
    single = batches.padded(rows)
    single["positions"] = torch.arange(single["ids"].shape[1]).expand_as(single["ids"])
    single["document"] = single["attention_mask"] - 1
    model = work.providers["ours"]().model.double()
    results = []
    for batch in (rows, single):
        weights = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
        loss = train_step.our_loss(lambda *given, w=weights: functional_call(model, w, given), batch,
                                   weights["embed_tokens.weight"])
        results.append([loss, *torch.autograd.grad(loss, list(weights.values()))])
    for of_rows, of_one in zip(*results, strict=True):
        torch.testing.assert_close(of_rows, of_one, rtol=1e-11, atol=1e-12)


def test_peers_have_our_weights_and_gradients(monkeypatch):
    """Every peer that is installed passes the check on mixed documents; one that is not says how to install it."""
    from benchmarks import peers, train_step

    result = harness.run("train_step", train_step.PRESETS, ["mixed"], CPU, dtype="float32", tiny=True, just_check=True)
    found = result["presets"]["mixed"]
    assert {"ours", "transformers", "transformers, padded"} <= set(found["checked"])
    assert all(each["worst_error_over_bound"] <= 1 for each in found["checked"].values())
    assert all("pip install" in reason for name, reason in found["not_run"].items() if name in ("litgpt", "torchtitan"))
    monkeypatch.setitem(sys.modules, "litgpt.model", None)
    with pytest.raises(Unavailable, match="pip install"):
        peers.litgpt(None, 100)


def test_packed_documents_fill_rows():
    from benchmarks.attention import packed

    document = packed(3, 4096, 16)
    for row in document:
        ids, lengths = row.unique_consecutive(return_counts=True)
        assert ids.tolist() == list(range(16)) and lengths.min() > 80 and lengths.max() < 520


@pytest.mark.parametrize("words,message", [
    (["--preset", "none"], "--preset none: choose from packed"),
    (["--shape", "depth=3"], "--shape depth=3"),
    (["--shape", "length=-3"], "--shape length=-3"),
    (["--shape", "heads=3", "kv_heads=2", "--tiny", "--check"], "multiple"),
    (["--repetitions", "1"], "at least 3"),
])
def test_mistakes_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        import_module("benchmarks.attention").main(["--device", "cpu", *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_a_file_of_something_else_is_refused(tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text("[]")
    with pytest.raises(SystemExit):
        plot.main([str(path)])
    assert "not a results file" in capsys.readouterr().err


def test_a_network_with_one_wrong_gradient_is_found():
    """Compared by norms, all weights together: a small gradient that is wrong must not drown in a large one."""
    def network(factor):
        return lambda large, small: (1e4 * large.square().sum() + (factor * small).sum())

    inputs = torch.randn(1000), torch.randn(3)
    work = Work(lambda: inputs, {}, network(1.0), {}, differentiable=2, whole=True)
    assert check.check(work, {"ours": network(1.0)}, inputs)["ours"]["worst_error_over_bound"] <= 1
    with pytest.raises(UserError, match="the worst of loss and gradients"):
        check.check(work, {"ours": network(1.0001)}, inputs)
