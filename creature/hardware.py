"""What the machine has: device, memory, peak FLOP/s; and the precision, attention kernel and compiler that follow."""

import importlib.util
import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from creature.errors import UserError

GIB = 1024**3


@dataclass(frozen=True)
class Card:
    """A GPU model: its peak dense bf16 FLOP/s (fp16 where there is no bf16) and its memory in GiB."""

    peak_flops: float
    memory_gib: float


# Dense rates with fp32 accumulation, as in training: never the doubled figure "with sparsity", and for GeForce never
# the doubled one "with fp16 accumulate" (the RTX 3090 has 71, not 142). Sources: NVIDIA's data sheets of the
# professional cards; for GeForce the white papers of the architectures (GA102, Ada, Blackwell), row "Peak FP16 Tensor
# TFLOPS with FP32 Accumulate", at boost clock: twice the shader's fp32 rate, where professional cards have four times.
# A name that is not here has no rate, because laptop and "D" versions are slower by unknown amounts.
CARDS = {
    # Ampere, GA10x
    "RTX 3060": Card(25.5e12, 12),
    "RTX 3060 Ti": Card(32.4e12, 8),
    "RTX 3070": Card(40.6e12, 8),
    "RTX 3070 Ti": Card(43.5e12, 8),
    "RTX 3080": Card(59.5e12, 10),  # the rarer 12 GB version shares this name and is 3 % faster
    "RTX 3080 Ti": Card(68.2e12, 12),
    "RTX 3090": Card(71.2e12, 24),
    "RTX 3090 Ti": Card(80.0e12, 24),
    "RTX A4000": Card(76.7e12, 16),
    "RTX A5000": Card(111.1e12, 24),
    "RTX A6000": Card(154.8e12, 48),
    "A10": Card(125e12, 24),
    "A10G": Card(70e12, 24),
    "A40": Card(149.7e12, 48),
    "A100": Card(312e12, 80),
    # Ada
    "RTX 4060": Card(30.2e12, 8),
    "RTX 4060 Ti": Card(44.1e12, 8),
    "RTX 4070": Card(58.3e12, 12),
    "RTX 4070 SUPER": Card(71.0e12, 12),
    "RTX 4070 Ti": Card(80.2e12, 12),
    "RTX 4070 Ti SUPER": Card(88.2e12, 16),
    "RTX 4080": Card(97.5e12, 16),
    "RTX 4080 SUPER": Card(104.4e12, 16),
    "RTX 4090": Card(165.2e12, 24),
    "RTX 6000 Ada": Card(364.2e12, 48),
    "L4": Card(121e12, 24),
    "L40": Card(181e12, 48),
    "L40S": Card(362e12, 48),
    # Blackwell
    "RTX 5070": Card(61.7e12, 12),
    "RTX 5070 Ti": Card(87.9e12, 16),
    "RTX 5080": Card(112.6e12, 16),
    "RTX 5090": Card(209.5e12, 32),
    "B200": Card(2250e12, 180),
    # Hopper
    "H100 PCIe": Card(756e12, 80),
    "H100 NVL": Card(835e12, 94),
    "H100 SXM": Card(989e12, 80),
    "H200": Card(989e12, 141),
    "H200 NVL": Card(835e12, 141),
    # Volta and Turing: fp16, because they have no bf16
    "V100 PCIe": Card(112e12, 16),
    "V100 SXM": Card(125e12, 16),
    "T4": Card(65e12, 16),
}


@dataclass(frozen=True)
class Device:
    """
    The device that a run uses.

    kind: "cuda", "mps" or "cpu". name: as the driver reports it. memory_bytes, free_bytes: of the GPU, or of the
    machine. cores: CPU cores this process may use. bf16: whether the hardware computes in bfloat16. count: number of
    GPUs. capability: CUDA's (major, minor), else None.
    """

    kind: str
    name: str
    memory_bytes: int
    free_bytes: int
    cores: int
    bf16: bool
    count: int = 1
    capability: tuple[int, int] | None = None

    @property
    def is_hopper(self) -> bool:
        """Whether this is an H100, H200 or GH200, where the head is computed in float8 under bf16."""
        return self.capability is not None and self.capability[0] == 9


def device_info(kind: str | None = None) -> Device:
    """
    The device that training uses: a CUDA GPU, else Apple's, else the CPU; or the one of the given kind.

    Raises UserError when there is no device of that kind.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kinds = [name for name in available if available[name]]
    kind = kind or kinds[0]
    if kind not in kinds:
        raise UserError(f"there is no {kind} device here: use {' or '.join(kinds)}")
    if kind == "cuda":
        index = torch.cuda.current_device()
        free, total = torch.cuda.mem_get_info(index)
        capability = torch.cuda.get_device_capability(index)
        # Not torch.cuda.is_bf16_supported(): it is True for cards that only emulate bf16, slowly.
        bf16 = capability >= (8, 0) or torch.version.hip is not None
        name = torch.cuda.get_device_name(index)
        return Device(kind, name, total, free, cpu_cores(), bf16, torch.cuda.device_count(), capability)
    total, free = system_memory()
    if kind == "mps":
        total = min(total, torch.mps.recommended_max_memory())
        free = min(free, max(total - torch.mps.driver_allocated_memory(), 0))
        return Device(kind, f"Apple {platform.processor() or 'GPU'}", total, free, cpu_cores(), True)
    return Device(kind, cpu_name(), total, free, cpu_cores(), _cpu_has_bf16())


def cpu_cores() -> int:
    """CPU cores that this process may use, by its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read_words("/sys/fs/cgroup/cpu.max")  # cgroup v2: "quota period", microseconds
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, round(int(quota[0]) / int(quota[1]))))
    return cores


def system_memory() -> tuple[int, int]:
    """(total, available) bytes of main memory for this process: of the machine, or of its container if that is less."""
    import psutil

    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    for limit_file, used_file, stat_file, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),  # cgroup v2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        limit, used = _read_words(f"/sys/fs/cgroup/{limit_file}"), _read_words(f"/sys/fs/cgroup/{used_file}")
        if limit and limit[0].isdigit() and used and int(limit[0]) < memory.total:
            # File cache counts as used, but the kernel frees it on demand.
            stat = _read_words(f"/sys/fs/cgroup/{stat_file}")
            reclaimable = int(stat[stat.index(cache) + 1]) if cache in stat else 0
            total = min(total, int(limit[0]))
            available = min(available, max(int(limit[0]) - int(used[0]) + reclaimable, 0))
    return total, available


def cpu_name() -> str:
    """The processor's name, or at least its architecture."""
    words = _read_words("/proc/cpuinfo", until="flags")
    line = re.search(r"model name : (.+?) (?:stepping|microcode|cpu MHz) :", " ".join(words))
    return line.group(1) if line else platform.processor() or platform.machine() or "CPU"


def _cpu_has_bf16() -> bool:
    """Whether the CPU has bf16 matrix instructions (AVX512-BF16 or AMX); False where the system does not say."""
    flags = set(_read_words("/proc/cpuinfo"))
    return bool(flags & {"avx512_bf16", "amx_bf16"})


def _read_words(path: str, until: str | None = None) -> list[str]:
    """The words of a system file, [] where there is none."""
    try:
        words = Path(path).read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return []
    return words[: words.index(until)] if until in words else words


# ---------------------------------------------------------------------------------------------------------------------
# What follows from the device
# ---------------------------------------------------------------------------------------------------------------------


def card_name(name: str) -> str | None:
    """
    The key in CARDS for a GPU's name as a driver or a person writes it, or None when it is not known exactly.

    "NVIDIA GeForce RTX 3090" -> "RTX 3090"; "NVIDIA H100 80GB HBM3" -> "H100 SXM"; a laptop GPU, a card's slice (MIG)
    or a virtual GPU -> None.
    """
    words = name.replace("-", " ").replace("_", " ").lower().split()
    noise = {"nvidia", "geforce", "tesla", "generation", "hbm3", "hbm3e", "hbm2", "hbm2e"}
    words = [word for word in words if word not in noise and not re.fullmatch(r"\d+g[bi]?b?", word)]
    words = ["sxm" if re.fullmatch(r"sxm\d?", word) else word for word in words]
    if words in (["h100"], ["v100"]):
        words.append("sxm")  # the driver names the SXM module of the H100 by its memory alone
    if words[:1] in (["a100"], ["h200"]) and words[1:] in (["sxm"], ["pcie"]):
        words = words[:1]  # one rate for both forms
    known = {key.lower(): key for key in CARDS}
    return known.get(" ".join(words))


def peak_flops(name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a GPU (fp16 on Volta and Turing) by its name, None when unknown: never a guess."""
    key = card_name(name)
    return CARDS[key].peak_flops if key else None


def choose_precision(device: Device) -> tuple[str, str]:
    """("bf16" | "fp16" | "fp32", the reason) for training on this device."""
    if device.kind == "cuda" and device.bf16:
        return "bf16", f"{device.name} computes in bfloat16"
    if device.kind == "cuda":
        return "fp16", f"{device.name} has no bfloat16; fp16 with loss scaling is its fast format"
    if device.kind == "mps":
        return "fp32", "mixed precision gains little on Apple GPUs"
    return "fp32", "a CPU gains nothing from mixed precision at this size"


def attention_kernel(
    device: Device, precision: str, implementation: str = "sdpa", *, masked: bool = False, windowed: bool = False
) -> tuple[str, str]:
    """
    (the kernel of causal attention, the reason); masked: whether documents are kept apart; windowed: whether samples
    are longer than the sliding window.
    """
    if implementation != "sdpa":
        return implementation, "as configured"
    half = device.kind == "cuda" and precision != "fp32"
    if masked and half and triton_available() and (device.capability is None or device.capability >= (8, 0)):
        return "flash", "varlen_attn in half precision on this GPU, given the boundaries of documents"
    if masked:
        return "with a mask", "documents are kept apart, and the causal kernels cannot do that"
    if windowed:
        return "with a mask", "samples are longer than sliding_window, which the causal kernels do not have"
    if half:
        if device.capability is None or device.capability >= (8, 0):
            return "flash", "scaled_dot_product_attention in half precision on this GPU"
        return "memory-efficient", "scaled_dot_product_attention; the flash kernel needs compute capability 8.0"
    if device.kind == "cuda":
        return "memory-efficient", "scaled_dot_product_attention; the flash kernel needs bf16 or fp16"
    if device.kind == "mps":
        return "Metal", "scaled_dot_product_attention on an Apple GPU"
    return "flash for CPUs", "scaled_dot_product_attention"


def triton_available() -> bool:
    """Whether Triton is installed, which torch.compile needs on a GPU."""
    return importlib.util.find_spec("triton") is not None


def compiler_available(device: Device) -> tuple[bool, str]:
    """(whether torch.compile can work on this device, the reason)."""
    if device.kind == "cuda":
        if not triton_available():
            return False, "Triton is not installed (`pip install triton`, on Windows triton-windows)"
        if device.capability is not None and device.capability < (7, 0):
            return False, "Triton needs compute capability 7.0"
        if os.name == "posix" and not any(map(shutil.which, (os.environ.get("CC") or "gcc", "gcc", "clang"))):
            return False, "Triton needs a C compiler, and neither gcc nor clang was found"
        return True, "Triton is installed"
    if device.kind == "mps":
        return False, "torch.compile is experimental on Apple GPUs"
    for compiler in (os.environ.get("CXX"), "g++", "clang++", "c++", "cl"):
        if compiler and shutil.which(compiler):
            return True, f"C++ compiler {compiler}"
    return False, "no C++ compiler (g++, clang++ or cl) was found"
