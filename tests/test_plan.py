"""What a run does on this machine: its device, batch, learning rate, and whether steps are recorded."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from configuration_creature import CreatureConfig
from creature.errors import UserError
from creature.hardware import GIB, Device
from creature.plan import plan_run, training_values
from creature.settings import DataArguments, Settings, parse_settings


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = parse_settings(["--max_steps", "20"])
    config = SimpleNamespace(max_position_embeddings=2048, hidden_size=512)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=7 names a GPU that is not there"):
        plan_run(settings, config)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("WORLD_SIZE", "4")
    if not torch.backends.mps.is_available():
        with pytest.raises(UserError, match="4 processes were started to train on GPUs"):
            plan_run(settings, config)


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({}, (65536, 2, 16)),  # what fits, and the accumulation that follows
        ({"per_device_train_batch_size": 8}, (65536, 8, 4)),
        ({"gradient_accumulation_steps": 4}, (65536, 8, 4)),
        ({"tokens_per_step": 4096, "per_device_train_batch_size": 2}, (4096, 2, 1)),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, (16384, 4, 2)),
    ],
)
def test_the_batch_is_counted_in_tokens(monkeypatch, training, expected):
    monkeypatch.setattr("creature.plan.fit_micro_batch", lambda *args, **kwargs: 3)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    settings = Settings(training={"use_cpu": True, "max_steps": 50} | training, given=frozenset(training))
    plan = plan_run(settings, SimpleNamespace(max_position_embeddings=2048, hidden_size=512))
    assert (plan.tokens_per_step, plan.micro_batch, plan.accumulation) == expected


H100 = Device("cuda", "NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, cores=16, bf16=True, capability=(9, 0))


@pytest.mark.parametrize(
    ("changes", "training", "data", "recorded"),
    [
        ({}, {}, {}, True),
        ({"name": "NVIDIA GeForce RTX 3090", "capability": (8, 6)}, {}, {}, False),  # slower than its host
        ({"name": "NVIDIA Unheard of"}, {}, {}, False),
        ({"free_bytes": 16 * GIB}, {}, {}, False),
        ({}, {"torch_compile_mode": "default"}, {}, False),
        ({}, {"torch_compile": False}, {}, False),
        ({}, {"activation_checkpointing": True}, {}, False),
        ({}, {"gradient_checkpointing": True}, {}, False),
        ({}, {"per_device_train_batch_size": 16}, {}, False),  # accumulates
        ({}, {}, {"separate_documents": True}, False),
    ],
)
def test_steps_that_a_host_would_hold_up_are_recorded_as_cuda_graphs(monkeypatch, changes, training, data, recorded):
    device = replace(H100, **changes)
    monkeypatch.setattr("creature.plan._find_device", lambda *arguments: device)
    monkeypatch.setattr("creature.plan.compiler_available", lambda device: (True, "it is there"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    settings = Settings(training={"max_steps": 50} | training, data=DataArguments(**data), given=frozenset(training))
    plan = plan_run(settings, CreatureConfig())
    mode = training_values(settings, plan).get("torch_compile_mode")
    assert mode == ("reduce-overhead" if recorded else training.get("torch_compile_mode"))
    assert ("CUDA graphs" in plan.compile_reason) == recorded


@pytest.mark.parametrize(("sharded", "recorded"), [("false", True), ("true", False)])
def test_steps_of_two_processes_are_recorded_too_unless_they_are_sharded(monkeypatch, sharded, recorded):
    monkeypatch.setattr("creature.plan._find_device", lambda *arguments: H100)
    monkeypatch.setattr("creature.plan.compiler_available", lambda device: (True, "it is there"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", sharded)
    plan = plan_run(Settings(training={"max_steps": 50, "tokens_per_step": 131072}), CreatureConfig())
    assert (plan.micro_batch, plan.accumulation) == (32, 1)
    assert ("CUDA graphs" in plan.compile_reason) == recorded


@pytest.mark.parametrize(
    ("flags", "works", "compiled", "said"),
    [
        (["--dry_run"], True, False, "does not wait for the compiler; --torch_compile has"),
        (["--max_steps", "10"], True, False, "does not wait for the compiler; --torch_compile has"),
        (["--dry_run", "--torch_compile"], True, True, "it is there"),
        (["--dry_run", "--torch_compile_mode", "default"], True, True, "it is there"),
        (["--dry_run"], False, False, "no Triton"),  # which the real run would miss
        (["--max_steps", "11"], True, True, "it is there"),
    ],
)
def test_a_dry_run_on_a_gpu_is_compiled_only_where_that_is_asked_for(monkeypatch, flags, works, compiled, said):
    monkeypatch.setattr("creature.plan._find_device", lambda *arguments: H100)
    found = (True, "it is there") if works else (False, "no Triton")
    monkeypatch.setattr("creature.plan.compiler_available", lambda device: found)
    monkeypatch.setattr("creature.fast.disable", lambda: None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    settings = parse_settings(flags)
    plan = plan_run(settings, CreatureConfig())
    assert plan.compiled == training_values(settings, plan)["torch_compile"] == compiled
    assert said in plan.compile_reason and any(said in note for note in plan.notes) == (not works)


def test_a_dry_run_on_a_cpu_says_what_it_scaled_down(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    settings = parse_settings(["--dry_run", "--use_cpu"])
    plan = plan_run(settings, SimpleNamespace(max_position_embeddings=2048, hidden_size=512))
    assert (plan.tokens_per_step, plan.micro_batch, plan.accumulation) == (2048, 1, 1)
    assert any("instead of 65,536 tokens" in note and "--tokens_per_step" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("training", "width", "expected"),
    [
        ({}, 512, 8e-3),
        ({}, 2048, 4e-3),  # the root of the width
        ({"matrix_learning_rate": 0.0}, 512, 2e-3),  # AdamW alone
        ({"learning_rate": 1e-3}, 2048, 1e-3),
    ],
)
def test_the_learning_rate_follows_from_the_width(monkeypatch, training, width, expected):
    monkeypatch.setattr("creature.plan.fit_micro_batch", lambda *args, **kwargs: 1)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    settings = Settings(training={"use_cpu": True, "max_steps": 50} | training, given=frozenset(training))
    plan = plan_run(settings, SimpleNamespace(max_position_embeddings=2048, hidden_size=width))
    assert training_values(settings, plan)["learning_rate"] == pytest.approx(expected)
