"""Perplexity, bits per byte and next-token accuracy as `evaluate.Metric` classes that need no network.

`evaluate.load` downloads even the simplest metric from the Hub; a subclass needs no download. A metric takes token
arrays batch by batch and keeps two numbers per row, so it is fast and small for any validation set. Every token weighs
the same, however the rows were cut into batches.
"""

import abc
import math
import os

import datasets
import evaluate
import numpy as np

from creature.errors import UserError

IGNORE_INDEX = -100  # no target, as everywhere in transformers


class _TokenMetric(evaluate.Metric, abc.ABC):
    """
    Base class: a ratio of two sums over the tokens that have a target.

    A subclass reduces predictions [N, T] and references [N, T] (target ids, -100 where there is none) to a numerator
    and a denominator per row, and computes its result from the two totals.
    """

    def __init__(self, **kwargs):
        # The default is a file in the user's cache, which all processes of the machine share.
        super().__init__(keep_in_memory=True, **kwargs)

    def _build_data_dir(self) -> str:
        """Where `evaluate` would keep files; not created, because none are written and the disk may be read-only."""
        return os.path.join(self._data_dir_root, self.name, self.config_name)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="predictions [N, T] and references [N, T]: target ids, -100 where there is none.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def add_batch(self, *, predictions=None, references=None):
        """Add rows: predictions [N, T] and references [N, T], arrays or tensors."""
        predictions, references = _to_numpy(predictions), _to_numpy(references)
        if predictions.ndim != 2 or predictions.shape != references.shape:
            raise ValueError(
                f"predictions {list(predictions.shape)} and references {list(references.shape)} must both have the "
                "shape [rows, tokens]"
            )
        numerators, denominators = self._reduce(predictions, references, references != IGNORE_INDEX)
        if len(references):
            super().add_batch(predictions=numerators.astype(np.float64), references=denominators.astype(np.int64))

    def add(self, *, prediction=None, reference=None):
        """Add one row: prediction [T] and reference [T]."""
        self.add_batch(predictions=_to_numpy(prediction)[None], references=_to_numpy(reference)[None])

    def compute(self, *, predictions=None, references=None, **kwargs):
        """The metric over all rows added since the last call, and those given here. UserError without any target."""
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        if self.writer is None:
            raise UserError("there is nothing to evaluate: add at least one row with a target")
        return super().compute(**kwargs)

    def _compute(self, predictions, references) -> dict:
        if sum(references) == 0:
            raise UserError("there is nothing to evaluate: no target is counted, every label is -100")
        return self._result(math.fsum(predictions), sum(references))

    @abc.abstractmethod
    def _reduce(self, predictions: np.ndarray, references: np.ndarray, counted: np.ndarray):
        """(numerator, denominator) of every row, [N] each, from the tokens where `counted` is true."""

    @abc.abstractmethod
    def _result(self, numerator: float, denominator: int) -> dict:
        """The metric by name, from the two totals."""


class Perplexity(_TokenMetric):
    """Mean loss per token in nats and its exponential. predictions [N, T]: token losses in nats."""

    def _reduce(self, predictions, references, counted):
        return np.where(counted, predictions, 0).sum(axis=1, dtype=np.float64), counted.sum(axis=1)

    def _result(self, numerator, denominator):
        loss = numerator / denominator
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}


class BitsPerByte(_TokenMetric):
    """
    Loss in bits per byte of text, which unlike perplexity compares between tokenizers. predictions [N, T]: token losses
    in nats.

    byte_lengths [vocab_size]: bytes that each id decodes to (`token_byte_lengths` gives them). A token of no bytes,
    such as end-of-text, adds its loss and no byte.
    """

    def __init__(self, byte_lengths, **kwargs):
        self.byte_lengths = _to_numpy(byte_lengths)
        super().__init__(**kwargs)

    def _reduce(self, predictions, references, counted):
        losses = np.where(counted, predictions, 0).sum(axis=1, dtype=np.float64)
        lengths = np.where(counted, self.byte_lengths[np.where(counted, references, 0)], 0)
        return losses, lengths.sum(axis=1)

    def _result(self, numerator, denominator):
        return {"bits_per_byte": numerator / math.log(2) / denominator}


class NextTokenAccuracy(_TokenMetric):
    """Share of the targets that are predicted. predictions [N, T]: the likeliest ids."""

    def _reduce(self, predictions, references, counted):
        return ((predictions == references) & counted).sum(axis=1), counted.sum(axis=1)

    def _result(self, numerator, denominator):
        return {"accuracy": numerator / denominator}


class TextMetrics:
    """The three metrics together, for the output of `MultiModalCreature` with `return_logits=False`."""

    def __init__(self, byte_lengths):
        """byte_lengths [vocab_size]: bytes that each id decodes to."""
        self.perplexity = Perplexity()
        self.bits_per_byte = BitsPerByte(byte_lengths)
        self.accuracy = NextTokenAccuracy()

    def add_batch(self, token_losses, predictions, labels):
        """token_losses [N, T-1] in nats, predictions [N, T-1] ids, labels [N, T] unshifted, -100 where ignored."""
        targets = _to_numpy(labels)[:, 1:]
        token_losses = _to_numpy(token_losses)
        self.perplexity.add_batch(predictions=token_losses, references=targets)
        self.bits_per_byte.add_batch(predictions=token_losses, references=targets)
        self.accuracy.add_batch(predictions=predictions, references=targets)

    def compute(self) -> dict[str, float]:
        """loss (nats per token), perplexity, bits_per_byte, accuracy over all batches added; resets the metrics."""
        return {**self.perplexity.compute(), **self.bits_per_byte.compute(), **self.accuracy.compute()}


def text_metrics(token_losses, predictions, labels, byte_lengths) -> dict[str, float]:
    """
    Loss (nats per token), perplexity, bits per byte and next-token accuracy of one set of rows.

    Args:
        token_losses: [N, T-1] float, nats; values at ignored targets do not count.
        predictions: [N, T-1], likeliest ids.
        labels: [N, T], unshifted: the target of position t is labels[:, t + 1]; -100 is ignored.
        byte_lengths: [vocab_size], bytes that each id decodes to.

    Raises:
        UserError: when no target is counted.
    """
    metrics = TextMetrics(byte_lengths)
    metrics.add_batch(token_losses, predictions, labels)
    return metrics.compute()


def _to_numpy(values) -> np.ndarray:
    """An array of a tensor (of any device and dtype), an array or nested lists."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float().numpy() if values.is_floating_point() else values.numpy()
    return np.asarray(values)
