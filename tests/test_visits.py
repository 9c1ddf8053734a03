"""A life in the room is one visit after another: what is new in each, what goes on, and what is not kept."""

import dataclasses
import gc
import pickle
import weakref

import numpy as np
import pytest
from test_room import JOINTED, Room, change_things, differing, live, open_room, thinks, tones

from creature.world import scene, script
from creature.world import teacher as teachers
from creature.world import visit as visits
from creature.world.body import HINGED, SIDES, angles_of, quaternions_of, reach
from creature.world.recording import record_life
from creature.world.scene import SIDE_PLACES
from creature.world.teacher import Teacher
from creature.world.visit import DARK_TICKS, NOISE, VISIT_SECONDS, Visit
from ticks_creature import TICK_SECONDS

BEFORE = 40  # ticks of the first visit that are lived


@pytest.fixture(scope="module")
def room():
    """A room, in which voices are tones, which are made sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "speak", tones)
        patch.setattr(teachers, "speak", tones)
        yield open_room()


@pytest.fixture(scope="module")
def seam(room):
    """(ticks from the end of the first visit to what is seen in the second, both visits, the room then)."""
    first = Visit(0, room.split)
    ticks = live(room, 0, thinks(*scene.COLORS), BEFORE)
    return ticks, (first, Visit(0, room.split, first)), room.setting


def test_the_next_visit_begins_in_the_dark_with_other_things_and_visitors(seam):
    ticks, (first, second), setting = seam
    assert second.begin == first.end and second.light == first.end + DARK_TICKS
    black = [not tick["images"].any() for tick in ticks]
    assert all(black[BEFORE : BEFORE + DARK_TICKS])
    assert not black[BEFORE - 1] or not black[BEFORE - 2]  # a blink is no night
    assert not black[BEFORE + DARK_TICKS] or not black[BEFORE + DARK_TICKS + 1]
    assert setting == second.setting and setting.things != first.setting.things
    assert not {voice for _, voice in first.setting.visitors} & {voice for _, voice in setting.visitors}
    same = ("split", "table_height", "cell", "heading", "colors")
    assert all(getattr(first.setting, name) == getattr(setting, name) for name in same)
    before, after = ([tick["images"] for tick in part if tick["images"].any()]
                     for part in (ticks[:BEFORE], ticks[BEFORE:]))  # fmt: skip
    assert np.mean(before[-1] != after[0]) > 0.2
    thoughts = [word for tick in ticks for word in tick["thoughts"]]
    names = [name for name, _ in setting.visitors]
    assert thoughts[:3] == ["that", "is", names[0]] and thoughts[3:6] == ["that", "is", names[1]]


def test_the_body_and_its_commands_go_on_where_the_table_is_set_anew(seam):
    ticks, _, _ = seam
    dark = range(BEFORE, BEFORE + DARK_TICKS + 2)
    for name in ("joint_positions", "joint_rotations", "rotations", "eyes", "blend_shapes"):
        values = np.stack([tick[name] if name in JOINTED else tick["command"][name] for tick in ticks])
        steps = np.abs(np.diff(values, axis=0)).reshape(len(ticks) - 1, -1).max(axis=1)
        steps = {tick: step for tick, step in enumerate(steps, 1) if name not in ("blend_shapes", "eyes") or step < 0.9}
        ordinary = [step for tick, step in steps.items() if tick not in dark]
        assert max(step for tick, step in steps.items() if tick in dark) <= max(ordinary), name
    skin = [[one["point"] for one in tick["touch"] if one["surface"] < 3] for tick in ticks]
    assert set(skin[BEFORE - 1]) & set(skin[BEFORE + DARK_TICKS])  # feet


def test_nothing_but_the_eyes_tells_what_was_put_on_the_table(room, seam, monkeypatch):
    ticks, _, _ = seam
    heard = [tick["audio"] for tick in ticks[BEFORE : BEFORE + DARK_TICKS + 2]]
    assert np.abs(heard).max() < 6 * NOISE  # no knock
    other = {"left": "right", "right": "left", "middle": "middle"}
    kinds, colors = list(scene.SHAPES), list(scene.COLORS)
    change = change_things(
        kind=lambda one: kinds[kinds.index(one.kind) - 1],
        color=lambda one: colors[colors.index(one.color) - 1],
        side=lambda one: other[one.side],
        place=lambda one: (one.place[0], SIDE_PLACES[other[one.side]]),
        temperature=lambda one: 70.0 - one.temperature,
        feel=lambda one: "smooth" if one.feel == "rough" else "rough",
        mass=lambda one: 0.9 - one.mass,
    )
    draw_next = visits.draw_next
    monkeypatch.setattr(visits, "draw_next", lambda draw, setting: change(draw_next(draw, setting)))
    assert differing(ticks, live(room, 0, thinks(*scene.COLORS), BEFORE)) == {"images"}


def test_a_longer_life_begins_as_a_shorter_one(room):
    lives = []
    for ticks in (24, 48, 45_000):
        room.reset(1, ticks)
        script = [(request.text, request.begins) for request in room.visit.script]
        lived = [room.perceive()]
        while room.tick < 24 and not room.done:
            room.act(**room.resting())
            lived.append(room.perceive())
        assert room.done == (ticks == 24)
        lives.append((script, lived))
    assert room.requests[0].begins < 24 * TICK_SECONDS < room.requests[0].heard  # the end of the first cuts a sentence
    assert pickle.dumps(lives[0]) == pickle.dumps(lives[1]) == pickle.dumps(lives[2])


def test_nothing_is_asked_that_only_an_earlier_visit_tells(room, monkeypatch):
    recalled, lengths = 0, []
    for seed in range(10):
        visit = None
        for number in range(4):
            visit = Visit(seed, "train", visit)
            lengths.append((visit.end - visit.begin) * TICK_SECONDS)
            told, names = [], [name for name, _ in visit.setting.visitors]
            assert visit.number == number and [one.name for one in visit.script[:2]] == names
            assert visit.script[0].things == visit.setting.things
            assert visit.light * TICK_SECONDS < visit.script[0].begins
            assert visit.script[-1].until <= visit.end * TICK_SECONDS
            for request in visit.script:
                assert request.name in names and (request.kind != "who" or request.answer in names)
                told.append(request.details)
                if request.kind.endswith("?"):
                    recalled += 1
                    assert {name: value for name, value in request.details.items() if name != "answer"} in told[:-1]
    assert recalled > 5 and -0.1 < min(lengths) - VISIT_SECONDS[0] < 2 and -2 < max(lengths) - VISIT_SECONDS[1] < 0.1
    room.reset(0)
    room.requests = [dataclasses.replace(room.visit.script[0], kind="push")]
    room.tick, room.felt = room.visit.end - 1, [(room.setting.things[0], "push")]
    for _ in range(DARK_TICKS + 1):
        room.act(**room.resting())
    assert room.tick == room.visit.light and room.felt == []
    room._judge_deeds({(0, room.model.geom("thing0").id): np.ones(4)})
    assert room.felt == [(room.setting.things[0], "")]  # it was not asked to push this one


def test_nothing_of_a_visit_is_kept_but_what_was_asked(room):
    room.reset(0, ticks=45_000)
    visit, first = weakref.ref(room.visit), room.visit.end
    lengths = []
    for _ in range(3):
        room.requests.append(room.visit.script[0])
        room.tick = room.visit.end - 1
        for _ in range(DARK_TICKS + 2):
            room.act(**room.resting())
        lengths.append(len(room._sounding) / 16_000)
    gc.collect()
    assert visit() is None and room.visit.number == 3 and room.tick > first
    assert all(request.samples is None for request in [*room.requests, *room.visit.script])
    assert max(lengths) < VISIT_SECONDS[1] + 1


def test_a_knock_sounds_on_behind_the_end_of_a_visit(room):
    room.reset(0)
    room.tick = room.visit.end - 1
    room._knock(1000.0, room.tick + 0.5)
    room.act(**room.resting())
    assert np.abs(room.perceive()["audio"][:640]).max() > 10 * NOISE


def test_the_teacher_drops_what_it_does_when_others_come_and_its_arm_moves_on(room, monkeypatch):
    room.reset(0)
    room.tick = room.visit.end - 34
    teacher, request, states = Teacher(room, 0), room.visit.script[2], []
    room.requests, room.visit.script = [dataclasses.replace(request, kind="touch", thing=0, heard=room.time)], []
    old, set_table = room.thing_place(0), Room._set_table

    def nearest() -> float:
        hands = [room.data.body(f"{side}_hand").xpos for side in SIDES]
        return min(np.linalg.norm(hand[:2] - old[:2]) for hand in hands)

    def note(room, setting):
        states.append([values[-1 - 3 * len(HINGED) :].copy() for values in (room.data.qpos, room.data.qvel)])
        if len(states) == 1:
            set_table(room, setting)
            note(room, setting)

    monkeypatch.setattr(Room, "_set_table", note)
    while room.visit.number == 0:
        room.act(**teacher.act())
    assert teacher.task is not None and teacher.target == 0 and nearest() < 0.12
    while room.tick < room.visit.light + 3:
        room.act(**teacher.act())
        assert not teacher.thoughts and teacher.task is None and teacher.target is None
    assert nearest() > 0.16  # its hands rest
    assert np.array_equal(*states) and np.abs(states[0][1]).max() > 0.5


def test_a_body_that_is_thrown_off_its_pose_comes_back(room):
    room.reset(3)
    teacher, elbows, off, head = Teacher(room, 3), [HINGED.index(f"{side}_elbow") for side in SIDES], [], []
    lids = []
    for _ in range(160):
        command = teacher.act()
        room.act(**command)
        angles = np.degrees(angles_of(command["rotations"])[-1] - room.start)
        off.append(np.abs(angles[elbows]).max())
        head.append(angles[HINGED.index("head")])
        lids.append(command["eyes"][0, 3])
    lids = np.array(lids)
    fallen = (lids[:-1] > 0) & (lids[:-1] < 0.97) & (lids[1:] > 0)  # and no blink
    assert fallen.sum() > 10 and np.mean(np.diff(lids)[fallen] > 0) > 0.7 and lids[-1] > 0.6
    assert np.abs(np.diff(head, axis=0)).max() > 4  # in a tick, where it turns by 2 degrees at most of itself
    thrown = np.flatnonzero(np.diff(off) > 0.5)
    assert len(thrown) > 2 and max(off) > 1.5
    for throw in thrown[thrown < len(off) - 12]:
        after = off[throw + 2 : throw + 12]  # no other throw comes sooner
        assert all(later < sooner for sooner, later in zip(after, after[1:], strict=False)) and after[-1] < after[0] / 3


def test_a_thing_that_is_put_where_a_hand_is_can_be_touched_when_the_hand_was_away(room):
    room.reset(1)
    visit = Visit(1, room.split, room.visit)
    thing, top = visit.setting.things[0], visit.setting.table_height
    side = "left" if thing.place[1] > 0 else "right"
    pose = reach(room.model, side, np.array([*thing.place, top + 0.04]), room.start)
    there, away = room.resting() | {"rotations": quaternions_of(np.stack([pose] * 4))}, room.resting()
    room.tick, rows = room.visit.end - 20, -len(HINGED) * 3
    joints = []
    while room.tick < visit.light + 10:
        room.act(**there)
        joints.append(room.data.qpos[rows:].copy())
        if room.tick >= visit.light:
            assert not room.touching() and np.allclose(room.thing_place(0)[:2], thing.place, atol=1e-3)
    hand = room.data.xpos[room.model.body(f"{side}_hand").id]
    assert np.linalg.norm(hand[:2] - thing.place) < 0.15
    assert np.abs(np.diff(joints[-16:], axis=0)).max() < 0.05
    touched = set()
    for command in (away, there):
        for _ in range(14):
            room.act(**command)
            touched |= room.touching()
    assert touched == {0}


def test_the_recording_of_a_seed_is_the_same_bytes(room, monkeypatch):
    monkeypatch.setattr(visits, "VISIT_SECONDS", (1.6, 2.0))
    one, other = (pickle.dumps(record_life(room, seed=3, number=0, life_ticks=60)) for _ in range(2))
    assert room.visit.number == 2 and one == other
