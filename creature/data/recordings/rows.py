"""Rows to train on and clips to evaluate on: recordings, and text beside them, as map-style data sets."""

import hashlib
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from creature.data.loading import load_data
from creature.data.mixture import mixture_rows
from creature.data.recordings.clips import make_clips, unpack_rows
from creature.data.recordings.schema import load_recordings
from processing_creature import ABSENT, TARGETS
from senses_creature import SENSE_TABLE

if TYPE_CHECKING:
    from datasets import Dataset

    from creature.settings import DataArguments
    from processing_creature import CreatureProcessor

OPEN_ROWS = 64  # that a clip may still be put into
STEPS_OF_SHARE = 1000  # shares of a mixture are kept to a thousandth
# The arguments in which each sense arrives, efference copies and masks included.
ARGUMENTS = {"internal_voice": ("input_ids",)}
ARGUMENTS |= {sense.name: (*sense.arguments, *([sense.mask] if sense.mask else [])) for sense in SENSE_TABLE}


class PackedClips:
    """Rows of several clips, which together have at most `ticks` ticks; item n is a list of clips."""

    def __init__(self, clips: "Dataset", ticks: int, seed: int):
        self.clips, self.ticks = clips, ticks
        self.rows = pack(np.array(clips.data.column("ticks").to_numpy()), ticks, seed)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> list[dict]:
        columns = self.clips[self.rows[number]]
        clips = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return [{name: value for name, value in clip.items() if value is not None} for clip in clips]


class TextRows:
    """Rows of one block of text each; item n is a list of one clip with the internal voice alone."""

    def __init__(self, blocks: "Dataset"):
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, number: int) -> list[dict]:
        ids = np.asarray(self.blocks[number]["input_ids"]).astype(np.int32)
        return [{"input_ids": ids, "labels": ids}]


class TrainingRows:
    """The rows of all steps of a run, in their order; each part is shuffled anew whenever it begins again."""

    def __init__(self, parts: list[PackedClips | TextRows], shares: list[Fraction], count: int, seed: int):
        self.parts = parts
        self.firsts = np.cumsum([0, *map(len, parts)])
        self.order = mixture_rows([len(part) for part in parts], shares, count, seed)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, number: int) -> list[dict]:
        row = self.order[number]
        part = int(np.searchsorted(self.firsts, row, side="right")) - 1
        return self.parts[part][int(row - self.firsts[part])]


class EvaluationClips:
    """The clips of a validation split, one a row."""

    def __init__(self, clips: "Dataset"):
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, number: int) -> dict:
        return {name: value for name, value in self.clips[number].items() if name in ABSENT and value is not None}


class ClipPairs:
    """
    The clips of a validation split with the senses of another clip: (a clip, what is put in the place of its senses),
    one a row; (the clip, None) in a split of one.

    The other clip lies half the split away, so that it is of another group where there are groups of some size. Of it,
    as much is taken as the clip itself has of each sense. Rows come in such an order that the other clip is that of the
    row before or behind, and each is read once.
    """

    def __init__(self, clips: "Dataset"):
        self.clips = EvaluationClips(clips)
        self._read = lru_cache(maxsize=2)(self.clips.__getitem__)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, number: int) -> tuple[dict, dict | None]:
        if not 0 <= number < len(self):
            raise IndexError(number)  # which ends a loop over the rows
        half = len(self) // 2
        chosen = (number % 2 * half - number // 2) % len(self)
        clip = self._read(chosen)
        if not half:
            return clip, None
        other, ticks = self._read((chosen + half) % len(self)), max(map(len, clip.values()))
        wrong = {name: other[name][:ticks] for name in clip if name in other and name not in TARGETS}
        for name, value in wrong.items():
            if name.endswith("_mask") and value.shape[1:] == clip[name].shape[1:]:
                wrong[name] = value & clip[name][: len(value)]
        return clip, wrong


def pack(lengths: np.ndarray, ticks: int, seed: int) -> list[list[int]]:
    """
    Clips of these lengths as rows of at most `ticks` ticks: each, in a random order, goes into the fullest of the last
    OPEN_ROWS rows that has room for it.
    """
    rows, room = [], []
    for clip in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        first = max(0, len(rows) - OPEN_ROWS)
        fits = [row for row in range(first, len(rows)) if room[row] >= lengths[clip]]
        if not fits:
            rows.append([])
            room.append(ticks)
            fits = [len(rows) - 1]
        row = min(fits, key=room.__getitem__)
        rows[row].append(clip)
        room[row] -= lengths[clip]
    return rows


def open_rows(
    data: "DataArguments",
    recordings: list[tuple[str, Fraction | None]],
    processor: "CreatureProcessor",
    count: int | None,
    seed: int,
) -> tuple[dict, dict, dict]:
    """
    The data of a round: (its splits, facts about it, an example of every argument that its rows have).

    Args:
        data: clip_ticks, text_data, text_share, cache_dir.
        recordings: folders, each with its share or None: then all clips of all of them are seen equally often.
        count: rows of the run; None for each row once.
        seed: of packing and order.

    Returns:
        The splits: "train" (`TrainingRows`), "validation" (clips) where any group was held out, "text" (blocks) where
        there is `text_data` with a validation split. The facts are those of `load_data`, with `clips` (of each
        folder what `make_clips` tells), `rows_of_recordings` and `fill`, the share of ticks in them that are not
        padding, `text` (the facts of the text) and `text_rows`, its share of the rows.

    Raises UserError as `make_clips` and `load_data`.
    """
    found = []
    for folder, share in recordings:
        splits, facts = load_recordings(folder)
        found.append(
            (folder, share, *make_clips(splits, facts, processor, data.clip_ticks, Path(data.cache_dir, "clips")))
        )
    shares = [share for _, share, _, _ in found]
    train = [clips["train"] for *_, clips, _ in found]
    if any(share is None for share in shares):
        train, shares = [_concatenate(train)], [Fraction(1)]
    parts = [PackedClips(clips, data.clip_ticks, seed) for clips in train]
    used = sum(int(np.sum(part.clips.data.column("ticks").to_numpy())) for part in parts)
    rows = sum(map(len, parts))
    texts, text_facts = {}, None
    if data.text_data:
        texts, text_facts = _load_text(data, processor, count or rows, seed)
        of_text = Fraction(round(data.text_share * STEPS_OF_SHARE), STEPS_OF_SHARE)
        if of_text:
            parts.append(TextRows(texts["train"]))
            shares = [*(share * (1 - of_text) for share in shares), of_text]
    ordered = TrainingRows(parts, shares, count or rows, seed)
    splits = {"train": ordered}
    held_out = [clips["validation"] for *_, clips, _ in found if "validation" in clips]
    if held_out:
        splits["validation"] = _concatenate(held_out)
    if "validation" in texts:
        splits["text"] = texts["validation"]
    like = {name: value[:0] for part in parts for name, value in _example(part).items()}
    about = [facts for *_, facts in found]
    hashes = " ".join([*(facts["data_hash"] for facts in about), *([text_facts["data_hash"]] if text_facts else [])])
    info = {
        "path": " ".join(folder for folder, *_ in found),
        "source": ", ".join(dict.fromkeys(source for facts in about for source in facts["sources"])),
        "tokens": used,
        "validation_tokens": sum(facts["splits"].get("validation", {}).get("ticks", 0) for facts in about),
        "data_hash": hashlib.sha256(hashes.encode("ascii")).hexdigest(),
        "tokenizer_hash": text_facts["tokenizer_hash"] if text_facts else None,
        "ordered": True,
        "clips": {folder: facts for folder, _, _, facts in found},
        "rows_of_recordings": rows,
        "fill": round(used / (rows * data.clip_ticks), 4),
        "text": text_facts,
        "text_rows": round(float(shares[-1]), 4) if len(parts) > len(train) else 0.0,
    }
    return splits, info, like


def _concatenate(clips: list["Dataset"]) -> "Dataset":
    """The clips of all folders as one data set; a column that a folder lacks is None there."""
    from datasets import concatenate_datasets

    return clips[0] if len(clips) == 1 else concatenate_datasets(clips).with_transform(unpack_rows)


def _load_text(data: "DataArguments", processor: "CreatureProcessor", count: int, seed: int) -> tuple[dict, dict]:
    """`load_data` of text_data in blocks of a row's length."""
    given = replace(data, data=data.text_data, block_size=None)
    return load_data(given, data.clip_ticks, processor.config.vocab_size, mixture_blocks=count, seed=seed)


def _example(part: PackedClips | TextRows) -> dict[str, np.ndarray]:
    """One array of every argument that the rows of a part have, the widest of each."""
    if isinstance(part, TextRows):
        return part[0][0]
    widest = {}
    for name in [name for name in part.clips.column_names if name in ABSENT]:
        for clip in part.clips.select_columns([name]):
            value = clip[name]
            if value is not None and (name not in widest or value.shape[1:] > widest[name].shape[1:]):
                widest[name] = value[:0]
            if not name.startswith("touch_") and name in widest:
                break
    return widest
