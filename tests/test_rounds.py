"""A round on recordings, as a user runs it: from a text checkpoint, stopped and resumed, with every bad input."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from creatures import GPT2, MICRO, micro_model
from safetensors.torch import load_file

import run_clm_creature
from configuration_creature import CreatureConfig
from creature import checkpoints
from creature.data.recordings.made_up import write_made_up_recordings
from creature.data.recordings.schema import RecordingsWriter
from creature.errors import UserError
from creature.rounds.start import reset_unused_rows, start_model, trained_senses
from creature.settings import CONFIGS, parse_settings
from creature.trainer import CreatureTrainer
from modeling_creature import MultiModalCreature
from processing_creature import CreatureProcessor

KINDS = ("hear", "see", "touch", "move", "whole")
ORGANS = ("num_joints", "num_blend_shapes", "vision_image_size")
MODEL = {name: value for name, value in MICRO["model"].items() if name not in ORGANS}
MODEL |= {"max_position_embeddings": 64, "vision_image_size": 16}
VOICE = {"num_audio_codebooks": 8, "audio_codebook_size": 1024}  # of the codec that stands in


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to run in, with a round for each kind on a micro creature, and a text."""
    monkeypatch.chdir(tmp_path)
    for kind in KINDS:
        given = yaml.safe_load((CONFIGS / "rounds" / f"{kind}.yaml").read_text())
        training = given["training"] | MICRO["training"] | {"tokens_per_step": 128, "eval_steps": 4, "logging_steps": 1}
        given |= {"model": MODEL | (VOICE if kind == "whole" else {}), "training": training}
        given["data"]["clip_ticks"] = 64
        (tmp_path / f"{kind}.yaml").write_text(yaml.safe_dump(given))
    np.random.default_rng(0).integers(0, 300, 4000).astype(np.uint16).tofile(tmp_path / "text.bin")
    return tmp_path


def run(monkeypatch, kind, *flags):
    monkeypatch.setattr(sys, "argv", ["run_clm_creature.py", "--config", f"{kind}.yaml", *map(str, flags)])
    assert run_clm_creature.main() == 0


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


@pytest.fixture
def start(place):
    """A creature that was trained on text: its senses are zero, its unused rows were pushed down."""
    config = CreatureConfig(**MODEL)
    torch.manual_seed(0)
    model = MultiModalCreature(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[50257:] -= 3.0
    model.save_pretrained(place / "start")
    return place / "start"


@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_makes_its_own_recordings(place, monkeypatch, capsys, kind):
    run(monkeypatch, kind, "--max_steps", 4)
    output = capsys.readouterr().out
    assert "dry run passed" in output and "a minute of recordings that were made up" in output
    folder = place / "checkpoints" / "dry_run"
    evaluated = checkpoints.read_metrics(folder)[-1]
    sense = {"hear": "audio", "see": "vision", "touch": "touch", "move": "proprioception", "whole": "own_voice"}[kind]
    assert {f"eval_drop_{sense}", f"eval_wrong_{sense}", "eval_loss"} <= evaluated.keys()
    assert f"without {sense}" in output
    assert ("the layers know nothing yet" in output) == (kind in ("move", "whole"))  # their files are for --init_from
    assert (folder / "senses.png").read_bytes().startswith(b"\x89PNG")
    card = (folder / "README.md").read_text()
    assert f"| {sense.replace('_', ' ')} |" in card and "untrained" not in card and "_drop_" not in card
    assert max(entry.get("grad_norm", 0) for entry in checkpoints.read_metrics(folder)) < 20


def test_a_stopped_round_resumes_to_the_same_weights(place, start, monkeypatch, capsys):
    write_made_up_recordings(place / "recordings", "hear")
    flags = ("--init_from", start, "--data", "recordings", "--text_data", "text.bin", "--sense_dropout", 0.3,
             "--max_steps", 12)  # fmt: skip
    run(monkeypatch, "hear", *flags, "--output_dir", "whole")
    output = capsys.readouterr().out
    assert "rows of the token table" in output and "starts from" in output and "are text" in output
    steps, stop = [], CreatureTrainer.training_step

    def stop_at(self, *args, **kwargs):
        steps.append(self.state.global_step)
        self.signals.requested = "SIGTERM" if self.state.global_step == 6 else self.signals.requested
        return stop(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(CreatureTrainer, "training_step", stop_at)
        run(patch, "hear", *flags, "--output_dir", "stopped")
    assert steps == [*range(7)] and "resume with" in capsys.readouterr().out
    run(monkeypatch, "hear", *flags, "--output_dir", "stopped", "--resume")
    first, second = weights(place / "whole"), weights(place / "stopped")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "internal text, backbone at 0.03 times the rates" in output
    for entry in checkpoints.read_metrics(place / "whole"):
        if "eval_loss" in entry:
            assert entry["eval_text_loss"] > 0 and entry["eval_drop_audio"] > 0
    processor = CreatureProcessor.from_pretrained(place / "whole")
    assert processor.config.num_mel_bins == 64
    assert trained_senses(place / "whole") == {"audio"} and trained_senses(start) == set()


def test_what_is_not_trained_stays_as_it_was(place, start, monkeypatch):
    run(monkeypatch, "hear", "--init_from", start, "--max_steps", 3, "--train_senses", "audio", "--train_backbone",
        "false", "--output_dir", "run")  # fmt: skip
    before, after = weights(start), weights(place / "run")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed - {"model.embed_tokens.weight"} == {name for name in before if ".senses.audio." in name}
    used = slice(0, 50257)
    assert torch.equal(before["model.embed_tokens.weight"][used], after["model.embed_tokens.weight"][used])


def test_organs_follow_the_recordings_until_they_are_trained(place, start, monkeypatch, capsys):
    run(monkeypatch, "move", "--init_from", start, "--max_steps", 3, "--output_dir", "run")
    config = CreatureConfig.from_pretrained(place / "run")
    assert (config.num_joints, config.num_blend_shapes, config.body_state_size, config.action_size) == (0, 0, 2, 2)
    assert config.body_state_names == ["shoulder", "elbow"] and config.num_cameras == 2
    assert trained_senses(place / "run") == {"proprioception", "own_action"}
    assert "new in this round: own_action, proprioception, animation" in capsys.readouterr().out
    assert config.loss_weights["animation"] == 1 and not config.loss_weights["internal_text"]
    rows = [{"body_state": {"values": np.ones((20, 3)), "times": np.arange(20) / 30}, "duration": 0.6}]
    with RecordingsWriter(place / "other") as writer:
        for number, row in enumerate(rows * 2):
            about = {"recording_id": str(number), "split_group": str(number), "source": "", "license": ""}
            action = {"action": row["body_state"]}
            writer.add(about | row | action, names={"body_state": list("abc"), "action": list("abc")})
    with pytest.raises(UserError, match="not that of the model"):
        run(monkeypatch, "move", "--init_from", "run", "--data", "other", "--max_steps", 3, "--output_dir", "no")
    assert not (place / "no").exists()


def write_turns(folder, degrees: float) -> None:
    """Recordings of one joint that is turned to and fro around its x axis."""
    times = np.arange(100) / 50
    half = np.radians(degrees) / 2 * np.sin(5 * times)
    turns = {"values": np.stack((np.cos(half), np.sin(half), 0 * half, 0 * half), 1)[:, None], "times": times}
    places = {"values": np.zeros((100, 1, 3)), "times": times}
    with RecordingsWriter(folder) as writer:
        for number, split in enumerate(("train", "train", "validation")):
            about = {"recording_id": str(number), "split_group": str(number), "source": "", "license": ""}
            row = about | {"duration": 2.0, "joint_positions": places, "joint_rotations": turns}
            writer.add(row, split, names={"joints": ["neck"]})


def test_joints_are_commanded_as_far_as_any_recording_turns_them(place, start, monkeypatch):
    def high(folder) -> float:
        config = CreatureConfig.from_pretrained(folder)
        assert np.allclose(config.rotation_low, np.negative(config.rotation_high), atol=0.05)
        assert np.allclose(np.array(config.rotation_high)[:, 1:], 0.0)
        return math.degrees(config.rotation_high[0][0])

    for name, degrees in (("a", 30), ("b", 60), ("c", 10), ("d", 90)):
        write_turns(place / name, degrees)
    run(monkeypatch, "move", "--init_from", start, "--data", "a", "b", "--max_steps", 3, "--output_dir", "one")
    assert high("one") == pytest.approx(60, abs=1)
    run(monkeypatch, "move", "--init_from", "one", "--data", "c", "--max_steps", 3, "--output_dir", "two")
    assert high("two") == pytest.approx(60, abs=1)  # what it has learned is not taken from it
    run(monkeypatch, "move", "--init_from", "two", "--data", "d", "--max_steps", 3, "--output_dir", "three")
    assert high("three") == pytest.approx(90, abs=1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--train_senses", "audio", "smell"), "train_senses names 'smell': the senses are internal_voice, "),
        (("--train_senses", "audio", "touch"), "train_senses names touch, and the recordings feed only internal_voice"),
        (("--train_streams", "animation"), "train_streams names animation, and the recordings feed only internal_text"),
        (("--clip_ticks", 100), "clip_ticks 100 is longer than the creature's context of 64"),
        (("--clip_ticks", 1), "clip_ticks must be at least 2"),
        (("--text_share", 1), "text_share must be at least 0 and below 1"),
        (("--sense_dropout", 1.5), "sense_dropout must be at least 0 and below 1"),
        (("--sense_dropout", "{smell: 0.1}"), "sense_dropout names smell"),
        (("--init_from", "nowhere"), "there is no folder nowhere"),
        (("--init_from", "start", "--hidden_size", 32), "does not fit start"),
        (("--data", "recordings", "text.bin"), "text.bin is no folder of recordings"),
    ],
)
def test_bad_settings_of_a_round_end_in_one_sentence(place, start, monkeypatch, flags, message):
    write_made_up_recordings(place / "recordings", "hear", seconds=12)
    given = () if "--data" in flags else ("--data", "recordings")
    with pytest.raises(UserError) as error:
        run(monkeypatch, "hear", *given, "--max_steps", 2, "--output_dir", "out", *flags)
    assert message in str(error.value)
    assert not (place / "out" / "model.safetensors").exists()


def test_settings_of_recordings_have_no_place_in_a_round_on_text(place, monkeypatch):
    for flags in (("--train_streams", "audio"), ("--text_data", "text.bin"), ("--clip_ticks", "32")):
        monkeypatch.setattr(sys, "argv", ["run_clm_creature.py", "--data", "text.bin", "--max_steps", "2", *flags])
        with pytest.raises(UserError, match="is for recordings"):
            run_clm_creature.main()


def test_a_run_on_text_starts_from_a_creature_too(place, start, monkeypatch):
    (place / "micro.yaml").write_text(yaml.safe_dump(MICRO | {"model": MODEL}))
    run(monkeypatch, "micro", "--data", "text.bin", "--init_from", start, "--max_steps", 2, "--learning_rate", 0,
        "--matrix_learning_rate", 1e-9, "--output_dir", "run")  # fmt: skip
    before, after = weights(start), weights(place / "run")
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_rows_that_no_text_has_used_are_reset_once():
    model = micro_model(random=False, **GPT2, hidden_size=16)
    table = model.model.embed_tokens.weight
    fresh = table.detach().clone()
    assert reset_unused_rows(model, 50257) == 0 and torch.equal(table, fresh)
    with torch.no_grad():
        table[50257:] += 2.0 * torch.ones(16)
    assert reset_unused_rows(model, 50257) == 50304 - 50257
    expected = fresh[:50257].mean(dim=0).expand(47, -1)
    torch.testing.assert_close(table[50257:], expected)
    assert torch.equal(table[:50257], fresh[:50257])
    assert reset_unused_rows(model, 50257) == 0
    with torch.no_grad():
        table[50258:] += 2.0
        table[50257] = -1.0  # a silence that was learned
    assert reset_unused_rows(model, 50257) == 50304 - 50258 and (table[50257] == -1).all()


def test_a_trained_organ_is_not_replaced(tmp_path):
    model = micro_model(**GPT2, num_cameras=1)
    model.save_pretrained(tmp_path / "one_eye")
    config = CreatureConfig(**model.config.to_diff_dict() | {"num_cameras": 2})
    with pytest.raises(UserError, match="has learned vision with another organ"):
        start_model(config, str(tmp_path / "one_eye"), seed=0)
    with torch.no_grad():
        model.model.senses.vision.proj.weight.zero_()
    model.save_pretrained(tmp_path / "blind")
    started, notes = start_model(config, str(tmp_path / "blind"), seed=0)
    assert started.config.num_cameras == 2 and any("new in this round: vision" in note for note in notes)
    before = model.state_dict()
    for name, value in started.state_dict().items():
        assert torch.equal(value, before[name]) or name.startswith("model.senses.vision.layers.0")


def test_every_round_file_reads(monkeypatch):
    for kind in KINDS:
        settings = parse_settings(["--config", str(CONFIGS / "rounds" / f"{kind}.yaml")])
        window = {"sliding_window": 512} if kind == "whole" else {}  # half a clip, so that it learns to live on
        assert settings.on_recordings and settings.row_length == (1024 if window else 512) and settings.model == window


def test_the_script_evaluates_as_the_run_did(place, monkeypatch, run_script):
    write_made_up_recordings(place / "recordings", "move")
    run(monkeypatch, "move", "--data", "recordings", "--max_steps", 4, "--output_dir", "run")
    evaluated = checkpoints.read_metrics(place / "run")[-1]
    code, _, err = run_script(
        "evaluate_recordings", "--checkpoint", "run", "--data", "recordings", "--output", "a.json"
    )
    assert code == 0, err
    found = json.loads((place / "a.json").read_text())
    assert found["clip_ticks"] == 64 and {"drop_own_action", "action_error_repeating"} <= found["metrics"].keys()
    assert all(evaluated[f"eval_{name}"] == pytest.approx(value, rel=1e-4) for name, value in found["metrics"].items())


def test_two_processes_evaluate_as_one_does(place, monkeypatch):
    write_made_up_recordings(place / "recordings", "move")
    flags = ("--data", "recordings", "--max_steps", 2, "--eval_on_start", "true", "--per_device_train_batch_size", 1,
             "--per_device_eval_batch_size", 1)  # fmt: skip
    run(monkeypatch, "move", *flags, "--output_dir", "one")
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", "--quiet"]
    command = [sys.executable, *launcher, run_clm_creature.__file__, "--config", "move.yaml", *map(str, flags)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    subprocess.run([*command, "--output_dir", "two"], check=True, timeout=200, env=environment)
    one, two = (
        next(entry for entry in checkpoints.read_metrics(place / name) if "eval_loss" in entry)
        for name in ("one", "two")
    )
    names = [name for name in one if "drop_" in name or "wrong_" in name]
    assert len(names) >= 6 and all(two[name] == pytest.approx(one[name], rel=1e-4) for name in [*names, "eval_loss"])


def test_text_beside_recordings_is_learned_in_every_round(place, start, monkeypatch, capsys):
    run(monkeypatch, "move", "--init_from", start, "--text_data", "text.bin", "--max_steps", 3)
    output = capsys.readouterr().out
    assert "internal voice, proprioception, internal text, animation" in output and "loss_internal_text" in output
    weights = CreatureConfig.from_pretrained(place / "checkpoints" / "dry_run").loss_weights
    assert weights["internal_text"] == weights["animation"] == 1
