"""From lives in the room to a folder of recordings: a life a row, in parts that survive a killed process."""

import hashlib
import io
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import pyarrow
from tqdm import tqdm

from creature.data.recordings.media import encode_sound
from creature.data.recordings.schema import TRACKS, RecordingsWriter, recording_features, to_arrow
from creature.errors import UserError
from creature.files import lock_folder, replace_file, require_writable
from creature.world.body import JOINTS, SIDES
from creature.world.room import LIFE_TICKS, NUM_BLEND_SHAPES, SUBFRAMES, Room
from creature.world.teacher import Teacher
from creature.world.visit import SAMPLES
from ticks_creature import TICK_SECONDS

VALIDATION_EVERY = 10  # of ten lives, the second is for validation
SEEN_AT = (SUBFRAMES - 1) / SUBFRAMES  # share of a tick after which the eyes see
FELT_AT = 0.5  # share of a tick at which its contacts are noted
WEBP_QUALITY = 90
NAMES = {
    "joints": JOINTS,
    "blend_shapes": [f"shape_{number}" for number in range(NUM_BLEND_SHAPES)],
    "eyes": list(SIDES),
}
ABOUT = {"source": "the room", "license": "CC0-1.0"}


def split_of(number: int) -> str:
    return "validation" if number % VALIDATION_EVERY == 1 else "train"


def record_life(room: Room, seed: int, number: int, life_ticks: int = LIFE_TICKS) -> dict:
    """Live one life as the teacher and return it as a row of recordings."""
    life_seed = int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:6], "big")
    about = {"recording_id": f"{room.split} {number}", "split_group": f"room {number}"} | ABOUT
    return about | record_teacher(room, life_seed, life_ticks)


def record_teacher(room: Room, seed: int, life_ticks: int = LIFE_TICKS) -> dict:
    """
    The life of the teacher in the room of a seed, as the columns of recordings.

    Row t of every column is of tick t: what was sensed in it, what was commanded for it, thought and said in it. The
    first command is to stay as it is.
    """
    room.reset(seed, life_ticks)
    teacher, notes = Teacher(room, seed), LifeNotes()
    commands = [room.resting()]
    notes.sense(room)
    while len(commands) < life_ticks:
        commands.append(teacher.act())
        room.act(**commands[-1])
        notes.sense(room, teacher.thoughts, teacher.said)
    room.act(**teacher.act())  # nobody senses it, but what was asked is judged to the end
    silence = np.zeros(SAMPLES, np.float32)
    voice = [silence if command["voice"] is None else command["voice"] for command in commands]
    return notes.columns() | {
        "voice": encode_sound(_to_int16(voice), "voice"),
        "command_rotations": _track(commands, "rotations"),
        "blend_shapes": _track(commands, "blend_shapes"),
        "eyes": _track(commands, "eyes"),
    }


class LifeNotes:
    """What is sensed, thought and said in a life in the room, tick by tick: `sense`, and in the end its `columns`."""

    def __init__(self):
        self.senses, self.texts = [], {"external_voice": [], "internal_text": [], "external_text": []}

    def sense(self, room: Room, thoughts: Sequence[dict] = (), said: Sequence[dict] = ()) -> None:
        """Note the present tick of a room, and words that were thought and said, {word, start} each."""
        now = room.perceive()
        images = [_encode_picture(picture) for picture in now["images"]]
        self.senses.append(now | {"images": images, "time": room.time})
        for words, new in zip(self.texts.values(), (now["external_voice"], thoughts, said), strict=True):
            words.extend(new)

    def columns(self) -> dict:
        """The columns of recordings: those of the senses, and the three texts."""
        senses = self.senses
        ticks = np.arange(len(senses)) * TICK_SECONDS
        # Nobody knows when a word ends, and a tick later it has been heard, thought or said.
        texts = {
            name: [word | {"end": word["start"] + TICK_SECONDS} for word in words] for name, words in self.texts.items()
        }
        return {
            "duration": len(senses) * TICK_SECONDS,
            "audio": encode_sound(_to_int16([row["audio"] for row in senses]), "ears"),
            "images": [
                {"name": f"{side}_eye", "images": [row["images"][place] for row in senses],
                 "times": ticks + SEEN_AT * TICK_SECONDS}
                for place, side in enumerate(SIDES)
            ],
            "joint_positions": _track(senses, "joint_positions"),
            "joint_rotations": _track(senses, "joint_rotations"),
            "touch": [
                contact | {"time": row["time"] + FELT_AT * TICK_SECONDS} for row in senses for contact in row["touch"]
            ],
        } | texts  # fmt: skip


def _track(rows: list[dict], name: str) -> dict:
    """A column of numbers with their times, a row a tick or a row a sub-frame."""
    values = np.stack([row[name] for row in rows]).astype(np.float32)
    fine = name in ("joint_positions", "joint_rotations", "rotations")
    steps = SUBFRAMES if fine else 1
    values = values.reshape(-1, *values.shape[2:]) if fine else values
    return {"values": values, "times": np.arange(len(rows) * steps) * TICK_SECONDS / steps}


def record_lives(
    folder: str, minutes: float, workers: int, seed: int, eye: int, progress: bool = True, life_ticks: int = LIFE_TICKS
) -> dict:
    """
    Record lives into a folder and return its recordings.json; the same seed gives the same folder.

    A killed recording goes on where it was: its lives lie in a hidden folder beside the output until all are there.
    UserError for an output that exists, for settings that are not those of the lives that are there, for fewer minutes
    than those lives have, and without OpenGL or the libraries of the room.
    """
    writer = RecordingsWriter(folder)
    count = max(2, math.ceil(minutes * 60 / (life_ticks * TICK_SECONDS)))
    parts = writer.folder.with_name(f".{writer.folder.name}.lives")
    require_writable(parts.parent)
    parts.mkdir(exist_ok=True)
    try:
        lock = lock_folder(parts)
    except BlockingIOError:
        raise UserError(f"{folder} is being recorded by another process: wait, or choose another") from None
    try:
        settings = {"seed": seed, "eye": eye, "life_ticks": life_ticks}
        _check_settings(parts / "settings.json", settings)
        _check_count(parts, count, minutes, life_ticks)
        missing = [number for number in range(count) if not _part(parts, number).is_file()]
        with tqdm(total=count, initial=count - len(missing), desc="lives", unit="life", disable=not progress) as bar:
            _record_missing(parts, missing, workers, settings, bar.update)
        with writer, tqdm(total=count, desc="joining", unit="life", disable=not progress) as bar:
            for number in range(count):
                writer.add(_read_part(_part(parts, number)), split_of(number), NAMES)
                bar.update()
            minutes = round(count * life_ticks * TICK_SECONDS / 60, 2)
            writer.facts["report"] = {"lives": count, "minutes": minutes} | settings
    finally:
        if lock is not None:
            os.close(lock)
    shutil.rmtree(parts)
    return writer.facts


def _record_missing(parts: Path, missing: list[int], workers: int, settings: dict, done: Callable) -> None:
    if workers <= 1:
        for number in missing:
            _record_part(parts, number, split_of(number), **settings)
            done()
        return
    # Processes are spawned: OpenGL and MuJoCo do not survive a fork.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_end_with_parent) as pool:
        lives = [pool.submit(_record_part, parts, number, split_of(number), **settings) for number in missing]
        try:
            for life in as_completed(lives):
                life.result()
                done()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work forever."""

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


_ROOMS: dict[tuple[str, int], Room] = {}  # of this process: OpenGL is opened once


def _record_part(parts: Path, number: int, split: str, seed: int, eye: int, life_ticks: int) -> None:
    """Record one life into a file of its own, which is whole or not there."""
    if (split, eye) not in _ROOMS:
        _ROOMS[split, eye] = Room(split=split, eye=eye)
    row = dict.fromkeys(recording_features()) | record_life(_ROOMS[split, eye], seed, number, life_ticks)
    row |= {name: to_arrow(row[name]) for name in TRACKS if row[name] is not None}
    batch = pyarrow.RecordBatch.from_pylist([row], schema=recording_features().arrow_schema)
    with replace_file(_part(parts, number)) as file, pyarrow.ipc.new_stream(file, batch.schema) as stream:
        stream.write_batch(batch)


def _part(parts: Path, number: int) -> Path:
    return parts / f"{number:06d}.arrow"


def read_row(table: pyarrow.Table) -> dict:
    """The only row of a table of recordings; tracks as numpy, because Python lists of so many numbers take seconds."""
    row = table.drop_columns(list(TRACKS)).to_pylist()[0]
    for name in TRACKS:
        column = table.column(name).combine_chunks()
        if column.null_count:
            continue
        (values, times), shape = column.flatten(), []
        while pyarrow.types.is_list(values.type):
            values = values.flatten()
            shape.append(len(values))
        shape = [after // before for before, after in zip([1, *shape], shape, strict=False)]
        row[name] = {"values": values.to_numpy().reshape(shape), "times": times.flatten().to_numpy()}
    return row


def _read_part(path: Path) -> dict:
    with pyarrow.OSFile(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
        return read_row(stream.read_all())


def _check_settings(path: Path, settings: dict) -> None:
    if path.is_file() and any(path.parent.glob("*.arrow")):
        before = json.loads(path.read_text(encoding="utf-8"))
        if before != settings:
            raise UserError(
                f"{path.parent} holds lives that were recorded with {before} and not {settings}: record with the same "
                "settings to go on, or remove that folder to begin again"
            )
    with replace_file(path, "w") as file:
        json.dump(settings, file)


def _check_count(parts: Path, count: int, minutes: float, life_ticks: int) -> None:
    """UserError for lives beyond the first `count`, which would be removed in the end."""
    last = max((int(path.stem) for path in parts.glob("*.arrow")), default=0)
    if last >= count:
        enough = (last + 0.5) * life_ticks * TICK_SECONDS / 60  # any number within the last life
        raise UserError(
            f"{parts} holds lives of a longer recording, and --minutes {minutes:g} would lose those after the first "
            f"{count:,}: give --minutes {enough:.1f} or more, or remove that folder to begin again"
        )


def _encode_picture(picture: np.ndarray) -> dict:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "WEBP", quality=WEBP_QUALITY, method=0)
    return {"bytes": file.getvalue(), "path": None}


def _to_int16(pieces: list[np.ndarray]) -> np.ndarray:
    return np.round(np.clip(np.concatenate(pieces), -1, 1) * 32767).astype(np.int16)
