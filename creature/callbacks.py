"""The callbacks of a run: throughput, stop signals, NaN check, samples, advice, logs."""

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import ProgressCallback, TrainerCallback

from configuration_creature import STREAMS
from creature.checkpoints import METRICS_FILE, newest_complete, read_run, update_run
from creature.errors import UserError
from creature.launch import say_waiting, seconds_since_launch, set_handlers, was_interrupted
from creature.terminal import give_terminal_back

TIMINGS = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")


class Throughput(TrainerCallback):
    """
    Tokens and samples per second and MFU over the last logging window, without evaluation, saving and compiling.

    The clock starts after the first step of a process, which compiles and warms up: a log of that step has no rates
    and no time left. The Trainer reads the loss from the device before each log, so a window ends when its work is
    done, not when it was enqueued.
    """

    def __init__(self, flops_per_token: float | None = None, peak_flops: float | None = None):
        """flops_per_token of training; peak_flops of all devices together, None where the card is unknown."""
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.seconds_per_step = math.nan
        self._start: float | None = None
        self._excluded = 0.0
        self._tokens = self._samples = self._steps = 0
        self._warm = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._warm = False
        self._restart()

    def count(self, tokens: int, samples: int) -> None:
        """Add what one optimizer step processes, over all ranks."""
        self._tokens += tokens
        self._samples += samples
        self._steps += 1

    def on_step_end(self, args, state, control, **kwargs):
        if not self._warm:
            self._warm = True
            _wait_for_device(args.device)
            self._restart()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time is left out of the rates."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._excluded += time.perf_counter() - start

    def window(self) -> dict[str, float]:
        """The rates since the last call, which starts a new window."""
        seconds = time.perf_counter() - self._start - self._excluded if self._start else 0.0
        rates = {}
        if self._steps and seconds > 0:
            self.seconds_per_step = seconds / self._steps
            rates["tokens_per_second"] = self._tokens / seconds
            rates["samples_per_second"] = self._samples / seconds
            if self.flops_per_token and self.peak_flops:
                rates["mfu"] = self.flops_per_token * rates["tokens_per_second"] / self.peak_flops
        self._restart()
        return rates

    def _restart(self) -> None:
        self._start, self._excluded = time.perf_counter(), 0.0
        self._tokens = self._samples = self._steps = 0


def _wait_for_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class StopEvaluation(Exception):
    """Raised in the evaluation loop when a signal asked to stop."""


class StopSignals(TrainerCallback):
    """
    The first Ctrl+C or SIGTERM finishes the step, saves and stops; a second one leaves at once.

    Several processes must agree on the step to stop at: each step starts an all-reduce of the flag in the background,
    on the CPU, and the next step reads its result, so that nobody waits. A launcher that died counts as a signal.
    """

    # A signal this soon after the first is the same one: `timeout` signals a process and then its group, and a launcher
    # of several processes passes on what the terminal has sent to all of them.
    same_signal_seconds = 2.0 if int(os.environ.get("WORLD_SIZE", 1)) > 1 else 0.25

    def __init__(self, launcher_pid: int | None = None):
        """launcher_pid: the parent process whose end means to stop, None where the parent may leave."""
        self.requested = ""  # the signal's name
        self.stopped = False
        self.launcher_pid = launcher_pid
        self.training = False
        self._requested_at = 0.0
        self._previous: dict[int, object] = {}
        self._group = self._shared = self._work = None

    def install(self) -> "StopSignals":
        """Take over the signals; only a main thread can, elsewhere this does nothing."""
        self._previous = set_handlers(self._on_signal)
        if was_interrupted():  # by a signal of the start, which a library has swallowed
            raise KeyboardInterrupt
        return self

    def restore(self) -> None:
        """Give the signals back to the handlers before `install`."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number, frame):
        if self.requested and time.monotonic() - self._requested_at > self.same_signal_seconds:
            self._print("second signal: leaving at once; the last checkpoint is complete\n")
            give_terminal_back()
            os._exit(128 + number)
        if not self.requested:
            self.requested, self._requested_at = signal.Signals(number).name, time.monotonic()
            self._print(f"\n{self.requested}: finishing the step and saving; a second one leaves at once\n")

    @staticmethod
    def _print(text: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, text.encode())  # `print` may not be called again while it is under way

    def on_train_begin(self, args, state, control, **kwargs):
        self.stopped, self.training = False, True
        if args.world_size > 1 and self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")

    def poll(self) -> bool:
        """Whether all processes stop now; to be called equally often in each process."""
        if self.launcher_pid and not self.requested and os.getppid() != self.launcher_pid:
            self.requested, self._requested_at = "the launcher is gone", time.monotonic()
        if self._group is None:
            return bool(self.requested)
        agreed = False
        if self._work is not None:
            self._work.wait()
            agreed = bool(self._shared.item())
        self._shared = torch.tensor([int(bool(self.requested))])
        self._work = torch.distributed.all_reduce(self._shared, group=self._group, async_op=True)
        return agreed

    def on_step_end(self, args, state, control, **kwargs):
        if self.poll():
            self.stopped = control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        """The Trainer calls this after a stop too: then only a log is due, and only if the epoch really is over."""
        if self.stopped:
            control.should_log &= state.epoch == int(state.epoch)
            control.should_save = control.should_log  # save again, or the resumed run logs the same again
            control.should_evaluate = False
        return control

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.training and self.poll():  # after training all is saved, so the last evaluation is finished
            self.stopped = True
            raise StopEvaluation

    def on_train_end(self, args, state, control, **kwargs):
        self.training = False
        if self._work is not None:
            self._work.wait()
            self._work = None


class NanGuard(TrainerCallback):
    """
    Stops the run at the first NaN or infinite gradient, before the optimizer step, so that the weights stay good.

    On a CPU the check is immediate. On a GPU the flag is copied to the host in the background and read a step later,
    so that nothing waits. Until then the attribute `found_inf` makes torch's fused optimizers, and those with
    `skips_found_inf`, leave the weights as they are. No checkpoint is written before the flag was read.
    """

    def __init__(self, keep_batch: Callable[[int], str] = lambda step: ""):
        """keep_batch: writes the batch of a step to a file and returns a phrase that names the file."""
        self.keep_batch = keep_batch
        self._pending: tuple[torch.Tensor, torch.cuda.Event, int, bool] | None = None

    def check(self, value: torch.Tensor, step: int, optimizer, output_dir: str) -> None:
        """value: 0-D, must be finite. Raises UserError for this step, or on a GPU for the step before."""
        finite = torch.isfinite(value)
        if finite.device.type != "cuda":
            if not finite:
                self._stop(step, output_dir, weights_kept=True)
            return
        self.wait(output_dir)
        inner = getattr(optimizer, "optimizer", optimizer)
        weights_kept = getattr(inner, "skips_found_inf", False) or all(g.get("fused") for g in inner.param_groups)
        if weights_kept:
            inner.found_inf = (~finite).float()
        flag = torch.empty((), dtype=torch.bool, pin_memory=True)
        flag.copy_(finite, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending = (flag, event, step, weights_kept)

    def wait(self, output_dir: str) -> None:
        """Wait for the check under way, if any; called before a checkpoint, so that none holds a NaN."""
        if self._pending is not None:
            flag, event, step, weights_kept = self._pending
            self._pending = None
            event.synchronize()
            if not flag:
                self._stop(step, output_dir, weights_kept)

    def _stop(self, step: int, output_dir: str, weights_kept: bool) -> None:
        when = "before the weights changed" if weights_kept else "before anything was saved"
        kept, _ = newest_complete(output_dir)
        last = f"the last good checkpoint is {kept.name}: --resume it" if kept else "no checkpoint yet: start again"
        raise UserError(
            f"the gradient became NaN or infinite in step {step}, and the run stopped {when}{self.keep_batch(step)}; "
            f"{last} with a lower --learning_rate (and --accept_changes), or look at the data, and at fp16 if it is on"
        )


class DecayCheckpoint(TrainerCallback):
    """Saves the step at which the learning rate begins to fall: an extended run resumes from that checkpoint."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = True
        return control


class Samples(TrainerCallback):
    """Prints a continuation of a prompt every `every` steps, on the main process; sample: prompt -> text."""

    def __init__(self, sample, prompt: str, every: int):
        self.sample, self.prompt, self.every = sample, prompt, every

    def on_step_end(self, args, state, control, **kwargs):
        if self.every and state.global_step % self.every == 0 and state.is_world_process_zero:
            _say(f"sample at step {state.global_step}: {self.sample(self.prompt)}")


class HealthAdvice(TrainerCallback):
    """
    Prints what to look at when the loss jumps, stays above 5 after 40 M tokens, that of the evaluation rises, or the
    run is slow.

    A fresh model starts at ln(50304) = 10.8, and a loss above 5 is normal for the first tens of millions of tokens. A
    jump is compared with the mean of the `patience` logs before it. The evaluation's loss rises when two in a row are
    more than 1 % above its lowest. Each but the jump is printed once.
    """

    def __init__(self, loss_limit=5.0, after_tokens=40e6, patience=10, min_samples_per_second=5.0, say=None):
        """say: where the advice goes, the console by default."""
        self.loss_limit, self.after_tokens = loss_limit, after_tokens
        self.min_samples_per_second = min_samples_per_second
        self.say = say or _say
        self._losses: deque[float] = deque(maxlen=patience)
        self._evaluations: list[tuple[float, int]] = []  # loss, step
        self._said: set[str] = set()

    def on_train_begin(self, args, state, control, **kwargs):
        # Of a resumed run.
        self._losses.extend(entry["loss"] for entry in state.log_history if "loss" in entry)
        self._evaluations = [(entry["eval_loss"], entry["step"]) for entry in state.log_history if "eval_loss" in entry]

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            self._evaluations.append((logs["eval_loss"], state.global_step))
            (lowest, step), loss_now = min(self._evaluations), logs["eval_loss"]
            if len(self._evaluations) > 2 and all(loss > 1.01 * lowest for loss, _ in self._evaluations[-2:]):
                self._say_once(
                    "overfits",
                    f"the loss of the evaluation has risen since step {step} ({lowest:.4g}) to {loss_now:.4g}: "
                    f"the model overfits; give more data or --max_steps {step}; --load_best_model_at_end true "
                    "with --save_steps equal to --eval_steps keeps the best checkpoint",
                )
        if "loss" not in logs:
            return
        loss, rate = logs["loss"], logs.get("samples_per_second", math.inf)
        if logs.get("tokens", 0) >= self.after_tokens and loss > self.loss_limit:
            self._say_once(
                "high",
                f"the loss is still above {self.loss_limit:g} after {logs['tokens']:,} tokens: check that the data is "
                "clean text in one language (decode some of it), and try a learning rate 3x lower or higher",
            )
        if len(self._losses) == self._losses.maxlen and loss > sum(self._losses) / len(self._losses) + 1:
            self.say(
                f"advice: the loss jumped to {loss:.2f} at step {state.global_step} from {self._losses[-1]:.2f}: if it "
                "does not come back, resume from the checkpoint before with a lower --learning_rate"
            )
        self._losses.append(loss)
        if rate < self.min_samples_per_second and state.global_step > 1:
            look = (
                "this is a CPU: use a GPU for a real run"
                if args.device.type == "cpu"
                else "look whether another program uses the GPU (nvidia-smi), whether torch.compile and bf16 are on "
                "(see the table above), and whether --per_device_train_batch_size could be larger"
            )
            self._say_once("slow", f"{rate:.2g} samples a second, fewer than {self.min_samples_per_second:g}: {look}")

    def _say_once(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self.say(f"advice: {text}")


class MetricsFile(TrainerCallback):
    """Appends every log to metrics.jsonl, one JSON object a line; `time` counts the training before a resume too."""

    keys = (
        "loss", "grad_norm", "learning_rate", "tokens_per_second", "samples_per_second", "mfu", "epoch",
        "peak_memory_bytes",
    )  # fmt: skip

    def __init__(self, folder: str | os.PathLike, seconds_before: float = 0.0):
        self.path = Path(folder) / METRICS_FILE
        self._start = time.perf_counter() - seconds_before

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or not state.is_world_process_zero or not ("loss" in logs or "eval_loss" in logs):
            return
        entry = {
            "step": state.global_step,
            "tokens": state.num_input_tokens_seen,
            "time": round(time.perf_counter() - self._start, 3),
        }
        entry |= {k: v for k, v in logs.items() if k in self.keys or k.startswith(("loss_", "eval_"))}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror}): free some space, then --resume") from error


class FirstStep(TrainerCallback):
    """Prints when the first step starts and ends, and writes `seconds_to_first_step` into run.json."""

    def __init__(self):
        self._start: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        compiling = ", compiling (a minute or more the first time on a machine)" if args.torch_compile else ""
        say_waiting(f"the first step{compiling}")
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if self._start is None or not state.is_world_process_zero:
            return
        _wait_for_device(args.device)
        seconds = seconds_since_launch()
        _say(f"first step done {seconds:.1f} s after the launch; it took {time.perf_counter() - self._start:.1f} s")
        self._start = None
        if read_run(args.output_dir) is not None:
            update_run(args.output_dir, seconds_to_first_step=round(seconds, 1))


class ConsoleLog(ProgressCallback):
    """One readable line for each log, with the time left, and on a terminal a progress bar."""

    def __init__(self, throughput: Throughput, bar: bool | None = None, unit: str = "tokens"):
        super().__init__()
        self.throughput, self.unit = throughput, unit
        self.bar = sys.stderr.isatty() if bar is None else bar

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = 0
        if self.bar:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or not state.is_world_process_zero or not ("loss" in logs or "eval_loss" in logs):
            return
        left = (state.max_steps - state.global_step) * self.throughput.seconds_per_step
        _say(log_line(state.global_step, state.max_steps, logs, left, self.unit), self.training_bar)

    def on_train_end(self, args, state, control, **kwargs):
        if self.prediction_bar is not None:  # left open by StopEvaluation
            self.prediction_bar.close()
            self.prediction_bar = None
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)


def log_line(step: int, max_steps: int, logs: dict, seconds_left: float = math.nan, unit: str = "tokens") -> str:
    """
    One log as a line for the console: losses, gradient norm, learning rate, speed, time left; or an evaluation. Of a
    round on recordings it is followed by a line for each stream, for the text, and for what the senses are worth.
    """
    parts = [f"step {step:>6,}/{max_steps:,}"]
    streams = [key for key in logs if key.startswith("loss_")]
    shapes = {"loss": "{:.4f}"} | {key: "{:.4f}" for key in streams}
    shapes |= {"grad_norm": "{:.3g}", "learning_rate": "{:.3g}", "tokens_per_second": f"{{:,.0f}} {unit}/s"}
    shapes |= {"samples_per_second": "{:.3g} samples/s", "mfu": "MFU {:.1%}"}
    shapes |= {"eval_loss": "{:.4f}", "eval_perplexity": "{:.2f}", "eval_bits_per_byte": "{:.4f}"}
    shapes |= {"eval_accuracy": "{:.2%}"}
    for key, shape in shapes.items():
        if isinstance(logs.get(key), int | float):
            text = shape.format(logs[key])
            parts.append(text if " " in shape else f"{key} {text}")
    if "loss" in logs and math.isfinite(seconds_left):
        parts.append(f"{format_seconds(seconds_left)} left")
    return "\n".join([" | ".join(parts), *evaluation_lines({k: v for k, v in logs.items() if k not in shapes})])


def evaluation_lines(logs: dict) -> list[str]:
    """
    What a round evaluates beside the loss: a line for each stream, for the text, and for the senses. What a sense is
    worth to each of several streams is left to metrics.jsonl.
    """
    lines: dict[str, list[str]] = {}
    for key, value in logs.items():
        if not key.startswith("eval_") or key in TIMINGS:
            continue
        if any(f"{stream}_{how}_" in key for stream in STREAMS for how in ("drop", "wrong")):
            continue
        name, subject = key.removeprefix("eval_"), "animation"  # whose parts have names of their own
        how, _, sense = name.partition("_")
        if how in ("drop", "wrong"):
            subject, label = "senses", f"{'without' if how == 'drop' else how} {sense}"
        else:
            subject = next(
                (s for s in ("internal_text", "external_text", "audio", "text") if name.startswith(s)), subject
            )
            label = name.removeprefix(f"{subject}_")
        lines.setdefault(subject, []).append(f"{label} {value:.4g}")
    return [f"  {subject}: {' | '.join(values)}" for subject, values in lines.items()]


def format_seconds(seconds: float) -> str:
    """A duration as 1:02:03 (hours, minutes, seconds), with days in front where there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d {hour}:{minute:02}:{second:02}" if days else f"{hour}:{minute:02}:{second:02}"


def _say(text: str, bar=None) -> None:
    """Print a line, above the progress bar where there is one."""
    if bar is not None:
        bar.write(text)
    else:
        print(text, flush=True)
