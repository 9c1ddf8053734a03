"""From a folder of recordings to clips: cut, cached, counted, and collated."""

import io
import pickle
import wave

import numpy as np
import pytest
import torch
from creatures import GPT2, micro_config
from lives import make_recording

from creature.data import collate_clips
from creature.data.recordings.clips import make_clips, statistics
from creature.data.recordings.schema import RecordingsWriter, load_recordings
from creature.data.text.tokenizer import load_tokenizer
from creature.errors import UserError
from processing_creature import ABSENT, CreatureProcessor

pytest.importorskip("soundfile")

NAMES = {"joints": ["hip", "knee", "toe"], "body_state": list("abcde"), "action": ["open", "close"]}
SIZES = {**GPT2, "num_mel_bins": 8, "audio_frames_per_tick": 8, "vision_image_size": [12, 16]}


def to_row(recording: dict) -> dict:
    """A recording as a folder of recordings takes it: with its sound as a file."""
    samples = (np.clip(recording["audio"]["array"], -1, 1) * 32767).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, recording["audio"]["sampling_rate"], len(samples), "NONE", ""))
        sound.writeframes(samples.tobytes())
    return {**recording, "audio": {"bytes": file.getvalue(), "path": None}, "source": "by hand", "license": "CC0-1.0"}


def lives() -> list[dict]:
    """A whole life of 4 s, a sound with a text without times, one that only thinks, one whose camera is missing."""
    whole = to_row({**make_recording(4.0, seed=1), "recording_id": "whole"})
    sound = {name: whole[name] for name in ("audio", "source", "license")}
    text = [{"word": "two cups of tea", "start": None, "end": None}]
    heard = {"recording_id": "heard", "split_group": "b", "duration": 3.0, "internal_text": text, **sound}
    thought = {"recording_id": "thought", "split_group": "c", "duration": 1.0, "internal_text": text}
    blind = {**to_row(make_recording(1.0, seed=2)), "recording_id": "blind", "images": whole["images"][:1]}
    return [whole, heard, thought, blind]


def write(folder, rows: list[dict], validation: list[dict] = (), names: dict = NAMES):
    with RecordingsWriter(folder) as writer:
        for split, some in (("train", rows), ("validation", validation)):
            for row in some:
                writer.add(row, split, names={**names} if row.get("action") else None)
    return load_recordings(folder)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return write(tmp_path_factory.mktemp("recordings") / "lives", lives(),
                 [to_row({**make_recording(1.0, seed=3), "recording_id": "other"})])  # fmt: skip


@pytest.fixture(scope="module")
def processor(recordings):
    config = micro_config(**SIZES, **statistics(recordings[1]))
    return CreatureProcessor.from_config(config, load_tokenizer())


@pytest.fixture(scope="module")
def made(recordings, processor, tmp_path_factory):
    return make_clips(*recordings, processor, 20, tmp_path_factory.mktemp("cache"))


def test_clips_are_the_recording_cut_from_its_end(recordings, processor, made):
    clips = list(made[0]["train"])
    assert [(clip["recording_id"], clip["first_tick"]) for clip in clips] == [
        ("whole", 0), ("whole", 10), ("whole", 30), ("heard", 0), ("heard", 3), ("heard", 23)
    ]  # fmt: skip
    for name, recording in zip(("whole", "heard"), list(recordings[0]["train"])[:2], strict=True):
        parts = [clip for clip in clips if clip["recording_id"] == name]
        whole = processor.encode(recording)
        assert {argument for argument in ABSENT if parts[0].get(argument) is not None} == set(whole)
        for argument, value in whole.items():
            joined = np.concatenate([part[argument] for part in parts])
            np.testing.assert_array_equal(joined, value)
            assert joined.dtype == value.dtype


def test_the_facts_count_what_is_used_and_say_why_the_rest_is_not(made):
    clips, facts = made
    assert facts["senses"] == ["internal_voice", "external_voice", "audio", "vision", "proprioception", "touch"]
    assert facts["streams"] == ["internal_text", "external_text", "animation"]
    train = facts["splits"]["train"]
    assert (train["recordings"], train["clips"], train["ticks"], train["cut"]) == (2, 6, 50 + 43, 2)
    assert "no sense that the model has, only internal_text" in train["left_out"]["thought"]
    assert "1 cameras (left)" in train["left_out"]["blind"]
    assert facts["splits"]["validation"]["clips"] == len(clips["validation"]) == 1
    assert facts["unused"] == {} and facts["sources"] == ["by hand"] and facts["licenses"] == ["CC0-1.0"]


def test_what_the_model_has_no_organ_for_is_told(recordings, tmp_path):
    listener = CreatureProcessor.from_config(
        micro_config(**SIZES, num_cameras=0, num_joints=0, body_state_size=0, action_size=0, num_touch_points=0),
        load_tokenizer(),
    )
    clips, facts = make_clips(*recordings, listener, 64, tmp_path)
    assert facts["senses"] == ["internal_voice", "external_voice", "audio"]
    assert facts["streams"] == ["internal_text", "external_text"]
    assert facts["unused"]["images"] == "the model's num_cameras is 0" and len(facts["unused"]) == 6
    assert facts["splits"]["train"]["recordings"] == 3  # the one of one camera can be heard
    assert not {"pixel_values", "body_mask", "action"} & set(clips["train"].column_names)


def test_clips_are_made_once_for_the_same_recordings_and_processor(recordings, processor, tmp_path, monkeypatch):
    first, facts = make_clips(*recordings, processor, 20, tmp_path)
    monkeypatch.setattr(CreatureProcessor, "encode", None)  # to encode anything would now raise
    second, again = make_clips(*recordings, processor, 20, tmp_path)
    assert again == facts
    np.testing.assert_array_equal(first["train"][1]["pixel_values"], second["train"][1]["pixel_values"])
    monkeypatch.undo()
    other = CreatureProcessor.from_config(micro_config(**{**SIZES, "num_mel_bins": 4}, **statistics(recordings[1])),
                                          processor.tokenizer)  # fmt: skip
    assert make_clips(*recordings, other, 20, tmp_path)[0]["train"][0]["input_features"].shape == (10, 32)
    assert make_clips(*recordings, processor, 10, tmp_path)[1]["data_hash"] != facts["data_hash"]


def test_two_processes_make_the_same_clips(recordings, processor, made, tmp_path):
    clips, facts = make_clips(*recordings, processor, 20, tmp_path, num_proc=2)
    assert facts == made[1]
    for one, other in zip(clips["train"], made[0]["train"], strict=True):
        for name, value in other.items():
            np.testing.assert_array_equal(one[name], value)


def test_a_batch_of_clips(made):
    clips = pickle.loads(pickle.dumps(made[0]["train"]))  # as a worker gets them
    batch = collate_clips(clips.__getitems__([0, 4, 5]))
    assert {value.shape[:2] for value in batch.values()} == {(3, 20)} and set(batch) <= set(ABSENT)
    assert batch["pixel_values"].dtype == torch.uint8 and batch["input_ids"].dtype == torch.int64
    assert batch["pixel_mask"][0, :10].all() and not batch["pixel_mask"][1:].any()
    assert (batch["labels"][0, 10:] == -100).all() and (batch["labels"][2] != -100).all()
    assert not batch["input_features_mask"][0, 10:].any()
    assert "pixel_values" not in collate_clips([clips[4]])
    assert collate_clips([clips[0]], ticks=24)["input_ids"].shape == (1, 24)


def test_a_number_that_never_changes_gets_the_standard_deviation_1(tmp_path):
    row = make_recording(1.0)
    row["body_state"]["values"][:, 1] = 1000.1
    fields = statistics(write(tmp_path / "r", [to_row(row)])[1])
    assert fields["body_state_std"][1] == 1.0 and fields["body_state_std"][0] == pytest.approx(3.0, rel=0.5)
    assert fields["body_state_mean"][1] == pytest.approx(1000.1) and fields["action_size"] == 2
    micro_config(**SIZES, **fields)  # which the configuration accepts


def test_another_robot_and_nothing_usable_are_refused(recordings, processor, tmp_path):
    names = {**NAMES, "body_state": list("abxde")}
    other = write(tmp_path / "other", [to_row(make_recording(1.0))], names=names)
    with pytest.raises(UserError, match=r"body_state .* not that of the model \(number 3 is x and not c\)"):
        make_clips(*other, processor, 20, tmp_path)
    silent = write(tmp_path / "silent", [lives()[2]])
    with pytest.raises(UserError, match="none of the 1 recordings of train can be used; thought: It has no sense"):
        make_clips(*silent, processor, 20, tmp_path)
    with pytest.raises(UserError, match="at least 2 ticks"):
        make_clips(*recordings, processor, 1, tmp_path)
    assert make_clips(*recordings, processor, 20, tmp_path)[1]["splits"]["train"]["clips"] == 6
