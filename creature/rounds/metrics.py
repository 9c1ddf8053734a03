"""Metrics of every stream over a set of clips, from sums that are computed clip by clip.

A text is judged on all of its targets and on the words alone, which a silence of many ticks would hide; codes also by
codebook; motor commands in degrees and standard deviations, beside repeating the last command.
"""

import numpy as np
import torch

from losses_creature import IGNORE_INDEX, linear_token_losses
from motor_creature import (
    COMMAND_PARTS,
    SMALLEST_ERROR,
    animation_targets_present,
    command_errors,
    last_command,
    matrix_from_6d,
    quaternion_to_6d,
    repeat,
)
from streams_creature import text_target_weights

TEXT_SUMS = ("nats", "weight", "word_nats", "words", "right", "silent", "ticks", "clips", "whole")
PART_NAMES = tuple(name.removesuffix("_targets") for name in COMMAND_PARTS)  # rotation, blend_shape, eye, action


def sum_names(config) -> list[str]:
    """What the columns of `stream_sums` hold, by the streams of a configuration that have a weight."""
    weights, names = config.loss_weights, []
    for stream in ("internal_text", "external_text"):
        if weights[stream]:
            names += [f"{stream} {name}" for name in TEXT_SUMS]
    if weights["audio"]:
        for book in range(config.num_audio_codebooks):
            names += [f"audio {book} {name}" for name in ("nats", "codes", "right", "same")]
    if weights["animation"]:
        names += [f"{part} {name}" for part in PART_NAMES for name in ("error", "repeating")]
        names += ["degrees", "degrees repeating", "off", "off repeating", "rotations", "actions"]
    return names


@torch.no_grad()
def stream_sums(model, hidden: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    float32 [B, len(sum_names)]: the sums of every clip.

    model: a MultiModalCreature. hidden [B, T, hidden_size]: its last hidden state for batch, the arguments of
    `MultiModalCreature.forward`, targets included.
    """
    config, columns = model.config, []
    before = hidden[:, :-1]
    for stream, targets in (("internal_text", "labels"), ("external_text", "external_text_targets")):
        if config.loss_weights[stream]:
            own = stream == "external_text"
            states, head = (model.streams.external_text.proj(before), model.model.embed_tokens.weight) if own else (
                before, model._head()
            )  # fmt: skip
            columns += _text_sums(config, states, head, batch.get(targets))
    if config.loss_weights["audio"]:
        columns += _audio_sums(model, before, batch.get("audio_targets"))
    if config.loss_weights["animation"]:
        columns += _animation_sums(model, before, batch)
    zeros = before.new_zeros(len(before), dtype=torch.float32)
    return torch.stack([zeros if column is None else column.float() for column in columns], dim=1)


def _text_sums(config, states: torch.Tensor, head, targets: torch.Tensor | None) -> list:
    if targets is None:
        return [None] * len(TEXT_SUMS)
    targets = targets[:, 1:]
    losses, predicted = (x.view_as(targets) for x in linear_token_losses(states.flatten(0, 1), head, targets.flatten()))
    known, weight = targets != IGNORE_INDEX, text_target_weights(config, targets)
    null = -1 if config.null_token_id is None else config.null_token_id
    words = known & (targets != null)
    right = (predicted == targets) & words
    whole = (right == words).all(dim=1) & words.any(dim=1)
    silent = (predicted == null) & known
    sums = (losses * weight, weight, losses * words, words, right, silent, known)
    return [*(value.sum(dim=1) for value in sums), words.any(dim=1), whole]


def _audio_sums(model, before: torch.Tensor, targets: torch.Tensor | None) -> list:
    books = model.config.num_audio_codebooks
    if targets is None:
        return [None] * 4 * books
    following, table = targets[:, 1:], model.model.senses.own_voice.code_table
    logits = model.streams.audio(before.flatten(0, 1), following.flatten(0, 1), table).float()
    logits = logits.unflatten(0, following.shape[:2])  # [B, T - 1, books, codes]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 2), following.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    ).view_as(following)
    known = following != IGNORE_INDEX
    right, same = (logits.argmax(-1) == following) & known, (targets[:, :-1] == following) & known
    return [value[..., book].sum(dim=1) for book in range(books) for value in (losses, known, right, same)]


def _animation_sums(model, before: torch.Tensor, batch: dict) -> list:
    mask = animation_targets_present(batch)
    if mask is None:
        return [None] * (2 * len(COMMAND_PARTS) + 6)
    config = model.config
    last = {name: value[:, :-1] for name, value in last_command(config, batch, mask).items()}
    mask = mask[:, 1:]
    commands = model.streams.animation(before, last), repeat(config, last)
    columns = []
    for error, still in zip(*(command_errors(command, batch) for command in commands), strict=True):
        columns += [None, None] if error is None else [error.sum(1), still.sum(1) + SMALLEST_ERROR * mask.sum(1)]
    turned, moved = batch.get("rotation_targets"), batch.get("action_targets")
    columns += [None, None] if turned is None else [_degrees(c["rotation_targets"], turned, mask) for c in commands]
    columns += [None, None] if moved is None else [_off(c["action_targets"], moved, mask) for c in commands]
    return [*columns, *(None if given is None else mask.sum(dim=1) for given in (turned, moved))]


def degrees_between(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Rotation matrices [..., 3, 3] -> the angle of the rotation from one to the other, [...]."""
    # Twice the arc sine of half the chord: exact for small angles too, unlike the arc cosine of the trace.
    chord = (first - second).square().sum((-2, -1)).clamp(max=8.0).sqrt() / 8**0.5
    return torch.rad2deg(2 * torch.arcsin(chord))


def _degrees(found: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    The mean angle between rotation matrices [B, T - 1, sub-frames, joints, 3, 3] and the quaternions of the targets,
    summed over ticks.
    """
    angle = degrees_between(found, matrix_from_6d(quaternion_to_6d(targets[:, 1:].float()))).mean((-2, -1))
    return angle.masked_fill(~mask, 0.0).sum(dim=1)


def _off(found: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean absolute error of normalised actions [B, T - 1, sub-frames, size], summed over ticks."""
    return (found - targets[:, 1:].float()).abs().mean((-2, -1)).masked_fill(~mask, 0.0).sum(dim=1)


def stream_metrics(config, sums: np.ndarray) -> dict[str, float]:
    """
    The metrics of a set of clips; sums [clips, len(sum_names)].

    loss: the weighted sum of the streams' losses. Of a text: its loss, `_words_loss` and `_words_accuracy` without the
    silent ticks, `_silence` (the share of ticks at which it would be silent), `_whole` (the share of clips whose words
    are all right). Of codes: loss and accuracy, `_repeating` (the accuracy of the tick before), the loss of each
    codebook. Of motor commands: the loss, 1 for repeating the last command, and of each part its error divided by that;
    `rotation_degrees` and `action_error` (in standard deviations), each beside repeating.
    """
    totals = dict(zip(sum_names(config), np.asarray(sums, np.float64).sum(axis=0).tolist(), strict=True))
    metrics, weights = {}, config.loss_weights

    def ratio(name: str, upper: str, lower: str) -> None:
        if totals.get(lower):
            metrics[name] = totals[upper] / totals[lower]

    for stream in ("internal_text", "external_text"):
        ratio(f"{stream}_loss", f"{stream} nats", f"{stream} weight")
        ratio(f"{stream}_words_loss", f"{stream} word_nats", f"{stream} words")
        ratio(f"{stream}_words_accuracy", f"{stream} right", f"{stream} words")
        ratio(f"{stream}_whole", f"{stream} whole", f"{stream} clips")
        ratio(f"{stream}_silence", f"{stream} silent", f"{stream} ticks")
    if weights["audio"]:
        for name in ("nats", "codes", "right", "same"):
            totals[f"audio {name}"] = sum(totals[f"audio {book} {name}"] for book in range(config.num_audio_codebooks))
        ratio("audio_loss", "audio nats", "audio codes")
        ratio("audio_accuracy", "audio right", "audio codes")
        ratio("audio_repeating", "audio same", "audio codes")
        for book in range(config.num_audio_codebooks):
            ratio(f"audio_book_{book}_loss", f"audio {book} nats", f"audio {book} codes")
    for part in PART_NAMES:
        ratio(f"{part}_ratio", f"{part} error", f"{part} repeating")
    ratios = [metrics[f"{part}_ratio"] for part in PART_NAMES if f"{part}_ratio" in metrics]
    if ratios:
        metrics["animation_loss"] = sum(ratios) / len(ratios)
    for name, count in (("degrees", "rotations"), ("off", "actions")):
        label = {"degrees": "rotation_degrees", "off": "action_error"}[name]
        ratio(label, name, count)
        ratio(f"{label}_repeating", f"{name} repeating", count)
    losses = {name: metrics[f"{name}_loss"] for name in weights if f"{name}_loss" in metrics}
    return {"loss": sum(weights[name] * value for name, value in losses.items())} | metrics
