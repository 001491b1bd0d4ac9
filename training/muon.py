"""Muon for the hidden matrices, AdamW for everything else, behind one small interface.

Muon is Keller Jordan's (https://kellerjordan.github.io/posts/muon/): Nesterov momentum, then the nearest
semi-orthogonal matrix by five quintic Newton-Schulz steps, scaled by sqrt(max(1, rows / columns)).
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from onevocab.training import distributed

if TYPE_CHECKING:  # at run time any object with its fields does: benchmarks run without pydantic
    from onevocab.training.config import OptimizerConfig

Named = list[tuple[str, nn.Parameter]]
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of x, x x^T x and (x x^T)^2 x in a step


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """(..., m, n) -> about U V^T of each matrix's U S V^T: singular values in 0.7 .. 1.2."""
    a, b, c = COEFFICIENTS
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    if x.shape[-1] >= 2 * x.shape[-2] and x.dtype in (torch.float32, torch.float64):
        x = by_gram(x, steps)
        return x.mT if tall else x
    batched = x.dim() == 3
    for _ in range(steps):
        gram = x @ x.mT
        if batched:
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        else:
            x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def by_gram(x: Tensor, steps: int) -> Tensor:
    """The same steps for x (..., m, n), n >= 2 m, with products of m x m matrices: x_k = P_k x and P_k is a polynomial
    of x x^T, so that the next Gram matrix is P_k G P_k. For n = 3 m two thirds of the multiplications, for 9 m two
    fifths. Not in 16 bits: what rounding makes of eigenvalues near 0, below 0 too, the steps enlarge."""
    a, b, c = COEFFICIENTS
    gram, product = x @ x.mT, None
    for step in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) if x.dim() == 3 else b * gram + c * gram @ gram
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if step + 1 < steps:
            gram = factor @ gram @ factor
    return product @ x


class Muon:
    """Muon for named matrices; a convolution's kernel counts as one, (first axis, all others). Matrices of one shape
    are orthogonalised as one batch.

    The ranks share the work: each matrix is orthogonalised, whole, by one of them. Under DDP all ranks have the same
    gradients, so only results are exchanged; parameters that FSDP2 has sharded by rows have sharded momenta too, which
    are sent to the matrix's rank first.
    """

    def __init__(self, named: Named, lr: float, momentum: float, weight_decay: float):
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.dtype: torch.dtype | None = None  # in which `orthogonalise` iterates; None: the momentum's
        self.names, self.parameters = zip(*named, strict=True)
        self.momenta = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32),
                                         memory_format=torch.contiguous_format) for p in self.parameters]
        self.groups = defaultdict(list)  # (rows, columns) -> indices of its parameters
        for index, (name, parameter) in enumerate(named):
            if parameter.dim() < 2:
                raise ValueError(f"Muon is for matrices; {name} has shape {tuple(parameter.shape)}")
            self.groups[parameter.shape[0], parameter.shape[1:].numel()].append(index)

    @torch.no_grad()
    def step(self, multiplier: float = 1.0, decay: float = 1.0) -> None:
        lr = self.lr * multiplier
        for (rows, columns), members in self.groups.items():
            if self.parameters[members[0]].grad is None:
                continue
            parameters = [distributed.local(self.parameters[i]) for i in members]
            momenta = [distributed.local(self.momenta[i]) for i in members]
            grads = [distributed.local(self.parameters[i].grad).to(self.momenta[i].dtype) for i in members]
            torch._foreach_lerp_(momenta, grads, 1 - self.momentum)
            update = torch._foreach_lerp(grads, momenta, self.momentum)
            update = torch.stack([u.flatten(1) for u in update])
            update = update.to(self.dtype or update.dtype)
            sharded = isinstance(self.parameters[members[0]], DTensor)
            update = orthogonalise_shards(update, rows) if sharded else orthogonalise_shared(update)
            if self.weight_decay:
                torch._foreach_mul_(parameters, 1 - lr * decay * self.weight_decay)
            scale = max(1.0, rows / columns) ** 0.5
            update = [u.view_as(p) for u, p in zip(update.to(parameters[0].dtype), parameters, strict=True)]
            torch._foreach_add_(parameters, update, alpha=-lr * scale)

    def tensors(self) -> dict[str, Tensor]:
        return {f"momentum.{name}": value for name, value in zip(self.names, self.momenta, strict=True)}


def orthogonalise_shared(matrices: Tensor) -> Tensor:
    """`orthogonalise` of matrices (count, m, n) that are the same on all ranks. Each is computed by one rank, so that
    all have the same bits, whatever their machines."""
    count, world = len(matrices), distributed.world()
    if world == 1:
        return orthogonalise(matrices)
    share = -(-count // world)
    padded = _padded(matrices, 0, share * world)
    mine = padded[distributed.rank() * share : (distributed.rank() + 1) * share]
    return distributed.all_gather(orthogonalise(mine))[:count]


def orthogonalise_shards(shards: Tensor, rows: int) -> Tensor:
    """`orthogonalise` of matrices (count, rows, n), of which this rank has some rows, as FSDP2 shares them out: shards
    (count, some, n). Returns the same rows of the result. Exchanges twice: matrices to their owners and back."""
    count, own, _ = shards.shape
    world = distributed.world()
    most, share = -(-rows // world), -(-count // world)
    padded = _padded(_padded(shards, 1, most), 0, share * world)
    # owner: the rank that orthogonalises a matrix; holder: the rank that has these rows of it.
    parts = rearrange(padded, "(owner share) rows columns -> owner share rows columns", owner=world)
    parts = distributed.all_to_all(parts)  # now the first axis is the holder, and the matrices are mine
    whole = orthogonalise(rearrange(parts, "holder share rows columns -> share (holder rows) columns")[:, :rows])
    parts = rearrange(_padded(whole, 1, world * most), "share (holder rows) columns -> holder share rows columns",
                      holder=world)
    parts = distributed.all_to_all(parts.contiguous())
    return rearrange(parts, "owner share rows columns -> (owner share) rows columns")[:count, :own]


def _padded(x: Tensor, axis: int, size: int) -> Tensor:
    """x with zeros up to `size` along an axis."""
    shape = list(x.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([x, x.new_zeros(shape)], axis) if shape[axis] else x


class AdamW:
    """torch's fused AdamW (Loshchilov and Hutter 2019) for named parameters, without weight decay."""

    def __init__(self, named: Named, lr: float, betas: tuple[float, float], eps: float):
        self.names, self.parameters = zip(*named, strict=True)
        self.lr = lr
        self.inner = torch.optim.AdamW(
            list(self.parameters), lr=lr, betas=betas, eps=eps, weight_decay=0.0, fused=True
        )
        for p in self.parameters:  # made now rather than at the first step, so that the state always has one shape
            self.inner.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p, memory_format=torch.contiguous_format),
                "exp_avg_sq": torch.zeros_like(p, memory_format=torch.contiguous_format),
            }

    def step(self, multiplier: float = 1.0, decay: float = 1.0) -> None:
        self.inner.param_groups[0]["lr"] = self.lr * multiplier
        self.inner.step()

    def tensors(self) -> dict[str, Tensor]:
        return {f"{key}.{name}": value for name, p in zip(self.names, self.parameters, strict=True)
                for key, value in self.inner.state[p].items()}


class Average:
    """An exponential moving average of weights (Polyak and Juditsky 1992; as in Karras et al. 2024, without a warm-up
    bias: early on it is the plain mean of the start and what was seen)."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.live = decay, dict(model.named_parameters())
        self.tensors = {name: p.detach().clone() for name, p in self.live.items()}
        self.buffers = dict(model.named_buffers())  # which no average is taken of

    @torch.no_grad()
    def step(self, done: int) -> None:
        """After step number `done`, counted from 1."""
        weight = max(1 - self.decay, 1 / (done + 1))
        torch._foreach_lerp_([distributed.local(x) for x in self.tensors.values()],
                             [distributed.local(p) for p in self.live.values()], weight)


class Optimizers:
    """Several optimisers that step together, and perhaps an average of the weights. Their state is a flat dictionary of
    tensors, which a checkpoint fills in place: nothing needs to be pickled."""

    def __init__(self, members: dict[str, Muon | AdamW], average: Average | None = None):
        self.members, self.average = members, average

    def step(self, multiplier: float = 1.0, decay: float = 1.0) -> None:
        """One update with every learning rate times `multiplier`, weight decay also times `decay`."""
        for member in self.members.values():
            member.step(multiplier, decay)

    def iterate_in(self, dtype: torch.dtype) -> None:
        """The type of Muon's iteration: bfloat16 is faster where there are instructions for it, else much slower."""
        if "muon" in self.members:
            self.members["muon"].dtype = dtype

    def zero_grad(self) -> None:
        for member in self.members.values():
            for parameter in member.parameters:
                parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        return {f"{key}.{name}": value for key, member in self.members.items()
                for name, value in member.tensors().items()}

    def averages(self) -> dict[str, Tensor]:
        """The averaged weights and the buffers, under the model's names; empty where none are kept."""
        return self.average.tensors | self.average.buffers if self.average else {}


def assign(model: nn.Module) -> tuple[Named, Named]:
    """(Muon's, AdamW's): hidden weights of two and more axes; the embedding, the head and vectors."""
    tables = {id(module.weight) for name, module in model.named_modules()
              if isinstance(module, nn.Embedding) or name.endswith("lm_head")}
    named = [(name.removeprefix("module."), p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in named if p.dim() >= 2 and id(p) not in tables]
    rest = [(name, p) for name, p in named if p.dim() < 2 or id(p) in tables]
    return matrices, rest


def state_bytes(model: nn.Module, config: OptimizerConfig) -> int:
    """Bytes of the optimisers' state: a momentum for each number of a matrix, two moments for the others (and a count
    of steps for each tensor), and the average. The model may be on `meta`."""
    matrices, rest = assign(model)
    averaged = 4 * sum(p.numel() for p in model.parameters()) if config.ema_decay else 0
    return 4 * sum(p.numel() for _, p in matrices) + sum(8 * p.numel() + 4 for _, p in rest) + averaged


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> Optimizers:
    """Each parameter's optimiser as `assign` says. The model has been sharded before, if it is to be."""
    (matrices, rest), members = assign(model), {}
    if matrices:
        members["muon"] = Muon(matrices, config.matrix_lr, config.momentum, config.weight_decay)
    if rest:
        members["adamw"] = AdamW(rest, config.other_lr, config.betas, config.eps)
    return Optimizers(members, Average(model, config.ema_decay) if config.ema_decay else None)
