"""The tab Live: a life played to a creature, its body and its picture, and the page in a browser."""

import base64
import io
import re
import shutil
import socket
import wave
from threading import Lock

import numpy as np
import pytest
from creatures import GPT2, load_script, micro_model
from lives import make_recording

from creature.data.recordings.schema import RecordingsWriter
from creature.data.text.tokenizer import load_tokenizer
from creature.errors import UserError
from creature.live import LiveCreature
from creature.live.page import Lives
from creature.live.picture import SIZE, Moment, draw
from creature.live.skeleton import Skeleton, rotation_matrices, sight_from_behind
from creature.live.viewing import Viewer, is_more_than_text
from processing_creature import CreatureProcessor
from ticks_creature import TICK_SECONDS

CHROMIUM = shutil.which("chromium")
SIZES = {
    **GPT2, "num_mel_bins": 8, "audio_frames_per_tick": 8, "sliding_window": 8, "body_state_size": 5,
    "body_state_mean": [7.0] * 5, "body_state_std": [3.0] * 5, "action_mean": [-1.0, 0.5], "action_std": [2.0, 0.25],
}  # fmt: skip
JOINTS = ["hip", "left_foot", "right_foot"]


@pytest.fixture(scope="module")
def model():
    return micro_model(**SIZES)


@pytest.fixture(scope="module")
def creature(model):
    return LiveCreature(model, CreatureProcessor.from_config(model.config, load_tokenizer()))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A folder with two lives of 2 s with every column, and a third without the body."""
    folder = tmp_path_factory.mktemp("lives") / "lives"
    names = {"joints": JOINTS, "body_state": list("abcde"), "action": ["grip", "turn"]}
    with RecordingsWriter(folder) as writer:
        for number in range(3):
            row = make_recording(seed=number)
            sound, file = row.pop("audio"), io.BytesIO()
            with wave.open(file, "wb") as out:
                out.setparams((1, 2, sound["sampling_rate"], 0, "NONE", ""))
                out.writeframes((sound["array"] * 3000).astype("<i2").tobytes())
            row |= {"source": "made up", "license": "CC0-1.0", "audio": {"bytes": file.getvalue(), "path": None}}
            if number == 2:
                row = {name: value for name, value in row.items() if name in ("recording_id", "duration", "audio")}
            writer.add(row, "validation" if number == 1 else "train", names if number < 2 else {})
    return folder


# --- the body --------------------------------------------------------------------------------------------------------


def test_the_tree_of_a_body_is_found_from_its_motion():
    draw_from = np.random.default_rng(0)
    parents = [-1, 0, 1, 0, 3, 2, 4]
    offsets = draw_from.standard_normal((7, 3)) * 0.3
    rotations = draw_from.standard_normal((40, 7, 4))
    positions = np.zeros((40, 7, 3))
    for pose, turns in enumerate(rotation_matrices(rotations)):
        frames = [np.eye(3)]
        for joint in range(1, 7):
            frames.append(frames[parents[joint]] @ turns[joint])
            positions[pose, joint] = positions[pose, parents[joint]] + frames[parents[joint]] @ offsets[joint]
    skeleton = Skeleton(positions, rotations)
    assert skeleton.parents.tolist() == parents and skeleton.bones[0] == (1, 0)
    np.testing.assert_allclose(skeleton.places(rotations[7]), positions[7], atol=1e-9)


def test_a_body_is_seen_from_behind():
    # x to the left, y up, z ahead
    names = ["hips", "Head", "mixamorig:LeftHand", "mixamorig:RightHand", "lFoot", "rFoot"]
    pose = np.array([[0, 0, 0], [0, 0.8, 0], [0.7, 0.4, 0], [-0.7, 0.4, 0], [0.1, -0.9, 0], [-0.1, -0.9, 0]])
    np.testing.assert_allclose(sight_from_behind(pose, names), [[-1, 0, 0], [0, 1, 0]], atol=1e-9)
    turned = pose[:, [1, 2, 0]]
    np.testing.assert_allclose(sight_from_behind(turned, names), [[0, 0, -1], [1, 0, 0]], atol=1e-9)
    np.testing.assert_allclose(sight_from_behind(pose, []), [[1, 0, 0], [0, 1, 0]])


# --- the life --------------------------------------------------------------------------------------------------------


def test_a_recorded_life_and_what_is_said_to_it(creature):
    recording, heard = make_recording(), []
    recording["external_voice"] = [{"word": "robot", "start": 0.4, "end": 0.5}]
    viewer = Viewer(creature, recording, JOINTS)
    assert viewer.moment().seconds == 0 and not viewer.ended
    viewer.tell("a bottle")
    wanted = creature.processor.encode_words("a bottle"), creature.processor.encode_words("robot")
    while not viewer.ended:
        emission = viewer.step()
        heard.append(int(emission.arguments["external_voice_ids"]))
        now = viewer.moment()
        if emission.tick == 4:
            viewer.tell("tea")  # the recording speaks at the next tick: it waits
    assert len(heard) == 25 and heard[: len(wanted[0])] == wanted[0] and heard[5 : 5 + len(wanted[1])] == wanted[1]
    assert [word["word"] for word in now.words["heard"]] == ["a", "bottle", "robot", "tea"]
    assert now.words["recorded thought"] and now.words["recorded said"] and now.words["thought"] and now.words["said"]
    assert now.seconds == 25 * TICK_SECONDS and now.clock["ticks"] == 25 and now.clock["dropped"] == 0
    assert list(now.eyes) == ["left", "right"] and now.eyes["left"].shape == (8, 8, 3)
    assert now.mel.shape == (75 * 8, 8) and np.isnan(now.mel[: 50 * 8]).all() and np.isfinite(now.mel[50 * 8 :]).all()
    np.testing.assert_array_equal(now.mel[-8:], viewer.life["input_features"][-1].reshape(8, 8))
    np.testing.assert_array_equal(now.felt, viewer.life["joint_positions"][-1, -1])
    np.testing.assert_allclose(now.commanded, viewer.skeleton.places(emission.rotations[-1]))
    np.testing.assert_allclose(now.numbers["action 1"][1, -1], emission.action[-1, 1])
    recorded = [
        value for time, value in zip(*map(recording["action"].get, ("times", "values")), strict=True) if time < 2
    ]
    np.testing.assert_allclose(now.numbers["action 0"][0, -1], recorded[-1][0], atol=1e-5)
    assert {contact["name"] for contact in now.contacts} <= {f"point {point}" for point in range(10)}
    assert now.contacts and all(contact["joint"] is None for contact in now.contacts)
    viewer.reset()
    assert viewer.moment().seconds == 0 and not viewer.moment().words["thought"]
    assert int(viewer.step().arguments["external_voice_ids"]) == GPT2["null_token_id"]


def test_points_that_are_numbered_as_the_joints_lie_on_them(creature):
    recording = make_recording()
    contact = {"surface": 1, "force": 2.0, "x": 0.0, "y": 0.0, "z": 0.0, "temperature": 31.0}
    recording["touch"] = [contact | {"time": 0.01, "point": 2}, contact | {"time": 0.1, "point": 0}]
    viewer = Viewer(creature, recording, JOINTS)
    for name, joint in (("right_foot", 2), ("hip", 0)):
        viewer.step()
        assert viewer.moment().contacts == [{"name": name, "joint": joint, "force": 2.0, "temperature": 31.0}]
    viewer.step()
    assert viewer.moment().contacts == []


def test_a_life_without_a_recording_hears_what_is_typed(creature):
    viewer = Viewer(creature)
    viewer.tell("hello")
    for _ in range(3):
        emission = viewer.step()
    moment = viewer.moment()
    assert not viewer.ended and emission.tick == 2 and [word["word"] for word in moment.words["heard"]] == ["hello"]
    assert set(moment.words) == {"heard", "thought", "said"} and moment.mel is None and not moment.eyes
    assert draw(moment).size == SIZE


def test_which_creatures_have_a_tab(model):
    sizes = {"random": False, "loss_weights": {"internal_text": 1.0}}
    text_only = micro_model(**sizes)
    assert is_more_than_text(model) and not is_more_than_text(text_only)
    assert is_more_than_text(micro_model(random=False, loss_weights={"animation": 1.0}))
    text_only.model.senses.audio.proj.weight.data[0, 0] = 1
    assert is_more_than_text(text_only)


# --- the picture -----------------------------------------------------------------------------------------------------


def test_the_picture_shows_each_part():
    """Each part changes the picture, and only in its place."""
    sight = np.eye(3)[[1, 2]]
    pose = np.array([[0, 0, 0], [0, 0, 1.0], [0, 0.5, 0.5]])
    base = dict(
        seconds=8.0, eyes={"left": np.zeros((8, 8, 3), np.uint8), "right": None}, mel=np.full((600, 8), np.nan),
        words={"heard": [], "thought": [], "said": []}, felt=pose, bones=[(1, 0), (2, 0)], sight=sight,
        contacts=[], numbers={"grip": np.full((2, 75), np.nan)}, clock={"p50": 0.004, "late": 0, "dropped": 0},
    )  # fmt: skip

    def changed(**parts):
        before, after = (np.asarray(draw(Moment(**(base | more))), int) for more in ({}, parts))
        rows, columns = np.nonzero(np.abs(before - after).sum(axis=-1))
        return columns.min(), rows.min(), columns.max(), rows.max()

    def inside(box, left, top, right, bottom):
        return left <= box[0] and top <= box[1] and box[2] < right and box[3] < bottom

    red = np.full((8, 8, 3), (255, 0, 0), np.uint8)
    assert changed(eyes=base["eyes"] | {"left": red}) == (12, 28, 181, 197)
    assert inside(changed(eyes=base["eyes"] | {"right": red}), 182, 28, 362, 200)
    sound = base["mel"].copy()
    sound[400:500] = 1.5
    assert inside(changed(mel=sound), 120 + 0.6 * 948, 236, 120 + 0.9 * 948, 320)
    word = [{"word": "tea", "start": 5.0, "end": 5.2}]
    left, top, _, bottom = changed(words=base["words"] | {"thought": word})
    assert abs(left - (120 + 0.5 * 948)) < 4 and 326 + 46 <= top and bottom < 326 + 92
    assert inside(changed(commanded=pose * 0.5), 364, 28, 600, 224)
    contact = [{"name": "hand", "joint": 2, "force": 3.0, "temperature": 40.0}]
    assert inside(changed(contacts=contact), 364, 12, 820, 224)
    assert inside(changed(contacts=[contact[0] | {"joint": None}]), 590, 12, 820, 224)
    numbers = base["numbers"]["grip"].copy()
    numbers[1, 10:] = np.sin(np.arange(65))
    assert changed(numbers={"grip": numbers})[3] < 224
    assert changed(clock=base["clock"] | {"late": 3})[1] > 600


def test_a_picture_of_nothing_and_of_too_much():
    assert draw(Moment()).size == SIZE
    many = [{"word": "word " * 30, "start": 7 + at / 100, "end": 8.0} for at in range(99)]
    contacts = [{"name": f"point {n}", "joint": None, "force": 1e9, "temperature": -300.0} for n in range(40)]
    eyes = dict.fromkeys("abcdefgh", np.zeros((4, 400, 3), np.uint8))
    numbers = {f"number {n}": np.ones((2, 75)) for n in range(40)}
    moment = Moment(8.0, eyes, np.full((600, 8), 1e9), {name: many for name in ("heard", "thought")}, contacts=contacts)
    moment.numbers = numbers
    assert draw(moment).size == SIZE


# --- the page --------------------------------------------------------------------------------------------------------


def test_lives_are_played_stopped_and_opened(creature, recordings):
    lives = Lives(creature, str(recordings), Lock())
    assert list(lives.rows) == ["life 1", "life 0", "life 2"]  # the validation split first
    pictures = list(lives.play(real_time=False))
    assert lives.viewer.ended and lives.creature.now == 25
    assert all("times real time" not in picture and picture.startswith("<img alt=") for picture in pictures)
    jpeg = base64.b64decode(re.search('base64,([^"]*)', pictures[-1])[1])
    assert jpeg.startswith(b"\xff\xd8") and 'alt="2.00 s' in pictures[-1]
    lives.stop(lambda: lives.viewer.reset())
    playing = lives.play(real_time=True)
    next(playing)
    assert 1 <= lives.creature.now < 25
    assert "alt=" in lives.stop(lives.step) and list(playing) == []  # a step stops it
    with pytest.raises(UserError, match="half a character"):
        lives.tell("\ud800")
    lives.tell("<b>")
    lives.open("life 2")
    assert lives.creature.now == 0 and lives.viewer.skeleton is None and not lives.viewer.told
    small = micro_model(**{**SIZES, "num_joints": 4})
    with pytest.raises(UserError, match="life 1 cannot be lived through: .*set num_joints to 3"):
        Lives(LiveCreature(small, creature.processor.from_config(small.config, load_tokenizer())), recordings, Lock())


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_the_tab_in_a_browser(model, recordings, tmp_path):
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    demo = load_script("demo")
    page = demo.build_page(model, load_tokenizer(), tmp_path, str(recordings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = demo.launch(page, "127.0.0.1", port)
    asked = []
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    try:
        with playwright.sync_playwright() as browsers:
            browser = browsers.chromium.launch_persistent_context(
                tmp_path / "profile", executable_path=CHROMIUM, args=flags.split(), headless=True,
                viewport={"width": 1200, "height": 1000},
            )  # fmt: skip
            tab = browser.new_page()
            tab.on("request", lambda request: asked.append(request.url))
            tab.goto(address)
            tab.get_by_role("tab", name="Live").click()

            def wait(moment):
                tab.wait_for_function(
                    "moment => document.querySelector('#life img')?.alt.startsWith(moment)", arg=moment, timeout=60_000
                )

            wait("0.00 s")
            assert tab.locator("#life img").evaluate("image => image.naturalWidth") == SIZE[0]
            tab.get_by_role("button", name="Step").click()
            wait("0.08 s")
            tab.get_by_label("Say something that it hears").fill("tea")
            tab.get_by_label("Say something that it hears").press("Enter")
            tab.wait_for_function(
                "() => [...document.querySelectorAll('textarea, input')].every(b => b.value !== 'tea')"
            )
            tab.get_by_role("button", name="Play").click()
            wait("2.00 s")
            tab.screenshot(path=tmp_path / "page.png")
            tab.get_by_role("button", name="Reset").click()
            wait("0.00 s")
            tab.get_by_label("Real time").check()
            tab.get_by_role("button", name="Play").click()
            tab.wait_for_function("() => !document.querySelector('#life img').alt.startsWith('0.00 s')", timeout=60_000)
            tab.get_by_role("button", name="Pause").click()
            browser.close()
    finally:
        page.close()
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]


def test_a_port_that_no_machine_has_is_a_sentence(run_script):
    code, _, error = run_script("demo", "--checkpoint", "nowhere", "--port", 99999)
    assert code == 2 and "--port must be from 1 to 65535" in error
