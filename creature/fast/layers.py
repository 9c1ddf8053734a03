"""Attention and MLP of a decoder layer with the kernels of a GPU; `layers_creature` gives the same but for rounding."""

import torch

from creature.fast.kernels import TILE_ROWS, available, matmul_fits, relu2_mlp, rotary_norm
from layers_creature import CreatureAttention, CreatureMLP

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a build of torch without it
    varlen_attn = None


class FastAttention(CreatureAttention):
    """Norm and rotation in one kernel; attention within documents by their boundaries in place of a mask."""

    def queries_and_keys(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple:
        """[B, T, hidden_size] -> normalized and rotated queries [B, heads, T, head_dim] and keys [B, kv_heads, ...]"""
        if not available(hidden_states) or self.head_dim & (self.head_dim - 1):
            return super().queries_and_keys(hidden_states, cos, sin)
        half = self.head_dim // 2
        cos, sin = cos[..., :half], sin[..., half:]
        projected = self.q_proj(hidden_states), self.k_proj(hidden_states)
        query, key = [x.view(*x.shape[:-1], -1, self.head_dim) for x in projected]
        query = rotary_norm(query, cos, sin, self.eps).transpose(1, 2)
        key = rotary_norm(key, cos, sin, self.eps).transpose(1, 2)
        return query, key

    def attend(self, query, key, value, attention_mask, cu_seq_lens_q: torch.Tensor | None = None, **kwargs):
        """cu_seq_lens_q [N + 1] int32: see `varlen_attention`. The mask says the same, and is not read then."""
        dropout = self.attention_dropout if self.training else 0.0
        whole = query.shape[2] == key.shape[2]  # nothing of it comes from a cache
        if cu_seq_lens_q is not None and whole and not dropout and varlen_available(query):
            window = self.config.sliding_window
            return varlen_attention(query, key, value, cu_seq_lens_q, self.scaling, window), None
        return super().attend(query, key, value, attention_mask, cu_seq_lens_q=cu_seq_lens_q, **kwargs)


class FastMLP(CreatureMLP):
    """Squared ReLU computed inside the first matrix product, on a Hopper GPU; saves its output alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, hidden_size] -> the same shape."""
        fits = available(x) and x.numel() >= TILE_ROWS * x.shape[-1]  # the one row of a decoding step fills no tile
        if fits and matmul_fits(x.device, *self.up_proj.weight.t().shape):
            return relu2_mlp(x, self.up_proj.weight.to(x.dtype), self.down_proj.weight.to(x.dtype))
        return super().forward(x)


def varlen_available(x: torch.Tensor) -> bool:
    """Whether PyTorch's flash kernels for documents of varying length run: bf16 or fp16, on Ampere or newer."""
    return varlen_attn is not None and available(x) and torch.cuda.get_device_capability(x.device) >= (8, 0)


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    scaling: float,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """
    Causal attention within documents that follow one another, without a mask, by PyTorch's flash kernels.

    query [B, heads, T, head_dim], key, value [B, kv_heads, T, head_dim], boundaries [N + 1] int32: where in the B x T
    ticks documents begin, and where the last one ends (empty ones are allowed); sliding_window: how many ticks are
    seen, the present one among them -> [B, T, heads, head_dim].
    """
    batch, heads, ticks, head_dim = query.shape
    groups = heads // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    flat = [states.transpose(1, 2).reshape(batch * ticks, heads, head_dim) for states in (query, key, value)]
    before = -1 if sliding_window is None else sliding_window - 1  # ticks before the present one; -1: all
    output = varlen_attn(*flat, boundaries, boundaries, ticks, ticks, scale=scaling, window_size=(before, 0))
    return output.view(batch, ticks, heads, head_dim)
