# Copyright 2026 The MultiModalCreature developers. Licensed under the Apache License, Version 2.0.
"""The decoder layer: norm, rotary positions, attention with its values, and the MLP."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

try:
    from .configuration_creature import CreatureConfig
except ImportError:
    from configuration_creature import CreatureConfig


class CreatureRMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019), computed in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = float(eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == self.weight.dtype:  # one kernel in place of four; it computes in float32 by itself
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps).to(x.dtype)
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class CreatureRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary positions (Su et al. 2021), with the scaling types of transformers."""

    def __init__(self, config: CreatureConfig):
        super().__init__()
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        frequencies = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = frequencies(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: CreatureConfig, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies [head_dim / 2] and the scaling of attention, which is 1 here."""
        steps = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=device) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -steps, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids [1 or B, T] -> cos, sin [1 or B, T, head_dim] in the dtype of x, for `apply_rotary_pos_emb`."""
        inv_freq = self.inv_freq.to(device=x.device, dtype=torch.float)
        # cos(-a) = cos(a) and sin(-a) = -sin(a): the minus sign of the first half comes with its angles.
        angles = position_ids[..., None].float() * torch.cat((-inv_freq, inv_freq))
        cos, sin = angles.cos(), angles.sin()
        if self.attention_scaling != 1.0:
            cos, sin = cos * self.attention_scaling, sin * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def apply_rotary_pos_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of x [B, heads, T, head_dim] against each other; cos, sin [1 or B, T, head_dim]."""
    # `sin` has the minus sign of its first half already, so that swapping the halves takes one kernel.
    return torch.addcmul(x * cos[:, None], x.roll(x.shape[-1] // 2, dims=-1), sin[:, None])


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: the reference for the fused kernels, and the one that returns its weights."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling  # [B, heads, T, past + T]
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class ResidualProjection(nn.Linear):
    """The matrix with which a block writes into the residual stream; a class of its own for its initial scale."""


class ZeroProjection(nn.Linear):
    """A matrix that starts at zero, because its output is added to something that is already there."""


class CreatureAttention(nn.Module):
    """
    Causal grouped-query attention with rotary positions and normalized queries and keys (Henry et al. 2020).

    The values of the first layer are added to those of every later layer, which then learns only the difference (Zhou
    et al. 2024, "Value Residual Learning"): 0.022 nats on 73.7 M tokens (docs/experiments.md).
    """

    def __init__(self, config: CreatureConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        # Twice the usual scale: normalized queries and keys cannot grow to make attention sharper.
        self.scaling = 2 * self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.eps = float(config.rms_norm_eps)
        self.is_causal = True
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = (ZeroProjection if layer_idx else nn.Linear)(config.hidden_size, keys, bias=False)
        self.o_proj = ResidualProjection(queries, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        first_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """
        hidden_states [B, T, hidden_size], first_values [B, T, num_key_value_heads * head_dim] (None in the first layer)
        -> the output in the shape of hidden_states, the attention weights where the implementation returns them, and
        this layer's values in the shape of first_values.
        """
        query, key = self.queries_and_keys(hidden_states, *position_embeddings)
        values = self.v_proj(hidden_states)
        if first_values is not None:
            values = values + first_values
        value = values.view(*values.shape[:-1], -1, self.head_dim).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = self.attend(query, key, value, attention_mask, **kwargs)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights, values

    def queries_and_keys(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple:
        """[B, T, hidden_size] -> normalized and rotated queries [B, heads, T, head_dim] and keys [B, kv_heads, ...]"""
        projected = self.q_proj(hidden_states), self.k_proj(hidden_states)
        query, key = (x.view(*x.shape[:-1], -1, self.head_dim) for x in projected)
        both = torch.cat((query, key), dim=2)  # one norm and one rotation for both: a generated tick is all launches
        both = F.rms_norm(both, (self.head_dim,), eps=self.eps).to(both.dtype)  # torch computes it in float32
        both = apply_rotary_pos_emb(both.transpose(1, 2), cos, sin)
        return both.split((query.shape[2], key.shape[2]), dim=1)

    def attend(self, query, key, value, attention_mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """query [B, heads, T, head_dim], key, value [B, kv_heads, past + T, head_dim] -> [B, T, heads, head_dim]"""
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        return attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.config.sliding_window,  # for flash kernels; elsewhere the mask says it
            **kwargs,
        )


class CreatureMLP(nn.Module):
    """Two matrices around an activation, squared ReLU by default."""

    def __init__(self, config: CreatureConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = ResidualProjection(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, hidden_size] -> the same shape."""
        return self.down_proj(self.act_fn(self.up_proj(x)))


class CreatureDecoderLayer(GradientCheckpointingLayer):
    """
    Attention and MLP, each on a normalized copy of the residual stream.

    A learned number scales the stream at the start of each layer, so that a layer can forget what earlier ones wrote
    (Jordan et al. 2024, "modded-nanogpt"): 0.011 nats on 73.7 M tokens (docs/experiments.md).
    """

    def __init__(self, config: CreatureConfig, layer_idx: int):
        super().__init__()
        self.residual_scale = nn.Parameter(torch.ones(1))
        self.input_layernorm = CreatureRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = CreatureAttention(config, layer_idx)
        self.post_attention_layernorm = CreatureRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = CreatureMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        first_values: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        hidden_states [B, T, hidden_size] and the values of the first layer's attention (None in that layer) -> the next
        hidden states and the values of this layer's attention; the other arguments go to the attention.
        """
        x = self.residual_scale[0] * hidden_states  # [0]: a number without dimensions does not change the dtype
        attended, _, values = self.self_attn(self.input_layernorm(x), first_values=first_values, **kwargs)
        x = x + attended
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x, values
