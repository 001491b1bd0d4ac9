"""Is it right? Every provider's outputs and gradients against the definition in float64.

The bound is twice the error of the definition in working precision. Ours must pass; a peer that does not is named.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.work import OURS, Work, as_tuple
from onevocab.common.errors import UserError
from onevocab.kernels.backend import chosen


def backend_note(operations: tuple[str, ...]) -> str:
    """Which of our implementations ran: what `kernels.backend` chose, and why."""
    return "; ".join(f"{name}: {choice.backend} ({choice.reason})" for name, choice in sorted(chosen().items())
                     if name in operations)


def leaves_of(inputs: tuple[Tensor, ...], differentiable: int) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_() if i < differentiable else x for i, x in enumerate(inputs))


def weights_like(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradient that arrives from above: fixed random numbers, 1 for a loss."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return tuple(torch.ones_like(x) if x.dim() == 0 else
                 torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype) for x in outputs)


def differentiated(call: Callable, inputs: tuple[Tensor, ...], differentiable: int) -> tuple[Tensor, ...]:
    """Outputs, and gradients of the first inputs."""
    leaves = leaves_of(inputs, differentiable)
    outputs = as_tuple(call(*leaves))
    if not differentiable:
        return outputs
    smooth = [x for x in outputs if x.requires_grad]
    gradients = torch.autograd.grad(smooth, leaves[:differentiable], weights_like(tuple(smooth)))
    return *(x.detach() for x in outputs), *gradients


def values(work: Work, call: Callable, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What of the call is compared: its outputs as `work.compared` sees them, and its gradients."""
    results = differentiated(call, inputs, work.differentiable)
    n = len(results) - work.differentiable
    return *as_tuple(work.compared(results[:n] if n > 1 else results[0], inputs)), *results[n:]


def require_triton(operations: tuple[str, ...]) -> None:
    """On a GPU what is called ours must be the Triton kernels, not torch's way."""
    for name, choice in chosen().items():
        if name in operations and choice.backend != "triton":
            raise UserError(f"{name} ran as {choice.backend} ({choice.reason}), not as triton: nothing was timed")


def errors_of(work: Work, results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """The error of each value: its largest, or for a network a single relative one."""
    apart = zip(results, exact, strict=True)
    if work.whole:
        return [max(((got.double() - value).norm() / value.norm()).item() for got, value in apart)]
    return [(got.double() - value).abs().max().item() for got, value in apart]


def bounds_of(work: Work, inputs: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """For each compared value the largest error allowed: twice that of the definition in working precision."""
    reference = values(work, work.definition, inputs)
    bounds = [2 * error for error in errors_of(work, reference, exact)]
    for i in range(len(bounds)):
        kind = reference[i].dtype if reference[i].is_floating_point() else torch.float32
        if kind == torch.float64 and inputs[0].is_floating_point():
            kind = inputs[0].dtype  # compared in float64, computed from these
        scale = 1.0 if work.whole else exact[i].abs().max().item()
        roundings = work.roundings[i] if isinstance(work.roundings, tuple) else work.roundings
        bounds[i] += roundings * torch.finfo(kind).eps * scale
    if not all(map(math.isfinite, bounds)):
        raise UserError("the definition is not finite in this precision, no bound can be drawn; nothing was timed")
    return bounds


def check(work: Work, calls: dict[str, Callable], inputs: tuple[Tensor, ...]) -> dict[str, dict]:
    """provider -> its worst error over the bound, and why it failed if it did. Raises UserError when ours is wrong."""
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    exact = values(work, work.definition, wide)
    del wide
    bounds = bounds_of(work, inputs, exact)
    outputs = len(exact) - work.differentiable
    labels = [f"output {i}" if i < outputs else f"the gradient of input {i - outputs}" for i in range(len(exact))]
    if work.whole:
        labels = ["the worst of loss and gradients"]
    report: dict[str, dict] = {}
    for name, call in calls.items():
        note, results = {}, None
        try:
            results = values(work, call, inputs)
            if name == OURS and inputs[0].device.type == "cuda":
                require_triton(work.operations)
        except Exception as error:  # a peer that cannot do this, in whatever way; perhaps it can without gradients
            if name == OURS:
                raise
            note = {"forward only": first_line(error)}
        if note:  # outside of the except: its traceback keeps the failed call's tensors
            if inputs[0].device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                with torch.no_grad():
                    results = as_tuple(work.compared(call(*inputs), inputs))
            except Exception:
                report[name] = {"failed": note["forward only"]}
                print(f"  {name}: failed", flush=True)
                continue
        # one that is forward only has fewer values: the gradients, which come last, are missing
        expected = exact[: len(results)] if note else exact
        errors = [error / max(bound, 1e-300)
                  for error, bound in zip(errors_of(work, results, expected), bounds, strict=not note)]
        worst, label = max((math.inf if math.isnan(error) else error, label)
                           for error, label in zip(errors, labels[: len(errors)], strict=True))
        report[name] = {"worst_error_over_bound": worst, **note}
        if name == OURS:
            report[name]["backend"] = backend_note(work.operations)
        del results
        print(f"  {name}: error {worst:.2f} of the bound" + (f"; forward only: {note['forward only']}" if note else ""),
              flush=True)
        if worst > 1:
            if name == OURS:
                raise UserError(f"ours is wrong: {label} is off by {worst:.2f} times the bound; nothing was timed")
            report[name]["failed"] = f"wrong by {worst:.1f} times the bound"
    return report


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
