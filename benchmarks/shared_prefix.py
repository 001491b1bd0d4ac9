"""One picture with several independent questions: one row with a shared prefix against a row per question.

    python -m benchmarks.shared_prefix --out shared_prefix.json

A whole decoder's loss and gradients of all weights, so that the linear layers count too. In the row per question the
picture stands in each; in the shared row it stands once, every question sees it and continues its positions. Both give
the same loss and the same gradients, which is checked first, against the kernels' definitions in float64. Loss falls on
the questions' tokens but the first, which in a real prompt is a turn's id that nothing has to predict.
"""

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.func import functional_call

from benchmarks import command
from benchmarks.attention import shared
from benchmarks.work import OURS, Cost, Preset, Target, Work
from onevocab.kernels.attention import IntervalMask
from onevocab.kernels.backend import forced
from onevocab.kernels.cross_entropy import linear_cross_entropy
from onevocab.model.decoder import Decoder

ROWS = "a row per question"


def build(shape: dict, device: torch.device, dtype: torch.dtype) -> Work:
    prefix, questions, question = shape["prefix"], shape["questions"], shape["question"]
    dim, layers, vocabulary = shape["dim"], shape["layers"], shape["vocabulary"]
    # A namespace, because a bare CUDA image has no pydantic.
    config = SimpleNamespace(dim=dim, layers=layers, heads=dim // 32, kv_heads=max(dim // 64, 1), head_dim=32,
                             mlp_dim=3 * dim, rope_theta=1e4, norm_eps=1e-6, tie_embeddings=True)
    model = Decoder(config, vocabulary).to(device, dtype)
    names = [name for name, _ in model.named_parameters()]
    picture = torch.randint(vocabulary, (prefix,), device=device)
    texts = torch.randint(vocabulary, (questions, question), device=device)
    document, prefix_of = (x.to(device) for x in shared(1, prefix, questions, question))
    index = torch.arange(prefix + question, device=device)

    counted = torch.ones(questions, question, device=device)
    counted[:, -1] = 0  # a position predicts the next; a question's last token has none
    targets = texts.roll(-1, 1)
    one_row = {
        "ids": torch.cat([picture, texts.flatten()])[None],
        "positions": torch.cat([index[:prefix], index[prefix:].repeat(questions)])[None],
        "targets": torch.cat([picture, targets.flatten()]),
        "weights": torch.cat([torch.zeros(prefix, device=device), counted.flatten()]),
        "mask": lambda: IntervalMask.shared_prefix(document, prefix_of),
    }
    many_rows = {
        "ids": torch.cat([picture.expand(questions, -1), texts], 1),
        "positions": index.expand(questions, -1),
        "targets": torch.cat([picture.expand(questions, -1), targets], 1).flatten(),
        "weights": torch.cat([torch.zeros(questions, prefix, device=device), counted], 1).flatten(),
        "mask": lambda: IntervalMask.causal(torch.zeros(questions, prefix + question, dtype=torch.long, device=device)),
    }

    def prepare(batch: dict):
        mask = batch["mask"]()

        def loss(*parameters: Tensor) -> Tensor:
            weights = dict(zip(names, parameters, strict=True))
            hidden = functional_call(model, weights, (batch["ids"], batch["positions"], mask)).flatten(0, 1)
            head = weights["embed_tokens.weight"]
            return linear_cross_entropy(hidden, head, batch["targets"], batch["weights"].to(hidden.dtype)).loss

        return loss

    def definition(*parameters: Tensor) -> Tensor:
        """The row per question, with the definitions of all kernels."""
        with forced("reference"):
            return prepare(many_rows)(*parameters)

    matrices = sum(p.numel() for p in model.parameters())
    tokens = prefix + questions * question
    costs = {"both": Cost(6 * matrices * tokens, matrices * dtype.itemsize * 3)}
    return Work(lambda: tuple(p.detach() for p in model.parameters()),
                {OURS: lambda: prepare(one_row), ROWS: lambda: prepare(many_rows)}, definition, costs,
                differentiable=len(names), notes=[f"{tokens} positions in one row, {many_rows['ids'].numel()} in rows; "
                                                  "FLOPs without attention's"],
                operations=("attention", "linear_cross_entropy", "qk_norm_rope", "rms_norm", "swiglu"), whole=True)


SHAPE = {"prefix": 256, "questions": 8, "question": 32, "dim": 256, "layers": 4, "vocabulary": 4096}
PRESETS = {
    "questions": Preset(
        "one picture, independent questions", build,
        {"cpu": SHAPE, "cuda": SHAPE | {"prefix": 1024, "question": 64, "dim": 1024, "layers": 8, "vocabulary": 32768},
         "tiny": {"prefix": 20, "questions": 3, "question": 5, "dim": 64, "layers": 2, "vocabulary": 50}},
        {kind: [Target("time", "both", (ROWS,), at_most=0.4)] for kind in ("cpu", "cuda")},
        kernel=False,
    ),
}

main = command.main("shared_prefix", __doc__, PRESETS)

if __name__ == "__main__":
    main()
