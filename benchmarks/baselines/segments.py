"""All senses and streams of recordings: the creature, beside one that reads every sense as a position of its own.

The plain way to join senses is to concatenate them: voice, heard words, sound, pictures, body, touch and own outputs
are seven positions of one long sequence, and the streams read the last one of a tick. Encoders, layers, heads and loss
are those of the creature, which adds the seven vectors up instead. Both are trained from scratch, with the same clips
in the same order, and end where their loss on the validation split is lowest. "ticks/s" is of the training steps,
evaluation left out; "ratio" columns are divided by repeating the last command.
"""

import argparse
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from benchmarks.baselines.common import count_parameters, fit, print_table, say
from configuration_creature import STREAMS, CreatureConfig
from creature.data import collate_clips, collate_rows, spread_pictures
from creature.data.recordings.clips import organs_of
from creature.data.recordings.rows import EvaluationClips, open_rows
from creature.data.recordings.schema import load_recordings
from creature.data.text.tokenizer import load_tokenizer
from creature.errors import UserError
from creature.rounds.evaluation import clip_sums
from creature.rounds.metrics import stream_metrics
from creature.settings import DataArguments
from modeling_creature import CreatureModel, MultiModalCreature
from processing_creature import CreatureProcessor
from senses_creature import SENSE_TABLE

TICKS, ROWS = 512, 16  # of a row, and rows of a step: 8,192 ticks
CLIPS = 8  # that are evaluated at once
SEGMENTS = ("internal_voice", *(sense.name for sense in SENSE_TABLE if not sense.copy_of), "own")


class SegmentedModel(CreatureModel):
    """A backbone over one position for each of `SEGMENTS` of every tick, in their order."""

    def __init__(self, config: CreatureConfig):
        super().__init__(config)
        self.segment_embedding = nn.Embedding(len(SEGMENTS), config.hidden_size)
        nn.init.normal_(self.segment_embedding.weight, std=config.initializer_range)

    def forward(self, input_ids=None, position_ids=None, senses=None, **kwargs):
        """As `CreatureModel.forward`, without a cache: T ticks in, their hidden states [B, T, hidden_size] out."""
        arguments = {name: {} for name in SEGMENTS}
        for sense in SENSE_TABLE:
            given = {name: senses[name] for name in (*sense.arguments, sense.mask) if senses.get(name) is not None}
            arguments["own" if sense.copy_of else sense.name] |= given
        parts = [self.embed(None, None, given) if given else None for given in arguments.values()]
        if input_ids is not None:
            parts[0] = self.embed(input_ids, None, {})
        absent = torch.zeros_like(next(part for part in parts if part is not None))
        each = torch.stack([absent if part is None else part for part in parts], dim=2) + self.segment_embedding.weight
        if position_ids is not None:  # of packed clips
            places = torch.arange(len(SEGMENTS), device=position_ids.device)
            position_ids = (position_ids[..., None] * len(SEGMENTS) + places).flatten(1)
        kwargs |= {"inputs_embeds": each.flatten(1, 2), "position_ids": position_ids, "use_cache": False}
        outputs = super().forward(**kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state[:, len(SEGMENTS) - 1 :: len(SEGMENTS)]
        return outputs


def build(config: CreatureConfig, segmented: bool) -> MultiModalCreature:
    """A creature, of which `segmented` reads every sense as a position of its own."""
    model = MultiModalCreature(config)
    if segmented:
        model.model = SegmentedModel(config)
        model.tie_weights()
    return model


def report(options: argparse.Namespace) -> None:
    """Print the losses of both on the validation split, and how fast they train."""
    folder, rows = options.folders[0], {}
    recordings, facts = load_recordings(folder)
    if "validation" not in recordings:
        raise UserError(f"{folder} has no validation split: import it with --validation_fraction")
    data = DataArguments(data=[folder], clip_ticks=TICKS, cache_dir=options.cache_dir)
    for hidden in options.hidden:
        sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "sense_hidden_size": hidden}
        config = CreatureConfig(**sizes, **organs_of(recordings, facts), loss_weights=dict.fromkeys(STREAMS, 1.0))
        processor = CreatureProcessor.from_config(config, load_tokenizer())
        for segmented in (False, True):
            for rate in options.learning_rates:
                for seed in options.seeds:
                    torch.manual_seed(seed)
                    model = build(config, segmented).to(options.device)
                    how = f"{len(SEGMENTS)} positions a tick" if segmented else "one position a tick"
                    name = f"{how}, {count_parameters(model)}, rate {rate:g}"
                    say(f"{name}, seed {seed}")
                    splits, _, like = open_rows(data, [(folder, None)], processor, ROWS * options.steps, seed)
                    rows.setdefault(name, []).append(train(model, splits, like, rate, options))
                    say(f"{name}, seed {seed}: {rows[name][-1]['ticks/s']:,.0f} ticks/s")
    print_table(list(dict.fromkeys(column for seeds in rows.values() for column in seeds[0])), rows)


def train(model: MultiModalCreature, splits: dict, like: dict, rate: float, options) -> dict[str, float]:
    """Train one model on the rows of `open_rows`; its figures at its lowest loss, ticks/s the median until then."""
    clock, held_out, device = Clock(options.device), EvaluationClips(splits["validation"]), options.device

    def batches() -> Iterator[dict]:
        for first in range(0, len(splits["train"]), ROWS):
            rows = [splits["train"][number] for number in range(first, first + ROWS)]
            batch = spread_pictures(collate_rows(rows, TICKS, like))
            batch = {name: value.to(device) for name, value in batch.items()}
            clock.start()
            yield batch
            clock.stop()  # the step is over when the next batch is asked for

    def evaluate() -> dict[str, float]:
        clock.stop()
        sums = []
        for first in range(0, len(held_out), CLIPS):
            batch = collate_clips([held_out[number] for number in range(first, min(first + CLIPS, len(held_out)))])
            sums.append(clip_sums(model, {name: value.to(device) for name, value in batch.items()}).cpu().numpy())
        found = stream_metrics(model.config, np.concatenate(sums))
        found = {name: value for name, value in found.items() if name.endswith(("loss", "ratio"))}
        return found | {"ticks/s": ROWS * TICKS / float(np.median(clock.seconds))}

    return fit(model, lambda batch: model(**batch).loss, batches(), evaluate, "loss", options.steps, rate)


class Clock:
    """The seconds of every step, from its batch to the end of its work on the device."""

    def __init__(self, device: str):
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        self.seconds, self.began = [], None

    def start(self) -> None:
        self.wait()
        self.began = time.perf_counter()

    def stop(self) -> None:
        self.wait()
        if self.began is not None:
            self.seconds.append(time.perf_counter() - self.began)
        self.began = None
