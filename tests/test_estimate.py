"""The estimate against real models: parameters, FLOPs, and the memory of training steps, on the CPU and as measured."""

import json
import weakref
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from configuration_creature import SENSES, STREAMS, CreatureConfig
from creature.errors import UserError
from creature.estimate import (
    all_reduce_seconds,
    count_parameters,
    data_parallel_speed,
    expected_mfu,
    fit_micro_batch,
    flops_per_token,
    matmul_flops,
    memory_parts,
    tokens_per_second,
)
from creature.estimate_senses import made_up_batch
from creature.hardware import Device
from creature.optimizer import MuonAdamW, parameter_groups
from creature.settings import CONFIGS, parse_settings
from modeling_creature import MultiModalCreature

GPU = Device("cuda", "NVIDIA GeForce RTX 3090", 24 * 2**30, 23 * 2**30, 8, True, 1, (8, 6))
H100 = Device("cuda", "NVIDIA H100 80GB HBM3", 80 * 2**30, 79 * 2**30, 8, True, 1, (9, 0))
CPU = Device("cpu", "a CPU", 16 * 2**30, 12 * 2**30, 4, False)


def micro_config(**changes) -> CreatureConfig:
    sizes = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "sense_hidden_size": 16,
        "num_touch_points": 16,
        "vision_channels": [4, 8, 12, 24],
        "depth_hidden_size": 16,
        "audio_codebook_size": 32,
    }
    return CreatureConfig(**(sizes | changes))


def test_parameters_of_the_guides_creature():
    counts = count_parameters(CreatureConfig())
    assert counts["token_table"] == 50304 * 512
    matrices = 6 * (4 * 512 * 512 + 2 * 512 * 2048)
    assert matrices < counts["body"] < 1.001 * matrices  # norms and other vectors add less than 0.1 %
    assert counts["head"] == 0
    assert counts["text_only"] == counts["token_table"] + counts["body"] == counts["trainable"]
    assert counts["total"] == counts["text_only"] + counts["senses"] + counts["streams"]


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"num_key_value_heads": 2}])
def test_parameters_equal_the_built_model(changes):
    config = micro_config(**changes)
    model = MultiModalCreature(config)
    counts = count_parameters(config)
    assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())
    model.train_only()
    assert counts["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts["head"] == (0 if config.tie_word_embeddings else 512 * 64)
    assert counts["text_only"] == counts["token_table"] + counts["body"] + counts["head"]


def test_a_stream_with_a_weight_is_trained():
    more = count_parameters(micro_config(loss_weights={"internal_text": 1.0, "audio": 0.5}))
    less = count_parameters(micro_config())
    assert more["trainable"] > less["trainable"] and more["total"] == less["total"]


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, {"head_dim": 32}])
def test_flops_against_a_counter(changes):
    """torch's counter counts all of attention, the formula the causal half."""
    config = micro_config(attn_implementation="eager", **changes)
    model = MultiModalCreature(config).eval()
    block = 128
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, block, dtype=torch.long))
    width = config.num_attention_heads * config.head_dim
    skipped = 2 * config.num_hidden_layers * width * block  # the upper half of scores and their use, per token
    assert 3 * (counter.get_total_flops() / block - skipped) == pytest.approx(flops_per_token(config, block), rel=0.01)


def test_flops_of_the_guides_creature():
    assert flops_per_token(CreatureConfig(), 2048) == pytest.approx(0.305e9, rel=0.005)


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors alive at one time, like torch.cuda.max_memory_allocated."""

    def __init__(self, tensors):
        super().__init__()
        self.live, self.now, self.peak = {}, 0, 0
        for tensor in tensors:
            self._track(tensor)

    def _track(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.live:
            self.live[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key):
        self.now -= self.live.pop(key, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._track(leaf)
        return out


def real_peak(config, batch, block, precision, optimizer, accumulation, checkpointing):
    model = MultiModalCreature(config).train()
    model.train_only()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # the only name in transformers 5.17
    groups = parameter_groups(model, 1e-3, 1e-2, 0.1)
    for group in groups:
        group["muon"] = group["muon"] and optimizer == "muon"
    stepper = MuonAdamW(groups)
    ids = torch.randint(0, config.vocab_size, (batch, block))
    with PeakMemory(model.parameters()) as memory:
        for _ in range(2):  # the optimizer's states exist after the first step
            for _ in range(accumulation):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                    loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                del loss
            stepper.step()
            stepper.zero_grad()
    return memory.peak


@pytest.mark.parametrize(
    ("batch", "block", "precision", "optimizer", "accumulation", "checkpointing", "changes"),
    [
        (4, 256, "fp32", "adamw", 1, False, {}),
        (2, 256, "bf16", "muon", 2, False, {}),
        (1, 256, "bf16", "muon", 2, False, {"vocab_size": 50304, "hidden_size": 32}),  # mostly the head
        (1, 32, "fp32", "muon", 1, False, {"hidden_size": 256, "intermediate_size": 1024}),  # mostly the weights
        (4, 256, "fp32", "adamw", 1, False, {"num_key_value_heads": 2, "hidden_act": "gelu"}),
        (4, 256, "bf16", "muon", 1, True, {"num_hidden_layers": 8}),
        (1, 1024, "bf16", "muon", 1, False, {"max_position_embeddings": 1024}),  # long
        (1, 128, "bf16", "muon", 2, False, {"num_hidden_layers": 24}),  # deep
        (1, 128, "bf16", "muon", 2, False, {"hidden_size": 384, "intermediate_size": 1536}),  # wide
    ],
)
def test_memory_of_a_real_step(batch, block, precision, optimizer, accumulation, checkpointing, changes):
    torch.manual_seed(0)
    config = micro_config(**changes)
    real = real_peak(config, batch, block, precision, optimizer, accumulation, checkpointing)
    parts = memory_parts(config, batch, block, CPU, precision, optimizer, activation_checkpointing=checkpointing)
    assert parts["peak"] == pytest.approx(real, rel=0.1)


def test_memory_parts():
    config = CreatureConfig()
    parts = memory_parts(config, 32, 2048, H100, compiled=True)
    counts = count_parameters(config)
    assert parts["weights"] == 4 * counts["total"]
    assert parts["gradients"] == 4 * counts["text_only"]
    assert parts["peak"] == sum(size for name, size in parts.items() if name not in ("optimizer_step", "peak"))
    # The design's limit for the guide's batch, and no tensor of all tokens times the vocabulary in it.
    assert parts["peak"] < 12e9 and parts["head"] < 32 * 2048 * 50304 * 2
    adamw = memory_parts(config, 32, 2048, H100, optimizer="adamw", compiled=True)
    assert adamw["optimizer_state"] == 8 * counts["text_only"] > parts["optimizer_state"]
    eager = memory_parts(config, 32, 2048, H100)
    assert memory_parts(config, 32, 2048, H100, "fp32")["activations"] > eager["activations"] > parts["activations"]


@pytest.mark.parametrize(
    ("precision", "optimizer", "message"),
    [("int8", "muon", "unknown precision 'int8': use one of bf16"), ("bf16", "sgd", "unknown optimizer")],
)
def test_unknown_precisions_and_optimizers_are_refused(precision, optimizer, message):
    with pytest.raises(UserError, match=message):
        memory_parts(micro_config(), 1, 8, CPU, precision, optimizer)


@pytest.mark.parametrize(
    ("configuration", "micro_batch", "tokens_a_second", "gib"),
    [("small", 32, 544_292, 19.62), ("medium", 32, 190_224, 46.47), ("1b", 16, 74_901, 50.45)],
)
def test_the_estimate_of_steps_that_were_measured(configuration, micro_batch, tokens_a_second, gib):
    """On an H100 (docs/results.md)."""
    config = CreatureConfig(**parse_settings(["--config", str(CONFIGS / f"{configuration}_config.yaml")]).model)
    assert tokens_per_second(config, 2048, H100.name) == pytest.approx(tokens_a_second, rel=0.05)
    assert memory_parts(config, micro_batch, 2048, H100, compiled=True)["peak"] / 2**30 == pytest.approx(gib, rel=0.05)


def test_speed_and_where_it_is_from():
    config = CreatureConfig()
    for card, peak, source in (("RTX 3090", 71.2e12, "assumed"), ("H100 SXM", 989e12, "measured")):
        mfu, said = expected_mfu(card)
        assert said == source and 0.2 < mfu < 0.6
        speed = tokens_per_second(config, 2048, f"NVIDIA {card}")
        assert speed * flops_per_token(config, 2048) == pytest.approx(mfu * peak)
    assert tokens_per_second(config, 2048, "RTX 3090 Laptop GPU") is None


def test_matmul_is_timed():
    assert 1e8 < matmul_flops("cpu", "fp32", seconds=0.05) < 1e15


def test_batch_fits_the_memory():
    config = CreatureConfig()
    batch = fit_micro_batch(config, 2048, GPU, "bf16", compiled=True)
    assert batch & (batch - 1) == 0
    assert memory_parts(config, batch, 2048, GPU, "bf16", compiled=True)["peak"] <= 0.9 * GPU.free_bytes
    assert memory_parts(config, 2 * batch, 2048, GPU, "bf16", compiled=True)["peak"] > 0.9 * GPU.free_bytes
    assert fit_micro_batch(config, 2048, replace(GPU, free_bytes=6 * 2**30), "bf16", compiled=True) < batch
    assert fit_micro_batch(config, 2048, GPU, "bf16", compiled=True, limit=8) == 8
    checkpointed = fit_micro_batch(config, 2048, GPU, "bf16", compiled=True, activation_checkpointing=True)
    assert checkpointed > batch


def test_the_guides_batch_fits_an_rtx_3090():
    assert fit_micro_batch(CreatureConfig(), 2048, GPU, "bf16", compiled=True) >= 32


def test_small_machines():
    config = CreatureConfig()
    assert fit_micro_batch(config, 2048, CPU, "fp32") in (1, 2)
    assert fit_micro_batch(config, 2048, replace(CPU, free_bytes=2**28), "fp32") == 0


# ---------------------------------------------------------------------------------------------------------------------
# Senses and streams
# ---------------------------------------------------------------------------------------------------------------------

ROWS, TICKS = 2, 64
TEXT_ROUND = (("internal_voice",), ("internal_text",))
ROUNDS = {
    "hear": (("internal_voice", "audio"), ("internal_text",)),
    "see": (("internal_voice", "vision"), ("internal_text",)),
    "touch": (("internal_voice", "touch"), ("internal_text",)),
    "move": (("proprioception", "vision"), ("animation",)),
    "whole": (SENSES, STREAMS),
}


def round_of(name, backbone):
    """The configuration and the rest of a round, and a batch with every sense and target of it at every tick."""
    senses, streams = ROUNDS[name]
    config = micro_config(loss_weights=dict.fromkeys(streams, 1.0))
    torch.manual_seed(0)
    model = MultiModalCreature(config).train()
    model.train_only(senses, streams, backbone)
    ids = torch.randint(0, config.vocab_size, (ROWS, TICKS))
    batch = {"input_ids": ids} | ({"labels": ids} if "internal_text" in streams else {})
    batch |= made_up_batch(config, senses, streams, TICKS, ROWS)
    return config, model, batch, {"senses": senses, "streams": streams, "backbone": backbone}


@pytest.mark.parametrize("backbone", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ROUNDS)
def test_bytes_kept_in_a_real_step_with_senses(name, precision, backbone):
    config, model, batch, trained = round_of(name, backbone)
    others = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers(), *batch.values())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in others:
            kept[storage._cdata] = storage
        return tensor

    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch)
    real = sum(storage.nbytes() for storage in kept.values())
    parts = memory_parts(config, ROWS, TICKS, CPU, precision, **trained)
    wide, width = (4 if precision == "fp32" else 2), config.hidden_size
    # The chunked loss keeps the gradients of what it reads: the hidden states and, for each text, the head.
    texts = {*trained["streams"]} & {"internal_text", "external_text"}
    heads = 4 * config.vocab_size * width * len(texts) * backbone
    heads += ROWS * TICKS * wide * width * ("internal_text" in texts)
    assert parts["activations"] + parts["weight_copies"] + heads == pytest.approx(real, rel=0.1)
    assert parts["batch"] == sum(value.nbytes for key, value in batch.items() if key not in ("input_ids", "labels"))


@pytest.mark.parametrize("backbone", [True, False])
@pytest.mark.parametrize("name", ROUNDS)
def test_flops_of_a_real_step_with_senses(name, backbone):
    config, model, batch, trained = round_of(name, backbone)
    model.set_attn_implementation("eager")  # torch counts attention on the CPU only where it is written out
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    width = config.num_attention_heads * config.head_dim
    skipped = 6 * config.num_hidden_layers * width * TICKS  # the upper half of scores and their use, per tick
    real = counter.get_total_flops() / ROWS / TICKS - skipped
    assert flops_per_token(config, TICKS, **trained) == pytest.approx(real, rel=0.05)


def test_the_peak_of_a_round_with_all_senses():
    config, model, batch, trained = round_of("whole", True)
    stepper = MuonAdamW(parameter_groups(model, 1e-3, 1e-2, 0.1))
    with PeakMemory([*model.parameters(), *batch.values()]) as memory:
        for _ in range(2):
            model(**batch).loss.backward()
            stepper.step()
            stepper.zero_grad()
    assert memory_parts(config, ROWS, TICKS, CPU, "fp32", **trained)["peak"] == pytest.approx(memory.peak, rel=0.15)


def test_a_sliding_window_counts():
    config, windowed = micro_config(), micro_config(sliding_window=32)
    seen = sum(min(tick + 1, 32) for tick in range(256)) / 256
    saved = flops_per_token(config, 256) - flops_per_token(windowed, 256)
    width = config.num_attention_heads * config.head_dim
    assert saved == pytest.approx(12 * 3 * width * (128 - seen), rel=0.01)
    assert flops_per_token(windowed, 16) == flops_per_token(config, 16)


def test_a_round_on_text_measures_nothing(monkeypatch):
    def measured(*arguments):
        raise AssertionError("a step was made")

    monkeypatch.setattr("creature.estimate.tick_costs", measured)
    assert memory_parts(micro_config(), 1, 64, CPU)["batch"] == 0
    assert flops_per_token(micro_config(), 64) == flops_per_token(micro_config(), 64, *TEXT_ROUND)
    with pytest.raises(AssertionError, match="a step was made"):
        flops_per_token(micro_config(), 64, ("audio",))


def test_fewer_clips_with_pictures_fit():
    small = {"device": replace(GPU, free_bytes=6 * 2**30), "precision": "bf16"}
    config = CreatureConfig()
    assert fit_micro_batch(config, 256, **small) > fit_micro_batch(
        config, 256, **small, senses=("internal_voice", "vision")
    )


def test_frozen_parts_have_no_gradients():
    config = micro_config()
    counts = count_parameters(config, ("audio",), ("animation",), backbone=False)
    assert 0 < counts["trainable"] < counts["senses"] + counts["streams"]
    assert count_parameters(config, ("audio",), ("animation",))["trainable"] > counts["trainable"] + counts["body"] / 2


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        ({"senses": ("hearing",)}, "unknown sense 'hearing': use some of internal_voice, external_voice, audio"),
        ({"streams": ("voice",)}, "unknown stream 'voice': use some of internal_text"),
        ({"senses": ("vision",)}, r"the sense vision is not one of this creature's \(num_cameras is 0\): leave it out"),
    ],
)
def test_senses_that_are_not_there_are_refused(trained, message):
    with pytest.raises(UserError, match=message):
        flops_per_token(micro_config(num_cameras=0), 64, **trained)


def test_several_cards_divide_a_step_and_wait_for_their_gradients():
    gradients = 4e9  # bytes: of 1e9 weights
    assert all_reduce_seconds(10**9, 1, link=1e9) == 0
    assert all_reduce_seconds(10**9, 2, link=1e9) == pytest.approx(gradients / 1e9)
    assert all_reduce_seconds(10**9, 8, link=1e9) == pytest.approx(1.75 * gradients / 1e9)
    # 1,000 tokens at 100 a second on each of two cards take 5 s, and the gradients 3 s.
    assert data_parallel_speed(100.0, 1000, cards=2, reduce_seconds=3.0) == pytest.approx(1000 / 8)
    assert data_parallel_speed(100.0, 1000, cards=2, reduce_seconds=0.0) == pytest.approx(200.0)


def test_a_finished_run_is_compared_with_its_estimate(tmp_path):
    from creature.finalize import compare_speed

    run = {"tokens": 1_000_000, "expected_seconds": 10.0, "device": "RTX 3090"}
    logs = [{"step": 1}, *({"step": step, "tokens_per_second": 1000 * step} for step in (40, 90, 120))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, logs)) + "\n")
    assert compare_speed(run, tmp_path) == "; 90,000 tokens/s, 0.90 times the estimate for RTX 3090"
    assert compare_speed(run | {"expected_seconds": None}, tmp_path) == ""
