"""The estimate against the real thing: counted parameters and FLOPs, and the memory of a training step on the CPU."""

import importlib.util
import re
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from configuration_creature import CreatureConfig
from creature.errors import UserError
from creature.estimate import (
    MEASURED_SHARES,
    card_shares,
    count_parameters,
    fit_micro_batch,
    flops_per_token,
    ideal_seconds,
    layer_bytes_per_token,
    matmul_flops,
    memory_parts,
    step_seconds,
    tokens_per_second,
)
from creature.hardware import Device
from creature.optimizer import MuonAdamW, parameter_groups
from modeling_creature import MultiModalCreature

PROJECT = Path(__file__).resolve().parent.parent


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
        "vision_hidden_size": 24,
        "vision_num_layers": 1,
        "depth_hidden_size": 16,
        "audio_codebook_size": 32,
    }
    return CreatureConfig(**(sizes | changes))


def test_parameters_of_the_guides_creature():
    counts = count_parameters(CreatureConfig())
    assert counts["token_table"] == 50304 * 512
    matrices = 6 * (4 * 512 * 512 + 2 * 512 * 2048)
    assert matrices < counts["body"] < 1.001 * matrices  # norms and other vectors are small change
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
    """torch's counter sees every product of a forward pass; it counts attention in full, the formula half of it."""
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
    """The most bytes of tensors alive at one time: what a CUDA device would call max_memory_allocated."""

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
        model.gradient_checkpointing_enable({"use_reentrant": False})  # 5.17 knows no other name for it
    groups = parameter_groups(model, 1e-3, 1e-2, 0.1)
    for group in groups:
        group["muon"] = group["muon"] and optimizer == "muon"
    stepper = MuonAdamW(groups)
    ids = torch.randint(0, config.vocab_size, (batch, block))
    with PeakMemory(model.parameters()) as memory:
        for _ in range(2):  # the optimizer's states exist from the end of the first step
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
        (1, 256, "bf16", "muon", 2, False, {"vocab_size": 50304, "hidden_size": 32}),  # the head weighs most
        (1, 32, "fp32", "muon", 1, False, {"hidden_size": 256, "intermediate_size": 1024}),  # the weights do
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
    parts = memory_parts(
        config,
        batch,
        block,
        precision,
        optimizer,
        device_kind="cpu",
        activation_checkpointing=checkpointing,
        accumulating=accumulation > 1,
    )
    assert parts["peak"] == pytest.approx(real, rel=0.1)


def test_memory_parts():
    config = CreatureConfig()
    parts = memory_parts(config, 32, 2048)
    counts = count_parameters(config)
    assert parts["weights"] == 4 * counts["total"]
    assert parts["gradients"] == 4 * counts["text_only"]
    assert parts["peak"] == sum(size for name, size in parts.items() if name not in ("optimizer_step", "peak"))
    adamw = memory_parts(config, 32, 2048, optimizer="adamw")
    assert adamw["optimizer_state"] == 8 * counts["text_only"] > parts["optimizer_state"]
    assert memory_parts(config, 32, 2048, "fp32")["activations"] > parts["activations"]
    assert layer_bytes_per_token(config, "bf16", compiled=True) < layer_bytes_per_token(config, "bf16")
    # The design's limit for the guide's batch, and no tensor of all tokens times the vocabulary in it.
    compiled = memory_parts(config, 32, 2048, compiled=True)
    assert compiled["peak"] < 12e9 and compiled["head"] < 32 * 2048 * 50304 * 2


def test_bad_names_are_told():
    with pytest.raises(UserError, match="unknown precision 'int8': use one of bf16"):
        memory_parts(micro_config(), 1, 8, "int8")
    with pytest.raises(UserError, match="unknown optimizer"):
        memory_parts(micro_config(), 1, 8, optimizer="sgd")


@pytest.fixture
def scaling(monkeypatch):
    """benchmarks/scaling.py as a module."""
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # whose first entry the benchmark replaces
    spec = importlib.util.spec_from_file_location("scaling", PROJECT / "benchmarks" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "row, micro_batch, accumulation, milliseconds, gib",
    [
        ("small", 32, 1, 120.4, 19.62),
        ("medium", 32, 1, 344.5, 46.47),
        ("1b", 16, 2, 875.0, 50.45),
    ],
)
def test_the_estimate_of_steps_that_were_measured(scaling, row, micro_batch, accumulation, milliseconds, gib):
    """On an H100 (docs/results.md)."""
    config, context = scaling.build_config(row), scaling.ROWS[row][1]
    step = step_seconds(config, micro_batch, context, "NVIDIA H100 80GB HBM3", accumulation)
    assert 1000 * step == pytest.approx(milliseconds, rel=0.05)
    form = {"compiled": True, "float8": True, "accumulating": accumulation > 1}
    assert memory_parts(config, micro_batch, context, **form)["peak"] / 2**30 == pytest.approx(gib, rel=0.05)


def test_a_step_is_the_sum_of_its_parts():
    ideal, shares = ideal_seconds(CreatureConfig(), 32, 2048, "H100 SXM"), MEASURED_SHARES["H100 SXM"]
    parts = [seconds / getattr(shares, name) for name, seconds in ideal.items()]
    assert step_seconds(CreatureConfig(), 32, 2048, "H100 SXM") == pytest.approx(sum(parts) + shares.overhead)


def test_ideal_seconds_grow_with_what_they_count():
    config = CreatureConfig()
    one = ideal_seconds(config, 8, 2048, "H200")
    # Four times the accumulation is four times everything but the optimizer's share of products and weights.
    four = ideal_seconds(config, 8, 2048, "H200", accumulation=4)
    for name in ("head", "attention", "layers"):
        assert four[name] == pytest.approx(4 * one[name])
    assert one["products"] < four["products"] < 4 * one["products"]
    assert one["weights"] < four["weights"] < 4 * one["weights"]
    # The head's arithmetic is that of flops_per_token, and the body's too once AdamW leaves it alone.
    adamw = ideal_seconds(config, 8, 2048, "H200", optimizer="adamw")
    tokens, rate = 8 * 2048, 989e12
    assert one["head"] == pytest.approx(6 * tokens * 50304 * 512 / rate)
    assert adamw["products"] == pytest.approx(6 * tokens * 6 * (4 * 512**2 + 2 * 512 * 2048) / rate)
    assert adamw["weights"] < one["weights"]
    # The same tokens in longer blocks: attention alone takes longer.
    longer = ideal_seconds(config, 2, 8192, "H200")
    assert 3 < longer.pop("attention") / one.pop("attention") < 4
    assert longer == pytest.approx(one)
    deeper = ideal_seconds(micro_config(num_hidden_layers=6), 8, 256, "H200")
    assert deeper["layers"] < 2 * ideal_seconds(micro_config(), 8, 256, "H200")["layers"]


def test_narrow_products_are_as_long_as_their_operands_take():
    """A product of width 64 is bound by memory on every card: its time follows the bandwidth, not the rate."""
    slow, fast = (ideal_seconds(micro_config(), 8, 256, card, optimizer="adamw") for card in ("H100 SXM", "H200"))
    assert slow["products"] / fast["products"] == pytest.approx(4800 / 3350)
    slow, fast = (ideal_seconds(CreatureConfig(), 8, 2048, card) for card in ("H100 SXM", "H200"))
    assert slow["head"] == fast["head"]  # 512 columns and 50,304 rows are bound by arithmetic


def test_speed_and_where_it_is_from():
    config = CreatureConfig()
    seconds = step_seconds(config, 8, 2048, "NVIDIA GeForce RTX 3090", accumulation=4)
    speed = tokens_per_second(config, 8, 2048, "NVIDIA GeForce RTX 3090", accumulation=4)
    assert speed == pytest.approx(65536 / seconds)
    assert card_shares("RTX 3090")[1] == "assumed" and card_shares("H100 SXM")[1] == "measured"
    assert 0.2 < speed * flops_per_token(config, 2048) / 71.2e12 < 0.6
    assert tokens_per_second(config, 8, 2048, "RTX 3090 Laptop GPU") is None


def test_scaling_fits_the_shares_to_its_rows(scaling, monkeypatch, capsys):
    # Another card than the one that the present shares are of: slower products, a longer pause.
    real = replace(MEASURED_SHARES["H100 SXM"], products=0.6, head=0.6, layers=0.5, overhead=0.004)
    rows = []
    with monkeypatch.context() as patch:
        patch.setitem(MEASURED_SHARES, "H200", real)
        for name, (_, context) in scaling.ROWS.items():
            batch, accumulation = 16384 // context, 4
            config = scaling.build_config(name)
            seconds = step_seconds(config, batch, context, "H200", accumulation)
            rows.append({"row": name, "card": "NVIDIA H200", "context": context, "micro_batch": batch})
            rows[-1] |= {"accumulation": accumulation, "seconds": seconds, "compiled": True}
            parts = memory_parts(config, batch, context, compiled=True, float8=True)
            rows[-1]["gib"] = (parts["peak"] + 1000 * config.num_hidden_layers * batch * context) / 2**30
    before = [step_seconds(scaling.build_config(r["row"]), r["micro_batch"], r["context"], "H200", 4) for r in rows]
    assert max(abs(b / r["seconds"] - 1) for b, r in zip(before, rows, strict=True)) > 0.1
    scaling.print_fit(rows)
    out = capsys.readouterr().out
    assert out.startswith('    "H200": Shares(products=0.')
    deviations = [float(text) for text in re.findall(r"([+-][\d.]+)%", out)]
    assert len(deviations) == 7 and max(map(abs, deviations)) < 3
    for row, line in zip(rows, out.splitlines()[3:], strict=True):
        found, kept = (int(text.replace(",", "")) for text in line.rsplit("  ", 1)[1].split(", "))
        assert found - kept == pytest.approx(1000, abs=1), row["row"]


def test_matmul_is_timed():
    assert 1e8 < matmul_flops("cpu", "fp32", seconds=0.05) < 1e15


GPU = Device("cuda", "NVIDIA GeForce RTX 3090", 24 * 2**30, 23 * 2**30, 8, True, 1, (8, 6))
CPU = Device("cpu", "a CPU", 16 * 2**30, 12 * 2**30, 4, False)


def test_batch_fits_the_memory():
    config = CreatureConfig()
    batch = fit_micro_batch(config, 2048, GPU, "bf16", compiled=True)
    assert batch & (batch - 1) == 0
    assert memory_parts(config, batch, 2048, "bf16", compiled=True)["peak"] <= 0.9 * GPU.free_bytes
    assert memory_parts(config, 2 * batch, 2048, "bf16", compiled=True)["peak"] > 0.9 * GPU.free_bytes
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
