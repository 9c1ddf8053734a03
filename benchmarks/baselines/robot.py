"""The next action of a robot, and those of the next second, from what it measures and was commanded.

One tick: at every tick but the first of a validation recording, from all ticks before it. Open loop: from 2 s that are
known, the 13 ticks after them (`creature.rounds.open_loop.open_loop_starts`), without seeing anything more. "error" is
the mean absolute error in standard deviations of each number, over all sub-frames; "ratio" is the Huber loss divided by
that of repeating the last command, both as `motor_creature.command_errors` counts them.

Ridge regression forecasts each of the 13 ticks directly; its strength is the best one on the validation split. The GRU
forecasts state and action, and goes on from its own; it ends where its two ratios have the lowest sum.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.baselines.common import open_clips, print_table
from benchmarks.baselines.rollouts import measure_grus, open_loop_windows
from creature.errors import UserError
from creature.rounds.open_loop import AHEAD, action_errors, command_span

STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)  # of ridge regression
HEAD = ["1 tick error", "1 tick ratio", "1 s error", "1 s ratio"]


def report(options: argparse.Namespace) -> None:
    """Print the errors of every model on the validation split."""
    splits, config = open_clips(options.folders[0], options.cache_dir, "action_targets")
    if not config.body_state_size:
        raise UserError(f"{options.folders[0]} has no body_state: import recordings of a body that measures itself")
    train, held_out = (
        [frames for clip in splits[name] if len(frames := to_frames(clip).to(options.device)) > 1]
        for name in ("train", "validation")
    )
    size, windows = config.action_size, len(open_loop_windows(held_out)[0])
    rows = {"repeating the last action": [measure(still, lambda known: still(known[:, -1:], AHEAD), held_out, size)]}
    for name, residual in (("ridge, state", False), ("ridge, state and action", True)):
        found = [measure_ridge(train, held_out, size, strength, residual) for strength in STRENGTHS]
        rows[name] = [{column: min(figures[column] for figures in found) for column in HEAD}]

    def evaluate(model) -> dict[str, float]:
        figures = measure(model, lambda known: model(known, AHEAD)[:, -AHEAD:], held_out, size)
        return figures | {"sum": figures["1 tick ratio"] + figures["1 s ratio"]}

    rows |= measure_grus(train, options, None, huber, evaluate, "sum")
    print(f"{sum(map(len, train))} ticks to train, {sum(map(len, held_out))} to validate, {windows} windows")
    print_table(HEAD, rows, digits=4)


def to_frames(clip: dict) -> torch.Tensor:
    """A recording as [T, sub-frames, numbers]: the actions, then the state, both normalised."""
    both = np.concatenate((clip["action_targets"], clip["body_state"]), axis=-1)
    return torch.from_numpy(both[command_span(clip)])


def still(frames: torch.Tensor, ticks: int = -1) -> torch.Tensor:
    """The last sub-frame of each tick [B, T, sub-frames, numbers], held for a tick, or of one tick for `ticks`."""
    return frames[:, :, -1:].expand(-1, ticks, frames.shape[2], -1)


def huber(found: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean Huber loss of every tick, [..., T]."""
    return F.huber_loss(found, target, reduction="none").mean((-2, -1))


@torch.no_grad()
def measure(one_tick, open_loop, held_out: list[torch.Tensor], size: int) -> dict[str, float]:
    """
    The four figures of a model.

    one_tick: recording [1, T, sub-frames, numbers] -> actions after each of its ticks. open_loop: windows [B, BEFORE,
    ...] -> the actions of AHEAD ticks. size: the numbers of an action, the first ones of a frame.
    """
    known, comes = open_loop_windows(held_out)
    pairs = [(one_tick(recording[None, :-1])[0], recording[1:], still(recording[None, :-1])[0])
             for recording in held_out]  # fmt: skip
    one = [torch.cat([part[..., :size] for part in parts]) for parts in zip(*pairs, strict=True)]
    second = [part[..., :size] for part in (open_loop(known), comes, still(known[:, -1:], AHEAD))]
    return dict(zip(HEAD, (*action_errors(*one), *action_errors(*second)), strict=True))


def measure_ridge(train: list, held_out: list, size: int, strength: float, residual: bool) -> dict[str, float]:
    """
    Ridge regression from the state of a tick, or from its state and action, to the actions of the 13 ticks after it;
    with the action, to what is added to the last one.
    """
    first = 0 if residual else size

    def features(frames: torch.Tensor) -> torch.Tensor:
        flat = frames[..., first:].flatten(-2).double()
        return torch.cat((flat, torch.ones_like(flat[..., :1])), dim=-1)

    def base(frames: torch.Tensor) -> torch.Tensor:
        return frames[..., -1:, :size] if residual else frames[..., -1:, :size] * 0

    weights = []
    for ahead in range(1, AHEAD + 1):
        pairs = [(one[:-ahead], one[ahead:]) for one in train if len(one) > ahead]
        inputs = torch.cat([features(now) for now, _ in pairs])
        outputs = torch.cat([(later[..., :size] - base(now)).flatten(-2) for now, later in pairs]).double()
        penalty = strength * torch.eye(inputs.shape[1], dtype=inputs.dtype, device=inputs.device)
        weights.append(torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ outputs))

    def forecast(frames: torch.Tensor, ahead: int) -> torch.Tensor:
        moved = (features(frames) @ weights[ahead - 1]).float().unflatten(-1, (frames.shape[-2], size))
        return base(frames) + moved

    def open_loop(known: torch.Tensor) -> torch.Tensor:
        return torch.cat([forecast(known[:, -1:], ahead) for ahead in range(1, AHEAD + 1)], dim=1)

    return measure(lambda frames: forecast(frames, 1), open_loop, held_out, size)
