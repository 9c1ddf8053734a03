"""Growth: speed, MFU and memory of the training step for larger creatures and longer contexts, beside the estimate.

examples:
  python benchmarks/scaling.py --data data/corpus.bin
  python benchmarks/scaling.py --rows tiny small tiny-8192
  python benchmarks/scaling.py --rows tiny-1024 --tokens_per_step 1024 --steps 2 --warmup 1               # a laptop

Every row is CreatureTrainer with Muon and AdamW, compiled and in bf16 on a GPU, at the micro-batch that fits according
to the estimate, accumulated to --tokens_per_step. Without --data it trains on generated stories. A row that fails or
runs out of memory says so, and the next one runs.
"""

import argparse
import sys
import tempfile
from pathlib import Path

# In place of this folder, whose tokenize.py would hide the standard library's module of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from creature.files import user_path  # noqa: E402

# Name of the row: configuration, context.
ROWS = {
    "tiny": ("text_only", 2048),
    "small": ("small", 2048),
    "medium": ("medium", 2048),
    "1b": ("1b", 2048),
    "tiny-1024": ("text_only", 1024),
    "tiny-4096": ("text_only", 4096),
    "tiny-8192": ("text_only", 8192),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="which rows (default: all)")
    parser.add_argument("--data", type=user_path, help="token stream or text (default: generated stories)")
    parser.add_argument("--tokens_per_step", type=int, default=65536, help="tokens of a step (default 65536)")
    parser.add_argument("--micro_batch", type=int, help="blocks computed at once (default: what fits)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps (default 10)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default 3)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile (default: on a GPU)")
    arguments = parser.parse_args()
    if arguments.warmup < 1 or arguments.steps < 2:
        parser.error("give at least --warmup 1 and --steps 2: a step is timed from the end of the one before")
    return arguments


def build_config(name: str):
    """The configuration of a row, with its context."""
    from benchmarks.throughput import configuration

    file, context = ROWS[name]
    return configuration(file, max_position_embeddings=context)


def measure(name: str, source: str, folder: str, options: argparse.Namespace) -> str:
    """Train one row; returns its line of the table."""
    from benchmarks.throughput import clear_device, timed_steps
    from creature import estimate
    from creature.data import DataArguments, load_data
    from creature.hardware import device_info, peak_flops
    from modeling_creature import MultiModalCreature

    clear_device()  # before the free memory is read
    config, context, device = build_config(name), ROWS[name][1], device_info()
    cuda = device.kind == "cuda"
    compiled = cuda if options.compile is None else options.compile
    precision = "bf16" if cuda else "fp32"
    limit = max(1, options.tokens_per_step // context)
    batch = options.micro_batch or estimate.fit_micro_batch(
        config, context, device, precision, compiled=compiled, limit=limit
    )
    batch = max(batch, 1)
    accumulation = max(1, limit // batch)
    start = f"{name:10}  {f'{accumulation} x {batch} x {context}':>14}  "
    try:
        blocks = load_data(DataArguments(source, cache_dir=folder), context, config.vocab_size)[0]["train"]
        model = MultiModalCreature(config)
        model.train_only()
        form = {"micro_batch": batch, "accumulation": accumulation, "compiled": compiled}
        seconds, gib = timed_steps(model, blocks, steps=options.steps, warmup=options.warmup, **form)
    except Exception as error:  # out of memory, or whatever the compiler raises: the other rows are worth having
        text = " ".join(str(error).split())
        return start + ("out of memory" if "out of memory" in text else f"{type(error).__name__}: {text[:200]}")
    speed = batch * accumulation * context / seconds
    expected, peak = estimate.tokens_per_second(config, context, device.name), peak_flops(device.name)
    memory = estimate.memory_parts(config, batch, context, device, precision, compiled=compiled)["peak"] / 2**30
    times = f"{expected:11,.0f}  {expected / speed - 1:+6.1%}" if expected else f"{'-':>11}  {'':6}"
    mfu = f"{speed * estimate.flops_per_token(config, context) / peak:6.1%}" if peak else f"{'-':>6}"
    sizes = f"{gib:8.2f}  {memory:9.2f}  {memory / gib - 1:+6.1%}" if cuda else f"{'-':>8}  {memory:9.2f}"
    return f"{start}{1000 * seconds:10.1f}  {speed:11,.0f}  {times}  {mfu}  {sizes}"


def main() -> None:
    options = parse_arguments()
    from creature.data.text.stories import write_story_corpus

    with tempfile.TemporaryDirectory() as folder:
        source = options.data
        if source is None:
            source = str(Path(folder, "stories.txt"))
            # One step more than needed, and enough to hold one block out: no epoch ends during the run.
            tokens = (options.steps + options.warmup + 1) * max(options.tokens_per_step, 8192)
            write_story_corpus(source, tokens, seed=0)
        print(
            f"{'row':10}  {'batch':>14}  {'ms a step':>10}  {'tokens/s':>11}  {'estimated':>11}  {'':6}  {'MFU':>6}  "
            f"{'peak GiB':>8}  {'estimated':>9}"
        )
        for name in options.rows:
            print(measure(name, source, folder, options), flush=True)


if __name__ == "__main__":
    main()
