"""Motion capture in BVH: any skeleton, any order of channels."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from creature.data.recordings.schema import PART_SECONDS, RecordingError, untimed
from creature.data.recordings.sound import read_descriptions
from creature.data.recordings.sources import HELD_OUT, SOUND_FILES, ImportOptions, Job, Notes, guess_groups, list_files
from creature.data.recordings.transcripts import INDEX_FILES

RATE = 50  # Hz: a sub-frame of a tick is 20 ms
UNITS = {1.0: "metres", 0.01: "centimetres", 0.001: "millimetres"}
TOO_FAST, SWING_SECONDS = 1500.0, 0.1  # degrees/s at which no clip of a body begins; s that it may go on
TALL = (0.8, 2.6)  # m between which a body is taken for one


@dataclass
class Skeleton:
    names: list[str] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)  # -1 for the root
    offsets: list[list[float]] = field(default_factory=list)  # in the units of the file
    channels: list[list[str]] = field(default_factory=list)  # as "Xrotation", in their order


def find_motions(folder: Path, options: ImportOptions, notes: Notes) -> list[Job]:
    """
    A job for every .bvh file below a folder. Its line in a table, such as index.tsv, is internal text at its end.

    Positions are in the frame of the root joint, whose own place and turn are taken out. Rotations are each joint's in
    the frame of its parent, the root's in that of the room.
    """
    files = list_files(folder, (".bvh",))
    if sounds := list_files(folder, SOUND_FILES):
        notes.leave_out("sound beside motion (--format audio imports it)", sounds[0].name, len(sounds))
    described = read_descriptions(folder, list_files(folder, INDEX_FILES), files, options, notes)
    names = {path: path.relative_to(folder).with_suffix("").as_posix() for path in files}
    guessed = guess_groups(list(names.values()))
    jobs = []
    for path, name in names.items():
        about = described.get(path)
        group = options.group(name, about and about.row) or guessed[name]
        held_out = bool(HELD_OUT.search(name)) or bool(about and about.held_out)
        rows = partial(_read, path, name, group, about and about.text, options.metres_per_unit, notes)
        jobs.append(Job(name, {group}, rows, held_out))
    return jobs


def _read(
    path: Path, name: str, group: str, text: str | None, metres_per_unit: float | None, notes: Notes
) -> Iterator[tuple[dict, dict]]:
    with open(path, encoding="utf-8-sig", errors="replace") as lines:
        skeleton = read_skeleton(lines)
        declared, step = _read_motion_head(lines)
        scale = metres_per_unit or guess_unit(skeleton, name, notes)
        if not text:
            notes.remark("motion without a description: it is felt, but nothing is learnt to say about it", name)
        longest = max(1, int(PART_SECONDS / step))
        part, number, total = _read_frames(lines, skeleton, longest, name, notes), 0, 0
        while len(part):
            following = _read_frames(lines, skeleton, longest, name, notes)
            last = not len(following)
            places, rotations = decode_channels(skeleton, part)
            swing = 0 if total else _frames_from_rest(rotations, step)
            if swing:
                notes.remark("the first frames swing in from the skeleton at rest: left out", name)
            total += len(part)
            places, rotations, times = resample(places[swing:], rotations[swing:], step)
            row = {
                "recording_id": name if last and number == 0 else f"{name}#{number}",
                "split_group": group,
                "duration": (len(part) - swing) * step,
                "joint_positions": {"values": scale * to_root_frame(skeleton, places, rotations), "times": times},
                "joint_rotations": {"values": rotations, "times": times},
                "internal_text": untimed(text) if text and last else None,
            }
            yield row, {"joints": skeleton.names}
            part, number = following, number + 1
    if not total:
        raise RecordingError("the file has no frames")
    if total != declared:
        notes.remark("another number of frames than the file says", f"{name}: {total:,}, said {declared:,}")


def read_skeleton(lines) -> Skeleton:
    """The HIERARCHY of a .bvh, up to the line MOTION. Raises RecordingError for what is none."""
    skeleton, stack, joint = Skeleton(), [], None
    try:
        if lines.readline().strip().upper() != "HIERARCHY":
            raise RecordingError("the file does not begin with HIERARCHY: it is no BVH")
        for word, *rest in (piece.split() for line in lines for piece in re.split(r"([{}])", line) if piece.split()):
            if word in ("ROOT", "JOINT") or (word == "End" and rest):
                if word == "ROOT" and skeleton.names:
                    raise RecordingError("the file holds several skeletons: export each into a file of its own")
                joint = None
                if word != "End":
                    joint = len(skeleton.names)
                    skeleton.names.append(" ".join(rest))
                    skeleton.parents.append(next((one for one in reversed(stack) if one is not None), -1))
                    skeleton.offsets.append([0.0, 0.0, 0.0])
                    skeleton.channels.append([])
            elif word == "{":
                stack.append(joint)
            elif word == "}":
                stack.pop()
            elif word == "OFFSET" and joint is not None:
                skeleton.offsets[joint] = [float(number) for number in rest[:3]]
            elif word == "CHANNELS" and joint is not None:
                skeleton.channels[joint] = rest[1 : 1 + int(rest[0])]
            elif word == "MOTION":
                break
    except (ValueError, IndexError) as error:
        if isinstance(error, RecordingError):
            raise
        raise RecordingError(f"the skeleton cannot be read ({error})") from error
    if not skeleton.names or not any(skeleton.channels):
        raise RecordingError("the file has no joint that moves")
    return skeleton


def _read_motion_head(lines) -> tuple[int, float]:
    """(frames, seconds between them) of the two lines after MOTION."""
    try:
        frames, seconds = (lines.readline().split(":")[1] for _ in range(2))
        frames, seconds = int(frames), float(seconds)
    except (ValueError, IndexError) as error:
        raise RecordingError("the lines Frames: and Frame Time: are missing after MOTION") from error
    if not 0.0005 <= seconds <= 1:
        raise RecordingError(f"a frame time of {seconds} s is none: correct it in the file")
    return frames, seconds


def _read_frames(lines, skeleton: Skeleton, count: int, name: str, notes: Notes) -> np.ndarray:
    """Up to `count` frames [N, channels]. A line that does not fit repeats the one before it, with a remark."""
    width = sum(map(len, skeleton.channels))
    frames = []
    for line in islice((line for line in lines if line.strip()), count):
        try:
            frame = np.array(line.split(), np.float64)
        except ValueError:
            frame = np.empty(0)
        if len(frame) != width or not np.isfinite(frame).all():
            notes.remark("a frame that cannot be read repeats the one before it", name)
            if not frames:
                continue
            frame = frames[-1]
        frames.append(frame)
    return np.array(frames)


def guess_unit(skeleton: Skeleton, name: str, notes: Notes) -> float:
    """Metres per unit of a file: the power of ten that makes the skeleton at rest most nearly 1.7 m in size."""
    place = np.zeros((len(skeleton.names), 3))
    for joint, parent in enumerate(skeleton.parents):
        if parent >= 0:
            place[joint] = place[parent] + skeleton.offsets[joint]
    size = float(np.ptp(place, axis=0).max())
    if not size > 0:
        raise RecordingError("all joints are in one place: the skeleton has no OFFSETs")
    unit = min(UNITS, key=lambda unit: abs(math.log(size * unit / 1.7)))
    notes.remark(f"lengths are taken for {UNITS[unit]}, by the size of the skeleton (--metres_per_unit says otherwise)",
                 f"{name}: {size * unit:.2f} m")  # fmt: skip
    if not TALL[0] <= size * unit <= TALL[1]:
        notes.remark(
            "a skeleton of a size that bodies seldom have: see --metres_per_unit", f"{name}: {size * unit:.2f} m"
        )
    return unit


def decode_channels(skeleton: Skeleton, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """frames [N, channels] -> (place [N, J, 3], turn [N, J, 4] as quaternion) of each joint in its parent's frame."""
    count = len(frames)
    rotations = np.zeros((count, len(skeleton.names), 4))
    rotations[..., 0] = 1
    places = np.repeat(np.array(skeleton.offsets)[None], count, axis=0)
    column = 0
    for joint, channels in enumerate(skeleton.channels):
        for channel in channels:
            axis, kind = "xyz".find(channel[:1].lower()), channel[1:].lower()
            if axis < 0 or kind not in ("rotation", "position"):
                raise RecordingError(f"the channel {channel} is unknown")
            if kind == "position":
                places[:, joint, axis] = frames[:, column]
            else:
                half = np.radians(frames[:, column]) / 2
                turn = np.zeros((count, 4))
                turn[:, 0], turn[:, 1 + axis] = np.cos(half), np.sin(half)
                rotations[:, joint] = multiply(rotations[:, joint], turn)
            column += 1
    return places, rotations


def _frames_from_rest(rotations: np.ndarray, step: float) -> int:
    """How many frames a clip takes to swing from the pose at rest into its motion, as some converters let it begin."""
    first = rotations[: int(SWING_SECONDS / step) + 2]
    angles = 2 * np.arccos(np.clip(np.abs((first[1:] * first[:-1]).sum(-1)), 0, 1)).max(axis=1, initial=0)
    speeds = np.degrees(angles) / step
    if not len(speeds) or speeds[0] < TOO_FAST:
        return 0
    calm = np.flatnonzero(speeds < 0.2 * TOO_FAST)
    return int(calm[0]) if len(calm) else len(speeds)


def resample(places: np.ndarray, rotations: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    (places, rotations, times [M] s) at 50 a second, of frames every `step` s; slower ones stay as they are.

    The pose at time t is the one at t - step, between the two frames around that: both are known at t, and no rhythm
    of 120 against 50 is added, as it would be by taking the latest frame.
    """
    times = np.arange(len(places)) * step
    if step < 0.999 / RATE:
        times = np.arange(math.ceil(len(places) * step * RATE - 1e-6)) / RATE
        at = np.maximum(times / step - 1, 0.0)
        before = np.minimum(at.astype(int), max(0, len(places) - 2))
        after, share = np.minimum(before + 1, len(places) - 1), np.clip(at - before, 0, 1)[:, None, None]
        places = (1 - share) * places[before] + share * places[after]
        sign = np.where((rotations[before] * rotations[after]).sum(-1, keepdims=True) < 0, -1, 1)
        rotations = (1 - share) * rotations[before] + share * sign * rotations[after]
    rotations = rotations / np.linalg.norm(rotations, axis=-1, keepdims=True)
    return places, np.where(rotations[..., :1] < 0, -1, 1) * rotations, times


def to_root_frame(skeleton: Skeleton, places: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """Places [N, J, 3] and turns [N, J, 4] in the parents' frames -> [N, J, 3] in that of the root, which is at 0."""
    turns, positions = np.zeros_like(rotations), np.zeros_like(places)
    for joint, parent in enumerate(skeleton.parents):
        if parent < 0:
            turns[:, joint, 0] = 1
        else:
            turns[:, joint] = multiply(turns[:, parent], rotations[:, joint])
            positions[:, joint] = positions[:, parent] + rotate(turns[:, parent], places[:, joint])
    return positions


def multiply(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Products of quaternions [..., 4]: first `right` turns, then `left`."""
    w, vector = left[..., :1], left[..., 1:]
    other_w, other = right[..., :1], right[..., 1:]
    scalar = w * other_w - (vector * other).sum(-1, keepdims=True)
    return np.concatenate((scalar, w * other + other_w * vector + np.cross(vector, other)), axis=-1)


def rotate(quaternion: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """vector [..., 3] turned by unit quaternions [..., 4]."""
    w, axis = quaternion[..., :1], quaternion[..., 1:]
    across = 2 * np.cross(axis, vector)
    return vector + w * across + np.cross(axis, across)
