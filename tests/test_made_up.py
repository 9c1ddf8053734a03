"""Made-up recordings: they open, feed the sense of their round, and that sense alone says what is to be learned."""

import io
import sys
import wave

import numpy as np
import pytest
from creatures import GPT2, micro_config
from PIL import Image

from creature.data.recordings.clips import make_clips, statistics
from creature.data.recordings.made_up import KINDS, write_made_up_recordings
from creature.data.recordings.schema import load_recordings
from creature.data.recordings.sheet import picture_of
from creature.data.text.tokenizer import load_tokenizer
from creature.errors import UserError
from processing_creature import CreatureProcessor

SIZES = {**GPT2, "num_cameras": 1, "num_joints": 0, "num_blend_shapes": 0, "body_state_size": 0, "action_size": 0,
         "audio_frames_per_tick": 8, "vision_image_size": 16}  # fmt: skip
FED = {
    "hear": (["internal_voice", "audio"], ["internal_text"]),
    "see": (["internal_voice", "vision"], ["internal_text"]),
    "touch": (["internal_voice", "touch"], ["internal_text"]),
    "speak": (["internal_voice", "audio"], ["internal_text"]),  # and audio, with a codec: see test_codec.py
    "move": (["internal_voice", "proprioception"], ["animation"]),
    "whole": (
        ["internal_voice", "external_voice", "audio", "vision", "proprioception", "touch"],
        ["internal_text", "external_text", "animation"],
    ),
}


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """Of every kind, what `load_recordings` returns of two minutes."""
    folder = tmp_path_factory.mktemp("made_up")
    for kind in KINDS:
        write_made_up_recordings(folder / kind, kind, seconds=120.0)
    return {kind: load_recordings(folder / kind) for kind in KINDS}


def all_rows(recordings) -> list[dict]:
    return [row for split in recordings[0].values() for row in split]


@pytest.mark.parametrize("kind", KINDS)
def test_the_recordings_are_short_and_a_fifth_of_the_groups_is_held_out(made_up, kind):
    splits, _ = made_up[kind]
    rows = all_rows(made_up[kind])
    assert 120 <= sum(row["duration"] for row in rows) < 125 and all(2 <= row["duration"] <= 5 for row in rows)
    train, validation = (set(splits[name]["split_group"]) for name in ("train", "validation"))
    assert len(train) == 4 and len(validation) == 1 and not train & validation
    assert 0.1 < len(splits["validation"]) / len(rows) < 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_clips_feed_the_sense_and_the_stream_of_the_round(made_up, kind, tmp_path):
    splits, facts = made_up[kind]
    few = type(splits)({name: split.select(range(2)) for name, split in splits.items()})
    config = micro_config(**{**SIZES, **statistics(facts)})
    clips, about = make_clips(few, facts, CreatureProcessor.from_config(config, load_tokenizer()), 128, tmp_path)
    assert (about["senses"], about["streams"]) == FED[kind]
    assert list(about["unused"]) == (["voice"] if kind in ("speak", "whole") else [])
    assert all(part["recordings"] == 2 and not part["left_out"] for part in about["splits"].values())
    clip = clips["train"][0]
    if kind == "move":
        assert 0.3 < clip["action"].std() < 3 and clip["animation_target_mask"].all()  # arms swing more or less wide
    else:
        words = " ".join(entry["word"] for entry in splits["train"][0]["internal_text"]).split()
        assert (clip["labels"] < GPT2["eos_token_id"]).sum() >= len(words)  # one id a word, or more


def test_the_voice_says_what_was_heard_half_a_second_before(made_up):
    for row in all_rows(made_up["speak"]):
        loud = []
        for column in ("audio", "voice"):
            with wave.open(io.BytesIO(row[column]["bytes"])) as file:
                samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
            assert len(samples) == pytest.approx(row["duration"] * 16_000, abs=1)
            frames = np.abs(samples[: len(samples) // 800 * 800].reshape(-1, 800)).max(axis=1)
            loud.append(frames > 0.05)
        heard, said = loud
        assert heard.any() and (said[10:] == heard[:-10]).mean() > 0.95 and not said[:10].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_the_recordings(tmp_path, kind):
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        write_made_up_recordings(tmp_path / name, kind, seconds=5.0, seed=seed)
    one, same, other = (all_rows(load_recordings(tmp_path / name)) for name in ("one", "same", "other"))
    assert one == same and len(one) == 5
    ids = ("recording_id", "split_group")
    without_ids = [[{k: v for k, v in row.items() if k not in ids} for row in rows] for rows in (one, other)]
    assert not any(row in without_ids[1] for row in without_ids[0])


def test_the_pitch_of_each_tone_is_its_word(made_up):
    heard = set()
    for row in all_rows(made_up["hear"]):
        with wave.open(io.BytesIO(row["audio"]["bytes"])) as file:
            assert (file.getnchannels(), file.getframerate()) == (1, 16_000)
            assert file.getnframes() == pytest.approx(row["duration"] * 16_000, abs=1)
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
        frames = samples[: len(samples) // 320 * 320].reshape(-1, 320)
        loud = np.concatenate(([False], frames.std(axis=1) > 0.02, [False]))
        edges = np.flatnonzero(np.diff(loud.astype(int))).reshape(-1, 2) * 320  # begin and end of each tone
        words = []
        for begin, end in edges:
            spectrum = np.abs(np.fft.rfft(samples[begin:end] * np.hanning(end - begin)))
            pitch = spectrum.argmax() * 16_000 / (end - begin)
            words.append("low" if pitch < 400 else "middle" if pitch < 1200 else "high")
        assert row["internal_text"] == [{"word": " ".join(words), "start": None, "end": None}]
        heard.add(tuple(words))
    assert {len(words) for words in heard} == {1, 2} and {words[0] for words in heard} == {"low", "middle", "high"}


def test_the_pictures_show_the_color_and_the_direction_of_the_words(made_up):
    tones = {"red": [1, 0, 0], "green": [0, 1, 0], "blue": [0, 0, 1], "yellow": [1, 1, 0]}
    seen = set()
    for row in all_rows(made_up["see"]):
        (camera,) = row["images"]
        pictures = np.stack([Image.open(io.BytesIO(picture["bytes"])) for picture in camera["images"]]).astype(float)
        assert pictures.shape[1:] == (64, 64, 3) and len(pictures) == np.ceil(row["duration"] * 12.5)
        shape = np.ptp(pictures, axis=-1) > 0  # all else is grey
        color = pictures[shape].mean(axis=0) > 120
        places = np.exp(2j * np.pi * np.arange(64) / 64)  # what leaves on one side comes back on the other
        across, down = ((shape.sum(axis=axis) * places).sum(axis=1) for axis in (1, 2))
        steps = [np.angle(way[1:] / way[:-1]).mean() for way in (across, down)]
        largest = int(np.abs(steps).argmax())
        direction = (("left", "right"), ("up", "down"))[largest][int(steps[largest] > 0)]
        words = f"{next(name for name, tone in tones.items() if (color == tone).all())} {direction}"
        assert row["internal_text"] == [{"word": words, "start": None, "end": None}]
        seen |= set(words.split())
    assert seen == {*tones, "left", "right", "up", "down"}


def test_the_words_say_what_is_touched_while_it_is_touched(made_up):
    felt = set()
    for row in all_rows(made_up["touch"]):
        assert row["internal_text"]
        for entry in row["internal_text"]:
            contacts = [one for one in row["touch"] if abs(one["time"] - entry["start"]) <= 0.25]
            assert {one["time"] < entry["start"] - 0.16 for one in contacts} == {True, False}  # two ticks before it
            ((temperature, surface),) = {(one["temperature"], one["surface"]) for one in contacts}
            heat = "cold" if temperature < 20 else "warm" if temperature < 40 else "hot"
            assert entry["word"] == f"{heat} {('smooth', 'rough', 'soft')[surface]}"
            assert all(one["force"] > 0 and 0 <= one["point"] < 5 for one in contacts)
            felt.add(entry["word"])
        pauses = np.diff(sorted({one["time"] for one in row["touch"]}))
        assert (pauses > 0.25).sum() == len(row["internal_text"]) - 1
    assert len(felt) == 9


def test_the_command_follows_from_what_the_body_felt_and_not_from_the_commands_before(made_up):
    def error(columns: tuple[str, ...]) -> float:
        """Of the commands a tick later, in units of repeating the last one: linear regression on half a second."""
        inputs, targets, last = [], [], []
        for row in all_rows(made_up["move"]):
            action = np.array(row["action"]["values"])
            past = np.concatenate([np.array(row[column]["values"]) for column in columns], axis=1)
            assert np.diff(row["action"]["times"]) == pytest.approx(1 / 30) and len(past) == len(action)
            for now in range(15, len(action) - 2):
                inputs.append(np.append(past[now - 14 : now + 1], 1.0))
                targets.append(action[now + 2])
                last.append(action[now])
        inputs, targets, last = map(np.array, (inputs, targets, last))
        half = len(inputs) // 2
        weights = np.linalg.lstsq(inputs[:half], targets[:half], rcond=None)[0]
        return np.abs(inputs[half:] @ weights - targets[half:]).mean() / np.abs(last - targets)[half:].mean()

    assert made_up["move"][1]["names"] == dict.fromkeys(("body_state", "action"), ["shoulder", "elbow"])
    assert 3 * error(("body_state", "action")) < error(("action",)) < 1


def test_the_base_install_hears_the_tones(made_up, monkeypatch):
    config = micro_config(**SIZES)
    processor, row = CreatureProcessor.from_config(config, load_tokenizer()), made_up["hear"][0]["train"][0]
    pytest.importorskip("soundfile")
    expected = processor.encode(row)
    monkeypatch.setitem(sys.modules, "soundfile", None)  # to import it now raises ImportError
    for name, value in processor.encode(row).items():
        np.testing.assert_array_equal(value, expected[name])
    with pytest.raises(ImportError, match="pip install soundfile"):
        processor.encode(row | {"audio": {"bytes": b"fLaC", "path": None}})


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_install_draws_them(made_up, monkeypatch, kind):
    for name in ("soundfile", "av"):
        monkeypatch.setitem(sys.modules, name, None)
    row = made_up[kind][0]["train"][0]
    drawn = picture_of([row])
    assert Image.open(io.BytesIO(drawn)).size[0] > 500
    column = next(name for name in ("audio", "images", "touch", "body_state") if row[name])
    assert picture_of([row | {column: None}]) != drawn


def test_a_point_that_is_touched_after_the_picture_ends_is_no_warning(made_up, recwarn):
    row = made_up["touch"][0]["train"][0]
    contacts = [row["touch"][0] | {"point": point, "time": time} for point, time in ((0, 0.5), (0, 0.9), (1, 5.0))]
    assert picture_of([row | {"touch": contacts, "duration": 6.0}], seconds=2.0) and not list(recwarn)


def test_another_kind_and_a_folder_that_is_not_empty_are_refused(tmp_path):
    with pytest.raises(UserError, match="'smell': choose one of hear, see, touch, speak, move"):
        write_made_up_recordings(tmp_path / "new", "smell")
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(UserError, match="exists already"):
        write_made_up_recordings(tmp_path, "hear")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
