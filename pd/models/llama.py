"""One dense decoder for Llama, Mistral, Qwen2/2.5 and Qwen3: RMS norm, rotary grouped-query attention, gated SiLU MLP.

Projections of q, k, v and of gate, up are fused at load. The others differ from Llama by little: Mistral by windows of
attention, Qwen2 by the biases of q, k and v and by windows in some layers, Qwen3 by norms of q and k and the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pd.kernels.activation import silu_mul
from pd.kernels.attention import AttentionBatch, DeviceBatch, LayerKv, paged_attention
from pd.kernels.linear import add_linear, linear
from pd.kernels.norm import add_rms_norm, rms_norm, rms_scale
from pd.kernels.rope import QkNorm, rope_tables, rope_write_kv
from pd.models.dense import DenseConfig, dense_config, expected_tensors
from pd.models.layers import Linear, inverse_frequencies
from pd.models.registry import Weights
from pd.types import ModelInfo

#: Tokens of a step from which on norms are deferred: below, the few rows lie in the cache and launches count.
DEFERRED_TOKENS = 512

FOLDED_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class DecoderLayer:
    """A norm is None where its weight was multiplied into the projection that follows, see `folded`."""

    attention_norm: torch.Tensor | None
    qkv: Linear
    out: Linear
    mlp_norm: torch.Tensor | None
    gate_up: Linear
    down: Linear
    qk_norm: QkNorm | None
    window: int  # tokens that one attends to at most; 0: all

    def folded(self) -> DecoderLayer:
        """Without weights of its norms, which scale the projections' columns instead.

        As it is where a projection has a bias, which is not to be scaled, and in other types than FOLDED_DTYPE: a row
        that is not normed yet could overflow in float16, and float32 is for exactness.
        """
        if self.attention_norm is None or self.mlp_norm is None or self.qkv.weight.dtype != FOLDED_DTYPE:
            return self
        if any(part.bias is not None for part in (self.qkv, self.out, self.gate_up, self.down)):
            return self
        qkv = Linear(self.qkv.weight * self.attention_norm)
        gate_up = Linear(self.gate_up.weight * self.mlp_norm)
        return replace(self, attention_norm=None, qkv=qkv, mlp_norm=None, gate_up=gate_up)


class DenseDecoder:
    """`pd.models.registry.Model` for dense decoders.

    Where all layers are folded, steps of many tokens defer their norms: a projection of a normed row is that of the
    row, times one number, which the next kernel applies; and what attention and MLP add is added by their projections.
    """

    def __init__(
        self,
        config: DenseConfig,
        embedding: torch.Tensor,
        layers: Sequence[DecoderLayer],
        norm: torch.Tensor,
        head: torch.Tensor,
    ) -> None:
        self.config = config
        self._embedding, self._layers, self._norm, self._head = embedding, layers, norm, head
        self._defers = all(layer.attention_norm is None and layer.mlp_norm is None for layer in layers)
        self._frequencies = inverse_frequencies(config.rope, config.head_dim, embedding.device)
        self._scale = config.head_dim**-0.5

    def forward(self, tokens: torch.Tensor, batch: AttentionBatch | DeviceBatch, kv: Sequence[LayerKv]) -> torch.Tensor:
        eps = self.config.rms_eps
        cos, sin = rope_tables(batch.positions, self._frequencies, self.config.rope.attention_factor)
        residual = torch.nn.functional.embedding(tokens, self._embedding)
        if self._defers and len(tokens) >= DEFERRED_TOKENS:
            return self._deferred(residual, cos, sin, batch, kv)
        normed = rms_norm(residual, self._layers[0].attention_norm, eps)
        following = [layer.attention_norm for layer in self._layers[1:]] + [self._norm]
        for layer, layer_kv, next_norm in zip(self._layers, kv, following, strict=True):
            heads = rope_write_kv(layer.qkv(normed), cos, sin, layer_kv, batch, layer.qk_norm)
            mixed = layer.out(paged_attention(heads, layer_kv, batch, self._scale, layer.window))
            normed, residual = add_rms_norm(mixed, residual, layer.mlp_norm, eps)
            mixed = layer.down(silu_mul(layer.gate_up(normed)))
            normed, residual = add_rms_norm(mixed, residual, next_norm, eps)
        return normed

    def _deferred(
        self,
        residual: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: AttentionBatch | DeviceBatch,
        kv: Sequence[LayerKv],
    ) -> torch.Tensor:
        eps = self.config.rms_eps
        for layer, layer_kv in zip(self._layers, kv, strict=True):
            scale = rms_scale(residual, eps)
            heads = rope_write_kv(layer.qkv(residual), cos, sin, layer_kv, batch, layer.qk_norm, scale)
            add_linear(residual, paged_attention(heads, layer_kv, batch, self._scale, layer.window), layer.out.weight)
            scale = rms_scale(residual, eps)
            add_linear(residual, silu_mul(layer.gate_up(residual), scale), layer.down.weight)
        return rms_norm(residual, self._norm, eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return linear(hidden, self._head)


def build(raw: Mapping[str, Any], info: ModelInfo, weights: Weights) -> DenseDecoder:
    """`pd.models.registry.Builder` for every architecture of `pd.models.dense`."""
    config = dense_config(info.path, raw)
    shapes = expected_tensors(config)

    def take(name: str) -> torch.Tensor:
        return weights.take(name, shapes[name])

    def fused(*names: str) -> Linear:
        parts = [f"{name}.weight" for name in names]
        weight = weights.stack(parts, [shapes[part] for part in parts])
        parts = [f"{name}.bias" for name in names]
        biased = parts[0] in shapes
        return Linear(weight, weights.stack(parts, [shapes[part] for part in parts]) if biased else None)

    def qk_norm(attention: str) -> QkNorm | None:
        if not config.qk_norm:
            return None
        return QkNorm(take(attention + "q_norm.weight"), take(attention + "k_norm.weight"), config.rms_eps)

    layers: list[DecoderLayer] = []
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        layer = DecoderLayer(
            attention_norm=take(prefix + "input_layernorm.weight"),
            qkv=fused(attention + "q_proj", attention + "k_proj", attention + "v_proj"),
            out=fused(attention + "o_proj"),
            mlp_norm=take(prefix + "post_attention_layernorm.weight"),
            gate_up=fused(mlp + "gate_proj", mlp + "up_proj"),
            down=fused(mlp + "down_proj"),
            qk_norm=qk_norm(attention),
            window=config.windows[index],
        )
        layers.append(layer.folded())
    embedding = take("model.embed_tokens.weight")
    head = embedding if config.tied else take("lm_head.weight")
    return DenseDecoder(config, embedding, layers, take("model.norm.weight"), head)
