"""Importing recordings: each layout that people have comes in with its words, times and groups, and what is broken in
it is named in the report while the rest goes on."""

import io
import json
import shutil

import numpy as np
import pytest

pytest.importorskip("av")
soundfile = pytest.importorskip("soundfile")

import datasets  # noqa: E402
import pyarrow as pa  # noqa: E402
from found_data import write_bvh, write_lerobot_2, write_lerobot_3, write_tone, write_video  # noqa: E402
from PIL import Image  # noqa: E402

from creature.data.recordings import media  # noqa: E402
from creature.data.recordings.importing import detect_format, import_recordings  # noqa: E402
from creature.data.recordings.schema import load_recordings  # noqa: E402
from creature.data.recordings.sources import ImportOptions  # noqa: E402
from creature.errors import UserError  # noqa: E402


@pytest.fixture
def bring(tmp_path):
    """Import tmp_path/found, or other inputs: (recording_id -> row with its split, report, recordings.json)."""

    def call(*inputs, **options):
        format = options.pop("format", "auto")
        output = tmp_path / "out"
        shutil.rmtree(output, ignore_errors=True)
        inputs = [str(one) for one in inputs or [tmp_path / "found"]]
        import_recordings(inputs, str(output), format, ImportOptions(**options), progress=False)
        splits, facts = load_recordings(output)
        rows = {row["recording_id"]: row | {"split": split} for split, rows in splits.items() for row in rows}
        return rows, facts["report"], facts

    return call


def words(row: dict, column: str = "internal_text") -> str:
    return " ".join(entry["word"] for entry in row[column] or ())


def listed(notes: list[dict]) -> dict[str, int]:
    return {note["what"]: note["count"] for note in notes}


def samples_of(row: dict) -> np.ndarray:
    samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="int16")
    assert rate == 16_000 and samples.ndim == 1
    return samples


# ---------------------------------------------------------------------------------------------------------------------
# Sound
# ---------------------------------------------------------------------------------------------------------------------


def ljspeech(folder):
    write_tone(folder / "wavs" / "LJ001-0001.wav", rate=22_050)
    (folder / "metadata.csv").write_text('LJ001-0001|He had "2 of them|He had "two of them\n')
    return "wavs/LJ001-0001", 'He had "two of them', None


def audio_folder(folder):
    write_tone(folder / "data" / "a.ogg", rate=48_000)
    (folder / "data" / "metadata.csv").write_text('file_name,speaker_id,transcription\na.ogg,ann,"yes, do"\n')
    return "data/a", "yes, do", "ann"


def audio_folder_lines(folder):
    write_tone(folder / "train" / "a.flac")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "train/a.flac", "text": "so it is"}) + "\n")
    return "train/a", "so it is", None


def librispeech(folder):
    write_tone(folder / "84" / "121123" / "84-121123-0000.flac")
    (folder / "84" / "121123" / "84-121123.trans.txt").write_text("84-121123-0000 GO DO YOU HEAR\n")
    return "84/121123/84-121123-0000", "GO DO YOU HEAR", "84"


def common_voice(folder):
    write_tone(folder / "clips" / "common_voice_en_1.mp3", rate=32_000)
    table = 'client_id\tpath\tsentence_id\tsentence\tup_votes\nf00\tcommon_voice_en_1.mp3\t9\tThe "end".\t2\n'
    (folder / "validated.tsv").write_text(table)
    return "clips/common_voice_en_1", 'The "end".', "f00"


def vctk(folder):
    write_tone(folder / "wav48" / "p225" / "p225_001_mic1.flac", rate=48_000)
    (folder / "txt" / "p225").mkdir(parents=True)
    (folder / "txt" / "p225" / "p225_001.txt").write_text("Please call Stella.\n")
    return "wav48/p225/p225_001_mic1", "Please call Stella.", "p225"


def nested_labels(folder):
    write_tone(folder / "audio" / "x.flac")
    label = {"x.flac": {"intent": "order", "slots": {"size": "twelve ounce", "milk": " soy milk", "shots": None}}}
    (folder / "label.json").write_text(json.dumps(label))
    return "audio/x", "order twelve ounce soy milk", None


def commands_by_folder(folder):
    write_tone(folder / "yes" / "0a7c2a8d_nohash_0.wav")
    return "yes/0a7c2a8d_nohash_0", "yes", "0a7c2a8d"


LAYOUTS = (
    ljspeech,
    audio_folder,
    audio_folder_lines,
    librispeech,
    common_voice,
    vctk,
    nested_labels,
    commands_by_folder,
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_of_speech_comes_in_with_its_words_and_speaker(tmp_path, bring, layout):
    name, text, group = layout(tmp_path / "found")
    rows, _, _ = bring(label_column="folder" if layout is commands_by_folder else None)
    assert list(rows) == [name] and words(rows[name]) == text
    assert rows[name]["internal_text"][0]["start"] is None
    assert group is None or rows[name]["split_group"] == group


@pytest.mark.parametrize(
    "ending, content",
    [
        (".align", "0 6000 sil\n6000 12000 pick\n12000 24000 up\n"),  # in 1/25,000 s
        (".wrd", "0 3840 h#\n3840 7680 pick\n7680 15360 up\n"),  # in samples
        (".lab", "0.00 0.24\n0.24 0.48 pick\n0.48 0.96 up\n"),
        (".txt", "0.24\t0.48\tpick\n0.48\t0.96\tup\n"),
        (
            ".json",
            json.dumps({"text": "pick up", "segments": [{"start": 0.24, "end": 0.96, "text": "pick up", "words": [
                {"word": " pick", "start": 0.24, "end": 0.48}, {"word": " up", "start": 0.48, "end": 0.96}]}]}),
        ),
    ],
)  # fmt: skip
def test_words_with_times_are_thought_when_they_have_been_heard(tmp_path, bring, ending, content):
    write_tone(tmp_path / "found" / "a.wav", seconds=1.0)
    (tmp_path / "found" / "a").with_suffix(ending).write_text(content)
    rows, _, _ = bring()
    assert [entry["word"] for entry in rows["a"]["internal_text"]] == ["pick", "up"]
    np.testing.assert_allclose([entry["start"] for entry in rows["a"]["internal_text"]], [0.48, 0.96])


@pytest.mark.parametrize("rate, channels", [(22_050, 1), (8_000, 2), (16_000, 1)])
def test_sound_of_any_rate_becomes_16_khz_mono_and_keeps_its_pitch_and_length(tmp_path, bring, rate, channels):
    write_tone(tmp_path / "found" / "a.wav", 0.75, rate, channels, pitch=1000.0)
    rows, _, _ = bring()
    samples = samples_of(rows["a"])
    assert abs(len(samples) / 16_000 - 0.75) < 0.003 and abs(rows["a"]["duration"] - len(samples) / 16_000) < 1e-9
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    assert abs(spectrum.argmax() * 16_000 / len(samples) - 1000.0) < 3
    assert abs(np.abs(samples.astype(int)).max() / 32_767 - 0.5) < 0.03


def test_broken_sound_is_named_and_the_rest_goes_on(tmp_path, bring):
    found = tmp_path / "found"
    write_tone(found / "good.wav")
    write_tone(found / "silent.wav")
    (found / "empty.wav").write_bytes(b"")
    (found / "noise.mp3").write_bytes(bytes(range(256)) * 8)
    soundfile.write(found / "none.wav", np.zeros(0), 16_000)
    (found / "list.csv").write_text("good|so be it\nsilent|\ngone|never heard\n")
    rows, report, _ = bring()
    assert set(rows) == {"good", "silent"} and rows["silent"]["internal_text"] is None
    left_out = listed(report["left_out"])
    assert left_out.pop("the sound file is empty") == 1 and left_out.pop("the sound has no samples") == 1
    ((reason, count),) = left_out.items()
    assert "cannot be decoded" in reason and count == 1
    remarks = listed(report["remarks"])
    assert remarks["described in a table, but there is no such file"] == 1
    assert remarks["sound without words: it is heard, but nothing is learnt to say about it"] >= 1


def test_long_sound_is_cut_into_recordings_that_join_without_a_gap(tmp_path, bring, monkeypatch):
    write_tone(tmp_path / "found" / "a.wav", 2.5)
    (tmp_path / "found" / "a.lab").write_text("0 0.5 one\n0.9 1.5 two\n2 2.25 three\n")
    whole = samples_of(bring()[0]["a"])
    monkeypatch.setattr(media, "PART_SECONDS", 1.0)
    rows, _, _ = bring()
    assert [row["duration"] for row in rows.values()] == [1.0, 1.0, 0.5] and len(
        {row["split"] for row in rows.values()}
    ) == 1
    np.testing.assert_array_equal(np.concatenate([samples_of(row) for row in rows.values()]), whole)
    said = [(entry["word"], entry["start"]) for row in rows.values() for entry in row["internal_text"] or ()]
    assert said == [("one", 0.5), ("two", 0.5), ("three", 0.25)]


# ---------------------------------------------------------------------------------------------------------------------
# Robots
# ---------------------------------------------------------------------------------------------------------------------


def grays(row: dict) -> np.ndarray:
    (camera,) = row["images"]
    pictures = [Image.open(io.BytesIO(image["bytes"])) for image in camera["images"]]
    return np.array([np.asarray(picture.convert("L"), dtype=float).mean() for picture in pictures])


def test_lerobot_2_with_gaps_comes_in_with_its_numbers_request_and_pictures(tmp_path, bring):
    write_lerobot_2(tmp_path / "found", {1: 31, 4: 20})
    rows, report, facts = bring(image_size=24)
    row = rows["episode_000001"]
    assert set(rows) == {"episode_000001", "episode_000004"} and len({row["split"] for row in rows.values()}) == 2
    assert facts["names"] == {"body_state": ["elbow", "wrist"], "action": ["elbow", "wrist"]}
    np.testing.assert_allclose(row["body_state"]["values"], [[frame / 30, 100] for frame in range(31)], atol=1e-6)
    np.testing.assert_allclose(row["action"]["times"], np.arange(31) / 30, atol=1e-6)
    assert row["external_voice"] == [{"word": "open the drawer", "start": 0.0, "end": None}]
    assert abs(row["duration"] - 31 / 30) < 1e-6
    # Of every tick of 80 ms the last frame that is not later than it.
    times = np.array(row["images"][0]["times"])
    np.testing.assert_allclose(times, [int(0.08 * tick * 30 + 1e-6) / 30 for tick in range(13)] + [1.0], atol=2e-3)
    np.testing.assert_allclose(grays(row), 2 * 30 * times, atol=3)
    assert Image.open(io.BytesIO(row["images"][0]["images"][0]["bytes"])).size == (32, 24)
    assert "a feature that is neither observed number, action nor camera" in listed(report["left_out"])


def test_lerobot_3_finds_each_episode_in_the_shared_table_and_video(tmp_path, bring):
    write_lerobot_3(tmp_path / "found", (20, 32, 15))
    rows, _, _ = bring()
    for index, frames in enumerate((20, 32, 15)):
        row = rows[f"episode_{index:06d}"]
        assert len(row["body_state"]["values"]) == frames and row["body_state"]["values"][0][1] == 100 * index
        np.testing.assert_allclose(grays(row), 50 * index + 20, atol=4)
        assert row["images"][0]["times"][0] < 1e-3 and row["images"][0]["times"][-1] <= row["duration"]
        assert words(row, "external_voice") == "close it"


def test_pictures_inside_the_table_of_a_robot_are_taken_at_the_same_times_as_a_video(tmp_path, bring):
    import pyarrow.parquet as pq

    found = tmp_path / "found"
    write_lerobot_2(found, {0: 20}, videos=False)
    info = json.loads((found / "meta" / "info.json").read_text())
    info["features"]["observation.images.front"]["dtype"] = "image"
    (found / "meta" / "info.json").write_text(json.dumps(info))
    pictures = []
    for number in range(20):
        file = io.BytesIO()
        Image.new("RGB", (64, 48), (10 * number,) * 3).save(file, "PNG")
        pictures.append({"bytes": file.getvalue(), "path": None})
    path = found / "data/chunk-000/episode_000000.parquet"
    pq.write_table(pq.read_table(path).append_column("observation.images.front", pa.array(pictures)), path)
    rows, report, _ = bring()
    row = rows["episode_000000"]
    times = [0.0, 2 / 30, 4 / 30, 7 / 30, 9 / 30, 12 / 30, 14 / 30, 16 / 30, 19 / 30]  # not later than k times 80 ms
    np.testing.assert_allclose(row["images"][0]["times"], times, atol=1e-5)
    np.testing.assert_allclose(grays(row), 10 * 30 * np.array(times), atol=2)
    assert listed(report["remarks"]) == {"one group is all there is: nothing is held out for validation": 1}


def test_robot_data_as_they_are_found_lose_only_what_is_broken(tmp_path, bring):
    import pyarrow.parquet as pq

    found = tmp_path / "found"
    write_lerobot_2(found, dict.fromkeys(range(6), 12))
    videos, data = found / "videos/chunk-000/observation.images.front", found / "data/chunk-000"
    (videos / "episode_000000.mp4").unlink()
    (videos / "episode_000001.mp4").write_bytes(b"no video at all")
    (data / "episode_000002.parquet").write_bytes(b"PAR1 no more")
    table = pq.read_table(data / "episode_000003.parquet")
    state = [[np.nan, 0.0] if frame == 5 else [1.0, 2.0] for frame in range(12)]
    clock = np.concatenate([np.arange(6), np.arange(6)]) / 30
    table = table.set_column(table.column_names.index("observation.state"), "observation.state", [state])
    table = table.set_column(table.column_names.index("timestamp"), "timestamp", [clock.astype(np.float32)])
    pq.write_table(table.drop_columns(["task_index"]), data / "episode_000003.parquet")
    (data / "episode_000005.parquet").unlink()
    rows, report, _ = bring()

    assert set(rows) == {f"episode_00000{index}" for index in (0, 1, 3, 4)}
    assert rows["episode_000000"]["images"] is None and rows["episode_000001"]["images"] is None
    assert rows["episode_000004"]["images"] and len(rows["episode_000003"]["body_state"]["times"]) == 11
    np.testing.assert_allclose(rows["episode_000003"]["action"]["times"], np.arange(12) / 30)
    assert words(rows["episode_000003"], "external_voice") == "open the drawer"
    remarks, left_out = listed(report["remarks"]), listed(report["left_out"])
    assert left_out["listed in meta/, but its frames are missing"] == 2
    assert sum(count for what, count in left_out.items() if "table of its frames cannot be read" in what) == 1
    assert remarks["a recording without a camera: the video is missing"] == 1
    assert remarks["frames without body_state, as a number in them is not finite"] == 1
    assert remarks["time stamps that do not rise: frames are counted at the rate of the data set"] == 1


def test_a_video_that_breaks_off_gives_what_it_had(tmp_path):
    write_video(tmp_path / "a.mp4", list(range(0, 120, 2)))
    whole = media.read_video(tmp_path / "a.mp4", 0.0, 9.0, 12.5, 64)
    content = (tmp_path / "a.mp4").read_bytes()
    assert len(whole[0]) == len(whole[1]) == 26
    middle = (content.index(b"mdat") + content.index(b"moov")) // 2
    (tmp_path / "b.mp4").write_bytes(content[:middle] + b"\xff" * 300 + content[middle + 300 :])
    pictures, times = media.read_video(tmp_path / "b.mp4", 0.0, 9.0, 12.5, 64)
    assert 0 < len(pictures) == len(times) < 26 and (np.diff(times) > 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Motion capture
# ---------------------------------------------------------------------------------------------------------------------


def turn(axis: str, degrees: float) -> np.ndarray:
    angle, (i, j) = np.radians(degrees), {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = np.cos(angle)
    matrix[i, j], matrix[j, i] = -np.sin(angle), np.sin(angle)
    return matrix


def matrix_of(quaternion: list[float]) -> np.ndarray:
    w, x, y, z = quaternion
    return np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ])  # fmt: skip


@pytest.mark.parametrize("unit, prefix", [(1.0, ""), (0.01, "mixamorig:"), (0.001, "")])
def test_motion_of_any_unit_and_order_of_channels_is_in_metres_and_quaternions(tmp_path, bring, unit, prefix):
    frames = np.tile([3.0, 90.0, -2.0, 30, 40, 50, 10, 20, 35, 60, -15, 25], (12, 1))
    write_bvh(tmp_path / "found" / "walk1_subject1.bvh", frames, fps=30, unit=unit, prefix=prefix)
    write_bvh(tmp_path / "found" / "walk1_subject2.bvh", frames, fps=30, unit=unit, prefix=prefix)
    (tmp_path / "found" / "index.tsv").write_text("walk1_subject1\twalk, turn\n")
    rows, report, facts = bring()
    assert facts["names"]["joints"] == [prefix + name for name in ("Hips", "Spine", "Hand")]
    row = rows["walk1_subject1"]
    assert row["split_group"] == "subject1" and words(row) == "walk, turn" and abs(row["duration"] - 0.4) < 1e-6
    hips = turn("z", 30) @ turn("y", 40) @ turn("x", 50)
    spine = turn("x", 10) @ turn("y", 20) @ turn("z", 35)
    hand = turn("y", 60) @ turn("x", -15) @ turn("z", 25)
    for got, wanted in zip(row["joint_rotations"]["values"][3], (hips, spine, hand), strict=True):
        np.testing.assert_allclose(matrix_of(got), wanted, atol=1e-5)
    places = [[0, 0, 0], [0, 1.2, 0], np.array([0, 1.2, 0]) + spine @ [0.5, 0, 0]]  # where the hips are, is taken out
    np.testing.assert_allclose(row["joint_positions"]["values"][3], places, atol=1e-5)
    assert any("motion without a description" in what for what in listed(report["remarks"]))


def test_fast_motion_is_resampled_to_50_a_second_without_a_look_ahead(tmp_path, bring):
    angles = 20 * np.sin(2 * np.pi * np.arange(120) / 120)
    frames = np.zeros((120, 12))
    frames[:, 6] = angles
    later = frames.copy()
    later[61:] = 77.0  # what happens after 0.5 s
    write_bvh(tmp_path / "found" / "a.bvh", frames)
    write_bvh(tmp_path / "found" / "b.bvh", later)
    rows, _, _ = bring()
    track = rows["a"]["joint_rotations"]
    np.testing.assert_allclose(track["times"], np.arange(50) / 50, atol=1e-9)
    got = np.degrees(2 * np.arcsin([joints[1][1] for joints in track["values"]]))
    wanted = 20 * np.sin(2 * np.pi * (np.arange(50) / 50 - 1 / 120))
    np.testing.assert_allclose(got[1:], wanted[1:], atol=0.05)
    known = [at for at, time in enumerate(track["times"]) if time <= 0.5 + 1e-6]
    assert [rows["b"]["joint_rotations"]["values"][at] for at in known] == [track["values"][at] for at in known]
    assert rows["b"]["joint_rotations"]["values"][-1] != track["values"][-1]


def test_motion_files_with_faults_are_mended_or_named(tmp_path, bring):
    found = tmp_path / "found"
    still = np.tile(np.arange(12.0), (30, 1))
    write_bvh(found / "broken_line.bvh", still, fps=50)
    text = (found / "broken_line.bvh").read_text().splitlines()
    text[-5] = "1 2 oops"
    (found / "broken_line.bvh").write_text("\n".join(text[:-1]))
    from_rest = np.concatenate([[np.zeros(12)], still * 0.6, still])
    from_rest[1:31, 6:] = 80.0
    write_bvh(found / "from_rest.bvh", from_rest)
    write_bvh(found / "none.bvh", still[:0])
    write_bvh(found / "other.bvh", still, fps=50)
    (found / "other.bvh").write_text((found / "other.bvh").read_text().replace("Spine", "Neck"))
    (found / "text.bvh").write_text("nothing")
    rows, report, _ = bring()
    assert set(rows) == {"broken_line", "from_rest"}
    assert len(rows["broken_line"]["joint_rotations"]["times"]) == 29
    assert abs(rows["from_rest"]["duration"] - 60 / 120) < 1e-6
    remarks, left_out = listed(report["remarks"]), listed(report["left_out"])
    assert remarks["a frame that cannot be read repeats the one before it"] == 1
    assert remarks["the first frames swing in from the skeleton at rest: left out"] == 1
    assert remarks["another number of frames than the file says"] == 1
    assert left_out["the file has no frames"] == 1
    assert any("import it into a folder of its own" in what for what in left_out)
    assert any("it is no BVH" in what for what in left_out)


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def test_trials_without_times_are_a_recording_each_and_their_test_files_stay_out(tmp_path, bring):
    found = tmp_path / "found"
    found.mkdir()
    (found / "grasps.csv").write_text("object,slipped,ff_1,ff_2\ncup,0,3000,2900\ncup,1,2500,2400\nbox,1,2600,2000\n")
    (found / "grasps_test.csv").write_text("object,slipped,ff_1,ff_2\npen,1,2800,2700\n")
    rows, report, facts = bring()
    assert facts["names"] == {"body_state": ["ff_1", "ff_2"]} and facts["statistics"]["body_state"]["mean"][0] == 2700
    assert [(row["split"], row["split_group"], words(row)) for row in rows.values()] == [
        ("train", "cup", "not slipped"), ("train", "cup", "slipped"), ("train", "box", "slipped"),
        ("validation", "pen", "slipped"),
    ]  # fmt: skip
    assert all(row["duration"] == 0.08 and row["body_state"]["times"] == [0.0] for row in rows.values())
    assert report["splits"]["train"] == {"recordings": 3, "seconds": 0.24, "ticks": 3, "groups": 2}


@pytest.mark.parametrize(
    "header, times",
    [
        ("Time (s)", ["5.00", "5.02", "5.04"]),
        ("time_ms", ["100", "120", "140"]),
        ("timestamp", ["1700000000000000000", "1700000000020000000", "1700000000040000000"]),
        ("timestamp", ["2024-05-01T10:00:00.000Z", "2024-05-01T10:00:00.020Z", "2024-05-01T10:00:00.040Z"]),
        ("frame", ["7", "8", "9"]),  # no time: a row a tick
    ],
)
def test_a_table_has_its_times_in_seconds_from_its_first_row(tmp_path, bring, header, times):
    (tmp_path / "found").mkdir()
    lines = [f"{header},x,action_x,note"] + [f"{time},{number},{-number},ok" for number, time in enumerate(times)]
    (tmp_path / "found" / "phone.csv").write_text("\n".join(lines))
    rows, report, _ = bring()
    (row,) = rows.values()
    step = 0.08 if header == "frame" else 0.02
    np.testing.assert_allclose(row["body_state"]["times"], [0, step, 2 * step], atol=1e-6)
    assert row["body_state"]["values"] == [[0], [1], [2]] and row["action"]["values"] == [[0], [-1], [-2]]
    assert abs(row["duration"] - 3 * step) < 1e-6 and listed(report["left_out"]) == {
        "a column that holds no numbers": 1
    }


def test_a_table_with_semicolons_and_decimal_commas_is_read(tmp_path, bring):
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "a.csv").write_text('"Zeit";"Time (s)";"x (m/s^2)"\na;0,00;1,5\nb;0,02;-2,25\n', "utf-8-sig")
    (row,) = bring()[0].values()
    assert row["body_state"] == {"values": [[1.5], [-2.25]], "times": [0.0, 0.02]}


def test_a_clock_that_jumps_and_values_that_are_missing(tmp_path, bring):
    lines = ["t,x,y,activity"]
    lines += [f"{t:.2f},{t},1,walk" for t in (0.0, 0.1, 0.2)]
    lines += ["0.15,9,9,walk", "0.30,nan,2,walk", "0.40,inf,3,walk"]  # a late row; x is missing twice
    lines += [",4,4,walk"]  # no time
    lines += [f"{t:.2f},5,5,walk" for t in (60.0, 60.1)]  # a pause
    lines += [f"{t:.2f},6,6,walk" for t in (0.0, 0.1)]  # the clock begins again
    lines += [f"{t:.2f},7,7,run" for t in (0.2, 0.3)]
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "imu.csv").write_text("\n".join(lines))
    rows, report, _ = bring()
    assert [row["body_state"]["values"] for row in rows.values()] == [
        pytest.approx(np.array([[0, 1], [0.1, 1], [0.2, 1], [0.2, 2], [0.2, 3]])),
        [[5, 5]] * 2, [[6, 6]] * 2, [[7, 7]] * 2,
    ]  # fmt: skip
    assert [words(row) for row in rows.values()] == ["walk", "walk", "walk", "run"]
    remarks = listed(report["remarks"])
    assert remarks["rows that are not later than those before were left out"] == 1
    assert remarks["values that are missing keep the one before"] == 2
    assert remarks["rows without a time were left out"] == 1


def test_recordings_of_a_table_do_not_depend_on_the_pieces_it_is_read_in(tmp_path, bring, monkeypatch):
    from creature.data.recordings import tables

    (tmp_path / "found").mkdir()
    lines = [f"{0.02 * n},{n},{'ab'[n // 40 % 2]}" for n in range(150)]
    (tmp_path / "found" / "a.csv").write_text("\n".join(["time,x,subject", *lines]))
    whole = bring(validation_fraction=0.0)[0]
    monkeypatch.setattr(tables, "CHUNK", 7)
    pieces = bring(validation_fraction=0.0)[0]
    assert pieces == whole and [len(row["body_state"]["times"]) for row in whole.values()] == [40, 40, 40, 30]
    monkeypatch.setattr(tables, "PART_SECONDS", 0.5)
    assert max(row["duration"] for row in bring(validation_fraction=0.0)[0].values()) <= 0.52


def test_the_sensors_of_a_phone_become_one_recording_that_looks_at_no_later_row(tmp_path, bring):
    folder = tmp_path / "found" / "walk-1"
    folder.mkdir(parents=True)
    rows = "".join(f"{1e18 + 1e7 * n:.0f},{0.01 * n:.2f},{n},0\n" for n in range(10))
    (folder / "Accelerometer.csv").write_text("time,seconds_elapsed,x,y\n" + rows)
    (folder / "Gyroscope.csv").write_text(
        "time,seconds_elapsed,x\n" + "".join(f"0,{0.01 + 0.03 * n:.2f},{n}\n" for n in range(3))
    )
    (folder / "Metadata.csv").write_text("version,rate\n3,100\n")
    rows, report, facts = bring()
    (row,) = rows.values()
    assert facts["names"]["body_state"] == ["accelerometer.x", "accelerometer.y", "gyroscope.x"]
    assert [values[0::2] for values in row["body_state"]["values"]] == [
        [1, 0], [2, 0], [3, 0], [4, 1], [5, 1], [6, 1], [7, 2], [8, 2], [9, 2],
    ]  # fmt: skip
    assert listed(report["left_out"]) == {"a table beside those of a phone's sensors": 1}


# ---------------------------------------------------------------------------------------------------------------------
# Data sets, recordings, splits, the script
# ---------------------------------------------------------------------------------------------------------------------


def test_a_data_set_with_sound_or_pictures_comes_in(tmp_path, bring):
    write_tone(tmp_path / "a.wav", 0.4)
    png = io.BytesIO()
    Image.new("RGB", (100, 50), (200, 10, 10)).save(png, "PNG")
    features = datasets.Features(
        sound=datasets.Audio(decode=False), picture=datasets.Image(), label=datasets.ClassLabel(names=["cat", "red"]),
        speaker=datasets.Value("string"),
    )  # fmt: skip
    rows = [
        {
            "sound": {"bytes": (tmp_path / "a.wav").read_bytes(), "path": None},
            "picture": None,
            "label": 0,
            "speaker": "ann",
        },
        {"sound": None, "picture": {"bytes": png.getvalue(), "path": None}, "label": 1, "speaker": "bob"},
        {"sound": None, "picture": {"bytes": b"broken", "path": None}, "label": 1, "speaker": "eve"},
    ]
    table = pa.Table.from_pylist(
        rows, schema=features.arrow_schema
    )  # `datasets` itself encodes sound by torchcodec only
    dataset = datasets.Dataset(datasets.table.InMemoryTable(table))
    dataset.save_to_disk(tmp_path / "found")
    (tmp_path / "parquet").mkdir()
    dataset.to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    for place in ("found", "parquet"):
        got, report, _ = bring(tmp_path / place, image_size=32)
        sound, picture = got["train/0"], got["train/1"]
        assert words(sound) == "cat" and len(samples_of(sound)) == 6400 and sound["split_group"] == "ann"
        assert words(picture) == "red" and picture["duration"] == 0.08
        shown = Image.open(io.BytesIO(picture["images"][0]["images"][0]["bytes"]))
        assert shown.size == (64, 32) and abs(np.asarray(shown)[..., 0].mean() - 200) < 5
        assert "train/2" not in got and any("picture cannot be decoded" in what for what in listed(report["left_out"]))


def test_recordings_are_merged_and_split_anew(tmp_path, bring):
    write_lerobot_2(tmp_path / "arm", dict.fromkeys(range(4), 5), videos=False)
    for name in ("one", "two"):
        import_recordings([str(tmp_path / "arm")], str(tmp_path / name), license="CC0", progress=False)
    held_out = load_recordings(tmp_path / "one")[0]["validation"]["split_group"][:]
    rows, report, facts = bring(tmp_path / "one", tmp_path / "two")
    assert len(rows) == 8 and {name.split("/")[0] for name in rows} == {"one", "two"} and report["licenses"] == ["CC0"]
    assert {row["split_group"] for row in rows.values() if row["split"] == "validation"} == set(held_out)
    again, _, _ = bring(tmp_path / "one", validation_groups="_00000[23]$")
    assert {name for name, row in again.items() if row["split"] == "validation"} == {"episode_000002", "episode_000003"}
    original = load_recordings(tmp_path / "one")[0]["train"][0]
    assert {name: again[original["recording_id"]][name] for name in original} == original


def test_a_group_is_in_one_split_and_the_split_is_the_same_each_time(tmp_path, bring):
    found = tmp_path / "found"
    found.mkdir()
    lines = [f"{person},{n}" for n in range(3) for person in "abcdefghijkl"]
    (found / "all.csv").write_text("\n".join(["person,x", *lines]))
    rows, report, _ = bring(validation_fraction=0.3)
    groups = {
        split: {row["split_group"] for row in rows.values() if row["split"] == split} for split in report["splits"]
    }
    assert not groups["train"] & groups["validation"] and len(groups["validation"]) == 4
    (found / "all.csv").write_text("\n".join(["person,x", *reversed(lines)]))
    again = bring(validation_fraction=0.3)[0]
    assert {row["split_group"] for row in again.values() if row["split"] == "validation"} == groups["validation"]
    assert {row["split"] for row in bring(validation_fraction=0.0)[0].values()} == {"train"}
    with pytest.raises(UserError, match="no group matches zz"):
        bring(validation_groups="zz")


def test_the_group_comes_from_a_column_or_from_the_path(tmp_path, bring):
    for name in ("x/k7-1.wav", "x/k7-2.wav", "y/k9-1.wav"):
        write_tone(tmp_path / "found" / name, 0.1)
    (tmp_path / "found" / "list.csv").write_text("file,text,room\nk7-1.wav,a,hall\nk7-2.wav,b,attic\nk9-1.wav,c,hall\n")
    assert {row["split_group"] for row in bring(split_group=r"(k\d)")[0].values()} == {"k7", "k9"}
    assert {row["split_group"] for row in bring(split_group="room")[0].values()} == {"hall", "attic"}


@pytest.mark.parametrize(
    "files, complaint",
    [
        ({}, "there is no folder"),
        ({"a.xyz": b"1"}, "holds neither"),
        ({"a.wav": b""}, "the sound file is empty"),
        ({"a.csv": b""}, "the table is empty"),
        ({"a.csv": b"0.5,1\n2,3\n"}, "it has to name the columns"),
        ({"meta/info.json": b"{"}, "no LeRobot data set"),
    ],
)
def test_an_input_without_recordings_ends_in_one_sentence_and_leaves_no_output(tmp_path, bring, files, complaint):
    for name, content in files.items():
        (tmp_path / "found" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "found" / name).write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        bring()
    assert not [path for path in tmp_path.iterdir() if path.name != "found"]


def test_the_format_is_told_by_what_lies_in_the_folder(tmp_path):
    write_tone(tmp_path / "a" / "x.wav", 0.1)
    assert detect_format(str(tmp_path / "a")) == "audio"
    assert detect_format("owner/name") == "datasets"
    with pytest.raises(UserError, match="there is no folder"):
        detect_format("speech")


def test_the_script_prints_the_report_draws_the_recordings_and_overwrites_nothing(tmp_path, run_script):
    write_lerobot_2(tmp_path / "arm", {0: 10, 2: 10})
    (tmp_path / "arm" / "LICENSE").write_text("MIT License\n\n...")
    command = ("import_recordings", "--input", "arm", "--output", "recordings/arm")
    code, out, _ = run_script(*command)
    assert code == 0 and "2 numbers" in out and "MIT License" in out and "1 recordings, 1 groups" in out
    assert Image.open(tmp_path / "recordings" / "arm" / "recordings.png").size[0] > 500
    code, _, err = run_script(*command)
    assert code == 1 and "exists already" in err and (tmp_path / "recordings" / "arm" / "train").is_dir()


def test_the_picture_shows_sound_words_and_bodies(tmp_path, bring):
    from creature.data.recordings.sheet import draw_recordings

    write_tone(tmp_path / "found" / "a.wav", 0.5)
    (tmp_path / "found" / "a.lab").write_text("0 0.2 one\n0.2 0.4 $two_\n")
    bring()
    with_words = draw_recordings(tmp_path / "out").read_bytes()
    (tmp_path / "found" / "a.lab").unlink()
    bring()
    assert draw_recordings(tmp_path / "out").read_bytes() != with_words
