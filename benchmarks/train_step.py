"""A whole training step of our decoder against transformers' `Qwen3ForCausalLM` of the same shape.

    python -m benchmarks.train_step --out results.json [--check]

Both take the same packed batches, start from the same weights and compute the same weighted loss; transformers gets
the packing as a 4-D boolean mask and position ids. Both multiply matrices in the precision that `train.py` would choose
on this machine (or in --precision); where that is bfloat16, transformers is timed in float32 too, and ratios are to the
faster of the two. Timed are forward + backward + AdamW for both, and, for ours, forward + backward + Muon and AdamW, as
`train.py` runs it. Losses and gradients are first compared with a float64 run, on the very batches that are timed.
Repetitions are interleaved; tokens are non-padding tokens.
"""

import argparse
import copy
import json
import math
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import onevocab.tokenizers.torchaudio_guard  # noqa: F401  transformers imports torchaudio
from benchmarks import measure
from onevocab.common.errors import UserError, cli
from onevocab.common.files import write_json
from onevocab.common.provenance import provenance
from onevocab.kernels.attention import IntervalMask
from onevocab.kernels.cross_entropy import linear_cross_entropy
from onevocab.model.config import ModelConfig
from onevocab.model.decoder import Decoder, qwen3_config, to_qwen3_state_dict
from onevocab.training.muon import OptimizerConfig, build_optimizers
from onevocab.training.precision import autocast, choose


def packed_batch(rows: int, length: int, vocab_size: int, counted: float, generator: torch.Generator) -> dict:
    """Random ids in documents of 40 .. 140 tokens packed into rows; the last part, `counted`, of each document counts
    in the loss: 1 when everything is learnt, less when a document begins with a prompt."""
    document = torch.full((rows, length), -1)
    positions = torch.zeros(rows, length, dtype=torch.long)
    weights = torch.zeros(rows, length)
    for row in range(rows):
        start, index = 0, 0
        while True:
            n = int(torch.randint(40, 141, (), generator=generator))
            if start + n > length:
                break
            document[row, start : start + n] = index
            positions[row, start : start + n] = torch.arange(n)
            weights[row, start + round((1 - counted) * n) : start + n - 1] = 1.0
            start, index = start + n, index + 1
    ids = torch.randint(0, vocab_size, (rows, length), generator=generator)
    return {"ids": ids, "targets": ids.roll(-1, 1), "positions": positions, "document": document, "weights": weights}


def our_loss(model: Decoder, batch: dict) -> torch.Tensor:
    hidden = model(batch["ids"], batch["positions"], IntervalMask.causal(batch["document"]))
    flat = (hidden.flatten(0, 1), model.head_weight, batch["targets"].flatten(), batch["weights"].flatten())
    return linear_cross_entropy(*flat).loss / batch["weights"].sum()


def their_loss(model, batch: dict) -> torch.Tensor:
    inputs = {"attention_mask": batch["mask_4d"], "position_ids": batch["positions"]}
    logits = model(batch["ids"], **inputs, use_cache=False).logits
    nll = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
    return (nll * batch["weights"].flatten()).sum() / batch["weights"].sum()


def backward(model, loss_of, batch: dict, precision: str) -> torch.Tensor:
    """Forward and backward pass as `train.py` runs them; returns the loss."""
    with autocast(precision, torch.device("cpu")):
        loss = loss_of(model, batch)
    loss.backward()
    return loss


def check(ours: Decoder, theirs, batch: dict, precision: str) -> dict:
    """Relative errors of loss and gradients against transformers in float64. Raises UserError when ours are not within
    twice transformers' own: then the two do not compute the same thing."""
    oracle = copy.deepcopy(theirs).double()
    exact = {"loss": their_loss(oracle, batch).double()}
    exact["loss"].backward()
    exact |= {name.removeprefix("model."): p.grad for name, p in oracle.named_parameters()}
    errors = {}
    for who, model, loss_of in (("ours", ours, our_loss), ("transformers", theirs, their_loss)):
        found = {"loss": backward(model, loss_of, batch, precision)}
        found |= {name.removeprefix("model."): p.grad for name, p in model.named_parameters()}
        relative = {name: ((found[name] - value).norm() / value.norm()).item() for name, value in exact.items()}
        errors[who] = {"loss": relative.pop("loss"), "gradient_worst": max(relative.values())}
        model.zero_grad()
    tiny = torch.finfo(getattr(torch, precision)).eps
    if any(errors["ours"][key] > 2 * errors["transformers"][key] + tiny for key in errors["ours"]):
        raise UserError(f"the two models disagree ({errors}): nothing was timed")
    return errors


@cli
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train_step-cpu.json"))
    parser.add_argument("--check", action="store_true", help="compare losses and gradients, time nothing")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=3072)
    parser.add_argument("--counted", type=float, default=1.0, help="part of each document that counts in the loss")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--kv-heads", type=int, default=2)
    args = parser.parse_args(argv)
    if min(args.rows, args.repetitions) < 1 or args.length < 140 or not 0.1 <= args.counted <= 1:
        raise UserError("--rows and --repetitions must be positive, --length at least 140, --counted 0.1 .. 1")
    try:
        from transformers import Qwen3Config, Qwen3ForCausalLM
    except ImportError:
        raise UserError("this benchmark needs transformers: pip install 'onevocab[dev]'") from None

    generator = torch.Generator().manual_seed(0)
    config = ModelConfig(dim=args.dim, layers=args.layers, kv_heads=args.kv_heads, max_length=args.length)
    ours = Decoder(config, args.vocab_size)
    ours.initialise(generator)
    theirs = Qwen3ForCausalLM(Qwen3Config(**qwen3_config(config, args.vocab_size)))  # its attention is SDPA
    theirs.load_state_dict(to_qwen3_state_dict(ours))
    batches = [packed_batch(args.rows, args.length, args.vocab_size, args.counted, generator) for _ in range(4)]
    itself = torch.eye(args.length, dtype=torch.bool)  # what a padding query sees: transformers has no empty rows
    for batch in batches:
        batch["mask_4d"] = IntervalMask.causal(batch["document"]).dense(args.length) | itself
    precision = choose(args.precision, torch.device("cpu"))
    errors = check(ours, theirs, batches[0], precision)
    print(f"{precision}; errors against float64, loss and worst gradient: "
          + "; ".join(f"{who} {e['loss']:.1e}, {e['gradient_worst']:.1e}" for who, e in errors.items()))
    if args.check:
        return

    ours_muon = Decoder(config, args.vocab_size)
    ours_muon.load_state_dict(ours.state_dict())
    optimizers = build_optimizers(ours_muon, OptimizerConfig())
    adamw = {m: torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True) for m in (ours, theirs)}

    def adamw_step(model, loss_of, precision=precision):
        def step(i):
            backward(model, loss_of, batches[i % len(batches)], precision)
            adamw[model].step()
            adamw[model].zero_grad()
        return step

    def muon_step(i):
        backward(ours_muon, our_loss, batches[i % len(batches)], precision)
        optimizers.step(0.01)
        optimizers.zero_grad()

    steps = {
        "ours, AdamW": adamw_step(ours, our_loss),
        "transformers, AdamW": adamw_step(theirs, their_loss),
        "ours, Muon and AdamW": muon_step,
    }
    if precision != "float32":
        steps["transformers, AdamW, float32"] = adamw_step(theirs, their_loss, "float32")
    tokens = [int((b["document"] >= 0).sum()) for b in batches]
    times = measure.time_all(steps, torch.device("cpu"), math.inf, args.repetitions)
    rates = {name: [tokens[i % len(tokens)] / t for i, t in enumerate(spent)] for name, spent in times.items()}
    base = max((rates[name] for name in steps if name.startswith("transformers")), key=statistics.median)
    results = {}
    for name, values in rates.items():
        ratios = sorted(a / b for a, b in zip(values, base, strict=True))
        quartiles = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        results[name] = {
            "tokens_per_second": round(statistics.median(values)),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_quartiles": [round(x, 3) for x in quartiles],
        }
        print(f"{name:29} {results[name]['tokens_per_second']:>8,} tokens/s   {results[name]['ratio']:.2f}x "
              f"(quartiles {results[name]['ratio_quartiles'][0]:.2f} .. {results[name]['ratio_quartiles'][1]:.2f})")
    write_json(args.out, {
        "benchmark": "train_step",
        "what": "forward + backward + optimiser step, non-padding tokens per second, interleaved; "
                "ratios to the faster transformers",
        **provenance(),
        "command": "python -m benchmarks.train_step " + " ".join(sys.argv[1:] if argv is None else argv),
        "shape": json.loads(config.model_dump_json()) | {"vocab_size": args.vocab_size, "rows": args.rows,
                                                         "length": args.length, "counted": args.counted},
        "repetitions": args.repetitions,
        "precision": precision,
        "errors_against_float64": errors,
        "results": results,
    })
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
