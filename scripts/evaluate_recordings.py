"""What a creature makes of held-out recordings: every stream, what each sense is worth, commands a second ahead.

examples:
  python scripts/evaluate_recordings.py --checkpoint checkpoints/move --data recordings/motion
  python scripts/evaluate_recordings.py --checkpoint checkpoints/hear --data recordings/speech --output hear.json
  python scripts/evaluate_recordings.py --checkpoint checkpoints/move --data recordings/motion --ahead 80 1000

First the metrics that the run evaluated, on the validation split. Then, of a creature that moves, its commands one tick
ahead, and in open loop: it perceives a recording until a moment, and its own commands alone for 13 ticks after it. The
moments and measures are those of `benchmarks/dedicated.py`, whose models stand beside it; docs/evaluation.md says more.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from creature.errors import UserError, run_main  # noqa: E402
from creature.files import user_path  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=user_path, required=True, help="folder of recordings with a validation split")
    parser.add_argument(
        "--ahead", nargs="+", type=int, metavar="MS", help="of joint angles (default 80 160 320 400 1000; at most 1040)"
    )
    add_arguments(parser)
    return parser.parse_args()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of everything that evaluates a creature on the clips of recordings."""
    parser.add_argument(
        "--checkpoint", type=user_path, required=True, help="folder of a run, of a checkpoint or of a saved model"
    )
    parser.add_argument("--output", type=user_path, help="JSON file for all figures")
    parser.add_argument(
        "--cache_dir", type=user_path, default="data", help="where clips are kept once they are made (default data)"
    )
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: a GPU if there is one")


def main() -> None:
    arguments = parse_arguments()
    from creature.loading import find_model, load_config, load_processor

    folder = find_model(arguments.checkpoint)
    config = load_config(folder)
    import torch
    import transformers
    from datasets import DatasetDict

    from creature.callbacks import evaluation_lines
    from creature.data.recordings.clips import WHOLE, has_column, make_clips
    from creature.data.recordings.rows import EvaluationClips
    from creature.files import replace_file, require_writable
    from creature.hardware import device_info
    from creature.loading import load_model, trained_ticks
    from creature.rounds.evaluation import code_habits, sense_sizes
    from creature.rounds.open_loop import MILLISECONDS, measure_open_loop
    from creature.settings import DataArguments

    transformers.utils.logging.disable_progress_bar()
    milliseconds = check_ahead(arguments.ahead or MILLISECONDS, config)
    if arguments.output:
        require_writable(Path(arguments.output).parent)
    device = device_info(arguments.device)
    processor = load_processor(folder, config)
    context = trained_ticks(folder, min(DataArguments.clip_ticks, config.max_position_embeddings))
    recordings, facts = open_recordings(arguments.data)
    cut = functools.partial(make_clips, cache_dir=Path(arguments.cache_dir, "clips"))
    held_out = DatasetDict({"validation": recordings["validation"]})
    # How often each code occurs is counted in the training split, which nothing else here needs.
    speaks = processor.codec is not None and has_column(recordings, "voice") and "train" in recordings
    splits, about = cut(recordings if speaks else held_out, facts, processor, context)
    clips, habits = splits["validation"], code_habits(config, [splits["train"]]) if speaks else None
    if not set(about["streams"]) & {name for name, weight in config.loss_weights.items() if weight}:
        raise UserError(
            f"{arguments.data} feeds {', '.join(about['streams']) or 'no stream'}, which {folder} has not learned: "
            "give recordings of what it has"
        )
    model = load_model(folder, device.kind, torch.float32)
    print(f"evaluating {folder} on {device.name}: {len(clips)} clips of up to {context} ticks", file=sys.stderr)
    moves = "animation" in about["streams"]
    with torch.autocast(device.kind, dtype=torch.bfloat16, enabled=device.kind == "cuda" and device.bf16):
        metrics, sizes = evaluate(model, clips, device.kind, habits), sense_sizes(model, clips)
        whole = EvaluationClips(cut(held_out, facts, processor, WHOLE)[0]["validation"]) if moves else []
        commands = measure_open_loop(model, map(whole.__getitem__, range(len(whole))), context, milliseconds)
    print(f"loss {metrics['loss']:.4f}")
    print("\n".join(evaluation_lines({f"eval_{name}": value for name, value in metrics.items() if name != "loss"})))
    print("  size beside the token table: " + " | ".join(f"{name} {size:.3g}" for name, size in sizes.items()))
    for part, figures in commands.items():
        print_commands(part, figures)
    if arguments.output:
        result = {"checkpoint": str(folder), "data": arguments.data, "clip_ticks": context, "clips": len(clips)}
        result |= {"metrics": metrics, "sizes": sizes, "commands": commands}
        with replace_file(arguments.output, "w") as file:
            file.write(json.dumps(result, indent=2) + "\n")


def check_ahead(milliseconds: tuple[int, ...], config) -> tuple[int, ...]:
    """The moments, in ms; UserError for one that is no end of a sub-frame, or is not forecast."""
    from creature.rounds.open_loop import AHEAD, TICK_MS

    longest, subframe = AHEAD * TICK_MS, TICK_MS / config.subframes_per_tick
    for moment in milliseconds:
        if not 0 < moment <= longest or moment % subframe:
            raise UserError(f"--ahead {moment} is no multiple of {subframe:g} ms from {subframe:g} to {longest}")
    return tuple(milliseconds)


def open_recordings(folder: str):
    """(the splits of a folder of recordings, its facts); UserError for one without a validation split."""
    from creature.data.recordings.schema import load_recordings

    recordings, facts = load_recordings(folder)
    if "validation" not in recordings:
        raise UserError(
            f"{folder} has no validation split: import it again with --validation_fraction or --validation_groups"
        )
    return recordings, facts


def evaluate(model, clips, device: str, habits) -> dict[str, float]:
    """`evaluate_clips` in a plain loop."""
    import torch
    from accelerate.utils import send_to_device
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from creature.data.recordings.rows import ClipPairs
    from creature.rounds.evaluation import collate_pairs, evaluate_clips, variant_sums, variants_of

    variants = variants_of(clips)
    batches = DataLoader(ClipPairs(clips), batch_size=16 if device == "cuda" else 2, collate_fn=collate_pairs)
    bar = tqdm(batches, unit="batch", file=sys.stderr, disable=None, leave=False)
    sums = torch.cat([variant_sums(model, send_to_device(batch, device), variants).cpu() for batch in bar])
    return evaluate_clips(model.config, clips, sums.numpy(), habits)


def print_commands(part: str, figures: dict) -> None:
    """A table with a line for the creature, and one for repeating the last command."""
    unit = "degrees" if part == "rotation" else "standard deviations"
    names, digits = list(figures["creature"]), 3 if part == "rotation" else 4
    print(f"\n{part} in {unit}, {figures['windows']} windows")
    if not figures["windows"]:
        print("no recording lasts 3.04 s, as a forecast of a second takes")
    print(f"{'':<22}" + "".join(f"{name:>14}" for name in names))
    for row, label in (("creature", "creature"), ("repeating", "repeating the last")):
        print(f"{label:<22}" + "".join(f"{figures[row][name]:>14.{digits}f}" for name in names))


if __name__ == "__main__":
    run_main(main)
