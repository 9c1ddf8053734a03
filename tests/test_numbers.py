"""The logged numbers against independent counts: MFU, two processes, rates after a resume, a jump of the loss."""

import json
import os
import socket
from multiprocessing import get_context

import pytest
import torch
import torch.nn.functional as F
from creatures import Clock, micro_config
from test_trainer import TEXT_ONLY, Rows, StopAt, losses_of, make_trainer
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from creature import callbacks
from creature.callbacks import HealthAdvice
from creature.estimate import flops_per_token
from modeling_creature import MultiModalCreature

PEAK = 1e9  # FLOP/s of an imaginary device


def config():
    return micro_config(loss_weights=dict(TEXT_ONLY), attn_implementation="eager")


def slow_trainer(folder, clock, see=lambda inputs: None, **settings):
    """A Trainer in which a micro-batch takes one second of `clock` on a device of PEAK, and all else takes no time."""
    trainer = make_trainer(folder, config=config(), **settings)
    throughput = trainer.throughput
    throughput.flops_per_token, throughput.peak_flops = flops_per_token(config(), 16), PEAK * trainer.args.world_size
    original = trainer.training_step

    def step(model, inputs, *args, **kwargs):
        clock.now += 1
        see(inputs)
        return original(model, inputs, *args, **kwargs)

    trainer.training_step = step
    return trainer


def mean_loss(model, ids, labels):
    """The mean over all targets, from plain logits."""
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100).item()


def test_mfu_is_the_counted_flops_over_time_and_peak(tmp_path, monkeypatch):
    clock, counts = Clock(), []
    monkeypatch.setattr(callbacks, "time", clock)
    trainer = slow_trainer(tmp_path, clock, max_steps=4, batch_warmup_steps=0)  # an update is counted, too
    original = trainer.training_step

    def counted(*args, **kwargs):
        with FlopCounterMode(display=False) as counter:
            loss = original(*args, **kwargs)
        counts.append(counter.get_total_flops())
        return loss

    trainer.training_step = counted
    trainer.train()
    # torch's counter counts all of attention; a causal kernel skips half of it, once forward and twice backward.
    width = trainer.model.config.num_attention_heads * trainer.model.config.head_dim
    skipped = 3 * 2 * trainer.model.config.num_hidden_layers * width * 16
    steps = [sum(counts[i : i + 2]) - skipped * 64 for i in range(2, 8, 2)]  # of 64 tokens; not the first
    assert losses_of(trainer, "mfu") == pytest.approx([flops / 2 / PEAK for flops in steps], rel=0.01)
    assert trainer.state.total_flos == pytest.approx(sum(counts) - 4 * skipped * 64, rel=0.01)


def test_rates_after_a_resume_count_only_the_new_steps(tmp_path, monkeypatch):
    clock, shapes = Clock(), []
    monkeypatch.setattr(callbacks, "time", clock)
    settings = dict(max_steps=9, logging_steps=4, logging_first_step=False, rows=Rows(48))
    slow_trainer(tmp_path, clock, callbacks=[StopAt(2)], **settings).train()  # in the middle of a window
    clock.now += 10_000
    resumed = slow_trainer(tmp_path, clock, lambda inputs: shapes.append(inputs["input_ids"].shape), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    tokens = [rows * length for rows, length in shapes]
    # Steps 3 and 4, then 5 to 8, two micro-batches each; the rates start after the first step of the process.
    expected = [sum(tokens[2:4]) / 2, sum(tokens[4:12]) / 8]
    assert losses_of(resumed, "tokens_per_second") == pytest.approx(expected)
    assert losses_of(resumed, "samples_per_second") == pytest.approx([value / 16 for value in expected])
    assert losses_of(resumed, "mfu") == pytest.approx([v * flops_per_token(config(), 16) / PEAK for v in expected])
    assert losses_of(resumed, "tokens") == [2 * 64 + sum(tokens[:4]), 2 * 64 + sum(tokens[:12])]
    assert resumed.throughput.seconds_per_step == pytest.approx(2)


class Spike(TrainerCallback):
    """Damages the weights before a step, so that its loss jumps."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 14:
            with torch.no_grad():
                model.lm_head.weight.mul_(40)


def test_a_jump_of_the_loss_is_reported_at_its_step(tmp_path):
    said = []
    trainer = make_trainer(tmp_path, max_steps=16, callbacks=[Spike(), HealthAdvice(say=said.append, patience=5)])
    trainer.train()
    losses = losses_of(trainer)
    assert losses[14] > losses[13] + 1
    (jump,) = [text for text in said if "jumped" in text and "step 15" in text]
    assert f"jumped to {losses[14]:.2f} at step 15 from {losses[13]:.2f}" in jump


def run_one_of_two(rank, port, folder):
    """One of two processes of a run; writes the rows of its micro-batches and its logs to a file."""
    world = {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in world.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    clock, batches = Clock(), []
    callbacks.time = clock
    trainer = slow_trainer(
        folder / "run", clock, lambda inputs: batches.append([inputs[k].tolist() for k in ("input_ids", "labels")]),
        rows=Rows(22), eval_rows=Rows(7, seed=1), max_steps=6, logging_steps=2, eval_strategy="steps", eval_steps=6,
        save_steps=6,
    )  # fmt: skip
    trainer.train()
    (folder / f"saw{rank}.json").write_text(json.dumps({"batches": batches, "logs": trainer.state.log_history}))
    torch.distributed.destroy_process_group()


def test_the_logs_of_two_processes_count_both(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = get_context("spawn")
    ranks = [start.Process(target=run_one_of_two, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(200)
        process.kill()
    saw = [json.loads((tmp_path / f"saw{rank}.json").read_text()) for rank in range(2)]
    logs = [entry for entry in saw[0]["logs"] if "loss" in entry]
    assert [entry["step"] for entry in logs] == [1, 2, 4, 6]

    # 22 rows are 6 micro-batches of 2 for each process (the last one is filled up): three steps an epoch.
    sizes = [[len(ids) for ids, _ in one["batches"]] for one in saw]
    assert len(sizes[0]) == len(sizes[1]) == 12
    tokens = [16 * (first + second) for first, second in zip(*sizes, strict=True)]  # of each second
    windows = [tokens[2:4], tokens[4:8], tokens[8:12]]  # micro-batches of step 2, of 3 and 4, of 5 and 6
    rates = [sum(window) / len(window) for window in windows]
    assert [entry["tokens_per_second"] for entry in logs[1:]] == pytest.approx(rates)
    assert [entry["samples_per_second"] for entry in logs[1:]] == pytest.approx([rate / 16 for rate in rates])
    mfu = [rate * flops_per_token(config(), 16) / (2 * PEAK) for rate in rates]
    assert [entry["mfu"] for entry in logs[1:]] == pytest.approx(mfu)
    assert [entry["tokens"] for entry in logs] == [sum(tokens[:n]) for n in (2, 4, 8, 12)]

    # The first loss is the mean over all targets of both processes in the first step.
    first = [batch for one in saw for batch in one["batches"][:2]]
    ids, labels = (torch.tensor([row for batch in first for row in batch[i]]) for i in range(2))
    torch.manual_seed(0)
    model = MultiModalCreature(config())
    assert logs[0]["loss"] == pytest.approx(mean_loss(model, ids, labels), abs=1e-5)
    assert logs[0]["loss_internal_text"] == pytest.approx(logs[0]["loss"], abs=1e-6)

    # The evaluation at the end counts each of the 7 rows once, although two processes share them.
    (evaluation,) = [entry for entry in saw[0]["logs"] if "eval_loss" in entry]
    model = MultiModalCreature.from_pretrained(tmp_path / "run" / "checkpoint-6")
    rows = Rows(7, seed=1)
    assert evaluation["eval_loss"] == pytest.approx(mean_loss(model, rows.ids, rows.labels), abs=1e-5)
