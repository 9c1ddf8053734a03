"""Every stream and every sense over the clips of a validation split, as a run and scripts/evaluate_recordings.py do."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch

from creature.data import collate_clips
from creature.data.recordings.rows import ARGUMENTS, EvaluationClips
from creature.rounds.metrics import stream_metrics, stream_sums
from losses_creature import IGNORE_INDEX
from processing_creature import ABSENT, TARGETS
from senses_creature import SENSE_TABLE

if TYPE_CHECKING:
    from datasets import Dataset

SIZED = 4  # clips whose vectors are measured
COPIES = {name for sense in SENSE_TABLE if sense.copy_of for name in ARGUMENTS[sense.name]}


@dataclass
class CodeHabits:
    """
    What is known of codes without any context: `shares` [books, codebook_size], how often each code of a book occurs
    (one more than was counted, so that none is impossible); `repeats` [books], how often a code is that of the tick
    before.
    """

    shares: np.ndarray
    repeats: np.ndarray


def evaluate_clips(config, clips: "Dataset", sums: np.ndarray, habits: CodeHabits | None = None) -> dict[str, float]:
    """
    `stream_metrics` of the clips, and what each sense is worth: `drop_<sense>` is the loss without it, `wrong_<sense>`
    that with another clip's; where there are several streams, also of each, `<stream>_drop_<sense>`.

    Args:
        config: of the creature. clips: as `make_clips` gives them.
        sums: `variant_sums` of all of them, of the variants that `variants_of` names; the clips in any order.
        habits: of the training clips; with them, `code_baselines` stand beside the loss of the audio stream.
    """
    streams = [name for name, weight in config.loss_weights.items() if weight]
    metrics = stream_metrics(config, sums[:, 0])
    if habits is not None and "audio_loss" in metrics:
        metrics |= code_baselines(clips, habits)
    for number, (how, sense) in enumerate(variants_of(clips), 1):
        found, name = stream_metrics(config, sums[:, number]), f"{how}_{sense}"
        metrics[name] = found["loss"]
        if len(streams) > 1:
            metrics |= {f"{stream}_{name}": found[f"{stream}_loss"] for stream in streams if f"{stream}_loss" in found}
    return metrics


def variants_of(clips: "Dataset") -> list[tuple[str, str]]:
    """
    What is done to clips to see what a sense is worth, as (how, sense): ("drop", "audio") takes it away, ("wrong",
    "audio") gives that of another clip, if there is one. Of every sense that any of the clips has.
    """
    present = [sense for sense, arguments in ARGUMENTS.items() if set(arguments) & set(clips.column_names)]
    return [(how, sense) for sense in present for how in ("drop", "wrong") if how == "drop" or len(clips) > 1]


def code_habits(config, parts: Iterable["Dataset"]) -> CodeHabits | None:
    """The `CodeHabits` of clips; None where none of them has a voice, or the creature does not learn to speak."""
    if not config.loss_weights["audio"]:
        return None
    books, size = config.num_audio_codebooks, config.audio_codebook_size
    counts, repeats, pairs = np.zeros((books, size)), np.zeros(books), 0
    for codes in _codes_of(parts):
        for book in range(books):
            counts[book] += np.bincount(codes[:, book], minlength=size)
        repeats += (codes[1:] == codes[:-1]).sum(axis=0)
        pairs += max(0, len(codes) - 1)
    if not pairs:
        return None
    shares = (counts + 1) / (counts + 1).sum(axis=1, keepdims=True)
    return CodeHabits(shares, (repeats + 1) / (pairs + 2))


def code_baselines(clips: "Dataset", habits: CodeHabits) -> dict[str, float]:
    """
    What the codes of clips cost without a creature, each code from the second tick on.

    `audio_frequent` is the accuracy of always saying the code of a book that was the most frequent in training, and
    `audio_frequent_loss` the nats a code of the frequencies in training; `audio_repeating_loss` that of repeating the
    last code as often as it was repeated in training, and else following those frequencies.
    """
    nats, repeating, right, count = 0.0, 0.0, 0, 0
    for codes in _codes_of([clips]):
        books = np.arange(codes.shape[1])
        shares, same = habits.shares[books, codes[1:]], codes[1:] == codes[:-1]
        nats -= np.log(shares).sum()
        repeating -= np.log(habits.repeats * same + (1 - habits.repeats) * shares).sum()
        right += (codes[1:] == habits.shares.argmax(axis=1)).sum()
        count += same.size
    if not count:
        return {}
    return {
        "audio_frequent": float(right / count),
        "audio_frequent_loss": float(nats / count),
        "audio_repeating_loss": float(repeating / count),
    }


def _codes_of(parts: Iterable["Dataset"]) -> Iterator[np.ndarray]:
    """The codes [T, books] of every clip that has a voice; of a voice that ends before the clip, those until then."""
    for clips in parts:
        if "audio_targets" in clips.column_names:
            for row in clips.select_columns("audio_targets"):
                if row["audio_targets"] is not None:
                    codes = row["audio_targets"]
                    yield codes[(codes != IGNORE_INDEX).all(axis=1)]


@torch.no_grad()
def clip_sums(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """`stream_sums` of a batch of `collate_clips` on the model's device, [clips, K]."""
    senses = {name: value for name, value in batch.items() if name not in TARGETS}
    hidden = model(**senses, logits_to_keep=1, use_cache=False).last_hidden_state
    # The head knows the last command from the targets, also where the copy of it is missing or wrong.
    return stream_sums(model, hidden, {name: value for name, value in batch.items() if name not in COPIES})


def collate_pairs(rows: list[tuple[dict, dict | None]]) -> dict:
    """`collate_clips` of the clips of `ClipPairs` and, under "wrong", of the other senses, unless the split has one."""
    clips, others = zip(*rows, strict=True)
    batch = collate_clips(clips)
    if others[0] is not None:
        batch["wrong"] = collate_clips(others, ticks=next(iter(batch.values())).shape[1])
    return batch


@torch.no_grad()
def variant_sums(model, batch: dict, variants: list[tuple[str, str]]) -> torch.Tensor:
    """
    `clip_sums` of a batch of `collate_pairs` on the model's device, as it is and in each of the variants of
    `variants_of`, [clips, 1 + variants, K].
    """
    batch = dict(batch)
    others = batch.pop("wrong", {})
    sums = [clip_sums(model, batch)]
    for how, sense in variants:
        # Computed also where no clip of this batch has the sense: all processes of a sharded model call it as often.
        given = {name: torch.full_like(batch[name], ABSENT[name]) for name in ARGUMENTS[sense] if name in batch}
        if how == "wrong":
            given |= {name: others[name] for name in given if name in others}
        sums.append(clip_sums(model, batch | given))
    return torch.stack(sums, dim=1)


@torch.no_grad()
def sense_sizes(model, clips: "Dataset") -> dict[str, float]:
    """
    The root mean square of the vectors that each sense adds, beside the internal voice, divided by that of the token
    table, over the first clips that have it: 0 before training, and far above 1 where a sense drowns the voice.
    """
    table, sizes = model.model.embed_tokens.weight.float().square().mean(), {}
    rows = EvaluationClips(clips)
    for sense in SENSE_TABLE:
        names = set(sense.arguments) & set(clips.column_names)
        having = (clip for clip in map(rows.__getitem__, range(len(rows)) if names else ()) if names & clip.keys())
        measured = list(islice(having, SIZED))
        if measured:
            batch = collate_clips(measured)
            given = {name: batch[name].to(model.device) for name in ARGUMENTS[sense.name] if name in batch}
            for vectors in model.model.senses(given, model.model.embed_tokens):
                felt = vectors[vectors.abs().amax(-1) > 0].float()
                sizes[sense.name] = (felt.square().mean() / table).sqrt().item() if len(felt) else 0.0
    return sizes
