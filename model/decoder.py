"""The decoder: Qwen3's dense architecture (Yang et al. 2025, arXiv:2505.09388), under its parameter names.

Pre-norm RMSNorm, SwiGLU, grouped-query attention, RMSNorm on each head's q and k, rotary positions, no biases.
B rows, S positions, H query heads, Hkv key heads, D head_dim; hidden states (B, S, dim).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from onevocab.kernels.attention import IntervalMask, attention
from onevocab.kernels.elementwise import qk_norm_rope, rms_norm, swiglu
from onevocab.model.cache import KVCache
from onevocab.model.code_rows import CodeRows, with_codes

if TYPE_CHECKING:  # at run time any object with its fields does: benchmarks run without pydantic
    from onevocab.model.config import ModelConfig


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """With a residual: (the norm of x + residual, x + residual)."""
        return rms_norm(x, self.weight, self.eps, residual)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.eps = layer, config.head_dim, config.norm_eps
        inner, kv_inner = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, inner, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_inner, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_inner, bias=False)
        self.o_proj = nn.Linear(inner, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: IntervalMask, store=None) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (rearrange(project(x), "b s (h d) -> b s h d", d=self.head_dim) for project in projections)
        q = qk_norm_rope(q, self.q_norm.weight, cos, sin, self.eps)
        k = qk_norm_rope(k, self.k_norm.weight, cos, sin, self.eps)
        if store is not None:
            k, v = store(self.layer, k, v)
        out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        return self.o_proj(rearrange(out, "b h s d -> b s (h d)"))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.mlp_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.mlp_dim, bias=False)
        self.down_proj = nn.Linear(config.mlp_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: IntervalMask, store=None) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), cos, sin, mask, store)
        normed, x = self.post_attention_layernorm(attended, x)
        return x + self.mlp(normed)


class Decoder(nn.Module):
    """Ids in, hidden states out; `logits`, or `linear_cross_entropy` with `head_weight`, does the rest.

    old_rows: how many rows of the vocabulary came with the weights that training started from; 0: it started from none.
    code_rows: empty, or, in training, what the rows of codes are made of (`split_code_rows`).
    """

    old_rows = 0

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.embed_tokens = nn.Embedding(vocab_size, config.dim)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.dim, vocab_size, bias=False)
        self.code_rows = nn.ModuleDict()
        self.initialise()

    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Random weights. Matrices that read the residual stream keep its scale; those that write to it start small, so
        that a layer first sees little but the embeddings; these are small enough for near-uniform predictions."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() < 2:
                    parameter.fill_(1.0)
                elif name.startswith(("embed_tokens", "lm_head")):
                    parameter.normal_(std=0.02, generator=generator)
                else:
                    std = parameter.shape[1] ** -0.5
                    if name.endswith(("o_proj.weight", "down_proj.weight")):
                        std *= 0.1 / self.config.layers**0.5
                    parameter.normal_(std=std, generator=generator)

    @property
    def row_parameters(self) -> list[str]:
        """Names of the parameters that have a row for each id."""
        return ["embed_tokens.weight"] + ([] if self.lm_head is None else ["lm_head.weight"])

    def split_code_rows(self, features: dict[str, tuple[int, Tensor]], fresh: bool) -> None:
        """Makes the rows of codes from features: modality -> (id of its first code, features (K, F) of its codes).
        Before training; fresh: the rows were never trained. `fold` undoes it on a saved state."""
        for name in self.row_parameters:
            table = self.get_parameter(name)
            for modality, (first, values) in features.items():
                part = CodeRows(values, self.config.dim, first).to(table.device, table.dtype)
                part.take(table, fresh)
                self.code_rows[f"{name.removesuffix('.weight')}-{modality}"] = part

    def _table(self, name: str) -> Tensor:
        parts = [part for key, part in self.code_rows.items() if key.startswith(f"{name}-")]
        return with_codes(getattr(self, name).weight, parts)

    @property
    def head_weight(self) -> Tensor:
        """(V, dim)."""
        return self._table("embed_tokens" if self.lm_head is None else "lm_head")

    def flops(self, tokens: float, keys: float) -> float:
        """FLOPs of a forward and a backward pass over `tokens` that together see `keys`. For each token 6 a number of
        a matrix (a tied head once, a table that is only looked up not at all); for each visible key 12 * heads *
        head_dim a layer (Chowdhery et al. 2022, PaLM, appendix B, with visible keys in place of the length)."""
        looked_up = 0 if self.lm_head is None else self.embed_tokens.weight.numel()
        per_step = sum(p.numel() for p in self.code_rows.parameters())  # not used for each token
        matrices = sum(p.numel() for p in self.parameters() if p.dim() > 1) - looked_up - per_step
        width = self.config.layers * self.config.heads * self.config.head_dim
        return 6 * matrices * tokens + 12 * width * keys

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B, S, D/2) of positions (B, S); the angles are computed in float32 or better."""
        dtype = torch.promote_types(self.norm.weight.dtype, torch.float32)
        half = torch.arange(0, self.config.head_dim, 2, device=positions.device, dtype=torch.float32)
        frequency = 1.0 / self.config.rope_theta ** (half / self.config.head_dim)
        angle = (positions[..., None].float() * frequency).to(dtype)
        return angle.cos().to(self.norm.weight.dtype), angle.sin().to(self.norm.weight.dtype)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: IntervalMask | None,
        cache: KVCache | None = None,
        filled: int | None = None,
    ) -> Tensor:
        """ids and positions (B, S) integers -> hidden (B, S, dim) after the last norm. mask=None is plain causal.

        With a cache the new keys go to the slots `positions` of their rows (negative: padding, not stored), and
        the mask speaks of slots: `IntervalMask.up_to(positions)` sees everything up to oneself. filled: how many slots
        its longest row then has, where the caller knows it; then a step on a GPU never waits (`KVCache.advance`).
        """
        x = F.embedding(ids, self._table("embed_tokens"))
        cos, sin = self.rotary(positions)
        store = None
        if cache is not None:
            where, n_keys = cache.advance(positions, filled)

            def store(layer, keys, values):
                return cache.write(layer, where, keys, values, n_keys)

        for layer in self.layers:
            x = layer(x, cos, sin, mask, store)
        return self.norm(x)

    def logits(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Logits (..., stop - start) of ids start .. stop - 1: a slice of the head costs only its share."""
        return F.linear(hidden, self.head_weight[start:stop])


def qwen3_config(config: ModelConfig, vocab_size: int) -> dict:
    """What `transformers.Qwen3Config(**...)` needs to build the same network."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_length,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "torch_dtype": "float32",
    }


def to_qwen3_state_dict(model: Decoder) -> dict[str, Tensor]:
    """The weights under the names of `Qwen3ForCausalLM`; a tied head stands under both names it has there."""
    own = model.state_dict()
    named = {name if name.startswith("lm_head") else f"model.{name}": value for name, value in own.items()}
    named.setdefault("lm_head.weight", model.head_weight.detach())
    return named
