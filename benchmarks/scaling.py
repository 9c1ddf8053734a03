"""Growth: speed, MFU and memory of the training step for larger creatures and longer contexts, beside the estimate.

examples:
  python benchmarks/scaling.py --data data/corpus.bin --output scaling.json
  python benchmarks/scaling.py --rows tiny small tiny-8192 --output scaling.json       # adds to the rows in the file
  python benchmarks/scaling.py --fit scaling.json                                      # what the estimate should assume
  python benchmarks/scaling.py --rows tiny-1024 --tokens_per_step 1024 --steps 2 --warmup 1               # a laptop

Every row is CreatureTrainer with Muon and AdamW, compiled and in bf16 on a GPU, at the micro-batch of which the
estimate says that it fits, accumulated to --tokens_per_step. Without --data it trains on made-up stories. A row that
has no room, or fails in another way, says so, and the next one runs.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

# In place of this folder, whose tokenize.py would hide the standard library's module of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

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
    parser.add_argument("--data", help="token stream or text (default: made-up stories)")
    parser.add_argument("--tokens_per_step", type=int, default=65536, help="tokens of a step (default 65536)")
    parser.add_argument("--micro_batch", type=int, help="blocks computed at once (default: what fits)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps (default 10)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default 3)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile (default: on a GPU)")
    parser.add_argument("--output", help="JSON file for the rows; those of the same name in it are replaced")
    parser.add_argument("--fit", metavar="FILE", help="only print the constants of creature/estimate.py that fit FILE")
    arguments = parser.parse_args()
    if arguments.warmup < 1 or arguments.steps < 2:
        parser.error("give at least --warmup 1 and --steps 2: a step is timed from the end of the one before")
    return arguments


def build_config(name: str):
    """The configuration of a row, with its context."""
    from benchmarks.throughput import configuration

    file, context = ROWS[name]
    return configuration(file, max_position_embeddings=context)


def measure(name: str, source: str, folder: str, options: argparse.Namespace) -> dict:
    """Train one row; returns it."""
    import torch

    from benchmarks.throughput import clear_device, timed_steps
    from creature import estimate
    from creature.data import load_splits
    from creature.hardware import card_name, device_info
    from modeling_creature import MultiModalCreature

    clear_device()  # before the device is asked what is free
    config, context, device = build_config(name), ROWS[name][1], device_info()
    cuda = device.kind == "cuda"
    compiled = cuda if options.compile is None else options.compile
    form = {"precision": "bf16" if cuda else "fp32", "compiled": compiled}
    limit = max(1, options.tokens_per_step // context)
    fits = options.micro_batch or estimate.fit_micro_batch(config, context, device, limit=limit, **form)
    batch, accumulation = max(fits, 1), max(1, limit // max(fits, 1))
    row = {"row": name, "card": device.name, "context": context, "micro_batch": batch, "accumulation": accumulation}
    row |= {"steps": options.steps, "torch": torch.__version__, **form}

    card = card_name(device.name) if cuda else None
    row["predicted_seconds"] = estimate.step_seconds(config, batch, context, card, accumulation) if card else None
    device_form = {"device_kind": device.kind, "float8": device.is_hopper}
    parts = estimate.memory_parts(config, batch, context, accumulating=accumulation > 1, **device_form, **form)
    row["predicted_gib"] = parts["peak"] / 2**30
    try:
        blocks = load_splits(source, block_size=context, vocab_size=config.vocab_size, cache_dir=folder).train
        model = MultiModalCreature(config)
        model.train_only()
        seconds, gib = timed_steps(
            model,
            blocks,
            micro_batch=batch,
            accumulation=accumulation,
            steps=options.steps,
            warmup=options.warmup,
            compiled=compiled,
        )
    except Exception as error:  # out of memory, or whatever the compiler meets: the other rows are worth having
        text = " ".join(str(error).split())
        return row | {"error": "out of memory" if "out of memory" in text else f"{type(error).__name__}: {text[:200]}"}
    speed = batch * accumulation * context / seconds
    peak = estimate.CARDS[card].peak_flops if card else None
    row |= {"seconds": seconds, "gib": None if math.isnan(gib) else gib, "tokens_per_second": speed}
    return row | {"mfu": speed * estimate.flops_per_token(config, context) / peak if peak else None}


HEADER = (
    f"{'row':10}  {'batch':>14}  {'ms a step':>10}  {'estimated':>10}  {'':>7}  {'tokens/s':>11}  {'MFU':>6}  "
    f"{'peak GiB':>8}  {'estimated':>9}"
)


def line(row: dict) -> str:
    """A row of the table: what was measured, what the estimate said, and by how much that is off."""
    batch = f"{row['accumulation']} x {row['micro_batch']} x {row['context']}"
    start = f"{row['row']:10}  {batch:>14}  "
    if "error" in row:
        return start + row["error"]
    seconds, gib = row["predicted_seconds"], row["predicted_gib"]
    predicted = f"{1000 * seconds:10.1f}  {seconds / row['seconds'] - 1:+7.1%}" if seconds else f"{'-':>10}  {'':7}"
    mfu = f"{row['mfu']:6.1%}" if row["mfu"] else f"{'-':>6}"
    memory = f"{row['gib']:8.2f}  {gib:9.2f}  {gib / row['gib'] - 1:+7.1%}" if row["gib"] else f"{'-':>8}  {gib:9.2f}"
    speed = f"{row['tokens_per_second']:11,.0f}"
    return f"{start}{1000 * row['seconds']:10.1f}  {predicted}  {speed}  {mfu}  {memory}"


def read_rows(path: str) -> list[dict]:
    return json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).is_file() else []


def fit_shares(rows: list[dict], strength: float = 0.1):
    """
    The `Shares` under which the estimate comes closest to the measured step times, in relative terms.

    A step's time is a sum over kinds of work of their ideal time by their share, so this is linear least squares in the
    factors by which each kind takes longer than under the present shares. `strength` draws every factor towards 1, for
    a few rows do not tell all kinds apart.
    """
    from dataclasses import astuple, fields

    import numpy as np

    from creature.estimate import Shares, card_shares, ideal_seconds
    from creature.hardware import card_name

    card = card_name(rows[0]["card"])
    names, now = [field.name for field in fields(Shares)], np.array(astuple(card_shares(card)[0]))
    lines, goals = [], []
    for row in rows:
        ideal = ideal_seconds(build_config(row["row"]), row["micro_batch"], row["context"], card, row["accumulation"])
        seconds = [ideal[name] / share for name, share in zip(names[:-1], now, strict=False)] + [now[-1]]
        lines.append(np.array(seconds) / row["seconds"])
        goals.append(1.0)
    for index in range(len(names)):
        lines.append(strength * np.eye(len(names))[index])
        goals.append(strength)
    factors = np.linalg.lstsq(np.array(lines), np.array(goals), rcond=None)[0].clip(min=0.2)
    shares = [*(now[:-1] / factors[:-1]), now[-1] * factors[-1]]
    return Shares(*(float(f"{share:.3g}") for share in shares))


def print_fit(rows: list[dict]) -> None:
    """The fitted shares with what is left of the deviations, and the bytes that a layer turns out to keep."""
    from unittest.mock import patch

    from creature import estimate
    from creature.hardware import card_name, is_hopper

    measured = [row for row in rows if row.get("gib") and card_name(row["card"]) and row["compiled"]]
    cards = sorted({row["card"] for row in measured})
    if len(cards) != 1:
        raise SystemExit(f"--fit needs compiled rows of one known card, and the file has those of {cards or 'none'}")
    card, shares = card_name(cards[0]), fit_shares(measured)
    print(f'    "{card}": {shares},\n')
    print(
        f"{'row':10}  {'ms a step':>10}  {'fitted':>10}  {'':>7}  bytes a layer keeps of a token: measured, estimated"
    )
    with patch.dict(estimate.MEASURED_SHARES, {card: shares}):
        for row in measured:
            config, batch, context = build_config(row["row"]), row["micro_batch"], row["context"]
            seconds = estimate.step_seconds(config, batch, context, card, row["accumulation"])
            kept = estimate.layer_bytes_per_token(config, "bf16", compiled=True)
            layers = config.num_hidden_layers * batch * context
            form = {"compiled": True, "float8": is_hopper(card)}
            estimated = estimate.memory_parts(config, batch, context, accumulating=row["accumulation"] > 1, **form)[
                "peak"
            ]
            found = kept + (row["gib"] * 2**30 - estimated) / layers
            deviation = f"{seconds / row['seconds'] - 1:+7.1%}"
            print(
                f"{row['row']:10}  {1000 * row['seconds']:10.1f}  {1000 * seconds:10.1f}  {deviation}  "
                f"{found:,.0f}, {kept:,}"
            )


def main() -> None:
    options = parse_arguments()
    if options.fit:
        print_fit(read_rows(options.fit))
        return
    from creature.data.text.stories import write_story_corpus

    rows = {row["row"]: row for row in read_rows(options.output)} if options.output else {}
    with tempfile.TemporaryDirectory() as folder:
        source = options.data
        if source is None:
            source = str(Path(folder, "stories.txt"))
            # One step more than it takes, and so much that one block can be held out: no epoch ends on the way.
            tokens = (options.steps + options.warmup + 1) * max(options.tokens_per_step, 8192)
            write_story_corpus(source, tokens, seed=0)
        print(HEADER)
        for name in options.rows:
            row = measure(name, source, folder, options)
            print(line(row), flush=True)
            rows[name] = row
            if options.output:
                Path(options.output).write_text(json.dumps(list(rows.values()), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
