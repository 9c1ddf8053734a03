"""The plan of a run, from its settings and this machine: device, precision, compiling, batch, rate and threads."""

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from creature.errors import UserError
from creature.estimate import fit_micro_batch, memory_parts, tokens_per_second
from creature.hardware import Device, choose_precision, compiler_available, device_info
from creature.limits import METRICS
from creature.optimizer import width_learning_rate
from creature.resume import ResumedRun
from creature.rounds.start import TEXT_ALONE, Trained
from creature.settings import Settings

# With shorter steps, a GPU waits for Python to launch its kernels where the host is slow (docs/experiments.md).
RECORDED_SECONDS = 0.1


@dataclass(frozen=True)
class Plan:
    """What a run does on this machine; each choice with its reason. Sizes in tokens and in blocks of block_size."""

    device: Device
    precision: str
    precision_reason: str
    compiled: bool
    compile_mode: str | None
    compile_reason: str
    world_size: int
    block_size: int
    tokens_per_step: int
    micro_batch: int
    accumulation: int
    learning_rate: float
    threads: int | None
    notes: tuple[str, ...]


def plan_run(settings: Settings, config, resumed: ResumedRun | None = None, trained: Trained = TEXT_ALONE) -> Plan:
    """
    Choose device, precision, compiling, batch and learning rate from the settings and this machine.

    Args:
        config: the CreatureConfig.
        resumed: the run being resumed, whose micro-batch is kept unless a flag says otherwise.
        trained: which parts of the creature learn.

    Raises UserError for a GPU that is not there and for batches that do not divide.
    """
    training = settings.training
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    block_size = settings.row_length or config.max_position_embeddings
    device = _find_device(training, world_size)
    precision, precision_reason = _find_precision(training, device)
    compiled, compile_reason, compiler_note = _find_compiler(training, device, settings.dry_run)
    tokens, micro, accumulation, batch_note = _plan_batch(
        settings, device, block_size, world_size, resumed,
        fits=lambda: fit_micro_batch(config, block_size, device, precision, compiled=compiled, **asdict(trained)),
    )  # fmt: skip
    mode = training.get("torch_compile_mode")
    # transformers 5.17 says gradient_checkpointing, 5.23 activation_checkpointing.
    others = ("torch_compile_mode", "torch_compile_backend", "activation_checkpointing", "gradient_checkpointing")
    plain = compiled and not sharded(training) and not any(training.get(name) for name in others)
    form = (micro, block_size, accumulation, settings.data.separate_documents)
    if plain and not settings.on_recordings and graphs_pay(config, device, precision, *form):
        mode, compile_reason = "reduce-overhead", f"{compile_reason}, steps recorded as CUDA graphs"
    threads, thread_note = _find_threads(training, device)
    muon = training.get("matrix_learning_rate") != 0
    notes = (compiler_note, batch_note, thread_note, _unused_gpus(device, world_size))
    return Plan(
        device=device,
        precision=precision,
        precision_reason=precision_reason,
        compiled=compiled,
        compile_mode=mode if compiled else None,
        compile_reason=compile_reason,
        world_size=world_size,
        block_size=block_size,
        tokens_per_step=tokens,
        micro_batch=micro,
        accumulation=accumulation,
        learning_rate=training.get("learning_rate", width_learning_rate(config.hidden_size, muon)),
        threads=threads,
        notes=tuple(note for note in notes if note),
    )


def sharded(training: dict[str, Any]) -> bool:
    """Whether accelerate's configuration or the training section asks for FSDP."""
    return bool(training.get("fsdp")) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def training_values(settings: Settings, plan: Plan) -> dict[str, Any]:
    """The keyword arguments of CreatureTrainingArguments: the settings, and what the plan adds."""
    seed = settings.training.get("seed", 42)
    defaults = {
        "per_device_eval_batch_size": plan.micro_batch,
        "seed": seed,
        "data_seed": seed,
    }
    if plan.device.kind == "cuda":
        defaults["accelerator_config"] = {"non_blocking": True}  # pinned memory, so copies need not wait
    else:
        defaults["dataloader_pin_memory"] = False
    values = {
        "tokens_per_step": plan.tokens_per_step,
        "per_device_train_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "learning_rate": plan.learning_rate,
        "bf16": plan.precision == "bf16",
        "fp16": plan.precision == "fp16",
        "torch_compile": plan.compiled,
        "torch_compile_mode": plan.compile_mode,
        "use_cpu": plan.device.kind == "cpu",
    }
    if not plan.compiled:
        values["torch_compile_backend"] = None  # either would turn the compiler on again
    if metric := settings.training.get("metric_for_best_model"):
        # The Trainer takes every metric but those that end with "loss" for one of which more is better.
        values["greater_is_better"] = METRICS[metric.removeprefix("eval_")]
    if settings.dry_run:
        steps = settings.training["max_steps"]
        values |= {"logging_steps": 1, "save_steps": steps, "eval_steps": steps}
    return defaults | settings.training | values


def _find_device(training: dict, world_size: int) -> Device:
    import torch

    forced = training.get("use_cpu") or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if forced:
        return device_info("cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    cuda = torch.cuda.is_available()
    if not cuda and visible not in (None, "", "-1"):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible} names a GPU that is not there: correct it, or train on the CPU with "
            "--use_cpu (and --cpu for accelerate launch)"
        )
    mps = torch.backends.mps.is_available()
    if training.get("use_cpu") is False and not cuda and not mps:
        raise UserError("--use_cpu false asks for a GPU, and there is none that this torch can use: leave it out")
    if world_size > 1 and not cuda:
        raise UserError(
            f"{world_size} processes were started to train on GPUs, and there is no GPU that this torch can use: "
            "launch with --cpu, or one process"
        )
    if cuda:
        local_rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local_rank >= count:
            raise UserError(f"process {local_rank} has no GPU, there are {count}: launch --num_processes {count}")
        torch.cuda.set_device(local_rank)
    return device_info()


def _find_precision(training: dict, device: Device) -> tuple[str, str]:
    bf16, fp16 = training.get("bf16"), training.get("fp16")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if bf16 and fp16:
        raise UserError("bf16 and fp16 exclude each other: give one of them")
    if bf16 or fp16:
        precision, reason = ("bf16" if bf16 else "fp16"), "as asked for"
    elif launched in ("bf16", "fp16"):
        precision, reason = launched, "as asked for in accelerate's settings"
    elif bf16 is False or fp16 is False:
        precision, reason = "fp32", "as asked for"
    else:
        return choose_precision(device)
    if precision == "bf16" and device.kind == "cuda" and not device.bf16:
        raise UserError(f"{device.name} does not compute in bf16: use --fp16, or leave the precision out")
    if precision == "fp16" and device.kind == "cpu":
        raise UserError("fp16 training needs a GPU: use --bf16, or leave the precision out for fp32")
    return precision, reason


def _find_compiler(training: dict, device: Device, dry_run: bool) -> tuple[bool, str, str | None]:
    """(whether steps are compiled, the reason, a note where compiling was wanted and does not work)."""
    from creature import fast

    asked = training.get("torch_compile")
    if asked is None and (training.get("torch_compile_backend") or training.get("torch_compile_mode")):
        asked = True
    works, reason = compiler_available(device)
    if not works and device.kind == "cuda":
        fast.disable()
    if asked is False:
        return False, "as asked for", None
    if asked is None and device.kind != "cuda":
        return False, "off by default without a CUDA GPU", None
    if asked is None and dry_run and works:
        return False, "a dry run does not wait for the compiler; --torch_compile has it compiled like a real run", None
    return works, reason, None if works else f"torch.compile is off: {reason}"


def graphs_pay(
    config,
    device: Device,
    precision: str,
    micro_batch: int,
    block_size: int,
    accumulation: int = 1,
    separate_documents: bool = False,
) -> bool:
    """
    Whether compiled steps are worth recording as CUDA graphs (torch.compile's "reduce-overhead"): a process's step is
    so short that the GPU would wait for a slow host, twice the memory is there, and nothing is accumulated.
    """
    speed = tokens_per_second(config, block_size, device.name) if device.kind == "cuda" else None
    if speed is None or accumulation > 1 or separate_documents or micro_batch * block_size / speed >= RECORDED_SECONDS:
        return False
    peak = memory_parts(config, micro_batch, block_size, device, precision, compiled=True)["peak"]
    return 2 * peak < device.free_bytes


def _plan_batch(
    settings: Settings, device: Device, block: int, world: int, resumed: ResumedRun | None, fits: Callable[[], int]
) -> tuple[int, int, int, str | None]:
    """
    (tokens_per_step, micro-batch, accumulation, a note where a dry run on a CPU is scaled down).

    One follows from the other two; where only the tokens are given, the micro-batch is the most that `fits`.
    """
    training, given, name, note = settings.training, settings.given, settings.row_name, None
    micro, accumulation = training.get("per_device_train_batch_size"), training.get("gradient_accumulation_steps")
    tokens = training.get("tokens_per_step", 65_536)
    if micro and accumulation and "tokens_per_step" not in given:
        tokens = micro * accumulation * world * block
    elif settings.dry_run and device.kind == "cpu" and "tokens_per_step" not in given:
        micro, accumulation = micro or 1, accumulation or 1
        scaled = micro * accumulation * world * block
        if scaled < tokens:
            note = (
                f"dry run on a CPU: micro-batch {micro} and accumulation {accumulation} instead of {tokens:,} tokens a "
                "step; --tokens_per_step or --per_device_train_batch_size overrides it"
            )
            tokens = scaled
    elif not micro and "tokens_per_step" not in given and resumed and resumed.must_match.get("world_size") == world:
        micro = resumed.must_match["micro_batch"]
    if tokens % (block * world):
        near = max(1, round(tokens / (block * world))) * block * world
        raise UserError(
            f"tokens_per_step {tokens:,} is not a multiple of {name} x processes = {block} x {world}: "
            f"use --tokens_per_step {near}"
        )
    blocks = tokens // (block * world)
    for setting, size in (("gradient_accumulation_steps", accumulation), ("per_device_train_batch_size", micro)):
        if size and blocks % size:
            raise UserError(
                f"{setting} {size} does not divide the {blocks} blocks of a step (of each process): use "
                f"{_nearest_divisor(blocks, size)}, or change --tokens_per_step"
            )
    if micro and accumulation and micro * accumulation != blocks:
        raise UserError(
            f"per_device_train_batch_size {micro} x gradient_accumulation_steps {accumulation} x {world} processes x "
            f"{name} {block} is not tokens_per_step {tokens:,}: leave one of them out"
        )
    if accumulation:
        micro = blocks // accumulation
    elif not micro:
        most = min(fits(), blocks)
        if most < 1:
            fsdp = ", and how much room FSDP makes is not known: give --per_device_train_batch_size"
            remedy = fsdp if sharded(training) else f": use a smaller --{name} or a smaller configuration"
            raise UserError(f"not one block of {block} tokens of the whole model fits on {device.name}{remedy}")
        micro = max(size for size in range(1, most + 1) if blocks % size == 0)
    return tokens, micro, blocks // micro, note


def _nearest_divisor(number: int, near: int) -> int:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return min(small + [number // d for d in small], key=lambda d: (abs(d - near), d))


def _find_threads(training: dict, device: Device) -> tuple[int | None, str | None]:
    """
    (threads of this process on a CPU, a note where accelerate's choice is overridden); (None, None) on a GPU.

    All cores, shared among the processes of this machine: accelerate launch sets OMP_NUM_THREADS=1.
    """
    import torch

    if device.kind != "cpu":
        return None, None
    if asked := training.get("cpu_threads"):
        return asked, None
    from_launcher = os.environ.get("OMP_NUM_THREADS") == "1" and "ACCELERATE_MIXED_PRECISION" in os.environ
    if "OMP_NUM_THREADS" in os.environ and not from_launcher:
        return torch.get_num_threads(), None
    threads = max(1, device.cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    note = f"accelerate set OMP_NUM_THREADS=1; using {threads} threads on {device.cores} cores (or --cpu_threads)"
    return threads, note if from_launcher and threads > 1 else None


def _unused_gpus(device: Device, world_size: int) -> str | None:
    import torch

    count = torch.cuda.device_count() if device.kind == "cuda" and world_size == 1 else 1
    return f"using 1 of {count} GPUs; `accelerate launch` without --num_processes uses all" if count > 1 else None
