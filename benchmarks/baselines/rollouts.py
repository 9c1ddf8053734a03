"""A GRU that forecasts a body tick by tick, and the windows of recordings that it is trained and measured on."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import nn

from benchmarks.baselines.common import count_parameters, fit, say
from creature.errors import UserError
from creature.rounds.open_loop import AHEAD, BEFORE, open_loop_starts

WINDOW = BEFORE + AHEAD  # ticks of a training sample, as of those that are forecast
BATCH = 32


def open_loop_windows(recordings: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Recordings [T, ...] -> what is known [windows, BEFORE, ...], what comes [windows, AHEAD, ...].

    UserError where every recording is too short.
    """
    pairs = [
        (recording[start - BEFORE : start], recording[start : start + AHEAD])
        for recording in recordings
        for start in open_loop_starts(len(recording))
    ]
    if not pairs:
        raise UserError("no validation recording lasts 3.04 s, as forecasting a second takes: import longer ones")
    known, comes = zip(*pairs, strict=True)
    return torch.stack(known), torch.stack(comes)


def training_windows(recordings: list[torch.Tensor], seed: int) -> Iterator[dict]:
    """Endless random windows: `frames` [BATCH, WINDOW, ...], `mask` [BATCH, WINDOW] where the recording is shorter."""
    draw = np.random.default_rng(seed)
    lengths = np.array([len(recording) for recording in recordings])
    while True:
        frames = recordings[0].new_zeros(BATCH, WINDOW, *recordings[0].shape[1:])
        mask = torch.zeros(BATCH, WINDOW, dtype=torch.bool, device=frames.device)
        for row, place in enumerate(draw.choice(len(recordings), BATCH, p=lengths / lengths.sum())):
            first = draw.integers(max(1, lengths[place] - WINDOW + 1))
            window = recordings[place][first : first + WINDOW]
            frames[row, : len(window)], mask[row, : len(window)] = window, True
        yield {"frames": frames, "mask": mask}


class Forecaster(nn.Module):
    """
    The next tick of a body as a residual to its last sub-frame (Martinez et al. 2017, "On human motion prediction using
    recurrent neural networks").

    A frame is the numbers of one sub-frame; a tick has several. `tidy` maps frames [..., numbers] that were added up
    onto frames that can be, such as rotations.
    """

    def __init__(self, recordings: list[torch.Tensor], hidden: int, layers: int = 2, dropout: float = 0.2, tidy=None):
        super().__init__()
        frames = torch.cat(recordings)
        self.subframes, numbers = frames.shape[1:]
        steps = torch.cat([recording[1:] - recording[:-1, -1:] for recording in recordings])
        self.register_buffer("mean", frames.mean((0, 1)))
        self.register_buffer("std", frames.std((0, 1)).clamp(min=1e-2))
        self.register_buffer("scale", steps.square().mean((0, 1)).sqrt().clamp(min=1e-4))
        self.in_proj = nn.Linear(self.subframes * numbers, hidden)
        self.gru = nn.GRU(hidden, hidden, layers, batch_first=True, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(hidden, self.subframes * numbers)
        nn.init.normal_(self.out_proj.weight, std=0.1 * hidden**-0.5)  # begins near repeating the last command
        nn.init.zeros_(self.out_proj.bias)
        self.tidy = tidy or (lambda frames: frames)

    def forward(self, frames: torch.Tensor, own: int = 1) -> torch.Tensor:
        """frames [B, T, sub-frames, numbers] -> the ticks 1 to T + own - 1, the last own - 1 from its own outputs."""
        found, state = self.step(frames)
        ticks = [found]
        while len(ticks) < own:
            found, state = self.step(ticks[-1][:, -1:], state)
            ticks.append(found)
        return torch.cat(ticks, dim=1)

    def step(self, frames: torch.Tensor, state=None) -> tuple[torch.Tensor, torch.Tensor]:
        """The ticks after each of frames [B, T, ...], and the state of the GRU."""
        normal = ((frames - self.mean) / self.std).flatten(-2)
        hidden, state = self.gru(self.in_proj(self.dropout(normal)), state)
        residual = self.out_proj(self.dropout(hidden)).float().unflatten(-1, (self.subframes, -1)) * self.scale
        return self.tidy(frames[:, :, -1:] + residual), state


def measure_grus(train, options, tidy, loss: Callable, evaluate: Callable, lowest: str) -> dict[str, list[dict]]:
    """
    The figures of every seed, by name of the recipe: hidden sizes, learning rates, trained on recorded ticks alone or
    also on its own outputs.

    Args:
        train: recordings [T, sub-frames, numbers]. tidy: of `Forecaster`.
        loss: the ticks found, the ticks that came, [B, T, sub-frames, numbers] each -> the error of each tick [B, T].
        evaluate: model -> figures. lowest: the one that decides when training has been long enough.
    """
    rows = {}
    recipes = [(h, rate, own) for h in options.hidden for rate in options.learning_rates for own in (1, AHEAD)]
    still = torch.cat([loss(one[:-1, -1:].expand_as(one[1:])[None], one[1:][None])[0] for one in train]).mean()
    for hidden, rate, own in recipes:
        for seed in options.seeds:
            torch.manual_seed(seed)
            model = Forecaster(train, hidden, tidy=tidy).to(options.device)
            name = f"GRU {count_parameters(model)}, rate {rate:g}" + (", own outputs" if own > 1 else "")
            say(f"{name}, seed {seed}")

            def of_repeating(batch: dict, model=model, own=own) -> torch.Tensor:
                errors = loss(model(batch["frames"][:, :-own], own), batch["frames"][:, 1:])
                return errors[batch["mask"][:, 1:]].mean() / still

            batches, now = training_windows(train, seed), partial(evaluate, model)
            figures = fit(model, of_repeating, batches, now, lowest, options.steps, rate)
            rows.setdefault(name, []).append(figures)
    return rows
