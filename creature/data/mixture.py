"""Several sources as one: `--data a.bin:0.7 b.bin:0.3`, in these proportions from the first block to the last.

The weights alone fix which part the n-th block comes from: after every block, each part has given its share to within
one block. The seed fixes the order of a part's own blocks. A part that is used up begins again, in another order. The
length of the run changes nothing: a longer or a resumed run sees the same blocks.
"""

import hashlib
import math
import re
from fractions import Fraction

import datasets
import numpy as np

from creature.errors import UserError


def parse_parts(data: list[str]) -> tuple[list[str], list[Fraction] | None]:
    """
    The names in `data` and their shares, which add up to 1; None where no weights are given.

    Raises UserError for weights that only some parts have, or that are not above 0.
    """
    found = [re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", str(text)) for text in data]
    if not any(found):
        return [str(text) for text in data], None
    if not all(found):
        missing = next(text for text, match in zip(data, found, strict=True) if not match)
        raise UserError(f"{missing} has no weight where others have: write NAME:WEIGHT for all parts, or for none")
    weights = [Fraction(match[2]) for match in found]
    if not all(weights):
        raise UserError("a part of weight 0 is never seen: leave it out, or raise its weight")
    return [match[1] for match in found], [weight / sum(weights) for weight in weights]


def mixture_pattern(shares: list[Fraction], count: int) -> np.ndarray:
    """
    Which part each of `count` blocks comes from, int64 [count]: shares kept to within one block in every prefix.

    Each block comes from the part whose block is due first among those that are behind (Tijdeman 1980, "The chairman
    assignment problem").
    """
    if len(shares) == 1:
        return np.zeros(count, dtype=np.int64)
    period = math.lcm(*(share.denominator for share in shares))
    due = [int(share * period) for share in shares]
    slack = 2 * len(shares) - 2
    behind = [0] * len(shares)  # blocks that a part is behind its share, times the period
    chosen = []
    for _ in range(min(period, count)):
        behind = [owed + more for owed, more in zip(behind, due, strict=True)]
        parts = [part for part, owed in enumerate(behind) if owed * slack >= period]
        part = min(parts, key=lambda part: Fraction(period * (slack - 1) - slack * behind[part], due[part]))
        behind[part] -= period
        chosen.append(part)
    return np.resize(np.array(chosen, dtype=np.int64), count)  # repeated as often as it takes


def mixture_rows(sizes: list[int], shares: list[Fraction], count: int, seed: int) -> np.ndarray:
    """The rows of a mixture of `count` blocks, int64 [count], as indices into the concatenated blocks of the parts."""
    pattern, rows = mixture_pattern(shares, count), np.empty(count, dtype=np.int64)
    for part, (size, first) in enumerate(zip(sizes, np.cumsum([0, *sizes]), strict=False)):
        places = np.flatnonzero(pattern == part)
        for epoch, start in enumerate(range(0, len(places), size)):
            now = places[start : start + size]
            rows[now] = first + np.random.default_rng([seed, part, epoch]).permutation(size)[: len(now)]
    return rows


def mix(
    parts: list[tuple[datasets.DatasetDict, dict]], shares: list[Fraction] | None, count: int, seed: int
) -> tuple[datasets.DatasetDict, dict]:
    """
    Loaded parts (see `load_data`) as one DatasetDict and its facts.

    With `shares`: `count` blocks to train on, in training order, and validation blocks in the same proportions up to
    where the first part has no more. Without: all blocks of all parts, for the sampler to shuffle. The facts then have
    "parts", each with its path, tokens, share and the times that it is seen.
    """
    trains, infos = [splits["train"] for splits, _ in parts], [info for _, info in parts]
    for split in ("train", "validation"):
        opened = [
            (splits[split].features["input_ids"].feature.dtype, info) for splits, info in parts if split in splits
        ]
        kinds = {str(dtype): info["path"] for dtype, info in opened}
        if len(kinds) > 1:
            found = ", ".join(f"{path} holds {dtype}" for dtype, path in kinds.items())
            raise UserError(
                f"the parts of the mixture are stored in different ways ({split}: {found}): tokenize all of them alike"
            )
    sizes = [len(one) for one in trains]
    train, uses = datasets.concatenate_datasets(trains), [None] * len(parts)
    fractions = shares or [Fraction(size, sum(sizes)) for size in sizes]
    names = [info["path"] for info in infos]
    if shares:
        train = train.select(mixture_rows(sizes, shares, count, seed))
        counts = np.bincount(mixture_pattern(shares, count), minlength=len(sizes))
        uses = [round(int(used) / size, 4) for used, size in zip(counts, sizes, strict=True)]
        names = [f"{name}:{float(share):.3g}" for name, share in zip(names, shares, strict=True)]
    mixed = datasets.DatasetDict(train=train)
    validation = _mix_validation([splits.get("validation") for splits, _ in parts], shares)
    if validation is not None:
        mixed["validation"] = validation
    facts = " ".join([*(info["data_hash"] for info in infos), *map(str, shares or [])])
    return mixed, {
        "path": " ".join(names),
        "source": ", ".join(info["source"] for info in infos),
        "tokens": sum(info["tokens"] for info in infos),
        "validation_tokens": sum(info["validation_tokens"] for info in infos),
        "dtype": infos[0]["dtype"],
        "data_hash": hashlib.sha256(facts.encode("ascii")).hexdigest(),
        "tokenizer_hash": next((info["tokenizer_hash"] for info in infos if info["tokenizer_hash"]), None),
        "ordered": bool(shares),
        "parts": [
            {"path": info["path"], "tokens": info["tokens"], "share": round(float(share), 6), "times_seen": used}
            for info, share, used in zip(infos, fractions, uses, strict=True)
        ],
    }


def _mix_validation(parts: list[datasets.Dataset | None], shares: list[Fraction] | None) -> datasets.Dataset | None:
    """The validation blocks of the parts that have some, in the proportions of the mixture, none of them twice."""
    kept = [part for part, blocks in enumerate(parts) if blocks is not None]
    if not kept:
        return None
    blocks, sizes = datasets.concatenate_datasets([parts[part] for part in kept]), [len(parts[part]) for part in kept]
    if not shares or len(kept) == 1:
        return blocks
    whole = sum(shares[part] for part in kept)
    pattern = mixture_pattern([shares[part] / whole for part in kept], sum(sizes))
    taken = [np.cumsum(pattern == part) for part in range(len(kept))]
    enough = min(int(np.searchsorted(counts, size, side="right")) for counts, size in zip(taken, sizes, strict=True))
    rows = np.empty(enough, dtype=np.int64)
    for part, first in enumerate(np.cumsum([0, *sizes])[:-1]):
        places = np.flatnonzero(pattern[:enough] == part)
        rows[places] = first + np.arange(len(places))
    return blocks.select(rows)
