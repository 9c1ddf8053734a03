"""What a change is worth: train variants of the creature on the same tokens with the same seed, and print a table.

examples:
  python benchmarks/loss_per_token.py --train data/corpus.bin --validation data/corpus.valid.bin base \\
      "untied: tie_word_embeddings=false" "faster table: learning_rate=0.016" "apart: separate_documents=true"
  python benchmarks/loss_per_token.py --train a.bin --validation b.bin --eager --steps 20 --micro_batch 2 \\
      --validation_blocks 8 base

A variant is a name and, after a colon, the fields that differ: of CreatureConfig, or of TRAINING below. There,
separate_documents keeps the documents of a block apart, in training and in validation, and batch_warmup is the share of
the steps in which each half of the batch is an update of its own, and learns further ahead. The loop is bare (no
Trainer, no checkpoints, no logging), so tokens/s is the ceiling of `run_clm_creature.py`.
"""

import argparse
import sys
import time
from pathlib import Path

# In place of this folder, whose tokenize.py would hide the standard library's module of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from creature.files import user_path  # noqa: E402

TRAINING = {
    "learning_rate": 8e-3,
    "matrix_learning_rate": 0.03,
    "weight_decay": 0.05,
    "warmup": 0.01,
    "batch_warmup": 0.25,
    "decay": 0.4,
    "max_grad_norm": 1.0,
    "adamw": False,
    "separate_documents": False,
    "seed": 0,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", help='"name" or "name: field=value, field=value"')
    parser.add_argument("--train", type=user_path, required=True, help="token stream to train on (.bin)")
    parser.add_argument("--validation", type=user_path, required=True, help="token stream to evaluate on (.bin)")
    parser.add_argument(
        "--config", type=user_path, default="configs/text_only_config.yaml", help="its model section is the base"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps; default: the training tokens once")
    parser.add_argument("--micro_batch", type=int, default=32, help="blocks a step (default 32)")
    parser.add_argument("--block_size", type=int, default=2048, help="tokens a block (default 2048)")
    parser.add_argument("--validation_blocks", type=int, help="evaluate on this many blocks only")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    return parser.parse_args()


def parse_variant(text: str) -> tuple[str, dict]:
    """("name", {field: value}) of "name: field=value, field=value"."""
    import yaml

    name, _, rest = text.partition(":")
    pairs = (pair.split("=", 1) for pair in rest.split(",") if pair.strip())
    return name.strip(), {key.strip(): yaml.safe_load(value) for key, value in pairs}


def batches(blocks, size: int, seed: int, device: str, collate):
    """Endless shuffled and collated batches of `size` rows of the dataset `blocks`, on the device."""
    import torch

    epoch = 0
    while True:
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        for first in range(0, len(order) - size + 1, size):
            batch = collate(blocks.__getitems__(order[first : first + size]))
            yield {
                name: (tensor.pin_memory() if device == "cuda" else tensor).to(device, non_blocking=True)
                for name, tensor in batch.items()
            }
        epoch += 1


def run(name: str, fields: dict, options: argparse.Namespace, model_fields: dict) -> dict:
    """Train one variant; returns its row."""
    import torch

    from configuration_creature import CreatureConfig
    from creature import fast
    from creature.data import DataArguments, block_collator, load_data
    from creature.data.text.tokenizer import load_tokenizer
    from creature.optimizer import MuonAdamW, parameter_groups
    from creature.trainer import FURTHER_TARGETS, split_rows
    from modeling_creature import MultiModalCreature

    device = "cuda" if torch.cuda.is_available() else "cpu"
    training = {key: fields.get(key, default) for key, default in TRAINING.items()}
    config = CreatureConfig(**model_fields | {k: v for k, v in fields.items() if k not in TRAINING})

    def open_blocks(name: str):
        data = DataArguments(name, validation_fraction=0.0)
        return load_data(data, options.block_size, config.vocab_size)[0]["train"]

    blocks = open_blocks(options.train)
    steps = options.steps or len(blocks) // options.micro_batch

    torch._dynamo.reset()
    torch.manual_seed(training["seed"])
    model = MultiModalCreature(config).to(device).train()
    model.train_only()
    fast.apply(model)
    rate = training["learning_rate"]
    groups = parameter_groups(model, rate, training["matrix_learning_rate"], training["weight_decay"])
    if training["adamw"]:
        groups = [{key: g[key] for key in ("params", "weight_decay")} for g in groups]
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    else:
        optimizer = MuonAdamW(groups, compiled=not options.eager)
    peaks = [group["lr"] for group in optimizer.param_groups]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step_model = model if options.eager else torch.compile(model, dynamic=False)
    collate = block_collator(load_tokenizer(), training["separate_documents"])
    stream = batches(blocks, options.micro_batch, training["seed"], device, collate)
    warm, started = min(20, steps // 2), 0.0
    for step in range(steps):
        if step == warm:
            _wait(device)
            started = time.perf_counter()
        up = min(1.0, (step + 1) / max(1.0, training["warmup"] * steps))
        down = min(1.0, (steps - step) / max(1.0, training["decay"] * steps))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * up * down
        parts, halved = [next(stream)], training["batch_warmup"] * steps
        if step < halved and options.micro_batch > 1:
            further = torch.tensor(FURTHER_TARGETS, device=device) * (1 - step / halved)
            parts = [part | {"further_targets": further} for part in split_rows(*parts)]
        for part in parts:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                loss = step_model(**part, return_logits=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, training["max_grad_norm"])
            optimizer.step()
            optimizer.zero_grad()
    _wait(device)
    speed = (steps - warm) * options.micro_batch * options.block_size / (time.perf_counter() - started)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
    held_out = open_blocks(options.validation)
    if options.validation_blocks:
        held_out = held_out.select(range(min(options.validation_blocks, len(held_out))))
    loss = evaluate(model, held_out, device, collate)
    text_only = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"variant": name, "loss": loss, "tokens_per_second": speed, "gib": memory, "parameters": text_only}


def evaluate(model, blocks, device: str, collate, rows: int = 16) -> float:
    """Mean loss per token of all blocks, in nats."""
    import torch

    model.eval()
    total, count = 0.0, 0
    for first in range(0, len(blocks), rows):
        indices = list(range(first, min(first + rows, len(blocks))))
        batch = {name: tensor.to(device) for name, tensor in collate(blocks.__getitems__(indices)).items()}
        with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            losses = model(**batch, return_logits=False).token_losses
        total, count = total + losses.double().sum().item(), count + losses.numel()
    return total / count


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    options = parse_arguments()
    import torch
    import yaml

    model_fields = yaml.safe_load(Path(options.config).read_text(encoding="utf-8")).get("model", {})
    rows = []
    for text in options.variants:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        rows.append(run(*parse_variant(text), options, model_fields))
        row = rows[-1]
        print(f"{row['variant']}: loss {row['loss']:.4f}", file=sys.stderr, flush=True)
    width = max(len(row["variant"]) for row in rows)
    print(f"{'variant':{width}}  validation loss  difference   M tokens/s   peak GiB   parameters trained")
    for row in rows:
        print(
            f"{row['variant']:{width}}  {row['loss']:15.4f}  {row['loss'] - rows[0]['loss']:+10.4f}  "
            f"{row['tokens_per_second'] / 1e6:11.3f}  {row['gib']:9.2f}  {row['parameters']:19,}"
        )


if __name__ == "__main__":
    main()
