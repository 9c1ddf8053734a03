"""What a run will need, before it is started: parameters, FLOPs per token, memory by part, hours on named cards.

examples:
  python scripts/estimate.py --config configs/text_only_config.yaml
  python scripts/estimate.py --config configs/1b_config.yaml --micro_batch 4 --activation_checkpointing
  python scripts/estimate.py --hidden_size 768 --num_hidden_layers 12 --tokens 1e9 --card "RTX 4090"
  python scripts/estimate.py --cards 8 --card H200 --tokens_per_step 524288
  python scripts/estimate.py --senses audio vision --streams internal_text animation --block_size 512 --tokens 1e7

With other senses or streams than the internal ones, a token is a tick of a recording and a block is a clip; up to 10
contacts touch the skin at a tick.

Every field of run_clm_creature.py can be given as a flag here too, and changes the estimate as it changes the run.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from creature.errors import UserError, run_main  # noqa: E402
from creature.files import user_path  # noqa: E402

CARDS_SHOWN = ("RTX 3090", "RTX 4090", "A100", "H100 SXM", "H200")
PARAMETERS = {
    "token_table": "token table",
    "head": "head of its own",
    "body": "layers and norms",
    "text_only": "= text only",
    "senses": "other senses and efference copies",
    "streams": "other streams",
    "total": "= total",
    "trainable": "trained with this configuration",
}
MEMORY = {
    "weights": "weights (fp32, frozen senses and streams too)",
    "gradients": "gradients (fp32)",
    "optimizer_state": "optimizer state (fp32)",
    "weight_copies": "weights in the compute dtype",
    "batch": "pictures and all else in the batch",
    "activations": "activations",
    "head": "head and loss, one chunk at a time",
    "optimizer_step": "the optimizer's temporaries, when the last three are freed",
    "peak": "= peak",
}


class Row(NamedTuple):
    """A device, or several alike, to estimate for, with their tokens/s and where that figure is from."""

    name: str
    device: Any
    precision: str
    compiled: bool
    speed: float
    source: str


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=user_path, help="YAML file (default configs/text_only_config.yaml)")
    parser.add_argument("--micro_batch", type=int, help="blocks computed at once (default: what fits, on each card)")
    parser.add_argument("--tokens", type=float, help="tokens of the run (default: max_steps x tokens_per_step)")
    parser.add_argument("--card", action="append", help="a GPU by name, in place of the list; may be repeated")
    parser.add_argument("--cards", type=int, default=1, help="cards of one machine that share a run (default 1)")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon", help="default muon")
    parser.add_argument(
        "--precision", choices=("bf16", "fp16", "fp32"), help="default bf16 on cards, this machine's own"
    )
    parser.add_argument("--activation_checkpointing", action="store_true", help="recompute the layers' activations")
    parser.add_argument("--eager", action="store_true", help="memory without torch.compile")
    parser.add_argument(
        "--senses", nargs="+", default=["internal_voice"], metavar="SENSE", help="senses in the batches, by name"
    )
    parser.add_argument(
        "--streams", nargs="+", metavar="STREAM", help="streams that are trained, by name (default internal_text)"
    )
    arguments, rest = parser.parse_known_args()
    for name in ("micro_batch", "tokens", "cards"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name} must be greater than 0")
    return arguments, rest


def main() -> None:
    arguments, rest = parse_arguments()
    from creature.settings import parse_settings

    settings = parse_settings((["--config", arguments.config] if arguments.config else []) + rest)
    from creature import estimate
    from creature.job import build_config

    config, _ = build_config(settings)
    training = settings.training
    block = settings.data.block_size or config.max_position_embeddings
    step_tokens = training.get("tokens_per_step", 65536)
    tokens = arguments.tokens or max(training.get("max_steps", -1), 0) * step_tokens
    streams = tuple(arguments.streams or estimate.TEXT)
    trained = {"senses": tuple(arguments.senses), "streams": streams}
    beside_text = estimate.beside_text(**trained)
    unit, group = ("tick", "clip") if beside_text else ("token", "block")
    counts = estimate.count_parameters(config, trained["senses"], streams if arguments.streams else None)
    rows = [_card_row(name, config, block, arguments, trained) for name in arguments.card or CARDS_SHOWN]
    if arguments.cards > 1:
        rows = [_many(row, arguments.cards, step_tokens, block, counts["trainable"]) for row in rows]
    else:
        rows.append(_own_row(config, block, arguments, trained))

    flops = estimate.flops_per_token(config, block, **trained)
    name = arguments.config or "configs/text_only_config.yaml"
    print(f"{name}: {config.num_hidden_layers} layers x {config.hidden_size}, {group} {block:,}\n\nparameters")
    for part, label in PARAMETERS.items():
        if counts[part]:
            tied = " (tied to the head)" if part == "token_table" and not counts["head"] else ""
            print(f"  {label + tied:<34} {counts[part]:>15,}")
    others = ", senses and streams" if beside_text else ""
    print(
        f"\nFLOPs per {unit}, forward and backward: {flops:.4g} (6 x matrices and head, plus causal attention{others})"
    )

    form = {"optimizer": arguments.optimizer, "activation_checkpointing": arguments.activation_checkpointing} | trained

    def memory(row: Row) -> tuple[int, dict[str, int]]:
        """(the micro-batch given or the one that fits, 0 for none; the memory of a step with it, or with 1)."""
        batch, limit = arguments.micro_batch, max(1, step_tokens // block // arguments.cards)
        options = form | {"compiled": row.compiled}
        if batch is None:
            batch = estimate.fit_micro_batch(config, block, row.device, row.precision, limit=limit, **options)
        return batch, estimate.memory_parts(config, max(batch, 1), block, row.device, row.precision, **options)

    print_memory(rows[0], f"{block:,} {unit}s", arguments.optimizer, *memory(rows[0]))
    print_table(rows, [memory(row) for row in rows], tokens, unit)
    print("\nMFU: the share of the card's peak FLOP/s that training reaches; assumed where it was not measured.")
    print("Speeds are of compiled training, the optimizer included.")
    if beside_text:
        print("That MFU is text's. With senses and streams it was not measured; small matrices make it lower.")
        print("Memory of senses and streams is that of an uncompiled step with each of them at every tick.")
    if arguments.cards > 1:
        print(f"{arguments.cards} cards share a step of {step_tokens:,} tokens, and each holds the whole model (DDP).")
        print("Memory and micro-batch are those of one card. The time for the gradients, once a step, is computed")
        print("from the rate of the link in its data sheet, as if it were reached.")
    print("Memory is what torch allocates; a batch fits when it leaves a tenth of the device's memory free.")
    if arguments.activation_checkpointing:
        print("Recomputing activations makes a step up to a third longer, which the hours do not include.")
    if not tokens:
        print("Give --tokens, or max_steps in the configuration, for the hours of a run.")


def _card_row(name: str, config, block: int, arguments, trained: dict) -> Row:
    from creature import hardware

    card = hardware.card_name(name)
    if card is None:
        raise UserError(f"unknown card {name!r}: use one of {', '.join(hardware.CARDS)}")
    memory = int((hardware.CARDS[card].memory_gib - 0.5) * hardware.GIB)  # the driver takes half a GiB
    bf16 = not card.startswith(("T4", "V100"))
    capability = (9, 0) if card.startswith(("H100", "H200")) else (8, 0) if bf16 else (7, 0)
    device = hardware.Device("cuda", card, memory, memory, 8, bf16, 1, capability)
    precision = arguments.precision or hardware.choose_precision(device)[0]
    return Row(card, device, precision, not arguments.eager, *_expected_speed(config, block, card, trained))


def _many(row: Row, cards: int, step_tokens: int, block: int, trainable: int) -> Row:
    """So many cards of a row in one machine, each with the whole model and its share of a step."""
    from creature import estimate

    if step_tokens % (cards * block):
        raise UserError(
            f"a step of {step_tokens:,} tokens does not divide into blocks of {block:,} for {cards} "
            f"cards: use --tokens_per_step {max(1, round(step_tokens / (cards * block))) * cards * block}"
        )
    link, kind = estimate.card_link(row.name)
    seconds = estimate.all_reduce_seconds(trainable, cards, link)
    speed = estimate.data_parallel_speed(row.speed, step_tokens, cards, seconds)
    gradients = f"{4 * trainable / 1e9:.2g} GB of gradients in {1000 * seconds:.2g} ms, {kind} {link / 1e9:.0f} GB/s"
    return row._replace(name=f"{cards} x {row.name}", speed=speed, source=f"{row.source}; {gradients}")


def _own_row(config, block: int, arguments, trained: dict) -> Row:
    """This machine; where the peak of its device is unknown, a matrix product is timed."""
    from creature import estimate, hardware

    device = hardware.device_info()
    precision = arguments.precision or hardware.choose_precision(device)[0]
    compiled = device.kind == "cuda" and hardware.compiler_available(device)[0] and not arguments.eager
    if card := hardware.card_name(device.name):
        return Row("this machine", device, precision, compiled, *_expected_speed(config, block, card, trained))
    share, rate = estimate.ASSUMED_SHARE_OF_MATMUL, estimate.matmul_flops(device.kind, precision)
    speed = share * rate / estimate.flops_per_token(config, block, **trained)
    source = f"{share:.0%}, assumed, of {rate / 1e9:,.0f} GFLOP/s timed now"
    return Row("this machine", device, precision, compiled, speed, source)


def _expected_speed(config, block: int, card: str, trained: dict) -> tuple[float, str]:
    from creature import estimate

    mfu, source = estimate.expected_mfu(card)
    return estimate.tokens_per_second(config, block, card, **trained), f"MFU {mfu:.2f} {source}" + (
        " on text" if estimate.beside_text(**trained) else ""
    )


def print_memory(row: Row, block: str, optimizer: str, batch: int, parts: dict[str, int]) -> None:
    form = f"{row.precision}, {'compiled' if row.compiled else 'eager'}, {optimizer}"
    print(f"\nmemory of a step on {row.name}, micro-batch {max(batch, 1)} x {block} ({form})")
    for part, label in MEMORY.items():
        if parts[part]:
            print(f"  {label:<58} {parts[part] / 2**30:>7.2f} GiB")


def print_table(rows: list[Row], memories: list[tuple[int, dict[str, int]]], tokens: float, unit: str) -> None:
    header = ("card", "memory", "micro-batch", "peak", f"{unit}s/s", f"{unit}s a day", "hours", "")
    table = [header]
    for row, (batch, parts) in zip(rows, memories, strict=True):
        fits = parts["peak"] <= row.device.free_bytes
        table.append(
            (
                row.name,
                f"{row.device.memory_bytes / 2**30:.0f} GiB",
                (f"{batch}" if fits else f"{batch} does not fit") if batch else "none fits",
                f"{parts['peak'] / 2**30:.1f} GiB",
                f"{row.speed:,.0f}",
                _billions(row.speed * 86400),
                f"{tokens / row.speed / 3600:,.1f}" if tokens else "-",
                row.source,
            )
        )
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    print(f"\n{_billions(tokens)} {unit}s on" if tokens else "")
    for line in table:
        cells = [line[0].ljust(widths[0])] + [line[i].rjust(widths[i]) for i in range(1, len(header) - 1)] + [line[-1]]
        print("  " + "  ".join(cells).rstrip())


def _billions(number: float) -> str:
    if number >= 1e12:
        return f"{number / 1e12:.3g} T"
    return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.3g} M"


if __name__ == "__main__":
    run_main(main)
