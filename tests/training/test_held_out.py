"""The loss on held-out data: it costs training nothing, is the same on any number of ranks, and tells memorising."""

import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny_training import CONFIG, Loader, on_two_ranks, run

from onevocab.common.checkpoint_files import best_step, list_steps, steps_to_use
from onevocab.training import distributed, loop
from onevocab.training.held_out import memorising
from onevocab.training.metrics import curves, read_metrics


def held_out(rank: int = 0, world: int = 1) -> list:
    loader = Loader(rank=rank, world=world)
    loader.taken = 100
    return [loader.next_batch() for _ in range(2)]


def losses(folder) -> dict[int, float]:
    return {line["step"]: line["valid_loss"] for line in read_metrics(folder / "metrics.jsonl") if "valid_loss" in line}


EVERY = CONFIG.model_copy(update={"valid_every": 5, "precision": "float32"})


def test_training_is_the_same_with_it(tmp_path):
    plain = run(tmp_path / "plain", config=EVERY)
    weights = run(tmp_path / "held", config=EVERY, held_out=held_out())
    assert all(torch.equal(plain[name], weights[name]) for name in plain)
    found = losses(tmp_path / "held")
    assert list(found) == [5, 10, 12] and losses(tmp_path / "plain") == {}
    lines = read_metrics(tmp_path / "held" / "metrics.jsonl")
    assert all(line["valid_loss"] == line["valid_loss_text"] for line in lines if "valid_loss" in line)
    assert found[12] < found[5] and curves(lines, "stage") is not None
    empty = [type(batch)(**{**vars(batch), "loss_weights": 0 * batch.loss_weights,
                            "document_ids": 0 * batch.document_ids - 1}) for batch in held_out()]
    run(tmp_path / "empty", config=EVERY, held_out=held_out() + empty)  # a rank's rows that fill up
    assert losses(tmp_path / "empty") == found
    off = run(tmp_path / "off", config=EVERY.model_copy(update={"valid_every": 0}), held_out=held_out())
    assert losses(tmp_path / "off") == {} and torch.equal(off["embed_tokens.weight"], plain["embed_tokens.weight"])


def test_measuring_is_not_counted_as_training_time(tmp_path, monkeypatch):
    clock = [0.0]

    def passed(seconds: float) -> float:
        clock[0] += seconds
        return clock[0]

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: passed(0.001)))
    monkeypatch.setattr(loop, "held_out_losses", lambda *_: {"valid_loss": passed(1e6)})
    run(tmp_path, config=EVERY, held_out=held_out())
    speeds = [line["tokens_per_second"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss_text" in line]
    assert len(speeds) > 1 and min(speeds) > 1


def test_the_best_is_kept_and_used(tmp_path):
    # Trained on nothing but noise in the held-out rows' stead: the loss on them is lowest at some early step.
    config = EVERY.model_copy(update={"valid_every": 1, "keep_best": True, "save_every": 4})
    wrong = [type(batch)(**{**vars(batch), "targets": 19 - batch.targets}) for batch in held_out()]
    weights = run(tmp_path, config=config, held_out=wrong)
    found = losses(tmp_path)
    lowest = min(found, key=found.get)
    assert lowest < 8, "the data of this test no longer turn"
    assert best_step(tmp_path / "stage").name == f"step-{lowest}"
    assert [path.name for path in list_steps(tmp_path / "stage")] == ["step-12", "step-8", f"step-{lowest}"]
    assert [path.name for path in steps_to_use(tmp_path / "stage")] == [f"step-{lowest}", "step-12", "step-8"]
    # Resumed before and after it: the same weights and the same best.
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "stage", cut / "stage")
    shutil.rmtree(cut / "stage" / "step-12")
    again = run(cut, config=config, held_out=wrong)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert best_step(cut / "stage").name == f"step-{lowest}"
    assert losses(cut) == {step: loss for step, loss in found.items() if step > 8}
    (cut / "stage" / "best.json").write_text("{broken")
    assert steps_to_use(cut / "stage") == list_steps(cut / "stage")


def _on_rank(rank: int, folder, config) -> None:
    distributed.init("cpu")
    loader = Loader(rank=rank, world=2)
    run(folder, loader, config, held_out=held_out(rank, 2))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_measure_what_one_does(tmp_path, parallel):
    config = EVERY.model_copy(update={"parallel": parallel, "micro_batch_size": 1, "steps": 6, "valid_every": 3})
    run(tmp_path / "one", config=EVERY.model_copy(update={"steps": 6, "valid_every": 3}), held_out=held_out())
    (tmp_path / "ranks").mkdir()
    on_two_ranks(partial(_on_rank, folder=tmp_path / "two", config=config), tmp_path / "ranks")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys() == {3, 6} and all(abs(one[step] - two[step]) < 1e-4 for step in one)


def test_memorising_is_told_apart():
    def lines(train, held, stage="instruct"):
        return [{"stage": stage, "step": step, f"loss_{name}": value} for name in ("text", "image")
                for step, value in zip((10, 20, 30), train, strict=True)] + [
                {"stage": stage, "step": step, "valid_loss_text": value, "valid_loss_image": 1.0, "valid_loss": 1.0}
                for step, value in zip((10, 20, 30), held, strict=True)]

    told = memorising(lines((3.0, 2.0, 1.0), (3.1, 2.4, 2.7)), "instruct")
    assert "instruct is memorising" in told and "text (held out 2.4 at step 20, 2.7 at the end" in told
    assert "image" not in told and "\n" not in told
    for train, held in (((3, 2, 1), (3.1, 2.4, 2.5)), ((3, 2, 2.1), (3.1, 2.4, 2.7)), ((3, 2, 1), (3.1, 2.4, 2.0))):
        assert memorising(lines(train, held), "instruct") is None
    assert memorising(lines((3.0, 2.0, 1.0), (3.1, 2.4, 2.7)), "pretrain") is memorising([], "x") is None
