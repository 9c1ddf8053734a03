"""Motor commands up to a second ahead in open loop: where a forecast begins, how it is measured, that of a creature.

The dedicated models of benchmarks/baselines/ are measured with the same windows by the same functions.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from creature.data import collate_clips
from creature.rounds.metrics import degrees_between, stream_metrics, stream_sums
from motor_creature import matrix_from_6d, quaternion_to_6d, unpack_animation
from processing_creature import TARGETS

BEFORE, AHEAD, STRIDE = 25, 13, 5  # ticks: 2 s, 1.04 s, 0.4 s
TICK_MS = 80
MILLISECONDS = (80, 160, 320, 400, 1000)  # at which joint angles are compared
PAST = 128  # ticks before a forecast that a creature sees at most
WINDOWS, PIECES = 64, 8  # that are computed at once: of up to PAST + AHEAD ticks, of up to a training clip's
# The targets of a command, and the name under which it is emitted and fed back.
COMMANDS = {"rotation_targets": "animation", "action_targets": "action"}


def open_loop_starts(ticks: int, before: int = BEFORE, after: int = AHEAD, stride: int = STRIDE) -> range:
    """
    The first tick that is forecast, of every window of a recording of `ticks` ticks.

    `before` ticks and more are known, 0 to start - 1, and `after` ticks are forecast, start to start + after - 1.
    """
    return range(before, ticks - after + 1, stride)


def command_span(clip: dict[str, np.ndarray]) -> slice:
    """
    The ticks of a clip from the first to the last that has a command; of an action, one at which the body was measured,
    too, where it ever was.
    """
    mask = clip["animation_target_mask"]
    if "action_targets" in clip and "body_mask" in clip:
        mask = mask & clip["body_mask"]
    there = np.flatnonzero(mask)
    return slice(int(there[0]), int(there[-1]) + 1) if len(there) else slice(0, 0)


def angles_ahead(found: torch.Tensor, target: torch.Tensor, milliseconds: Iterable[int]) -> dict[str, float]:
    """
    The angle between rotation matrices [windows, ticks, sub-frames, joints, 3, 3] in degrees, mean over windows and
    joints, at the sub-frame that ends so many milliseconds after the last one that is known.
    """
    places = [ms * found.shape[2] // TICK_MS - 1 for ms in milliseconds]
    errors = degrees_between(found.flatten(1, 2)[:, places], target.flatten(1, 2)[:, places]).mean((0, 2))
    return {f"{ms} ms": error for ms, error in zip(milliseconds, errors.tolist(), strict=True)}


def action_errors(found: torch.Tensor, target: torch.Tensor, repeated: torch.Tensor) -> tuple[float, float]:
    """
    (the mean absolute error, the Huber loss divided by that of repeating the last command) of normalised actions, all
    of the same shape.
    """
    ratio = F.huber_loss(found, target) / F.huber_loss(repeated, target)
    return (found - target).abs().mean().item(), ratio.item()


# ---- A creature ----


@torch.no_grad()
def forecast(model, windows: list[dict[str, np.ndarray]], command: str, ahead: int = AHEAD) -> torch.Tensor:
    """
    What a creature commands in the ticks after each window, from its own commands alone: [windows, ahead, ...] as
    `forward` emits it, on the CPU.

    Windows of one length are computed together, WINDOWS at a time, with a cache.

    Args:
        model: a MultiModalCreature in evaluation mode; autocast, where wanted, is the caller's.
        windows: what is known before, the senses of `forward`, [T, ...] each; afterwards the inner voice is silent, and
            all others are absent.
        command: "animation" or "action", which the senses have to hold: what is emitted, and fed back as its copy.
    """
    lengths, found = [max(map(len, window.values())) for window in windows], {}
    for length in dict.fromkeys(lengths):
        places = [place for place, other in enumerate(lengths) if other == length]
        for group in (places[first : first + WINDOWS] for first in range(0, len(places), WINDOWS)):
            commands = _forecast_together(model, [windows[place] for place in group], command, ahead)
            found |= dict(zip(group, commands, strict=True))
    return torch.stack([found[place] for place in range(len(windows))])


def _forecast_together(model, windows: list[dict[str, np.ndarray]], command: str, ahead: int) -> torch.Tensor:
    """`forecast` of windows of one length."""
    senses = {name: value.to(model.device) for name, value in collate_clips(windows).items()}
    silent, cache, found = {}, None, []
    if "input_ids" in senses and model.config.null_token_id is not None:  # the inner voice goes on, and says nothing
        silent["input_ids"] = senses["input_ids"].new_full((len(windows), 1), model.config.null_token_id)
    there = torch.ones(len(windows), 1, dtype=torch.bool, device=model.device)
    for _ in range(ahead):
        options = {"output_streams": ("animation",), "use_cache": True, "logits_to_keep": 1}
        output = model(**senses, past_key_values=cache, return_logits=False, **options)
        found.append(output[command][:, -1].float())
        senses, cache = silent | {command: found[-1][:, None], f"{command}_mask": there}, output.past_key_values
    return torch.stack(found, dim=1).cpu()


def measure_open_loop(
    model, clips: Iterable[dict[str, np.ndarray]], context: int, milliseconds: Iterable[int] = MILLISECONDS
) -> dict[str, dict]:
    """
    The figures of a creature's commands, and of repeating the last one, by "rotation" and "action", as far as the clips
    have such targets.

    One tick ahead, every tick but the first is forecast from all senses before it. In open loop, the creature perceives
    a clip until a window begins, and only its own commands afterwards.

    Args:
        model: a MultiModalCreature in evaluation mode; autocast, where wanted, is the caller's.
        clips: whole recordings, as `EvaluationClips` gives them.
        context: the most ticks that the creature sees at a time.
        milliseconds: see `angles_ahead`.

    Returns:
        `windows`, their number, and by "creature" and "repeating" the figures: of rotations the error in degrees at
        each of `milliseconds` and `1 tick ratio`, of actions `1 tick error`, `1 tick ratio`, `1 s error`, `1 s ratio`
        (errors in standard deviations, ratios to repeating). Without a window, those of one tick.
    """
    if not model.config.loss_weights["animation"]:
        return {}
    clips, measured = list(clips), {}
    for name, command in COMMANDS.items():
        chosen = [clip for clip in clips if name in clip and len(clip[name][command_span(clip)]) > 1]
        if not chosen:
            continue
        part = name.removesuffix("_targets")
        one = stream_metrics(model.config, _one_tick_sums(model, chosen, name, context))
        creature, repeating = {}, {}
        windows = list(open_loop_windows(chosen, name, min(PAST, context - AHEAD + 1)))
        if windows:
            known, comes, last = zip(*windows, strict=True)
            found = forecast(model, [*known], command)
            target, last = (torch.from_numpy(np.stack(values)) for values in (comes, last))
            still = last[:, None, None].expand_as(target)
        if part == "rotation":
            if windows:
                found = unpack_animation(model.config, found)[0]
                found, target, still = (matrix_from_6d(quaternion_to_6d(values)) for values in (found, target, still))
                creature |= angles_ahead(found, target, milliseconds)
                repeating |= angles_ahead(still, target, milliseconds)
            creature["1 tick ratio"], repeating["1 tick ratio"] = one["rotation_ratio"], 1.0
        else:
            creature |= {"1 tick error": one["action_error"], "1 tick ratio": one["action_ratio"]}
            repeating |= {"1 tick error": one["action_error_repeating"], "1 tick ratio": 1.0}
            if windows:
                for figures, values in ((creature, found), (repeating, still)):
                    figures["1 s error"], figures["1 s ratio"] = action_errors(values, target, still)
        measured[part] = {"windows": len(windows), "creature": creature, "repeating": repeating}
    return measured


def open_loop_windows(clips: list[dict], name: str, past: int) -> Iterator[tuple[dict, np.ndarray, np.ndarray]]:
    """
    (the senses of up to `past` ticks [T, ...], the commands of the AHEAD ticks after them, the last sub-frame of the
    last command before them) of every window; `name`: that of the targets.
    """
    for clip in clips:
        span = command_span(clip)
        targets = clip[name][span]
        for start in open_loop_starts(len(targets)):
            stop = span.start + start
            senses = {sense: value for sense, value in clip.items() if sense not in TARGETS}
            known = {sense: value[max(0, stop - past) : stop] for sense, value in senses.items()}
            yield known, targets[start : start + AHEAD], targets[start - 1, -1]


def _one_tick_sums(model, clips: list[dict], name: str, context: int) -> np.ndarray:
    """`stream_sums` of all ticks of `command_span` but the first of each clip; `name`: that of the targets."""
    pieces = []
    for clip in clips:
        span, clip = command_span(clip), {key: clip[key] for key in clip if key == name or key not in TARGETS}
        mask = np.zeros(len(clip[name]), dtype=bool)
        mask[span.start + 1 : span.stop] = True
        clip["animation_target_mask"] = mask
        # Pieces share a tick, because the first tick of each is nobody's target.
        for first in range(0, max(1, len(mask) - 1), context - 1):
            pieces.append({key: value[first : first + context] for key, value in clip.items()})
    sums = []
    for first in range(0, len(pieces), PIECES):
        batch = collate_clips(pieces[first : first + PIECES])
        batch = {key: value.to(model.device) for key, value in batch.items()}
        senses = {key: value for key, value in batch.items() if key not in TARGETS}
        hidden = model(**senses, logits_to_keep=1, use_cache=False).last_hidden_state
        # With the copies, which know the last command also where it was nobody's target.
        sums.append(stream_sums(model, hidden, batch).cpu().numpy())
    return np.concatenate(sums)
