"""A whole training step of our decoder beside other people's models of the same architecture and shape.

    python -m benchmarks.train_step --preset mixed --out train_step.json

All start from the same weights and compute the same weighted loss of the same documents. transformers' Qwen3 takes our
packed rows with a dense mask and position ids. Preset `mixed` (documents of text, pictures and sounds) has more peers:
transformers with one document a row, padded to the longest of the batch, and the models of litgpt and torchtitan on
packed rows, each left out with a word where it is not installed (benchmarks/peers.py says how). Tokens per second are
those of documents: padding does not count. All multiply matrices in the precision that `train.py` would choose on this
machine (or in --dtype); where that is bfloat16, transformers is timed in float32 too. Timed are forward, backward and
AdamW, and once more forward, backward, Muon and AdamW, as `train.py` runs it. Loss and gradients are first compared
with a float64 run of transformers, where it is installed, else of the kernels' definitions.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks import command, peers
from benchmarks.batches import Batch, mixed_batches, padded, uniform_batches
from benchmarks.work import OURS, Cost, Preset, Target, Unavailable, Work
from onevocab.kernels.attention import IntervalMask
from onevocab.kernels.backend import forced
from onevocab.kernels.cross_entropy import linear_cross_entropy
from onevocab.model.decoder import Decoder
from onevocab.training.muon import build_optimizers
from onevocab.training.precision import autocast

TORCH, MUON, COMPILED = "ours without Triton", "ours, Muon and AdamW", "ours, torch.compile"
THEIRS, THEIRS_WIDE = "transformers", "transformers, float32"
PADDED, PADDED_WIDE = "transformers, padded", "transformers, padded, float32"
LITGPT, TORCHTITAN = "litgpt", "torchtitan"
BATCHES = 4
# What training.config.OptimizerConfig has by default; a namespace, because a bare CUDA image has no pydantic.
OPTIMIZER = SimpleNamespace(matrix_lr=0.02, other_lr=4e-3, momentum=0.95, weight_decay=0.0, ema_decay=0.0,
                            betas=(0.9, 0.95), eps=1e-8)


def our_loss(run: Callable, batch: Batch, head: Tensor, mean_keys: float | None = None) -> Tensor:
    """run(ids, positions, mask) -> hidden. The sum over what counts. mean_keys: as the loader tells the mask."""
    hidden = run(batch["ids"], batch["positions"], IntervalMask.causal(batch["document"], mean_keys))
    weights = batch["weights"].flatten()
    return linear_cross_entropy(hidden.flatten(0, 1), head, batch["targets"].flatten(), weights).loss


def their_loss(logits: Tensor, batch: Batch) -> Tensor:
    nll = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
    return (nll * batch["weights"].flatten()).sum()


class InRows(torch.autograd.Function):
    """The loss of a batch row by row, gradients added up: a float64 run with dense scores needs the memory of one."""

    @staticmethod
    def forward(ctx, loss_of, batch, *parameters):
        total, sums = 0.0, [torch.zeros_like(p) for p in parameters]
        for row in range(len(batch["ids"])):
            leaves = [p.detach().requires_grad_() for p in parameters]
            with torch.enable_grad():
                loss = loss_of({name: values[row : row + 1] for name, values in batch.items()}, leaves)
            for each, gradient in zip(sums, torch.autograd.grad(loss, leaves), strict=True):
                each += gradient
            total = total + loss.detach()
        ctx.save_for_backward(*sums)
        return total

    @staticmethod
    def backward(ctx, grad):
        return None, None, *(grad * each for each in ctx.saved_tensors)


class Trainable:
    """A model with its loss and its optimiser, as the harness wants it: a function of its parameters, to be checked,
    and a step on a model of its own, to be timed."""

    def __init__(self, model: nn.Module, loss: Callable, names: list[str], batches: list[Batch], precision: str,
                 optimizers: Callable, backend: str | None = None, weights: Callable = lambda ours: ours):
        """loss: (run, batch, the model's parameters by name) -> the sum; names: of our parameters, the order in which
        they are given; weights: our parameters by name -> the model's own, which it starts from as well."""
        self.model, self.loss, self.names, self.batches = model, loss, names, batches
        self.device, self.precision, self.backend = batches[0]["ids"].device, precision, backend
        self.weights, self.optimizers = weights, optimizers(model)

    def __call__(self, *parameters: Tensor) -> Tensor:
        return self.of_batch(self.batches[0], parameters)

    def of_batch(self, batch: Batch, parameters) -> Tensor:
        weights = self.weights(dict(zip(self.names, parameters, strict=True)))

        def run(*args, **kwargs):
            return functional_call(self.model, weights, args, kwargs)

        with forced(self.backend), autocast(self.precision, self.device):
            return self.loss(run, batch, weights)

    def step(self, i: int) -> None:
        batch = self.batches[i % len(self.batches)]
        with forced(self.backend):
            with autocast(self.precision, self.device):
                loss = self.loss(self.model, batch, dict(self.model.named_parameters()))
            (loss / batch["weights"].sum()).backward()
        self.optimizers.step()
        self.optimizers.zero_grad()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def muon(model: nn.Module) -> SimpleNamespace:
    optimizers = build_optimizers(model, OPTIMIZER)
    return SimpleNamespace(step=lambda: optimizers.step(0.01), zero_grad=optimizers.zero_grad)


def build(shape: dict, device: torch.device, dtype: torch.dtype, make: Callable = uniform_batches) -> Work:
    """make: what makes the batches; of mixed-modal ones there are more providers."""
    # A namespace, because a bare CUDA image has no pydantic.
    config = SimpleNamespace(dim=shape["dim"], layers=shape["layers"], heads=shape["heads"], kv_heads=shape["kv_heads"],
                             head_dim=shape["head_dim"], mlp_dim=shape["mlp_dim"], rope_theta=1e4, norm_eps=1e-6,
                             tie_embeddings=True, max_length=shape["length"])
    vocabulary = shape["vocabulary"]
    generator = torch.Generator().manual_seed(0)
    start = Decoder(config, vocabulary)
    start.initialise(generator)

    def moved(batch: Batch) -> Batch:
        return {name: x.to(device) for name, x in batch.items()}

    batches = [moved(batch) for batch in make(BATCHES, shape, generator)]
    tokens = sum(int((batch["document"] >= 0).sum()) for batch in batches) // BATCHES
    pairs = sum(int((batch["positions"] + 1)[batch["document"] >= 0].sum()) for batch in batches) // BATCHES
    names = [name for name, _ in start.named_parameters()]
    working = str(dtype).removeprefix("torch.")

    def ours(optimizers: Callable = adamw, backend: str | None = None, compiled: bool = False) -> Trainable:
        model = Decoder(config, vocabulary)
        model.load_state_dict(start.state_dict())
        if compiled:
            for layer in model.layers:
                layer.compile()
        return Trainable(model.to(device), lambda run, batch, weights: our_loss(run, batch,
                         weights["embed_tokens.weight"], pairs / tokens), names, batches, working, optimizers, backend)

    def theirs(peer: peers.Peer, precision: str = working, batches: list[Batch] = batches) -> Trainable:
        own = dict(peer.model.named_parameters())
        with torch.no_grad():
            for name, value in peer.weights(dict(start.named_parameters())).items():
                own.pop(name).copy_(value)
        if own:
            raise RuntimeError(f"no weights for {', '.join(own)}")
        return Trainable(peer.model.to(device), lambda run, batch, _: their_loss(peer.logits(run, batch), batch), names,
                         batches, precision, adamw, weights=peer.weights)

    def transformers(precision: str = working) -> Trainable:
        return theirs(peers.transformers(config, vocabulary), precision)

    def one_a_row(precision: str = working) -> Trainable:
        peer = peers.transformers(config, vocabulary, padded=True)
        return theirs(peer, precision, [moved(padded({name: x.cpu() for name, x in b.items()})) for b in batches])

    providers = {OURS: ours, MUON: lambda: ours(muon), THEIRS: transformers}
    if make is mixed_batches:
        providers |= {PADDED: one_a_row, LITGPT: lambda: theirs(peers.litgpt(config, vocabulary)),
                      TORCHTITAN: lambda: theirs(peers.torchtitan(config, vocabulary)),
                      COMPILED: lambda: ours(compiled=True)}
    if working != "float32":
        providers |= {THEIRS_WIDE: lambda: transformers("float32")}
        providers |= {PADDED_WIDE: lambda: one_a_row("float32")} if PADDED in providers else {}
    if device.type == "cuda":
        providers |= {TORCH: lambda: ours(backend="torch"), COMPILED: lambda: ours(compiled=True)}
    try:
        oracle, who = theirs(peers.widened(peers.transformers(config, vocabulary))), "transformers"
    except Unavailable:
        oracle, who = ours(backend="reference"), "the kernels' definitions"

    def definition(*parameters: Tensor) -> Tensor:
        return InRows.apply(oracle.of_batch, batches[0], *parameters)

    matrices = sum(p.numel() for p in start.parameters() if p.dim() > 1)  # the embedding counts as the head
    flops = 6 * matrices * tokens + 12 * pairs * config.layers * config.heads * config.head_dim
    # Weights are read twice, gradients written and read, both moments read and written, weights written.
    cost = Cost(flops, 4 * 9 * sum(p.numel() for p in start.parameters()))
    return Work(lambda: tuple(p.detach().clone().to(device) for p in start.parameters()), providers, definition,
                {"step": cost}, differentiable=len(names), whole=True, tokens=tokens,
                notes=[f"{matrices / 1e6:.1f} M in matrices; float64 by {who}; {peers.versions()}"],
                operations=("attention", "linear_cross_entropy", "qk_norm_rope", "rms_norm", "swiglu"))


DEMO = {"rows": 16, "length": 256, "vocabulary": 3072, "dim": 128, "layers": 5, "heads": 4, "kv_heads": 2,
        "head_dim": 32, "mlp_dim": 384}
LARGE = {"rows": 8, "length": 2048, "vocabulary": 32768, "dim": 1024, "layers": 24, "heads": 16, "kv_heads": 8,
         "head_dim": 64, "mlp_dim": 3072}
TINY = {"rows": 2, "length": 64, "vocabulary": 100, "dim": 64, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16,
        "mlp_dim": 96}
# Of uniform_batches: lengths of documents and the percentage of their tokens that counts.
LENGTHS = {"cpu": {"shortest": 40, "longest": 140}, "cuda": {"shortest": 128, "longest": 1024},
           "tiny": {"shortest": 5, "longest": 30}}
TARGETS = {"cpu": [Target("time", "step", (THEIRS, THEIRS_WIDE), at_least=1.3)],
           "cuda": [Target("mfu", "step", at_least=0.45)]}
MIXED = {"cpu": [Target("time", "step", (PADDED, PADDED_WIDE), at_least=1.5),
                 Target("time", "step", (THEIRS, THEIRS_WIDE, LITGPT, TORCHTITAN), at_least=1.25)]}
SHAPES = {"cpu": DEMO, "cuda": LARGE, "tiny": TINY}
AUTO = {"cpu": "auto", "cuda": "auto"}
PRESETS = {
    name: Preset(description, build, {kind: size | LENGTHS[kind] | {"counted": counted}
                                      for kind, size in SHAPES.items()}, TARGETS, AUTO, kernel=False)
    for name, description, counted in (("packed", "every token counts, as in pretrain", 100),
                                       ("answers", "40% of the tokens count, as in instruct", 40))
}
PRESETS["mixed"] = Preset("text, pictures and sounds as in pretrain, beside padded rows and other trainers' models",
                          partial(build, make=mixed_batches), SHAPES, MIXED, AUTO, kernel=False)

main = command.main("train_step", __doc__, PRESETS)

if __name__ == "__main__":
    main()
