# Copyright 2026 The MultiModalCreature developers. Licensed under the Apache License, Version 2.0.
"""The output streams: one head each, from the backbone's hidden state to what the creature emits, and its loss.

One convention holds for all streams: the target at tick t is what arrives (or is emitted) at tick t, and it is
predicted from the hidden state of tick t - 1. Losses are sums over the targets; the caller divides them by the count of
the whole accumulated batch, so that micro-batches simply add up.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

try:
    from .configuration_creature import STREAMS, CreatureConfig
    from .losses_creature import IGNORE_INDEX, linear_cross_entropy
except ImportError:
    from configuration_creature import STREAMS, CreatureConfig
    from losses_creature import IGNORE_INDEX, linear_cross_entropy


def text_target_weights(config: CreatureConfig, labels: torch.Tensor) -> torch.Tensor:
    """
    How much each label counts: 0 for -100, `null_loss_weight` for NULL (a known silence), 1 for a token.

    labels: any shape, ids -> float32 of the same shape.
    """
    weights = (labels != IGNORE_INDEX).float()
    if config.null_token_id is not None and config.null_loss_weight != 1.0:
        weights = weights * torch.where(labels == config.null_token_id, float(config.null_loss_weight), 1.0)
    return weights


def text_loss(
    config: CreatureConfig,
    hidden: torch.Tensor,
    head: torch.Tensor | nn.Module,
    labels: torch.Tensor,
    cross_entropy: Callable = linear_cross_entropy,
) -> torch.Tensor:
    """
    Sum of the next-token losses of a text stream.

    hidden: [B, T, hidden_size] of ticks 0..T-1. head: its weight [vocab_size, hidden_size], or a module that returns
    the logits, all of them at once. labels: [B, T], unshifted, or [B, T + 1] where the tick after the last is known.
    cross_entropy: `losses_creature.linear_cross_entropy`, or another function of the same signature.
    """
    # A last tick without a target gets one of weight 0, so that `hidden` need not be cut, which would copy it.
    targets = F.pad(labels[:, 1:], (0, hidden.shape[1] + 1 - labels.shape[1]), value=IGNORE_INDEX).reshape(-1)
    weights = text_target_weights(config, targets)
    if isinstance(head, nn.Module):
        logits = head(hidden).flatten(0, 1).float()
        return (F.cross_entropy(logits, targets.clamp(min=0), reduction="none") * weights).sum()
    return cross_entropy(hidden.reshape(-1, hidden.shape[-1]), head, targets.clamp(min=0), weights)


def count_targets(config: CreatureConfig, batch: dict) -> torch.Tensor:
    """
    What each stream's loss of this batch is divided by: its summed target weights, shifted targets only.

    Args:
        batch: the arguments of `MultiModalCreature.forward`; missing labels count 0.

    Returns:
        float32 [4] in the order of `STREAMS`, on the device of the labels. Add the counts of all micro-batches and
        ranks of a step and pass the sum as `num_items_in_batch`.
    """
    labels = batch.get("labels")
    spoken = batch.get("external_text_targets")
    codes = batch.get("audio_targets")
    moves = animation_targets_present(batch)
    counts = [
        None if labels is None else text_target_weights(config, labels[:, 1:]).sum(),
        None if spoken is None else text_target_weights(config, spoken[:, 1:]).sum(),
        None if codes is None else (codes[:, 1:] != IGNORE_INDEX).sum().float(),
        None if moves is None else moves[:, 1:].sum().float(),
    ]
    device = next((count.device for count in counts if count is not None), torch.device("cpu"))
    return torch.stack([torch.zeros((), device=device) if count is None else count for count in counts])


def animation_targets_present(batch: dict) -> torch.Tensor | None:
    """[B, T] bool: the ticks of a batch that have an animation target, or None without any."""
    for name in ("rotation_targets", "blend_shape_targets", "eye_targets"):
        if batch.get(name) is not None:
            mask = batch.get("animation_target_mask")
            everywhere = torch.ones(batch[name].shape[:2], dtype=torch.bool, device=batch[name].device)
            return everywhere if mask is None else mask.bool()
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Rotations
# ---------------------------------------------------------------------------------------------------------------------


def quaternion_to_6d(quaternion: torch.Tensor) -> torch.Tensor:
    """
    Unit quaternions (w, x, y, z) [..., 4] -> the first two columns of the rotation matrix [..., 6].

    q and -q give the same six numbers, and the map back is continuous (Zhou et al. 2019, "On the Continuity of Rotation
    Representations in Neural Networks").
    """
    w, x, y, z = F.normalize(quaternion, dim=-1).unbind(-1)
    first = (1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y))
    second = (2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x))
    return torch.stack(first + second, dim=-1)


def matrix_from_6d(six: torch.Tensor) -> torch.Tensor:
    """[..., 6] -> rotation matrices [..., 3, 3] by Gram-Schmidt; any input is finite."""
    first = F.normalize(six[..., :3], dim=-1, eps=1e-6)
    second = six[..., 3:] - (first * six[..., 3:]).sum(-1, keepdim=True) * first
    second = F.normalize(second, dim=-1, eps=1e-6)
    return torch.stack((first, second, torch.linalg.cross(first, second, dim=-1)), dim=-1)


def matrix_to_quaternion(matrix: torch.Tensor) -> torch.Tensor:
    """
    Rotation matrices [..., 3, 3] -> unit quaternions (w, x, y, z) [..., 4] with w >= 0.

    Of the four ways to divide, the one with the largest divisor is taken (Shepperd 1978): no pose is ill-conditioned.
    """
    m00, m11, m22 = matrix[..., 0, 0], matrix[..., 1, 1], matrix[..., 2, 2]
    a, b, c = matrix[..., 2, 1], matrix[..., 0, 2], matrix[..., 1, 0]
    d, e, f = matrix[..., 1, 2], matrix[..., 2, 0], matrix[..., 0, 1]
    # Row i is the quaternion times 4 times its own i-th component.
    rows = torch.stack(
        (
            torch.stack((1 + m00 + m11 + m22, a - d, b - e, c - f), dim=-1),
            torch.stack((a - d, 1 + m00 - m11 - m22, c + f, b + e), dim=-1),
            torch.stack((b - e, c + f, 1 - m00 + m11 - m22, a + d), dim=-1),
            torch.stack((c - f, b + e, a + d, 1 - m00 - m11 + m22), dim=-1),
        ),
        dim=-2,
    )  # [..., 4, 4]
    best = rows.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)
    index = best[..., None, None].expand(*best.shape, 1, 4)
    quaternion = F.normalize(rows.gather(-2, index).squeeze(-2), dim=-1)
    return torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)


def pack_animation(rotations: torch.Tensor, blend_shapes: torch.Tensor, eyes: torch.Tensor) -> torch.Tensor:
    """
    One tick of animation as one row of numbers: the format of the `animation` output and efference copy.

    rotations [..., sub-frames, joints, 4] unit quaternions, blend_shapes [..., 51] in [0, 1], eyes [..., 2, 4] (gaze
    direction x, y, z of length 1, openness in [0, 1]) -> [..., animation_size].
    """
    return torch.cat((rotations.flatten(-3), blend_shapes, eyes.flatten(-2)), dim=-1)


def unpack_animation(config: CreatureConfig, animation: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The inverse of `pack_animation`: [..., animation_size] -> rotations, blend_shapes, eyes."""
    joints = (config.subframes_per_tick, config.num_joints, 4)
    rotations, blend_shapes, eyes = animation.split((joints[0] * joints[1] * 4, config.num_blend_shapes, 8), dim=-1)
    return rotations.unflatten(-1, joints), blend_shapes, eyes.unflatten(-1, (2, 4))


# ---------------------------------------------------------------------------------------------------------------------
# The heads
# ---------------------------------------------------------------------------------------------------------------------


def target_shapes(config: CreatureConfig) -> dict[str, tuple[int | str, ...]]:
    """The shape of each target of the streams: B rows, T ticks, or a number."""
    return {
        "labels": ("B", "T"),
        "external_text_targets": ("B", "T"),
        "audio_targets": ("B", "T", config.num_audio_codebooks),
        "rotation_targets": ("B", "T", config.subframes_per_tick, config.num_joints, 4),
        "blend_shape_targets": ("B", "T", config.num_blend_shapes),
        "eye_targets": ("B", "T", 2, 4),
        "animation_target_mask": ("B", "T"),
    }


class ExternalTextStream(nn.Module):
    """What the creature says aloud, as text: the token table read through a matrix of its own."""

    def __init__(self, config: CreatureConfig):
        super().__init__()
        self.config = config
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor, token_table: torch.Tensor) -> torch.Tensor:
        """hidden [B, T, hidden_size], token_table [vocab_size, hidden_size] -> logits [B, T, vocab_size]."""
        return F.linear(self.proj(hidden), token_table)

    def loss(
        self,
        hidden: torch.Tensor,
        token_table: torch.Tensor,
        targets: torch.Tensor,
        cross_entropy: Callable = linear_cross_entropy,
    ) -> torch.Tensor:
        """Sum of next-token losses; targets [B, T] ids, -100 where unknown, NULL where silent."""
        return text_loss(self.config, self.proj(hidden), token_table, targets, cross_entropy)


class DepthLayer(nn.Module):
    """One pre-norm causal transformer layer over the codes of a single tick."""

    def __init__(self, config: CreatureConfig):
        super().__init__()
        size = config.depth_hidden_size
        self.num_heads = config.depth_num_heads
        self.input_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.qkv_proj = nn.Linear(size, 3 * size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)
        self.mlp_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.up_proj = nn.Linear(size, 4 * size, bias=False)
        self.down_proj = nn.Linear(4 * size, size, bias=False)

    def forward(self, x: torch.Tensor, cache: list[torch.Tensor] | None = None) -> torch.Tensor:
        """
        x: [N, codes, depth_hidden_size] -> the same shape.

        cache: the keys and values of the codes before x, a list that the layer extends by those of x, a single code;
            empty before the first one.
        """
        qkv = self.qkv_proj(self.input_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        query, *both = (part.transpose(1, 2) for part in qkv.unbind(2))  # [N, heads, codes, head_dim]
        if cache is not None:
            both = [torch.cat(parts, dim=2) for parts in zip(cache, both, strict=True)] if cache else both
            cache[:] = both
        attended = F.scaled_dot_product_attention(query, *both, is_causal=cache is None)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(2))
        return x + self.down_proj(F.relu(self.up_proj(self.mlp_norm(x))).square())


class AudioStream(nn.Module):
    """
    The creature's voice: the codec codes of one tick, drawn one after another by a small depth decoder.

    All codes of a tick belong to that tick (Yang et al. 2023, "UniAudio"; Défossez et al. 2024, "Moshi"): delaying code
    k by k ticks, as single-transformer codec models do, would cost seven ticks of 80 ms.
    """

    def __init__(self, config: CreatureConfig):
        super().__init__()
        self.num_codes = config.num_audio_codebooks
        size = config.depth_hidden_size
        self.context_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.code_proj = nn.Linear(config.audio_code_size, size, bias=False)
        self.position = nn.Embedding(config.num_audio_codebooks, size)
        self.layers = nn.ModuleList(DepthLayer(config) for _ in range(config.depth_num_layers))
        self.norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.out_proj = nn.Linear(size, config.audio_code_size, bias=False)

    def forward(self, hidden: torch.Tensor, codes: torch.Tensor, code_table: torch.Tensor) -> torch.Tensor:
        """
        Logits of every code of N ticks, each given the codes before it.

        hidden [N, hidden_size], codes [N, K <= num_audio_codebooks - 1 or more] (ids; the last is never looked at),
        code_table [num_audio_codebooks, audio_codebook_size, audio_code_size] -> [N, min(K + 1, codebooks), codebook].
        """
        codes = codes[:, : self.num_codes - 1]
        books = torch.arange(codes.shape[1], device=codes.device)
        before = self.code_proj(code_table[books, codes.clamp(min=0)])  # [N, K, depth_hidden_size]
        x = F.pad(before, (0, 0, 1, 0)) + self.context_proj(hidden)[:, None]
        x = x + self.position.weight[: x.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self._logits(x, code_table[: x.shape[1]])

    def _logits(self, x: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
        """x [N, K, depth_hidden_size] and the tables [K, codebook, audio_code_size] of its codes -> logits."""
        x = self.out_proj(self.norm(x))
        # The product runs in the table's autocast dtype, one codebook per position.
        return torch.einsum("nkc,kvc->nkv", x, tables.to(x.dtype))

    def loss(self, hidden: torch.Tensor, code_table: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum of the code losses; hidden [B, T, hidden_size], targets [B, T, codebooks], -100 where unknown."""
        hidden, targets = hidden[:, :-1].flatten(0, 1), targets[:, 1:].flatten(0, 1)
        logits = self(hidden, targets, code_table).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")

    @torch.no_grad()
    def emit(
        self, hidden: torch.Tensor, code_table: torch.Tensor, temperature: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Draw the codes of N ticks: greedily, or sampled at a temperature.

        hidden [N, hidden_size] -> codes [N, codebooks] int64 and their logits [N, codebooks, codebook].
        """
        context = self.context_proj(hidden)[:, None] + self.position.weight[:, None, None]  # [codes, N, 1, size]
        caches = [[] for _ in self.layers]
        codes, logits = [], []
        for book, table in enumerate(code_table):
            x = context[book] if book == 0 else context[book] + self.code_proj(code_table[book - 1, codes[-1]])[:, None]
            for layer, cache in zip(self.layers, caches, strict=True):
                x = layer(x, cache)
            logits.append(self._logits(x, table[None]))
            codes.append(sample_token(logits[-1][:, 0], temperature))
        return torch.stack(codes, dim=1), torch.cat(logits, dim=1)


class AnimationStream(nn.Module):
    """The next tick's motor command: joint rotations as a residual to the present pose, face shapes and eyes."""

    def __init__(self, config: CreatureConfig):
        super().__init__()
        self.config = config
        self.joint_shape = (config.subframes_per_tick, config.num_joints, 6)
        sizes = (config.subframes_per_tick * config.num_joints * 6, config.num_blend_shapes, 8)
        self.sizes = sizes
        self.up_proj = nn.Linear(config.hidden_size, config.sense_hidden_size)
        self.act = nn.GELU()
        # Drawn small, like every matrix: the first commands stay close to the present pose.
        self.out_proj = nn.Linear(config.sense_hidden_size, sum(sizes))

    def _decode(self, hidden: torch.Tensor, pose: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden [..., hidden_size], pose [..., joints, 4] -> matrices [..., sub-frames, joints, 3, 3], shapes, eyes"""
        out = self.out_proj(self.act(self.up_proj(hidden))).float()  # geometry in float32, whatever autocast says
        residual, shapes, eyes = out.split(self.sizes, dim=-1)
        six = quaternion_to_6d(pose.float())[..., None, :, :] + residual.unflatten(-1, self.joint_shape)
        eyes = eyes.unflatten(-1, (2, 4))
        gaze = F.normalize(eyes[..., :3], dim=-1, eps=1e-6)
        return matrix_from_6d(six), shapes.sigmoid(), torch.cat((gaze, eyes[..., 3:].sigmoid()), dim=-1)

    def forward(self, hidden: torch.Tensor, pose: torch.Tensor) -> torch.Tensor:
        """hidden [..., hidden_size], pose [..., joints, 4] unit quaternions -> [..., animation_size], float32."""
        matrices, shapes, eyes = self._decode(hidden, pose)
        return pack_animation(matrix_to_quaternion(matrices), shapes, eyes)

    def loss(self, hidden: torch.Tensor, pose: torch.Tensor, targets: dict) -> torch.Tensor:
        """
        Sum over the target ticks of: the mean squared chordal distance of the joints (Frobenius norm of the difference
        of the rotation matrices), the mean squared error of the shapes, and of the eyes 1 - cosine of the gaze plus the
        squared error of the openness.

        hidden [B, T, hidden_size], pose [B, T, joints, 4]; targets: the animation targets of the forward pass.
        """
        matrices, shapes, eyes = self._decode(hidden[:, :-1], pose[:, :-1])
        loss = torch.zeros(shapes.shape[:2], device=hidden.device)
        mask = animation_targets_present(targets)[:, 1:]

        def target(name):
            # Filled, not multiplied: the values at ticks without a target may be anything, NaN included.
            values = targets[name][:, 1:].float()
            return values.masked_fill(~mask.view(*mask.shape, *[1] * (values.dim() - 2)), 0.0)

        if targets.get("rotation_targets") is not None:
            error = matrices - matrix_from_6d(quaternion_to_6d(target("rotation_targets")))
            loss = loss + error.square().sum((-2, -1)).mean((-2, -1))
        if targets.get("blend_shape_targets") is not None:
            loss = loss + (shapes - target("blend_shape_targets")).square().mean(-1)
        if targets.get("eye_targets") is not None:
            true_eyes = target("eye_targets")
            cosine = F.cosine_similarity(eyes[..., :3], true_eyes[..., :3], dim=-1)
            loss = loss + (1 - cosine + (eyes[..., 3] - true_eyes[..., 3]).square()).mean(-1)
        return (loss * mask).sum()


def sample_token(logits: torch.Tensor, temperature: float | None = None) -> torch.Tensor:
    """One id per row of [..., vocabulary]: the likeliest, or drawn at a temperature."""
    if not temperature:
        return logits.argmax(dim=-1)
    probabilities = (logits.float() / temperature).softmax(dim=-1)
    return torch.multinomial(probabilities.flatten(0, -2), 1).view(logits.shape[:-1])


class CreatureStreams(nn.Module):
    """The heads beside `lm_head`, one per stream that is not the internal text."""

    def __init__(self, config: CreatureConfig):
        super().__init__()
        self.shapes = target_shapes(config)
        self.external_text = ExternalTextStream(config)
        self.audio = AudioStream(config)
        self.animation = AnimationStream(config)


__all__ = ["STREAMS", "CreatureStreams", "count_targets"]
