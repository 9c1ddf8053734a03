"""The dedicated models of benchmarks/baselines: what they are measured by, and that they learn on made-up data."""

import argparse

import numpy as np
import pytest
import torch
from creatures import GPT2, micro_config, random_batch

from benchmarks.baselines import common, motion, robot, rollouts, segments, speech
from creature.errors import UserError
from motor_creature import command_errors, errors_of_repeating

TURN = 6.0  # degrees of one joint in a tick; the other is at rest


def turning(ticks: int) -> torch.Tensor:
    """[ticks, 4, 2 joints * 6]: a body that turns one joint at constant speed."""
    degrees = torch.arange(1, ticks * 4 + 1) * TURN / 4
    half = torch.deg2rad(degrees) / 2
    quaternions = torch.zeros(ticks * 4, 2, 4)
    quaternions[:, 0, 0], quaternions[:, 0, 2], quaternions[:, 1, 0] = half.cos(), half.sin(), 1.0
    clip = {"rotation_targets": quaternions.view(ticks, 4, 2, 4).numpy(), "animation_target_mask": np.ones(ticks, bool)}
    return motion.to_frames(clip)


def test_windows_have_a_past_and_a_future():
    for ticks in (0, 37, 38, 43, 100):
        starts = list(rollouts.open_loop_starts(ticks))
        assert all(start >= 25 and start + 13 <= ticks for start in starts)
        assert len(starts) == max(0, (ticks - 38) // 5 + 1)
    known, comes = rollouts.open_loop_windows([turning(38), turning(20)])
    assert torch.equal(torch.cat((known[0], comes[0])), turning(38))
    with pytest.raises(UserError, match="lasts 3.04 s"):
        rollouts.open_loop_windows([turning(37)])


def test_angles_are_those_of_a_turning_joint():
    held_out = [turning(60)]
    last = motion.angles(lambda known: known[:, -1:, -1:].expand(-1, 13, 4, -1), held_out)
    expected = [TURN * ms / 80 / 2 for ms in motion.MILLISECONDS]  # the mean with the joint at rest
    assert list(last.values()) == pytest.approx(expected, rel=1e-3)
    assert max(motion.angles(motion.constant_velocity, held_out).values()) < 0.05


def test_errors_of_actions_are_those_of_the_creature():
    config = micro_config(action_size=3, subframes_per_tick=4, num_joints=0, num_blend_shapes=0, body_state_size=2)
    frames = torch.randn(40, 4, 5, generator=torch.Generator().manual_seed(0)).cumsum(0)
    figures = robot.measure(lambda given: given * 0.9, lambda known: robot.still(known[:, -1:], 13), [frames], 3)
    batch = {"action": frames[None, ..., :3], "action_targets": frames[None, ..., :3]}
    found = command_errors({"action_targets": batch["action_targets"][:, :-1] * 0.9}, batch)[-1].sum()
    ratio = (found / errors_of_repeating(config, batch)[-1]).item()
    assert figures["1 tick ratio"] == pytest.approx(ratio, rel=1e-4)
    assert figures["1 s ratio"] == pytest.approx(1.0)


@pytest.fixture
def two_evaluations(monkeypatch):
    monkeypatch.setattr(common, "EVALUATIONS", 2)


def test_ridge_regression_and_gru_learn_a_body_that_swings(two_evaluations):
    times = torch.arange(40 * 4).view(40, 4, 1) / 4
    swings = [torch.cat((torch.sin(times * speed), torch.cos(times * speed)), -1) for speed in (0.5, 0.3)]
    frames = torch.cat(swings, -1)
    assert robot.measure_ridge([frames], [frames], 2, 1e-3, residual=True)["1 s ratio"] < 0.01
    options = argparse.Namespace(hidden=[16], learning_rates=[2e-2], seeds=[0], steps=12, device="cpu")

    def evaluate(model):
        return robot.measure(model, lambda known: model(known, 13)[:, -13:], [frames], 2)

    rows = rollouts.measure_grus([frames], options, None, robot.huber, evaluate, "1 s ratio")
    assert len(rows) == 2 and all(figures["1 s ratio"] < 0.9 for (figures,) in rows.values())


class Listener(torch.nn.Module):
    """Says 3 4 125 to a loud sound, 5 125 to a quiet one, and is undecided without sound."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(8.0))

    def forward(self, input_features, attention_mask, labels):
        loudness = (input_features.mean(-1) * attention_mask).sum(-1) / attention_mask.sum(-1)
        logits = torch.zeros(*labels.shape, 126)
        for sign, ids in ((1, (3, 4, 125)), (-1, (5, 125))):
            for place, token in enumerate(ids[: labels.shape[1]]):
                logits[:, place, token] += self.gain * (sign * loudness)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return argparse.Namespace(logits=logits, loss=loss)


def test_the_right_sound_is_told_from_none_and_from_anothers(two_evaluations):
    pairs = [(torch.ones(20 + place, 8), [3, 4, 125]) if place % 2 else (-torch.ones(20 + place, 8), [5, 125])
             for place in range(16)]  # fmt: skip
    options = argparse.Namespace(steps=2, device="cpu")
    figures = speech.fit_model(Listener(), pairs, pairs, 0, 1e-4, options)
    assert figures["all right"] == 1.0 and figures["right sound"] < 0.1
    assert figures["no sound"] == pytest.approx(np.log(126)) and figures["another's"] > 7
    assert speech.most_frequent(pairs[:15], pairs) == 0.5


def test_the_encoder_decoder_takes_sounds_of_any_length():
    torch.manual_seed(0)
    pairs = [(torch.randn(frames, 8), [3, 50256]) for frames in (20, 41)]
    loss = speech.build(micro_config(num_mel_bins=8, **GPT2), 64, 0.0)(**speech.collate(pairs, "cpu")).loss
    assert loss.item() == pytest.approx(np.log(GPT2["vocab_size"]), rel=0.1)


def test_segments_read_every_sense_at_its_tick_and_no_later_one():
    torch.manual_seed(0)
    model = segments.build(micro_config(), segmented=True).eval()
    for sense in model.model.senses.children():
        torch.nn.init.normal_(sense.proj.weight)
    batch = random_batch(model.config, ticks=6)
    hidden = model(**batch, use_cache=False).last_hidden_state
    assert hidden.shape[:2] == batch["input_ids"].shape
    for name in ("input_ids", "external_voice_ids", "input_features", "pixel_values", "body_mask", "touch_points"):
        changed = dict(batch) | {name: batch[name].clone()}
        changed[name][:, 3] = 1 - changed[name][:, 3].clamp(max=1)
        found = (model(**changed, use_cache=False).last_hidden_state - hidden).abs().amax(dim=(0, 2))
        assert found[:3].max() == 0 and found[3] > 0, name


def test_segments_of_packed_clips_do_not_see_each_other():
    model = segments.build(micro_config(), segmented=True).eval()
    ids = torch.arange(8)[None]
    packed = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])}
    found = model(**packed, use_cache=False).last_hidden_state
    alone = model(input_ids=ids[:, 3:], use_cache=False).last_hidden_state
    torch.testing.assert_close(found[:, 3:], alone, atol=1e-5, rtol=1e-5)
