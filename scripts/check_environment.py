"""Is this machine ready to train? Its hardware, and the checklist before a real run.

examples:
  python scripts/check_environment.py --data data/corpus.bin
  python scripts/check_environment.py --config configs/small_config.yaml --data data/corpus.bin

Takes the flags of run_clm_creature.py and writes nothing. Every check that fails says what to do. The exit code is 0
when all pass, else 1.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 (an older Python cannot read the rest of the project)
    sys.exit("error: this Python is too old: install Python 3.10 or newer")

import argparse
import ast
import importlib.util
import json
import platform
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from creature.errors import UserError, run_main  # noqa: E402
from creature.files import format_bytes, free_bytes, user_path  # noqa: E402

TOKENS_MINIMUM, TOKENS_RECOMMENDED = 10_000_000, 100_000_000


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=user_path, help="YAML file of the run (default configs/text_only_config.yaml)")
    parser.add_argument("--data", nargs="+", type=user_path, help="the data of the run")
    parser.add_argument(
        "--dry_run_dir", type=user_path, help="folder of the dry run to check (default checkpoints/dry_run)"
    )
    return parser.parse_known_args()


def main() -> int:
    arguments, rest = parse_arguments()
    checklist = Checklist()
    if not checklist.run("packages", check_packages):
        return checklist.finish()
    print_machine()
    settings = checklist.run("configuration", lambda: check_configuration(arguments, rest))
    checklist.run("tokenizer", check_tokenizer)
    if settings:
        values, config = settings
        plan = checklist.run("memory", lambda: check_memory(values, config))
        checklist.run("data file", lambda: check_data(values, config))
        checklist.run("output folder", lambda: check_output(values))
        checklist.run("free disk", lambda: check_disk(values, config))
        if plan:
            checklist.run("dry run", lambda: check_dry_run(arguments.dry_run_dir, config))
    return checklist.finish()


class Checklist:
    """Runs checks, each of which returns (a result, a line for the user) or raises UserError, and prints the lines."""

    def __init__(self):
        self.lines, self.failed = [], 0

    def run(self, name: str, check: Callable[[], tuple]):
        """The result of the check, or None if it failed."""
        try:
            result, text = check()
            self.lines.append(f"[x] {name}: {text}")
            return result
        except (UserError, OSError) as error:
            self.failed += 1
            self.lines.append(f"[ ] {name}: {' '.join(str(error).split())}")
            return None

    def finish(self) -> int:
        print("checklist")
        for line in self.lines:
            print(f"  {line}")
        if self.failed:
            print(f"\nnot ready: {self.failed} of {len(self.lines)} checks failed")
            return 1
        print("\nready: start with accelerate launch run_clm_creature.py")
        return 0


def requirements() -> list[str]:
    """The project's requirements, from its installed metadata, or from setup.py in a clone that is not installed."""
    try:
        return [line for line in metadata.requires("multimodal-creature") or [] if "extra ==" not in line]
    except metadata.PackageNotFoundError:
        for node in ast.walk(ast.parse((PROJECT / "setup.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "install_requires":
                return ast.literal_eval(node.value)
    raise AssertionError("setup.py names no requirements")


def check_packages() -> tuple[bool, str]:
    remedy = f"run `pip install -c constraints.txt -e .` in {PROJECT}"
    if not (PROJECT / "setup.py").is_file():  # installed from a wheel
        remedy = "install that with pip"
    if importlib.util.find_spec("packaging") is None:
        raise UserError(f"packaging is missing: {remedy}")
    from packaging.requirements import Requirement

    problems, shown = [], []
    for line in requirements():
        needed = Requirement(line)
        try:
            version = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            problems.append(f"{needed.name} is missing")
            continue
        if not needed.specifier.contains(version, prereleases=True):
            problems.append(f"{needed.name} is {version}, needed is {needed.specifier}")
        if needed.name in ("torch", "transformers", "datasets", "accelerate"):
            shown.append(f"{needed.name} {version}")
    if problems:
        raise UserError(f"{'; '.join(problems)}: {remedy}")
    return True, ", ".join(shown)


def print_machine() -> None:
    import torch

    from creature import hardware

    device = hardware.device_info()
    precision, why = hardware.choose_precision(device)
    kernel, kernel_why = hardware.attention_kernel(device, precision)
    works, compiler_why = hardware.compiler_available(device)
    total, free = hardware.system_memory()
    rate = hardware.peak_flops(device.name) if device.kind == "cuda" else None
    count = f"{device.count} x " if device.count > 1 else ""
    rows = {
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "device": f"{count}{device.name}" + (f", {rate / 1e12:.0f} TFLOP/s" if rate else ""),
        "cores": f"{device.cores} for this process, {torch.get_num_threads()} threads in torch",
        "memory": f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
        "precision": f"{precision} ({why})",
        "attention": f"{kernel} ({kernel_why})",
        "torch.compile": f"{'works' if works else 'off'} ({compiler_why})",
        "disk": f"{free_bytes('.') / 2**30:.1f} GiB free here",
    }
    if device.kind != "cpu":
        rows["GPU memory"] = f"{device.free_bytes / 2**30:.1f} of {device.memory_bytes / 2**30:.1f} GiB free"
    print("machine")
    for name, text in rows.items():
        print(f"  {name:<14} {text}")
    print()


def check_configuration(arguments: argparse.Namespace, rest: list[str]) -> tuple[tuple, str]:
    from creature.settings import parse_settings

    flags = [*rest]
    for name in ("config", "data"):
        if value := getattr(arguments, name):
            flags += [f"--{name}", *([value] if isinstance(value, str) else value)]
    settings = parse_settings(flags)
    from creature.estimate import count_parameters
    from creature.job import build_config

    config, _ = build_config(settings)
    counts = count_parameters(config)
    name = arguments.config or "configs/text_only_config.yaml"
    return (settings, config), f"{name}, {counts['total']:,} parameters, {counts['trainable']:,} of them trained"


def check_tokenizer() -> tuple[bool, str]:
    from creature.data.text.tokenizer import gpt2_hash

    return True, f"GPT-2's vocabulary files are as published ({gpt2_hash()[:12]})"


def check_memory(settings, config) -> tuple[object, str]:
    from creature.plan import plan_run

    plan = plan_run(settings, config)
    return plan, (
        f"micro-batch {plan.micro_batch} x {plan.block_size:,} tokens fits {plan.device.name}, "
        f"accumulation {plan.accumulation} to {plan.tokens_per_step:,} tokens a step"
    )


def check_data(settings, config) -> tuple[bool, str]:
    source = settings.data.data
    if not source:
        raise UserError("no --data: make a token file with scripts/tokenize_corpus.py, and name it with --data")
    from creature.data import load_data
    from creature.data.mixture import parse_parts
    from creature.data.text.readers import Documents
    from creature.data.text.sources import find_sources

    names = [source] if isinstance(source, str) else parse_parts(source)[0] if len(source) > 1 else source
    block_size = settings.data.block_size or config.max_position_embeddings
    count, texts = 0, []
    for name in names:
        sources, _ = find_sources([name], tokens=True)
        if sources[0].kind not in ("tokens", "arrow"):
            for source in sources:
                if source.kind not in ("hub", "parquet"):  # those would be read whole, or from the network
                    next(iter(Documents(source, settings.data.text_column)), None)
            texts.append(name)
            continue
        count += load_data(replace(settings.data, data=name), block_size, config.vocab_size)[1]["tokens"]
    if texts:
        return True, f"{' '.join(texts)}, text, which the run tokenizes first"
    advice = ""
    if count < TOKENS_RECOMMENDED:
        least = "10 M are the minimum, " if count < TOKENS_MINIMUM else ""
        advice = f" ({least}100 M and more are recommended)"
    return True, f"{' '.join(names)}, {count:,} tokens{advice}"


def check_output(settings) -> tuple[bool, str]:
    from creature.checkpoints import check_output as check

    check(settings)
    return True, f"{settings.output_dir} is free"


def check_disk(settings, config) -> tuple[bool, str]:
    """Weights and optimizer state of every checkpoint that is kept or being written, and the final model."""
    from creature.estimate import count_parameters, memory_parts
    from creature.hardware import device_info

    training = settings.training
    weights = 4 * count_parameters(config)["total"]
    each = weights + memory_parts(config, 1, 8, device_info("cpu"))["optimizer_state"]
    steps, save_steps = max(training.get("max_steps", 1), 1), training.get("save_steps", 5000)
    planned = int(-(-steps // save_steps)) if save_steps >= 1 else int(1 / save_steps)
    kept = training.get("save_total_limit", 3)
    # Also on the disk: the checkpoint at the start of the decay, and the one being written.
    number = min(planned, kept) + 2 if kept else planned + 2
    needed, folder = number * each + weights, settings.output_dir
    free = free_bytes(folder)
    text = f"{number} checkpoints of {format_bytes(each)} and the final model take {format_bytes(needed)}"
    if free < needed:
        raise UserError(
            f"{text}, and the disk of {folder} has {format_bytes(free)}: free some space, choose another --output_dir, "
            "or keep fewer with --save_total_limit"
        )
    return True, f"{text}; {format_bytes(free)} are free"


def check_dry_run(folder: str | None, config) -> tuple[bool, str]:
    from creature.checkpoints import differences, read_run
    from creature.settings import DRY_RUN_FOLDER

    folder = folder or DRY_RUN_FOLDER
    command = "accelerate launch run_clm_creature.py --dry_run with the flags of the run"
    run = read_run(folder)
    if run is None:
        raise UserError(f"no dry run in {folder}: run {command}")
    if run.get("dry_run") != "passed":
        raise UserError(f"the dry run in {folder} failed: read what it printed, and run {command} again")
    own = json.loads(json.dumps(config.to_dict(), default=str))  # as run.json has it
    changed = differences({"model": run["must_match"].get("model", {})}, {"model": own})
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(f"the dry run in {folder} had another configuration ({changed[0]}{more}): run {command}")
    return True, f"passed in {folder}, {run.get('started', '')}".rstrip(", ")


if __name__ == "__main__":
    run_main(main)
