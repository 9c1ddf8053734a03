"""From the settings to what this machine does with them: device, precision, threads, compiling, and the batch."""

import math
import os
from dataclasses import dataclass, field
from typing import Any

from creature.errors import UserError
from creature.estimate import fit_micro_batch, memory_parts, tokens_per_second
from creature.hardware import Device, choose_precision, compiler_available, device_info
from creature.optimizer import width_learning_rate
from creature.settings import Settings

# Shorter steps of a GPU wait for Python and its launches where the host is slow (docs/experiments.md).
RECORDED_SECONDS = 0.1


@dataclass
class Plan:
    """What a run does on this machine; each choice with its reason. Sizes in tokens and in blocks of block_size."""

    device: Device
    precision: str
    precision_reason: str
    compiled: bool
    compile_reason: str
    world_size: int
    block_size: int
    tokens_per_step: int
    micro_batch: int
    accumulation: int
    threads: int | None = None
    notes: list[str] = field(default_factory=list)

    def times_seen(self, steps: int, tokens: int) -> float:
        """How often so many steps go through a text of so many tokens."""
        return steps * self.tokens_per_step / max(tokens, 1)


def plan_run(settings: Settings, config, resumed: dict | None = None) -> Plan:
    """
    Decide device, precision, compiling, batch and learning rate, before anything touches the device.

    Args:
        config: the CreatureConfig.
        resumed: the "identity" of the run being resumed, whose batch is kept unless a flag says otherwise.

    Raises UserError for a GPU that is not there and for batches that do not divide.
    """
    training = settings.training
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    notes: list[str] = []
    device = _find_device(training, world_size)
    precision, reason = _find_precision(training, device)
    compiled, compile_reason = _find_compiler(training, device, notes)
    block = settings.data.get("block_size") or config.max_position_embeddings
    plan = Plan(device, precision, reason, compiled, compile_reason, world_size, block, 0, 0, 0, notes=notes)
    _plan_batch(plan, settings, config, resumed)
    if _records_graphs(plan, settings, config):
        training["torch_compile_mode"] = "reduce-overhead"
        plan.compile_reason += ", steps recorded as CUDA graphs"
    plan.threads = _set_threads(training, device, notes)
    if "learning_rate" not in training:
        muon = training.get("matrix_learning_rate") != 0
        training["learning_rate"] = width_learning_rate(config.hidden_size, muon)
    return plan


def sharded(training: dict[str, Any]) -> bool:
    """Whether accelerate's configuration or the training section asks for FSDP."""
    return bool(training.get("fsdp")) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def training_values(settings: Settings, plan: Plan) -> dict[str, Any]:
    """The keyword arguments of CreatureTrainingArguments: the settings, and what the plan adds."""
    values = dict(settings.training)
    values |= {
        "tokens_per_step": plan.tokens_per_step,
        "per_device_train_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "bf16": plan.precision == "bf16",
        "fp16": plan.precision == "fp16",
        "torch_compile": plan.compiled,
        "use_cpu": plan.device.kind == "cpu",
    }
    values.setdefault("per_device_eval_batch_size", plan.micro_batch)
    values.setdefault("ddp_find_unused_parameters", False)  # what is not trained is frozen
    values.setdefault("seed", 42)
    values.setdefault("data_seed", values["seed"])
    if plan.device.kind == "cuda":
        values.setdefault("accelerator_config", {"non_blocking": True})  # pinned memory, so copies need not wait
    else:
        values.setdefault("dataloader_pin_memory", False)
    if settings.dry_run:
        steps = values["max_steps"]
        values |= {"logging_steps": 1, "save_steps": steps, "eval_steps": steps}
    return values


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


def _find_compiler(training: dict, device: Device, notes: list[str]) -> tuple[bool, str]:
    from creature.compiling import use_plain_kernels

    asked = training.get("torch_compile")
    if asked is None and (training.get("torch_compile_backend") or training.get("torch_compile_mode")):
        asked = True
    works, reason = compiler_available(device)
    if not works and device.kind == "cuda":
        use_plain_kernels()
    if asked is False:
        return False, "as asked for"
    if asked is None and device.kind != "cuda":
        return False, "off by default without a CUDA GPU"
    if not works:
        notes.append(f"torch.compile is off: {reason}")
        training.pop("torch_compile_backend", None)
        training.pop("torch_compile_mode", None)
    return works, reason


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
    Whether compiled steps of one process are worth recording as CUDA graphs (torch.compile's "reduce-overhead"): the
    device is so fast that a slow host would hold it up, has room to spare, and the steps have the form measured so.
    """
    speed = tokens_per_second(config, block_size, device.name) if device.kind == "cuda" else None
    if speed is None or accumulation > 1 or separate_documents or micro_batch * block_size / speed >= RECORDED_SECONDS:
        return False
    peak = memory_parts(config, micro_batch, block_size, device, precision, compiled=True)["peak"]
    return 2 * peak < device.free_bytes


def _records_graphs(plan: Plan, settings: Settings, config) -> bool:
    """Whether the run records CUDA graphs: they pay, and no setting says how to compile or makes another step of it."""
    training = settings.training
    # Recomputed layers have two names: transformers 5.23 calls them otherwise than 5.17.
    others = ("torch_compile_mode", "torch_compile_backend", "activation_checkpointing", "gradient_checkpointing")
    if not plan.compiled or plan.world_size > 1 or sharded(training) or any(training.get(name) for name in others):
        return False
    form = plan.micro_batch, plan.block_size, plan.accumulation, bool(settings.data.get("separate_documents"))
    return graphs_pay(config, plan.device, plan.precision, *form)


def _plan_batch(plan: Plan, settings: Settings, config, resumed: dict | None) -> None:
    """Fill in tokens_per_step, micro_batch and accumulation; one follows from the other two."""
    training, given, block, world = settings.training, settings.given, plan.block_size, plan.world_size
    micro, accumulation = training.get("per_device_train_batch_size"), training.get("gradient_accumulation_steps")
    tokens = training.get("tokens_per_step")
    if micro and accumulation and "tokens_per_step" not in given:
        tokens = micro * accumulation * world * block
    elif settings.dry_run and plan.device.kind == "cpu" and "tokens_per_step" not in given:
        micro, accumulation = micro or 1, accumulation or 1
        scaled = micro * accumulation * world * block
        if tokens is None or scaled < tokens:
            plan.notes.append(
                f"dry run on a CPU: micro-batch {micro} and accumulation {accumulation} instead of "
                f"{tokens or 65_536:,} tokens a step; --tokens_per_step or --per_device_train_batch_size overrides it"
            )
            tokens = scaled
    tokens = tokens or 65_536
    if resumed and "tokens_per_step" not in given and micro is None and world == resumed.get("world_size"):
        micro = resumed.get("micro_batch")
    if tokens % (block * world):
        near = max(1, round(tokens / (block * world))) * block * world
        raise UserError(
            f"tokens_per_step {tokens:,} is not a multiple of block_size x processes = {block} x {world}: "
            f"use --tokens_per_step {near}"
        )
    blocks = tokens // (block * world)
    if micro is None and accumulation:
        if blocks % accumulation:
            raise UserError(
                f"gradient_accumulation_steps {accumulation} does not divide the {blocks} blocks of a step (of each "
                f"process): use {_nearest_divisor(blocks, accumulation)}, or change --tokens_per_step"
            )
        micro = blocks // accumulation
    elif micro is None:
        fits = fit_micro_batch(config, block, plan.device, plan.precision, compiled=plan.compiled)
        if fits < 1 and sharded(training):
            raise UserError(
                f"not one block of {block} tokens fits beside the whole model on {plan.device.name}, and how much room "
                "FSDP makes is not known: give --per_device_train_batch_size"
            )
        if fits < 1:
            raise UserError(
                f"not one block of {block} tokens fits into the memory of {plan.device.name}: use a smaller "
                "--block_size or a smaller configuration"
            )
        micro = max(size for size in range(1, min(fits, blocks) + 1) if blocks % size == 0)
    if blocks % micro:
        raise UserError(
            f"per_device_train_batch_size {micro} does not divide the {blocks} blocks of a step (of each process): use "
            f"{_nearest_divisor(blocks, micro)}, or change --tokens_per_step"
        )
    if accumulation and micro * accumulation != blocks:
        raise UserError(
            f"per_device_train_batch_size {micro} x gradient_accumulation_steps {accumulation} x {world} processes x "
            f"block_size {block} is not tokens_per_step {tokens:,}: leave one of them out"
        )
    plan.tokens_per_step, plan.micro_batch, plan.accumulation = tokens, micro, blocks // micro


def _nearest_divisor(number: int, near: int) -> int:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return min(small + [number // d for d in small], key=lambda d: (abs(d - near), d))


def _set_threads(training: dict, device: Device, notes: list[str]) -> int | None:
    """Use all cores on a CPU, shared among the processes of this machine. accelerate launch sets OMP_NUM_THREADS=1."""
    import torch

    asked = training.get("cpu_threads")
    if asked is not None and asked < 1:
        raise UserError(f"cpu_threads must be 1 or more, not {asked}")
    if device.kind != "cpu":
        return None
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    in_force = os.environ.get("OMP_NUM_THREADS")
    from_launcher = in_force == "1" and "ACCELERATE_MIXED_PRECISION" in os.environ
    if asked:
        threads = asked
    elif in_force and not from_launcher:
        threads = torch.get_num_threads()
    else:
        threads = max(1, device.cores // local)
        if from_launcher and threads > 1:
            notes.append(
                f"accelerate set OMP_NUM_THREADS=1; using {threads} threads on {device.cores} cores (--cpu_threads "
                "overrides it)"
            )
    torch.set_num_threads(threads)
    return threads
