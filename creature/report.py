"""The description of a run: run.json, and the same as a table at the start."""

import hashlib
import json
import platform
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

from creature.callbacks import format_seconds
from creature.estimate import count_parameters, flops_per_token, tokens_per_second
from creature.fast import float8_fits
from creature.hardware import attention_kernel, peak_flops
from creature.launch import own_command
from creature.optimizer import MOMENTUM
from creature.plan import Plan, sharded
from creature.rounds.start import Trained
from creature.settings import DRY_RUN_FOLDER, PROJECT, Settings
from creature.trainer import batch_warmup_steps, schedule_steps

# Epochs up to which repeated text may help: measured on a third of the books, whose fourth pass does harm
# (docs/results.md, "Text seen more than once").
REPEATS = 3
# What a resumed run must agree with; `must_match` adds the rest.
FIXED_OF_PLAN = ("tokens_per_step", "micro_batch", "accumulation", "world_size", "block_size", "precision")
FIXED_OF_ARGS = (
    "seed", "data_seed", "learning_rate", "matrix_learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon",
    "weight_decay", "max_grad_norm",
)  # fmt: skip


def must_match(settings: Settings, plan: Plan, args, config, trained: Trained, data_info: dict, steps: int) -> dict:
    """What a resumed run must agree with, so that it goes on exactly as it began."""
    warmup, decay = schedule_steps(args, steps)
    fixed = {name: getattr(plan, name) for name in FIXED_OF_PLAN} | {
        name: getattr(args, name) for name in FIXED_OF_ARGS
    }
    return fixed | {
        "trained": json.loads(json.dumps(asdict(trained))),
        "backbone_rate": settings.backbone_rate,
        "sense_dropout": settings.round.sense_dropout,
        "text_share": settings.data.text_share if settings.data.text_data else None,
        "separate_documents": settings.data.separate_documents,
        "fp8_head": args.fp8_head and plan.precision == "bf16" and _float8_head(plan, config),
        "data_hash": data_info["data_hash"],
        "data_tokens": data_info["tokens"],
        "tokenizer_hash": data_info["tokenizer_hash"],
        "optimizer": "muon + adamw" if args.matrix_learning_rate else str(getattr(args.optim, "value", args.optim)),
        "matrix_momentum": MOMENTUM if args.matrix_learning_rate else None,
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "warmup_steps": warmup,
        "decay_steps": decay,
        "batch_warmup_steps": batch_warmup_steps(args, steps) if _can_halve(settings, plan) else 0,
        "max_steps": steps,
        "model": json.loads(json.dumps(config.to_dict(), default=str)),  # as it will be read back
    }


def _can_halve(settings: Settings, plan: Plan) -> bool:
    """Whether a step can be two updates here: see `CreatureTrainer._batch_is_halved`."""
    return plan.micro_batch * plan.accumulation > 1 and plan.precision != "fp16" and not sharded(settings.training)


def _float8_head(plan: Plan, config) -> bool:
    """Whether this device can compute the head in float8."""
    on_gpu = plan.device.kind == "cuda" and torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    return float8_fits(device, config.vocab_size, config.hidden_size)


def describe_run(
    settings: Settings,
    data_info: dict,
    plan: Plan,
    args,
    model,
    trained: Trained,
    steps: int,
    notes: tuple[str, ...],
) -> dict:
    """The content of run.json, which `format_run` shows; `notes` are those of data and resuming."""
    config, device, tokens = model.config, plan.device, steps * plan.tokens_per_step
    peak = peak_flops(device.name) if device.kind == "cuda" else None
    # How much of the peak a round on recordings reaches is not known.
    speed = tokens_per_second(config, plan.block_size, device.name) if peak and not settings.on_recordings else None
    fixed = must_match(settings, plan, args, config, trained, data_info, steps)
    epochs = tokens / max(data_info["tokens"], 1)
    if settings.on_recordings:
        rows = steps * plan.tokens_per_step / plan.block_size
        epochs = rows * (1 - data_info["text_rows"]) / data_info["rows_of_recordings"]
    notes = [*plan.notes, *notes]
    if epochs > REPEATS and not settings.dry_run and not settings.on_recordings:
        notes.append(
            f"the data will be seen {epochs:.1f} times, and a run that repeats its text more than {REPEATS} times "
            "overfits: watch eval_loss and stop where it rises, or give more text or fewer --max_steps"
        )
    attention = config._attn_implementation or "sdpa"
    kernel, kernel_reason = attention_kernel(
        device,
        plan.precision,
        attention,
        masked=settings.data.separate_documents or settings.on_recordings,
        windowed=(config.sliding_window or plan.block_size) < plan.block_size,
    )
    return {
        "kind": "dry_run" if settings.dry_run else "run",
        "on_recordings": settings.on_recordings,
        "init_from": settings.round.init_from,
        "status": "started",
        "command": own_command(),
        "config": settings.config,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "output_dir": args.output_dir,
        "run_name": args.run_name,
        "parameters": {
            "total": sum(p.numel() for p in model.parameters()),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "parts": {
                name: int(count)
                for name, count in count_parameters(config, trained.senses, trained.streams, trained.backbone).items()
            },
        },
        "flops_per_token": flops_per_token(config, plan.block_size, **asdict(trained)),
        "precision": plan.precision,
        "precision_reason": plan.precision_reason,
        "attention_kernel": kernel,
        "attention_reason": kernel_reason,
        "compiled": plan.compiled,
        "compile_reason": plan.compile_reason,
        "device": device.name,
        "device_memory_bytes": device.memory_bytes,
        "threads": plan.threads,
        "peak_flops": peak * plan.world_size if peak else None,
        "steps": steps,
        "tokens": tokens,
        "epochs": round(epochs, 4),
        "decay_start": steps - fixed["decay_steps"] if fixed["schedule"] == "warmup_stable_decay" else None,
        "expected_seconds": tokens / speed / plan.world_size if speed else None,
        "data": data_info,
        "code_hash": code_hash(),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("torch", "transformers", "accelerate", "datasets")},
        "notes": notes,
        "must_match": fixed,
    }


def code_hash() -> str:
    """sha256 over the model files, the script and `creature/` with all folders in it, in order of their paths."""
    digest = hashlib.sha256()
    for path in sorted([*PROJECT.glob("*_creature.py"), *Path(__file__).parent.rglob("*.py")]):
        digest.update(path.relative_to(PROJECT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _trained_parts(run: dict) -> str:
    """The senses, streams and the backbone that learn, in words."""
    trained = run["must_match"]["trained"]
    names = [name.replace("_", " ") for name in (*trained["senses"], *trained["streams"])]
    rate = run["must_match"]["backbone_rate"]
    backbone = "backbone" if rate == 1 else f"backbone at {rate:g} times the rates"
    return ", ".join([*names, backbone if trained["backbone"] else "not the backbone"])


def _count(number: int, noun: str) -> str:
    """'1 step', '1,125 steps'."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def format_run(run: dict) -> str:
    """run.json as a table of two columns, with a row for every note."""
    fixed, parameters, data = run["must_match"], run["parameters"], run["data"]
    sums = ("text_only", "trainable", "total")
    seconds, halved = run["expected_seconds"], fixed["batch_warmup_steps"]
    unit, row = ("ticks", "row") if run["on_recordings"] else ("tokens", "block")
    batch = (
        f"{fixed['tokens_per_step']:,} {unit} a step = micro-batch {fixed['micro_batch']} x {row} "
        f"{fixed['block_size']} x accumulation {fixed['accumulation']} x {fixed['world_size']} process(es)"
    )
    schedule = (
        f"{fixed['schedule']}: peak {fixed['learning_rate']:.3g}, {_count(fixed['warmup_steps'], 'step')} up, "
        f"{fixed['decay_steps']:,} down"
    )
    rows = [
        ("run", f"{run['kind'].replace('_', ' ')} in {run['output_dir']}, settings of {run['config']}"
         + ("; the next dry run replaces it, --output_dir keeps it" if run["output_dir"] == DRY_RUN_FOLDER else "")),
        ("parameters", f"{parameters['total']:,} total, {parameters['trainable']:,} trainable"),
        ("", ", ".join(f"{name} {count:,}" for name, count in parameters["parts"].items()
                       if count and name not in sums)),
        ("trained", _trained_parts(run)),
        (f"FLOPs per {unit[:-1]}", f"{run['flops_per_token']:.4g} (forward and backward)"),
        ("device", run["device"] + (f", {_count(run['threads'], 'thread')}" if run["threads"] else "")
         + (f", {fixed['world_size']} processes" if fixed["world_size"] > 1 else "")),
        ("precision", f"{run['precision']} ({run['precision_reason']})"
         + (", the head in float8" if fixed["fp8_head"] else "")),
        ("attention", f"{run['attention_kernel']} ({run['attention_reason']})"),
        ("torch.compile", f"{'on' if run['compiled'] else 'off'} ({run['compile_reason']})"),
        ("batch", batch),
        ("data", f"{data['path']}: {data['tokens']:,} {unit}, {data.get('validation_tokens') or 0:,} for validation"
         + (", documents kept apart" if fixed["separate_documents"] else "")
         + (f", rows filled to {data['fill']:.0%}" if run["on_recordings"] else "")),
        ("length", f"{run['steps']:,} steps, {run['tokens']:,} {unit}, {run['epochs']:.3g} epochs"
         + (" of the recordings" if run["on_recordings"] else "")),
        ("schedule", schedule + (f"; at the start {_count(halved, 'step')} of two updates, each with half the batch"
                                if halved else "")),
        ("expected time", f"{format_seconds(seconds)} (scripts/estimate.py says why)" if seconds else
         "not known for this device; each log line says how long is left"),
        *(("note", note) for note in run["notes"]),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)
