"""What a run will need, before it is started: parameters, FLOPs per token, memory by part, hours on named cards.

examples:
  python scripts/estimate.py --config configs/text_only_config.yaml
  python scripts/estimate.py --config configs/1b_config.yaml --micro_batch 4 --activation_checkpointing
  python scripts/estimate.py --hidden_size 768 --num_hidden_layers 12 --tokens 1e9 --card "RTX 4090"

Every field of run_clm_creature.py can be given as a flag here too, and changes the estimate as it changes the run.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from creature.errors import UserError, run_main  # noqa: E402

CARDS_SHOWN = ("RTX 3090", "RTX 4090", "A100", "H100 SXM", "H200")
PARTS = {
    "weights": "weights (fp32, frozen senses and streams too)",
    "gradients": "gradients (fp32)",
    "optimizer_state": "optimizer state (fp32)",
    "weight_copies": "weights in the compute dtype",
    "activations": "activations",
    "head": "head and loss, one chunk at a time",
    "optimizer_step": "temporaries of the optimizer (when the last two are gone)",
    "peak": "= peak",
}


class Row(NamedTuple):
    """A device to estimate for: its precision, whether it compiles, its key in CARDS, else its timed FLOP/s."""

    name: str
    device: Any
    precision: str
    compiled: bool
    card: str | None
    rate: float | None = None


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", help="YAML file (default configs/text_only_config.yaml)")
    parser.add_argument("--micro_batch", type=int, help="blocks computed at once (default: what fits, on each card)")
    parser.add_argument("--tokens", type=float, help="tokens of the run (default: max_steps x tokens_per_step)")
    parser.add_argument("--card", action="append", help="a GPU by name, in place of the list; may be repeated")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon", help="default muon")
    parser.add_argument(
        "--precision", choices=("bf16", "fp16", "fp32"), help="default bf16 on cards, this machine's own"
    )
    parser.add_argument("--activation_checkpointing", action="store_true", help="recompute the layers' activations")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    arguments, rest = parser.parse_known_args()
    for name in ("micro_batch", "tokens"):
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

    config = build_config(settings)
    training = settings.training
    block = settings.data.get("block_size") or config.max_position_embeddings
    step_tokens = training.get("tokens_per_step", 65536)
    tokens = arguments.tokens or max(training.get("max_steps", -1), 0) * step_tokens
    cards = [_find_card(name) for name in arguments.card or CARDS_SHOWN]

    counts, flops = estimate.count_parameters(config), estimate.flops_per_token(config, block)
    name = arguments.config or "configs/text_only_config.yaml"
    print(f"{name}: {config.num_hidden_layers} layers x {config.hidden_size}, block {block:,}\n")
    print_parameters(counts)
    print(f"\nFLOPs per token, forward and backward: {flops:.4g} (6 x matrices and head, plus causal attention)")

    rows = [_card_row(name, arguments) for name in cards] + [_own_row(arguments)]
    options = {"optimizer": arguments.optimizer, "activation_checkpointing": arguments.activation_checkpointing}
    print_memory(config, block, rows[0], arguments.micro_batch, options, step_tokens)
    print_cards(config, block, rows, arguments.micro_batch, options, tokens, step_tokens)
    print("\nassumed: not measured on this card; it is taken to give what its chip gives elsewhere, or three quarters.")
    print("Speeds are of compiled training, and contain the optimizer.")
    print("Memory is what the framework allocates; a batch fits when it leaves a tenth of the device's memory free.")
    if arguments.activation_checkpointing:
        print("Recomputing activations makes a step up to a third longer; the hours do not contain that.")
    if not tokens:
        print("Give --tokens, or max_steps in the configuration, for the hours of a run.")


def _find_card(name: str) -> str:
    from creature.hardware import CARDS, card_name

    key = card_name(name)
    if key is None:
        raise UserError(f"no rate is known for the card {name!r}: known are {', '.join(CARDS)}")
    return key


def _card_row(name: str, arguments) -> Row:
    from creature import hardware

    card = hardware.CARDS[name]
    memory = int((card.memory_gib - 0.5) * hardware.GIB)  # half a GiB is the driver's
    bf16 = not name.startswith(("T4", "V100"))
    capability = (9, 0) if hardware.is_hopper(name) else (8, 0) if bf16 else (7, 0)
    device = hardware.Device("cuda", name, memory, memory, 8, bf16, 1, capability)
    precision = arguments.precision or hardware.choose_precision(device)[0]
    return Row(name, device, precision, not arguments.eager, name)


def _own_row(arguments) -> Row:
    """This machine; where its card has no known rate, a matrix product is timed."""
    from creature import estimate, hardware

    device = hardware.device_info()
    precision = arguments.precision or hardware.choose_precision(device)[0]
    compiled = device.kind == "cuda" and hardware.compiler_available(device)[0] and not arguments.eager
    card = hardware.card_name(device.name) if device.kind == "cuda" else None
    rate = None if card else estimate.matmul_flops(device.kind, precision)
    return Row("this machine", device, precision, compiled, card, rate)


def _speed(config, block: int, row: Row, batch: int, optimizer: str, step_tokens: int) -> tuple[float, str]:
    """(tokens/s, where that number is from) of a device with a micro-batch."""
    from creature import estimate, hardware

    flops = estimate.flops_per_token(config, block)
    if row.card is None:
        share = estimate.ASSUMED_SHARE_OF_MATMUL
        return share * row.rate / flops, f"{share:.0%} of {row.rate / 1e9:,.0f} GFLOP/s timed now"
    accumulation = max(1, step_tokens // (batch * block))
    speed = estimate.tokens_per_second(config, batch, block, row.card, accumulation, optimizer)
    mfu = flops * speed / hardware.CARDS[row.card].peak_flops
    return speed, f"MFU {mfu:.2f} {estimate.card_shares(row.card)[1]}"


def print_parameters(counts: dict[str, int]) -> None:
    print("parameters")
    labels = {
        "token_table": "token table (tied to the head)" if not counts["head"] else "token table",
        "head": "head of its own",
        "body": "layers and norms",
        "text_only": "= text only",
        "senses": "other senses and efference copies",
        "streams": "other streams",
        "total": "= total",
        "trainable": "trained with this configuration",
    }
    for name, label in labels.items():
        if counts[name]:
            print(f"  {label:<34} {counts[name]:>15,}")


def print_memory(config, block: int, row: Row, micro_batch: int | None, options: dict, step_tokens: int) -> None:
    batch = micro_batch or _fit(config, block, row, options, step_tokens) or 1
    parts = _memory(config, block, row, batch, options, step_tokens)
    form = f"{row.precision}, {'compiled' if row.compiled else 'eager'}, {options['optimizer']}"
    print(f"\nmemory of a step on {row.name}, micro-batch {batch} x {block:,} tokens ({form})")
    for part, label in PARTS.items():
        if parts[part]:
            print(f"  {label:<58} {parts[part] / 2**30:>7.2f} GiB")


def print_cards(config, block: int, rows: list[Row], micro_batch, options: dict, tokens, step_tokens: int) -> None:
    header = ("card", "memory", "micro-batch", "peak", "tokens/s", "tokens a day", "hours", "")
    table = [header]
    for row in rows:
        batch = micro_batch or _fit(config, block, row, options, step_tokens)
        peak = _memory(config, block, row, max(batch, 1), options, step_tokens)["peak"]
        fits = peak <= row.device.free_bytes
        speed, source = _speed(config, block, row, max(batch, 1), options["optimizer"], step_tokens)
        table.append(
            (
                row.name,
                f"{row.device.memory_bytes / 2**30:.0f} GiB",
                (f"{batch}" if fits else f"{batch} does not fit") if batch else "none fits",
                f"{peak / 2**30:.1f} GiB",
                f"{speed:,.0f}",
                _count(speed * 86400),
                f"{tokens / speed / 3600:,.1f}" if tokens else "-",
                source,
            )
        )
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    print(f"\n{_count(tokens)} tokens on" if tokens else "")
    for line in table:
        cells = [line[0].ljust(widths[0])] + [line[i].rjust(widths[i]) for i in range(1, len(header) - 1)] + [line[-1]]
        print("  " + "  ".join(cells).rstrip())


def _count(number: float) -> str:
    return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.3g} M"


def _memory(config, block: int, row: Row, batch: int, options: dict, step_tokens: int) -> dict[str, int]:
    from creature.estimate import memory_parts

    return memory_parts(
        config,
        batch,
        block,
        row.precision,
        device_kind=row.device.kind,
        compiled=row.compiled,
        float8=row.device.is_hopper,
        accumulating=batch * block < step_tokens,
        **options,
    )


def _fit(config, block: int, row: Row, options: dict, step_tokens: int) -> int:
    """The micro-batch that fits the device, no larger than a step's batch."""
    from creature.estimate import fit_micro_batch

    limit = max(1, step_tokens // block)
    return fit_micro_batch(config, block, row.device, row.precision, compiled=row.compiled, limit=limit, **options)


if __name__ == "__main__":
    run_main(main)
