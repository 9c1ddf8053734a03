"""Rows of a data set as the batch that the model's forward takes."""

import functools
from collections.abc import Callable

import numpy as np

from creature.errors import UserError

FEWEST_BOUNDARIES = 256  # document boundaries in a batch; attention spends little on those that repeat


def collate_blocks(rows: list[dict], end_of_text: int | None = None) -> dict:
    """
    A batch of blocks: input_ids int64 [B, T], and the same tensor as labels (the model shifts).

    With `end_of_text`, the id between two documents, also what keeps documents apart: position_ids int64 [B, T] that
    restart at each document, and cu_seq_lens_q int32 [N + 1], where in the B x T ticks documents begin and the last one
    ends, for attention kernels that take it. Its last number is repeated up to a power of two. End-of-text is the last
    label of the document before it and the first input of the document after it, so every label keeps its target, and
    none is predicted from another document.
    """
    import torch

    ids = np.stack([np.asarray(row["input_ids"]) for row in rows]).astype(np.int64, copy=False)
    input_ids = torch.from_numpy(ids)
    batch = {"input_ids": input_ids, "labels": input_ids}
    if end_of_text is not None:
        batch |= _keep_apart(ids == end_of_text)
    return batch


def _keep_apart(begins: np.ndarray) -> dict:
    """position_ids and cu_seq_lens_q of rows [B, T] in which something else begins wherever `begins` is true."""
    import torch

    ticks = np.arange(begins.shape[1])
    positions = ticks - np.maximum.accumulate(np.where(begins, ticks, 0), axis=1)
    starts = np.flatnonzero(positions == 0)
    # Powers of two, because torch.compile compiles every size separately.
    boundaries = np.full(max(FEWEST_BOUNDARIES, 1 << len(starts).bit_length()), begins.size, np.int32)
    boundaries[: len(starts)] = starts
    return {"position_ids": torch.from_numpy(positions), "cu_seq_lens_q": torch.from_numpy(boundaries)}


def collate_clips(rows: list[dict], ticks: int | None = None) -> dict:
    """
    A batch of clips (creature.data.recordings.clips), tensors [B, T, ...] by argument of `forward`; ids int64, pictures
    uint8. Where a clip ends or lacks what others have, it is absent. T is that of the longest clip, or `ticks`.
    """
    import torch

    from processing_creature import ABSENT, pad_clips, widen

    rows = [{name: row[name] for name in ABSENT if row.get(name) is not None} for row in rows]
    return {name: torch.from_numpy(widen(value)) for name, value in pad_clips(rows, ticks).items()}


def collate_rows(rows: list[list[dict]], ticks: int, like: dict[str, np.ndarray]) -> dict:
    """
    A batch of rows of several clips, as `collate_clips` has them, one behind the other and kept apart as by
    `collate_blocks`: no tick sees another clip, and the first tick of a clip is nobody's target.

    ticks: T, at least that of the longest row; what is left is absent. like: every argument that some row of the run
    has, as an array [0 or more, ...], so that all batches have the same arguments.

    Pictures are most of the bytes of a batch, and rows of text have none: `pixel_values` [N, cameras, 3, H, W] are
    those that there are, and `picture_ticks` int64 [N] are their ticks, counted through all rows. `spread_pictures`
    makes the model's argument of them.
    """
    import torch

    from processing_creature import ABSENT, TARGETS, place_clips, widen

    begins, placed = np.zeros((len(rows), ticks), dtype=bool), []
    for row, clips in enumerate(rows):
        first = 0
        for clip in clips:
            begins[row, first] = True
            placed.append((row, first, {name: value for name, value in clip.items() if name in ABSENT}))
            first += max(map(len, placed[-1][2].values()))
        if first < ticks:
            begins[row, first] = True
    pictures = _take_pictures(placed, ticks, like)
    batch = place_clips(placed, len(rows), ticks, {name: like[name] for name in like if name != "pixel_values"})
    for name in TARGETS.keys() & batch.keys():
        batch[name][begins] = TARGETS[name]
    batch |= pictures  # last: the rows and ticks of a batch are read off its first argument
    return {name: torch.from_numpy(widen(value)) for name, value in batch.items()} | _keep_apart(begins)


def _take_pictures(placed: list[tuple[int, int, dict]], ticks: int, like: dict[str, np.ndarray]) -> dict:
    """The pictures of placed clips, taken out of them, and their ticks; nothing where no row of the run has eyes."""
    from processing_creature import place_clips

    if "pixel_values" not in like:
        return {}
    places, found = [], []
    for row, first, clip in placed:
        if "pixel_values" in clip:
            seen = np.flatnonzero(clip["pixel_mask"])
            found.append((0, len(places), {"pixel_values": clip.pop("pixel_values")[seen]}))
            places += (row * ticks + first + seen).tolist()
    pictures = place_clips(found, 1, len(places), {"pixel_values": like["pixel_values"]})["pixel_values"][0]
    return {"pixel_values": pictures, "picture_ticks": np.array(places, np.int64)}


def spread_pictures(batch: dict) -> dict:
    """A batch of `collate_rows` with `pixel_values` [B, T, cameras, 3, H, W], black where there is no picture."""
    if "picture_ticks" not in batch:
        return batch
    batch = dict(batch)
    given, ticks, shape = batch["pixel_values"], batch.pop("picture_ticks"), batch["pixel_mask"].shape
    pictures = given.new_zeros(shape.numel(), *given.shape[1:]).index_copy_(0, ticks, given)
    return batch | {"pixel_values": pictures.unflatten(0, shape)}


def block_collator(tokenizer, separate_documents: bool) -> Callable[[list[dict]], dict]:
    """`collate_blocks`, with the tokenizer's end-of-text if `separate_documents`; UserError if it has none."""
    if not separate_documents:
        return collate_blocks
    if tokenizer.eos_token_id is None:
        raise UserError("separate_documents needs a tokenizer with an end-of-text token (eos_token): leave it out")
    return functools.partial(collate_blocks, end_of_text=tokenizer.eos_token_id)
