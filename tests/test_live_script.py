"""scripts/live.py: a recorded life on a time line, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch
from creatures import GPT2, micro_model
from lives import make_recording

from creature.data.recordings.made_up import write_made_up_recordings
from creature.data.text.tokenizer import load_tokenizer
from creature.errors import UserError
from creature.live import LiveCreature, playback
from creature.live.playback import play
from processing_creature import CreatureProcessor


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A creature with ears and thoughts, and recordings of tones."""
    folder = tmp_path_factory.mktemp("live")
    organs = dict(num_cameras=0, num_joints=0, body_state_size=0, action_size=0, num_blend_shapes=0)
    model = micro_model(
        **GPT2, **organs, tie_word_embeddings=False, loss_weights={"internal_text": 1.0, "external_text": 1.0}
    )
    model.save_pretrained(folder / "creature")
    load_tokenizer().save_pretrained(folder / "creature")
    write_made_up_recordings(folder / "tones", "hear", seconds=10.0)
    return folder


def flags(place, *more):
    return ("--checkpoint", place / "creature", "--recording", place / "tones", "--device", "cpu", *more)


def test_a_recording_on_a_time_line(place, run_script):
    code, out, _ = run_script("live", *flags(place))
    assert code == 0
    head, columns, *lines, clock = out.splitlines()
    assert head.startswith("hear 4, ") and "window of 64 ticks; emits internal_text, external_text" in head
    assert columns.split() == ["time", "hears", "thinks", "recorded", "says", "recorded"]
    assert "late: " in clock and "times real time" in clock
    recorded = [line for line in lines if line[11 + 32 : 11 + 36].strip() and not line[11 : 11 + 32].strip()]
    assert recorded and set(recorded[0].split()[2:]) <= {"low", "middle", "high"}
    assert [line for line in lines if line[11 + 16 : 11 + 20].strip()]  # thoughts
    assert [float(line.split()[0]) for line in lines[:5]] == sorted(float(line.split()[0]) for line in lines[:5])
    again, other = (
        run_script("live", *flags(place, "--seconds", 1.6, "--seed", seed))[1].splitlines()[2:-1] for seed in (0, 1)
    )
    assert again and again == lines[: len(again)] and other != again


def test_its_flags(place, run_script):
    code, out, _ = run_script("live", *flags(place, "--id", "hear 1", "--seconds", 0.8, "--temperature", 0))
    assert code == 0 and out.startswith("hear 1, ") and "10 ticks, 0.8 s of life" in out
    code, out, _ = run_script("live", *flags(place, "--null_bias", 1000, "--seconds", 1.6))
    thinks = [line for line in out.splitlines()[2:-1] if line[11 + 16 : 11 + 20].strip()]
    assert code == 0 and not thinks


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--id", "nobody"), "has no recording nobody"),
        (("--temperature", -1), "a temperature is at least 0"),
        (("--world", 0), "--recording FOLDER, --world or --serve"),
        (("--seconds", 0), "--seconds must be above 0"),
        (("--serve", 7000), "--recording FOLDER, --world or --serve"),
        (("--recording", "nowhere"), "nowhere is no folder of recordings"),
        (("--null_bias", "nan"), "null_bias is not a number"),
        (("--without", "vision"), "--without goes with --world"),
        (("--teacher",), "--teacher goes with --world"),
        (("--film", "life.mp4"), "--film goes with --world"),
        (("--host", "0.0.0.0"), "--host goes with --serve"),
        (("--checkpoint", "nowhere"), "there is no folder nowhere"),
    ],
)
def test_bad_input_is_one_sentence(place, run_script, more, message):
    code, _, err = run_script("live", *flags(place, *more))
    assert code and message in err and (code == 2 or len(err.splitlines()) == 1)


def test_a_film_is_an_mp4_file(place, tmp_path, run_script):
    (tmp_path / "folder.mp4").mkdir()
    for film in ("life.txt", "folder.mp4"):
        code, _, err = run_script("live", "--checkpoint", place / "creature", "--world", "--film", tmp_path / film)
        assert code == 2 and "--film must be a file whose name ends in .mp4" in err


def test_real_time_waits_for_the_next_tick(place, monkeypatch):
    """By a clock of its own: a tick takes no time, and what is slept adds up to the life, but for its last tick."""
    slept, creature = [], LiveCreature.from_pretrained(place / "creature", "cpu")
    monkeypatch.setattr(playback, "time", SimpleNamespace(sleep=slept.append, perf_counter=lambda: sum(slept)))
    list(playback.time_line(creature, playback.find_recording(place / "tones"), seconds=1.6, real_time=True))
    assert len(slept) == 19 and sum(slept) == pytest.approx(19 * 0.08)


def test_its_own_outputs_are_not_those_of_the_recording():
    sizes = dict(body_state_size=5, body_state_mean=[7.0] * 5, body_state_std=[3.0] * 5, action_mean=[0.0] * 2)
    model = micro_model(**GPT2, **sizes, action_std=[1.0] * 2)
    creature = LiveCreature(model, CreatureProcessor.from_config(model.config, load_tokenizer()))
    before = None
    for emission in play(creature, make_recording(1.0)):
        if before is not None:
            assert int(emission.arguments["input_ids"]) == before.thought_id
            assert torch.equal(emission.arguments["action"][:, 0], before.step.action)
        assert {"input_features", "body_state"} <= emission.arguments.keys()
        before = emission
    assert before.tick == 12


def test_a_life_in_the_room(run_script, tmp_path, monkeypatch):
    """Its commands move the body one tick later, what it is asked is judged, and the teacher stands beside it."""
    pytest.importorskip("espeakng_loader")
    pytest.importorskip("creature.world", exc_type=(ImportError, UserError))  # without mujoco or OpenGL
    from creature.live.in_room import Success, count, live_in_room, make_room, success_table
    from creature.world.script import Request

    sizes = dict(num_joints=24, num_blend_shapes=51, subframes_per_tick=4, vision_image_size=24, body_state_size=0)
    model = micro_model(**GPT2, **sizes, action_size=0, num_touch_points=64)
    model.save_pretrained(tmp_path / "creature")
    load_tokenizer().save_pretrained(tmp_path / "creature")
    creature = LiveCreature.from_pretrained(tmp_path / "creature", "cpu", sampling_rate=16000)
    try:
        room = make_room(creature)
    except UserError as error:
        if "OpenGL" not in str(error):
            raise
        pytest.skip(str(error))
    lived = list(live_in_room(creature, room, 0, ticks=12))
    names = {"input_features", "pixel_values", "joint_rotations", "joint_positions", "external_voice_ids"}
    assert len(lived) == 12 and all(names <= emission.arguments.keys() for emission, _ in lived)
    assert any(heard for _, heard in lived)
    first, last = (lived[place][0].arguments["joint_rotations"] for place in (0, -1))
    assert not torch.allclose(first, last, atol=0.05)  # a random head moves wildly
    blind = list(live_in_room(creature, room, 0, without=["vision", "proprioception"], ticks=2))
    assert all(not names & {"pixel_values", "joint_rotations"} & e.arguments.keys() for e, _ in blind)

    parts = {field: None for field in Request.__dataclass_fields__}
    room.requests = [
        Request(**{**parts, "kind": kind, "chance": chance, "outcome": outcome, "until": until, "options": ()})
        for kind, chance, outcome, until in (
            ("look", 0.5, True, 0.0),
            ("look", 0.3, False, 0.1),
            ("greet", None, None, 0.1),
            ("push", 0.5, None, 0.15),
            ("push", 0.5, None, 0.17),  # behind the end, at 0.16 s
        )
    ]
    kinds = {}
    count(room, kinds)
    assert kinds == {"look": Success(2, 1, 0.8), "push": Success(1, 0, 0.5)}
    table = [line.split() for line in success_table(kinds, {"look": Success(2, 2, 0.8)})]
    assert table[1:3] == [["look", "2", "0.50", "0.40", "1.00"], ["push", "1", "0.00", "0.50"]]
    assert table[3] == ["all", "3", "0.33", "0.43", "1.00"]

    flags = (
        "--checkpoint",
        tmp_path / "creature",
        "--device",
        "cpu",
        "--world",
        "--seconds",
        1.6,
        "--without",
        "touch",
        "--film",
        tmp_path / "life.mp4",
        "--teacher",
    )
    monkeypatch.setattr("creature.live.in_room.live_as_teacher", None)  # the life on the film is the one that counts
    code, out, _ = run_script("live", *flags)
    assert code == 0 and "life 1 of 1: 20 ticks, 1.6 s of life" in out and "nothing was asked for yet" in out
    assert (tmp_path / "life.mp4").stat().st_size > 5000

    def refuse(message, **changes):
        model = micro_model(**{**GPT2, **sizes, "action_size": 0, "num_touch_points": 64, **changes})
        with pytest.raises(UserError, match=message):
            make_room(LiveCreature(model, CreatureProcessor.from_config(model.config, load_tokenizer())))

    refuse("has 3 joints", num_joints=3)
    refuse("4 sub-frames a tick, and", num_blend_shapes=0)
    felt = {"internal_text": 1.0}  # it does not move, and feels its joints and its skin
    refuse("has 3 joints", num_joints=3, loss_weights=felt)
    refuse("1 sub-frames", subframes_per_tick=1, loss_weights=felt)
    refuse("has 10 points", num_touch_points=10, loss_weights=felt)
    refuse("and 2 surfaces", num_touch_surfaces=2, loss_weights=felt)
    model = micro_model(**GPT2, num_joints=0, num_cameras=0, num_touch_points=0, num_mel_bins=0, loss_weights=felt)
    reader = LiveCreature(model, CreatureProcessor.from_config(model.config, load_tokenizer()))
    assert len(list(live_in_room(reader, make_room(reader), 0, ticks=2))) == 2
