"""The trackers have every number that the console shows; their own libraries read them back."""

import contextlib
import io
import json
import re
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from creatures import MICRO

import run_clm_creature
from creature import checkpoints, job
from creature.data import collate_blocks
from creature.errors import UserError

TRACKERS = ("tensorboard", "trackio", "wandb")
WEIGHTS = '{"internal_text": 1.0, "external_text": 0.5, "audio": 0.0, "animation": 0.0}'
# What the console calls otherwise than the log does.
CONSOLE_UNITS = {"tokens/s": "tokens_per_second", "samples/s": "samples_per_second", "MFU": "mfu"}


def collate_two_streams(rows):
    """A batch with a second stream: the external voice says the same tokens."""
    batch = collate_blocks(rows)
    return batch | {"external_text_targets": batch["input_ids"]}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run on two streams with a known peak rate and every tracker that is installed, resumed once to be longer."""
    from transformers.integrations import get_available_reporting_integrations

    trackers = [name for name in TRACKERS if name in get_available_reporting_integrations()]
    folder = tmp_path_factory.mktemp("tracking")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "micro.yaml").write_text(yaml.safe_dump(MICRO))
        ids = np.random.default_rng(0).integers(0, 40, 2000).cumsum() % 300
        ids.astype(np.uint16).tofile(folder / "corpus.bin")
        for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(folder)}.items():
            patch.setenv(name, value)
        patch.setattr(job, "block_collator", lambda *_: collate_two_streams)
        throughput = job.Throughput
        patch.setattr(job, "Throughput", lambda flops, peak: throughput(flops, 1e12))
        command = ["run_clm_creature.py", "--config", "micro.yaml", "--data", "corpus.bin", "--output_dir", "run"]
        command += ["--loss_weights", WEIGHTS, "--eval_steps", "6", "--report_to", *(trackers or ["none"])]
        console, entries = io.StringIO(), []
        with contextlib.redirect_stdout(console):
            for more in (["--max_steps", "11"], ["--max_steps", "15", "--resume"]):
                patch.setattr(sys, "argv", [*command, *more])
                assert run_clm_creature.main() == 0
                entries += checkpoints.read_metrics("run")  # the resumed part forgets what comes after its checkpoint
                if "wandb" in sys.modules:
                    sys.modules["wandb"].finish()  # else it is the end of the process that finishes it
        if "wandb" in sys.modules:
            sys.modules["wandb"].teardown()  # waits for its process, which may still be writing when a run is finished
        yield SimpleNamespace(folder=folder, run=folder / "run", console=console.getvalue(), entries=entries)


@pytest.fixture(scope="module")
def shown(tracked):
    """Every (metric, step) that the console shows, by the names of the log."""
    found = set()
    for line in tracked.console.splitlines():
        if match := re.match(r"step +(\d+)/\d+ \| (.*)", line):
            for part in match[2].split(" | "):
                words = part.split(" ")
                name = next((word for word in words if not re.match(r"[\d.,:e+-]+%?$", word)), part)
                found.add((CONSOLE_UNITS.get(name, name), int(match[1])))
    return {(name, step) for name, step in found if name != "left"}  # the time left is of the moment


@pytest.fixture(scope="module")
def logged(tracked):
    """{(metric, step): value} by metrics.jsonl; of a repeated step, the second time."""
    return {(name, entry["step"]): value for entry in tracked.entries for name, value in entry.items()}


def tracker_name(name):
    return f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"


def check(tracker, shown, logged):
    """tracker: {(metric, step): value}, with the tracker's names."""
    missing = {(name, step) for name, step in shown if (tracker_name(name), step) not in tracker}
    assert not missing
    for name, step in shown:
        value = tracker[tracker_name(name), step]
        assert value == pytest.approx(logged[name, step], rel=1e-5), (name, step)


def test_the_console_shows_all_kinds_of_numbers_and_the_file_has_them(tracked, shown, logged):
    names = {name for name, _ in shown}
    assert names == {
        "loss", "loss_internal_text", "loss_external_text", "grad_norm", "learning_rate", "tokens_per_second",
        "samples_per_second", "mfu", "eval_loss", "eval_perplexity", "eval_bits_per_byte", "eval_accuracy",
    }  # fmt: skip
    assert {step for name, step in shown if name == "loss_external_text"} >= {1, 3, 6, 9, 12, 15}
    assert shown <= logged.keys()
    for name in ("loss.png", "throughput.png"):
        assert (tracked.run / name).read_bytes().startswith(b"\x89PNG")


def test_tensorboard_has_them(tracked, shown, logged):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found, texts = {}, set()
    folders = sorted((tracked.run / "runs").iterdir())
    for folder in folders:
        events = EventAccumulator(str(folder)).Reload()
        texts |= set(events.Tags()["tensors"])
        for name in events.Tags()["scalars"]:
            found |= {(name, event.step): event.value for event in events.Scalars(name)}
    check(found, shown, logged)
    assert {"args/text_summary", "model_config/text_summary"} <= texts


def test_trackio_has_them_in_one_run_that_the_resumed_part_goes_on_with(tracked, shown, logged):
    pytest.importorskip("trackio")
    from trackio import cli

    def ask(*words):
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as answer:
            patch.setattr(sys, "argv", ["trackio", *words, "--project", "huggingface", "--json"])
            cli.main()
        return json.loads(answer.getvalue())

    name = checkpoints.read_run(tracked.run)["run_name"]
    assert ask("list", "runs")["runs"] == [name] and name.startswith("run-")

    def values(metric):
        return {one["step"]: one["value"] for one in ask("get", "metric", "--run", name, "--metric", metric)["values"]}

    steps, found = values("train/global_step"), {}
    for metric in ask("list", "metrics", "--run", name)["metrics"]:
        found |= {(metric, steps[place]): value for place, value in values(metric).items()}
    check(found, shown, logged)


def test_wandb_has_them(tracked, shown, logged):
    pytest.importorskip("wandb")
    files = sorted(tracked.folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    found = {}
    for file in files:
        for record in wandb_records(file):
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            found |= {(name, row.get("train/global_step")): value for name, value in row.items()}
    check(found, shown, logged)


def wandb_records(path):
    """The records of a .wandb file, which `wandb sync` would send: a LevelDB log of W&B's own messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (rest := 32768 - position % 32768) < 7:
            position += rest
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


# ---------------------------------------------------------------------------------------------------------------------
# Trackers that do not work
# ---------------------------------------------------------------------------------------------------------------------


def launch(monkeypatch, folder, *flags):
    monkeypatch.chdir(folder)
    (folder / "micro.yaml").write_text(yaml.safe_dump(MICRO))
    np.arange(500, dtype=np.uint16).tofile(folder / "corpus.bin")
    command = ["run_clm_creature.py", "--config", "micro.yaml", "--data", "corpus.bin", "--output_dir", "out"]
    monkeypatch.setattr(sys, "argv", [*command, "--max_steps", "2", *flags])
    run_clm_creature.main()


def test_a_tracker_that_is_unknown_or_not_installed_is_refused_before_anything_is_done(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--report_to tensorbord does not work here .*tensorboard.*metrics.jsonl"):
        launch(monkeypatch, tmp_path, "--report_to", "tensorbord")
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    with pytest.raises(UserError, match="requires wandb to be installed"):
        launch(monkeypatch, tmp_path, "--report_to", "wandb")
    assert not Path("out").exists()


def test_a_tracker_that_fails_is_reported_in_one_sentence(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(*args, **kwargs):
        raise wandb.errors.UsageError("No API key configured.\nMore about it.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"wandb failed \(No API key configured\.\): .* leave out --report_to wandb"):
        launch(monkeypatch, tmp_path, "--report_to", "wandb")


def test_the_name_of_a_run_is_the_users_where_one_is_given(tmp_path, monkeypatch):
    launch(monkeypatch, tmp_path, "--run_name", "mine", "--report_to", "none")
    assert checkpoints.read_run(tmp_path / "out")["run_name"] == "mine"
