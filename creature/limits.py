"""The limits of the settings, and what does not fit together, as far as it is known without heavy imports."""

import ast
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

CONFIGURATION = Path(__file__).resolve().parent.parent / "configuration_creature.py"
ABOVE_ZERO = (
    "adam_epsilon", "block_size", "cpu_threads", "dataloader_prefetch_factor", "ddp_timeout", "eval_accumulation_steps",
    "eval_steps", "gradient_accumulation_steps", "logging_steps", "max_eval_blocks", "num_train_epochs",
    "per_device_eval_batch_size", "per_device_train_batch_size", "sample_corpus_tokens", "save_steps",
    "tokens_per_step", "torch_empty_cache_steps", "train_tokens",
)  # fmt: skip
ZERO_OR_MORE = (
    "backbone_rate", "batch_warmup_steps", "dataloader_num_workers", "decay_steps", "eval_delay", "learning_rate",
    "matrix_learning_rate", "max_grad_norm", "neftune_noise_alpha", "sample_steps", "save_total_limit", "warmup_steps",
    "weight_decay",
)  # fmt: skip
BELOW_ONE = ("adam_beta1", "adam_beta2", "text_share", "validation_fraction")
SEEDS = ("data_seed", "seed")
AT_MOST = {"cpu_threads": 1 << 16, "tokens_per_step": 1 << 40}
FOR_WORKERS = ("dataloader_multiprocessing_context", "dataloader_persistent_workers", "dataloader_prefetch_factor")
BESIDE_MUON = ("optim", "optim_args", "optim_target_modules")  # which Muon leaves without effect
JSON_FILES = ("accelerator_config", "fsdp_config")  # mappings that may also be named as a file
# What an evaluation gives, and whether more of it is better.
METRICS = {"loss": False, "perplexity": False, "bits_per_byte": False, "accuracy": True}
# What accelerate may be set to start, and the job does not know.
ENGINES = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}


def find_bad_values(values: dict[str, Any], mappings: Collection[str]) -> list[str]:
    """
    Every value that is out of its range or does not fit another one or this machine, in words.

    Args:
        values: the fields that are set, of the right types.
        mappings: the names of those that are mappings.
    """
    problems = [text for name, value in values.items() if (text := _out_of_range(name, value))]
    for name in _read_constant(CONFIGURATION, "_POSITIVE_FIELDS"):
        if name in values and values[name] is not None and values[name] < 1:
            problems.append(f"{name} must be at least 1, not {values[name]}")
    for name in _read_constant(CONFIGURATION, "_SHARE_FIELDS"):
        if name in values and not 0 <= values[name] <= 1:
            problems.append(f"{name} must lie between 0 and 1, not {values[name]}")
    steps = values.get("max_steps", -1)
    if "num_train_epochs" in values and steps > 0:
        problems.append("max_steps and num_train_epochs both say how long to train: give one of them")
    if steps == 0 or steps < -1:
        problems.append(f"max_steps must be greater than 0, not {steps}")
    if values.get("clip_ticks", 2) < 2:
        problems.append(f"clip_ticks must be at least 2, not {values['clip_ticks']}: a tick is predicted from the last")
    chances = values.get("sense_dropout")
    for name, chance in chances.items() if isinstance(chances, dict) else [("", chances or 0)]:
        if not isinstance(chance, int | float) or not 0 <= chance < 1:
            problems.append(f"sense_dropout {name} must be at least 0 and below 1, not {chance}".replace("  ", " "))
    block, context = values.get("block_size"), values.get("max_position_embeddings", 2048)
    if block is not None and 0 < context < block:
        problems.append(
            f"block_size {block} is longer than max_position_embeddings {context}: lower the one or raise the other"
        )
    for name in (name for name in values if name in mappings and isinstance(values[name], str)):
        if name not in JSON_FILES:
            problems.append(f"{name} must be a mapping, such as {{name: 1}}, not {values[name]!r}")
        elif not Path(values[name]).is_file():
            problems.append(f"{name} {values[name]} is no file: correct the path, or give a mapping")
    for name in FOR_WORKERS if not values.get("dataloader_num_workers") else ():
        if values.get(name):
            problems.append(f"{name} is for worker processes: give --dataloader_num_workers, or leave it out")
    for name in BESIDE_MUON if values.get("matrix_learning_rate") != 0 else ():
        if values.get(name):
            problems.append(f"{name} has no effect beside Muon: leave it out, or give --matrix_learning_rate 0")
    for variable, engine in ENGINES.items():
        if os.environ.get(variable, "").lower() == "true":
            problems.append(f"accelerate is set to start {engine}: launch with one of the files in configs/accelerate/")
    return problems + _find_bad_metric(values)


def _out_of_range(name: str, value: Any) -> str | None:
    if not isinstance(value, int | float):
        return None
    if name in ABOVE_ZERO and not 0 < value < float("inf"):
        return f"{name} must be greater than 0, not {value}"
    if name in ZERO_OR_MORE and not 0 <= value < float("inf"):
        return f"{name} must be 0 or more, not {value}"
    if name in BELOW_ONE and not 0 <= value < 1:
        return f"{name} must be at least 0 and below 1, not {value}"
    if name in SEEDS and not 0 <= value < 1 << 32:
        return f"{name} must be at least 0 and below 2**32, not {value}"
    if value > AT_MOST.get(name, float("inf")):
        return f"{name} must be at most {AT_MOST[name]:,}, not {value}"
    return None


def _read_constant(path: Path, name: str) -> Any:
    """The value of one constant of a module, without importing the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    values = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    return ast.literal_eval(values[name])


def _find_bad_metric(values: dict[str, Any]) -> list[str]:
    """The problem with the metric by which the best checkpoint is known, if there is one."""
    metric, more = values.get("metric_for_best_model"), values.get("greater_is_better")
    if metric is None:
        by_what = values.get("save_strategy") == "best"
        return ["save_strategy best needs to know by what: give --metric_for_best_model loss"] if by_what else []
    metric = metric.removeprefix("eval_")
    if metric not in METRICS:
        return [f"metric_for_best_model must be one of {', '.join(METRICS)}, not {metric!r}"]
    if more not in (None, METRICS[metric]):
        return [f"greater_is_better {str(more).lower()} would take the worst {metric} for the best: leave it out"]
    return []
