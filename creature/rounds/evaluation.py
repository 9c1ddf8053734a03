"""Every stream and every sense over the clips of a validation split, as a run and scripts/evaluate_recordings.py do."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from creature.data import collate_clips
from creature.data.recordings.rows import ARGUMENTS, EvaluationClips
from creature.rounds.metrics import stream_metrics, stream_sums
from processing_creature import TARGETS
from senses_creature import SENSE_TABLE

if TYPE_CHECKING:
    from datasets import Dataset

SIZED = 4  # clips whose vectors are measured
COPIES = {name for sense in SENSE_TABLE if sense.copy_of for name in ARGUMENTS[sense.name]}


def evaluate_clips(config, clips: "Dataset", sums_of: Callable[[EvaluationClips, str], np.ndarray]) -> dict[str, float]:
    """
    `stream_metrics` of the clips, and what each sense is worth: `drop_<sense>` is the loss without it, `wrong_<sense>`
    that with another clip's; where there are several streams, also of each, `<stream>_drop_<sense>`.

    Args:
        config: of the creature. clips: as `make_clips` gives them.
        sums_of: (clips, what is done to them, "" for nothing) -> `clip_sums` of all of them, [clips, K].
    """
    streams = [name for name, weight in config.loss_weights.items() if weight]
    metrics = stream_metrics(config, sums_of(EvaluationClips(clips), ""))
    present = [name for name, arguments in ARGUMENTS.items() if set(arguments) & set(clips.column_names)]
    for sense in present:
        for how in ("without", "wrong") if len(clips) > 1 else ("without",):
            name = f"{'drop' if how == 'without' else 'wrong'}_{sense}"
            found = stream_metrics(config, sums_of(EvaluationClips(clips, **{how: sense}), name))
            metrics[name] = found["loss"]
            if len(streams) > 1:
                metrics |= {
                    f"{stream}_{name}": found[f"{stream}_loss"] for stream in streams if f"{stream}_loss" in found
                }
    return metrics


@torch.no_grad()
def clip_sums(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """`stream_sums` of a batch of `collate_clips` on the model's device, [clips, K]."""
    senses = {name: value for name, value in batch.items() if name not in TARGETS}
    hidden = model(**senses, logits_to_keep=1, use_cache=False).last_hidden_state
    # The head knows the last command from the targets, also where the copy of it is missing or wrong.
    return stream_sums(model, hidden, {name: value for name, value in batch.items() if name not in COPIES})


@torch.no_grad()
def sense_sizes(model, clips: EvaluationClips) -> dict[str, float]:
    """
    The root mean square of the vectors that each sense adds, beside the internal voice, divided by that of the token
    table, over the first clips that have it: 0 before training, and far above 1 where a sense drowns the voice.
    """
    table, sizes = model.model.embed_tokens.weight.float().square().mean(), {}
    for sense in SENSE_TABLE:
        having = [clip for clip in map(clips.__getitem__, range(len(clips))) if set(clip) & set(sense.arguments)]
        if having:
            batch = collate_clips(having[:SIZED])
            given = {name: batch[name].to(model.device) for name in ARGUMENTS[sense.name] if name in batch}
            for vectors in model.model.senses(given, model.model.embed_tokens):
                felt = vectors[vectors.abs().amax(-1) > 0].float()
                sizes[sense.name] = (felt.square().mean() / table).sqrt().item() if len(felt) else 0.0
    return sizes
