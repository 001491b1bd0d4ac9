"""Muon for the hidden matrices, AdamW for everything else, behind one small interface.

Muon is Keller Jordan's (https://kellerjordan.github.io/posts/muon/): Nesterov momentum, then the nearest
semi-orthogonal matrix by five quintic Newton-Schulz steps, scaled by sqrt(max(1, rows / columns)).
"""

from collections import defaultdict

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from onevocab.common.errors import UserError
from onevocab.training import distributed


class OptimizerConfig(BaseModel):
    """Learning rates are peaks: a schedule multiplies both."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    matrix_lr: float = Field(0.02, gt=0, description="Muon's, for hidden matrices")
    other_lr: float = Field(4e-3, gt=0, description="AdamW's, for embedding, head and norms")
    momentum: float = Field(0.95, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0, description="decoupled, on hidden matrices")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """matrices (..., m, n), m <= n is fastest -> about U V^T of each one's U S V^T: singular values in 0.7 .. 1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    batched = x.dim() == 3
    for _ in range(steps):
        gram = x @ x.mT
        if batched:
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        else:
            x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """For named matrices; a convolution's kernel counts as one, (first axis, all others). Matrices of one shape (or its
    transpose) are one batch of matmuls.

    The ranks, which have the same gradients, share the work: a matrix is orthogonalised by one of them.
    """

    def __init__(self, named, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.dtype: torch.dtype | None = None  # of the iteration; None: that of the momentum
        by_shape = defaultdict(list)
        for name, parameter in named:
            if parameter.dim() < 2:
                raise ValueError(f"Muon is for matrices; {name} has shape {tuple(parameter.shape)}")
            by_shape[tuple(sorted(parameter.flatten(1).shape))].append((name, parameter))
        # one momentum tensor (count, m, n), m <= n, for each group of equally shaped matrices
        self.groups = [
            (members, torch.zeros(len(members), *shape, device=members[0][1].device,
                                  dtype=torch.promote_types(members[0][1].dtype, torch.float32)))
            for shape, members in by_shape.items()
        ]

    @property
    def parameters(self):
        return [parameter for members, _ in self.groups for _, parameter in members]

    @torch.no_grad()
    def step(self, multiplier: float = 1.0) -> None:
        lr = self.lr * multiplier
        for members, momentum in self.groups:
            parameters = [parameter for _, parameter in members]
            grad = torch.stack([_wide(p.grad) for p in parameters]).to(momentum.dtype)
            momentum.lerp_(grad, 1 - self.momentum)
            update = grad.lerp_(momentum, self.momentum)
            update = self._orthogonalised(update.to(self.dtype or update.dtype)).to(parameters[0].dtype)
            if self.weight_decay:
                torch._foreach_mul_(parameters, 1 - lr * self.weight_decay)
            for p, u in zip(parameters, update, strict=True):
                rows, columns = p.shape[0], p.numel() // p.shape[0]
                scale = max(1.0, rows / columns) ** 0.5
                p.add_((u if rows <= columns else u.T).reshape(p.shape), alpha=-lr * scale)

    @staticmethod
    def _orthogonalised(update: Tensor) -> Tensor:
        """Each rank iterates its share of the matrices, whole ones, and all get all: (count, m, n), the same bits
        everywhere, whatever the machines."""
        world = distributed.world()
        if world == 1:
            return orthogonalise(update)
        share = -(-len(update) // world)
        padded = torch.cat([update, update.new_zeros(share * world - len(update), *update.shape[1:])])
        mine = padded[distributed.rank() * share : (distributed.rank() + 1) * share]
        return distributed.all_gather(orthogonalise(mine))[: len(update)]

    def tensors(self) -> dict[str, Tensor]:
        return {f"momentum.{name}": row for members, momentum in self.groups
                for (name, _), row in zip(members, momentum, strict=True)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        for name, row in self.tensors().items():
            _copy(row, tensors, name)


class AdamW:
    """torch's fused AdamW (Loshchilov and Hutter 2019) for named parameters, without weight decay."""

    def __init__(self, named, lr: float, betas=(0.9, 0.95), eps: float = 1e-8):
        self.names, self.parameters = zip(*named, strict=True)
        self.lr = lr
        self.inner = torch.optim.AdamW(
            list(self.parameters), lr=lr, betas=betas, eps=eps, weight_decay=0.0, fused=True
        )
        for p in self.parameters:  # made now rather than at the first step, so that the state always has one shape
            self.inner.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
            }

    def step(self, multiplier: float = 1.0) -> None:
        self.inner.param_groups[0]["lr"] = self.lr * multiplier
        self.inner.step()

    def tensors(self) -> dict[str, Tensor]:
        return {f"{key}.{name}": value for name, p in zip(self.names, self.parameters, strict=True)
                for key, value in self.inner.state[p].items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        for name, value in self.tensors().items():
            _copy(value, tensors, name)


class Optimizers:
    """Several optimisers that step together. Their state is flat tensors: nothing needs to be pickled."""

    def __init__(self, members: dict[str, Muon | AdamW]):
        self.members = members

    def step(self, multiplier: float = 1.0) -> None:
        """One update with every learning rate times `multiplier`."""
        for member in self.members.values():
            member.step(multiplier)

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

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copies in what `tensors()` gave. Raises UserError when a name is missing or a shape differs."""
        for key, member in self.members.items():
            prefix = key + "."
            member.load_tensors({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


Named = list[tuple[str, nn.Parameter]]


def assign(model: nn.Module) -> tuple[Named, Named]:
    """(Muon's, AdamW's): hidden weights of two and more axes; the embedding, the head and vectors."""
    tables = {id(module.weight) for name, module in model.named_modules()
              if isinstance(module, nn.Embedding) or name.endswith("lm_head")}
    named = [(name.removeprefix("module."), p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in named if p.dim() >= 2 and id(p) not in tables]
    rest = [(name, p) for name, p in named if p.dim() < 2 or id(p) in tables]
    return matrices, rest


def state_bytes(model: nn.Module) -> int:
    """What the optimisers' state takes: a momentum for each number of a matrix, two moments for the others (and a count
    each). The model may be on `meta`."""
    matrices, rest = assign(model)
    return 4 * sum(p.numel() for _, p in matrices) + sum(8 * p.numel() + 4 for _, p in rest)


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> Optimizers:
    """Each parameter's optimiser as `assign` says."""
    (matrices, rest), members = assign(model), {}
    if matrices:
        members["muon"] = Muon(matrices, config.matrix_lr, config.momentum, config.weight_decay)
    if rest:
        members["adamw"] = AdamW(rest, config.other_lr, config.betas, config.eps)
    return Optimizers(members)


def _wide(matrix: Tensor) -> Tensor:
    matrix = matrix.flatten(1)
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _copy(target: Tensor, tensors: dict[str, Tensor], name: str) -> None:
    if name not in tensors or tensors[name].shape != target.shape:
        found = tuple(tensors[name].shape) if name in tensors else "nothing"
        raise UserError(f"optimiser state {name}: expected shape {tuple(target.shape)}, found {found}; "
                        "the checkpoint belongs to another model, give the run another folder")
    target.copy_(tensors[name])
