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
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None

try:
    from .configuration_creature import CreatureConfig
    from .kernels_creature import kernels_available, matmul_fits, relu2_mlp, rotary_norm
except ImportError:
    from configuration_creature import CreatureConfig
    from kernels_creature import kernels_available, matmul_fits, relu2_mlp, rotary_norm

GATE_INPUTS = 32  # numbers of a tick's state from which the heads' gates are read


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
        """position_ids [1 or B, T] -> cos, sin [1 or B, T, head_dim / 2] in the dtype of x."""
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def apply_rotary_pos_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of x [B, heads, T, head_dim] against each other; cos, sin [1 or B, T, head_dim / 2]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def varlen_available(x: torch.Tensor) -> bool:
    """Whether `varlen_attention` takes such states: in half precision, on a GPU that PyTorch's flash kernels serve."""
    return varlen_attn is not None and kernels_available(x) and torch.cuda.get_device_capability(x.device) >= (8, 0)


def varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: torch.Tensor, scaling: float
) -> torch.Tensor:
    """
    Causal attention within documents that lie one behind the other, without a mask: PyTorch's flash kernels.

    query [B, heads, T, head_dim], key, value [B, kv_heads, T, head_dim], boundaries [N + 1] int32, where in the B x T
    ticks documents begin and the last one ends (empty ones are allowed) -> [B, T, heads, head_dim].
    """
    batch, heads, ticks, head_dim = query.shape
    groups = heads // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    flat = [states.transpose(1, 2).reshape(batch * ticks, heads, head_dim) for states in (query, key, value)]
    output = varlen_attn(*flat, boundaries, boundaries, ticks, ticks, scale=scaling, window_size=(-1, 0))
    return output.view(batch, ticks, heads, head_dim)


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
    """A matrix that begins at zero, as it makes what is added to something there already."""


class ValueTable(nn.Embedding):
    """A row of values for every token; a class of its own for its initial scale."""


class CreatureAttention(nn.Module):
    """
    Causal grouped-query attention with rotary positions and normalized queries and keys (Henry et al. 2020).

    The values of the first layer are added to those of all others, which then say only what the ticks around have
    added (Zhou et al. 2024, "Value Residual Learning"). In the last layer a table of values by token may join them,
    weighed head by head (Jordan et al. 2024, "modded-nanogpt"). Gains are in docs/log.md.
    """

    def __init__(self, config: CreatureConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        # Twice the usual: normalized queries and keys cannot grow to make attention as sharp as it wants to be.
        self.scaling = 2 * self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.eps = float(config.rms_norm_eps)
        self.is_causal = True
        self.adds_first_values = layer_idx > 0
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = (ZeroProjection if self.adds_first_values else nn.Linear)(config.hidden_size, keys, bias=False)
        self.o_proj = ResidualProjection(queries, config.hidden_size, bias=False)
        self.value_gate = None
        if config.use_value_embeddings and layer_idx == config.num_hidden_layers - 1:
            inputs = min(GATE_INPUTS, config.hidden_size)
            self.value_gate = ZeroProjection(inputs, config.num_key_value_heads, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        first_values: torch.Tensor | None = None,
        value_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        document_boundaries: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """
        hidden_states [B, T, hidden_size] -> the same shape, the weights where the implementation has them, and the
        values [B, T, num_key_value_heads * head_dim], to which `first_values`, the first layer's, and `value_embeds`,
        those of the tokens, have been added where the layer takes them. `document_boundaries`, in place of a mask: see
        `varlen_attention`.
        """
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self._normalize_and_rotate(self.q_proj(hidden_states).view(shape), position_embeddings)
        key = self._normalize_and_rotate(self.k_proj(hidden_states).view(shape), position_embeddings)
        values = self.v_proj(hidden_states)
        if self.adds_first_values:
            values = values + first_values
        if self.value_gate is not None and value_embeds is not None:
            gate = 2 * self.value_gate(hidden_states[..., : self.value_gate.in_features]).sigmoid()  # 1 at first
            values = values + (gate[..., None] * value_embeds.view(shape)).view(values.shape)
        value = values.view(shape).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        if document_boundaries is not None:
            output, weights = varlen_attention(query, key, value, document_boundaries, self.scaling), None
        else:
            attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            output, weights = attention_interface(
                self,
                query,
                key,
                value,
                attention_mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                **kwargs,
            )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights, values

    def _normalize_and_rotate(self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """[B, T, heads, head_dim] -> [B, heads, T, head_dim]"""
        if kernels_available(x) and self.head_dim & (self.head_dim - 1) == 0:
            return rotary_norm(x, *position_embeddings, self.eps).transpose(1, 2)
        x = F.rms_norm(x, (self.head_dim,), eps=self.eps).to(x.dtype)  # computed in float32 in any case
        return apply_rotary_pos_emb(x.transpose(1, 2), *position_embeddings)


class CreatureMLP(nn.Module):
    """
    Two matrices around an activation, whose first units the token itself may scale: what is looked up for a token costs
    no arithmetic (the per-layer embeddings of Gemma 3n; gain in docs/log.md).
    """

    def __init__(self, config: CreatureConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = ResidualProjection(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

        self.relu2 = config.hidden_act == "relu2"

    def forward(self, x: torch.Tensor, unit_scales: torch.Tensor | None = None) -> torch.Tensor:
        """x [B, T, hidden_size] -> the same shape; unit_scales [B, T, n] are factors of the first n units."""
        if self.relu2 and self._is_plain(x):
            return relu2_mlp(x, self.up_proj.weight.to(x.dtype), self.down_proj.weight.to(x.dtype), unit_scales)
        units = self.up_proj(x)
        count = 0 if unit_scales is None else unit_scales.shape[-1]
        if count and torch.is_grad_enabled():
            first, rest = units[..., :count], units[..., count:]
            return self.down_proj(torch.cat((self.act_fn(first) * unit_scales, self.act_fn(rest)), dim=-1))
        units = self.act_fn(units)
        if count:  # one kernel more, where a tick of generation is made of little else
            units[..., :count] *= unit_scales
        return self.down_proj(units)

    def _is_plain(self, x: torch.Tensor) -> bool:
        """Whether the fused kernel may stand for the modules: nobody has hooked, wrapped, quantized or split them."""
        plain = True
        for module in (self.up_proj, self.down_proj):
            plain = plain and type(module) in (nn.Linear, ResidualProjection) and not module._forward_hooks
            plain = plain and not module._forward_pre_hooks and type(module.weight) is nn.Parameter
        return plain and matmul_fits(x, self.up_proj.out_features)


class CreatureDecoderLayer(GradientCheckpointingLayer):
    """
    Attention and MLP, each on a normalized copy of the residual stream.

    Before them, the stream is scaled by a learned number, and behind the first layer the backbone's input is added to
    it, scaled by another: so the layers can still see the ticks as they arrived, and take from the stream what is no
    longer wanted of them (Jordan et al. 2024, "modded-nanogpt"; gain in docs/log.md).
    """

    def __init__(self, config: CreatureConfig, layer_idx: int):
        super().__init__()
        self.residual_scale = nn.Parameter(torch.ones(1))
        self.input_scale = nn.Parameter(torch.zeros(1)) if layer_idx else None
        self.input_layernorm = CreatureRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = CreatureAttention(config, layer_idx)
        self.post_attention_layernorm = CreatureRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = CreatureMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        first_states: torch.Tensor,
        first_values: torch.Tensor | None = None,
        value_embeds: torch.Tensor | None = None,
        unit_scales: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        hidden_states and the backbone's input, both [B, T, hidden_size], the values of the first layer's attention
        (None in that layer) and those of the tokens, and the factors of this layer's first units [B, T,
        per_layer_embedding_size] -> the next hidden states and the values of this layer's attention.
        """
        # [0]: a factor without dimensions leaves the stream's dtype alone.
        hidden_states = self.residual_scale[0] * hidden_states
        if self.input_scale is not None:
            hidden_states = hidden_states + self.input_scale[0] * first_states
        attended, _, values = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            first_values=first_values,
            value_embeds=value_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), unit_scales), values
