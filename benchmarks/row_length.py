"""The same documents in rows of several lengths: a packed row's length should cost nothing.

    python -m benchmarks.row_length --out row_length.json

A whole decoder's loss and gradients of all weights, so that everything a length could reach counts: the mask and its
plans, attention, positions. Ours has all documents in one row; against it the rows are 1/4, 1/16 and 1/64 as long, the
shortest a document each. All give the same loss and the same gradients, which is checked first, against the kernels'
definitions in float64.
"""

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.func import functional_call

from benchmarks import command
from benchmarks.work import OURS, Cost, Preset, Target, Work
from onevocab.kernels.attention import IntervalMask
from onevocab.kernels.backend import forced
from onevocab.kernels.cross_entropy import linear_cross_entropy
from onevocab.model.decoder import Decoder

DOCUMENTS = 64
SHORTER = {f"rows of {share} document{'s' * (share > 1)}": share for share in (16, 4, 1)}


def build(shape: dict, device: torch.device, dtype: torch.dtype) -> Work:
    length, dim, layers, vocabulary = (shape[name] for name in ("document", "dim", "layers", "vocabulary"))
    # A namespace, because a bare CUDA image has no pydantic.
    config = SimpleNamespace(dim=dim, layers=layers, heads=dim // 32, kv_heads=max(dim // 64, 1), head_dim=32,
                             mlp_dim=3 * dim, rope_theta=1e4, norm_eps=1e-6, tie_embeddings=True)
    model = Decoder(config, vocabulary).to(device, dtype)
    names = [name for name, _ in model.named_parameters()]
    texts = torch.randint(vocabulary, (DOCUMENTS, length), device=device)
    targets = texts.roll(-1, 1).flatten()
    counted = torch.ones(DOCUMENTS, length, device=device)
    counted[:, -1] = 0  # a position predicts the next; a document's last token has none
    number = torch.arange(DOCUMENTS, device=device).repeat_interleave(length)
    position = torch.arange(length, device=device).repeat(DOCUMENTS)

    def prepare(documents: int):
        """documents: how many a row holds."""
        rows = DOCUMENTS // documents
        ids, positions, document = (x.view(rows, -1) for x in (texts.flatten(), position, number))
        mask = IntervalMask.causal(document, mean_keys=(length + 1) / 2)

        def loss(*parameters: Tensor) -> Tensor:
            weights = dict(zip(names, parameters, strict=True))
            hidden = functional_call(model, weights, (ids, positions, mask)).flatten(0, 1)
            weight = counted.flatten().to(hidden.dtype)
            return linear_cross_entropy(hidden, weights["embed_tokens.weight"], targets, weight).loss

        return loss

    def definition(*parameters: Tensor) -> Tensor:
        """A row per document, with the definitions of all kernels."""
        with forced("reference"):
            return prepare(1)(*parameters)

    matrices, tokens = sum(p.numel() for p in model.parameters()), DOCUMENTS * length
    providers = {OURS: lambda: prepare(DOCUMENTS)} | {
        name: lambda share=share: prepare(share) for name, share in SHORTER.items()
    }
    return Work(lambda: tuple(p.detach() for p in model.parameters()), providers, definition,
                {"both": Cost(6 * matrices * tokens, matrices * dtype.itemsize * 3)}, differentiable=len(names),
                notes=[f"{DOCUMENTS} documents; ours: one row of {tokens:,}; FLOPs without attention's"],
                operations=("attention", "linear_cross_entropy", "qk_norm_rope", "rms_norm", "swiglu"), whole=True,
                tokens=tokens)


SHAPE = {"document": 256, "dim": 128, "layers": 4, "vocabulary": 3072}
PRESETS = {
    "documents": Preset(
        "documents of 256 tokens, all in one row or in shorter rows", build,
        {"cpu": SHAPE, "cuda": SHAPE | {"dim": 1024, "layers": 8, "vocabulary": 32768},
         "tiny": {"document": 4, "dim": 64, "layers": 2, "vocabulary": 50}},
        {kind: [Target("time", "both", (name,), at_most=1.1) for name in SHORTER] for kind in ("cpu", "cuda")},
        kernel=False,
    ),
}

main = command.main("row_length", __doc__, PRESETS)

if __name__ == "__main__":
    main()
