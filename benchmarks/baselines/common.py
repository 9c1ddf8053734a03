"""What the dedicated models share: clips as the creature reads them, a training loop, a table."""

import copy
import statistics as stats
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from configuration_creature import CreatureConfig
from creature.data.recordings.clips import WHOLE, make_clips, organs_of
from creature.data.recordings.schema import load_recordings
from creature.data.text.tokenizer import load_tokenizer
from creature.errors import UserError
from processing_creature import CreatureProcessor

EVALUATIONS = 20  # of a training run
WARMUP = 0.05  # share of the steps in which the learning rate rises


def open_clips(folder: str, cache_dir: str, needs: str) -> tuple[dict[str, list[dict]], CreatureConfig]:
    """
    (the recordings of every split on the ticks of a creature, arguments of `forward` as numpy; its configuration).

    needs: the argument that the task is about; recordings without it are left out. UserError where a split has none.
    """
    recordings, facts = load_recordings(folder)
    config = CreatureConfig(**organs_of(recordings, facts) | {"num_cameras": 0})
    processor = CreatureProcessor.from_config(config, load_tokenizer())
    clips, _ = make_clips(recordings, facts, processor, WHOLE, cache_dir)
    splits = {name: [clip for clip in split if clip.get(needs) is not None] for name, split in clips.items()}
    for name in ("train", "validation"):
        if not splits.get(name):
            raise UserError(f"{folder} has no {needs} in its {name} split: import recordings that have, in two splits")
    return splits, config


def text_ids(clip: dict, config: CreatureConfig) -> list[int]:
    """The ids that are thought in a clip, end-of-text included, without the silence between them."""
    labels = clip["labels"]
    return labels[(labels >= 0) & (labels != config.null_token_id)].tolist()


def need_scikit_learn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UserError("this table needs scikit-learn: pip install scikit-learn") from error


def fit(
    model: nn.Module,
    loss: Callable[[dict], torch.Tensor],
    batches: Iterator[dict],
    evaluate: Callable[[], dict[str, float]],
    lowest: str,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.01,
) -> dict[str, float]:
    """
    Train with AdamW, warm-up and cosine decay; the figures of the evaluation at which `lowest` was lowest.

    The model ends with the weights of that evaluation. Evaluations are 20, in equal distances.
    """
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    rest = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    cuda = next(model.parameters()).is_cuda
    every, best, weights = max(1, steps // EVALUATIONS), None, None
    for step in range(1, steps + 1):
        rise = min(1.0, step / max(1.0, WARMUP * steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rise * 0.5 * (1 + np.cos(np.pi * step / (steps + 1)))
        model.train()
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            value = loss(next(batches))
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % every == 0 or step == steps:
            model.eval()
            with torch.no_grad():
                found = evaluate()
            if best is None or found[lowest] < best[lowest]:
                best, weights = found | {"step": step}, copy.deepcopy(model.state_dict())
            say(f"  step {step}: " + ", ".join(f"{name} {figure:.4g}" for name, figure in found.items()))
    model.load_state_dict(weights)
    return best


def count_parameters(model: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M"


def say(text: str) -> None:
    """Progress, on stderr; the table alone is stdout."""
    print(text, file=sys.stderr, flush=True)


def print_table(head: list[str], rows: dict[str, list[dict[str, float]]], digits: int = 3) -> None:
    """rows: by the name of a model, its figures for every seed, by the names in `head`."""
    cells = [["", *head]]
    for name, seeds in rows.items():
        cells.append([name])
        for column in head:
            values = [figures[column] for figures in seeds if column in figures]
            cell = f"{stats.median(values):.{digits}f}" if values else "-"
            if len(values) > 1:
                cell += f" ({min(values):.{digits}f}-{max(values):.{digits}f})"
            cells[-1].append(cell)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        first, *others = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first, *others]).rstrip(), flush=True)
