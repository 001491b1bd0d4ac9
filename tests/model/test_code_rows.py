"""Rows of codes that are made from the codebook: split, trained, saved, folded."""

import pytest
import torch
import torch.nn.functional as F

from onevocab.model.code_rows import features_of, fold
from onevocab.model.config import ModelConfig
from onevocab.model.decoder import Decoder
from onevocab.tokenizers.quantizers import build_quantizer
from onevocab.tokenizers.quantizers.fsq import FSQConfig
from onevocab.tokenizers.quantizers.vq import VQConfig
from onevocab.training.config import OptimizerConfig
from onevocab.training.muon import assign, build_optimizers

CODES = {"image": 20, "audio": 70}  # modality -> id of its first code


def decoder(tie: bool) -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelConfig(dim=32, layers=1, heads=2, kv_heads=1, head_dim=16, mlp_dim=32, tie_embeddings=tie), 130)


def features() -> dict:
    vectors = {"image": torch.randn(40, 8), "audio": torch.randn(50, 4)}
    return {name: (CODES[name], features_of(each, 24, seed=1)) for name, each in vectors.items()}


def hidden(model: Decoder) -> torch.Tensor:
    ids = torch.arange(130)[None]
    return model.logits(model(ids, ids, None))


@pytest.mark.parametrize("tie", [True, False])
def test_split_changes_nothing_and_fold_gives_plain_rows(tie):
    model = decoder(tie).double()
    before, plain = hidden(model), model.state_dict()
    plain = {name: value.clone() for name, value in plain.items()}
    model.split_code_rows(features(), fresh=False)
    assert len(model.code_rows) == (2 if tie else 4)
    torch.testing.assert_close(hidden(model), before)
    with torch.no_grad():  # as training moves them
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    trained, folded = hidden(model), fold(model.state_dict())
    assert folded.keys() == plain.keys()
    other = decoder(tie).double()
    other.load_state_dict(folded)
    torch.testing.assert_close(hidden(other), trained)
    assert not torch.allclose(trained, before)


def test_fresh_rows_come_from_the_projection_alone():
    model = decoder(True)
    model.split_code_rows(features(), fresh=True)
    assert (model.embed_tokens.weight[20:60] == 0).all() and (model.embed_tokens.weight[70:120] == 0).all()
    assert (model.embed_tokens.weight[60:70] != 0).all() and (model.embed_tokens.weight[120:] != 0).all()
    rows = model.head_weight
    assert 0.015 < rows[20:60].std() < 0.025 and 0.015 < rows[70:120].std() < 0.025  # as rows of text start
    assert torch.equal(rows[:20], model.embed_tokens.weight[:20])


def test_what_is_learned_of_a_code_is_learned_of_its_neighbour():
    """A step on one code moves the rows of codes near it, and those far away less; Muon has the projections."""
    vectors = F.normalize(torch.cat([torch.eye(8), torch.eye(8) + 0.05 * torch.randn(8, 8)]), dim=-1)
    model = decoder(True)
    model.split_code_rows({"image": (20, features_of(vectors, 64, seed=0))}, fresh=True)
    before = model.head_weight.detach().clone()
    model.head_weight[20].sum().backward()
    part = model.code_rows["embed_tokens-image"]
    with torch.no_grad():
        part.projection -= part.projection.grad
    moved = (model.head_weight - before).norm(dim=-1)[20:36]
    assert moved[8] > 3 * moved[[1, 2, 3, 9, 10]].max()
    matrices, rest = assign(model)
    assert any(value is part.projection for _, value in matrices)
    assert any(value is model.embed_tokens.weight for _, value in rest)


def test_averages_are_complete():
    """What a checkpoint has of them folds into plain rows: the averaged parts, not the newest ones."""
    model = decoder(True)
    plain = set(model.state_dict())
    model.split_code_rows(features(), fresh=False)
    optimizers = build_optimizers(model, OptimizerConfig(ema_decay=0.999))
    before = fold(model.state_dict())["embed_tokens.weight"]
    with torch.no_grad():
        model.code_rows["embed_tokens-image"].projection += 1
    assert optimizers.averages().keys() == model.state_dict().keys()
    folded = fold(optimizers.averages())
    assert set(folded) == plain and torch.equal(folded["embed_tokens.weight"], before)


def test_features():
    vectors = torch.randn(3000, 16)
    made = features_of(vectors, 128, seed=0)
    assert made.shape == (3000, 128) and torch.equal(made, features_of(vectors, 128, seed=0))
    unit = features_of(F.normalize(vectors, dim=-1), 128, seed=0)
    torch.testing.assert_close(unit[:, :16].norm(dim=-1), torch.ones(3000))
    assert abs(unit[:, 16:].norm(dim=-1).mean() - 1) < 0.05  # random cosines of length 1 on average
    assert features_of(vectors, 8, seed=0).shape == (3000, 16)


@pytest.mark.parametrize("config", [VQConfig(codebook_size=30, dim=6), FSQConfig(levels=(3, 4))])
def test_vectors_of_any_quantizer(config):
    quantizer = build_quantizer(config)
    vectors = quantizer.vectors()
    assert vectors.shape == (quantizer.codebook_size, quantizer.dim)
    torch.testing.assert_close(vectors[[5]], quantizer.decode(torch.tensor([[5]])))
    quantizer.codes_per_place = 2
    assert quantizer.vectors() is None
