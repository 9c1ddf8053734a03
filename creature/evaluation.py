"""Scores of texts document by document: every token is predicted once, never from another document.

A document follows an end-of-text, as in training, and is read in windows of the creature's context. They are those of
lm_eval's `loglikelihood_rolling`, so `scripts/evaluate_text.py` and lm_eval give the same numbers.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from creature.data.text.readers import Documents
from creature.data.text.sources import TOKEN_FILES, find_sources
from creature.errors import UserError
from creature.metrics import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from modeling_creature import MultiModalCreature


@dataclass
class Score:
    """Sums over the tokens of one or many documents, and the metrics computed from them."""

    tokens: int = 0
    bytes: int = 0
    nats: float = 0.0
    correct: int = 0

    def add(self, other: "Score") -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def accuracy(self) -> float:
        return self.correct / self.tokens


def whole_documents(data: str, text_column: str = "text") -> Iterator[tuple[str, str]]:
    """
    (name, text) of every document of a text file, a folder, a glob or a Hub dataset; empty ones are left out.

    The first document of a file has the file's name, the second `name:2`. Raises UserError for a token file.
    """
    if data.lower().endswith(TOKEN_FILES):
        raise UserError(f"{data} holds tokens, and documents are read as text: name the text that was tokenized")
    sources, _ = find_sources([data])
    for source in sources:
        for number, text in enumerate(Documents(source, text_column).whole(), 1):
            if text:
                yield source.name if number == 1 else f"{source.name}:{number}", text


def windows(ids: np.ndarray, before: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """
    A document in windows of at most `size` ticks, as (inputs, targets) [T] each; every id is a target exactly once.

    ids [n]: the document. before: the id before its first. The last window of a longer document reaches back to be as
    long as the others; its tokens that were targets before are -100.
    """
    inputs = np.concatenate(([before], ids[:-1])).astype(np.int64)
    for start in range(0, len(ids), size):
        begin = max(0, min(start, len(ids) - size))
        targets = np.array(ids[begin : begin + size], dtype=np.int64)
        targets[: start - begin] = IGNORE_INDEX
        yield inputs[begin : begin + size], targets


def score_documents(
    model: "MultiModalCreature",
    tokenizer: "PreTrainedTokenizerBase",
    documents: Iterable[tuple[str, str]],
    *,
    block_size: int,
    batch_size: int = 1,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, Score]:
    """
    The score of each document by its name, in the order given.

    Args:
        model: in evaluation mode; autocast, where wanted, is the caller's.
        documents: (name, text), see `whole_documents`.
        block_size: ticks in a window; the creature's context at most.
        batch_size: windows computed at once, filled up to the longest of them.
        progress: wraps the batches, such as tqdm.

    Raises:
        UserError: for a tokenizer without an end-of-text token, and where there is no document.
    """
    import torch

    if tokenizer.eos_token_id is None:
        raise UserError("documents follow an end-of-text token, which this tokenizer does not have: set its eos_token")
    scores = {}

    def all_windows() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        for name, text in documents:
            # A special token's name inside a text is ordinary text, as in a tokenized corpus.
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
            if ids:
                scores[name] = Score(bytes=len(text.encode("utf-8")))
            for inputs, targets in windows(np.array(ids), tokenizer.eos_token_id, block_size):
                yield name, inputs, targets

    stream = all_windows()
    for batch in progress(iter(lambda: list(islice(stream, batch_size)), [])):
        names, inputs, targets = zip(*batch, strict=True)
        # The padding of a shorter window has no targets, and attention is causal.
        given = {"input_ids": _stack(inputs, tokenizer.eos_token_id), "shift_labels": _stack(targets, IGNORE_INDEX)}
        with torch.inference_mode():
            output = model(**{k: torch.from_numpy(v).to(model.device) for k, v in given.items()}, return_logits=False)
        nats = output.token_losses.double().sum(dim=1).tolist()
        correct = (output.predictions.cpu().numpy() == given["shift_labels"]).sum(axis=1)
        for row, name in enumerate(names):
            counted = int((given["shift_labels"][row] != IGNORE_INDEX).sum())
            scores[name].add(Score(counted, 0, nats[row], int(correct[row])))
    if not scores:
        raise UserError("there is nothing to evaluate: no document has any text")
    return scores


def _stack(rows: tuple[np.ndarray, ...], filler: int) -> np.ndarray:
    """int64 [N, longest] of rows [T] of different lengths."""
    stacked = np.full((len(rows), max(map(len, rows))), filler, dtype=np.int64)
    for row, values in zip(stacked, rows, strict=True):
        row[: len(values)] = values
    return stacked
