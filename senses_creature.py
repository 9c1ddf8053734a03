# Copyright 2026 The MultiModalCreature developers. Licensed under the Apache License, Version 2.0.
"""The senses: one encoder each, from what arrives at a tick to a vector of hidden_size.

The backbone's input at a tick is the sum of the vectors of the senses present at that tick, so a sense that is absent
adds exactly nothing and is not computed. Presence within a batch is a boolean per tick: an encoder runs on the present
ticks only. Every last projection starts at zero and has no bias: connecting a sense changes no logit until it is
trained. The internal voice is the token table itself and lives in the backbone.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTConfig, ViTModel

try:
    from .configuration_creature import CreatureConfig
    from .streams_creature import quaternion_to_6d, unpack_animation
except ImportError:
    from configuration_creature import CreatureConfig
    from streams_creature import quaternion_to_6d, unpack_animation


class SenseProjection(nn.Linear):
    """The last layer of a sense: no bias, and zero before training (`_init_weights` of the model sees to it)."""

    def __init__(self, in_features: int, config: CreatureConfig):
        super().__init__(in_features, config.hidden_size, bias=False)


def encode_present(encode, mask: torch.Tensor | None, *inputs: torch.Tensor) -> torch.Tensor:
    """
    Run `encode` on the rows of `inputs` where `mask` is true and return its vectors, exactly zero elsewhere.

    mask [...] bool, inputs [..., features] each, or None for "all present" -> [..., size]. What stands at absent places
    is never read, NaN included.
    """
    if mask is None:
        return encode(*inputs)
    if torch.compiler.is_compiling():
        # A count that depends on the data would break the graph: encode every place, on zeros where nothing is.
        def fill(value):
            return value.masked_fill(~mask.view(*mask.shape, *[1] * (value.dim() - mask.dim())), 0)

        return encode(*map(fill, inputs)).masked_fill(~mask[..., None], 0)
    vectors = encode(*(value[mask] for value in inputs))  # [N, size]
    return scatter_present(mask, vectors)


def scatter_present(mask: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """mask [...] with N trues, vectors [N, size] in the mask's order -> [..., size], zero where the mask is false."""
    empty = vectors.new_zeros(*mask.shape, vectors.shape[-1])
    return empty.masked_scatter(mask[..., None], vectors)


class TextSense(nn.Module):
    """Text that is heard, read, or was said aloud: the token table through a matrix of its own."""

    def __init__(self, config: CreatureConfig):
        super().__init__()
        self.proj = SenseProjection(config.hidden_size, config)

    def forward(self, ids: torch.Tensor, token_table: nn.Embedding) -> torch.Tensor:
        """ids [B, T]; a negative id is an absent tick, NULL a silent one -> [B, T, hidden_size]."""
        return encode_present(lambda present: self.proj(token_table(present)), ids >= 0, ids)


class AudioSense(nn.Module):
    """The ears: the log-mel frames of one tick."""

    def __init__(self, config: CreatureConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.audio_feature_size, config.sense_hidden_size)
        self.act = nn.GELU()
        self.proj = SenseProjection(config.sense_hidden_size, config)

    def _encode(self, features: torch.Tensor) -> torch.Tensor:
        return self.proj(self.act(self.up_proj(features)))

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """features [B, T, frames * bands] log-mel, mask [B, T] bool -> [B, T, hidden_size]."""
        return encode_present(self._encode, mask, features.to(self.up_proj.weight.dtype))


class VisionSense(nn.Module):
    """
    Two eyes: a small ViT (Dosovitskiy et al. 2021) that sees both at once, as the six channels of one image, so that
    every patch can compare left and right.
    """

    def __init__(self, config: CreatureConfig):
        super().__init__()
        vit = ViTConfig(
            hidden_size=config.vision_hidden_size,
            num_hidden_layers=config.vision_num_layers,
            num_attention_heads=config.vision_num_heads,
            intermediate_size=4 * config.vision_hidden_size,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            image_size=config.vision_image_size,
            patch_size=config.vision_patch_size,
            num_channels=2 * 3,
            # An image needs no causal mask, so of the kernels only "eager" (attention maps) is worth passing on.
            attn_implementation="eager" if config._attn_implementation == "eager" else "sdpa",
        )
        self.vit = ViTModel(vit, add_pooling_layer=False)
        for module in self.vit.modules():
            # Servers look for this flag: with one module that is not causal, vLLM takes the whole model for an encoder.
            if hasattr(module, "is_causal"):
                del module.is_causal
        self.proj = SenseProjection(config.vision_hidden_size, config)

    def forward(self, pixel_values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """pixel_values [N, 2, 3, H, W] of the N present ticks, mask [B, T] bool with N trues -> [B, T, hidden_size]."""
        if mask is None:
            raise ValueError("pixel_values [N, 2, 3, H, W] needs pixel_mask [B, T]: the N ticks they belong to.")
        # Too many pictures would be scattered to the wrong ticks in silence.
        if not torch.compiler.is_compiling() and pixel_values.shape[0] != (ticks := int(mask.sum())):
            raise ValueError(f"pixel_values holds {pixel_values.shape[0]} ticks, but pixel_mask is true at {ticks}.")
        pixels = pixel_values.flatten(1, 2).to(self.proj.weight.dtype)
        if pixels.shape[0] == 0:
            vectors = self.proj.weight.new_zeros(0, self.proj.out_features)
        else:
            vectors = self.proj(self.vit(pixels, is_causal=False).last_hidden_state[:, 0])
        return scatter_present(mask, vectors)


class ProprioceptionSense(nn.Module):
    """The body: where every joint is, in the frame of the pelvis, and how it is turned."""

    def __init__(self, config: CreatureConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.subframes_per_tick * config.num_joints * (3 + 6), config.sense_hidden_size)
        self.act = nn.GELU()
        self.proj = SenseProjection(config.sense_hidden_size, config)

    def _encode(self, positions: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
        pose = torch.cat((positions.float(), quaternion_to_6d(rotations.float())), dim=-1).flatten(-3)
        return self.proj(self.act(self.up_proj(pose.to(self.up_proj.weight.dtype))))

    def forward(self, positions: torch.Tensor, rotations: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """positions [B, T, sub-frames, joints, 3] m, rotations [..., 4] quaternions (w, x, y, z), mask [B, T] bool."""
        return encode_present(self._encode, mask, positions, rotations)


class TouchSense(nn.Module):
    """The skin: a sum over whatever touches it at this tick, so that no contact is exactly zero."""

    def __init__(self, config: CreatureConfig):
        super().__init__()
        size = config.touch_embedding_size
        self.point_embedding = nn.Embedding(config.num_touch_points, size)
        self.surface_embedding = nn.Embedding(config.num_touch_surfaces, size)
        self.value_proj = nn.Linear(5, size)
        self.up_proj = nn.Linear(size, config.sense_hidden_size)
        self.act = nn.GELU()
        self.proj = SenseProjection(config.sense_hidden_size, config)

    def _encode(self, points: torch.Tensor, surfaces: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        force, place, temperature = values.float().split((1, 3, 1), dim=-1)
        # Forces span decades; skin temperature (about 33 degrees Celsius) is the zero of warmth, 10 degrees its unit.
        scaled = torch.cat((force.clamp(min=0).log1p(), place, (temperature - 33.0) / 10.0), dim=-1)
        contact = self.point_embedding(points) + self.surface_embedding(surfaces)
        contact = contact + self.value_proj(scaled.to(contact.dtype))
        return self.act(self.up_proj(contact))

    def forward(
        self, points: torch.Tensor, surfaces: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """
        points, surfaces [B, T, contacts] ids, values [B, T, contacts, 5] (force N, place x, y, z m, temperature C),
        mask [B, T, contacts] bool, false for an empty slot -> [B, T, hidden_size].
        """
        return self.proj(encode_present(self._encode, mask, points, surfaces, values).sum(dim=2))


class VoiceCopy(nn.Module):
    """The creature's own voice, as it was commanded: the codec codes of the last tick."""

    def __init__(self, config: CreatureConfig):
        super().__init__()
        # Factorized tables, one a codebook, tied to the audio stream's depth decoder: it reads and predicts with them.
        self.code_table = nn.Parameter(
            torch.empty(config.num_audio_codebooks, config.audio_codebook_size, config.audio_code_size)
        )
        self.proj = SenseProjection(config.audio_code_size, config)

    def _encode(self, codes: torch.Tensor) -> torch.Tensor:
        books = torch.arange(codes.shape[-1], device=codes.device)
        return self.proj(self.code_table[books, codes].sum(dim=-2))

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """codes [B, T, codebooks]; a tick with a negative code is absent -> [B, T, hidden_size]."""
        return encode_present(self._encode, (codes >= 0).all(dim=-1), codes)


class CommandCopy(nn.Module):
    """The creature's own last motor command."""

    def __init__(self, config: CreatureConfig):
        super().__init__()
        self.config = config
        size = config.animation_size + 2 * config.subframes_per_tick * config.num_joints  # 6 numbers a joint, not 4
        self.up_proj = nn.Linear(size, config.sense_hidden_size)
        self.act = nn.GELU()
        self.proj = SenseProjection(config.sense_hidden_size, config)

    def _encode(self, animation: torch.Tensor) -> torch.Tensor:
        rotations, shapes, eyes = unpack_animation(self.config, animation.float())
        command = torch.cat((quaternion_to_6d(rotations).flatten(-3), shapes, eyes.flatten(-2)), dim=-1)
        return self.proj(self.act(self.up_proj(command.to(self.up_proj.weight.dtype))))

    def forward(self, animation: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """animation [B, T, animation_size] as `streams_creature.pack_animation` makes it, mask [B, T] bool."""
        return encode_present(self._encode, mask, animation)


# Senses that arrive in several tensors: the first is of no use without the others.
_TOGETHER = {
    "joint_positions": ("joint_rotations",),
    "touch_points": ("touch_surfaces", "touch_values"),
}


class CreatureSenses(nn.Module):
    """All senses beside the internal voice, and the efference copies of what the creature itself emitted."""

    def __init__(self, config: CreatureConfig):
        super().__init__()
        self.config = config
        self.external_voice = TextSense(config)
        self.audio = AudioSense(config)
        self.vision = VisionSense(config)
        self.proprioception = ProprioceptionSense(config)
        self.touch = TouchSense(config)
        self.own_text = TextSense(config)
        self.own_voice = VoiceCopy(config)
        self.own_command = CommandCopy(config)

    def forward(self, inputs: dict, token_table: nn.Embedding) -> list[torch.Tensor]:
        """
        The vectors [B, T, hidden_size] of the senses that are there.

        Args:
            inputs: the sense arguments of `MultiModalCreature.forward`, None or missing where a sense is absent.
            token_table: the backbone's embedding, shared by every use of text.
        """
        get = inputs.get
        for first, others in _TOGETHER.items():
            missing = [name for name in others if get(name) is None]
            if get(first) is not None and missing:
                raise ValueError(f"`{first}` is one part of a sense: give {' and '.join(missing)} with it.")
        vectors = []
        if get("external_voice_ids") is not None:
            vectors.append(self.external_voice(get("external_voice_ids"), token_table))
        if get("input_features") is not None:
            vectors.append(self.audio(get("input_features"), get("input_features_mask")))
        if get("pixel_values") is not None:
            vectors.append(self.vision(get("pixel_values"), get("pixel_mask")))
        if get("joint_positions") is not None:
            vectors.append(self.proprioception(get("joint_positions"), get("joint_rotations"), get("body_mask")))
        if get("touch_points") is not None:
            vectors.append(
                self.touch(get("touch_points"), get("touch_surfaces"), get("touch_values"), get("touch_mask"))
            )
        if get("external_text_ids") is not None:
            vectors.append(self.own_text(get("external_text_ids"), token_table))
        if get("audio_codes") is not None:
            vectors.append(self.own_voice(get("audio_codes")))
        if get("animation") is not None:
            vectors.append(self.own_command(get("animation"), get("animation_mask")))
        return vectors

    def pose(self, inputs: dict) -> torch.Tensor | None:
        """
        The pose that the next motor command starts from, [B, T, joints, 4]: the body as it is felt, else as it was last
        commanded, else (None, or at ticks that have neither) the pose in which no joint is turned.
        """
        felt, commanded = inputs.get("joint_rotations"), inputs.get("animation")
        pose = None
        if commanded is not None:
            pose = self._fill(None, unpack_animation(self.config, commanded)[0][:, :, -1], inputs.get("animation_mask"))
        if felt is not None:
            pose = self._fill(pose, felt[:, :, -1], inputs.get("body_mask"))
        return pose

    @staticmethod
    def _fill(below: torch.Tensor | None, pose: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if mask is None:
            return pose
        if below is None:
            below = rest_pose(pose)
        return torch.where(mask[..., None, None], pose, below.to(pose.dtype))


def rest_pose(like: torch.Tensor) -> torch.Tensor:
    """Identity quaternions in the shape [..., 4], dtype and device of `like`."""
    return F.pad(torch.ones_like(like[..., :1]), (0, 3)).expand_as(like)


__all__ = ["CreatureSenses"]
