"""The decoder against transformers' Qwen3, packing against separate rows, the cache against a full forward."""

import pytest
import torch
from pydantic import ValidationError

from onevocab.kernels.attention import IntervalMask
from onevocab.model.cache import KVCache
from onevocab.model.config import ModelConfig
from onevocab.model.decoder import Decoder, qwen3_config, to_qwen3_state_dict

VOCAB = 97


def make(tied=True, kv_heads=2, seed=0, **kwargs):
    """A decoder whose every parameter is random, norms too, so that no part can hide."""
    torch.manual_seed(seed)
    config = ModelConfig(dim=48, layers=3, heads=4, kv_heads=kv_heads, head_dim=16, mlp_dim=64, tie_embeddings=tied,
                         **kwargs)
    model = Decoder(config, VOCAB)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def packed():
    """Two rows of 40: documents of 11 and 22 and padding, and one of 40. ids, positions, document."""
    document = torch.tensor([[0] * 11 + [1] * 22 + [-1] * 7, [0] * 40])
    positions = torch.stack([torch.cat([torch.arange(11), torch.arange(22), torch.zeros(7).long()]), torch.arange(40)])
    return torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(3)), positions, document


@pytest.mark.parametrize("tied,kv_heads", [(True, 2), (False, 1), (True, 4)])
def test_same_logits_as_qwen3(tied, kv_heads):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    ours = make(tied, kv_heads)
    theirs = Qwen3ForCausalLM(Qwen3Config(**qwen3_config(ours.config, VOCAB))).eval()
    assert theirs.load_state_dict(to_qwen3_state_dict(ours), strict=True)
    ids, positions, document = packed()
    mask = IntervalMask.causal(document)
    dense = mask.dense(40) | torch.eye(40, dtype=torch.bool)  # Qwen3 has no empty rows
    counts = document >= 0

    @torch.no_grad()
    def both():
        mine = ours.logits(ours(ids, positions, mask))[counts]
        return mine, theirs(ids, attention_mask=dense, position_ids=positions).logits[counts]

    single = both()
    ours.double(), theirs.double()
    double = both()
    # Their rotary angles stay float32 inside a float64 model and so do ours: what is left is rounding.
    assert (double[0] - double[1]).abs().max() < 1e-5 * double[1].abs().max()
    rounding = (single[1] - double[1]).abs().max()
    assert (single[0] - double[1]).abs().max() <= 2 * rounding + 1e-6


def test_packed_rows_equal_separate_rows():
    model = make()
    ids, positions, document = packed()
    with torch.no_grad():
        together = model(ids, positions, IntervalMask.causal(document))
        for row, part in ((0, slice(0, 11)), (0, slice(11, 33)), (1, slice(0, 40))):
            alone = model(ids[row : row + 1, part], positions[row : row + 1, part], None)[0]
            torch.testing.assert_close(together[row, part], alone, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cached_decoding_equals_a_full_forward(kv_heads):
    model = make(kv_heads=kv_heads)
    ids, lengths = packed()[0], [9, 30]
    with torch.no_grad():
        full = model(ids, torch.arange(40).expand(2, 40), None)
        cache = KVCache(model.config, 2, 40)
        # a prompt each, of different lengths, padded; then one token at a time, at each row's own position
        prompt = torch.arange(30).repeat(2, 1)
        prompt[0, 9:] = -1
        hidden = model(ids[:, :30], prompt, IntervalMask.up_to(prompt), cache)
        torch.testing.assert_close(hidden[0, :9], full[0, :9], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(hidden[1], full[1, :30], rtol=1e-4, atol=2e-5)
        assert cache.lengths.tolist() == lengths and (cache.keys[0][0, 9:] == 0).all()
        for step in range(10):
            at = torch.tensor(lengths)[:, None] + step
            hidden = model(ids.gather(1, at), at, IntervalMask.up_to(at), cache)
            torch.testing.assert_close(hidden[:, 0], full[torch.arange(2), at[:, 0]], rtol=1e-4, atol=2e-5)
        swapped = cache.select(torch.tensor([1, 0, 1]))
        assert swapped.lengths.tolist() == [40, 19, 40]
        with pytest.raises(ValueError, match="holds 40"):
            model(ids[:, :1], torch.full((2, 1), 40), IntervalMask.up_to(torch.full((2, 1), 40)), cache)


def test_a_slice_of_the_head():
    model, hidden = make(tied=False), torch.randn(2, 3, 48)
    torch.testing.assert_close(model.logits(hidden, 10, 20), model.logits(hidden)[..., 10:20])


def test_initialisation_is_near_uniform_and_repeatable():
    config = ModelConfig(layers=2, dim=64)
    models = [Decoder(config, 200) for _ in range(2)]
    for model in models:
        model.initialise(torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
    ids = torch.randint(0, 200, (1, 50))
    logits = models[0].logits(models[0](ids, torch.arange(50)[None], None))
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert abs(loss.item() - torch.tensor(200.0).log().item()) < 0.3


@pytest.mark.parametrize("wrong", [{"kv_heads": 3}, {"head_dim": 15}, {"layers": 0}, {"width": 3}])
def test_impossible_shapes_are_refused(wrong):
    with pytest.raises(ValidationError):
        ModelConfig(**wrong)


def test_compiled_layers_are_one_graph_for_any_documents():
    """One graph a layer without a break, not made again for other documents; the same loss and gradients."""
    torch.compiler.reset()
    config = ModelConfig(dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_dim=48, max_length=16)
    plain, compiled = Decoder(config, 50).double(), Decoder(config, 50).double()
    compiled.load_state_dict(plain.state_dict())
    for layer in compiled.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for cuts in ([5, 5, 6], [16], [3, 11, -2]):  # negative: padding
            number = torch.tensor([i if n > 0 else -1 for i, n in enumerate(cuts)])
            document = number.repeat_interleave(torch.tensor(cuts).abs()).expand(2, -1)
            positions = torch.cat([torch.arange(abs(n)) for n in cuts]).expand(2, -1)
            ids = torch.randint(50, (2, 16), generator=generator)
            found = []
            for model in (plain, compiled):
                model.zero_grad()
                hidden = model(ids, positions, IntervalMask.causal(document))
                hidden.square().mul(hidden.detach().sin()).sum().backward()
                found.append([hidden.detach(), *(p.grad for p in model.parameters())])
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_attention_that_compilers_see():
    from onevocab.kernels.attention.torch_form import _by_document

    q, k, v = (torch.randn(2, heads, 7, 8, requires_grad=True) for heads in (4, 2, 2))
    document = torch.tensor([[0, 0, 0, 1, 1, -1, -1], [0, 1, 1, 1, 1, 1, 1]])
    torch.library.opcheck(_by_document, (q, k, v, document, None))


def test_under_autocast_a_layer_rounds_its_norms_once():
    """Matrices read the norms in bfloat16, as they come; what is handed from layer to layer stays float32."""
    model = make()
    ids, positions, document = packed()
    read, handed = [], []
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "v_proj", "gate_proj", "up_proj")):
            module.register_forward_pre_hook(lambda _, given: read.append(given[0].dtype))
        if name.startswith("layers.") and name.count(".") == 1:
            module.register_forward_hook(lambda _, given, out: handed.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids, positions, IntervalMask.causal(document))
    assert set(read) == {torch.bfloat16} and len(read) == 12 and set(handed) == {torch.float32}
    assert rounded.dtype == torch.bfloat16 and model.logits(rounded.float()).dtype == torch.float32
    plain = model(ids, positions, IntervalMask.causal(document))[document >= 0]
    assert (rounded[document >= 0] - plain).norm() < 0.03 * plain.norm()
