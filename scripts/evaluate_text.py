"""Loss, perplexity, bits per byte and next-token accuracy of a trained creature on a text.

examples:
  python scripts/evaluate_text.py --checkpoint checkpoints/text_only --data data/corpus.bin
  python scripts/evaluate_text.py --checkpoint checkpoints/text_only --data book.txt --block_size 512
  python scripts/evaluate_text.py --checkpoint checkpoints/text_only --data data/corpus.bin --all
  python scripts/evaluate_text.py --checkpoint checkpoints/text_only --data books --documents

--data is anything run_clm_creature.py trains on; --split chooses the split, by default validation where there is one.
--all evaluates every complete checkpoint of a run: a table, a figure (RUN/evaluation.png) and a sample of each.
--documents gives a table of the documents of a text, each read in windows of the context, as lm_eval reads it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from creature.errors import UserError, require_unicode, run_main  # noqa: E402
from creature.files import user_path  # noqa: E402

NAMES = {"loss": "loss", "perplexity": "perplexity", "bits_per_byte": "bits per byte", "accuracy": "accuracy"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=user_path, required=True, help="folder of a run, of a checkpoint or of a saved model"
    )
    parser.add_argument(
        "--data", type=user_path, required=True, help="token file, Arrow folder, text file or folder, or Hub name"
    )
    parser.add_argument("--all", action="store_true", help="every complete checkpoint of the run")
    parser.add_argument("--documents", action="store_true", help="a table with a line for each document of a text")
    parser.add_argument("--split", choices=("validation", "train"), help="default: validation where there is one")
    parser.add_argument("--block_size", type=int, help="tokens read at once (default: the creature's context)")
    parser.add_argument("--batch_size", type=int, help="blocks computed at once (default 16 on a GPU, 1 on a CPU)")
    parser.add_argument(
        "--separate_documents",
        action=argparse.BooleanOptionalAction,
        help="keep the documents of a block apart (default: as the run was trained)",
    )
    parser.add_argument("--max_blocks", type=int, help="evaluate the first so many blocks only")
    parser.add_argument("--prompt", default="Once upon a time", help="what the samples of --all continue")
    parser.add_argument("--output", type=user_path, help="figure of --all (default RUN/evaluation.png)")
    parser.add_argument(
        "--cache_dir", type=user_path, default="data", help="where text is kept once it is tokenized (default data)"
    )
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: a GPU if there is one")
    arguments = parser.parse_args()
    for name in ("block_size", "batch_size", "max_blocks"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if arguments.output and not arguments.all:
        parser.error("--output is the figure of --all")
    if arguments.documents:
        for name in ("all", "split", "max_blocks", "separate_documents"):
            if getattr(arguments, name) is not None and getattr(arguments, name) is not False:
                parser.error(f"--documents reads every document of a text, each on its own: leave out --{name}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    require_unicode("--prompt", arguments.prompt)
    from creature.loading import find_model, load_config, load_saved_tokenizer

    folders = find_all(arguments.checkpoint) if arguments.all else [(0, find_model(arguments.checkpoint))]
    import transformers

    from creature.data.text.tokenizer import token_byte_lengths
    from creature.hardware import device_info

    transformers.utils.logging.disable_progress_bar()
    device = device_info(arguments.device)
    arguments.batch_size = arguments.batch_size or (1 if device.kind == "cpu" else 16)
    config = load_config(folders[0][1])
    tokenizer = load_saved_tokenizer(folders[0][1])
    if arguments.documents:
        report_documents(folders[0][1], config, tokenizer, device, arguments)
        return
    if arguments.separate_documents is None:
        arguments.separate_documents = trained_apart(folders[0][1])
    rows = open_data(arguments, config, tokenizer, folders[0][1])
    lengths = token_byte_lengths(tokenizer, config.vocab_size)
    results = []
    for step, folder in folders:
        print(f"evaluating {folder} on {device.name}", file=sys.stderr)
        result, sample = evaluate(folder, rows, lengths, tokenizer, device, arguments)
        results.append({"step": step, **result, "sample": sample})
    if arguments.all:
        report_progression(results, arguments)
    else:
        for name, label in NAMES.items():
            print(f"{label:<14} {results[0][name]:.4f}")


def trained_apart(folder: Path) -> bool:
    """Whether the run of a model kept documents apart, by the run.json in its folder or the one above."""
    from creature.checkpoints import read_run

    run = read_run(folder) or read_run(folder.resolve().parent) or {"must_match": {}}
    return run["must_match"].get("separate_documents", False)


def find_all(run: str) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint of a run and of its final model, oldest first."""
    from creature.checkpoints import list_checkpoints, problem_with, read_run, step_of
    from creature.loading import find_model, has_model

    folder = find_model(run)  # raises where there is none
    found = {}
    for checkpoint in list_checkpoints(run):
        problem = problem_with(checkpoint) or (None if has_model(checkpoint) else "it has no model")
        if problem:
            print(f"warning: {checkpoint} is left out: {problem}", file=sys.stderr)
        else:
            found[step_of(checkpoint)] = checkpoint
    if folder == Path(run):
        steps = (read_run(run) or {}).get("steps_done")
        if not found and steps is None:
            raise UserError(f"{run} is not the folder of a run with checkpoints: leave out --all")
        if steps is not None:
            found.setdefault(steps, folder)
    return sorted(found.items())


def open_data(arguments: argparse.Namespace, config, tokenizer, folder: Path):
    """The blocks to evaluate, as a Dataset with the column input_ids."""
    from creature.data import DataArguments, load_data
    from creature.data.text.tokenizer import gpt2_hash, tokenizer_hash

    name = "gpt2" if tokenizer_hash(tokenizer) == gpt2_hash() else str(folder)
    data = DataArguments(arguments.data, tokenizer_name=name, validation_fraction=0.0, cache_dir=arguments.cache_dir)
    splits, _ = load_data(data, arguments.block_size or config.max_position_embeddings, config.vocab_size)
    split = arguments.split or ("validation" if "validation" in splits else "train")
    rows = splits.get(split)
    if rows is None:
        raise UserError(f"{arguments.data} has no validation split of at least one block: leave out --split")
    if arguments.max_blocks:
        rows = rows.select(range(min(arguments.max_blocks, len(rows))))
    whole = f"its {split} split" if "validation" in splits else "all of it"
    apart = ", documents kept apart" if arguments.separate_documents else ""
    print(f"{arguments.data}: {whole}, {len(rows):,} blocks{apart}", file=sys.stderr)
    return rows


def evaluate(folder: Path, rows, lengths, tokenizer, device, arguments) -> tuple[dict, str | None]:
    """(the metrics of one model on all rows, a sample with --all)."""
    import torch
    from tqdm import tqdm

    from creature.data import block_collator
    from creature.loading import load_model
    from creature.metrics import TextMetrics

    model = load_model(folder, device.kind, torch.float32)
    collator = block_collator(tokenizer, arguments.separate_documents)
    batches = torch.utils.data.DataLoader(rows, batch_size=arguments.batch_size, collate_fn=collator)
    metrics = TextMetrics(lengths)
    for batch in tqdm(batches, unit="batch", file=sys.stderr, disable=None, leave=False):
        with torch.inference_mode(), autocast(device):
            output = model(**{name: tensor.to(device.kind) for name, tensor in batch.items()}, return_logits=False)
        metrics.add_batch(output.token_losses, output.predictions, batch["labels"])
    sample = None
    if arguments.all:
        from creature.finalize import sample as draw

        sample = draw(model, tokenizer, arguments.prompt)
    return metrics.compute(), sample


def autocast(device):
    """A context that computes in bfloat16 on a GPU that has it, as training does."""
    import torch

    return torch.autocast(device.kind, dtype=torch.bfloat16, enabled=device.kind == "cuda" and device.bf16)


def report_documents(folder: Path, config, tokenizer, device, arguments: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from creature.evaluation import Score, score_documents, whole_documents
    from creature.loading import load_model

    context = config.max_position_embeddings
    block_size = arguments.block_size or context
    if block_size > context:
        raise UserError(f"--block_size {block_size:,} is more than the creature's context: {context:,} at most")
    print(f"evaluating {folder} on {device.name}, windows of {block_size:,} tokens", file=sys.stderr)
    documents = whole_documents(arguments.data)
    model = load_model(folder, device.kind, torch.float32)
    with autocast(device):
        scores = score_documents(
            model,
            tokenizer,
            documents,
            block_size=block_size,
            batch_size=arguments.batch_size,
            progress=lambda batches: tqdm(batches, unit="batch", file=sys.stderr, disable=None, leave=False),
        )
    total = Score()
    for score in scores.values():
        total.add(score)
    names = {name: name if len(name) <= 40 else f"...{name[-37:]}" for name in scores}
    width = max(len("document"), *map(len, names.values()))
    header = f"{'document':<{width}}{'tokens':>12}{'bytes':>14}"
    print(header + "".join(f"{label:>15}" for label in NAMES.values()))
    for name, score in [*scores.items(), (f"all {len(scores):,}", total)]:
        line = f"{names.get(name, name):<{width}}{score.tokens:>12,}{score.bytes:>14,}"
        print(line + "".join(f"{getattr(score, metric):>15.4f}" for metric in NAMES))


def report_progression(results: list[dict], arguments: argparse.Namespace) -> None:
    from creature.plots import plot_progression

    print(f"{'step':>10}" + "".join(f"{label:>15}" for label in NAMES.values()))
    for row in results:
        print(f"{row['step']:>10,}" + "".join(f"{row[name]:>15.4f}" for name in NAMES))
    for row in results:
        print(f"\nstep {row['step']:,}: {row['sample']}")
    output = arguments.output or Path(arguments.checkpoint) / "evaluation.png"
    path = plot_progression(results, output, Path(arguments.checkpoint).resolve().name)
    print(f"\n{path}")


if __name__ == "__main__":
    run_main(main)
