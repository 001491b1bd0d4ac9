"""What makes training larger leaves the result as it is: ranks, shards, parts of a batch, recomputation, averages."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_training import CONFIG, Loader, on_two_ranks, run
from torch import nn

from onevocab.common.checkpoint_files import list_steps
from onevocab.common.errors import UserError
from onevocab.model.config import ModelConfig
from onevocab.model.decoder import Decoder
from onevocab.model.weights import load_tensors, load_weights
from onevocab.training import distributed
from onevocab.training.autoencoder import train_autoencoder
from onevocab.training.config import OptimizerConfig, TrainConfig
from onevocab.training.loop import NextTokenLoss, backward, keep_new_rows
from onevocab.training.metrics import MetricsLog, read_metrics
from onevocab.training.muon import Muon, build_optimizers, orthogonalise, orthogonalise_shards
from onevocab.training.parallel import replicate, shard
from onevocab.training.plan import saved_bytes

CPU = torch.device("cpu")
SHAPE = ModelConfig(dim=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp_dim=64, max_length=32)


def network(dtype=torch.float64, **settings) -> tuple[NextTokenLoss, nn.Module]:
    """(what computes the loss, what is called): the same weights every time, made ready as training does."""
    torch.manual_seed(0)
    module = NextTokenLoss(Decoder(SHAPE, 21).to(dtype), 1e-4)
    shard(module, module.decoder.layers, TrainConfig(**settings), CPU)
    return module, replicate(module)


def gradients(module, model, loader: Loader, micro_batch_size: int = 0,
              precision: str = "float32") -> dict[str, torch.Tensor]:
    """Whole gradients after a step's backward pass, and the loss of all ranks."""
    loader.taken = 3  # tokens that do not count, unlike in every row
    batch = loader.next_batch()
    if distributed.rank() == loader.world - 1:
        batch.loss_weights = batch.loss_weights.clone()
        batch.loss_weights[-1, :13] = 0
    total = distributed.all_reduce_sum(batch.loss_weights.sum())
    mean, _ = backward(model, batch, distributed.world() / total, micro_batch_size, precision, CPU)
    found = {name: distributed.full_tensor(p.grad) for name, p in module.decoder.named_parameters()}
    return found | {"loss": distributed.all_reduce_sum(mean.double()) / distributed.world()}


def close(one: dict, two: dict, bound: float = 1e-12) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] - two[name]).norm() <= bound * two[name].norm(), name


def _two_ranks(rank: int) -> None:
    alone = gradients(*network(), Loader(dtype=torch.float64))
    shards = _muon_steps(torch.float32), _muon_steps(torch.float64)
    distributed.init("cpu")
    for parallel in ("ddp", "fsdp2"):
        for micro_batch_size, recompute in ((0, False), (1, True)):
            loader = Loader(rank=rank, world=2, dtype=torch.float64)
            made = network(parallel=parallel, activation_checkpointing=recompute)
            close(gradients(*made, loader, micro_batch_size), alone)
        module, model = network(parallel=parallel)
        gradients(module, model, Loader(rank=rank, world=2, dtype=torch.float64))
        module.decoder.old_rows = 13
        keep_new_rows(module.decoder)
        rows = distributed.full_tensor(module.decoder.embed_tokens.weight.grad)
        assert not rows[:13].any() and rows[13:].any(1).all()
        assert module.decoder.layers[0].mlp.up_proj.weight.grad is None
    low = [gradients(*network(torch.float32, parallel=parallel), Loader(rank=rank, world=2), precision="bfloat16")
           for parallel in ("ddp", "fsdp2")]
    close(*low, bound=1e-5)  # norms and sums stay in float32 when weights are sharded, too
    _orthogonal_shards(rank)
    one, exact = shards
    for sharded in (False, True):
        shared = _muon_steps(torch.float32, sharded)
        assert (shared - exact).norm() <= 2 * (one - exact).norm()
        assert distributed.gather(shared.tolist()) == [shared.tolist()] * 2  # the same bits on both


def _orthogonal_shards(rank: int) -> None:
    """Rows and matrices that do not divide by the ranks; the same as whole ones."""
    for count, rows, columns in ((1, 5, 9), (3, 7, 4), (4, 1, 6)):
        matrices = torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
        most = -(-rows // 2)
        mine = slice(rank * most, (rank + 1) * most)
        expected = orthogonalise(matrices)[:, mine]
        assert (orthogonalise_shards(matrices[:, mine], rows) - expected).norm() <= 1e-12 * expected.norm()


def _muon_steps(dtype, sharded: bool = False) -> torch.Tensor:
    """Some updates; the gradients are the same on every rank."""
    torch.manual_seed(0)
    shapes = [(8, 12)] * 3 + [(12, 8), (15, 4)]
    model = nn.ParameterList(nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes)
    if sharded:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    named = [(name, parameter) for name, parameter in model.named_parameters()]
    muon = Muon(named, 0.02, momentum=0.95, weight_decay=0.1)
    for step in range(3):
        for _, parameter in named:
            gradient = torch.randn(parameter.shape).to(dtype)
            if sharded:
                gradient = torch.distributed.tensor.distribute_tensor(gradient, parameter.device_mesh,
                                                                      parameter.placements, src_data_rank=None)
            parameter.grad = gradient
        muon.step(decay=1 - step / 3)
    return torch.cat([distributed.full_tensor(parameter.detach()).flatten() for _, parameter in named])


def test_ranks_and_shards_give_one_ranks_gradients_and_updates(tmp_path):
    on_two_ranks(_two_ranks, tmp_path)


class Middle(nn.Module):
    """What `train_autoencoder` asks for: it looks for the mean of its rows."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.quantizer = SimpleNamespace(init_codebook=lambda latents: None)

    def latents(self, rows):
        return rows[None, None]

    def forward(self, rows, quantize):
        loss = (rows - self.mean).square().mean()
        return loss, {}


def _uneven(folder: Path, rank: int) -> None:
    def trained(where: str) -> torch.Tensor:
        def sample(generator):
            rows = torch.randn(5, 3, generator=generator, dtype=torch.float64)
            return rows[distributed.rank() :: distributed.world()]

        model = Middle()
        train_autoencoder(model, sample, 12, 0.1, folder / where, MetricsLog(), "stage", 0)
        return model.mean.detach()

    alone = trained(f"alone-{rank}")
    distributed.init("cpu")
    assert torch.allclose(trained("shared"), alone, rtol=1e-9, atol=0)


def test_a_batch_that_does_not_divide_by_the_ranks_counts_the_same(tmp_path):
    (tmp_path / "done").mkdir()
    on_two_ranks(partial(_uneven, tmp_path), tmp_path / "done")


def test_a_tokenizer_whose_loss_is_not_finite_stops_and_saves_nothing(tmp_path):
    samples = iter([torch.ones(5, 3, dtype=torch.float64), torch.full((5, 3), float("nan"), dtype=torch.float64)])
    with pytest.raises(UserError, match="not finite at step 2"):
        train_autoencoder(Middle(), lambda _: next(samples), 8, 0.1, tmp_path / "stage", MetricsLog(), "stage", 0)
    assert not list_steps(tmp_path / "stage")


def test_recomputing_gives_the_same_bits_and_keeps_less():
    made = [network(torch.float32, activation_checkpointing=recompute) for recompute in (False, True)]
    found = [gradients(*each, Loader()) for each in made]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    kept = [saved_bytes(module, Loader().next_batch(), "float32") for module, _ in made]
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.slow
def test_compiled_layers_give_the_same_gradients():
    found = [gradients(*network(torch.float32, compile=compiled), Loader()) for compiled in (False, True)]
    exact = gradients(*network(), Loader(dtype=torch.float64))
    for name in exact:
        eager, compiled = ((each[name] - exact[name]).norm() for each in found)
        assert compiled <= 2 * eager + 1e-6 * exact[name].norm(), name


def settings(**changes) -> TrainConfig:
    return TrainConfig.model_validate(CONFIG.model_dump() | {"precision": "float32"} | changes)


def test_averaged_weights_are_what_is_used_afterwards(tmp_path):
    """Also over a restart; against the definition on the weights of each step."""
    config = settings(steps=6, save_every=1, optimizer={"ema_decay": 0.7})
    seen = []
    for until in range(1, 7):  # the schedule depends on the whole length: stopped after each step
        loader = Loader()
        if until < 6:
            run_until(tmp_path, loader, config, until)
        else:
            run(tmp_path, loader, config)
        seen.append(load_tensors(tmp_path / "stage" / f"step-{until}" / "model.safetensors"))
    torch.manual_seed(0)
    start = Decoder(ModelConfig(dim=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp_dim=64, max_length=32), 20)
    average = {name: value.double() for name, value in start.state_dict().items()}
    for done, weights in enumerate(seen, 1):
        part = max(0.3, 1 / (done + 1))
        average = {name: (1 - part) * value + part * weights[name] for name, value in average.items()}
    used = load_weights(tmp_path / "stage" / "step-6")[0]
    assert all(torch.allclose(used[name].double(), average[name], rtol=0, atol=1e-6) for name in average)
    assert not torch.equal(used["norm.weight"], seen[-1]["norm.weight"])


def run_until(folder, loader: Loader, config: TrainConfig, until: int) -> None:
    import os
    import signal

    from onevocab.training.faults import Stopped

    usual = loader.next_batch

    def next_batch():
        if loader.taken + 1 == until:
            os.kill(os.getpid(), signal.SIGTERM)
        return usual()

    loader.next_batch = next_batch
    with pytest.raises(Stopped):
        run(folder, loader, config)


def test_new_rows_first(tmp_path):
    """For `new_rows_steps` all else stays bitwise; afterwards everything moves."""
    torch.manual_seed(0)
    start = Decoder(ModelConfig(dim=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp_dim=64, max_length=32), 20)
    start = {name: value.clone() for name, value in start.state_dict().items()}
    run(tmp_path, Loader(), settings(steps=8, save_every=5, new_rows_steps=5), old_rows=12)
    first, last = (load_weights(tmp_path / "stage" / f"step-{step}")[0] for step in (5, 8))
    table = "embed_tokens.weight"
    assert [name for name in start if not torch.equal(start[name], first[name])] == [table]
    assert torch.equal(start[table][:12], first[table][:12]) and (start[table] != first[table])[12:].any(1).all()
    assert all((first[name] != last[name]).any() for name in start) and (first[table] != last[table]).any(1).all()


def test_weight_decay_fades():
    for decay, expected in ((1.0, 0.98), (0.5, 0.99), (0.0, 1.0)):
        weight = nn.Parameter(torch.eye(4))
        weight.grad = torch.zeros(4, 4)
        Muon([("w", weight)], lr=0.1, momentum=0.95, weight_decay=0.2).step(decay=decay)
        assert torch.allclose(weight.diagonal(), torch.tensor(expected))


def test_signals_are_what_they_say(tmp_path):
    """z and the output's norm of a step, against their definitions; tokens a second by modality, and the MFU."""
    module, _ = network(torch.float32)
    module.watch, batch = True, Loader().next_batch()
    module(batch)
    decoder, inputs = module.decoder, []
    decoder.norm.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    module.watch = False
    from onevocab.kernels.attention import IntervalMask

    hidden = decoder(batch.ids, batch.positions, IntervalMask.causal(batch.document_ids))
    z = decoder.logits(hidden).logsumexp(-1)[batch.loss_weights != 0].mean()
    assert module.signals["z"].item() == pytest.approx(z.item(), rel=1e-5)
    assert module.signals["output_norm"].item() == pytest.approx(inputs[0].square().mean().sqrt().item(), rel=1e-5)

    run(tmp_path, Loader(), settings(), peak_flops=lambda precision: 1e9)
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        assert line["tokens_per_second_text"] == line["tokens_per_second"]
        tokens, keys = 2 * 64, 2 * 4 * sum(range(1, 17))
        flops = decoder.flops(tokens, keys) - 2 * 64 * 6 * 32  # this decoder knows one id more
        assert line["mfu"] == pytest.approx(flops / tokens * line["tokens_per_second"] / 1e9, rel=1e-6)
        assert line["z"] > 0 and line["output_norm"] > 0


def test_the_average_needs_no_second_optimiser():
    model = Decoder(SHAPE, 20)
    plain, averaged = (build_optimizers(model, OptimizerConfig(ema_decay=decay)) for decay in (0, 0.9))
    assert plain.tensors().keys() == averaged.tensors().keys() and not plain.averages()
    assert averaged.averages().keys() == model.state_dict().keys()
