# Copyright 2026 The MultiModalCreature developers. Licensed under the Apache License, Version 2.0.
"""From time stamps to ticks, in plain numpy: at each tick what was known by its end, and nothing later.

Tick t lasts from t * 80 ms to (t + 1) * 80 ms, and is cut into sub-frames of equal length. A value belongs to the
sub-frame that its time stamp lies in. Where nothing new arrives, the last value holds, for one second.
"""

import numpy as np

TICK_SECONDS = 0.08
STALE_SECONDS = 1.0  # an older value says nothing about the present: no camera or sensor in use is slower
# A time stamp this close before an edge lies on the edge, and so in the next sub-frame: 0.08 s is 0.07999 in float32.
TOLERANCE = 1e-3


def count_ticks(seconds: float) -> int:
    """The ticks that a stretch of time touches."""
    return max(0, int(np.ceil((seconds - TOLERANCE) / TICK_SECONDS)))


def tick_of(seconds: float) -> int:
    """The tick that a moment lies in; moments before 0 s lie in tick 0."""
    return max(0, int((seconds + TOLERANCE) // TICK_SECONDS))


def check_times(name: str, times, count: int, duration: float) -> np.ndarray:
    """float64 [count]; ValueError for times that are not as many as the values, do not rise, or miss the recording."""
    times = np.asarray(times, np.float64)
    if len(times) != count or not count:
        raise ValueError(f"{name} has {count} values and {len(times)} times: give every value its time.")
    if not np.isfinite(times).all() or (np.diff(times) < 0).any():
        raise ValueError(f"The times of {name} do not rise: cut the recording where its clock jumps back.")
    if times[0] >= duration or times[-1] < -1:
        raise ValueError(
            f"{name} runs from {times[0]:.2f} to {times[-1]:.2f} s, and the recording from 0 to {duration:.2f} s: "
            "subtract the time at which the recording begins."
        )
    return times


def latest(times: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """int64 [E]: for each end, the index of the last of the rising `times` [N] before it; -1 where that is stale."""
    index = np.searchsorted(times, ends - TOLERANCE) - 1
    stale = ends - np.asarray(times)[np.maximum(index, 0)] > STALE_SECONDS
    return np.where((index < 0) | stale, -1, index)


def at_subframes(
    times: np.ndarray, values: np.ndarray, ticks: int, subframes: int, blend=None
) -> tuple[np.ndarray, np.ndarray]:
    """
    Values with time stamps as values of sub-frames.

    Args:
        times, values: rising [N] s, and [N, ...].
        blend: `linear` or `slerp`: the first value that arrives in a sub-frame and the one before it, interpolated at
            the beginning of the sub-frame, so that what a fast sensor measured comes out evenly spaced. None holds the
            last value, as suits commands.

    Returns:
        float32 [ticks, subframes, ...], and bool [ticks]: whether all sub-frames of the tick have a value.
    """
    length = TICK_SECONDS / subframes
    begins = np.arange(ticks * subframes) * length
    last = latest(times, begins + length)
    result = values[np.maximum(last, 0)].astype(np.float32)
    if blend is not None:
        after = np.searchsorted(times, begins - TOLERANCE)  # the first value of the sub-frame, if any came
        inside = after <= last
        after = after[inside]
        before = np.maximum(after - 1, 0)
        before = np.where(times[after] - times[before] > STALE_SECONDS, after, before)
        gap = times[after] - times[before]
        share = np.clip((begins[inside] - times[before]) / np.where(gap > 0, gap, 1.0), 0.0, 1.0)
        share = np.where(gap > 0, share, 1.0).reshape(-1, *[1] * (values.ndim - 1))
        result[inside] = blend(values[before], values[after], share)
    present = (last >= 0).reshape(ticks, subframes).all(axis=1)
    return result.reshape(ticks, subframes, *values.shape[1:]), present


def linear(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    """`share` of the way from `first` to `second`."""
    return first + (second - first) * share


def slerp(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    """`share` of the shorter way between quaternions [..., 4], at constant speed (Shoemake 1985); of unit length."""
    first, second = normalize(first), normalize(second)
    cosine = (first * second).sum(-1, keepdims=True)
    second = np.where(cosine < 0, -second, second)
    angle = np.arccos(np.clip(np.abs(cosine), 0.0, 1.0))
    sine = np.sin(angle)
    near = sine < 1e-4  # where the ratio of sines is one of rounding errors, and a straight line is as good
    safe = np.where(near, 1.0, sine)
    from_first = np.where(near, 1 - share, np.sin((1 - share) * angle) / safe)
    from_second = np.where(near, share, np.sin(share * angle) / safe)
    return normalize(from_first * first + from_second * second)


def normalize(quaternions: np.ndarray) -> np.ndarray:
    return quaternions / np.maximum(np.linalg.norm(quaternions, axis=-1, keepdims=True), 1e-12)


def queue_tokens(texts: list[tuple[int, list[int]]], ticks: int, silent: int) -> np.ndarray:
    """
    Token ids one a tick, int32 [ticks or more]; `silent` where none is.

    texts: (tick, ids) of every word, in any order. Ids take consecutive ticks; where the ticks of a word are still
    taken by the words before it, it waits: a token comes late in a burst, but never early.
    """
    queued, free = {}, 0
    for tick, ids in sorted(texts, key=lambda text: text[0]):
        free = max(free, tick)
        for token in ids:
            queued[free] = token
            free += 1
    stream = np.full(max(ticks, free), silent, dtype=np.int32)
    stream[list(queued)] = list(queued.values())
    return stream


def contacts_at_ticks(
    times: np.ndarray, points: np.ndarray, surfaces: np.ndarray, values: np.ndarray, ticks: int
) -> tuple[np.ndarray, ...]:
    """
    Contacts with time stamps as the contacts of every tick; of a point that is logged several times in one, the last.

    times, points, surfaces [N], values [N, 5] -> points, surfaces [ticks, C], values [ticks, C, 5], mask [ticks, C],
    with C the most contacts in a tick.
    """
    order = np.argsort(times, kind="stable")
    tick = np.maximum((times[order] + TOLERANCE) // TICK_SECONDS, 0).astype(np.int64)
    order, tick = order[tick < ticks], tick[tick < ticks]
    # np.unique keeps the first of equal rows: so, from the back, the last of a point in a tick.
    pairs = np.stack((tick, points[order].astype(np.int64)), axis=1)
    kept = len(order) - 1 - np.unique(pairs[::-1], axis=0, return_index=True)[1] if len(order) else order
    order, tick = order[kept], tick[kept]  # sorted by tick, then by point
    slot = np.arange(len(tick)) - np.searchsorted(tick, tick)
    shape = (ticks, int(slot.max(initial=-1)) + 1)
    mask = np.zeros(shape, dtype=bool)
    mask[tick, slot] = True
    placed = []
    for column in (points.astype(np.int32), surfaces.astype(np.int32), values.astype(np.float32)):
        placed.append(np.zeros((*shape, *column.shape[1:]), column.dtype))
        placed[-1][tick, slot] = column[order]
    return *placed, mask


__all__ = ["TICK_SECONDS", "at_subframes", "check_times", "contacts_at_ticks", "count_ticks", "latest", "queue_tokens"]
