"""CreatureTrainer: the Hugging Face Trainer with per-stream losses, true numbers and whole checkpoints (saving.py)."""

import contextlib
import dataclasses
import functools
import os
import signal
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SchedulerType

from creature import checkpoints
from creature.callbacks import NanGuard, StopEvaluation, StopSignals, Throughput
from creature.compiling import pad_batch, with_eager_fallback
from creature.data_parallel import average_gradients, share_weights
from creature.errors import UserError, first_line
from creature.files import replace_file
from creature.metrics import text_metrics
from creature.optimizer import MuonAdamW, parameter_groups, table_ids
from creature.saving import CheckpointMixin, read_state, refuse_shards
from streams_creature import STREAMS, count_targets

_DATA_PARALLEL = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
_NOT_SHARDED = (DistributedType.NO, *_DATA_PARALLEL)
FURTHER_TARGETS = (0.5, 0.25)  # weights of the tokens 2 and 3 ticks ahead when the batch warm-up begins
LOG_HISTORY = 1000  # logs that stay in memory and in every trainer_state.json; metrics.jsonl has all of them


class CreatureTrainer(CheckpointMixin, Trainer):
    """
    A Trainer for MultiModalCreature.

    What differs from `transformers.Trainer`:
        - every stream is divided by its own count of targets over the whole accumulated batch and all ranks, and logged
          as `loss_<stream>`;
        - evaluation is token-weighted and gives loss, perplexity, bits per byte and accuracy without holding logits;
        - Muon trains the matrices, Adam the tables and the rest, and only the matrices decay;
        - in the first `batch_warmup_steps` steps, the weights are updated after each half of the batch, and text is
          also learned further ahead, less with every step;
        - several processes add up their gradients without DistributedDataParallel (data_parallel.py);
        - warmup_stable_decay needs no keyword arguments;
        - tokens/s, samples/s and MFU are of the last logging window and exclude evaluation, saving and compiling;
        - a checkpoint appears whole or not at all, and the run stops before a NaN reaches the weights.
    """

    def __init__(
        self,
        *args,
        byte_lengths: np.ndarray | None = None,
        throughput: Throughput | None = None,
        signals: StopSignals | None = None,
        backbone_rate: float = 1.0,
        other_rows: Sequence[int] = (),
        **kwargs,
    ):
        """
        byte_lengths [vocab_size]: bytes each id decodes to, for bits per byte; without it every id counts as one.
        backbone_rate, other_rows: see `creature.optimizer.parameter_groups`.
        """
        # A batch and its half are compiled as two static shapes, not as one dynamic shape.
        os.environ.setdefault("ACCELERATE_DYNAMO_USE_DYNAMIC", "false")
        model = kwargs.get("model") or args[0]
        use_cache = model.config.use_cache
        self._model_class = type(model)
        self.backbone_rate, self.other_rows = backbone_rate, other_rows
        super().__init__(*args, **kwargs)
        model.config.use_cache = use_cache  # the Trainer turns it off, and that would land in every checkpoint
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        refuse_shards(plugin)
        if getattr(plugin, "mixed_precision_policy", None) is not None:
            # accelerate would have the losses rounded to bfloat16 on their way out, and gradients added up in it.
            plugin.mixed_precision_policy = dataclasses.replace(
                plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
            )
        self._data_parallel = self.accelerator.distributed_type in _DATA_PARALLEL
        if self._data_parallel:  # what accelerate does for an evaluation is all but to wrap the model
            self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.throughput = throughput or Throughput()
        self.signals = signals or StopSignals()
        self.nan_guard = NanGuard(self._keep_batch)
        # input_ids of two steps: of a step on a GPU, the guard knows in the next one.
        self._recent: deque[tuple[int, list[torch.Tensor]]] = deque(maxlen=2)
        begin = _TrainBegin(self._share_weights, self._restore_window, self._resume_evaluation)
        for callback in (self.throughput, self.signals, begin):
            self.add_callback(callback)
        self.compute_metrics = self.compute_metrics or self._text_metrics
        self._byte_lengths = np.ones(model.config.vocab_size, np.int64) if byte_lengths is None else byte_lengths
        self._stream_losses = torch.zeros(len(STREAMS), device=self.args.device)
        self._stream_steps = torch.zeros(len(STREAMS), device=self.args.device)
        self._compiled_shapes: set[tuple] = set()
        self._loss_share = 1.0  # of the part of a batch under way, in what is logged of the step
        self._further_targets = torch.tensor(FURTHER_TARGETS, device=self.args.device)
        self._of_halves: dict[str, torch.Tensor] = {}  # arguments of the model beside a half batch
        self._micro_batch = self._micro_batches = 0
        self._aside: Path | None = None
        self._resumed_from: str | None = None
        self.protected_steps: set[int] = set()

    # ---- Loss ----

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """float32 [7]: what the streams' losses are divided by, over all micro-batches and ranks of the step."""
        if not batch_samples:
            return None
        shapes = [batch_shape(batch) for batch in batch_samples]
        samples = sum(rows for rows, _ in shapes) * self.args.world_size
        ticks = sum(rows * length for rows, length in shapes) * self.args.world_size
        self.throughput.count(ticks, samples)
        self.state.num_input_tokens_seen += ticks
        self._recent.append((self.state.global_step + 1, [batch.get("input_ids") for batch in batch_samples]))
        self._micro_batch, self._micro_batches = 0, len(batch_samples)
        counts = torch.stack([count_targets(self.model.config, batch) for batch in batch_samples]).sum(0).to(device)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            counts = self.accelerator.gather(counts[None]).sum(0)
        self._stream_steps += torch.stack((*counts[:3], counts[3:].sum())) > 0
        return counts

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The weighted sum of the streams' losses; each stream's loss is kept on the device until the next log."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        for name, value in (outputs["losses"] or {}).items():
            self._stream_losses[STREAMS.index(name)] += value * self._loss_share
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None, **kwargs) -> torch.Tensor:
        """The Trainer's step; during the batch warm-up, the weights are updated after each half of the batch."""
        self._micro_batch += 1
        if num_items_in_batch is None or not self._in_batch_warmup(inputs):
            rows = self.args.per_device_train_batch_size
            loss = self._forward_and_backward(model, inputs, rows, num_items_in_batch, **kwargs)
        else:
            loss = self._training_step_in_halves(model, inputs, num_items_in_batch, **kwargs)
        if self.accelerator.sync_gradients:
            self._average_gradients()
        return loss

    def _training_step_in_halves(self, model, inputs, num_items_in_batch, **kwargs) -> torch.Tensor:
        # A half is divided by half the targets of the batch, and is half of the loss that is logged.
        rows = self.args.per_device_train_batch_size
        self._loss_share, items = 0.5, num_items_in_batch / 2
        left = 1 - self.state.global_step / batch_warmup_steps(self.args, self.state.max_steps)
        self._of_halves = {"further_targets": self._further_targets * left}
        try:
            if self._micro_batches > 1:
                loss = self._forward_and_backward(model, inputs, rows, items, **kwargs)
                if self._micro_batch == self._micro_batches // 2:
                    self._update(model)
                return loss / 2
            first, second = split_rows(inputs)
            rows -= rows // 2
            # Halved at once: a CUDA graph writes the loss of the second half where that of the first half is.
            loss = self._forward_and_backward(model, first, rows, items, **kwargs) / 2
            self._update(model)
            return loss + self._forward_and_backward(model, second, rows, items, **kwargs) / 2
        finally:
            self._loss_share, self._of_halves = 1.0, {}

    def _in_batch_warmup(self, inputs: dict) -> bool:
        """Whether this step has an update after each half: early in the run, where the batch can be divided."""
        if self.state.global_step >= batch_warmup_steps(self.args, self.state.max_steps):
            return False
        if self.accelerator.scaler is not None:  # it expects one update a step
            return False
        if self.accelerator.distributed_type not in _NOT_SHARDED:
            return False
        return self._micro_batches > 1 or batch_shape(inputs)[0] > 1

    def _average_gradients(self) -> None:
        """Give all processes the mean of their gradients; FSDP does that by itself."""
        if self._data_parallel:
            average_gradients(self._trained_parameters())

    def _trained_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _share_weights(self) -> None:
        if self._data_parallel:
            share_weights(self.model)

    def _update(self, model) -> None:
        """Update the weights in the middle of a step."""
        self._average_gradients()
        self._get_grad_norm(model, self._clip_grad_norm(model) if self.args.max_grad_norm else None)
        # Not accelerate's wrapper, which skips all updates but the one after the last micro-batch.
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        optimizer.step()
        optimizer.zero_grad()

    def _forward_and_backward(self, model, inputs, rows: int, *args, **kwargs) -> torch.Tensor:
        """
        The Trainer's step; where torch.compile fails in the first one, that is undone and repeated eagerly.

        rows: of a full batch, to which a shorter one is padded for a compiled model.
        """
        inputs = {**(pad_batch(inputs, rows) if self.args.torch_compile else inputs), **self._of_halves}
        if not self.args.torch_compile:
            return super().training_step(model, inputs, *args, **kwargs)
        undo = None
        shape = tuple((name, value.shape) for name, value in inputs.items())
        fresh = contextlib.nullcontext()
        if self._compiled_shapes and shape not in self._compiled_shapes:
            # Compiling it must not count in tokens/s; the steps before it must.
            if self.args.device.type == "cuda":
                torch.cuda.synchronize(self.args.device)
            fresh = self.throughput.paused()
        if not self._compiled_shapes:
            states, stream_losses = _random_states(self.args.device), self._stream_losses.clone()

            def undo() -> None:
                model.zero_grad()
                self._stream_losses.copy_(stream_losses)
                _set_random_states(self.args.device, states)

        with fresh:
            loss = with_eager_fallback(super().training_step, model, inputs, *args, undo=undo, **kwargs)
        self._compiled_shapes.add(shape)
        return loss

    def _stream_log(self) -> dict[str, float]:
        """The mean loss of every stream that had targets, over the steps of the window and all ranks."""
        sums = self._stream_losses
        if self.args.world_size > 1:
            sums = self.accelerator.gather(sums[None]).sum(0)
            sums = sums if self.args.average_tokens_across_devices else sums / self.args.world_size
        weights = self.model_config.loss_weights
        logs = {
            f"loss_{name}": total / steps
            for name, total, steps in zip(STREAMS, sums.tolist(), self._stream_steps.tolist(), strict=True)
            if steps and weights[name]
        }
        self._stream_losses.zero_()
        self._stream_steps.zero_()
        return logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._stream_log() | self.throughput.window()
            logs["tokens"] = self.state.num_input_tokens_seen
            if self.args.device.type == "cuda":
                logs["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.args.device)
        super().log(logs, start_time)
        del self.state.log_history[:-LOG_HISTORY]

    def floating_point_ops(self, inputs: dict) -> int:
        """FLOPs of a micro-batch as the run counts them; the Trainer would look through all parameters each time."""
        if self.throughput.flops_per_token is None:
            return super().floating_point_ops(inputs)
        rows, ticks = batch_shape(inputs)
        return int(self.throughput.flops_per_token * rows * ticks)

    def get_train_dataloader(self):
        return _shield_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, *args, **kwargs):
        return _shield_workers(super().get_eval_dataloader(*args, **kwargs))

    @property
    def model_config(self):
        return self.accelerator.unwrap_model(self.model).config

    # ---- Optimizer and schedule ----

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Muon with AdamW, or what `--optim` names where `matrix_learning_rate` is 0."""
        args = self.args
        if self.optimizer is not None or not args.matrix_learning_rate:
            return super().create_optimizer(model)
        groups = parameter_groups(
            self.model if model is None else model,
            args.learning_rate,
            args.matrix_learning_rate,
            args.weight_decay,
            (args.adam_beta1, args.adam_beta2),
            args.adam_epsilon,
            self.backbone_rate,
            self.other_rows,
        )
        # Every group has a rate of its own; schedules with a smallest rate set it in proportion to this one.
        self.optimizer = MuonAdamW(groups, args.learning_rate, compiled=args.torch_compile)
        return self.optimizer

    def get_decay_parameter_names(self, model) -> list[str]:
        """The matrices. Tables, norms and scales are not pulled to zero."""
        tables = table_ids(model)
        return [name for name, p in model.named_parameters() if p.ndim >= 2 and id(p) not in tables]

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        self.args.lr_scheduler_kwargs = schedule_arguments(self.args, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def _clip_grad_norm(self, model) -> torch.Tensor:
        """The Trainer's; of plain gradients only what is trained, for to go through all modules takes milliseconds."""
        if self.accelerator.scaler is not None or self.accelerator.distributed_type not in _NOT_SHARDED:
            return super()._clip_grad_norm(model)
        return torch.nn.utils.clip_grad_norm_(self._trained_parameters(), self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(grad_norm, DTensor):  # under FSDP 2 every process knows but its part
            grad_norm = grad_norm.full_tensor()
        # fp16 overflows by design: its gradient scaler skips such a step. Then only the loss must be finite.
        value = self._tr_loss if self.accelerator.scaler is not None else torch.as_tensor(grad_norm)
        self.nan_guard.check(value, self.state.global_step + 1, self.optimizer, self.args.output_dir)
        return grad_norm

    def _keep_batch(self, step: int) -> str:
        """Write the ids of this process's rows of a step, in their order, into the folder of the run."""
        batches = dict(self._recent).get(step, [])
        rows = [row.cpu().numpy() for batch in batches if batch is not None for row in batch]
        if not rows or len({len(row) for row in rows}) > 1:
            return ""
        path = Path(self.args.output_dir, f"stopped_at_step_{step}_process_{self.args.process_index}.npy")
        try:
            with replace_file(path) as file:
                np.save(file, np.stack(rows))
        except (OSError, UserError):  # what stopped the run is the news, not a full disk
            return ""
        return f" (its batch of {len(rows)} rows, in {len(batches)} micro-batches, is kept in {path})"

    # ---- Evaluation ----

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """The Trainer's, but the training draws the same random numbers whether it takes place or not."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        prepared = len(self.accelerator._dataloaders)  # accelerate would keep those of all evaluations
        # A DataLoader draws a seed for its workers, also where it has none.
        with self.throughput.paused(), torch.random.fork_rng(devices):
            try:
                return super().evaluate(*args, **kwargs)
            finally:
                del self.accelerator._dataloaders[prepared:]

    def _evaluate(self, *args, **kwargs) -> dict[str, float]:
        """The Trainer's, while it trains; without metrics where a signal cuts it short."""
        try:
            return super()._evaluate(*args, **kwargs)
        except StopEvaluation:
            self.control.should_evaluate = False
            self.control.should_save = self.control.should_training_stop = True
            return {}

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        return not metrics or super()._determine_best_metric(metrics=metrics, trial=trial)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(None, (token_losses [B, T-1], predictions [B, T-1]), labels [B, T]); the logits live in chunks only."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, return_logits=False)
        return None, (outputs.token_losses.float(), outputs.predictions.to(torch.int32)), inputs["labels"]

    def _text_metrics(self, prediction) -> dict[str, float]:
        token_losses, predictions = prediction.predictions
        return text_metrics(token_losses, predictions, prediction.label_ids, self._byte_lengths)

    # ---- Resuming, and the Hub ----

    def make_up_evaluation(self) -> None:
        """Evaluate where the run was stopped at a step at which it would have evaluated, had there been time."""
        args, state = self.args, self.state
        by_steps, last = args.eval_strategy == IntervalStrategy.STEPS, state.global_step >= state.max_steps
        now, every = (state.global_step, state.eval_steps) if by_steps else (state.epoch or 0, 1)
        due = args.eval_strategy != IntervalStrategy.NO and now > 0 and now >= args.eval_delay
        if not due or (now % every and not last):
            return
        if not any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history):
            self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)

    def _resume_evaluation(self) -> None:
        if self._resumed_from:
            self.make_up_evaluation()

    def train(self, resume_from_checkpoint=None, **kwargs):
        self._resumed_from = resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else None
        if self._resumed_from:
            read_state(self._resumed_from)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def init_hf_repo(self, *args, **kwargs) -> None:
        """Make the repository of --push_to_hub ready; UserError before the training where that cannot be."""
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:  # of many types: network, rights, a name that cannot be one
            raise UserError(
                f"--push_to_hub finds no way to a repository ({first_line(error)}): log in with `hf auth login` and "
                "look at --hub_model_id, or leave it out and push the finished folder later (docs/hub.md)"
            ) from error


def batch_shape(batch: dict[str, torch.Tensor]) -> tuple[int, int]:
    """(rows, ticks) of a batch, whichever senses are in it: all but the boundaries of documents is [B, T, ...]."""
    return next(value.shape[:2] for name, value in batch.items() if name != "cu_seq_lens_q")


def split_rows(inputs: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The two halves of the rows of a batch; the second is longer where the number is odd."""
    rows, ticks = batch_shape(inputs)
    rows, halves = rows // 2, [{}, {}]
    for name, tensor in inputs.items():
        if name == "cu_seq_lens_q":  # positions in all rows joined; the documents of the other half become empty
            end = rows * ticks
            halves[0][name], halves[1][name] = tensor.clamp(max=end), (tensor - end).clamp(min=0)
        else:
            halves[0][name], halves[1][name] = tensor[:rows], tensor[rows:]
    return halves


def _shield_workers(loader):
    """Let the worker processes of a DataLoader ignore the stop signals, because the current step still needs them."""
    inner = getattr(loader, "base_dataloader", loader)  # accelerate's loader wraps torch's
    inner.worker_init_fn = functools.partial(_start_worker, inner.worker_init_fn)
    return loader


def _start_worker(init, worker_id: int) -> None:
    checkpoints.unlock_inherited()
    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if init is not None:
        init(worker_id)


class _TrainBegin(TrainerCallback):
    """Calls functions when training begins, after the Trainer has reset its counters."""

    def __init__(self, *functions):
        self.functions = functions

    def on_train_begin(self, args, state, control, **kwargs):
        for function in self.functions:
            function()


def _random_states(device: torch.device) -> list[torch.Tensor]:
    """The states of the generators that a step on this device may draw from."""
    states = [torch.get_rng_state()]
    return states + [torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_states(device: torch.device, states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def schedule_steps(args, num_training_steps: int) -> tuple[int, int]:
    """(warm-up steps, decay steps) of warmup_stable_decay; values below 1 are shares of all steps."""
    warmup = min(args.get_warmup_steps(num_training_steps), num_training_steps)
    decay = args.decay_steps if args.decay_steps >= 1 else round(args.decay_steps * num_training_steps)
    return warmup, min(int(decay), num_training_steps - warmup)


def schedule_arguments(args, num_training_steps: int) -> dict | None:
    """The keyword arguments of the schedule of the learning rate."""
    if args.lr_scheduler_type != SchedulerType.WARMUP_STABLE_DECAY:
        return args.lr_scheduler_kwargs
    decay = schedule_steps(args, num_training_steps)[1]
    return {"decay_type": "linear", **(args.lr_scheduler_kwargs or {}), "num_decay_steps": decay}


def batch_warmup_steps(args, num_training_steps: int) -> int:
    """The first steps, in which the weights are updated after each half of a batch; below 1 a share of all steps."""
    given = args.batch_warmup_steps
    return min(int(given) if given >= 1 else round(given * num_training_steps), num_training_steps)
