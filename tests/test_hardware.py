"""The table of cards, whose names match exactly; and the precision, kernel and compiler of a device."""

from dataclasses import replace

import pytest

from creature.errors import UserError
from creature.hardware import (
    CARDS,
    Device,
    attention_kernel,
    card_name,
    choose_precision,
    compiler_available,
    cpu_cores,
    device_info,
    peak_flops,
    system_memory,
)

GPU = Device("cuda", "NVIDIA GeForce RTX 3090", 24 * 2**30, 23 * 2**30, 8, True, 1, (8, 6))
TURING = replace(GPU, name="Tesla T4", bf16=False, capability=(7, 5))
CPU = Device("cpu", "a CPU", 16 * 2**30, 12 * 2**30, 4, False)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA GeForce RTX 3090", 71.2),
        ("NVIDIA GeForce RTX 3090 Ti", 80.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 70),
        ("NVIDIA A40", 149.7),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-32GB", 112),
        ("rtx 3090", 71.2),  # as a person writes it
        ("H100", 989),
    ],
)
def test_known_names(name, teraflops):
    assert peak_flops(name) == teraflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 3090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce GTX 1080 Ti",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "GRID A100D-10C",
        "NVIDIA A10-24Q",
        "NVIDIA RTX 6000",
        "Quadro RTX 6000",
        "AMD Instinct MI300X",
        "Intel(R) Xeon(R) Processor",
        "H2000",
        "",
    ],
)
def test_unknown_names_have_no_rate(name):
    assert peak_flops(name) is None
    assert card_name(name) is None


def test_every_card_is_found_by_its_name():
    for key, card in CARDS.items():
        assert card_name(key) == key
        assert card_name(f"NVIDIA GeForce {key}") == key
        assert 10e12 < card.peak_flops < 3e15 and card.memory_gib >= 8


def test_precision_and_kernel():
    assert choose_precision(GPU)[0] == "bf16"
    assert choose_precision(TURING)[0] == "fp16"
    assert choose_precision(CPU)[0] == "fp32"
    assert attention_kernel(GPU, "bf16")[0] == "flash"
    assert attention_kernel(GPU, "fp32")[0] == "memory-efficient"
    assert attention_kernel(TURING, "fp16")[0] == "memory-efficient"
    assert attention_kernel(CPU, "fp32", "eager")[0] == "eager"
    for device in (GPU, CPU):
        assert attention_kernel(device, "fp32", masked=True)[0] == "with a mask"
        assert attention_kernel(device, "bf16", windowed=True)[0] == "with a mask"
    for device in (GPU, TURING, CPU):
        assert choose_precision(device)[1] and attention_kernel(device, "fp32")[1]


def test_this_machine():
    device = device_info("cpu")
    assert device.kind == "cpu" and device.name and device.cores == cpu_cores() >= 1
    total, available = system_memory()
    assert 0 < available <= total == device.memory_bytes


def test_a_missing_device_is_refused():
    import torch

    missing = next(kind for kind in ("mps", "cuda") if not getattr(torch.backends, kind).is_built() or kind == "cuda")
    if missing == "cuda" and torch.cuda.is_available():
        pytest.skip("no kind of GPU is missing here")
    with pytest.raises(UserError, match=f"no {missing} device here"):
        device_info(missing)


def test_a_missing_compiler_is_reported(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    works, reason = compiler_available(CPU)
    assert not works and "C++" in reason
    monkeypatch.setattr("creature.hardware.triton_available", lambda: False)
    works, reason = compiler_available(GPU)
    assert not works and "Triton" in reason
