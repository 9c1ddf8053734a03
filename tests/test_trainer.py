"""CreatureTrainer: losses and counts, exact resume, complete checkpoints, no step with a NaN."""

import errno
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from creatures import Clock, micro_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

import modeling_creature
import senses_creature
import streams_creature
from creature import callbacks, checkpoints
from creature import trainer as trainer_module
from creature.callbacks import MetricsFile
from creature.data import collate_blocks
from creature.errors import UserError
from creature.trainer import CreatureTrainer, schedule_steps, split_rows
from creature.training_arguments import CreatureTrainingArguments
from modeling_creature import MultiModalCreature

TEXT_ONLY = {"internal_text": 1.0, "external_text": 0.0, "audio": 0.0, "animation": 0.0}


class Rows(torch.utils.data.Dataset):
    """Random rows of 16 tokens, some labels unknown; `spoken` rows also have external text."""

    def __init__(self, count=24, spoken=False, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, 120, (count, 16), generator=generator)
        self.labels = self.ids.clone()
        for row in range(count):
            self.labels[row, 16 - row % 12 :] = -100
        self.spoken = torch.randint(0, 120, (count, 16), generator=generator) if spoken else None

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        row = {"input_ids": self.ids[index], "labels": self.labels[index]}
        if self.spoken is not None:
            spoken = self.spoken[index].clone()
            spoken[index % 5 + 3 :] = -100
            row["external_text_targets"] = spoken
        return row


def make_trainer(folder, rows=None, eval_rows=None, config=None, callbacks=None, seed=0, **changes):
    values = dict(
        output_dir=str(folder), use_cpu=True, max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        per_device_eval_batch_size=3, learning_rate=1e-2, warmup_steps=1, logging_steps=1, save_steps=100,
        eval_strategy="no", save_total_limit=None, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    args = CreatureTrainingArguments(**(values | changes))
    torch.manual_seed(seed)
    model = MultiModalCreature(config or micro_config(loss_weights=dict(TEXT_ONLY)))
    model.train_only(streams=[name for name, weight in model.config.loss_weights.items() if weight])
    return CreatureTrainer(
        model=model, args=args, train_dataset=rows or Rows(), eval_dataset=eval_rows, callbacks=callbacks
    )


def weights_of(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def losses_of(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_accumulation_changes_neither_losses_nor_weights(tmp_path):
    whole = make_trainer(tmp_path / "a", per_device_train_batch_size=4, gradient_accumulation_steps=1)
    whole.train()
    parts = make_trainer(tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    parts.train()
    assert losses_of(whole) == pytest.approx(losses_of(parts), abs=1e-5)
    for name, value in weights_of(whole).items():
        assert torch.allclose(value, parts.model.state_dict()[name], atol=2e-4), name


def test_the_losses_of_both_halves_count_where_a_graph_writes_them_to_one_place(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=1, batch_warmup_steps=6)
    batches = [collate_blocks([{"input_ids": row["input_ids"].numpy()} for row in Rows(4)])]
    items = trainer._get_num_items_in_batch(batches, trainer.args.device)
    buffer, losses = torch.zeros(()), iter((2.0, 4.0))
    monkeypatch.setattr(trainer, "_update", lambda model: None)
    monkeypatch.setattr(trainer, "_forward_and_backward", lambda *args, **kwargs: buffer.fill_(next(losses)))
    trainer.state.max_steps = 6
    assert trainer.training_step(trainer.model, batches[0], items) == 3.0


@pytest.mark.parametrize("rows, micro_batches", [(4, 1), (2, 2), (1, 4)])
def test_a_step_of_two_updates_is_two_steps_of_half_the_batch(tmp_path, monkeypatch, rows, micro_batches):
    monkeypatch.setattr(trainer_module, "FURTHER_TARGETS", (0.0, 0.0))
    data = Rows(count=24)
    data.labels = data.ids
    settings = dict(rows=data, lr_scheduler_type="constant", warmup_steps=0)
    size = dict(per_device_train_batch_size=rows, gradient_accumulation_steps=micro_batches)
    halved = make_trainer(tmp_path / "a", **settings, **size, max_steps=4, batch_warmup_steps=2)
    plain = make_trainer(tmp_path / "b", **settings, max_steps=4, gradient_accumulation_steps=1, batch_warmup_steps=0)
    halved.add_callback(keep := KeepWeights(2))
    halved.train()
    plain.train()
    each = losses_of(plain)
    assert losses_of(halved)[:2] == pytest.approx([(each[0] + each[1]) / 2, (each[2] + each[3]) / 2], abs=1e-5)
    named = losses_of(halved, "loss_internal_text")
    assert named == pytest.approx(losses_of(halved), abs=1e-6)
    for name, value in weights_of(plain).items():
        assert torch.allclose(value, keep.weights[name], atol=2e-4), name
    assert losses_of(halved, "grad_norm")[1] == pytest.approx(losses_of(plain, "grad_norm")[3], rel=1e-3)
    assert [halved.optimizer.state[p]["step"].item() for p in halved.optimizer.param_groups[0]["params"]][0] == 6


@pytest.mark.parametrize("rows, micro_batches", [(4, 1), (2, 2)])
def test_half_batches_learn_further_targets_less_with_every_step(tmp_path, rows, micro_batches):
    seen = {True: [], False: []}

    def see(model, args, kwargs):
        further = kwargs.get("further_targets")
        seen[model.training].append(None if further is None else further.tolist())

    size = dict(per_device_train_batch_size=rows, gradient_accumulation_steps=micro_batches)
    evaluated = dict(eval_rows=Rows(3), eval_strategy="steps", eval_steps=1)
    trainer = make_trainer(tmp_path, **size, **evaluated, batch_warmup_steps=4)
    trainer.model.register_forward_pre_hook(see, with_kwargs=True)
    trainer.train()
    halves = [further for step in range(4) for further in 2 * [[0.5 * (4 - step) / 4, 0.25 * (4 - step) / 4]]]
    assert seen == {True: halves + 2 * micro_batches * [None], False: 6 * [None]}
    assert losses_of(trainer) == pytest.approx(losses_of(trainer, "loss_internal_text"), abs=1e-6)


def test_gradients_are_clipped_as_in_transformers(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, max_grad_norm=0.5)
    trainer.train()
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert 0 < len(trained) < len(list(trainer.model.parameters()))
    found = []
    for clip in (trainer._clip_grad_norm, super(CreatureTrainer, trainer)._clip_grad_norm):
        torch.manual_seed(0)
        for parameter in trained:
            parameter.grad = torch.randn_like(parameter)
        found.append([clip(trainer.model), *[parameter.grad for parameter in trained]])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.cat([gradient.flatten() for gradient in found[0][1:]]).norm() == pytest.approx(0.5, rel=1e-3)


def test_split_rows_keeps_documents_apart():
    rows = [{"input_ids": np.array([5, 9, 5, 5, 9, 5])}, {"input_ids": np.array([9, 5, 5, 5, 5, 9])}]
    whole = collate_blocks(rows * 2, end_of_text=9)
    for half, part in zip(split_rows(whole), (rows, rows), strict=True):
        alone = collate_blocks(part, end_of_text=9)
        for name in ("input_ids", "labels", "position_ids"):
            assert torch.equal(half[name], alone[name])
        # The same boundaries, but for those of documents without a tick.
        assert half["cu_seq_lens_q"].unique().tolist() == alone["cu_seq_lens_q"].unique().tolist()
        assert (half["cu_seq_lens_q"].diff() >= 0).all() and half["cu_seq_lens_q"].dtype == torch.int32


class KeepWeights(TrainerCallback):
    """Copies the weights after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_the_logged_loss_is_the_mean_over_the_targets_of_the_step(tmp_path):
    """The first step, recomputed by hand from plain logits: -100 ignored, one mean over all micro-batches."""
    rows = Rows(count=4)
    trainer = make_trainer(tmp_path, rows=rows, max_steps=1)
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=rows.ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows.labels[:, 1:].flatten(), ignore_index=-100)
    trainer.train()
    assert losses_of(trainer) == pytest.approx([expected.item()], abs=1e-5)
    assert losses_of(trainer, "loss_internal_text") == pytest.approx([expected.item()], abs=1e-5)


def test_streams_are_logged_by_name_each_over_its_own_targets(tmp_path):
    weights = TEXT_ONLY | {"external_text": 0.5}
    rows = Rows(count=4, spoken=True)
    trainer = make_trainer(tmp_path, rows=rows, config=micro_config(loss_weights=weights), max_steps=1)
    whole = trainer.data_collator([rows[i] for i in range(4)])
    with torch.no_grad():
        outputs = trainer.model.eval()(**whole)
    trainer.train()
    for name in ("internal_text", "external_text"):
        assert losses_of(trainer, f"loss_{name}") == pytest.approx([outputs.losses[name].item()], abs=1e-5)
    assert losses_of(trainer) == pytest.approx([outputs.loss.item()], abs=1e-5)
    assert not any(f"loss_{name}" in entry for entry in trainer.state.log_history for name in ("audio", "animation"))


def test_a_window_logs_the_mean_of_its_steps(tmp_path):
    each, window = make_trainer(tmp_path / "a"), make_trainer(tmp_path / "b", logging_steps=3, logging_first_step=False)
    each.train()
    window.train()
    steps = losses_of(each, "loss_internal_text")
    means = [sum(steps[:3]) / 3, sum(steps[3:]) / 3]
    assert losses_of(window, "loss_internal_text") == pytest.approx(means, abs=1e-6)
    assert [entry["tokens"] for entry in window.state.log_history if "tokens" in entry] == [3 * 64, 6 * 64]


class Waits(TorchDispatchMode):
    """Counts the calls that make the host wait for a device: a tensor's value read as a number, or its shape by it."""

    waiting = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in self.waiting
        return function(*args, **(kwargs or {}))


def test_no_step_without_a_log_reads_a_value_from_the_device(tmp_path, monkeypatch):
    """Of the whole Trainer; copies between devices are seen by tests/test_gpu.py."""
    waits, counts = Waits(), []
    for name in ("tolist", "cpu", "numpy"):
        plain = getattr(torch.Tensor, name)

        def counted(self, *args, _plain=plain, **kwargs):
            waits.count += 1
            return _plain(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)

    class Count(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            counts.append(waits.count)

    settings = dict(max_steps=6, logging_steps=4, logging_first_step=False)
    trainer = make_trainer(tmp_path, rows=Rows(48), callbacks=[Count()], **settings)  # less than a pass
    # On a GPU the guard reads its value a step later, and ids are not checked in training.
    trainer.nan_guard.check = lambda *args: None
    for module in (modeling_creature, senses_creature, streams_creature):
        monkeypatch.setattr(module, "check_ids", lambda *args, **named: None)
    with waits:
        trainer.train()
    per_step = [after - before for before, after in zip(counts, counts[1:], strict=False)]
    assert per_step[:3] == [0, 0, 0] and per_step[3] > 0 and per_step[4] == 0


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


# In the first epoch of 6 steps, two of which are of half batches; at its end; in the second.
@pytest.mark.parametrize("stop", [1, 3, 6, 7])
def test_a_resumed_run_is_bit_equal_to_an_unbroken_one(tmp_path, stop):
    def config():
        return micro_config(loss_weights=dict(TEXT_ONLY), attention_dropout=0.2)

    settings = dict(max_steps=10, logging_steps=4)
    unbroken = make_trainer(tmp_path / "a", config=config(), **settings)
    unbroken.train()
    broken = make_trainer(tmp_path / "b", config=config(), callbacks=[StopAt(stop)], **settings)
    broken.train()
    assert broken.state.global_step == stop
    resumed = make_trainer(tmp_path / "b", config=config(), seed=99, **settings)  # other initial weights
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{stop}"))
    assert_same(weights_of(unbroken), weights_of(resumed))
    for key in ("loss", "loss_internal_text", "grad_norm", "learning_rate", "tokens"):
        assert losses_of(unbroken, key) == losses_of(resumed, key), key


class AskToStop(TrainerCallback):
    """What a signal during a step does."""

    def __init__(self, step):
        self.step, self.signals = step, None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            self.signals.requested = "SIGTERM"


def asked_to_stop(folder, step, **settings):
    ask = AskToStop(step)
    trainer = make_trainer(folder, callbacks=[ask], **settings)
    ask.signals = trainer.signals
    trainer.train()
    assert trainer.state.global_step == step and trainer.signals.stopped
    return trainer


@pytest.mark.parametrize(
    ("by", "stop"),
    [
        ({"eval_strategy": "steps", "eval_steps": 2}, 4),
        ({"eval_strategy": "epoch", "logging_strategy": "epoch"}, 3),  # which would have been the end of an epoch of 6
        ({"eval_strategy": "epoch", "logging_strategy": "epoch"}, 6),
    ],
)
def test_an_evaluation_skipped_by_a_stop_runs_later_and_changes_no_weight(tmp_path, by, stop):
    def config():
        return micro_config(loss_weights=dict(TEXT_ONLY), attention_dropout=0.2)

    settings = dict(eval_rows=Rows(5, seed=1), max_steps=9, **by)
    unbroken = make_trainer(tmp_path / "a", config=config(), **settings)
    unbroken.train()
    broken = asked_to_stop(tmp_path / "b", stop, config=config(), **settings)
    evaluated = {entry["step"] for entry in broken.state.log_history if "eval_loss" in entry}
    assert stop not in evaluated
    resumed = make_trainer(tmp_path / "b", config=config(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{stop}"))
    assert_same(weights_of(unbroken), weights_of(resumed))
    for key in ("loss", "eval_loss", "step"):
        assert losses_of(unbroken, key) == losses_of(resumed, key) and losses_of(resumed, key), key
    quiet = make_trainer(tmp_path / "c", config=config(), **(settings | {"eval_strategy": "no"}))
    quiet.train()
    assert_same(weights_of(unbroken), weights_of(quiet))


def test_a_stop_in_the_last_step_saves_before_the_evaluation(tmp_path):
    settings = dict(eval_rows=Rows(5, seed=1), eval_strategy="steps", eval_steps=4)
    trainer = asked_to_stop(tmp_path, 6, **settings)
    assert checkpoints.problem_with(tmp_path / "checkpoint-6") is None
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [4]
    trainer.make_up_evaluation()  # as the job does
    (loss,) = [entry["eval_loss"] for entry in trainer.state.log_history if entry["step"] == 6 and "eval_loss" in entry]
    trainer.make_up_evaluation()
    assert len(losses_of(trainer, "eval_loss")) == 2
    killed_meanwhile = make_trainer(tmp_path, seed=99, **settings)
    killed_meanwhile.load_finished(tmp_path / "checkpoint-6")
    killed_meanwhile.make_up_evaluation()
    assert losses_of(killed_meanwhile, "eval_loss")[-1] == loss


def test_the_log_history_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "LOG_HISTORY", 5)
    trainer = make_trainer(tmp_path, eval_rows=Rows(3), eval_strategy="steps", eval_steps=1, save_steps=6)
    trainer.add_callback(MetricsFile(tmp_path))
    trainer.train()
    assert len(trainer.state.log_history) == 5 and len(checkpoints.read_metrics(tmp_path)) == 12
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in saved] == [4, 5, 5, 6, 6]
    assert len(trainer.accelerator._dataloaders) == 1  # not those of all evaluations


def test_a_resumed_run_takes_the_optimizers_settings_from_its_arguments(tmp_path):
    first = make_trainer(tmp_path, callbacks=[StopAt(3)])
    first.train()
    changed = make_trainer(tmp_path, learning_rate=1e-3, weight_decay=0.3, decay_steps=2)
    changed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses_of(changed, "learning_rate")[3] == pytest.approx(1e-3)
    assert {group["weight_decay"] for group in changed.optimizer.param_groups} == {0.3, 0.0}


def test_evaluation_weighs_tokens_and_never_holds_logits(tmp_path, monkeypatch):
    rows = Rows(count=7)
    trainer = make_trainer(tmp_path, eval_rows=rows)
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=rows.ids).logits[:, :-1]
    targets = rows.labels[:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100).item()
    monkeypatch.setattr(trainer.model.lm_head, "forward", lambda x: pytest.fail("the logits were computed"))
    metrics = trainer.evaluate()
    counted = targets != -100
    accuracy = (logits.argmax(-1) == targets)[counted].float().mean().item()
    assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert metrics["eval_bits_per_byte"] == pytest.approx(expected / math.log(2), abs=1e-5)  # one byte a token here
    assert metrics["eval_accuracy"] == pytest.approx(accuracy)


def test_only_the_matrices_of_the_body_decay(tmp_path):
    trainer = make_trainer(tmp_path)
    names = set(trainer.get_decay_parameter_names(trainer.model))
    assert "model.layers.0.mlp.up_proj.weight" in names and "model.layers.1.self_attn.q_proj.weight" in names
    assert not {name for name in names if "norm" in name or "embed_tokens" in name or "lm_head" in name}


def test_the_learning_rate_warms_up_stays_and_falls_to_zero(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=10, warmup_steps=2, decay_steps=0.4)
    assert schedule_steps(trainer.args, 10) == (2, 4)
    trainer.train()
    rates = [rate / 1e-2 for rate in losses_of(trainer, "learning_rate")]
    assert rates == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


class Poison(TrainerCallback):
    """Sets one weight to NaN before a step, as a broken batch or an overflow would."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                model.model.norm.weight[0] = math.nan


def test_a_nan_stops_the_run_before_the_weights_change(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[Poison(4)], save_steps=2)
    with pytest.raises(UserError, match="step 5.*batch of 4 rows, in 2 micro-batches, is kept in .*checkpoint-4"):
        trainer.train()
    assert checkpoints.problem_with(tmp_path / "checkpoint-4") is None
    saved = MultiModalCreature.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    after = weights_of(trainer)
    after["model.norm.weight"][0] = saved["model.norm.weight"][0]
    assert_same(saved, after)
    (kept,) = tmp_path.glob("stopped_at_step_5*.npy")
    order = [row for batch in itertools.islice(trainer.get_train_dataloader(), 8, 10) for row in batch["input_ids"]]
    assert np.array_equal(np.load(kept), torch.stack(order))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, save_steps=2)
    real = torch.save

    def full(value, path, *args, **kwargs):
        if "optimizer" in str(path) and trainer.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="disk is full.*--resume from checkpoint-2, which is intact"):
        trainer.train()
    newest, skipped = checkpoints.newest_complete(tmp_path)
    assert newest.name == "checkpoint-2" and not skipped
    assert not (tmp_path / checkpoints.WRITING_FOLDER).exists()  # it would keep the disk full


def test_old_checkpoints_are_deleted_but_for_protected_ones(tmp_path):
    trainer = make_trainer(tmp_path, save_steps=1, save_total_limit=2)
    trainer.protected_steps.add(2)
    trainer.train()
    kept = checkpoints.list_checkpoints(tmp_path)
    assert [checkpoints.step_of(path) for path in kept] == [2, 5, 6]
    assert all(checkpoints.problem_with(path) is None for path in kept)
    assert not (tmp_path / checkpoints.WRITING_FOLDER).exists()
    assert json.loads((kept[-1] / "config.json").read_text())["use_cache"] is True


def test_a_checkpoint_of_another_shape_is_refused_in_a_sentence(tmp_path):
    make_trainer(tmp_path, callbacks=[StopAt(2)]).train()
    other = make_trainer(tmp_path, config=micro_config(loss_weights=dict(TEXT_ONLY), num_hidden_layers=1))
    with pytest.raises(UserError, match="another configuration"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_metrics_hold_losses_by_stream_and_true_token_counts(tmp_path):
    trainer = make_trainer(tmp_path, eval_rows=Rows(count=3), eval_strategy="steps", eval_steps=3)
    trainer.add_callback(MetricsFile(tmp_path))
    trainer.train()
    entries = checkpoints.read_metrics(tmp_path)
    assert [entry["tokens"] for entry in entries if "loss" in entry] == [64 * step for step in range(1, 7)]
    assert [entry["step"] for entry in entries if "eval_loss" in entry] == [3, 6]
    assert all(entry["loss"] == entry["loss_internal_text"] for entry in entries if "loss" in entry)
    assert all(entry["tokens_per_second"] > 0 for entry in entries if "loss" in entry and entry["step"] > 1)


def test_tokens_per_second_leave_out_evaluation_and_saving(tmp_path, monkeypatch):
    clock, shapes, ends = Clock(), [], []
    monkeypatch.setattr(callbacks, "time", clock)

    class Ends(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ends.append(len(shapes))  # micro-batches up to the end of the step

    # An epoch of 9 rows is five micro-batches, the last of one row: steps of 4, 4 and 1 samples.
    trainer = make_trainer(
        tmp_path, rows=Rows(9), eval_rows=Rows(4), callbacks=[Ends()], max_steps=9, logging_steps=3,
        logging_first_step=False, eval_strategy="steps", eval_steps=2, save_steps=4,
    )  # fmt: skip

    def takes(seconds, name, see=lambda *_: None):
        real = getattr(trainer, name)

        def slow(*args, **kwargs):
            clock.now += seconds
            see(*args)
            return real(*args, **kwargs)

        monkeypatch.setattr(trainer, name, slow)

    takes(1, "training_step", lambda model, inputs, *_: shapes.append(inputs["input_ids"].shape))
    takes(100, "prediction_step")
    takes(1000, "_save_optimizer_and_scheduler")
    trainer.train()
    assert [rows for rows, _ in shapes[:5]] == [2, 2, 2, 2, 1]
    windows = [shapes[ends[0] : ends[2]], shapes[ends[2] : ends[5]], shapes[ends[5] : ends[8]]]  # less the first step
    tokens = [sum(rows * length for rows, length in window) / len(window) for window in windows]
    samples = [sum(rows for rows, _ in window) / len(window) for window in windows]
    assert losses_of(trainer, "tokens_per_second") == pytest.approx(tokens)
    assert losses_of(trainer, "samples_per_second") == pytest.approx(samples)
    assert losses_of(trainer, "tokens")[-1] == sum(rows * length for rows, length in shapes)


def test_counts_are_in_the_order_of_the_streams(tmp_path):
    trainer = make_trainer(tmp_path, rows=Rows(count=4, spoken=True))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    counts = trainer._get_num_items_in_batch([batch, batch], torch.device("cpu"))
    text = (batch["labels"][:, 1:] != -100).sum().item() * 2
    spoken = (batch["external_text_targets"][:, 1:] != -100).sum().item() * 2
    assert counts.tolist() == [text, spoken] + [0] * 5
