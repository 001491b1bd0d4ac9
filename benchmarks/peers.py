"""Other people's models of Qwen3's architecture, for `benchmarks.train_step`: each with our weights and our loss.

A peer is `Peer(model, weights, logits)`: its module, what makes its parameters out of ours (differentiably, so that
gradients are compared in ours), and what runs it on a batch of `benchmarks.batches`. Each raises `Unavailable` where
its package is missing.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.work import Unavailable
from onevocab.model.decoder import qwen3_config

LITGPT = "pip install --no-deps litgpt lightning lightning-utilities pytorch-lightning torchmetrics jsonargparse psutil"
TORCHTITAN = "pip install --no-deps torchtitan spmd_types==0.2.3"


class Peer(NamedTuple):
    model: nn.Module
    weights: Callable[[dict[str, Tensor]], dict[str, Tensor]]  # our parameters -> its own
    logits: Callable[[Callable, dict[str, Tensor]], Tensor]  # (the model or a stand-in, a batch) -> (B, S, V)


def versions() -> str:
    """Of the peers that are installed."""
    installed = []
    for name in ("transformers", "litgpt", "torchtitan"):
        try:
            installed.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(installed) or "no peers installed"


def require(what: str, name: str, how: str):
    """The module, or Unavailable with how to install it."""
    try:
        import_module("onevocab.tokenizers.torchaudio_guard")  # first: transformers and lightning import torchaudio
        return import_module(name)
    except ImportError as error:
        raise Unavailable(f"{what} is not installed ({error}): {how}") from None


def transformers(config, vocabulary: int, padded: bool = False) -> Peer:
    """Hugging Face's, its attention is SDPA. Packed rows come with a dense mask, made before the clock starts: from
    position ids alone it makes the same mask itself in every step."""
    theirs = require("transformers", "transformers", "pip install 'onevocab[dev]'")
    model = theirs.Qwen3ForCausalLM(theirs.Qwen3Config(**qwen3_config(config, vocabulary)))

    def logits(run, batch):
        if padded:
            return run(batch["ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        inputs = {"attention_mask": batch["mask_4d"], "position_ids": batch["positions"]}
        return run(batch["ids"], **inputs, use_cache=False).logits

    return Peer(model, lambda ours: {f"model.{name}": each for name, each in ours.items()}, logits)


def widened(peer: Peer) -> Peer:
    """transformers' model for float64: it computes norms and angles in float32 whatever the weights are."""
    def norm(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)

    def rotary(self, x, positions):
        angle = (positions[..., None].float() * self.inv_freq.float()).to(torch.promote_types(x.dtype, torch.float32))
        angle = torch.cat([angle, angle], -1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)

    for module in peer.model.modules():
        name = type(module).__name__
        if name in ("Qwen3RMSNorm", "Qwen3RotaryEmbedding"):
            module.forward = MethodType(norm if name == "Qwen3RMSNorm" else rotary, module)
    return peer


def litgpt(config, vocabulary: int) -> Peer:
    """Its blocks take a mask and positions' cosines; its own forward offers neither in training, so we call them."""
    theirs = require("litgpt", "litgpt.model", LITGPT)

    class Packed(theirs.GPT):
        def forward(self, ids, positions, mask):
            x, cos, sin = self.transformer.wte(ids), self.cos[positions], self.sin[positions]
            for block in self.transformer.h:
                x = block(x, cos, sin, mask)
            return self.lm_head(self.transformer.ln_f(x))

    model = Packed(theirs.Config(
        name="qwen3", block_size=config.max_length, vocab_size=vocabulary, padded_vocab_size=vocabulary,
        n_layer=config.layers, n_head=config.heads, n_query_groups=config.kv_heads, n_embd=config.dim,
        head_size=config.head_dim, intermediate_size=config.mlp_dim, rotary_percentage=1.0, parallel_residual=False,
        bias=False, norm_class_name="RMSNorm", norm_eps=config.norm_eps, mlp_class_name="LLaMAMLP",
        rope_base=int(config.rope_theta), norm_qk=True))
    model.transformer.wte.weight = model.lm_head.weight  # as its pretraining ties them
    names = {"input_layernorm": "norm_1", "post_attention_layernorm": "norm_2", "self_attn.o_proj": "attn.proj",
             "self_attn.q_norm": "attn.norm_q", "self_attn.k_norm": "attn.norm_k", "mlp.gate_proj": "mlp.fc_1",
             "mlp.up_proj": "mlp.fc_2", "mlp.down_proj": "mlp.proj"}

    def weights(ours):
        mapped = {"lm_head.weight": ours["embed_tokens.weight"], "transformer.ln_f.weight": ours["norm.weight"]}
        for i in range(config.layers):
            for name, other in names.items():
                mapped[f"transformer.h.{i}.{other}.weight"] = ours[f"layers.{i}.{name}.weight"]
            mapped[f"transformer.h.{i}.attn.qkv.weight"] = torch.cat(
                [ours[f"layers.{i}.self_attn.{kind}_proj.weight"] for kind in "qkv"])
        return mapped

    return Peer(model, weights, lambda run, batch: run(batch["ids"], batch["positions"], batch["mask_4d"]))


class MaskedSDPA(nn.Module):
    def forward(self, q, k, v, *, attention_masks, scale, enable_gqa):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_masks, scale=scale, enable_gqa=enable_gqa)
        return out.transpose(1, 2)


def torchtitan(config, vocabulary: int) -> Peer:
    """With SDPA and a dense mask in its place for attention: of its own two, FlexAttention has no backward pass on a
    CPU, and varlen is a CUDA kernel."""
    theirs = require("torchtitan", "torchtitan.models.qwen3", TORCHTITAN)
    titan = import_module("torchtitan.models.common")
    layers = theirs._build_qwen3_layers(
        n_layers=config.layers, dim=config.dim, n_heads=config.heads, n_kv_heads=config.kv_heads,
        head_dim=config.head_dim, hidden_dim=config.mlp_dim, attn_backend="flex",
        rope=titan.CosSinRoPE.Config(dim=config.head_dim, max_seq_len=config.max_length, theta=config.rope_theta))
    model = theirs.Qwen3Model.Config(
        vocab_size=vocabulary, dim=config.dim, norm=theirs._qwen3_norm(config.dim), layers=layers,
        enable_weight_tying=True,
        tok_embeddings=titan.Embedding.Config(
            num_embeddings=vocabulary, embedding_dim=config.dim, param_init=theirs._EMBEDDING_SKIP_INIT),
        lm_head=titan.Linear.Config(
            in_features=config.dim, out_features=vocabulary, param_init=theirs._LINEAR_INIT)).build()
    model.init_states(buffer_device=None)
    names = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
             "self_attn.o_proj": "attention.wo", "self_attn.q_norm": "attention.q_norm",
             "self_attn.k_norm": "attention.k_norm", "mlp.gate_proj": "feed_forward.w1",
             "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2"}
    for layer in model.layers.values():
        layer.attention.inner_attention = MaskedSDPA()

    def weights(ours):
        mapped = {"tok_embeddings.weight": ours["embed_tokens.weight"], "norm.weight": ours["norm.weight"]}
        for i in range(config.layers):
            for name, other in names.items():
                mapped[f"layers.{i}.{other}.weight"] = ours[f"layers.{i}.{name}.weight"]
            # one matrix: for each key head its queries, its key, its value
            parts = (ours[f"layers.{i}.self_attn.{kind}_proj.weight"].view(config.kv_heads, -1, config.dim)
                     for kind in "qkv")
            mapped[f"layers.{i}.attention.qkv_linear.wqkv.weight"] = torch.cat(list(parts), 1).flatten(0, 1)
        return mapped

    return Peer(model, weights, lambda run, batch: run(
        batch["ids"], positions=batch["positions"], attention_masks=batch["mask_4d"]))
