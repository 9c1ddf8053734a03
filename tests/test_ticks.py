"""From time stamps to ticks: nothing looks ahead, rotations turn evenly, words queue, gaps are absent."""

import numpy as np
import pytest

from ticks_creature import (
    STALE_SECONDS,
    TICK_SECONDS,
    at_subframes,
    contacts_at_ticks,
    count_ticks,
    latest,
    linear,
    queue_tokens,
    slerp,
    tick_of,
)

TICKS = 20


def turned(degrees: np.ndarray, axis=(0.6, 0.0, 0.8)) -> np.ndarray:
    """Quaternions of turns about one axis, [..., 4]."""
    half = np.radians(np.asarray(degrees, dtype=np.float64))[..., None] / 2
    return np.concatenate((np.cos(half), np.sin(half) * np.array(axis)), axis=-1)


def some_times(seed: int, count: int = 150) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).uniform(0, TICKS * TICK_SECONDS, count))


@pytest.mark.parametrize("blend", [None, linear, slerp])
@pytest.mark.parametrize("count", [9, 150])
def test_values_after_a_tick_change_nothing_in_it(blend, count):
    draw = np.random.default_rng(0)
    times, values = some_times(count, count), draw.standard_normal((count, 2, 4))
    whole, present = at_subframes(times, values, TICKS, 4, blend)
    for tick in range(TICKS):
        later = times >= (tick + 1) * TICK_SECONDS
        other_times = np.where(later, times + draw.uniform(0, 0.5), times)
        other, there = at_subframes(other_times, np.where(later[:, None, None], 7.0, values), TICKS, 4, blend)
        np.testing.assert_array_equal(other[: tick + 1], whole[: tick + 1])
        np.testing.assert_array_equal(there[: tick + 1], present[: tick + 1])
        if tick >= 2 and count == 150:  # and the values of the tick itself matter
            now = (times >= tick * TICK_SECONDS) & ~later
            changed, _ = at_subframes(times, np.where(now[:, None, None], 7.0, values), TICKS, 4, blend)
            assert not np.array_equal(changed[tick], whole[tick])


def test_fast_sensors_come_out_evenly_spaced_and_slow_ones_hold():
    fast = np.arange(300) / 120
    values, present = at_subframes(fast, fast[:, None], TICKS, 4, linear)
    np.testing.assert_allclose(values.ravel(), np.arange(TICKS * 4) * 0.02, atol=1e-6)
    assert present.all()
    slow = np.array([0.0, 0.1, 0.2])
    values, _ = at_subframes(slow, slow[:, None], 4, 4)
    np.testing.assert_allclose(values.ravel(), [0.0] * 5 + [0.1] * 5 + [0.2] * 6)


def test_time_stamps_in_float32_belong_to_their_own_tick():
    stamps = (np.arange(20_000) * TICK_SECONDS).astype(np.float32).astype(np.float64)
    seen = latest(stamps, (np.arange(20_000) + 1) * TICK_SECONDS)
    np.testing.assert_array_equal(seen, np.arange(20_000))
    assert [tick_of(stamp) for stamp in stamps[::999]] == list(range(0, 20_000, 999))


def test_before_the_first_value_and_in_a_gap_nothing_is_there():
    times = np.array([0.3, 0.5, 3.01])
    index = latest(times, (np.arange(50) + 1) * TICK_SECONDS)
    assert (index[:3] == -1).all() and index[3] == 0
    gone = int((0.5 + STALE_SECONDS) / TICK_SECONDS)
    assert index[gone - 1] == 1 and (index[gone + 1 : 37] == -1).all() and index[-1] == 2
    values, present = at_subframes(times, times[:, None], 50, 4, linear)
    np.testing.assert_array_equal(present[:4], [False, False, False, False])  # it came in the middle of tick 3
    assert present[4] and not present[gone + 1] and present[-1]
    # The value after a gap is not drawn out over it.
    np.testing.assert_allclose(values[37, 2:], 3.01)


def test_slerp_turns_evenly_the_shorter_way():
    first, second = turned(np.array([10.0, 350.0, 40.0])), turned(np.array([70.0, 20.0, 40.0 + 1e-6]))
    for share in (0.0, 0.25, 0.5, 1.0):
        expected = turned(np.array([10.0 + 60 * share, -10.0 + 30 * share, 40.0]))
        for sign in (1, -1):  # q and -q are one rotation
            got = slerp(first, sign * second, np.full((3, 1), share))
            np.testing.assert_allclose(np.abs((got * expected).sum(-1)), 1.0, atol=1e-9)
            np.testing.assert_allclose(np.linalg.norm(got, axis=-1), 1.0, atol=1e-9)


def test_words_begin_at_their_tick_and_wait_for_those_before_them():
    words = [(2, [11, 12]), (3, [13]), (9, [15]), (3, [14])]
    np.testing.assert_array_equal(queue_tokens(words, 10, 0), [0, 0, 11, 12, 13, 14, 0, 0, 0, 15])
    # What does not fit goes on after the end.
    np.testing.assert_array_equal(queue_tokens([(1, [11, 12, 13])], 2, 0), [0, 11, 12, 13])
    assert [tick_of(time) for time in (-0.5, 0.0, 0.0799, 0.0801, 0.1)] == [0, 0, 1, 1, 1]
    assert [count_ticks(seconds) for seconds in (0.0, 0.01, 0.08, 0.0801, 0.082, 0.16)] == [0, 1, 1, 1, 2, 2]


def test_contacts_of_a_tick_the_last_of_each_point():
    times = np.array([0.00, 0.05, 0.05, 0.30, 0.09, 9.0])
    points, surfaces = np.array([5, 5, 2, 7, 5, 1]), np.array([1, 2, 1, 3, 4, 1])
    values = np.arange(30.0).reshape(6, 5)
    at_points, at_surfaces, at_values, mask = contacts_at_ticks(times, points, surfaces, values, 5)
    np.testing.assert_array_equal(mask, [[1, 1], [1, 0], [0, 0], [1, 0], [0, 0]])
    np.testing.assert_array_equal(at_points, [[2, 5], [5, 0], [0, 0], [7, 0], [0, 0]])
    np.testing.assert_array_equal(at_surfaces, [[1, 2], [4, 0], [0, 0], [3, 0], [0, 0]])
    np.testing.assert_array_equal(at_values[0], values[[2, 1]])
    np.testing.assert_array_equal(at_values[3, 0], values[3])
    empty = contacts_at_ticks(times[:0], points[:0], surfaces[:0], values[:0], 3)
    assert [column.shape for column in empty] == [(3, 0), (3, 0), (3, 0, 5), (3, 0)]
