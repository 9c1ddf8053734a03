"""The room: its senses and commands, what each sense alone can tell, and the recordings that come out of it."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from creatures import GPT2

from creature.errors import UserError

pytest.importorskip("espeakng_loader")
pytest.importorskip("soundfile")
pytest.importorskip("av")
pytest.importorskip("creature.world", exc_type=(ImportError, UserError))  # without mujoco or OpenGL

import mujoco

from creature.data.recordings.clips import organs_of
from creature.data.recordings.schema import FACE, RecordingsWriter, load_recordings
from creature.data.text.tokenizer import load_tokenizer
from creature.live.in_room import live_as_teacher
from creature.settings import PROJECT
from creature.world import grammar, recording, scene, script
from creature.world import room as rooms
from creature.world import teacher as teachers
from creature.world import visit as visits
from creature.world.body import HINGED, JOINTS, angles_of, quaternions_of
from creature.world.film import write_film
from creature.world.recording import record_life, record_lives, record_teacher
from creature.world.room import LIFE_TICKS, Room
from creature.world.scene import SIDE_PLACES, draw_setting
from creature.world.speech import Voice, speak
from creature.world.teacher import Teacher
from creature.world.visit import Visit
from processing_creature import CreatureProcessor
from ticks_creature import TICK_SECONDS

JOINTED = ("joint_positions", "joint_rotations")


@pytest.fixture(scope="module")
def room() -> Room:
    return open_room()


def open_room() -> Room:
    """A room with small eyes; without OpenGL the test is skipped."""
    try:
        return Room(eye=24)
    except UserError as error:
        if "OpenGL" not in str(error):
            raise
        pytest.skip(str(error))


def live(room: Room, seed: int, until, before_end: int | None = None) -> list[dict]:
    """
    Senses, commands and words of every tick of a life, up to the tick at which `until(tick)` is true.

    before_end: ticks of the first visit that are lived, the last ones; None for all.
    """
    room.reset(seed)
    room.tick = 0 if before_end is None else room.visit.end - before_end
    teacher, ticks, command = Teacher(room, seed), [], room.resting()
    thoughts = []
    while not room.done:
        ticks.append({**room.perceive(), "command": command, "thoughts": thoughts})
        if until(ticks[-1]):
            break
        command = teacher.act()
        room.act(**command)
        thoughts = [one["word"] for one in teacher.thoughts]
    return ticks


def thinks(*words: str):
    return lambda tick: bool(set(words) & set(tick["thoughts"]))


def first_life(room: Room, kind: str, test=lambda setting, request: True) -> int:
    """A seed whose third event, behind two greetings, is of a kind."""
    for seed in range(400):
        visit = Visit(seed, room.split)
        if visit.script[2].kind == kind and test(visit.setting, visit.script[2]):
            return seed
    raise AssertionError(kind)


def tones(text: str, voice: Voice) -> tuple[np.ndarray, list]:
    """In place of `speak`: a word every 0.2 s, in a tone by which a voice is known."""
    words = [(word.strip(".,?!"), 0.2 * number) for number, word in enumerate(text.split())]
    pitch = 300 + 10 * voice.pitch + voice.rate
    return 0.3 * np.sin(np.arange(int(3200 * len(words))) * 2 * np.pi * pitch / 16_000), words


@pytest.fixture
def toned(room, monkeypatch) -> Room:
    """The room, in which voices are tones, which are made sooner."""
    monkeypatch.setattr(script, "speak", tones)
    monkeypatch.setattr(teachers, "speak", tones)
    return room


def differing(first: list[dict], second: list[dict]) -> set[str]:
    """
    The senses, and the command, that differ before the last tick of two lives of the same length.

    Places of joints count from a tenth of a millimetre on, forces from a hundredth: where things lie changes the order
    in which MuJoCo adds numbers.
    """
    assert len(first) == len(second)
    found = set()
    for one, other in zip(first[:-1], second[:-1], strict=True):
        assert one["thoughts"] == other["thoughts"]
        found |= {name for name in ("audio", "images") if not np.array_equal(one[name], other[name])}
        found |= {name for name in JOINTED if not np.allclose(one[name], other[name], rtol=0, atol=1e-4)}
        found |= {"external_voice"} if one["external_voice"] != other["external_voice"] else set()
        found |= {"touch"} if not same_touch(one["touch"], other["touch"]) else set()
        for name, value in one["command"].items():
            same = value == other["command"][name] if name == "words" else np.array_equal(value, other["command"][name])
            found |= set() if same else {"command"}
    return found


def same_touch(first: list[dict], second: list[dict]) -> bool:
    if [one["point"] for one in first] != [one["point"] for one in second]:
        return False
    return all(np.allclose(list(one.values()), list(other.values()), rtol=0.01, atol=0.01)
               for one, other in zip(first, second, strict=True))  # fmt: skip


def test_senses_come_in_the_shapes_of_the_schema(room):
    room.reset(0)
    senses = room.perceive()
    assert senses["audio"].shape == (1280,) and senses["audio"].dtype == np.float32
    assert senses["images"].shape == (2, 24, 24, 3) and senses["images"].dtype == np.uint8
    assert senses["images"].std() > 10 and (senses["images"][0] != senses["images"][1]).any()
    assert senses["joint_positions"].shape == (4, 24, 3) and senses["joint_rotations"].shape == (4, 24, 4)
    assert np.allclose(np.linalg.norm(senses["joint_rotations"], axis=-1), 1, atol=1e-6)
    assert not senses["joint_positions"][:, 0].any()  # the pelvis is where they are measured from
    feet = [one for one in senses["touch"] if one["surface"] == scene.SURFACES["floor"]]
    weight = room.model.body_subtreemass[room.model.body("pelvis").id] * 9.81
    assert 0.2 * weight < sum(one["force"] for one in feet) < 1.2 * weight


def test_rotations_and_angles_are_inverse():
    angles = np.random.default_rng(0).uniform(-1.4, 1.4, (4, len(HINGED), 3))
    assert np.allclose(angles_of(-2 * quaternions_of(angles)), angles)


def test_a_command_takes_effect_one_tick_later(room):
    room.reset(0)
    angles = angles_of(room.resting()["rotations"])
    angles[:, HINGED.index("neck"), 2] += 0.5
    moved = []
    for _ in range(12):
        moved.append(room.perceive()["joint_rotations"][-1, JOINTS.index("neck")])
        room.act(quaternions_of(angles))
    turned = [2 * np.degrees(np.arccos(min(1, abs(one @ moved[0])))) for one in moved]
    assert max(turned[:2]) < 1.5 and turned[2] > 3 and abs(turned[-1] - np.degrees(0.5)) < 4


def test_bad_commands_are_refused(room):
    room.reset(0)
    with pytest.raises(ValueError, match=r"rotations must be finite numbers of shape \[4, 24, 4\]"):
        room.act(np.zeros((24, 4)))
    with pytest.raises(UserError, match="no split 'test'"):
        Room(split="test")


def test_closed_eyes_and_own_voice(room):
    room.reset(0)
    command = room.resting()
    command["eyes"][:, 3] = 0.0
    tone = 0.5 * np.sin(np.arange(1280) * 0.3)
    for _ in range(2):
        room.act(**(command | {"voice": tone}))
    assert not room.perceive()["images"].any()
    assert np.corrcoef(room.perceive()["audio"], tone)[0, 1] > 0.9


def test_a_sentence_sounds_the_same_whenever_it_is_said():
    voice = Voice("en-us+f1", 165, 60)
    samples, words = speak("Hello, I am Anna.", voice)
    speak("Where is the red one?", Voice("en-us+m1", 180, 20))
    again, _ = speak("Hello, I am Anna.", voice)
    assert np.array_equal(samples, again) and np.abs(samples).max() > 0.1
    assert [word for word, _ in words] == ["hello", "I", "am", "Anna"]
    assert all(before <= after for (_, before), (_, after) in zip(words, words[1:], strict=False))
    with pytest.raises(UserError, match="no voice 'nobody'"):
        speak("Hello.", Voice("nobody", 165, 50))


# ---------------------------------------------------------------------------------------------------------------------
# Each sense is the only witness of something: two lives that differ in one fact differ for one sense
# ---------------------------------------------------------------------------------------------------------------------


def twins(room: Room, monkeypatch, seed: int, change, until) -> set[str]:
    """What differs between a life and one with another fact, up to the word that tells the fact."""
    first = live(room, seed, until)
    with monkeypatch.context() as patch:
        patch.setattr(visits, "draw_setting", lambda draw, split: change(draw_setting(draw, split)))
        return differing(first, live(room, seed, until))


def change_things(**changes):
    def change(setting):
        new = [dataclasses.replace(one, **{name: to(one) for name, to in changes.items()}) for one in setting.things]
        return dataclasses.replace(setting, things=new)

    return change


def test_only_the_eyes_know_the_side_and_the_color(toned, monkeypatch):
    monkeypatch.setattr(teachers, "THROWN", [])  # once in some lives, a hand that is thrown off strikes a thing
    seed = first_life(toned, "touch", lambda setting, request: len(setting.things) == 3)
    other = {"left": "right", "right": "left", "middle": "middle"}
    mirror = change_things(
        side=lambda one: other[one.side], place=lambda one: (one.place[0], SIDE_PLACES[other[one.side]])
    )
    assert twins(toned, monkeypatch, seed, mirror, thinks(*scene.COLORS)) == {"images"}
    seed = first_life(toned, "color")
    colors = list(scene.COLORS)
    paint = change_things(color=lambda one: colors[colors.index(one.color) - 1])
    assert twins(toned, monkeypatch, seed, paint, thinks(*colors)) == {"images"}


def test_only_the_eyes_know_how_the_table_was_changed(toned, monkeypatch):
    seed = first_life(toned, "change")

    def until(tick):  # behind what it saw before the change
        return len(toned.requests) > 2 and thinks(*scene.COLORS)(tick)

    first, things, colors = live(toned, seed, until), toned.setting.things, list(scene.COLORS)

    def otherwise(draw):
        new = scene.draw_things(draw)
        places = [(one.side, one.place) for one in new]
        return [
            dataclasses.replace(one, color=colors[colors.index(one.color) - 1], side=side, place=place)
            for one, (side, place) in zip(new, places[1:] + places[:1], strict=True)
        ]

    monkeypatch.setattr(script, "draw_things", otherwise)
    second = live(toned, seed, until)
    assert toned.setting.things != things and first[-1]["thoughts"] != second[-1]["thoughts"]
    assert differing(first, second) == {"images"}
    dark = "".join("-D"[not tick["images"].any()] for tick in first)  # a blink, of one tick, is no night
    assert "D" * round(script.CHANGE_SECONDS / TICK_SECONDS) in dark and not dark.endswith("DDDD")


@pytest.mark.parametrize("count", [2, 3])
def test_it_thinks_what_is_on_the_changed_table(toned, count):
    seed = first_life(toned, "change", lambda setting, request: len(request.things) == count)
    toned.reset(seed)
    before = toned.setting.things
    ticks = live(toned, seed, lambda tick: len(toned.requests) > 3)
    thoughts, there = [word for tick in ticks for word in tick["thoughts"]], []
    for number in sorted(range(count), key=lambda number: -toned.thing_place(number)[1]):
        shade, place = toned.model.geom(f"thing{number}").rgba[:3], toned.thing_place(number)
        color = min(scene.COLORS, key=lambda color: np.abs(scene.COLORS[color] - shade).sum())
        side = min(SIDE_PLACES, key=lambda side: abs(SIDE_PLACES[side] - place[1]))
        thing = toned.setting.things[number]
        there += ["the", color, thing.kind, side]
        assert np.allclose(place[:2], thing.place, atol=1e-3)
        sizes = scene.SHAPES[thing.kind][1]
        assert np.allclose(toned.model.geom(f"thing{number}").size[: len(sizes)], sizes)
    seen = ["I", "see", *there]
    assert thoughts[-len(seen) :] == seen  # behind both greetings
    assert not set(before) & set(toned.setting.things)


def test_what_was_felt_is_remembered_when_other_things_are_there(toned):
    toned.reset(first_life(toned, "change"))
    thing, other = toned.setting.things[:2]
    thing, other = dataclasses.replace(thing, heat="hot", weight="heavy"), dataclasses.replace(other, heat="cold")
    toned.felt = felt = [(thing, "touch"), (other, "push")]
    while {thing.kind, other.kind} <= {one.kind for one in toned.setting.things} or toned.dark:
        toned.act(**toned.resting())
    assert toned.felt == felt
    assert [script.remembered(felt, quality) for quality in ("hot", "cold")] == [thing.kind, other.kind]
    assert script.remembered([(thing, "touch")], "heavy") == "nothing"  # nobody pushed it
    assert script.remembered([(thing, "touch"), (thing, "push")], "heavy") == thing.kind


def test_requests_are_about_the_table_as_it_is(monkeypatch):
    monkeypatch.setattr(script, "speak", tones)
    changes = 0
    for seed in range(30):
        draw = np.random.default_rng(seed)
        setting = draw_setting(draw, "train")
        things = setting.things
        for request in script.write_script(draw, setting, 0.0, 38.0):
            assert (request.things != things) == (request.kind == "change") == (not request.text)
            changes, things = changes + (request.kind == "change"), request.things
            for attribute in ("color", "side"):
                assert len({getattr(one, attribute) for one in things}) == len(things)
            if request.thing is not None:
                thing, details = things[request.thing], request.details
                named = {"the": thing.kind, f"the {thing.color}": f"{thing.color} one"}
                before, seen = details["seen"].split(f" {thing.kind} ")
                assert details["what"] == named[before] and seen == thing.side
                assert request.answer == {"color": thing.color, "where": thing.side}.get(request.kind)
    assert 3 < changes / 30 < 6


def test_only_the_skin_knows_heat_and_surface(toned, monkeypatch):
    seed = first_life(toned, "touch")
    change = change_things(
        heat=lambda one: "hot" if one.heat == "cold" else "cold",
        temperature=lambda one: 50.0 if one.heat == "cold" else 5.0,
        feel=lambda one: "smooth" if one.feel == "rough" else "rough",
    )
    assert twins(toned, monkeypatch, seed, change, thinks(*scene.TEMPERATURES)) == {"touch"}


def test_only_the_ears_know_who_speaks(toned, monkeypatch):
    seed = first_life(toned, "count")

    def swap(setting):
        (first, one), (second, other) = setting.visitors
        return dataclasses.replace(setting, visitors=[(first, other), (second, one)])

    assert twins(toned, monkeypatch, seed, swap, thinks("asks")) == {"audio"}
    request = next(request for request in toned.requests if request.kind == "count")
    assert request.name not in request.text


def test_only_the_body_knows_where_a_led_hand_is(toned, monkeypatch):
    monkeypatch.setattr(teachers, "THROWN", [])  # an arm that moves changes how hard the other hand rests on the table
    seed = first_life(toned, "hand", lambda setting, request: request.details["where"] == "high")
    places = dict(zip(grammar.HANDS, [*list(grammar.HANDS.values())[1:], grammar.HANDS["high"]], strict=True))
    until = thinks(*grammar.HANDS)
    first = live(toned, seed, until)
    monkeypatch.setattr(rooms, "HANDS", places)
    second = live(toned, seed, until)
    assert differing(first, second) <= {*JOINTED, "touch"}
    dark = [tick for tick in first if not tick["images"].any()]
    side = next(request for request in toned.requests if request.kind == "hand").details["which"]
    led = JOINTS.index(f"{side}_hand")
    assert len(dark) > 20
    apart = dark[-1]["joint_positions"][-1, led] - second[-1]["joint_positions"][-1, led]
    assert np.linalg.norm(apart) > 0.2
    for one, other in zip(first[-8:], second[-8:], strict=True):  # on the skin, every place feels the same
        assert same_touch(one["touch"], other["touch"])


def test_splits_share_no_room_voice_or_frame_but_every_word():
    train, held_out = (
        [draw_setting(np.random.default_rng(seed), split) for seed in range(150)] for split in scene.SPLITS
    )
    for facts in (
        lambda one: {voice for _, voice in one.visitors},
        lambda one: {one.cell},
        lambda one: {one.colors["wall"]},
    ):
        assert not set().union(*map(facts, train)) & set().union(*map(facts, held_out))
    for kind, frames in grammar.SAY["train"].items():
        assert not set(frames) & set(grammar.SAY["validation"][kind])
    assert grammar.frame_words("validation") <= grammar.frame_words("train")
    assert len(grammar.vocabulary()) >= 300
    for attribute in ("kind", "color", "heat", "feel", "weight"):  # sides say nothing of them
        values = [(getattr(thing, attribute), thing.side) for one in train for thing in one.things]
        assert len(set(values)) == len({value for value, _ in values}) * 3


def test_walls_stand_behind_the_things():
    for seed in range(40):
        model = scene.build(draw_setting(np.random.default_rng(seed), "train"), 24)
        walls = [n for n in range(model.ngeom) if model.geom(n).type == 6 and model.geom(n).size[2] > 1]
        assert len(walls) == 4
        for wall in walls:
            ahead, place = np.zeros(9), model.geom(wall).pos
            mujoco.mju_quat2Mat(ahead, model.geom(wall).quat)
            away = [
                (place - point) @ ahead.reshape(3, 3)[:, 0] for point in ([0, 0, 0], [0.73, 0.56, 0], [0.73, -0.56, 0])
            ]
            assert min(away) > 0, seed  # of the creature and the far corners of the table, on the inner side of it


def test_the_teacher_does_what_is_asked_and_one_who_does_nothing_fails(toned):
    for kind in ("touch", "push", "hand"):
        seed = first_life(toned, kind)
        over = lambda tick: len(toned.requests) > 3  # noqa: E731
        live(toned, seed, over)
        request = toned.requests[2]
        assert request.kind == kind and request.succeeded() and request.chance in (1 / 2, 1 / 3, 1 / 4)
        toned.reset(seed)
        while not over(None):
            toned.act(**toned.resting())
        assert not toned.requests[2].succeeded()


def test_the_recorded_life_of_the_teacher_is_the_one_that_is_judged(toned):
    ticks, asked = 400, []
    for life in (live_as_teacher, record_teacher):
        life(toned, 3, ticks)
        assert toned.done
        asked.append([(request.kind, request.begins, request.outcome) for request in toned.requests])
    assert asked[0] == asked[1] and any(outcome for *_, outcome in asked[0])


# ---------------------------------------------------------------------------------------------------------------------
# Recordings
# ---------------------------------------------------------------------------------------------------------------------


def test_a_recorded_life_gives_the_commands_of_the_teacher_as_targets(room, tmp_path, monkeypatch):
    given = []
    act = Room.act
    monkeypatch.setattr(Room, "act", lambda self, **command: given.append(command) or act(self, **command))
    row = record_life(room, seed=3, number=0, life_ticks=60)
    with RecordingsWriter(tmp_path / "lives") as writer:
        writer.add(row, "train", recording.NAMES)
    recordings, facts = load_recordings(tmp_path / "lives")
    organs = organs_of(recordings, facts)
    assert (organs["num_joints"], organs["num_blend_shapes"], organs["num_cameras"]) == (24, 51, 2)
    from configuration_creature import CreatureConfig

    processor = CreatureProcessor.from_config(CreatureConfig(**GPT2, **organs), load_tokenizer())
    arguments = processor.encode(recordings["train"][0])
    assert {len(value) for value in arguments.values()} == {60}
    for tick, command in enumerate(given[:59], start=1):
        for name, target in (("rotations", "rotation_targets"), ("blend_shapes", "blend_shape_targets"),
                             ("eyes", "eye_targets")):  # fmt: skip
            assert np.allclose(arguments[target][tick], command[name], atol=1e-6), (name, tick)
        parts = [command[name].reshape(-1) for name in ("rotations", "blend_shapes", "eyes")]
        assert np.allclose(arguments["animation"][tick], np.concatenate(parts), atol=1e-6)
    assert arguments["animation_target_mask"].all() and arguments["pixel_mask"].all()
    felt, commanded = arguments["joint_rotations"], arguments["rotation_targets"]
    assert not np.allclose(felt, commanded, atol=1e-3)  # what is felt is another thing
    without = {name: value for name, value in recordings["train"][0].items() if name not in FACE}
    assert np.array_equal(processor.encode(without)["rotation_targets"], felt)
    lacking = recordings.remove_columns(list(FACE))  # a folder written before
    lacking.save_to_disk(tmp_path / "before")
    (tmp_path / "before/recordings.json").write_bytes((tmp_path / "lives/recordings.json").read_bytes())
    assert "command_rotations" not in load_recordings(tmp_path / "before")[0]["train"].column_names


def test_a_worker_records_the_split_that_the_recording_says(tmp_path, monkeypatch):
    """A worker is a process of its own: what it took for a split's room would else be another's."""
    monkeypatch.setattr(recording, "split_of", lambda number: "train" if number == 1 else "validation")
    record_lives(tmp_path / "lives", minutes=0.01, workers=2, seed=5, eye=16, progress=False, life_ticks=4)
    splits, _ = load_recordings(tmp_path / "lives")
    assert splits["train"]["recording_id"] == ["train 1"]
    assert splits["validation"]["recording_id"] == ["validation 0"]


def test_a_killed_recording_goes_on_and_workers_change_nothing(tmp_path, monkeypatch):
    arguments = {"minutes": 0.02, "seed": 5, "eye": 16, "progress": False, "life_ticks": 4}
    record_lives(tmp_path / "whole", workers=2, **arguments)
    part, done = recording._record_part, []

    def stop(*args, **settings):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(part(*args, **settings))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recording, "_record_part", stop)
        record_lives(tmp_path / "lives", workers=1, **arguments)
    assert not (tmp_path / "lives").exists()
    with pytest.raises(UserError, match="record with the same settings"):
        record_lives(tmp_path / "lives", workers=1, **arguments | {"seed": 6})
    (tmp_path / ".other.lives").mkdir()
    for settings in ({"eye": 9999}, {"eye": 16}):  # what failed before its first life binds nobody
        recording._check_settings(tmp_path / ".other.lives/settings.json", settings)
    shutil.rmtree(tmp_path / ".other.lives")
    done.append(None)
    monkeypatch.setattr(recording, "_record_part", lambda *args, **settings: done.append(part(*args, **settings)))
    record_lives(tmp_path / "lives", workers=1, **arguments)
    assert len(done) == 3 + 2  # those that were there are not recorded again
    av = pytest.importorskip("av")
    one, other = (load_recordings(tmp_path / "lives")[0]["train"][number] for number in range(2))
    write_film(tmp_path / "film.mp4", {"one": one, "other": other})
    with av.open(str(tmp_path / "film.mp4")) as film:
        pictures = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        assert len(pictures) == 2 * 4 and len(film.streams.audio) == 1
        left, right = np.split(pictures[0], 2, axis=1)
        assert np.std(left) > 20 and np.abs(left.astype(int) - right).mean() > 1
    (tmp_path / "film.mp4").unlink()
    for split in ("train", "validation"):
        files = [next((tmp_path / name / split).glob("*.arrow")).read_bytes() for name in ("whole", "lives")]
        assert files[0] == files[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lives", "whole"]


def test_fewer_minutes_than_are_recorded_lose_nothing(tmp_path):
    parts = tmp_path / ".lives.lives"
    parts.mkdir()
    for number in (0, 1, 7):
        (parts / f"{number:06d}.arrow").touch()
    settings = {"seed": 0, "eye": 16, "life_ticks": LIFE_TICKS}
    (parts / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"those after the first 3: give --minutes 10\.2 or more"):
        record_lives(tmp_path / "lives", 3, workers=1, seed=0, eye=16, progress=False)
    assert len(list(parts.glob("*.arrow"))) == 3 and not (tmp_path / "lives").exists()
    assert math.ceil(10.2 * 60 / (LIFE_TICKS * TICK_SECONDS)) == 7 + 1


@pytest.mark.parametrize("flag", [("--minutes", "inf"), ("--minutes", -1), ("--eye", 20000), ("--workers", 0)])
def test_flags_out_of_range_are_a_sentence(run_script, tmp_path, flag):
    code, _, error = run_script("record_world", "--minutes", 1, "--output", tmp_path / "lives", *flag)
    assert code == 2 and f"{flag[0]} must be from" in error and not list(tmp_path.iterdir())


def test_a_mujoco_gl_that_is_no_name_is_a_sentence(tmp_path):
    command = [sys.executable, PROJECT / "scripts/record_world.py", "--minutes", "1", "--output", tmp_path / "lives"]
    ended = subprocess.run(command, env=os.environ | {"MUJOCO_GL": "bogus"}, capture_output=True, text=True)
    assert (
        ended.returncode == 1 and "set MUJOCO_GL to egl or osmesa" in ended.stderr and "Traceback" not in ended.stderr
    )
