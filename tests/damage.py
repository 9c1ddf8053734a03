"""Damage to good files, always the same (`derandomize`), and what may come of it: an answer, never a traceback."""

import copy
import functools
import json
import math
import signal
from contextlib import contextmanager

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from creature.errors import UserError


def examples(count: int):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=checks)


@contextmanager
def no_hang(seconds: int = 60):
    """Turn a hang into a failure. Nothing here takes a second; the limit is for a machine that is very busy."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def late(*_):
        raise AssertionError(f"still at it after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def answer(function, *arguments, **options) -> str | None:
    """What is said against the input, None where it is taken; fails for anything but one short sentence."""
    with no_hang():
        try:
            function(*arguments, **options)
        except UserError as error:
            assert len(str(error)) > 10
            return str(error)
    return None


@st.composite
def damaged(draw, data: bytes, most: int = 4):
    """`data` cut off, with bytes changed, left out, put in or repeated; most often near the beginning, in headers."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, most))):
        where = draw(st.integers(0, min(len(data), 600)) | st.integers(0, len(data)))
        kind = draw(st.sampled_from(["cut", "change", "change", "change", "drop", "insert", "repeat"]))
        if kind == "cut":
            del data[where:]
        elif kind == "change" and where < len(data):
            data[where] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
        elif kind == "drop":
            del data[where : where + draw(st.integers(1, 40))]
        elif kind == "insert":
            data[where:where] = draw(st.binary(min_size=1, max_size=12))
        elif kind == "repeat":
            data[where:where] = data[where : where + draw(st.integers(1, 60))]
    return bytes(data)


DEEP = functools.reduce(lambda inner, _: [inner], range(80), [])
VALUES = st.sampled_from(
    [None, True, False, 0, -1, 3, 2**31, -(2**63), 10**30, 10**400, 0.5, 1e308, math.nan, math.inf, "", "0", "gpt2"]
    + ["uint16", "object", "u2,(u2", "../../outside", "/etc/passwd", "a\0b", "\x1b[2Jx", "\ud800", "long " * 2000]
    + [[], {}, [[]], {"a": 1}, [1, "x"], DEEP]
).map(copy.deepcopy)


@st.composite
def changed(draw, document, most: int = 3):
    """A JSON document with values replaced, left out, renamed or added, at any depth."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, most))):
        places = list(_places(document)) if isinstance(document, dict | list) else []
        if not places or draw(st.integers(0, 19)) == 0:
            return draw(VALUES)
        inside, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["replace", "replace", "replace", "drop", "rename", "add"]))
        if kind == "replace":
            inside[key] = draw(VALUES)
        elif kind == "drop":
            del inside[key]
        elif isinstance(inside, dict):
            inside[draw(st.sampled_from(["", "x", "step", "../x", "a\0", "\x1b[31m"]))] = (
                inside.pop(key) if kind == "rename" else draw(VALUES)
            )
    return document


def _places(document):
    items = list(document.items() if isinstance(document, dict) else enumerate(document))
    for key, value in items:
        yield document, key
        if isinstance(value, dict | list):
            yield from _places(value)


def dumped(document) -> str:
    return json.dumps(document, ensure_ascii=True)


BROKEN_JSON = ["", "{", "[" * 200_000, '{"a":' * 200_000, '"\\ud800"', "nul", "1" * 5000, "\ufeff{}", "[1,]", "{}{}"]


class Trap:
    """Unpickling it would make a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")
