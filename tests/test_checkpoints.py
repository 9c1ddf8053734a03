"""The folder of a run: only whole checkpoints count, and nothing of another run is ever overwritten."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from creature import checkpoints
from creature.errors import UserError
from creature.resume import find_run
from creature.settings import Settings


def make_checkpoint(folder, step, seal=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (path / name).write_bytes(name.encode() * 20)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if seal:
        checkpoints.seal_checkpoint(path)
    return path


def make_run(folder, **entries):
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints.write_run(folder, {"kind": "run", "status": "started", "must_match": {}} | entries)


def truncate(path):
    file = path / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-5])


def flip_a_bit(path):
    data = bytearray((path / "model.safetensors").read_bytes())
    data[1000] ^= 4
    (path / "model.safetensors").write_bytes(data)


def lose_a_file(path):
    (path / "trainer_state.json").unlink()


def break_the_seal(path):
    (path / checkpoints.COMPLETE_FILE).write_text('{"step": 3, "fi')


def point_outside(path):
    (path / checkpoints.COMPLETE_FILE).write_text(
        json.dumps({"files": {name: {} for name in ("../../x", *checkpoints.NEEDED_FILES)}})
    )


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose_a_file, break_the_seal, point_outside])
def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path, damage):
    good, newer = make_checkpoint(tmp_path, 9), make_checkpoint(tmp_path, 10)
    make_checkpoint(tmp_path, 2)
    damage(newer)
    found, skipped = checkpoints.newest_complete(tmp_path)
    assert found == good
    assert [name for name, _ in skipped] == ["checkpoint-10"] and skipped[0][1]


def test_without_a_whole_checkpoint_there_is_nothing_to_resume(tmp_path):
    make_checkpoint(tmp_path, 5, seal=False)
    assert checkpoints.newest_complete(tmp_path)[0] is None
    with pytest.raises(UserError, match="checkpoint-5: complete.json is missing"):
        checkpoints.find_checkpoint(tmp_path, True, None)
    with pytest.raises(UserError, match="up to step 3, where the learning rate begins to fall: resume with"):
        checkpoints.find_checkpoint(tmp_path, True, 3)
    with pytest.raises(UserError, match="cannot be resumed"):
        checkpoints.find_checkpoint(tmp_path, str(tmp_path / "checkpoint-5"), None)
    with pytest.raises(UserError, match="not a checkpoint folder"):
        checkpoints.find_checkpoint(tmp_path, str(tmp_path), None)


def test_rotation_keeps_the_newest_and_the_protected_and_never_counts_broken_ones(tmp_path):
    for step in (10, 20, 30, 40):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 50, seal=False)
    checkpoints.delete_old_checkpoints(tmp_path, 1, {20})
    assert {checkpoints.step_of(path) for path in checkpoints.list_checkpoints(tmp_path)} == {20, 40, 50}
    checkpoints.delete_old_checkpoints(tmp_path, None, set())
    assert len(checkpoints.list_checkpoints(tmp_path)) == 3


def test_rotation_clears_what_kills_left_half_deleted_and_what_a_resume_set_aside(tmp_path):
    for step in (10, 20, 30):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-10" / checkpoints.COMPLETE_FILE).unlink()
    for step in (25, 30, 40):
        (tmp_path / f"replaced-{step}").mkdir()
    checkpoints.delete_old_checkpoints(tmp_path, None, set())
    assert len(list(tmp_path.iterdir())) == 6  # whoever keeps all keeps these too
    checkpoints.delete_old_checkpoints(tmp_path, 3, {10})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-20", "checkpoint-30", "replaced-40"]


def test_a_file_that_cannot_be_read_is_a_reason_to_skip(tmp_path, monkeypatch):
    make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    real = checkpoints.sha256_file

    def bad_sector(path):
        if path.parent.name == "checkpoint-2":
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(checkpoints, "sha256_file", bad_sector)
    found, skipped = checkpoints.newest_complete(tmp_path)
    assert found.name == "checkpoint-1" and "cannot be read (Input/output error)" in skipped[0][1]


def test_differences_are_spelled_out_and_noise_is_not():
    old = {"world_size": 1, "model": {"hidden_size": 32, "transformers_version": "5.17"}, "seed": 1}
    new = {"world_size": 2, "model": {"hidden_size": 64, "transformers_version": "5.23"}, "seed": 1}
    assert checkpoints.differences(old, new) == [
        "model.hidden_size was 32 and is now 64",
        "world_size was 1 and is now 2",
    ]


def test_metrics_are_rewound_and_a_cut_line_is_left_out(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    evaluated = json.dumps({"step": 2, "eval_loss": 2.0})
    lines[2:2] = [evaluated, evaluated]  # made up by a resumed run that was killed before it had saved
    (tmp_path / checkpoints.METRICS_FILE).write_text("\n".join(lines) + '\n{"step": 4, "lo')
    assert [entry["step"] for entry in checkpoints.read_metrics(tmp_path)] == [1, 2, 2, 2, 3]
    checkpoints.rewind_metrics(tmp_path, 2)
    assert (tmp_path / checkpoints.METRICS_FILE).read_text() == "\n".join(lines[:3]) + "\n"


def ask(folder, dry_run=False, resume=False, overwrite=False):
    training = {"output_dir": str(folder)}
    checkpoints.check_output(
        Settings(training=training, dry_run=dry_run, resume=resume, overwrite_output_dir=overwrite)
    )


def test_the_output_folder_of_another_run_is_refused_with_the_way_on(tmp_path):
    run = tmp_path / "run"
    ask(run)
    with pytest.raises(UserError, match="no run in .* to resume"):
        ask(run, resume=True)
    make_run(run)
    ask(run)  # it never wrote a checkpoint: nothing is lost
    make_checkpoint(run, 7)
    with pytest.raises(UserError, match="unfinished run with checkpoint-7.*--resume.*--overwrite_output_dir"):
        ask(run)
    ask(run, overwrite=True)
    ask(run, resume=True)
    make_run(run, status="finished", steps=7)
    with pytest.raises(UserError, match="finished run of 7 steps.*--resume"):
        ask(run)
    with pytest.raises(UserError, match="real run"):
        ask(run, dry_run=True)
    make_run(run, kind="dry_run")
    ask(run, dry_run=True)
    with pytest.raises(UserError, match="dry run, which is not resumed"):
        ask(run, resume=True)


def test_a_folder_that_is_not_a_run_is_never_taken(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds no run"):
            ask(tmp_path, overwrite=overwrite)
    with pytest.raises(UserError, match="is a file"):
        ask(tmp_path / "thesis.txt")
    make_run(tmp_path / "broken")
    (tmp_path / "broken" / "run.json").write_text("[1, 2")
    with pytest.raises(UserError, match="not readable"):
        ask(tmp_path / "broken")


def test_a_lost_run_json_is_found_again_in_the_newest_checkpoint_with_a_copy(tmp_path, capsys):
    settings = Settings(training={"output_dir": str(tmp_path)}, resume=True)
    for step in (3, 5, 7):
        make_checkpoint(tmp_path, step)
        fixed = {"max_steps": 10, "warmup_steps": 1, "decay_steps": 4, "batch_warmup_steps": 0, "micro_batch": step}
        run = {"must_match": fixed}
        (tmp_path / f"checkpoint-{step}" / "run.json").write_text(json.dumps(run | {"decay_start": None}))
    (tmp_path / "checkpoint-7" / "run.json").write_text('{"must_match": ')
    for damage in ("", '{"must_match": {"micro_b', "[]"):
        (tmp_path / "run.json").write_text(damage)
        ask(tmp_path, resume=True)
        assert find_run(settings).must_match["micro_batch"] == 5
    (tmp_path / "run.json").unlink()
    ask(tmp_path, resume=True)
    assert find_run(settings).must_match["micro_batch"] == 5
    assert "lost or damaged" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds no run"):
        ask(tmp_path, overwrite=True)  # only what is surely a run is deleted


def test_claiming_clears_an_old_run_and_keeps_a_resumed_one(tmp_path):
    make_run(tmp_path)
    make_checkpoint(tmp_path, 3)
    (tmp_path / checkpoints.WRITING_FOLDER).mkdir()
    (tmp_path / ".run.json.0a1b.part").touch()
    checkpoints.clear_output(tmp_path, keep=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "run.json"]
    checkpoints.clear_output(tmp_path, keep=False)
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def held_by_another_process(folder):
    """A folder that another process writes a run to, until the end of the block."""
    code = "import sys, creature.checkpoints as c; c.lock_output(sys.argv[1]); print('held', flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(checkpoints.__file__).parent.parent)},
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        yield
    finally:
        holder.kill()
        holder.communicate()


def test_a_folder_that_another_process_writes_to_is_left_alone(tmp_path):
    (tmp_path / "run.json").write_text('{"must_match": {}}')
    with held_by_another_process(tmp_path):
        for keep in (True, False):
            with pytest.raises(UserError, match="another run is writing"):
                checkpoints.clear_output(tmp_path, keep=keep)
        assert (tmp_path / "run.json").exists()
    checkpoints.clear_output(tmp_path, keep=True)
    checkpoints.clear_output(tmp_path, keep=False)  # a process never locks itself out


def test_a_run_that_came_and_went_after_the_folder_was_checked_is_noticed(tmp_path):
    from creature.job import open_folder
    from creature.resume import ResumedRun

    args = SimpleNamespace(main_process_first=lambda desc: contextlib.nullcontext(), process_index=0)
    new = {"kind": "run", "must_match": {}, "parameters": {"total": 1, "trainable": 1}}
    make_run(tmp_path)
    make_checkpoint(tmp_path, 3)
    resumed = ResumedRun(tmp_path, checkpoints.read_run(tmp_path), tmp_path / "checkpoint-3")
    make_run(tmp_path, status="finished")
    with pytest.raises(UserError, match="holds a finished run"):
        open_folder(Settings(training={"output_dir": str(tmp_path)}), args, new, None)
    settings = Settings(training={"output_dir": str(tmp_path)}, resume=True)
    with pytest.raises(UserError, match="another run has been in"):
        open_folder(settings, args, new, resumed)
    assert checkpoints.read_run(tmp_path)["status"] == "finished"
    open_folder(settings, args, new, replace(resumed, run=checkpoints.read_run(tmp_path)))
    assert checkpoints.read_run(tmp_path) == new


def test_a_run_of_an_earlier_version_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "run.json").write_text('{"kind": "run", "identity": {"max_steps": 10}}')
    for resume in (False, True):
        with pytest.raises(UserError, match="of an earlier version, which this one does not read: use another"):
            ask(tmp_path, resume=resume)
    ask(tmp_path, overwrite=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="locks are inherited by fork only")
def test_a_worker_that_outlives_its_run_does_not_hold_the_folder(tmp_path):
    """A data loader's worker is a fork; the run is killed, the worker not yet."""
    code = (
        "import os, sys, time, creature.checkpoints as c\nc.lock_output(sys.argv[1])\n"
        "if os.fork() == 0:\n    c.unlock_inherited()\n    print('free', flush=True)\n    time.sleep(600)\n"
        "time.sleep(600)\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(Path(checkpoints.__file__).parent.parent)},
    )  # fmt: skip
    try:
        assert run.stdout.readline() == "free\n"
        with pytest.raises(UserError, match="another run is writing"):
            checkpoints.lock_output(tmp_path)
        run.kill()
        run.wait()
        checkpoints.lock_output(tmp_path)
    finally:
        os.killpg(run.pid, 9)


def test_a_disk_too_small_and_a_folder_that_cannot_be_written_are_refused_early(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "free_bytes", lambda folder: 10**9)
    checkpoints.require_space(tmp_path, 500_000_000)
    with pytest.raises(UserError, match="1.0 GB free.*1.4 GB"):
        checkpoints.require_space(tmp_path, 10**9)
    monkeypatch.setattr(checkpoints, "free_bytes", lambda folder: 4 * 10**6)
    with pytest.raises(UserError, match="4.0 MB free.*7.0 MB"):
        checkpoints.require_space(tmp_path, 5 * 10**6)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        checkpoints.clear_output(tmp_path / "file" / "run", keep=False)


def test_sealing_covers_every_file_also_in_folders(tmp_path):
    path = make_checkpoint(tmp_path, 1, seal=False)
    (path / "sharded").mkdir()
    (path / "sharded" / "part-0").write_bytes(b"abc")
    checkpoints.seal_checkpoint(path)
    assert checkpoints.problem_with(path) is None
    shutil.rmtree(path / "sharded")
    assert "sharded/part-0 is missing" in checkpoints.problem_with(path)


def test_others_can_read_what_the_owner_can(tmp_path):
    folder = make_checkpoint(tmp_path, 3, seal=False)
    (folder / "config.json").write_text("{}")
    (folder / "config.json").chmod(0o644)
    (folder / "model.safetensors").chmod(0o600)
    checkpoints.seal_checkpoint(folder)
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir() if path.name != "complete.json"}
    assert len(modes) == 1 and (os.name == "nt" or modes == {0o644})
