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
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

try:
    from .configuration_creature import SENSES, CreatureConfig
    from .losses_creature import IGNORE_INDEX, compute_dtype
    from .motor_creature import quaternion_to_6d, unpack_animation
except ImportError:
    from configuration_creature import SENSES, CreatureConfig
    from losses_creature import IGNORE_INDEX, compute_dtype
    from motor_creature import quaternion_to_6d, unpack_animation


# Root mean square of the features that every sense brings to its last matrix: see `SenseProjection`.
SENSE_SCALE = 0.05
NO_INPUT = "The creature has no input: give `input_ids`, `inputs_embeds` or another sense."


class SenseProjection(nn.Linear):
    """
    The last layer of a sense: its features brought to one size, then a matrix without bias that is zero before training
    (`_init_weights` of the model sees to it).

    All senses arrive at the sum at the same size and pace, whatever they measure, so that none drowns the others.
    """

    def __init__(self, in_features: int, config: CreatureConfig):
        super().__init__(in_features, config.hidden_size, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., hidden_size]; features of zero stay zero."""
        return super().forward(F.rms_norm(features, features.shape[-1:], eps=1e-6) * SENSE_SCALE)


def encode_present(encode, mask: torch.Tensor | None, *inputs: torch.Tensor) -> torch.Tensor:
    """
    Run `encode` on the rows of `inputs` where `mask` is true and return its vectors, exactly zero elsewhere.

    mask [...] bool, or None for "all present"; inputs [..., features] each -> [..., size]. Inputs at absent places may
    be anything, NaN included.
    """
    if mask is None:
        return encode(*inputs)
    if encodes_everywhere(mask):
        # A shape that depends on the data would break the graph: encode every place, with zeros where nothing is.
        def fill(value):
            return value.masked_fill(~mask.view(*mask.shape, *[1] * (value.dim() - mask.dim())), 0)

        return encode(*map(fill, inputs)).masked_fill(~mask[..., None], 0)
    given = [value[mask] for value in inputs]
    if not len(given[0]):  # torch 2.11 has no attention over no rows on a GPU; the one in their place is not used
        given = [value.new_zeros(1, *value.shape[1:]) for value in given]
    vectors = encode(*given)  # [N, size]
    return scatter_present(mask, vectors)


def encodes_everywhere(mask: torch.Tensor) -> bool:
    """
    Whether all places of a mask [B, T, ...] are encoded, and not those alone where it is true: in a compiled graph, and
    of one tick on a GPU, where the host would wait for the number of places, which a CUDA graph cannot record.
    """
    return torch.compiler.is_compiling() or (mask.is_cuda and mask.shape[1] == 1 and not torch.is_grad_enabled())


def check_ids(
    name: str,
    ids: torch.Tensor,
    size: int,
    smallest: int | None = None,
    ignored: int | None = None,
    mask: torch.Tensor | None = None,
) -> None:
    """
    ValueError for ids that are not below `size`, or below `smallest`; without one, negative ids are absent ticks.
    `ignored` is allowed in any case, and anything where the mask is false.

    Not while a GPU trains, where reading the largest id would make the host wait for all work before it, nor while a
    CUDA graph is recorded: whoever replays it checks the ids before.
    """
    if torch.compiler.is_compiling() or ids.numel() == 0 or ids.is_meta:
        return
    if ids.is_cuda and (torch.is_grad_enabled() or torch.cuda.is_current_stream_capturing()):
        return
    if ignored is not None:
        ids = ids.masked_fill(ids == ignored, 0)
    if mask is not None:
        ids = ids.masked_fill(~mask.bool(), 0)
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


def check_organs(config: CreatureConfig, organs: dict[str, str], given: Iterable[str]) -> None:
    """ValueError for a given argument whose organ this creature lacks: its number in the configuration is 0."""
    for name in given:
        if name in organs and not getattr(config, organs[name]):
            raise ValueError(f"`{name}` is given, but this creature's {organs[name]} is 0: leave it out.")


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


class Halving(nn.Linear):
    """A convolution that halves height and width; its weight is a matrix, which the optimizer treats as any other."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels * 4 * 4, out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [N, in_channels, H, W] -> [N, out_channels, H / 2, W / 2]."""
        return F.conv2d(x, self.weight.unflatten(1, (-1, 4, 4)), self.bias, stride=2, padding=1)


class VisionSense(nn.Module):
    """
    The eyes: convolutions that halve the picture each (LeCun et al. 1989), so that what a thing looks like is learned
    once for all places. All cameras are the channels of one picture, so that left and right can be compared. What is
    left of the picture keeps its places: where a thing is, is half of what eyes tell.
    """

    def __init__(self, config: CreatureConfig):
        super().__init__()
        sizes = [config.num_cameras * 3, *config.vision_channels]
        self.layers = nn.ModuleList(Halving(*pair) for pair in zip(sizes, sizes[1:], strict=False))
        places = math.prod(side >> len(self.layers) for side in config.image_shape)
        self.up_proj = nn.Linear(places * sizes[-1], config.sense_hidden_size)
        self.act = nn.GELU()
        self.proj = SenseProjection(config.sense_hidden_size, config)

    def _encode(self, pictures: torch.Tensor) -> torch.Tensor:
        # [N, cameras * 3, H, W]. Bytes to numbers of about unit variance, in place: pictures are the largest input.
        x = pictures.flatten(0, -5).flatten(1, 2).to(compute_dtype(self.up_proj.weight)).sub_(127.5).div_(64)
        for layer in self.layers:
            x = self.act(layer(x))
        x = x.flatten(1)
        x = self.act(self.up_proj(F.rms_norm(x, x.shape[-1:], eps=1e-6)))
        return self.proj(x).unflatten(0, pictures.shape[:-4])

    def forward(self, pixel_values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """pixel_values [B, T, cameras, 3, H, W] bytes from 0 to 255, mask [B, T] bool -> [B, T, hidden_size]."""
        if pixel_values.is_floating_point():
            raise ValueError("`pixel_values` are bytes from 0 to 255 (uint8), not floats: the model normalises them.")
        return encode_present(self._encode, mask, pixel_values)


class ProprioceptionSense(nn.Module):
    """The body: where every joint is, in the frame of the pelvis, how it is turned, and what else the body measures."""

    def __init__(self, config: CreatureConfig):
        super().__init__()
        numbers = config.num_joints * (3 + 6) + config.body_state_size
        self.up_proj = nn.Linear(config.subframes_per_tick * numbers, config.sense_hidden_size)
        self.act = nn.GELU()
        self.proj = SenseProjection(config.sense_hidden_size, config)

    def _encode(self, body: torch.Tensor) -> torch.Tensor:
        return self.proj(self.act(self.up_proj(body.to(self.up_proj.weight.dtype))))

    def forward(
        self,
        positions: torch.Tensor | None,
        rotations: torch.Tensor | None,
        state: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        positions [B, T, sub-frames, joints, 3] m and rotations [..., 4] quaternions (w, x, y, z) of a body with joints,
        state [B, T, sub-frames, body_state_size] (normalised) of one that measures more, mask [B, T] bool ->
        [B, T, hidden_size].
        """
        parts = []
        if positions is not None:
            parts.append(torch.cat((positions.float(), quaternion_to_6d(rotations.float())), dim=-1).flatten(-2))
        if state is not None:
            parts.append(state.float())
        return encode_present(self._encode, mask, torch.cat(parts, dim=-1).flatten(-2))


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
        self.num_codes = config.audio_codebook_size
        self.codes = nn.Embedding(config.num_audio_codebooks * config.audio_codebook_size, config.audio_code_size)
        self.proj = SenseProjection(config.audio_code_size, config)

    @property
    def code_table(self) -> torch.Tensor:
        """[codebooks, audio_codebook_size, audio_code_size]"""
        return self.codes.weight.unflatten(0, (-1, self.num_codes))

    def _encode(self, codes: torch.Tensor) -> torch.Tensor:
        books = torch.arange(codes.shape[-1], device=codes.device)
        return self.proj(self.codes(codes + books * self.num_codes).sum(dim=-2))

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
        """animation [B, T, animation_size] as `motor_creature.pack_animation` makes it, mask [B, T] bool."""
        return encode_present(self._encode, mask, animation)


class ActionCopy(nn.Module):
    """The last command of a body that is not moved by joint rotations."""

    def __init__(self, config: CreatureConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.subframes_per_tick * config.action_size, config.sense_hidden_size)
        self.act = nn.GELU()
        self.proj = SenseProjection(config.sense_hidden_size, config)

    def _encode(self, action: torch.Tensor) -> torch.Tensor:
        return self.proj(self.act(self.up_proj(action.flatten(-2).to(self.up_proj.weight.dtype))))

    def forward(self, action: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """action [B, T, sub-frames, action_size], normalised, mask [B, T] bool -> [B, T, hidden_size]."""
        return encode_present(self._encode, mask, action)


@dataclass(frozen=True)
class Sense:
    """
    One row of `SENSE_TABLE`.

    Args:
        name: the sense's module in `CreatureSenses`, which a creature without the organ does not have.
        module: its class, called with the arguments in their order (None where this creature lacks the organ), then the
            mask where there is one.
        arguments: those of `MultiModalCreature.forward` that it arrives in, each with what an absent tick holds.
        mask: the argument [B, T] (touch: [B, T, contacts]) that says where it is present; None for ids, which are
            negative where it is absent.
        organs: of each argument, the field of the configuration that is 0 in a creature without the organ for it.
        copy_of: the stream whose emission it feeds back, for the efference copies.
        is_text: whether its ids are those of the token table, which the module is then given.
    """

    name: str
    module: type[nn.Module]
    arguments: dict[str, float]
    mask: str | None = None
    organs: dict[str, str] = field(default_factory=dict)
    copy_of: str | None = None
    is_text: bool = False

    def arguments_of(self, config: CreatureConfig) -> list[str]:
        """The names of the arguments that a creature of this configuration has the organs for."""
        return [name for name in self.arguments if name not in self.organs or getattr(config, self.organs[name])]


SENSE_TABLE = (
    Sense("external_voice", TextSense, {"external_voice_ids": IGNORE_INDEX}, is_text=True),
    Sense(
        "audio",
        AudioSense,
        {"input_features": 0.0},
        mask="input_features_mask",
        organs={"input_features": "num_mel_bins"},
    ),
    Sense("vision", VisionSense, {"pixel_values": 0}, mask="pixel_mask", organs={"pixel_values": "num_cameras"}),
    Sense(
        "proprioception",
        ProprioceptionSense,
        {"joint_positions": 0.0, "joint_rotations": 0.0, "body_state": 0.0},
        mask="body_mask",
        organs={"joint_positions": "num_joints", "joint_rotations": "num_joints", "body_state": "body_state_size"},
    ),
    Sense(
        "touch",
        TouchSense,
        {"touch_points": 0, "touch_surfaces": 0, "touch_values": 0.0},
        mask="touch_mask",
        organs=dict.fromkeys(("touch_points", "touch_surfaces", "touch_values"), "num_touch_points"),
    ),
    Sense("own_text", TextSense, {"external_text_ids": IGNORE_INDEX}, copy_of="external_text", is_text=True),
    Sense(
        "own_voice",
        VoiceCopy,
        {"audio_codes": IGNORE_INDEX},
        organs={"audio_codes": "num_audio_codebooks"},
        copy_of="audio",
    ),
    Sense(
        "own_command",
        CommandCopy,
        {"animation": 0.0},
        mask="animation_mask",
        organs={"animation": "animation_size"},
        copy_of="animation",
    ),
    Sense(
        "own_action",
        ActionCopy,
        {"action": 0.0},
        mask="action_mask",
        organs={"action": "action_size"},
        copy_of="animation",
    ),
)
assert SENSES[1:] == tuple(sense.name for sense in SENSE_TABLE if not sense.copy_of)


def sense_shapes(config: CreatureConfig) -> dict[str, tuple[int | str, ...]]:
    """The shape of each argument of the senses: B rows, T ticks, C contacts, or a number."""
    body = ("B", "T", config.subframes_per_tick)
    return {
        "external_voice_ids": ("B", "T"),
        "input_features": ("B", "T", config.audio_feature_size),
        "input_features_mask": ("B", "T"),
        "pixel_values": ("B", "T", config.num_cameras, 3, *config.image_shape),
        "pixel_mask": ("B", "T"),
        "joint_positions": (*body, config.num_joints, 3),
        "joint_rotations": (*body, config.num_joints, 4),
        "body_state": (*body, config.body_state_size),
        "body_mask": ("B", "T"),
        "touch_points": ("B", "T", "C"),
        "touch_surfaces": ("B", "T", "C"),
        "touch_values": ("B", "T", "C", 5),
        "touch_mask": ("B", "T", "C"),
        "external_text_ids": ("B", "T"),
        "audio_codes": ("B", "T", config.num_audio_codebooks),
        "animation": ("B", "T", config.animation_size),
        "animation_mask": ("B", "T"),
        "action": (*body, config.action_size),
        "action_mask": ("B", "T"),
    }


def id_sizes(config: CreatureConfig) -> dict[str, int]:
    """Of each argument of the senses that holds ids, how many there are."""
    return {
        "external_voice_ids": config.vocab_size,
        "touch_points": config.num_touch_points,
        "touch_surfaces": config.num_touch_surfaces,
        "external_text_ids": config.vocab_size,
        "audio_codes": config.audio_codebook_size,
    }


class CreatureSenses(nn.Module):
    """All senses beside the internal voice, and the efference copies of what the creature itself emitted."""

    def __init__(self, config: CreatureConfig):
        super().__init__()
        self.config = config
        self.shapes = sense_shapes(config)
        for sense in SENSE_TABLE:
            if sense.arguments_of(config):
                setattr(self, sense.name, sense.module(config))

    def forward(self, inputs: dict, token_table: nn.Embedding) -> list[torch.Tensor]:
        """
        The vectors [B, T, hidden_size] of the senses that are there.

        Args:
            inputs: the sense arguments of `MultiModalCreature.forward`, None or missing where a sense is absent.
            token_table: the backbone's embedding, shared by every use of text.

        Raises:
            TypeError, ValueError: of `check`.
        """
        vectors = []
        for sense in self.check(inputs):
            tensors, mask = [inputs.get(name) for name in sense.arguments], inputs.get(sense.mask)
            if sense.is_text:
                tensors.append(token_table)
            elif sense.mask:
                tensors.append(None if mask is None else mask.bool())
            vectors.append(getattr(self, sense.name)(*tensors))
        return vectors

    def check(self, inputs: dict) -> list[Sense]:
        """
        The senses that are there.

        Raises:
            TypeError: for an argument that no sense has.
            ValueError: for a sense that the creature has no organ for, a part of a sense without the others, a wrong
                shape, and ids out of range.
        """
        for name in inputs:
            if name not in self.shapes:
                raise unknown_argument("senses", name, self.shapes)
        present, ids = [], id_sizes(self.config)
        for sense in SENSE_TABLE:
            given = [name for name in sense.arguments if inputs.get(name) is not None]
            mask = inputs.get(sense.mask)
            if not given and mask is None:
                continue
            check_organs(self.config, sense.organs, given)
            check_shapes(self.shapes, {name: inputs.get(name) for name in (*sense.arguments, sense.mask) if name})
            if given == ["joint_rotations"]:
                continue  # alone they are not felt: they are the pose that animation starts from
            missing = [name for name in sense.arguments_of(self.config) if name not in given]
            if missing or not given:
                names = " and ".join(f"`{name}`" for name in missing or sense.arguments)
                raise ValueError(f"`{(given or [sense.mask])[0]}` is one part of a sense: give {names} with it.")
            for name in given:
                if name in ids:
                    # Negative ids are absent ticks, except where a mask says what is absent.
                    check_ids(name, inputs[name], ids[name], smallest=0 if sense.mask else None, mask=mask)
            present.append(sense)
        return present


__all__ = ["SENSE_TABLE", "CreatureSenses", "Sense"]
