# Copyright 2026 The MultiModalCreature developers. Licensed under the Apache License, Version 2.0.
"""Motor commands: joint rotations, face, eyes and other actions; the last command, errors, and the animation stream."""

from math import prod

import torch
import torch.nn.functional as F
from torch import nn

try:
    from .configuration_creature import CreatureConfig
except ImportError:
    from configuration_creature import CreatureConfig

# The parts of a motor command, by the names of their targets.
COMMAND_PARTS = ("rotation_targets", "blend_shape_targets", "eye_targets", "action_targets")
# Errors above this count by themselves, those below it by their square: 0.8 degrees of a joint, 1.1 of a gaze, a
# fiftieth of a blend shape.
ROUNDED_BELOW = 0.02
# Added to the error of repeating at every tick, so that a body that never moved does not divide by 0: about 0.008
# degrees of rotation, or a five-thousandth of a blend shape.
SMALLEST_ERROR = 1e-6


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


def rotation_vector(quaternion: torch.Tensor) -> torch.Tensor:
    """Unit quaternions (w, x, y, z) [..., 4] -> axis times angle in rad [..., 3], the angle at most pi."""
    quaternion = torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)
    sine = quaternion[..., 1:].norm(dim=-1, keepdim=True)
    angle = 2 * torch.atan2(sine, quaternion[..., :1])
    return quaternion[..., 1:] * torch.where(sine > 1e-6, angle / sine.clamp(min=1e-6), 2.0)


def rotation_of(vector: torch.Tensor) -> torch.Tensor:
    """The inverse: axis times angle [..., 3] -> unit quaternions [..., 4]."""
    half = vector.norm(dim=-1, keepdim=True) / 2
    return torch.cat((half.cos(), vector / 2 * torch.sinc(half / torch.pi)), dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def pack_animation(rotations: torch.Tensor, blend_shapes: torch.Tensor, eyes: torch.Tensor) -> torch.Tensor:
    """
    One tick of animation as one row of numbers: the format of the `animation` output and efference copy.

    rotations [..., sub-frames, joints, 4] unit quaternions, blend_shapes [..., 51] in [0, 1], eyes [..., 2, 4] (gaze
    direction x, y, z of length 1, openness in [0, 1]) -> [..., animation_size].
    """
    return torch.cat((rotations.flatten(-3), blend_shapes, eyes.flatten(-2)), dim=-1)


def unpack_animation(config: CreatureConfig, animation: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The inverse of `pack_animation`: [..., animation_size] -> rotations, blend_shapes, eyes."""
    joints, eyes = (config.subframes_per_tick, config.num_joints, 4), (_num_eyes(config), 4)
    sizes = (prod(joints), config.num_blend_shapes, prod(eyes))
    rotations, blend_shapes, gaze = animation.split(sizes, dim=-1)
    return rotations.unflatten(-1, joints), blend_shapes, gaze.unflatten(-1, eyes)


def last_command(config: CreatureConfig, batch: dict, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    At every tick, the command that the next one is a residual to, as far as it is known: the efference copy of the
    tick; where that is absent, the target of the tick, which is the same command; of the joints, else the felt pose;
    else rest, no joint rotated and the eyes straight ahead (+z).

    A copy that is dropped in training hides the last command from the senses, and not from the head, which always has
    it when it emits: a head that had to guess the whole pose would make up most of the loss.

    Args:
        batch: the arguments of `MultiModalCreature.forward`. hidden: [B, T, ...], for the sizes and the device.

    Returns:
        float32 by `COMMAND_PARTS`: the last sub-frame of the rotations [B, T, joints, 4], blend shapes [B, T, shapes],
        eyes [B, T, 2 or 0, 4], the last sub-frame of the action [B, T, action_size].
    """
    rest = hidden.new_zeros(*hidden.shape[:2], 1, dtype=torch.float32)
    command = {
        "rotation_targets": F.pad(rest + 1, (0, 3))[:, :, None].expand(-1, -1, config.num_joints, -1),
        "blend_shape_targets": rest.expand(-1, -1, config.num_blend_shapes),
        "eye_targets": F.pad(rest + 1, (2, 1))[:, :, None].expand(-1, -1, _num_eyes(config), -1),
        "action_targets": rest.expand(-1, -1, config.action_size),
    }
    felt, copy = batch.get("joint_rotations"), batch.get("animation")
    copies = {} if copy is None else dict(zip(COMMAND_PARTS, unpack_animation(config, copy), strict=False))
    for given, mask in (
        ({"rotation_targets": felt}, batch.get("body_mask")),
        ({name: batch.get(name) for name in COMMAND_PARTS}, batch.get("animation_target_mask")),
        (copies, batch.get("animation_mask")),
        ({"action_targets": batch.get("action")}, batch.get("action_mask")),
    ):
        for name, value in given.items():
            if value is None:
                continue
            value = value[:, :, -1] if name in ("rotation_targets", "action_targets") else value
            known = command[name]
            command[name] = value.float() if mask is None else torch.where(_at(mask, value), value.float(), known)
    return command


def move(last: dict[str, torch.Tensor], residual: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The command that is the last one plus a residual, both by `COMMAND_PARTS`: rotation matrices [..., sub-frames,
    joints, 3, 3] and the rest as its targets, gazes of length 1.
    """
    eyes = last["eye_targets"] + residual["eye_targets"]
    six = quaternion_to_6d(last["rotation_targets"])[..., None, :, :] + residual["rotation_targets"]
    return {
        "rotation_targets": matrix_from_6d(six),
        "blend_shape_targets": last["blend_shape_targets"] + residual["blend_shape_targets"],
        # eps bounds the gradient of a gaze that all but vanishes.
        "eye_targets": torch.cat((F.normalize(eyes[..., :3], dim=-1, eps=1e-3), eyes[..., 3:]), dim=-1),
        "action_targets": last["action_targets"][..., None, :] + residual["action_targets"],
    }


def command_errors(command: dict[str, torch.Tensor], batch: dict) -> list[torch.Tensor | None]:
    """
    The error of each of `COMMAND_PARTS` at every tick but the first, [B, T - 1], 0 where it has no target; None for a
    part without targets. Of rotations it is the mean over the joints of the chordal distance (Frobenius norm of the
    difference of the rotation matrices), of blend shapes the mean distance, of an eye the chord between the gazes plus
    the distance of its openness, of an action the mean Huber loss of its normalised numbers.

    command: as `move` returns it, of the ticks 1 to T - 1. batch: the targets of the ticks 0 to T - 1, and their mask.
    """
    errors = []
    for name in COMMAND_PARTS:
        if batch.get(name) is None:
            errors.append(None)
            continue
        target, found, mask = batch[name][:, 1:].float(), command[name], animation_targets_present(batch)[:, 1:]
        # Filled, not multiplied: the values at ticks without a target may be anything, NaN included.
        target = target.masked_fill(~_at(mask, target), 0.0)
        if name == "rotation_targets":
            squares = (found - matrix_from_6d(quaternion_to_6d(target))).square().sum((-2, -1))
            error = distance(squares).mean((-2, -1))
        elif name == "blend_shape_targets":
            error = distance((found - target).square()).mean(-1)
        elif name == "eye_targets":
            cosine = (found[..., :3] * F.normalize(target[..., :3], dim=-1)).sum(-1)
            error = (distance(2 - 2 * cosine) + distance((found[..., 3] - target[..., 3]).square())).mean(-1)
        else:
            error = F.huber_loss(found, target, reduction="none").mean((-2, -1))
        errors.append(error.masked_fill(~mask, 0.0))
    return errors


def distance(squares: torch.Tensor) -> torch.Tensor:
    """
    The roots of squared errors, rounded off below `ROUNDED_BELOW`.

    With distances the best command is the median of what may come, with squares it would be the mean. A creature that
    lives on its own commands goes astray by means: as a blink may come at any tick, its lids would close a little at
    every tick, and a hand that may go to one of two things would go between them.
    """
    return (squares + ROUNDED_BELOW**2).sqrt() - ROUNDED_BELOW


@torch.no_grad()
def errors_of_repeating(config: CreatureConfig, batch: dict) -> list[torch.Tensor | None]:
    """The summed error of repeating the last command, of each of `COMMAND_PARTS`; None for a part without targets."""
    mask = animation_targets_present(batch)
    if mask is None:
        return [None] * len(COMMAND_PARTS)
    still = repeat(config, {name: value[:, :-1] for name, value in last_command(config, batch, mask).items()})
    smallest = SMALLEST_ERROR * mask[:, 1:].sum()
    return [None if error is None else error.sum() + smallest for error in command_errors(still, batch)]


def repeat(config: CreatureConfig, last: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The command that is the last one again, in the form of `move`."""
    still = move(last, dict.fromkeys(COMMAND_PARTS, last["action_targets"].new_zeros(())))
    still["action_targets"] = still["action_targets"].expand(-1, -1, config.subframes_per_tick, -1)
    return still


def animation_targets_present(batch: dict) -> torch.Tensor | None:
    """[B, T] bool: the ticks of a batch that have a motor command for target, or None without any."""
    for name in COMMAND_PARTS:
        if batch.get(name) is not None:
            mask = batch.get("animation_target_mask")
            everywhere = torch.ones(batch[name].shape[:2], dtype=torch.bool, device=batch[name].device)
            return everywhere if mask is None else mask.bool()
    return None


def _at(mask: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A mask [B, T] as booleans in the number of dimensions of a value [B, T, ...]."""
    return mask.bool().view(*mask.shape, *[1] * (value.dim() - 2))


def _num_eyes(config: CreatureConfig) -> int:
    """A creature with a face has two."""
    return 2 if config.num_blend_shapes else 0


# ---------------------------------------------------------------------------------------------------------------------
# The head
# ---------------------------------------------------------------------------------------------------------------------


class CommandProjection(nn.Linear):
    """
    The last matrix of the animation stream, drawn with a hundredth of the usual scale: the first commands repeat the
    last one, at a loss of about 1. Not zero: behind a sense whose last matrix is zero, neither would have a gradient.
    """


class AnimationStream(nn.Module):
    """The next tick's motor command as a residual to the last one: joints, face, eyes, and any other action."""

    def __init__(self, config: CreatureConfig):
        super().__init__()
        subframes, eyes = config.subframes_per_tick, _num_eyes(config)
        shapes = ((subframes, config.num_joints, 6), (config.num_blend_shapes,), (eyes, 4))
        self.shapes = (*shapes, (subframes, config.action_size))  # of the residual, in the order of `COMMAND_PARTS`
        self.limits, self._limits = (config.rotation_low, config.rotation_high), None
        self.up_proj = nn.Linear(config.hidden_size, config.sense_hidden_size)
        self.act = nn.GELU()
        self.out_proj = CommandProjection(config.sense_hidden_size, sum(map(prod, self.shapes)))

    def forward(self, hidden: torch.Tensor, last: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """hidden [..., hidden_size], last: of `last_command` -> the next command in float32, as `move` returns it."""
        out = self.out_proj(self.act(self.up_proj(hidden))).float()  # geometry in float32, whatever autocast says
        parts = out.split([*map(prod, self.shapes)], dim=-1)
        shaped = [part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return move(last, dict(zip(COMMAND_PARTS, shaped, strict=True)))

    def emit(self, hidden: torch.Tensor, last: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        The same as what leaves the creature, as far as its body has it: `animation` [..., animation_size] (see
        `pack_animation`) and `action` [..., sub-frames, action_size].

        Joints stay within the configuration's `rotation_low` and `rotation_high`: a command that is a residual to the
        last one would wind up without end, far from where the body can follow and from all that was learned.
        """
        matrices, shapes, eyes, action = self(hidden, last).values()
        eyes = torch.cat((eyes[..., :3], eyes[..., 3:].clamp(0, 1)), dim=-1)
        rotations = self._limited(matrix_to_quaternion(matrices))
        animation = pack_animation(rotations, shapes.clamp(0, 1), eyes)
        emitted = {"animation": animation, "action": action}
        return {name: value for name, value in emitted.items() if value.shape[-1]}

    def _limited(self, rotations: torch.Tensor) -> torch.Tensor:
        """Unit quaternions [..., joints, 4], every component of their rotation vectors within its limits."""
        if self.limits[0] is None:
            return rotations
        if self._limits is None or self._limits.device != rotations.device:
            # Kept, because nothing can be copied from the host while a CUDA graph is recorded.
            self._limits = torch.tensor(self.limits, device=rotations.device)  # [2, joints, 3]
        vectors = rotation_vector(rotations.detach())
        kept = vectors.clamp(*self._limits)
        return torch.where((kept == vectors).all(-1, keepdim=True), rotations, rotation_of(kept))

    def loss(self, hidden: torch.Tensor, last: dict[str, torch.Tensor], batch: dict) -> torch.Tensor:
        """
        The summed error of each of `COMMAND_PARTS`, [4], to be divided by that of repeating the last command.

        hidden [B, T, hidden_size], last: of `last_command`, batch: the targets of the forward pass.
        """
        command = self(hidden[:, :-1], {name: value[:, :-1] for name, value in last.items()})
        zero = hidden.new_zeros((), dtype=torch.float32)
        return torch.stack([zero if error is None else error.sum() for error in command_errors(command, batch)])


__all__ = ["COMMAND_PARTS", "AnimationStream", "CommandProjection", "pack_animation", "unpack_animation"]
