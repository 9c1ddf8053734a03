"""torch.compile in training: no compilation after the first steps, eager training where the compiler fails, the cache.

Graphs run as they were traced and not through inductor, which would need a C++ compiler; they are compiled at the same
steps.
"""

import os

import pytest
import torch
from creatures import micro_config
from test_trainer import TEXT_ONLY, Rows, assert_same, losses_of, make_trainer, weights_of
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from creature import optimizer, plan
from creature.compiling import pad_batch, with_eager_fallback
from creature.fast import kernels
from creature.hardware import Device
from creature.launch import keep_compiled_code


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing compiled before and nothing kept; at the end, what a fallback switched off is on again."""
    monkeypatch.setattr(kernels, "triton", kernels.triton)
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):  # set by TrainingArguments
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def use_backend(monkeypatch, backend):
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", backend)


def compiles(graph, inputs, **settings):
    return graph.forward


def fails(graph, inputs, **settings):
    raise OSError("cc1plus: fatal error: Python.h: No such file or directory")


def dropout_config():
    return micro_config(loss_weights=dict(TEXT_ONLY), attention_dropout=0.2)


class Graphs(TrainerCallback):
    """The number of graphs compiled by the end of each step."""

    def __init__(self):
        self.counts = []

    def on_step_end(self, args, state, control, **kwargs):
        self.counts.append(counters["stats"]["unique_graphs"])


def test_nothing_is_compiled_after_the_first_steps(tmp_path, monkeypatch):
    """A new rate each step, accumulation, a short last batch, and evaluations (which run uncompiled) in between."""
    use_backend(monkeypatch, compiles)
    graphs = Graphs()
    settings = dict(eval_strategy="steps", eval_steps=1, max_steps=8, warmup_steps=4)
    trainer = make_trainer(
        tmp_path, rows=Rows(13), eval_rows=Rows(7, seed=1), callbacks=[graphs], torch_compile=True, **settings
    )
    trainer.train()
    rates = losses_of(trainer, "learning_rate")
    assert len(set(rates)) > 4
    # The model, Muon once for each of the four shapes, and the rows of the table; the model once more where the batch
    # warm-up, and with it what text learns further ahead, is over.
    assert graphs.counts == 2 * [6] + 6 * [7]
    plain = make_trainer(tmp_path, rows=Rows(13), eval_rows=Rows(7, seed=1), **settings)
    plain.train()
    assert losses_of(trainer) == pytest.approx(losses_of(plain), abs=1e-5)
    assert losses_of(trainer, "eval_loss") == pytest.approx(losses_of(plain, "eval_loss"), abs=1e-5)


def test_compiled_steps_of_a_table_in_parts_are_the_plain_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(optimizer, "_CACHED", 50 * 32)  # as a CPU takes a large table; the last part is shorter
    use_backend(monkeypatch, compiles)
    compiled, plain = (make_trainer(tmp_path, max_steps=4, torch_compile=flag) for flag in (True, False))
    compiled.train()
    plain.train()
    assert losses_of(compiled) == pytest.approx(losses_of(plain), abs=1e-5)


def test_padding_rows_have_no_targets():
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.ones(2, 4, dtype=torch.long)}
    filled = pad_batch(batch, 5)
    assert filled["input_ids"].shape == filled["labels"].shape == (5, 4)
    assert (filled["labels"][2:] == -100).all() and (filled["labels"][:2] == 1).all()
    assert pad_batch(batch, 2) is batch
    seen = batch | {"touch_mask": torch.ones(2, 4, 1, dtype=torch.bool)}
    assert pad_batch(seen, 5) is seen


def test_a_failing_compiler_prints_one_line_and_changes_nothing(tmp_path, monkeypatch, capsys):
    settings = dict(eval_strategy="steps", eval_steps=2, max_steps=3)
    plain = make_trainer(tmp_path, config=dropout_config(), eval_rows=Rows(3, seed=1), **settings)
    plain.train()
    use_backend(monkeypatch, fails)
    capsys.readouterr()
    trainer = make_trainer(tmp_path, config=dropout_config(), eval_rows=Rows(3, seed=1), torch_compile=True, **settings)
    trainer.train()
    printed = [line for line in capsys.readouterr().out.splitlines() if "torch.compile" in line]
    assert len(printed) == 1 and "Python.h" in printed[0] and "--torch_compile false" in printed[0]
    assert_same(weights_of(plain), weights_of(trainer))
    for key in ("loss", "loss_internal_text", "grad_norm", "eval_loss"):
        assert losses_of(plain, key) == losses_of(trainer, key), key
    assert kernels.triton is None


@pytest.mark.parametrize("when", ["backward", "optimizer"])
def test_a_compiler_that_fails_in_a_later_pass_changes_nothing(tmp_path, monkeypatch, capsys, when):
    settings = dict(eval_strategy="steps", eval_steps=1, max_steps=2)
    plain = make_trainer(tmp_path, config=dropout_config(), eval_rows=Rows(3, seed=1), **settings)
    plain.train()
    calls = []

    def fails_late(graph, inputs, **settings):
        calls.append(graph)
        if len(calls) == {"backward": 1, "optimizer": 2}[when]:
            if when == "backward":
                return lambda *args: graph.forward(*_break_first(args))
            fails(graph, inputs)
        return graph.forward

    use_backend(monkeypatch, fails_late)
    trainer = make_trainer(tmp_path, config=dropout_config(), eval_rows=Rows(3, seed=1), torch_compile=True, **settings)
    trainer.train()
    assert capsys.readouterr().out.count("torch.compile failed") == 1
    for key in ("loss", "loss_internal_text", "grad_norm", "eval_loss"):
        assert losses_of(plain, key) == pytest.approx(losses_of(trainer, key), abs=1e-5), key


class _BreaksBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("ptxas fatal error: broken")


def _break_first(args):
    """The first parameter, the token table, breaks in the backward pass, when others have their gradients."""
    table = next(value for value in args if isinstance(value, torch.Tensor) and value.requires_grad)
    return [_BreaksBackward.apply(value) if value is table else value for value in args]


def test_errors_of_the_code_itself_are_raised():
    def broken():
        raise RuntimeError("the data is broken")

    with pytest.raises(RuntimeError, match="the data is broken"):
        with_eager_fallback(broken)
    with pytest.raises(RuntimeError, match="the data is broken"):
        with_eager_fallback(broken, undo=lambda: None)
    undone = []

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        with_eager_fallback(full, undo=lambda: undone.append(1))
    assert not undone


def test_compiled_code_is_kept_outside_the_temporary_folder_unless_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels"))
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "own")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "kernels")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "home" / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "home" / "inductor" / "triton")
    assert (tmp_path / "home" / "inductor").is_dir()
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))  # cannot be a folder
    keep_compiled_code()
    assert not {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"} & os.environ.keys()


def test_a_gpu_without_triton_or_compiler_trains_without_both(monkeypatch):
    gpu = Device("cuda", "NVIDIA GeForce RTX 3090", 24 * 2**30, 23 * 2**30, 8, True, 1, (8, 6))
    monkeypatch.setattr("creature.hardware.triton_available", lambda: True)
    monkeypatch.setattr(kernels, "triton", object())
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    works, reason, note = plan._find_compiler({}, gpu, dry_run=False)
    assert not works and "C compiler" in reason and note == f"torch.compile is off: {reason}"
    assert kernels.triton is None
