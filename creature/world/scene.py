"""What a room is made of: look, things on the table, visitors, all drawn from a seed; and its MuJoCo model.

Training and validation share no look of a room, no place to stand in it, no voice and no way to ask (`grammar.py`).
Whatever a thing is told by is drawn independently: its shape, its colour, its side, its temperature, its surface and
its weight.
"""

import colorsys
from dataclasses import dataclass, replace

import mujoco
import numpy as np

from creature.errors import UserError
from creature.world.body import body_xml
from creature.world.speech import Voice

COLORS = {
    "red": (0.85, 0.10, 0.10),
    "green": (0.10, 0.65, 0.15),
    "blue": (0.10, 0.20, 0.90),
    "yellow": (0.95, 0.85, 0.10),
    "white": (0.95, 0.95, 0.95),
    "black": (0.05, 0.05, 0.05),
    "orange": (0.95, 0.45, 0.05),
    "purple": (0.55, 0.10, 0.65),
}
# Type and half sizes in m, as MuJoCo takes them; height of the middle above the table; pitch of its sound, Hz.
SHAPES = {
    "ball": ("sphere", (0.055,), 0.055, 900),
    "box": ("box", (0.05, 0.05, 0.05), 0.05, 420),
    "can": ("cylinder", (0.042, 0.065), 0.065, 1700),
    "plate": ("cylinder", (0.085, 0.018), 0.018, 2600),
    "brick": ("box", (0.04, 0.085, 0.03), 0.03, 260),
    "bottle": ("capsule", (0.034, 0.055), 0.089, 3300),
}
SIDE_PLACES = {"left": 0.28, "middle": 0.0, "right": -0.28}  # y, m
TEMPERATURES = {"cold": (2, 9), "warm": (27, 33), "hot": (45, 58)}  # C
SURFACES = {"floor": 0, "table": 1, "skin": 2, "smooth": 3, "rough": 4, "soft": 5}  # what skin feels, by its id
FEELS = ("smooth", "rough", "soft")
WEIGHTS = {"light": (0.20, 0.28), "heavy": (0.55, 0.70)}  # kg
SPLITS = ("train", "validation")
# Hue of walls, floor and table; train has those below, validation those above.
HUES = {"train": (0.0, 0.75), "validation": (0.8, 0.95)}
CELL, CELLS = 0.5, 6  # m: places to stand are cells of a chessboard, the black ones for train, the white for validation
# Of eSpeak NG, each with a rate and a pitch that are drawn for a visit. Without the variants that breathe (f2, f3, f5
# ...): their noise comes from memory that eSpeak NG never set.
VOICES = {
    "train": (
        "en-us+m1", "en-us+f1", "en-gb-x-rp+m3", "en-gb-x-rp+Annie", "en-us+m7", "en-us+belinda", "en-us-nyc+m2",
        "en-gb-scotland+f1", "en-us+m6", "en-gb-x-gbclan+m8", "en-us+Alex", "en-gb-scotland+Denis",
        "en-us-nyc+Henrique", "en-us+Lee", "en-gb-x-rp+Michael", "en-us+adam", "en-us-nyc+aunty", "en-us+benjamin",
        "en-gb-x-gbcwmd+boris", "en-us+linda",
    ),
    "validation": ("en-029+m4", "en-gb-x-gbclan+anika", "en-us+steph", "en-gb-x-rp+m5"),
}  # fmt: skip
RATES, PITCHES, APART = (150, 191), 100, 30  # words a minute; pitches of eSpeak NG, and how far two visitors are apart
OWN_VOICE = Voice("en-us+f4", 175, 95)
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Leo", "Maria", "Paul")
FIELD_OF_VIEW = 85.0  # degrees


@dataclass(frozen=True)
class Thing:
    """An object on the table. `kind` is its shape; place in m, seen from the creature."""

    kind: str
    color: str
    side: str
    place: tuple[float, float]
    heat: str
    temperature: float
    feel: str
    weight: str
    mass: float


@dataclass(frozen=True)
class Setting:
    """A room with two visitors and their things: what a life in it, or a visit, begins from."""

    split: str
    things: list[Thing]
    visitors: list[tuple[str, Voice]]
    table_height: float
    cell: tuple[int, int]
    heading: float
    colors: dict[str, tuple]


def draw_setting(draw: np.random.Generator, split: str) -> Setting:
    """A room of a split. UserError for a split that is neither train nor validation."""
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r}: a room is for {' or '.join(SPLITS)}")
    things, visitors = draw_things(draw), _draw_visitors(draw, split)
    column, row = (int(number) for number in draw.integers(0, CELLS, 2))
    row += (row + column + SPLITS.index(split)) % 2 * (1 if row + 1 < CELLS else -1)
    tones = {}
    for part, (low, high) in {"wall": (0.5, 0.85), "floor": (0.25, 0.6), "table": (0.35, 0.7)}.items():
        tones[part] = colorsys.hsv_to_rgb(draw.uniform(*HUES[split]), draw.uniform(0.1, 0.45), draw.uniform(low, high))
    skin = draw.uniform(0.35, 0.95) * np.array([1.0, 0.78, 0.66])
    return Setting(
        split, things, visitors, draw.uniform(0.96, 1.03), (column, row), draw.uniform(0, 2 * np.pi),
        tones | {"skin": tuple(skin)},
    )  # fmt: skip


def draw_next(draw: np.random.Generator, setting: Setting) -> Setting:
    """The same room with other visitors and other things."""
    return replace(setting, things=draw_things(draw), visitors=_draw_visitors(draw, setting.split))


def draw_things(draw: np.random.Generator) -> list[Thing]:
    """Two or three things on a table, each of another shape and color."""
    count = int(draw.integers(2, 4))
    sides = sorted(draw.choice(list(SIDE_PLACES), count, replace=False))
    kinds, colors = draw.choice(list(SHAPES), count, replace=False), draw.choice(list(COLORS), count, replace=False)
    things = []
    for kind, color, side in zip(kinds, colors, sides, strict=True):
        heat, weight = draw.choice(list(TEMPERATURES)), draw.choice(list(WEIGHTS))
        place = _draw_place(draw, side)
        temperature, mass = draw.uniform(*TEMPERATURES[heat]), draw.uniform(*WEIGHTS[weight])
        things.append(
            Thing(str(kind), str(color), str(side), place, str(heat), temperature, str(draw.choice(FEELS)), str(weight),
                  mass)
        )  # fmt: skip
    return things


def _draw_visitors(draw: np.random.Generator, split: str) -> list[tuple[str, Voice]]:
    voices, names = draw.choice(VOICES[split], 2, replace=False), draw.choice(NAMES, 2, replace=False)
    pitch = int(draw.integers(PITCHES))
    pitches = pitch, (pitch + int(draw.integers(APART, PITCHES - APART))) % PITCHES
    return [
        (str(name), Voice(str(voice), int(draw.integers(*RATES)), pitch))
        for name, voice, pitch in zip(names, voices, pitches, strict=True)
    ]


def _draw_place(draw: np.random.Generator, side: str) -> tuple[float, float]:
    return draw.uniform(0.42, 0.48), SIDE_PLACES[side] + draw.uniform(-0.03, 0.03)


def build(setting: Setting, eye: int) -> mujoco.MjModel:
    """The MuJoCo model of a room; things are the bodies thing0, thing1, ... and slide without turning."""
    text = lambda numbers: " ".join(f"{number:.5g}" for number in numbers)  # noqa: E731
    body, servos = body_xml(setting.colors["skin"], FIELD_OF_VIEW)
    still = 'contype="2" conaffinity="3" friction="0.5 0.005 0.0001"'  # floor and table; walls touch nobody
    size, top = CELL * CELLS / 2 + 0.7, setting.table_height  # no wall cuts a table
    place = (np.array(setting.cell) + 0.5) * CELL - CELL * CELLS / 2
    turn, centre = setting.heading, -_turned(place, setting.heading)
    geoms = [f'<geom name="floor" type="plane" size="6 6 1" rgba="{text(setting.colors["floor"])} 1" {still}/>']
    for number in range(4):
        angle = turn + number * np.pi / 2
        at, tone = centre + _turned((size, 0), angle), 1 - 0.12 * number
        geoms.append(
            f'<geom type="box" size="0.02 {size:.5g} 1.4" pos="{text((*at, 1.4))}" euler="0 0 {angle:.5g}" '
            f'rgba="{text(tone * np.array(setting.colors["wall"]))} 1" contype="0" conaffinity="0"/>'
        )
    table = f'rgba="{text(setting.colors["table"])} 1"'
    geoms.append(f'<geom name="table" type="box" size="0.26 0.56 0.02" pos="0.47 0 {top - 0.02:.5g}" {table} {still}/>')
    for x, y in ((0.25, 0.5), (0.25, -0.5), (0.69, 0.5), (0.69, -0.5)):
        geoms.append(
            f'<geom type="box" size="0.02 0.02 {top / 2 - 0.02:.5g}" pos="{x} {y} {top / 2 - 0.02:.5g}" {table} '
            'contype="0" conaffinity="0"/>'
        )
    for number, thing in enumerate(setting.things):
        kind, sizes, height, _ = SHAPES[thing.kind]
        slides = "".join(f'<joint type="slide" axis="{axis}" damping="0.4"/>' for axis in ("1 0 0", "0 1 0", "0 0 1"))
        geoms.append(
            f'<body name="thing{number}" pos="{text((*thing.place, top + height))}">{slides}'
            f'<geom name="thing{number}" type="{kind}" size="{text(sizes)}" mass="{thing.mass:.5g}" '
            f'rgba="{text(COLORS[thing.color])} 1" {still}/></body>'
        )
    newline = "\n"
    return mujoco.MjModel.from_xml_string(f"""
        <mujoco>
          <compiler angle="radian"/>
          <option timestep="0.005" integrator="implicitfast" cone="pyramidal" iterations="20"/>
          <visual>
            <global offwidth="{max(eye, 64)}" offheight="{max(eye, 64)}"/>
            <quality offsamples="0" shadowsize="0" numslices="14" numstacks="8" numquads="1"/>
            <headlight ambient="0.45 0.45 0.45" diffuse="0.25 0.25 0.25" specular="0 0 0"/>
            <map znear="0.01"/>
          </visual>
          <worldbody>
            <light pos="0 0 2.7" dir="0.3 0.1 -1" diffuse="0.5 0.5 0.5" specular="0 0 0" castshadow="false"/>
            {newline.join(geoms)}
            {body}
          </worldbody>
          <actuator>{servos}</actuator>
        </mujoco>""")


def _turned(place, angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.asarray(place, float)
