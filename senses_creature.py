# Copyright 2026 The MultiModalCreature developers. Licensed under the Apache License, Version 2.0.
"""The senses: one encoder each, from what arrives at a tick to a vector of hidden_size.

The backbone's input at a tick is the sum of the vectors of the senses present at that tick, so a sense that is absent
adds exactly nothing and is not computed. Presence within a batch is a boolean per tick: an encoder runs on the present
ticks only. Every last projection starts at zero and has no bias: connecting a sense changes no logit until it is
trained. The internal voice is the token table itself and lives in the backbone.

`SENSE_TABLE` at the end is the one list of the senses and their arguments: a further sense is a class and a row,
and the shapes of its arguments in `sense_shapes`.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTConfig, ViTModel

try:
    from .configuration_creature import SENSES, CreatureConfig
    from .losses_creature import IGNORE_INDEX
    from .streams_creature import quaternion_to_6d, unpack_animation
except ImportError:
    from configuration_creature import SENSES, CreatureConfig
    from losses_creature import IGNORE_INDEX
    from streams_creature import quaternion_to_6d, unpack_animation


class SenseProjection(nn.Linear):
    """The last layer of a sense: no bias, and zero before training (`_init_weights` of the model sees to it)."""

    def __init__(self, in_features: int, config: CreatureConfig):
        super().__init__(in_features, config.hidden_size, bias=False)


def encode_present(encode, mask: torch.Tensor | None, *inputs: torch.Tensor) -> torch.Tensor:
    """
    Run `encode` on the rows of `inputs` where `mask` is true and return its vectors, exactly zero elsewhere.

    mask [...] bool, or None for "all present"; inputs [..., features] each -> [..., size]. Inputs at absent places may
    be anything, NaN included.
    """
    if mask is None:
        return encode(*inputs)
    if torch.compiler.is_compiling():
        # A shape that depends on the data would break the graph: encode every place, with zeros where nothing is.
        def fill(value):
            return value.masked_fill(~mask.view(*mask.shape, *[1] * (value.dim() - mask.dim())), 0)

        return encode(*map(fill, inputs)).masked_fill(~mask[..., None], 0)
    vectors = encode(*(value[mask] for value in inputs))  # [N, size]
    return scatter_present(mask, vectors)


def check_ids(name: str, ids: torch.Tensor, size: int, smallest: int | None = None, ignored: int | None = None) -> None:
    """
    ValueError for ids that are not below `size`, or below `smallest`; without one, negative ids are absent ticks.
    `ignored` is allowed in any case.

    Not while a GPU trains, where reading the largest id would make the host wait for all work before it.
    """
    if torch.compiler.is_compiling() or ids.numel() == 0 or ids.is_meta or (ids.is_cuda and torch.is_grad_enabled()):
        return
    if ignored is not None:
        ids = ids.masked_fill(ids == ignored, 0)
    low, high = torch.stack(ids.aminmax()).tolist()  # one wait for a GPU, not two
    if high >= size or (smallest is not None and low < smallest):
        bad = high if high >= size else low
        raise ValueError(f"`{name}` holds the id {bad}; there are {size:,}, from 0 to {size - 1:,}.")


def check_shapes(shapes: dict[str, tuple], tensors: dict, **sizes: int) -> None:
    """
    ValueError for a tensor that has not the shape of its name; a letter there stands for one size in all tensors.

    shapes: as `sense_shapes`. tensors: by name; one that is None is not there. sizes: those of letters that are known.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        fits = tensor.dim() == len(shapes[name])
        for dim, size in enumerate(shapes[name] if fits else ()):
            if isinstance(size, str):
                size = sizes.setdefault(size, tensor.shape[dim])
            fits = fits and tensor.shape[dim] == size
        if not fits:
            wanted = ", ".join(str(sizes.get(size, size)) for size in shapes[name])
            raise ValueError(
                f"`{name}` has the shape {list(tensor.shape)}, but should have [{wanted}]; the docstring of "
                "`MultiModalCreature.forward` lists the shapes."
            )


def check_names(argument: str, names: Iterable[str], known: tuple[str, ...]) -> None:
    """ValueError for text where several names belong, which would be a name a letter, and for unknown names."""
    if isinstance(names, str):
        raise ValueError(f"{argument} is a tuple of names, such as ({names!r},), not text.")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"Unknown {argument}: {unknown}; known are {', '.join(known)}.")


def unknown_argument(function: str, name: str, known: Iterable[str]) -> TypeError:
    """The error for an argument that a function does not have, with the nearest one that it has."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f": did you mean `{near[0]}`?" if near else "; the docstring of `MultiModalCreature.forward` lists them."
    return TypeError(f"`{function}` has no argument `{name}`{hint}")


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
        check_ids("touch_points", points, self.point_embedding.num_embeddings, smallest=0)
        check_ids("touch_surfaces", surfaces, self.surface_embedding.num_embeddings, smallest=0)
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
        check_ids("audio_codes", codes, self.code_table.shape[1])
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


@dataclass(frozen=True)
class Sense:
    """
    One row of `SENSE_TABLE`.

    Args:
        name: the sense's module in `CreatureSenses`.
        module: its class, called with the arguments in their order, then the mask where there is one.
        arguments: those of `MultiModalCreature.forward` that it arrives in, each with what an absent tick holds.
        mask: the argument [B, T] (touch: [B, T, contacts]) that says where it is present; None for ids, which are
            negative where it is absent.
        copy_of: the stream whose emission it feeds back, for the efference copies.
        is_text: whether its ids are those of the token table, which the module is then given.
    """

    name: str
    module: type[nn.Module]
    arguments: dict[str, float]
    mask: str | None = None
    copy_of: str | None = None
    is_text: bool = False


SENSE_TABLE = (
    Sense("external_voice", TextSense, {"external_voice_ids": IGNORE_INDEX}, is_text=True),
    Sense("audio", AudioSense, {"input_features": 0.0}, mask="input_features_mask"),
    Sense("vision", VisionSense, {"pixel_values": 0.0}, mask="pixel_mask"),
    Sense("proprioception", ProprioceptionSense, {"joint_positions": 0.0, "joint_rotations": 0.0}, mask="body_mask"),
    Sense("touch", TouchSense, {"touch_points": 0, "touch_surfaces": 0, "touch_values": 0.0}, mask="touch_mask"),
    Sense("own_text", TextSense, {"external_text_ids": IGNORE_INDEX}, copy_of="external_text", is_text=True),
    Sense("own_voice", VoiceCopy, {"audio_codes": IGNORE_INDEX}, copy_of="audio"),
    Sense("own_command", CommandCopy, {"animation": 0.0}, mask="animation_mask", copy_of="animation"),
)
assert SENSES[1:] == tuple(sense.name for sense in SENSE_TABLE if not sense.copy_of)


def sense_shapes(config: CreatureConfig) -> dict[str, tuple[int | str, ...]]:
    """The shape of each argument of the senses: B rows, T ticks, N present ticks, C contacts, or a number."""
    body, image = ("B", "T", config.subframes_per_tick, config.num_joints), (config.vision_image_size,) * 2
    return {
        "external_voice_ids": ("B", "T"),
        "input_features": ("B", "T", config.audio_feature_size),
        "input_features_mask": ("B", "T"),
        "pixel_values": ("N", 2, 3, *image),
        "pixel_mask": ("B", "T"),
        "joint_positions": (*body, 3),
        "joint_rotations": (*body, 4),
        "body_mask": ("B", "T"),
        "touch_points": ("B", "T", "C"),
        "touch_surfaces": ("B", "T", "C"),
        "touch_values": ("B", "T", "C", 5),
        "touch_mask": ("B", "T", "C"),
        "external_text_ids": ("B", "T"),
        "audio_codes": ("B", "T", config.num_audio_codebooks),
        "animation": ("B", "T", config.animation_size),
        "animation_mask": ("B", "T"),
    }


class CreatureSenses(nn.Module):
    """All senses beside the internal voice, and the efference copies of what the creature itself emitted."""

    def __init__(self, config: CreatureConfig):
        super().__init__()
        self.config = config
        self.shapes = sense_shapes(config)
        for sense in SENSE_TABLE:
            setattr(self, sense.name, sense.module(config))

    def forward(self, inputs: dict, token_table: nn.Embedding) -> list[torch.Tensor]:
        """
        The vectors [B, T, hidden_size] of the senses that are there.

        Args:
            inputs: the sense arguments of `MultiModalCreature.forward`, None or missing where a sense is absent.
            token_table: the backbone's embedding, shared by every use of text.

        Raises:
            TypeError: for an argument that no sense has.
            ValueError: for a part of a sense without the others, a wrong shape, and ids out of range.
        """
        for name in inputs:
            if name not in self.shapes:
                raise unknown_argument("senses", name, self.shapes)
        vectors = []
        for sense in SENSE_TABLE:
            given = [name for name in sense.arguments if inputs.get(name) is not None]
            mask = inputs.get(sense.mask)
            if not given and mask is None:
                continue
            check_shapes(self.shapes, {name: inputs.get(name) for name in (*sense.arguments, sense.mask) if name})
            if given == ["joint_rotations"]:
                continue  # alone they are not felt: they are the pose that animation starts from
            missing = [name for name in sense.arguments if name not in given]
            if missing:
                names = " and ".join(f"`{name}`" for name in missing)
                raise ValueError(f"`{(given or [sense.mask])[0]}` is one part of a sense: give {names} with it.")
            tensors = [inputs[name] for name in sense.arguments]
            if sense.is_text:
                check_ids(given[0], tensors[0], token_table.num_embeddings)
                tensors.append(token_table)
            elif sense.mask:
                tensors.append(None if mask is None else mask.bool())
            vectors.append(getattr(self, sense.name)(*tensors))
        return vectors

    def pose(self, inputs: dict) -> torch.Tensor | None:
        """
        The pose that the next motor command starts from, [B, T, joints, 4]: the felt body, else the last command, else
        the pose in which no joint is rotated (None where that holds for all ticks).
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
        return torch.where(mask.bool()[..., None, None], pose, below.to(pose.dtype))


def rest_pose(like: torch.Tensor) -> torch.Tensor:
    """Identity quaternions in the shape [..., 4], dtype and device of `like`."""
    return F.pad(torch.ones_like(like[..., :1]), (0, 3)).expand_as(like)


__all__ = ["SENSE_TABLE", "CreatureSenses", "Sense"]
