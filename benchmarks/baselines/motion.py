"""Joint angles up to a second ahead, from recorded motion.

From 2 s that are known, the poses after them (`creature.rounds.open_loop.open_loop_starts`, every window of the
validation split), without seeing anything more. An error is the angle between the rotation of a joint and that
forecast, in its parent's frame (of the root: in the room's), the mean over joints and windows, in degrees. 80 ms ahead
is the fourth sub-frame of 20 ms after the last one that is known. "1 tick ratio" is the chordal distance divided by
that of repeating the last pose, one tick ahead at every tick, as `motor_creature.command_errors` counts it.

Constant velocity goes on as over the last tick. The GRU sees the rotations as 6 numbers a joint, and its loss is the
chordal distance; it ends where its error at 400 ms is lowest.
"""

import argparse

import torch

from benchmarks.baselines.common import open_clips, print_table
from benchmarks.baselines.rollouts import measure_grus, open_loop_windows
from creature.rounds.open_loop import AHEAD, MILLISECONDS, angles_ahead, command_span
from motor_creature import (
    distance,
    matrix_from_6d,
    matrix_to_quaternion,
    quaternion_to_6d,
    rotation_of,
    rotation_vector,
)

HEAD = [*(f"{ms} ms" for ms in MILLISECONDS), "1 tick ratio"]


def report(options: argparse.Namespace) -> None:
    """Print the errors of every model on the validation split."""
    splits, _ = open_clips(options.folders[0], options.cache_dir, "rotation_targets")
    train, held_out = (
        [frames for clip in splits[name] if len(frames := to_frames(clip).to(options.device)) > 1]
        for name in ("train", "validation")
    )
    windows = len(open_loop_windows(held_out)[0])
    rows = {
        "last pose": [angles(lambda known: known[:, -1:, -1:].expand(-1, AHEAD, known.shape[2], -1), held_out)],
        "constant velocity": [angles(constant_velocity, held_out)],
    }

    def evaluate(model) -> dict[str, float]:
        return angles(lambda known: model(known, AHEAD)[:, -AHEAD:], held_out) | one_tick(model, held_out)

    rows |= measure_grus(train, options, nearest, chordal, evaluate, "400 ms")
    print(f"{sum(map(len, train))} ticks to train, {sum(map(len, held_out))} to validate, {windows} windows")
    print_table(HEAD, rows)


def to_frames(clip: dict) -> torch.Tensor:
    """A recording as [T, sub-frames, joints * 6]: the first two columns of every rotation matrix."""
    return quaternion_to_6d(torch.from_numpy(clip["rotation_targets"][command_span(clip)])).flatten(-2)


def matrices(frames: torch.Tensor) -> torch.Tensor:
    """[..., joints * 6] -> rotation matrices [..., joints, 3, 3]."""
    return matrix_from_6d(frames.unflatten(-1, (-1, 6)))


def nearest(frames: torch.Tensor) -> torch.Tensor:
    """Any numbers [..., joints * 6] -> those of the rotations they stand for."""
    return matrices(frames)[..., :2].transpose(-1, -2).flatten(-3)


def chordal(found: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The chordal distance of every tick, mean over sub-frames and joints, [..., T]."""
    return distance((matrices(found) - matrices(target)).square().sum((-2, -1))).mean((-2, -1))


@torch.no_grad()
def angles(open_loop, held_out: list[torch.Tensor]) -> dict[str, float]:
    """The errors in degrees; open_loop: known [B, BEFORE, sub-frames, joints * 6] -> the same of AHEAD ticks."""
    known, comes = open_loop_windows(held_out)
    return angles_ahead(matrices(open_loop(known)), matrices(comes), MILLISECONDS)


def one_tick(model, held_out: list[torch.Tensor]) -> dict[str, float]:
    found = sum(chordal(model(one[None, :-1]), one[None, 1:]).sum() for one in held_out)
    still = sum(chordal(one[None, :-1, -1:].expand_as(one[None, 1:]), one[None, 1:]).sum() for one in held_out)
    return {"1 tick ratio": (found / still).item()}


def constant_velocity(known: torch.Tensor) -> torch.Tensor:
    """The rotation of the last tick, as often as there are ticks, in each joint's own frame; sub-frames in between."""
    subframes = known.shape[2]
    before, last = (matrices(known[:, tick, -1]) for tick in (-2, -1))  # [B, joints, 3, 3]
    turn = rotation_vector(matrix_to_quaternion(before.transpose(-1, -2) @ last))
    shares = torch.arange(1, AHEAD * subframes + 1, device=turn.device) / subframes
    turns = matrix_from_6d(quaternion_to_6d(rotation_of(turn[:, None] * shares[:, None, None])))
    poses = last[:, None] @ turns  # [B, ticks x sub-frames, joints, 3, 3]
    return poses[..., :2].transpose(-1, -2).flatten(-3).unflatten(1, (AHEAD, subframes))
