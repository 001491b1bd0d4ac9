"""A whole training step of our decoder beside transformers' `Qwen3ForCausalLM` of the same shape.

    python -m benchmarks.train_step --preset packed --out train_step.json

All take the same packed batches, start from the same weights and compute the same weighted loss; transformers gets the
packing as a 4-D boolean mask and position ids. All multiply matrices in the precision that `train.py` would choose on
this machine (or in --dtype); where that is bfloat16, transformers is timed in float32 too. Timed are forward, backward
and AdamW, and once more forward, backward, Muon and AdamW, as `train.py` runs it. Loss and gradients are first compared
with a float64 run of transformers, where it is installed, else of the kernels' definitions.
"""

import itertools
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks import harness
from benchmarks.harness import Cost, Preset, Target, Work
from onevocab.kernels.attention import IntervalMask
from onevocab.kernels.backend import forced
from onevocab.kernels.cross_entropy import linear_cross_entropy
from onevocab.model.decoder import Decoder, qwen3_config, to_qwen3_state_dict
from onevocab.training.precision import autocast

TORCH, MUON = "ours without Triton", "ours, Muon and AdamW"
THEIRS, THEIRS_WIDE = "transformers", "transformers, float32"
BATCHES = 4


def packed_batch(shape: dict, generator: torch.Generator) -> dict[str, Tensor]:
    """Random ids in documents of `shortest` .. `longest` tokens packed into rows; of each the last `counted` percent
    count in the loss: 100 when everything is learnt, less when a document begins with a prompt."""
    rows, length = shape["rows"], shape["length"]
    document = torch.full((rows, length), -1)
    positions = torch.zeros(rows, length, dtype=torch.long)
    weights = torch.zeros(rows, length)
    for row in range(rows):
        start = 0
        for index in itertools.count():
            n = int(torch.randint(shape["shortest"], shape["longest"] + 1, (), generator=generator))
            if start + n > length:
                break
            document[row, start : start + n] = index
            positions[row, start : start + n] = torch.arange(n)
            weights[row, start + round((1 - shape["counted"] / 100) * n) : start + n - 1] = 1.0
            start += n
    ids = torch.randint(shape["vocabulary"], (rows, length), generator=generator)
    itself = torch.eye(length, dtype=torch.bool)  # what a padding query sees: transformers has no empty rows
    return {"ids": ids, "targets": ids.roll(-1, 1), "positions": positions, "document": document, "weights": weights,
            "mask_4d": IntervalMask.causal(document).dense(length) | itself}


def our_loss(run: Callable, batch: dict, head: Tensor) -> Tensor:
    """run(ids, positions, mask) -> hidden. The sum over what counts."""
    hidden = run(batch["ids"], batch["positions"], IntervalMask.causal(batch["document"]))
    weights = batch["weights"].flatten()
    return linear_cross_entropy(hidden.flatten(0, 1), head, batch["targets"].flatten(), weights).loss


def their_loss(run: Callable, batch: dict) -> Tensor:
    inputs = {"attention_mask": batch["mask_4d"], "position_ids": batch["positions"]}
    logits = run(batch["ids"], **inputs, use_cache=False).logits
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

    def __init__(self, model: nn.Module, loss: Callable, names: list[str], batches: list[dict], precision: str,
                 optimizers: Callable, backend: str | None = None):
        self.model, self.loss, self.names, self.batches = model, loss, names, batches
        self.device, self.precision, self.backend = batches[0]["ids"].device, precision, backend
        self.optimizers = optimizers(model)

    def __call__(self, *parameters: Tensor) -> Tensor:
        return self.of_batch(self.batches[0], parameters)

    def of_batch(self, batch: dict, parameters) -> Tensor:
        weights = dict(zip(self.names, parameters, strict=True))

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
    from onevocab.training.muon import OptimizerConfig, build_optimizers

    optimizers = build_optimizers(model, OptimizerConfig())
    return SimpleNamespace(step=lambda: optimizers.step(0.01), zero_grad=optimizers.zero_grad)


def build(shape: dict, device: torch.device, dtype: torch.dtype) -> Work:
    # A namespace, because a bare CUDA image has no pydantic.
    config = SimpleNamespace(dim=shape["dim"], layers=shape["layers"], heads=shape["heads"], kv_heads=shape["kv_heads"],
                             head_dim=shape["head_dim"], mlp_dim=shape["mlp_dim"], rope_base=1e4, norm_eps=1e-6,
                             tied=True, max_length=shape["length"])
    generator = torch.Generator().manual_seed(0)
    start = Decoder(config, shape["vocabulary"])
    start.initialise(generator)
    batches = [{name: x.to(device) for name, x in packed_batch(shape, generator).items()} for _ in range(BATCHES)]
    names = [name for name, _ in start.named_parameters()]
    precision = str(dtype).removeprefix("torch.")

    def ours(optimizers: Callable = adamw, backend: str | None = None) -> Trainable:
        model = Decoder(config, shape["vocabulary"])
        model.load_state_dict(start.state_dict())
        return Trainable(model.to(device), lambda run, batch, weights: our_loss(run, batch,
                         weights["embed_tokens.weight"]), names, batches, precision, optimizers, backend)

    def theirs(precision: str = precision) -> Trainable:
        try:
            import_module("onevocab.tokenizers.torchaudio_guard")  # first: transformers imports torchaudio
            from transformers import Qwen3Config, Qwen3ForCausalLM
        except ImportError:
            raise harness.Unavailable("transformers is not installed: pip install 'onevocab[dev]'") from None
        model = Qwen3ForCausalLM(Qwen3Config(**qwen3_config(config, shape["vocabulary"])))  # its attention is SDPA
        model.load_state_dict(to_qwen3_state_dict(start))
        return Trainable(model.to(device), lambda run, batch, _: their_loss(run, batch),
                         [f"model.{name}" for name in names], batches, precision, adamw)

    providers = {harness.OURS: ours, MUON: lambda: ours(muon), THEIRS: theirs}
    if precision != "float32":
        providers[THEIRS_WIDE] = lambda: theirs("float32")
    if device.type == "cuda":
        providers[TORCH] = lambda: ours(backend="torch")
    try:
        oracle, who = theirs(), "transformers"
    except harness.Unavailable:
        oracle, who = ours(backend="reference"), "the kernels' definitions"

    def definition(*parameters: Tensor) -> Tensor:
        return InRows.apply(oracle.of_batch, batches[0], *parameters)

    tokens = sum(int((batch["document"] >= 0).sum()) for batch in batches) // BATCHES
    matrices = sum(p.numel() for p in start.parameters() if p.dim() > 1)  # the embedding counts as the head
    pairs = sum(int((batch["positions"] + 1)[batch["document"] >= 0].sum()) for batch in batches) // BATCHES
    flops = 6 * matrices * tokens + 12 * pairs * config.layers * config.heads * config.head_dim
    # Weights are read twice, gradients written and read, both moments read and written, weights written.
    cost = Cost(flops, 4 * 9 * sum(p.numel() for p in start.parameters()))
    return Work(lambda: tuple(p.detach().clone().to(device) for p in start.parameters()), providers, definition,
                {"step": cost}, differentiable=len(names), whole=True, tokens=tokens,
                notes=[f"{matrices / 1e6:.1f} M in matrices; float64 by {who}"],
                operations=("attention", "linear_cross_entropy", "qk_norm_rope", "rms_norm", "swiglu"))


DEMO = {"rows": 16, "length": 256, "shortest": 40, "longest": 140, "vocabulary": 3072, "dim": 128, "layers": 5,
        "heads": 4, "kv_heads": 2, "head_dim": 32, "mlp_dim": 384, "counted": 100}
LARGE = {"rows": 8, "length": 2048, "shortest": 128, "longest": 1024, "vocabulary": 32768, "dim": 1024, "layers": 24,
         "heads": 16, "kv_heads": 8, "head_dim": 64, "mlp_dim": 3072, "counted": 100}
TINY = {"rows": 2, "length": 64, "shortest": 5, "longest": 30, "vocabulary": 100, "dim": 64, "layers": 2, "heads": 2,
        "kv_heads": 1, "head_dim": 16, "mlp_dim": 96}
TARGETS = {"cpu": [Target("time", "step", (THEIRS, THEIRS_WIDE), at_least=1.3)],
           "cuda": [Target("mfu", "step", at_least=0.45)]}
PRESETS = {
    name: Preset(description, build, {"cpu": DEMO | counted, "cuda": LARGE | counted, "tiny": TINY}, TARGETS,
                 {"cpu": "auto", "cuda": "auto"})
    for name, description, counted in (("packed", "every token counts, as in pretrain", {"counted": 100}),
                                       ("answers", "40% of the tokens count, as in instruct", {"counted": 40}))
}

main = harness.main("train_step", __doc__, PRESETS)

if __name__ == "__main__":
    main()
