"""Commands a second ahead in open loop, measured as the dedicated models are; scripts/evaluate_recordings.py."""

import json

import numpy as np
import pytest
import torch
from creatures import micro_model, random_batch

from benchmarks.baselines import motion, robot
from creature.data import collate_clips
from creature.data.recordings.clips import make_clips, statistics
from creature.data.recordings.made_up import write_made_up_recordings
from creature.data.recordings.rows import EvaluationClips
from creature.data.recordings.schema import load_recordings
from creature.data.text.tokenizer import load_tokenizer
from creature.rounds.evaluation import clip_sums, sense_sizes
from creature.rounds.metrics import sum_names
from creature.rounds.open_loop import (
    AHEAD,
    command_span,
    forecast,
    measure_open_loop,
    open_loop_starts,
    open_loop_windows,
)
from motor_creature import quaternion_to_6d
from processing_creature import TARGETS, CreatureProcessor

WEIGHTS = {"internal_text": 0.0, "external_text": 0.0, "audio": 0.0, "animation": 1.0}
ARM = {"num_joints": 0, "num_blend_shapes": 0, "subframes_per_tick": 4, "loss_weights": WEIGHTS}
WHOLE = 1 << 20


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings") / "move"
    write_made_up_recordings(folder, "move")
    return folder


@pytest.fixture(scope="module")
def model(recordings):
    """A creature with an arm, whose every command is a wild guess from all that it perceives."""
    return micro_model(**ARM, **statistics(load_recordings(recordings)[1]))


@pytest.fixture(scope="module")
def held_out(recordings, model, tmp_path_factory):
    """The whole validation recordings, 25 to 62 ticks each."""
    splits, facts = load_recordings(recordings)
    processor = CreatureProcessor.from_config(model.config, load_tokenizer())
    return make_clips(splits, facts, processor, WHOLE, tmp_path_factory.mktemp("clips"))[0]["validation"]


@pytest.fixture(scope="module")
def clips(held_out):
    made = EvaluationClips(held_out)
    return [made[number] for number in range(len(made))]


def test_the_size_of_a_sense_is_that_of_what_it_adds(model, held_out):
    body = model.model.senses.proprioception.proj.weight
    before, size = body.detach().clone(), sense_sizes(model, held_out)["proprioception"]
    assert set(sense_sizes(model, held_out)) == {"proprioception", "own_action"} and size > 0
    with torch.no_grad():
        body.mul_(2)
        assert sense_sizes(model, held_out)["proprioception"] == pytest.approx(2 * size)
        body.zero_()  # as it is connected
        assert sense_sizes(model, held_out)["proprioception"] == 0
        body.copy_(before)


def windows_of(clips, name="action_targets", past=128):
    known, comes, last = zip(*open_loop_windows(clips, name, past), strict=True)
    return [*known], torch.from_numpy(np.stack(comes)), torch.from_numpy(np.stack(last))


def test_the_first_tick_is_that_of_the_metrics(model, clips):
    known, comes, _ = windows_of(clips)
    assert len(known) > 4
    found = forecast(model, known, "action", ahead=2)
    off = sum_names(model.config).index("off")
    errors = []
    for clip in clips:
        span = command_span(clip)
        for start in open_loop_starts(span.stop - span.start):
            # What one more tick adds to the sum of the errors.
            both = [{name: value[: span.start + start + more] for name, value in clip.items()} for more in (0, 1)]
            before, after = clip_sums(model, collate_clips(both))[:, off].tolist()
            errors.append(after - before)
    torch.testing.assert_close(
        (found[:, 0] - comes[:, 0]).abs().mean((-2, -1)), torch.tensor(errors), atol=1e-4, rtol=0
    )
    assert min(errors) > 0.01


def test_the_future_of_a_recording_does_not_matter(model, clips):
    clip = max(clips, key=lambda clip: len(clip["action"]))
    stop = command_span(clip).start + open_loop_starts(len(clip["action"]))[0]
    outcomes = []
    for changed in (None, stop, stop - 1):
        lived = clip
        if changed is not None:
            lived = {name: value.copy() for name, value in clip.items()}
            for name in lived.keys() - {"animation_target_mask", "action_mask", "body_mask", "input_ids"}:
                lived[name][changed:] += 3.0
        outcomes.append(forecast(model, windows_of([lived])[0][:1], "action"))
    assert torch.equal(outcomes[0], outcomes[1]) and not torch.allclose(outcomes[0], outcomes[2])


def test_own_commands_alone_are_perceived_afterwards(model, clips):
    """A window among shorter and longer ones is what `step` does with a cache, tick by tick."""
    known, _, _ = windows_of(clips)
    found = forecast(model, known, "action")
    for place in (0, len(known) // 2, len(known) - 1):
        senses, cache = collate_clips([known[place]]), None
        for tick in range(AHEAD):
            emitted = model.step(cache, output_streams=("animation",), **senses)
            torch.testing.assert_close(found[place, tick], emitted.action[0], atol=1e-4, rtol=1e-4)
            silent = torch.full((1, 1), model.config.null_token_id)
            senses, cache = {"input_ids": silent, "action": emitted.action[:, None]}, emitted.past_key_values


def jointed(seed: int, ticks: int = 70) -> tuple:
    """A creature with two joints, and a clip of it whose first two ticks and whose last have no command."""
    model = micro_model(num_joints=2, num_blend_shapes=4, subframes_per_tick=4, action_size=0, loss_weights=WEIGHTS)
    batch = random_batch(model.config, rows=1, ticks=ticks, seed=seed)
    clip = {name: value[0].numpy() for name, value in batch.items() if not name.startswith("action")}
    clip["animation"][:, : 4 * 2 * 4] = clip["rotation_targets"].reshape(ticks, -1)  # the copy is the target
    clip["animation_target_mask"][:] = clip["animation_mask"][:] = True
    clip["animation_target_mask"][[0, 1, -1]] = clip["animation_mask"][[0, 1, -1]] = False
    return model, clip


def test_joint_angles_are_measured_as_those_of_the_dedicated_models():
    model, clip = jointed(0)
    measured = measure_open_loop(model, [clip], context=70)["rotation"]
    known, _, _ = windows_of([clip], "rotation_targets", past=70 - AHEAD + 1)
    frames, own = [motion.to_frames(clip)], frames_of(forecast(model, known, "animation"))
    expected = motion.angles(lambda _: own, frames)
    senses = {name: value for name, value in collate_clips([clip]).items() if name not in TARGETS}
    emitted = frames_of(model(**senses, output_streams=("animation",)).animation.detach())
    expected |= motion.one_tick(lambda _: emitted[:, 2:68], frames)  # of the ticks 3 to 68
    still = motion.angles(lambda known: known[:, -1:, -1:].expand(-1, AHEAD, 4, -1), frames) | {"1 tick ratio": 1.0}
    assert measured["windows"] == len(own) == len(open_loop_starts(67))
    assert measured["creature"] == pytest.approx(expected, rel=1e-4)
    assert measured["repeating"] == pytest.approx(still, rel=1e-4)
    one = measure_open_loop(model, [clip], context=64, milliseconds=[20, 1040])["rotation"]["creature"]
    assert {"20 ms", "1040 ms", "1 tick ratio"} == one.keys()


def frames_of(animation: torch.Tensor) -> torch.Tensor:
    """What a creature with two joints emits [..., ticks, animation_size], as the dedicated models have it."""
    return quaternion_to_6d(animation[..., : 4 * 2 * 4].unflatten(-1, (4, 2, 4))).flatten(-2)


def test_actions_are_measured_as_those_of_the_dedicated_models(model, clips):
    measured = measure_open_loop(model, clips, context=64)["action"]
    frames = [frames for clip in clips if len(frames := robot.to_frames(clip)) > 1]
    size = model.config.action_size
    whole = collate_clips(clips)
    senses = {name: value for name, value in whole.items() if name not in TARGETS}
    emitted = model(**senses, output_streams=("animation",)).action.detach()
    one = [emitted[row, : len(clip["action"]) - 1] for row, clip in enumerate(clips) if len(robot.to_frames(clip)) > 1]
    told = iter(one)
    found = forecast(model, windows_of(clips, past=64 - AHEAD + 1)[0], "action")
    expected = robot.measure(lambda given: next(told)[None, : given.shape[1]], lambda _: found, frames, size)
    still = robot.measure(robot.still, lambda known: robot.still(known[:, -1:], AHEAD), frames, size)
    assert measured["windows"] == len(found)
    assert measured["creature"] == pytest.approx(expected, rel=1e-3)
    assert measured["repeating"] == pytest.approx(still, rel=1e-3)


def test_one_tick_ahead_counts_every_tick_once(model, clips):
    whole, cut = (measure_open_loop(model, clips, context=context)["action"] for context in (64, 16))
    repeating = [figures["repeating"]["1 tick error"] for figures in (whole, cut)]
    assert repeating[0] == pytest.approx(repeating[1], rel=1e-5)
    assert whole["creature"]["1 tick error"] != cut["creature"]["1 tick error"]  # with a shorter past
    short = [{name: value[:20] for name, value in clip.items()} for clip in clips]
    figures = measure_open_loop(model, short, context=64)["action"]
    assert figures["windows"] == 0 and figures["creature"].keys() == {"1 tick error", "1 tick ratio"}


def test_the_script_prints_and_writes_all_figures(model, recordings, clips, tmp_path, run_script):
    model.save_pretrained(tmp_path / "creature")
    flags = ("--checkpoint", "creature", "--data", recordings, "--device", "cpu")
    code, out, err = run_script("evaluate_recordings", *flags, "--output", "figures.json")
    assert code == 0, err
    figures = json.loads((tmp_path / "figures.json").read_text())
    expected = measure_open_loop(model, clips, context=64)["action"]
    assert figures["commands"]["action"].keys() == expected.keys()
    for name, values in expected.items():
        assert figures["commands"]["action"][name] == pytest.approx(values, rel=1e-5)
    assert {"drop_proprioception", "wrong_proprioception", "drop_own_action"} <= figures["metrics"].keys()
    assert figures["metrics"]["action_error"] == pytest.approx(
        figures["commands"]["action"]["creature"]["1 tick error"], rel=1e-4
    )
    assert "without proprioception" in out and "repeating the last" in out and "1 s error" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ahead", "70"), "--ahead 70 is no multiple of 20 ms from 20 to 1040"),
        (("--ahead", "1060"), "--ahead 1060 is no multiple"),
        (("--data", "nowhere"), "nowhere is no folder of recordings"),
        (("--data", "tones"), "feeds internal_text, which creature has not learned"),
        (("--data", "other"), "other has no validation split"),
    ],
)
def test_bad_input_is_one_sentence(model, recordings, tmp_path, run_script, flags, message):
    model.save_pretrained(tmp_path / "creature")
    if "tones" in flags:
        write_made_up_recordings(tmp_path / "tones", "hear", seconds=12)
    if "other" in flags:
        from creature.data.recordings.schema import RecordingsWriter

        row = load_recordings(recordings)[0]["train"][0]
        with RecordingsWriter(tmp_path / "other") as writer:
            writer.add(row, "train", {name: ["shoulder", "elbow"] for name in ("body_state", "action")})
    given = () if "--data" in flags else ("--data", recordings)
    code, _, err = run_script("evaluate_recordings", "--checkpoint", "creature", *given, *flags)
    assert code == 1 and message in err.splitlines()[-1] and "Traceback" not in err
