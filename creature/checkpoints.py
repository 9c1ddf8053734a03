"""The folder of a run: complete checkpoints, run.json, metrics.jsonl, and the lock of the process that writes.

A checkpoint is written into a folder aside and renamed when it is complete; `complete.json`, its last file, lists every
other file with its size and sha256. `run.json` describes the run, and a resumed run must match it. Every checkpoint has
a copy of it.
"""

import contextlib
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

from creature.errors import UserError
from creature.files import (
    LOCK_FILE,
    flush_folder,
    format_bytes,
    free_bytes,
    lock_folder,
    replace_file,
    require_writable,
    sha256_file,
)
from creature.settings import Settings

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
COMPLETE_FILE = "complete.json"
WRITING_FOLDER = ".writing"
REPLACED = "replaced"  # checkpoint-N is renamed to replaced-N when a run resumes from an earlier step
# The files without which a run cannot resume, beside the weights, whose file depends on the wrapping (DDP, FSDP).
NEEDED_FILES = ("trainer_state.json", "scheduler.pt")
# Entries of a saved configuration that do not describe the model.
CONFIG_NOISE = {"_name_or_path", "architectures", "auto_map", "dtype", "transformers_version", "use_cache"}


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def step_of(checkpoint: str | os.PathLike) -> int:
    """The step N of a folder checkpoint-N."""
    return int(Path(checkpoint).name.rsplit("-", 1)[1])


def list_checkpoints(run_folder: str | os.PathLike) -> list[Path]:
    """Every checkpoint-N folder of a run, lowest step first, complete or not."""
    return _list_folders(run_folder, "checkpoint")


def _list_folders(run_folder: str | os.PathLike, name: str) -> list[Path]:
    folder = Path(run_folder)
    found = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted((path for path in found if re.fullmatch(rf"{name}-\d{{1,12}}", path.name)), key=step_of)


def seal_checkpoint(folder: str | os.PathLike) -> None:
    """Flush every file of a checkpoint to disk and write complete.json with their sizes and hashes."""
    folder = Path(folder)
    unify_modes(folder)
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE_FILE):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    with replace_file(folder / COMPLETE_FILE, "w") as file:
        json.dump({"step": step_of(folder), "files": files}, file, indent=1)
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        flush_folder(path)


def unify_modes(folder: str | os.PathLike) -> None:
    """Give every file of a saved model the mode of config.json; safetensors writes files for the owner alone."""
    config = Path(folder, "config.json")
    if config.is_file():
        for path in Path(folder).rglob("*"):
            if path.is_file():
                path.chmod(config.stat().st_mode)


def problem_with(checkpoint: str | os.PathLike) -> str | None:
    """Why a checkpoint cannot be resumed, None if it is complete."""
    folder = Path(checkpoint)
    seal = _read_json(folder / COMPLETE_FILE)
    if not isinstance(seal, dict) or not isinstance(seal.get("files"), dict):
        return f"{COMPLETE_FILE} is missing or broken: it was never finished"
    names = set(seal["files"])
    if missing := [name for name in NEEDED_FILES if name not in names]:
        return f"it was saved without {missing[0]}"
    for name, entry in seal["files"].items():
        path = folder / name
        if "\0" in name or not _is_inside(path, folder) or not isinstance(entry, dict):
            return f"{COMPLETE_FILE} is broken"
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry.get("bytes"):
                return f"{name} has {path.stat().st_size:,} bytes instead of {entry.get('bytes')}"
            if sha256_file(path) != entry.get("sha256"):
                return f"{name} has changed since it was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    state = _read_json(folder / "trainer_state.json")
    if not isinstance(state, dict) or state.get("global_step") != step_of(folder):
        return "trainer_state.json is of another step"
    return None


def newest_complete(
    run_folder: str | os.PathLike, at_most: int | None = None
) -> tuple[Path | None, list[tuple[str, str]]]:
    """
    The newest complete checkpoint of a run up to step `at_most`.

    Returns:
        (its folder or None, [(name, reason)] of the newer ones that were skipped)
    """
    skipped = []
    for folder in reversed(list_checkpoints(run_folder)):
        if at_most is not None and step_of(folder) > at_most:
            continue
        problem = problem_with(folder)
        if problem is None:
            return folder, skipped
        skipped.append((folder.name, problem))
    return None, skipped


def delete_old_checkpoints(run_folder: str | os.PathLike, keep: int | None, protected: set[int]) -> None:
    """
    Delete all but the newest `keep` checkpoints and those of the `protected` steps (None or 0: delete nothing).

    Only those with a complete.json count as kept, so that damaged folders never replace the last good one. Folders
    without it, and those that a resume has renamed, are deleted once the run has passed their step.
    """
    if not keep or keep < 0:
        return
    found = list_checkpoints(run_folder)
    sealed = [path for path in found if (path / COMPLETE_FILE).is_file()]
    if not sealed:
        return
    newest = step_of(sealed[-1])
    for folder in [path for path in found if step_of(path) < newest and path not in sealed[-max(keep, 1) :]]:
        if step_of(folder) not in protected or folder not in sealed:
            (folder / COMPLETE_FILE).unlink(missing_ok=True)  # first, so that a half-deleted folder is no checkpoint
            shutil.rmtree(folder, ignore_errors=True)
    for folder in _list_folders(run_folder, REPLACED):
        if step_of(folder) <= newest:
            shutil.rmtree(folder, ignore_errors=True)


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# run.json and metrics.jsonl
# ---------------------------------------------------------------------------------------------------------------------


def write_run(folder: str | os.PathLike, run: dict) -> None:
    """Write run.json; it stays as it was if that fails."""
    with replace_file(Path(folder) / RUN_FILE, "w") as file:
        json.dump(run, file, indent=2, default=str)
        file.write("\n")


def update_run(folder: str | os.PathLike, **changes: Any) -> None:
    """Change some top-level entries of run.json."""
    write_run(folder, (read_run(folder) or {}) | changes)


def read_run(folder: str | os.PathLike) -> dict | None:
    """
    The content of run.json, or if it is lost or damaged of its copy in the newest checkpoint that has one; None if
    there is neither. Raises UserError for a run.json that this program did not write and that has no copy.
    """
    path = Path(folder) / RUN_FILE
    for place in (path, *(checkpoint / RUN_FILE for checkpoint in reversed(list_checkpoints(folder)))):
        if run := _description(place):
            return run
    if path.exists():
        raise UserError(f"{path} is not readable as the description of a run: restore it, or use another --output_dir")
    return None


def has_description(folder: str | os.PathLike) -> bool:
    """Whether run.json is there and whole."""
    return _description(Path(folder) / RUN_FILE) is not None


def _description(path: Path) -> dict | None:
    run = _read_json(path)
    if not isinstance(run, dict):
        return None
    if isinstance(run.get("identity"), dict):
        raise UserError(f"{path} is of an earlier version, which this one does not read: use another --output_dir")
    return run if isinstance(run.get("must_match"), dict) else None


def differences(old: dict, new: dict) -> list[str]:
    """How two descriptions of a run ("must_match" in run.json) differ, one phrase for each difference."""
    found = []
    for key in old.keys() | new.keys():
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            inner = (before.keys() | after.keys()) - CONFIG_NOISE
            found += [
                f"{key}.{name} was {before.get(name)!r} and is now {after.get(name)!r}"
                for name in inner
                if before.get(name) != after.get(name)
            ]
        elif before != after:
            found.append(f"{key} was {before!r} and is now {after!r}")
    return sorted(found)


def read_metrics(folder: str | os.PathLike) -> list[dict]:
    """
    The lines of metrics.jsonl in order, with their numbers; a line that a crash cut short is left out, and so is
    anything that is no number.
    """
    path = Path(folder) / METRICS_FILE
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    entries = []
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int and _is_metric(entry["step"]):
            entries.append({name: value for name, value in entry.items() if _is_metric(value)})
    return entries


def _is_metric(value: Any) -> bool:
    # A loss may be infinite or NaN; larger finite numbers come from no run and overflow in sums and plots.
    return type(value) in (int, float) and not 1e100 < abs(value) < math.inf


def rewind_metrics(folder: str | os.PathLike, step: int) -> list[dict]:
    """
    Delete the metrics after `step`, which a resumed run computes again, and of repeated ones (an evaluation after a
    resume that was killed in turn) all but the last; returns the remaining lines.
    """
    kept = {(entry["step"], "loss" in entry): entry for entry in read_metrics(folder) if entry["step"] <= step}
    entries = list(kept.values())
    with replace_file(Path(folder) / METRICS_FILE, "w") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)
    return entries


# ---------------------------------------------------------------------------------------------------------------------
# The output folder
# ---------------------------------------------------------------------------------------------------------------------


def check_output(settings: Settings) -> None:
    """
    UserError when a run of these settings must not write to its output folder; changes nothing.

    A new run needs an empty folder, a dry run an empty one or one of a dry run, a resumed run one that holds a run.
    """
    folder, dry_run = Path(settings.output_dir), settings.dry_run
    resume, overwrite = bool(settings.resume), settings.overwrite_output_dir
    if folder.exists() and not folder.is_dir():
        raise UserError(f"the output folder {folder} is a file: choose another --output_dir")
    content = [name for name in os.listdir(folder) if name != LOCK_FILE] if folder.is_dir() else []
    run = read_run(folder) if resume or (RUN_FILE in content and not overwrite) else None
    if resume:
        if run is None:
            raise UserError(f"there is no run in {folder} to resume: leave out --resume, or name its --output_dir")
        if run.get("kind") == "dry_run":
            raise UserError(f"{folder} holds a dry run, which is not resumed: leave out --resume")
        return
    if not content:
        return
    if RUN_FILE not in content:
        raise UserError(f"{folder} is not empty and holds no run of this program: choose another --output_dir")
    if overwrite or (dry_run and run.get("kind") == "dry_run"):
        return
    if dry_run:
        raise UserError(f"{folder} holds a real run, which a dry run would replace: choose another --output_dir")
    checkpoints = list_checkpoints(folder)
    if run.get("status") == "finished":
        raise UserError(
            f"{folder} holds a finished run of {run.get('steps')} steps: choose another --output_dir, extend it with "
            "--resume and more --max_steps, or replace it with --overwrite_output_dir"
        )
    if checkpoints:
        raise UserError(
            f"{folder} holds an unfinished run with {checkpoints[-1].name}: continue it with --resume, or replace it "
            "with --overwrite_output_dir"
        )


_locks: dict[tuple[int, int], int] = {}  # the folders that this process holds, until it ends


def lock_output(folder: str | os.PathLike) -> None:
    """
    Create the folder and lock it until this process ends, in whatever way; UserError when another run is writing there.

    On a file system without locks nothing is locked.
    """
    status = os.stat(require_writable(folder))
    key = (status.st_dev, status.st_ino)
    if key in _locks:
        return
    try:
        descriptor = lock_folder(folder)
    except BlockingIOError:
        raise UserError(
            f"another run is writing to {folder} right now: wait for it or stop it, or choose another --output_dir"
        ) from None
    if descriptor is not None:
        _locks[key] = descriptor


def unlock_inherited() -> None:
    """Release the locks in a forked process, which would hold them until it ends, even if the run is dead."""
    for descriptor in _locks.values():
        with contextlib.suppress(OSError):
            os.close(descriptor)  # the run's own descriptor keeps the lock
    _locks.clear()


def clear_output(folder: str | os.PathLike, *, keep: bool) -> None:
    """Lock the folder and delete the run in it, unless `keep` (it is resumed), and the files that killed runs left."""
    folder = Path(folder)
    lock_output(folder)
    if not keep and (folder / RUN_FILE).exists():
        for path in folder.iterdir():
            if path.name not in (RUN_FILE, LOCK_FILE):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (folder / RUN_FILE).unlink()  # last: without it the folder would not be recognised as a run
    shutil.rmtree(folder / WRITING_FOLDER, ignore_errors=True)
    for path in folder.glob(".*.part"):
        path.unlink(missing_ok=True)


def require_space(folder: str | os.PathLike, checkpoint_bytes: int) -> None:
    """UserError when the disk of `folder` cannot take one checkpoint and the final model beside it."""
    needed, free = int(1.4 * checkpoint_bytes), free_bytes(folder)
    if free < needed:
        raise UserError(
            f"the disk of {folder} has {format_bytes(free)} free, and one checkpoint with the final model takes "
            f"{format_bytes(needed)}: free some space, or choose another --output_dir"
        )


def find_checkpoint(folder: str | os.PathLike, resume: str | bool, at_most: int | None) -> tuple[Path, list]:
    """(the checkpoint of --resume: the one named or the newest complete one, [(name, reason)] of skipped ones)."""
    if isinstance(resume, str):
        named = Path(resume)
        if not re.fullmatch(r"checkpoint-\d{1,12}", named.name) or not named.is_dir():
            raise UserError(f"{resume} is not a checkpoint folder: --resume takes RUN/checkpoint-N, or no value")
        if problem := problem_with(named):
            raise UserError(f"{resume} cannot be resumed: {problem}; --resume alone takes the newest that can")
        return named, []
    newest, skipped = newest_complete(folder, at_most)
    if newest is None:
        reasons = f" ({'; '.join(f'{name}: {why}' for name, why in skipped)})" if skipped else ""
        limit, remedy = "", "start afresh with --overwrite_output_dir"
        if at_most is not None:
            limit = f" up to step {max(at_most, 0)}, where the learning rate begins to fall"
            remedy = f"resume with the --max_steps that the run had, or {remedy}"
        raise UserError(f"no complete checkpoint in {folder} to resume{limit}{reasons}: {remedy}")
    return newest, skipped
