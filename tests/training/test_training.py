"""Optimisers, schedules, checkpoints: the promises of training."""

import math
import random
import shutil

import numpy as np
import pytest
import torch
from tiny_training import Loader, on_two_ranks
from torch import nn

from onevocab.common.checkpoint_files import list_steps
from onevocab.common.errors import UserError
from onevocab.model.weights import load_into, load_weights
from onevocab.training import checkpoint, distributed
from onevocab.training.config import OptimizerConfig
from onevocab.training.muon import COEFFICIENTS, Muon, build_optimizers, orthogonalise
from onevocab.training.schedule import ScheduleConfig, multiplier


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up, self.down = nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False)
        self.same = nn.Linear(8, 12, bias=False)
        self.norm = nn.LayerNorm(8)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.down(torch.tanh(self.up(x)) * self.same(x))
        return self.norm(x) @ self.embed.weight.T


def train(model, optimizers, steps, start=0):
    """Some steps on data from torch's global generator, as a loop with dropout would draw."""
    losses = []
    for step in range(start, start + steps):
        ids = torch.randint(0, 11, (4, 6))
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ((ids * 3 + 1) % 11).flatten())
        loss.backward()
        optimizers.step(multiplier(ScheduleConfig(), step, 20))
        optimizers.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12), (3, 10, 24)])
def test_orthogonalise(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    singular = torch.linalg.svdvals(orthogonalise(x))
    if shape[-1] != shape[-2]:  # a square random matrix has singular values near 0, which five steps do not lift
        assert 0.6 < singular.min()
    assert singular.max() < 1.25
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    cosine = (orthogonalise(x) * (u @ v)).sum() / (orthogonalise(x).norm() * (u @ v).norm())
    assert cosine > 0.95


@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-9])
@pytest.mark.parametrize("shape", [(12, 40), (90, 12), (2, 16, 144)])
def test_wide_matrices_take_the_same_steps_by_their_gram_matrix(shape, smallest):
    """Singular values from 1 to `smallest`, whose eigenvalues in float32 are noise."""
    a, b, c = COEFFICIENTS
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0, math.log10(smallest), min(shape[-2:]), dtype=torch.float64)
    given = (u * values) @ v
    x = given / given.norm(dim=(-2, -1), keepdim=True)
    x = x.mT if shape[-2] > shape[-1] else x
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    exact = x.mT if shape[-2] > shape[-1] else x
    for kind, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-3)):
        assert (orthogonalise(given.to(kind)) - exact).norm() <= tolerance * exact.norm()


def test_muon_equals_torchs_but_for_its_rounding():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(s) * 0.1) for s in ((24, 8), (8, 24), (16, 16))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    muon = Muon([(str(i), p) for i, p in enumerate(ours)], lr=0.02, momentum=0.95, weight_decay=0.1)
    peer = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1, nesterov=True, adjust_lr_fn="original")
    for _ in range(3):
        before = [p.detach().clone() for p in ours]
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        muon.step()
        peer.step()
        for a, b, old in zip(ours, theirs, before, strict=True):  # theirs iterates in bfloat16
            assert (a - b).norm() < 0.02 * (a - old).norm()
            b.data.copy_(a.data)


def test_each_parameter_has_one_optimiser():
    model = Small()
    optimizers = build_optimizers(model, OptimizerConfig())
    of = {key: {id(p) for p in member.parameters} for key, member in optimizers.members.items()}
    assert of["muon"] == {id(m.weight) for m in (model.up, model.down, model.same)}
    assert of["adamw"] == {id(p) for p in model.parameters()} - of["muon"]


def test_training_learns():
    torch.manual_seed(0)
    model = Small()
    losses = train(model, build_optimizers(model, OptimizerConfig(other_lr=0.02)), 20)
    assert losses[-1] < 0.6 * losses[0]


def test_schedule():
    wsd = [multiplier(ScheduleConfig(warmup=0.1, decay=0.5), i, 100) for i in range(100)]
    assert 0 < wsd[0] < wsd[5] < 1 and wsd[10:51] == [1.0] * 41
    assert all(a > b for a, b in zip(wsd[50:], wsd[51:], strict=False)) and 0 < wsd[-1] < 0.03
    cosine = [multiplier(ScheduleConfig(kind="cosine", warmup=0, floor=0.1), i, 100) for i in range(101)]
    assert cosine[0] == 1 and abs(cosine[50] - 0.55) < 1e-9 and abs(cosine[100] - 0.1) < 1e-9
    assert multiplier(ScheduleConfig(kind="constant", warmup=0), 99, 100) == 1
    assert multiplier(ScheduleConfig(), 0, 1) > 0
    with pytest.raises(ValueError, match="more than all steps"):
        ScheduleConfig(warmup=0.7, decay=0.5)


def save(tmp_path, step, model, optimizers):
    return checkpoint.save(tmp_path, step, model, {"vocab_size": 11}, optimizers, {"position": step})


def test_resume_is_bitwise_equal(tmp_path):
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    model = Small()
    optimizers = build_optimizers(model, OptimizerConfig())
    train(model, optimizers, 5)
    save(tmp_path, 5, model, optimizers)
    expected = train(model, optimizers, 5, 5), random.random(), np.random.rand()

    torch.manual_seed(123), random.seed(7), np.random.seed(9)
    again = Small()
    optimizers_again = build_optimizers(again, OptimizerConfig())
    found = checkpoint.load_latest(tmp_path, again, optimizers_again)
    assert (found.step, found.state, found.model_info, found.damaged) == (5, {"position": 5}, {"vocab_size": 11}, [])
    assert (train(again, optimizers_again, 5, 5), random.random(), np.random.rand()) == expected
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_keeps_two_and_sweeps_what_a_kill_left(tmp_path):
    model = Small()
    (tmp_path / ".step-3.part").mkdir(parents=True)
    (tmp_path / ".step-3.part" / "model.safetensors").write_text("half")
    assert checkpoint.load_latest(tmp_path, model) is None
    for step in (9, 10, 100):
        save(tmp_path, step, model, None)
    save(tmp_path, 100, model, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-10", "step-100"]
    assert list_steps(tmp_path)[0].name == "step-100"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer/shard-00001-model-00001-of-00001.safetensors",
                                  "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, name, how):
    model = Small()
    optimizers = build_optimizers(model, OptimizerConfig())
    save(tmp_path, 1, model, optimizers)
    path = save(tmp_path, 2, model, optimizers) / name
    content = path.read_bytes()
    if how == "flip":
        path.write_bytes(content[:30] + bytes([content[30] ^ 255]) + content[31:])
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    found = checkpoint.load_latest(tmp_path, model, optimizers)
    assert found.step == 1 and len(found.damaged) == 1 and str(path) in found.damaged[0]
    shutil.rmtree(tmp_path / "step-1")
    with pytest.raises(UserError, match="no checkpoint in .* can be used"):
        checkpoint.load_latest(tmp_path, model, optimizers)


def test_a_damaged_newer_checkpoint_takes_no_place_among_the_two_that_are_kept(tmp_path):
    model = Small()
    for step in (500, 1000):
        save(tmp_path, step, model, None)
    (tmp_path / "step-1000" / "model.safetensors").write_bytes(b"")
    assert checkpoint.find(tmp_path).step == 500
    save(tmp_path, 600, model, None)
    assert [path.name for path in list_steps(tmp_path)] == ["step-600", "step-500"]


@pytest.mark.parametrize(("name", "text"), [
    ("manifest.json", '{"files": {"\\ud800": {}}, "sha256": ""}'), ("manifest.json", "[" * 100_000),
    ("manifest.json", "[]"), ("manifest.json", '{"step": 3, "files": {}}'),
    ("optimizer/more.safetensors", "x"), ("state.json", "[]")])
def test_a_strange_file_is_passed_over_in_one_line(tmp_path, name, text):
    folder = save(tmp_path, 2, Small(), build_optimizers(Small(), OptimizerConfig()))
    (folder / name).write_text(text)
    with pytest.raises(UserError, match="no checkpoint in .* can be used") as raised:
        checkpoint.find(tmp_path)
    assert name in str(raised.value)


def test_weights_for_sampling(tmp_path):
    model = Small()
    folder = save(tmp_path, 3, model, None)
    weights, info = load_weights(folder)
    assert info == {"vocab_size": 11} and torch.equal(weights["up.weight"], model.up.weight)
    with pytest.raises(UserError, match="another model: up.weight is"):
        load_into(model, weights | {"up.weight": torch.zeros(3, 3)}, folder)
    with pytest.raises(UserError, match="no checkpoint at"):
        load_weights(tmp_path / "step-4")
    (folder / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        load_weights(folder)


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        save(tmp_path / "file", 1, Small(), None)


def test_one_rank_needs_no_process_group():
    assert distributed.init("cpu").type == "cpu"
    assert (distributed.rank(), distributed.world(), distributed.is_main()) == (0, 1, True)
    assert distributed.any_rank(True) and not distributed.any_rank(False)
    assert distributed.all_reduce_sum(torch.ones(2)).tolist() == [1, 1]
    distributed.barrier()


def _worker(rank):
    distributed.init("cpu")
    total = distributed.all_reduce_sum(torch.tensor(rank + 1)).item()
    assert (distributed.any_rank(rank == 1), distributed.any_rank(False), total) == (True, False, 3)
    assert distributed.broadcast({"from": rank}) == {"from": 0}
    assert distributed.is_main() == (rank == 0)
    assert distributed.gather(rank) == [0, 1]


def test_two_ranks_agree(tmp_path):
    on_two_ranks(_worker, tmp_path)


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_gradients_of_parts_add_up_to_those_of_the_whole(micro_batch_size):
    """In float64, where what is left is rounding: rows that count differently weigh by their tokens."""
    from onevocab.model.config import ModelConfig
    from onevocab.model.decoder import Decoder
    from onevocab.training.loop import NextTokenLoss, backward

    torch.manual_seed(0)
    config = ModelConfig(dim=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp_dim=64, max_length=32)
    model = NextTokenLoss(Decoder(config, 20).double(), 1e-4)
    batch = Loader().next_batch()
    batch.loss_weights = batch.loss_weights.double()
    batch.loss_weights[1, :13] = 0
    found = {}
    for rows in (0, micro_batch_size):
        model.zero_grad()
        mean, nll = backward(model, batch, 1 / batch.loss_weights.sum(), rows, "float32", torch.device("cpu"))
        found[rows] = [mean, nll, *(p.grad.clone() for p in model.parameters())]
    worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in
                zip(found[micro_batch_size], found[0], strict=True))
    assert worst < 1e-13
