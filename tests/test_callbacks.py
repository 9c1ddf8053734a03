"""What watches a run: true rates, signals, non-finite values, advice, readable lines."""

import json
import math
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from creatures import Clock
from transformers import TrainerControl, TrainerState

from creature import callbacks, checkpoints
from creature.errors import UserError

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def arguments(**changes):
    values = dict(device=torch.device("cpu"), world_size=1, logging_steps=10)
    return SimpleNamespace(**(values | changes))


def state(**changes):
    return TrainerState(is_world_process_zero=True, is_local_process_zero=True, **changes)


def test_throughput_is_of_the_last_window_without_warm_up_evaluation_and_saving(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(callbacks, "time", clock)
    watch = callbacks.Throughput(flops_per_token=1e6, peak_flops=1e10)
    control = TrainerControl()
    watch.on_train_begin(arguments(), state(), control)
    watch.count(1000, 10)  # the first step: compiling takes a minute
    clock.now += 60
    watch.on_step_end(arguments(), state(), control)
    assert watch.window() == {} and math.isnan(watch.seconds_per_step)  # no rate and no time left from a first step
    for _ in range(4):
        watch.count(1000, 10)
        clock.now += 2
        watch.on_step_end(arguments(), state(), control)
    with watch.paused():
        clock.now += 30
    rates = watch.window()
    assert rates == pytest.approx({"tokens_per_second": 500, "samples_per_second": 5, "mfu": 0.05})
    assert watch.seconds_per_step == pytest.approx(2)
    watch.count(600, 6)
    clock.now += 3
    assert watch.window()["tokens_per_second"] == pytest.approx(200)
    assert watch.window() == {}


def test_an_unknown_card_has_no_mfu(monkeypatch):
    watch = callbacks.Throughput(flops_per_token=1e6, peak_flops=None)
    watch.on_train_begin(arguments(), state(), TrainerControl())
    watch.count(10, 1)
    assert "mfu" not in watch.window()


def test_the_first_signal_saves_and_stops_at_the_end_of_the_step():
    before = signal.getsignal(signal.SIGINT)  # a shell may have started us with SIGINT ignored
    stop = callbacks.StopSignals().install()
    try:
        control = TrainerControl()
        stop.on_train_begin(arguments(), state(), control)
        stop.on_step_end(arguments(), state(), control)
        assert not control.should_training_stop
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # a launcher passing on the same Ctrl+C
        stop.on_step_end(arguments(), state(), control)
        assert control.should_save and control.should_training_stop and stop.stopped
        with pytest.raises(callbacks.StopEvaluation):
            stop.on_prediction_step(arguments(), state(), control)
    finally:
        stop.restore()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals between processes")
def test_the_second_signal_leaves_at_once():
    code = (
        "import signal, time\nfrom creature.callbacks import StopSignals\n"
        "stop = StopSignals().install()\nstop.same_signal_seconds = 0.0\n"
        "signal.raise_signal(signal.SIGINT)\ntime.sleep(0.01)\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, timeout=50)
    assert done.returncode == 128 + signal.SIGINT
    assert "a second one leaves at once" in done.stderr and "Traceback" not in done.stderr


def test_a_launcher_that_died_counts_as_a_signal():
    assert not callbacks.StopSignals(launcher_pid=os.getppid()).poll()
    assert callbacks.StopSignals(launcher_pid=os.getppid() + 1).poll()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_way_back(tmp_path, value):
    guard = callbacks.NanGuard()
    guard.check(torch.tensor(3.0), 4, None, str(tmp_path))
    with pytest.raises(UserError, match="in step 5.*no checkpoint yet"):
        guard.check(torch.tensor(value), 5, None, str(tmp_path))
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        (folder / "scheduler.pt").write_bytes(b"rates")
        checkpoints.seal_checkpoint(folder)
    with pytest.raises(UserError, match="checkpoint-4: --resume it with a lower --learning_rate"):
        guard.check(torch.tensor(value), 5, None, str(tmp_path))
    (tmp_path / "checkpoint-4" / "scheduler.pt").write_bytes(b"rated")
    with pytest.raises(UserError, match="checkpoint-2: --resume it"):  # the newest that is whole
        guard.check(torch.tensor(value), 5, None, str(tmp_path))


def advise(losses, tokens_per_log=1_000_000, rate=50.0, **limits):
    said = []
    health = callbacks.HealthAdvice(say=said.append, **limits)
    for step, loss in enumerate(losses, start=1):
        logs = {"loss": loss, "tokens": step * tokens_per_log, "samples_per_second": rate, "learning_rate": 1e-3}
        health.on_log(arguments(), state(global_step=step), TrainerControl(), logs=logs)
    return said


def test_a_run_that_is_well_gets_no_advice():
    assert advise([10.8 - 0.15 * i for i in range(60)]) == []


def test_advice_says_what_to_look_at():
    high = advise([9.0 - 0.01 * i for i in range(60)])
    assert len(high) == 1 and "above 5" in high[0] and "data" in high[0]
    slow = advise([3.0 - 0.01 * i for i in range(20)], rate=1.5)
    assert len(slow) == 1 and "fewer than 5" in slow[0] and "GPU" in slow[0]
    spike = advise([3.0 - 0.01 * i for i in range(15)] + [6.0])
    assert len(spike) == 1 and "jumped" in spike[0] and "step 16" in spike[0]


def test_an_evaluation_that_rises_is_told_once_and_one_that_wavers_is_not():
    def evaluate(losses, before=()):
        said = []
        health = callbacks.HealthAdvice(say=said.append)
        history = [{"eval_loss": loss, "step": 10 * place} for place, loss in enumerate(before, start=1)]
        health.on_train_begin(arguments(), state(log_history=history), TrainerControl())
        for place, loss in enumerate(losses, start=len(before) + 1):
            health.on_log(arguments(), state(global_step=10 * place), TrainerControl(), logs={"eval_loss": loss})
        return said

    assert evaluate([9.0, 5.0, 5.06, 4.9, 4.94, 4.93]) == []
    (said,) = evaluate([9.0, 5.0, 5.2, 5.4, 5.9, 6.0])
    assert "risen since step 20 (5) to 5.4" in said and "--max_steps 20" in said
    assert len(evaluate([5.4], before=[9.0, 5.0, 5.2])) == 1


def test_a_jump_right_after_a_resume_is_reported_too():
    said = []
    health = callbacks.HealthAdvice(say=said.append)
    history = [{"loss": 3.0 - 0.01 * step, "step": step} for step in range(1, 12)] + [{"eval_loss": 2.9, "step": 11}]
    health.on_train_begin(arguments(), state(global_step=11, log_history=history), TrainerControl())
    health.on_log(arguments(), state(global_step=12), TrainerControl(), logs={"loss": 6.0})
    assert len(said) == 1 and "jumped to 6.00 at step 12 from 2.89" in said[0]


def test_a_loss_above_five_is_normal_early_on():
    assert advise([10.0 - 0.05 * i for i in range(30)]) == []


def test_metrics_are_lines_of_json_and_time_goes_on_after_a_resume(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(callbacks, "time", clock)
    writer = callbacks.MetricsFile(tmp_path, seconds_before=50.0)
    clock.now += 2
    logs = {"loss": 3.0, "loss_internal_text": 3.0, "grad_norm": 1.0, "train_runtime": 5.0}
    writer.on_log(arguments(), state(global_step=3, num_input_tokens_seen=192), TrainerControl(), logs=logs)
    writer.on_log(arguments(), state(global_step=3), TrainerControl(), logs={"train_runtime": 5.0})
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert entries == [
        {"step": 3, "tokens": 192, "time": 52.0, "loss": 3.0, "loss_internal_text": 3.0, "grad_norm": 1.0}
    ]


def test_lines_for_people():
    logs = {"loss": 3.14159, "loss_internal_text": 3.14159, "grad_norm": 0.5, "learning_rate": 2e-3, "epoch": 0.1}
    logs |= {"tokens_per_second": 62_100.4, "samples_per_second": 30.3, "mfu": 0.123}
    assert callbacks.log_line(100, 31250, logs, seconds_left=3723) == (
        "step    100/31,250 | loss 3.1416 | loss_internal_text 3.1416 | grad_norm 0.5 | learning_rate 0.002 | "
        "62,100 tokens/s | 30.3 samples/s | MFU 12.3% | 1:02:03 left"
    )
    assert callbacks.format_seconds(2 * 86400 + 61) == "2d 0:01:01"


def test_the_checkpoint_where_the_decay_begins_is_asked_for():
    control = TrainerControl()
    callback = callbacks.DecayCheckpoint(8)
    callback.on_step_end(arguments(), state(global_step=7), control)
    assert not control.should_save
    callback.on_step_end(arguments(), state(global_step=8), control)
    assert control.should_save
