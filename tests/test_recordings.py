"""The folder of recordings: what is written comes back, and nothing half-written or unfit is ever opened."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from datasets import load_from_disk

from creature.data.recordings.schema import RecordingError, RecordingsWriter, load_recordings, untimed
from creature.errors import UserError
from creature.settings import PROJECT

NAMES = {"body_state": ["elbow", "wrist"]}


def arm(name: str, ticks: int = 3, start: float = 0.0) -> dict:
    """A recording of two numbers a tick that count up from `start`."""
    values = start + np.arange(2 * ticks, dtype=np.float64).reshape(ticks, 2)
    track = {"values": values, "times": 0.08 * np.arange(ticks)}
    return {"recording_id": name, "split_group": name, "duration": 0.08 * ticks, "body_state": track}


def test_a_row_comes_back_as_it_was_and_what_it_lacks_is_none(tmp_path):
    row = arm("a") | {
        "license": "CC0",
        "audio": {"bytes": b"fLaC", "path": "a.flac"},
        "images": [{"name": "left", "images": [{"bytes": b"jpeg", "path": None}], "times": [0.02]}],
        "internal_text": untimed("pick it up"),
        "external_voice": [{"word": "up", "start": 0.1, "end": 0.2}],
        "joint_positions": {"values": np.full((2, 1, 3), 0.5), "times": [0.0, 0.01]},
        "touch": [],
    }
    with RecordingsWriter(tmp_path / "out") as writer:
        writer.add(row, names=NAMES | {"joints": ["hip"]})
    (got,) = load_from_disk(str(tmp_path / "out"))["train"]
    assert got["body_state"] == {"values": [[0, 1], [2, 3], [4, 5]], "times": [0.0, 0.08, 0.16]}
    assert got["joint_positions"] == {"values": [[[0.5] * 3]] * 2, "times": [0.0, 0.01]}
    assert got["touch"] == [] and got["voice"] is None and got["action"] is None
    for name in ("license", "audio", "images", "internal_text", "external_voice"):
        assert got[name] == row[name]


def test_the_statistics_are_those_of_the_training_split(tmp_path):
    rows = [arm("a", 5, start=1e6), arm("b", 9, start=1e6 + 3), arm("c", 4, start=-50)]
    with RecordingsWriter(tmp_path / "out") as writer:
        for row, split in zip(rows, ("train", "train", "validation"), strict=True):
            writer.add(row, split, names=NAMES)
    splits, facts = load_recordings(tmp_path / "out")
    assert splits["train"]["recording_id"][:] == ["a", "b"] and splits["validation"]["recording_id"][:] == ["c"]
    values = np.concatenate([row["body_state"]["values"] for row in rows[:2]])
    found = facts["statistics"]["body_state"]
    assert facts["names"] == NAMES and found["count"] == 14
    np.testing.assert_allclose(found["mean"], values.mean(axis=0))
    np.testing.assert_allclose(found["std"], values.std(axis=0))


@pytest.mark.parametrize(
    "change, names, complaint",
    [
        ({"recording_id": "first"}, NAMES, "two recordings first"),
        ({"duration": 0.0}, NAMES, "a duration above 0 s"),
        ({"sound": b""}, NAMES, "no column 'sound'"),
        ({}, {"body_state": ["elbow", "hand"]}, "import it into a folder of its own"),
        ({}, {"body_state": ["elbow"]}, "2 numbers or joints and 1 names"),
        ({"body_state": {"values": [[0, np.nan]], "times": [0]}}, NAMES, "not finite"),
        ({"body_state": {"values": [[0, 1]] * 2, "times": [0.1, 0.1]}}, NAMES, "do not rise"),
        ({"body_state": {"values": [[0, 1]], "times": [-0.1]}}, NAMES, "do not rise"),
        ({"body_state": {"values": [[0, 1]], "times": []}}, NAMES, "for 0 times"),
        ({"images": [{"name": "eye", "images": [], "times": [0.0]}]}, NAMES, "0 pictures for 1 times"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_and_the_others_stay(tmp_path, change, names, complaint):
    with RecordingsWriter(tmp_path / "out") as writer:
        writer.add(arm("first"), names=NAMES)
        with pytest.raises(RecordingError, match=complaint):
            writer.add(arm("second") | change, names=names)
        writer.add(arm("third"), names=NAMES)
    splits, _ = load_recordings(tmp_path / "out")
    assert splits["train"]["recording_id"][:] == ["first", "third"]


def test_an_existing_folder_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "out").mkdir()
    with RecordingsWriter(tmp_path / "out") as writer:  # an empty one is nothing to lose
        writer.add(arm("a"), names=NAMES)
    before = (tmp_path / "out" / "recordings.json").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        RecordingsWriter(tmp_path / "out")
    assert (tmp_path / "out" / "recordings.json").read_bytes() == before


def test_an_exception_or_nothing_to_write_leaves_no_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), RecordingsWriter(tmp_path / "out") as writer:
        writer.add(arm("a"), names=NAMES)
        raise ZeroDivisionError
    with pytest.raises(TypeError), RecordingsWriter(tmp_path / "out") as writer:  # while it is being finished
        writer.add(arm("a"), names=NAMES)
        writer.facts["report"] = object()
    with RecordingsWriter(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
def test_a_killed_writer_leaves_nothing_that_opens_and_the_next_one_cleans_up(tmp_path):
    code = (
        "import sys, time; sys.path[:0] = sys.argv[2:]; from test_recordings import *\n"
        "with RecordingsWriter(sys.argv[1]) as writer:\n"
        "    writer.add(arm('a', 10_000), names=NAMES); print(flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out"), str(PROJECT), str(PROJECT / "tests")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(UserError, match="another process"), RecordingsWriter(tmp_path / "out"):
            pass
        process.send_signal(signal.SIGKILL)
    with pytest.raises(UserError, match="no folder of recordings"):
        load_recordings(tmp_path / "out")
    with RecordingsWriter(tmp_path / "out") as writer:
        writer.add(arm("b"), names=NAMES)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert load_recordings(tmp_path / "out")[0]["train"]["recording_id"][:] == ["b"]


def test_a_damaged_folder_ends_in_one_sentence(tmp_path):
    with RecordingsWriter(tmp_path / "out") as writer:
        writer.add(arm("a"), names=NAMES)
    (tmp_path / "out" / "train" / "state.json").unlink()
    with pytest.raises(UserError, match="import it again"):
        load_recordings(tmp_path / "out")
    facts = tmp_path / "out" / "recordings.json"
    facts.write_text(json.dumps({"format": "creature recordings 0"}))
    with pytest.raises(UserError, match="import it again"):
        load_recordings(tmp_path / "out")
