"""A live creature in the room of `creature/world`: it perceives, it acts, and what it was asked is judged."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from creature.errors import UserError
from creature.live.creature import LiveCreature
from creature.live.emission import Emission
from creature.world.body import JOINTS
from creature.world.room import LIFE_TICKS, NUM_BLEND_SHAPES, SUBFRAMES, Room
from creature.world.scene import SURFACES
from creature.world.script import Request
from creature.world.teacher import Teacher
from creature.world.visit import SAMPLES

# The senses of the room, each with the arguments of `tick` that it arrives in.
SENSES = {
    "audio": ("audio",),
    "vision": ("images",),
    "proprioception": ("joint_positions", "joint_rotations"),
    "touch": ("touch",),
    "external_voice": ("words",),
}


BODY = len(JOINTS), NUM_BLEND_SHAPES, SUBFRAMES
REMEDY = "take a creature that was trained on recordings of scripts/record_world.py"


@dataclass
class Success:
    """How many requests of a kind there were, how many succeeded, and how many do for one who picks at random."""

    asked: int = 0
    succeeded: int = 0
    chance: float = 0.0

    def add(self, request: Request) -> None:
        self.asked += 1
        self.succeeded += request.succeeded()
        self.chance += request.chance


def make_room(creature: LiveCreature, split: str = "validation") -> Room:
    """A room that the creature has the body for; UserError for another body, and without the libraries of the room."""
    config = creature.config
    body, wanted = (config.num_joints, config.num_blend_shapes, config.subframes_per_tick), BODY
    if "animation" not in creature.streams:  # it is not moved, and feels joints if it has any
        body, wanted = body[::2], wanted[::2]
    if body != wanted and ("animation" in creature.streams or config.num_joints):
        raise UserError(
            f"the creature has {config.num_joints} joints, {config.num_blend_shapes} face shapes and "
            f"{config.subframes_per_tick} sub-frames a tick, and the body in the room {BODY[0]}, {BODY[1]} and "
            f"{BODY[2]}: {REMEDY}"
        )
    skin = config.num_touch_points, config.num_touch_surfaces
    if 0 < skin[0] < len(JOINTS) or skin[0] and skin[1] <= max(SURFACES.values()):
        raise UserError(
            f"the skin of the creature has {skin[0]} points and {skin[1]} surfaces, and that of the body in the room "
            f"{len(JOINTS)} and {max(SURFACES.values()) + 1}: {REMEDY}"
        )
    if config.num_cameras not in (0, 2) or len(set(config.image_shape)) > 1:
        raise UserError("the body in the room has two eyes with square pictures: take a creature that sees with them")
    return Room(split=split, eye=config.image_shape[0])


def live_in_room(
    creature: LiveCreature, room: Room, seed: int, without: Iterable[str] = (), ticks: int = LIFE_TICKS
) -> Iterator[tuple[Emission, list[dict]]]:
    """
    A life in the room of a seed: (emission, the words that began to be heard) of each tick.

    without: names out of `SENSES` that it has to live without. ticks: after which it ends, an hour of them or more.
    """
    room.reset(seed, ticks)
    creature.reset()
    hidden = {argument for name in without for argument in SENSES[name]}
    command = room.resting()
    while not room.done:
        senses = room.perceive()
        heard = senses["external_voice"]
        given = {name: senses[name] for name in ("audio", "images", "joint_positions", "joint_rotations", "touch")}
        given["words"] = [word["word"] for word in heard]
        emission = creature.tick(**{name: value for name, value in given.items() if name not in hidden})
        yield emission, heard
        for name in ("rotations", "blend_shapes", "eyes"):
            if getattr(emission, name) is not None:
                command[name] = getattr(emission, name)
        sound = emission.sound
        command["voice"] = sound if sound is not None and len(sound) == SAMPLES else None
        room.act(**command, words=[word["word"] for word in emission.said])


def live_as_teacher(room: Room, seed: int, ticks: int = LIFE_TICKS) -> None:
    """The life of the recorded teacher in the room of a seed. ticks: after which it ends."""
    room.reset(seed, ticks)
    teacher = Teacher(room, seed)
    while not room.done:
        room.act(**teacher.act())


def count(room: Room, kinds: dict[str, Success]) -> None:
    """Add the requests of a life that asked for something, but for one that its end has cut."""
    for request in room.requests:
        if request.chance is not None and request.until <= room.time:
            kinds.setdefault(request.kind, Success()).add(request)


def success_table(creature: dict[str, Success], teacher: dict[str, Success] | None = None) -> list[str]:
    """The lines of a table: each kind of request, how often it was done, by the teacher, and by chance."""
    if not creature:
        return ["nothing was asked for yet: a longer life is asked to touch, to look and to tell"]
    lines = [f"{'asked for':<14}{'times':>7}{'done':>7}{'chance':>8}" + (f"{'teacher':>9}" if teacher else "")]
    rows = [(kind, creature[kind], (teacher or {}).get(kind)) for kind in sorted(creature)]
    parts = [[one for _, one, _ in rows], [one for *_, one in rows if one is not None]]
    all_of = [
        Success(*(sum(getattr(one, name) for one in part) for name in ("asked", "succeeded", "chance")))
        for part in parts
    ]
    for kind, one, other in [*rows, ("all", *all_of)]:
        line = f"{kind:<14}{one.asked:>7}{_share(one.succeeded, one)}{_share(one.chance, one):>8}"
        lines.append(line + (f"{_share(other.succeeded, other):>9}" if teacher and other else ""))
    return lines


def _share(part: float, of: Success) -> str:
    return f"{part / of.asked if of.asked else np.nan:7.2f}"
