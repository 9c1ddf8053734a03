"""Resuming a run: what it brings along, from which checkpoint it goes on, and whether it is still the same run."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from creature import checkpoints
from creature.errors import UserError
from creature.settings import Settings

# How the tokens of a step are spread over processes and micro-batches; their number is apart from it.
DIVISION_OF_A_STEP = ("world_size ", "micro_batch ", "accumulation ")


@dataclass(frozen=True)
class ResumedRun:
    """
    The run to resume: its folder and its run.json, and once it is chosen the checkpoint to go on from, with the seconds
    that were trained up to there.
    """

    folder: Path
    run: dict
    checkpoint: Path | None = None
    seconds_trained: float = 0.0

    @property
    def must_match(self) -> dict:
        """What the run has to agree with to go on exactly as it began."""
        return self.run["must_match"]

    @property
    def step(self) -> int:
        """The step of the checkpoint."""
        return checkpoints.step_of(self.checkpoint)


def find_run(settings: Settings) -> ResumedRun | None:
    """The run that --resume means, None without it; UserError where its run.json lacks what resuming takes."""
    if not settings.resume:
        return None
    folder = Path(settings.output_dir)
    run = checkpoints.read_run(folder) or {"must_match": {}}
    if not checkpoints.has_description(folder):
        print(f"{folder / checkpoints.RUN_FILE} is lost or damaged: its copy in a checkpoint is read", flush=True)
    fixed = run["must_match"]
    whole = all(
        type(fixed.get(name)) is int and fixed[name] >= least
        for name, least in (("max_steps", 0), ("warmup_steps", 0), ("decay_steps", 0), ("batch_warmup_steps", 0),
                            ("micro_batch", 1))
    )  # fmt: skip
    kind = int if fixed.get("schedule") == "warmup_stable_decay" else type(None)
    if not whole or type(run.get("decay_start")) is not kind:
        raise UserError(
            f"{folder / checkpoints.RUN_FILE} does not say how the run was set up: restore it, or use another "
            "--output_dir"
        )
    return ResumedRun(folder, run)


def choose_checkpoint(resumed: ResumedRun, settings: Settings, steps: int, decay_steps: int) -> ResumedRun:
    """
    The same with the checkpoint that a run of `steps` steps, the last `decay_steps` of falling rate, goes on from.

    A run that is extended goes on where its learning rate began to fall, so that the rate does not jump: from there on
    it is the run that a longer one would have been.
    """
    fixed, at_most = resumed.must_match, None
    if fixed["max_steps"] != steps and fixed["schedule"] == "warmup_stable_decay":
        at_most = resumed.run["decay_start"]
        at_most = min(at_most, steps - decay_steps) if steps < fixed["max_steps"] else at_most
    elif fixed["max_steps"] != steps and not settings.accept_changes:
        raise UserError(
            f"max_steps was {fixed['max_steps']} and is now {steps}, and the learning rate of a {fixed['schedule']} "
            "schedule would jump: resume with the old value, or --accept_changes"
        )
    checkpoint, skipped = checkpoints.find_checkpoint(resumed.folder, settings.resume, at_most)
    for name, why in skipped:
        print(f"skipped {name}: {why}", flush=True)
    step = checkpoints.step_of(checkpoint)
    if at_most is not None and step > at_most:
        raise UserError(f"{checkpoint.name} is past step {at_most}, where the rate began to fall: give a bare --resume")
    if step >= steps and resumed.run.get("status") == "finished":
        raise UserError(f"the run has its {steps} steps already: give more --max_steps to extend it")
    times = [entry.get("time", 0.0) for entry in checkpoints.read_metrics(resumed.folder) if entry["step"] <= step]
    return replace(resumed, checkpoint=checkpoint, seconds_trained=max(times, default=0.0))


def check_same_run(resumed: ResumedRun, must_match: dict, accept_changes: bool) -> None:
    """UserError when a resumed run would not go on as it began, with every difference; max_steps may change."""
    before = resumed.must_match
    free = {"max_steps"} if before["max_steps"] == must_match["max_steps"] else {"max_steps", "decay_steps"}
    found = checkpoints.differences(
        *({name: value for name, value in side.items() if name not in free} for side in (before, must_match))
    )
    model = [text for text in found if text.startswith("model.")]
    if model:
        raise UserError(f"the checkpoint is of another configuration: {'; '.join(model)}; resume it with its own")
    if found and not accept_changes:
        remedy = "--accept_changes goes on all the same"
        if all(text.startswith(DIVISION_OF_A_STEP) for text in found):
            remedy = "the batches stay the same, and all else but for rounding and random draws: --accept_changes"
        raise UserError(f"the settings differ from those of the run to resume: {'; '.join(found)}; {remedy}")
    for text in found:
        print(f"accepted: {text}", flush=True)


def set_aside_later(resumed: ResumedRun) -> None:
    """Rename the checkpoints after the one we go on from, so that no later --resume takes one of them."""
    for path in checkpoints.list_checkpoints(resumed.folder):
        if checkpoints.step_of(path) > resumed.step:
            target = path.with_name(path.name.replace("checkpoint", checkpoints.REPLACED))
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)
