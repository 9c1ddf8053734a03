"""The processor: recordings become ticks without a look ahead, and what is emitted becomes recordings again."""

import numpy as np
import pytest
import torch
from creatures import GPT2, micro_config, micro_model
from lives import join, make_recording, picture, quaternions

from creature.data.text.tokenizer import load_tokenizer
from processing_creature import ABSENT, TARGETS, CreatureProcessor, pad_clips
from ticks_creature import TICK_SECONDS

NULL, END, TICKS = GPT2["null_token_id"], GPT2["eos_token_id"], 25
BODY = dict(
    body_state_size=5, body_state_mean=[7.0] * 5, body_state_std=[3.0] * 5, action_size=2, action_mean=[-1.0, 0.5],
    action_std=[2.0, 0.25],
)  # fmt: skip
SIZES = {**GPT2, **BODY, "num_mel_bins": 8, "audio_frames_per_tick": 8, "vision_image_size": [12, 16]}
COMMANDS = ("action", "action_mask", "action_targets")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def processor(tokenizer):
    return CreatureProcessor.from_config(micro_config(**SIZES), tokenizer)


@pytest.fixture(scope="module")
def life():
    return make_recording()


def without(recording: dict, *columns: str) -> dict:
    return {name: value for name, value in recording.items() if name not in columns}


def test_the_future_of_no_column_changes_a_tick(processor, life):
    other = make_recording(seed=1)
    for columns in ((), ("action",)):  # with an action, and as motion capture, whose poses are commands
        whole = processor.encode(without(life, *columns))
        assert columns or set(ABSENT) - set(whole) == {
            "audio_codes", "audio_targets", "animation", "animation_mask", "rotation_targets", "blend_shape_targets",
            "eye_targets",
        }  # fmt: skip
        assert all(len(value) == TICKS for value in whole.values())
        for tick in (0, 6, 13, 23):
            changed = processor.encode(without(join(life, other, (tick + 1) * TICK_SECONDS), *columns))
            for name, value in pad_clips([changed]).items():
                np.testing.assert_array_equal(value[0, : tick + 1], pad_clips([whole])[name][0, : tick + 1], name)
        changed = pad_clips([processor.encode(without(join(life, other, 0.4), *columns))])
        for name, value in pad_clips([whole]).items():
            if not name.endswith("mask") or name == "touch_mask":
                assert not np.array_equal(changed[name], value), name


def test_words_begin_at_their_tick_and_silence_is_null(processor, tokenizer):
    words = [("Hello", 0.1), ("absquatulation", 0.5), ("loud", 0.51), ("end", 0.81)]
    entries = [{"word": word, "start": start, "end": start + 0.05} for word, start in words]
    arguments = processor.encode({"duration": 1.0, "external_voice": entries, "internal_text": []})
    expected = np.full(13, NULL)
    expected[1] = tokenizer(" Hello").input_ids[0]
    burst = tokenizer(" absquatulation loud").input_ids
    assert len(burst) > 2
    expected[6 : 6 + len(burst)] = burst
    expected[max(10, 6 + len(burst))] = tokenizer(" end").input_ids[0]
    np.testing.assert_array_equal(arguments["external_voice_ids"], expected)
    np.testing.assert_array_equal(arguments["input_ids"], np.full(13, NULL))
    np.testing.assert_array_equal(arguments["labels"], arguments["input_ids"])


def test_a_text_without_times_follows_the_recording_and_ends(processor, tokenizer):
    text = "Turn on <|endoftext|> the light."
    entries = [{"word": text, "start": None, "end": None}]
    arguments = processor.encode({"duration": 0.4, "internal_text": entries, "external_voice": [],
                                  "audio": {"array": np.zeros(6400), "sampling_rate": 16000}})  # fmt: skip
    ids = tokenizer(text, split_special_tokens=True).input_ids
    assert END not in ids
    np.testing.assert_array_equal(arguments["labels"], [NULL] * 5 + ids + [END])
    # Nothing is known of the other senses after the end.
    np.testing.assert_array_equal(arguments["external_voice_ids"], [NULL] * 5 + [-100] * (len(ids) + 1))
    np.testing.assert_array_equal(arguments["input_features_mask"], [True] * 5 + [False] * (len(ids) + 1))
    (decoded,) = processor.decode_outputs({"internal_text": torch.tensor(arguments["labels"][None])})
    assert "".join(word["word"] for word in decoded["internal_text"]) == text.replace(" ", "")
    assert decoded["internal_text"][0]["start"] == pytest.approx(0.4)


def test_a_tick_sees_the_latest_picture_of_every_camera(processor):
    left = {"name": "left", "images": [picture(10), picture(20), picture(30)], "times": [0.0, 0.1, 0.5]}
    right = {"name": "right", "images": [picture(100), picture(200)], "times": [0.09, 2.0]}
    arguments = processor.encode({"duration": 2.4, "images": [left, right]})
    pixels, mask = arguments["pixel_values"], arguments["pixel_mask"]
    assert pixels.dtype == np.uint8 and pixels.shape == (30, 2, 3, 12, 16)
    # Left 10, 20 from tick 1, 30 from tick 6, stale after 1.5 s; right from tick 1, stale after 1.09 s.
    np.testing.assert_array_equal(mask, [False] + [True] * 12 + [False] * 17)
    np.testing.assert_array_equal(pixels[:, 0, 0, 5, 5], [0] + [20] * 5 + [30] * 7 + [0] * 17)
    np.testing.assert_array_equal(pixels[:, 1, 2, 0, 15], [0] + [100] * 12 + [0] * 17)


def test_pictures_are_scaled_until_they_fill_and_cropped_to_their_middle(processor):
    from PIL import Image

    wide = np.zeros((24, 96, 3), np.uint8)
    wide[:, 32:64] = (200, 100, 50)
    for given in (wide, Image.fromarray(wide), Image.fromarray(wide).convert("RGBA")):
        np.testing.assert_array_equal(processor.encode_picture(given)[:, 4, 8], (200, 100, 50))
        assert processor.encode_picture(given).shape == (3, 12, 16)
    assert processor.encode_picture(wide)[0].min() > 180  # the dark sides are cut off
    with pytest.raises(ValueError, match="A picture cannot be decoded"):
        processor.encode_picture({"bytes": b"no picture", "path": None})


def test_a_body_is_normalised_holds_over_gaps_and_skips_what_is_no_number(processor, life):
    times = np.concatenate((np.arange(0, 0.5, 0.02), np.arange(1.8, 2.0, 0.02)))
    state = np.full((len(times), 5), 10.0)
    state[3] = np.nan
    body = {name: life[name] for name in ("joint_positions", "joint_rotations")}
    arguments = processor.encode({"duration": 2.0, "body_state": {"values": state, "times": times}, **body})
    present = arguments["body_mask"]
    np.testing.assert_allclose(arguments["body_state"][present], 1.0)
    assert present[:18].all() and not present[19:22].any() and present[23:].all()
    # A body of which a part was not recorded is not felt; rotations are commands still.
    half = processor.encode({"duration": 2.0, **body})
    assert "body_mask" not in half and "joint_positions" not in half and half["animation_mask"].all()


def test_the_pose_of_motion_capture_is_the_command_of_its_tick(processor, life):
    captured = processor.encode(without(life, "action"))
    rotations, animation = captured["rotation_targets"], captured["animation"]
    np.testing.assert_array_equal(rotations, captured["joint_rotations"])
    np.testing.assert_array_equal(animation[:, : rotations[0].size], rotations.reshape(TICKS, -1))
    np.testing.assert_array_equal(animation[0, -8:], [0, 0, 1, 0] * 2)
    assert captured["animation_target_mask"].all() and "action_targets" not in captured


def test_what_was_emitted_decodes_to_what_was_recorded(processor):
    draw = np.random.default_rng(0)
    words = [{"word": word, "start": 0.08 * tick, "end": 0.08 * (tick + 1)}
             for tick, word in enumerate("we go over the hill".split(), 2)]  # fmt: skip
    times = np.arange(100) / 50
    rotations, action = quaternions(100, 3, draw=draw), draw.standard_normal((100, 2))
    recording = {"duration": 2.0, "internal_text": words, "external_text": words[::2]}
    moved = {**recording, "joint_rotations": {"values": rotations, "times": times}}
    acted = {**recording, "action": {"values": action, "times": times}}
    arguments = {**processor.encode(moved), **processor.encode(acted)}
    emitted = {"internal_text": "labels", "external_text": "external_text_targets", "animation": "animation",
               "action": "action_targets"}  # fmt: skip
    batch = {name: torch.from_numpy(np.stack([arguments[target]] * 2)) for name, target in emitted.items()}
    rows = processor.decode_outputs(batch)
    assert len(rows) == 2
    for name, said in (("internal_text", words), ("external_text", words[::2])):
        assert [word["word"] for word in rows[1][name]] == [word["word"] for word in said]
        np.testing.assert_allclose([word["start"] for word in rows[1][name]], [word["start"] for word in said])
    # At 100 Hz two frames of a subframe of 40 ms remain: those at its beginning.
    np.testing.assert_allclose(rows[0]["joint_rotations"]["times"], times[::2])
    same = np.abs((rows[0]["joint_rotations"]["values"] * rotations[::2]).sum(-1))
    np.testing.assert_allclose(same, 1.0, atol=1e-5)
    np.testing.assert_allclose(rows[0]["action"]["values"], action[1::2], atol=1e-5)  # a command holds until the next
    assert rows[0]["eyes"]["values"].shape == (25, 2, 4) and rows[0]["blend_shapes"]["values"].shape == (25, 5)


def test_parts_are_what_a_model_takes_and_what_it_says_comes_back_with_times(processor):
    model = micro_model(**SIZES, max_position_embeddings=64)
    sound = np.random.default_rng(0).standard_normal(8000)
    inputs = processor(
        audio=sound, sampling_rate=16000, text="So", state=np.zeros((3, 5)), images=[[picture(1)] * 2] * 2,
        joint_positions=np.zeros((3, 3, 3)), joint_rotations=[[[1.0, 0, 0, 0]] * 3] * 3,
    )  # fmt: skip
    assert not set(inputs) & set(TARGETS)
    assert inputs["input_ids"].tolist() == [[NULL] * 7 + processor.tokenizer("So").input_ids]
    assert inputs["pixel_mask"].tolist() == [[True] * 7 + [False]] and inputs["pixel_values"].dtype == torch.uint8
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None,
                         output_streams=("external_text", "animation"))  # fmt: skip
    (said,) = processor.decode_outputs(out)
    assert said["joint_rotations"]["values"].shape == (8, 3, 4)
    np.testing.assert_allclose(said["joint_rotations"]["times"], 8 * TICK_SECONDS + np.arange(8) * 0.04)
    assert said["action"]["values"].shape == (8, 2)
    assert processor(text="So")["input_ids"].tolist() == [processor.tokenizer("So").input_ids]
    assert processor(audio=sound, sampling_rate=16000, text="")["input_ids"].tolist() == [[NULL] * 7]
    step = model.step(**processor(text="Go"), output_streams=("internal_text", "animation"))
    (emitted,) = processor.decode_outputs(step)
    assert emitted["joint_rotations"]["times"].tolist() == [0.0, 0.04] and len(emitted["internal_text"]) <= 1


def test_recordings_of_different_length_become_one_batch(processor):
    short, long = make_recording(0.5, seed=2), without(make_recording(1.0, seed=3), "touch", "external_text")
    batch = processor([short, long])
    assert {value.shape[:2] for value in batch.values()} == {(2, 13)}
    assert batch["touch_points"].shape[2] in (1, 2, 4, 8) and not batch["touch_mask"][1].any()
    assert (batch["external_text_ids"][1] == -100).all() and (batch["input_ids"][0, 7:] == -100).all()
    model = micro_model(**SIZES)
    with torch.no_grad():
        both = model(**batch, output_streams=("animation",))
        for row, recording in enumerate((short, long)):
            alone = model(**processor(recording), output_streams=("animation",))
            ticks = alone.logits.shape[1]
            torch.testing.assert_close(both.logits[row, :ticks], alone.logits[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(both.action[row, :ticks], alone.action[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(duration=None), "give a duration"),
        (lambda r: r["images"].pop(), r"1 cameras \(left\) and the model sees with 2: set num_cameras to 1"),
        (lambda r: r["images"][0].update(images=[{"bytes": b"x"}] * 30), "cannot be decoded"),
        (lambda r: r["images"][0].update(times=r["images"][0]["times"] + 1.7e9), "subtract the time"),
        (lambda r: r["images"][0].update(times=r["images"][0]["times"][1:]), "30 values and 29 times"),
        (lambda r: r["body_state"].update(times=r["body_state"]["times"] % 1), "times of body_state do not rise"),
        (lambda r: r["body_state"].update(values=np.zeros((60, 4))), "set body_state_size to 4"),
        (lambda r: r["joint_rotations"].update(values=np.zeros((240, 9, 4))), "set num_joints to 9"),
        (lambda r: r["action"].update(values=np.full((100, 2), np.nan)), "no row of finite numbers"),
        (lambda r: r["internal_text"].append({"word": "late", "start": 1.7e9, "end": None}), "recording ends at 2.0 s"),
        (lambda r: r["touch"][0].update(point=99), "names the point 99, and the model has 10"),
        (lambda r: r["audio"].update(array=np.array([np.nan])), "not finite"),
    ],
)
def test_what_does_not_fit_ends_in_a_sentence_with_the_remedy(processor, life, change, words):
    broken = {
        name: dict(value) if isinstance(value, dict)
        else [dict(entry) for entry in value] if isinstance(value, list) else value
        for name, value in life.items()
    }  # fmt: skip
    change(broken)
    with pytest.raises(ValueError, match=words):
        processor(broken)


def test_missing_statistics_and_unreadable_sound_are_told(tokenizer, life):
    bare = CreatureProcessor.from_config(micro_config(**GPT2, action_size=2, body_state_size=0), tokenizer)
    with pytest.raises(ValueError, match="no statistics of action: set action_mean and action_std"):
        bare.encode(without(life, "images", "audio"))
    with pytest.raises(ValueError, match="Give a recording, or parts"):
        bare()
    pytest.importorskip("soundfile")
    with pytest.raises(ValueError, match="The sound cannot be read"):
        bare(audio={"bytes": b"no sound", "path": None})


def test_saved_and_loaded_it_gives_the_same(processor, life, tmp_path):
    from transformers import AutoProcessor

    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is CreatureProcessor and loaded.organs == processor.organs
    for name, value in processor(life).items():
        assert torch.equal(loaded(life)[name], value), name


def test_the_inner_voice_of_a_recording_without_one_is_silent(processor):
    recording = make_recording(1.0)
    del recording["internal_text"]
    arguments = processor.encode(recording)
    assert (arguments["input_ids"] == processor.config.null_token_id).all() and "labels" not in arguments
    recording["external_text"] = [{"word": "a word", "start": None, "end": None}]  # is said behind the recording
    arguments = processor.encode(recording | {"internal_text": make_recording(1.0)["internal_text"]})
    thought = arguments["labels"] >= 0
    assert (arguments["input_ids"][~thought] == processor.config.null_token_id).all() and not thought[-1]
    assert (arguments["input_ids"] >= 0).all() and arguments["external_text_targets"][-1] >= 0
    assert "input_ids" not in processor(external_voice="a word")
    assert processor(external_voice="a word", text="")["input_ids"][0, 0] == processor.config.null_token_id
