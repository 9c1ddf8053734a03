"""How CreatureTrainer writes and reads checkpoints: complete or not at all, with one sentence where that fails."""

import contextlib
import copy
import json
import os
import shutil
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerState

from creature import checkpoints
from creature.errors import UserError, first_line, is_out_of_memory
from creature.files import explain_write_errors, flush_folder
from creature.loading import check_weights


class CheckpointMixin:
    """The checkpoints of CreatureTrainer; a base before `transformers.Trainer`, whose methods it extends."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the states, but keep this run's settings, which those of the checkpoint would silently replace."""
        settings = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in self.optimizer.param_groups]
        rates = list(getattr(self.lr_scheduler, "base_lrs", []))
        with _explain_read_errors(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not hasattr(self.lr_scheduler, "lr_lambdas"):
            return
        self.lr_scheduler.base_lrs = rates
        step = self.lr_scheduler.last_epoch
        for group, kept, rate, factor in zip(
            self.optimizer.param_groups, settings, rates, self.lr_scheduler.lr_lambdas, strict=True
        ):
            group.update(kept)
            group["lr"] = rate * factor(step)
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Load the weights by `from_pretrained`, which reads safetensors alone and tells every weight that differs."""
        target = self.model if model is None else model
        with _explain_read_errors(resume_from_checkpoint):
            if isinstance(target, FSDPModule):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                return
            check_weights(resume_from_checkpoint)
            loaded, info = type(target).from_pretrained(
                resume_from_checkpoint,
                config=copy.deepcopy(target.config),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
            )
        if names := sorted(str(name) for kind in info.values() for name in kind):
            raise UserError(
                f"{resume_from_checkpoint} is of another configuration ({names[0]} and {len(names) - 1} more differ): "
                "resume it with the configuration it was trained with"
            )
        target.load_state_dict(loaded.state_dict())

    def _save_rng_state(self, output_dir: str) -> None:
        """Save each rank's logging window beside its random state, so that a resumed run logs the same means."""
        super()._save_rng_state(output_dir)
        window = {
            "since": self._globalstep_last_logged,
            "loss": self._tr_loss.item(),
            "stream_losses": self._stream_losses.tolist(),
            "stream_steps": self._stream_steps.tolist(),
        }
        Path(output_dir, f"log_window_{self.args.process_index}.json").write_text(json.dumps(window), encoding="utf-8")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _explain_read_errors(checkpoint):
            super()._load_rng_state(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The Trainer's, which under FSDP 2 would save torch's files as the model's code, and the tied table twice."""
        if not self.is_fsdp_enabled:
            return super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        state_dict = {n: value for n, value in state_dict.items() if n not in model.all_tied_weights_keys}
        sharded = type(model)
        try:
            model.__class__ = self._model_class
            super()._save(output_dir, state_dict)
        finally:
            model.__class__ = sharded

    def _restore_window(self) -> None:
        """Go on with the logging window of the checkpoint; that of another number of processes goes to the first."""
        self._stream_losses.zero_()
        self._stream_steps.zero_()
        paths = sorted(Path(self._resumed_from).glob("log_window_*.json")) if self._resumed_from else []
        if not paths:
            return
        with _explain_read_errors(self._resumed_from):
            same = len(paths) == self.args.world_size
            if same:
                paths = [Path(self._resumed_from, f"log_window_{self.args.process_index}.json")]
            windows = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
            self._globalstep_last_logged = int(windows[0]["since"])
            self._tr_loss.fill_(sum(window["loss"] for window in windows) / len(windows))
            self._stream_steps.copy_(torch.tensor(windows[0]["stream_steps"]))
            if same or self.args.process_index == 0:
                self._stream_losses.copy_(torch.tensor([window["stream_losses"] for window in windows]).sum(0))

    def load_finished(self, checkpoint: Path) -> None:
        """Load weights and state from the checkpoint of the last step, after which nothing is left to train."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = read_state(str(checkpoint))

    def _get_output_dir(self, trial) -> str:
        return str(self._aside) if self._aside is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        """Write the checkpoint into a folder aside, seal it, rename it into place, then delete the oldest ones."""
        args, folder = self.args, Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        self.nan_guard.wait(args.output_dir)
        limit, args.save_total_limit = args.save_total_limit, None
        self._aside = folder / checkpoints.WRITING_FOLDER
        with self.throughput.paused():
            try:
                with explain_write_errors(folder / name, lambda: resume_hint(folder)):
                    self._write_checkpoint(model, trial, folder, name, limit)
            except Exception:
                if args.should_save:
                    shutil.rmtree(self._aside, ignore_errors=True)  # or the disk would stay full
                raise
            finally:
                args.save_total_limit, self._aside = limit, None

    def _write_checkpoint(self, model, trial, folder: Path, name: str, limit: int | None) -> None:
        if self.args.should_save:
            shutil.rmtree(self._aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._keep_best(folder, name)
            if (folder / checkpoints.RUN_FILE).is_file():
                shutil.copyfile(folder / checkpoints.RUN_FILE, self._aside / name / checkpoints.RUN_FILE)
            checkpoints.seal_checkpoint(self._aside / name)
            _put_in_place(self._aside / name, folder / name)
            checkpoints.delete_old_checkpoints(
                folder, limit, self.protected_steps | {self.state.best_global_step or -1}
            )
        self.accelerator.wait_for_everyone()

    def _keep_best(self, folder: Path, name: str) -> None:
        """Correct the path of the best checkpoint, which the Trainer sets to the folder aside."""
        if self.state.best_global_step:
            best = folder / f"checkpoint-{self.state.best_global_step}"
            if best.exists() or best.name == name:
                self.state.best_model_checkpoint = str(best)
                self.state.save_to_json(str(self._aside / name / "trainer_state.json"))


@contextlib.contextmanager
def _explain_read_errors(checkpoint: str | None):
    """Turn any error of a library that reads a damaged checkpoint into a UserError with a remedy."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if checkpoint is None or is_out_of_memory(error):
            raise
        raise UserError(
            f"{checkpoint} cannot be resumed ({first_line(error)}): name another, --resume RUN/checkpoint-N"
        ) from error


def read_state(checkpoint: str) -> TrainerState:
    """The trainer_state.json of a checkpoint; UserError where a field of it is not of its type."""
    with _explain_read_errors(checkpoint):
        state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        examples = TrainerState(train_batch_size=1, best_metric=0.0, best_global_step=0, best_model_checkpoint="")
        for name, example in vars(examples).items():
            value, types = getattr(state, name), (int, float) if isinstance(example, int | float) else type(example)
            no_best_yet = value is None and name.startswith("best_")
            if not (example is None or no_best_yet or isinstance(value, types)):
                raise TypeError(f"{name} in trainer_state.json is {value!r}")
        return state


def refuse_shards(fsdp_plugin) -> None:
    """
    Raise UserError for sharded FSDP checkpoints, whose index torch reads as a pickle, which may run code, and for
    FSDP 1, which flattens the matrices that Muon needs.
    """
    if getattr(fsdp_plugin, "fsdp_version", 2) == 1:
        raise UserError("FSDP 1 flattens the matrices that Muon trains: set fsdp_version: 2, as in configs/accelerate")
    if "SHARDED" in str(getattr(fsdp_plugin, "state_dict_type", "")):
        raise UserError(
            "sharded checkpoints cannot be read back safely, because their index is a pickle: set "
            "fsdp_state_dict_type: FULL_STATE_DICT in accelerate's configuration, as configs/accelerate/fsdp2.yaml does"
        )


def _put_in_place(written: Path, final: Path) -> None:
    if final.exists():  # left by a run that was resumed from an earlier step, or damaged
        final.rename(written.with_name("replaced"))
    os.replace(written, final)
    flush_folder(final.parent)
    shutil.rmtree(written.parent, ignore_errors=True)


def resume_hint(folder: Path) -> str:
    """What to do after a failed save: resume from the newest complete checkpoint, if there is one."""
    kept, _ = checkpoints.newest_complete(folder)
    return f"--resume from {kept.name}, which is intact" if kept else "start again: no checkpoint was complete yet"
