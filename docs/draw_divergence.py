"""How a healthy run looks beside one without QK-norm and one without z-loss: docs/images/divergence.png.

    make demo && python docs/draw_divergence.py runs/demo

A small decoder on that run's codes, with learning rates far too high, so that minutes show what takes days otherwise.
Writes docs/images/divergence.json, from which the picture is drawn.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure

from onevocab.common.files import write_json
from onevocab.common.provenance import provenance
from onevocab.data.loader import LoaderConfig, PackedLoader
from onevocab.data.source import Source
from onevocab.kernels.elementwise import rotary_reference
from onevocab.model import decoder as network
from onevocab.model.config import ModelConfig
from onevocab.tokenizers.bundle import Tokenizers
from onevocab.training.config import TrainConfig
from onevocab.training.loop import train_language
from onevocab.training.metrics import MetricsLog, read_metrics

DOCS = Path(__file__).parent
STEPS, ROWS, LENGTH = 300, 8, 256
SHAPE = ModelConfig(dim=128, layers=6, heads=4, kv_heads=2, head_dim=32, mlp_dim=384, max_length=LENGTH)
# matrix_lr, other_lr, weight of the z-loss, QK-norm
CASES = {
    "as it is": (0.02, 4e-3, 1e-5, True),
    "learning rates x 25": (0.5, 0.1, 1e-5, True),
    "the same without QK-norm": (0.5, 0.1, 1e-5, False),
    "the same without z-loss": (0.5, 0.1, 0.0, True),
}
PANELS = {"loss": "loss, nats a token", "gradient_norm": "gradient norm",
          "output_norm": "norm of the last layer's output", "z": "z"}


def unnormed(x, weight, cos, sin, eps):
    """In place of `qk_norm_rope`."""
    return rotary_reference(x.to(weight.dtype), cos, sin).to(x.dtype)


def case(run: Path, matrix_lr: float, other_lr: float, z_loss: float, qk_norm: bool) -> list[dict]:
    """The log's lines."""
    tokenizers = Tokenizers.load(run / "tokenizers")
    loader = PackedLoader([Source(path=str(run / "codes" / "pretrain-*.tar"))], tokenizers,
                          LoaderConfig(seq_len=LENGTH, global_batch_size=ROWS))
    config = TrainConfig.model_validate({
        "steps": STEPS, "log_every": 5, "z_loss": z_loss, "max_bad_steps": STEPS, "precision": "float32",
        "schedule": {"kind": "constant"}, "optimizer": {"matrix_lr": matrix_lr, "other_lr": other_lr}})
    torch.manual_seed(0)
    model = network.Decoder(SHAPE, tokenizers.vocab.size)
    usual, network.qk_norm_rope = network.qk_norm_rope, network.qk_norm_rope if qk_norm else unnormed
    try:
        with tempfile.TemporaryDirectory() as folder:
            log = MetricsLog(Path(folder) / "metrics.jsonl")
            train_language(model, loader, config, Path(folder) / "stage", {}, tokenizers.vocab.modalities, log, "stage",
                           torch.device("cpu"))
            return read_metrics(log.path)
    finally:
        network.qk_norm_rope = usual


def draw(cases: dict[str, list[dict]], path: Path) -> None:
    figure = Figure(figsize=(11, 7), dpi=110, layout="constrained")
    for place, (key, title) in enumerate(PANELS.items(), 1):
        axes = figure.add_subplot(2, 2, place)
        for name, lines in cases.items():
            points = [(line["step"], line[key]) for line in lines if key in line]
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        axes.set(title=title, xlabel="step", yscale="linear" if key == "z" else "log")
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    run, cases = Path(sys.argv[1]), {}
    for name, settings in CASES.items():
        lines = case(run, *settings)
        for line in lines:
            losses = [value for key, value in line.items() if key.startswith("loss_")]
            if losses:
                line["loss"] = sum(losses) / len(losses)
        cases[name] = [{key: round(line[key], 5) for key in ("step", *PANELS) if key in line} for line in lines]
    write_json(DOCS / "images" / "divergence.json", {"cases": cases, "provenance": provenance()})
    draw(cases, DOCS / "images" / "divergence.png")
    print(json.dumps({name: lines[-1] for name, lines in cases.items()}, indent=1))


if __name__ == "__main__":
    main()
