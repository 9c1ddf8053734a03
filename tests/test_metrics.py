"""The text metrics: hand-computed numbers, ignored targets, token weighting, no dependence on batches, no network."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from creature.errors import UserError
from creature.limits import METRICS
from creature.metrics import BitsPerByte, NextTokenAccuracy, Perplexity, TextMetrics, text_metrics

BYTE_LENGTHS = np.array([1, 2, 3, 4, 0])  # id 4 is a special token of no bytes


def test_hand_computed():
    labels = [[0, 1, 2, 4], [3, 3, -100, 0]]
    token_losses = [[1.0, 2.0, 0.5], [1.5, 99.0, 0.0]]  # 99.0 stands at an ignored target
    predictions = [[1, 0, 4], [3, 2, 1]]
    result = text_metrics(token_losses, predictions, labels, BYTE_LENGTHS)
    # Counted targets: 1, 2, 4 in the first row; 3, 0 in the second.
    assert result["loss"] == pytest.approx((1.0 + 2.0 + 0.5 + 1.5 + 0.0) / 5)
    assert result["perplexity"] == pytest.approx(math.exp(1.0))
    assert result["bits_per_byte"] == pytest.approx(5.0 / math.log(2) / (2 + 3 + 0 + 4 + 1))
    assert result["accuracy"] == pytest.approx(3 / 5)
    assert result.keys() == METRICS.keys()  # which settings are checked against


def test_uniform_model():
    vocab = 16
    labels = np.random.default_rng(0).integers(0, vocab, (3, 9))
    losses = np.full((3, 8), math.log(vocab), np.float32)
    result = text_metrics(losses, np.zeros((3, 8), int), labels, np.ones(vocab, int))
    assert result["perplexity"] == pytest.approx(vocab, rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(math.log2(vocab), rel=1e-6)


def _random_rows(seed=0, rows=12, length=20, vocab=5):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, vocab, (rows, length))
    for row in range(rows):
        labels[row, rng.integers(2, length) :] = -100  # rows of unequal length
    return rng.random((rows, length - 1)).astype(np.float32), rng.integers(0, vocab, (rows, length - 1)), labels


def test_every_token_weighs_the_same():
    losses, predictions, labels = _random_rows()
    counted = labels[:, 1:] != -100
    result = text_metrics(losses, predictions, labels, BYTE_LENGTHS)
    assert result["loss"] == pytest.approx(losses[counted].astype(np.float64).mean(), rel=1e-12)
    assert result["accuracy"] == pytest.approx((predictions == labels[:, 1:])[counted].mean(), rel=1e-12)
    # A mean of row means would be something else: the test would not notice a wrong weighting otherwise.
    row_means = [losses[row][counted[row]].mean() for row in range(len(losses)) if counted[row].any()]
    assert abs(result["loss"] - np.mean(row_means)) > 1e-3


@pytest.mark.parametrize("cuts", [[12], [1] * 12, [5, 7], [11, 1]])
def test_independent_of_the_batch_split(cuts):
    losses, predictions, labels = _random_rows()
    whole = text_metrics(losses, predictions, labels, BYTE_LENGTHS)
    metrics = TextMetrics(BYTE_LENGTHS)
    start = 0
    for rows in cuts:
        part = slice(start, start + rows)
        metrics.add_batch(losses[part], predictions[part], labels[part])
        start += rows
    assert metrics.compute() == whole


def test_compute_starts_afresh_and_metrics_do_not_mix():
    first, second = Perplexity(), Perplexity()
    first.add_batch(predictions=[[1.0]], references=[[3]])
    second.add_batch(predictions=[[2.0]], references=[[3]])
    assert first.compute()["loss"] == 1.0
    assert second.compute()["loss"] == 2.0
    assert first.compute(predictions=[[4.0]], references=[[3]])["loss"] == 4.0
    first.add(prediction=[4.0, 2.0], reference=[3, 3])
    assert first.compute()["loss"] == 3.0


def test_tensors_of_any_dtype():
    labels = torch.tensor([[0, 1, 2]])
    losses = torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16, requires_grad=True)
    assert text_metrics(losses, torch.tensor([[1, 1]]), labels, torch.tensor(BYTE_LENGTHS)) == {
        "loss": 2.0,
        "perplexity": pytest.approx(math.exp(2)),
        "bits_per_byte": pytest.approx(4 / math.log(2) / 5),
        "accuracy": 0.5,
    }


def test_nan_shows_and_huge_losses_do_not_overflow():
    assert math.isnan(Perplexity().compute(predictions=[[math.nan, 1.0]], references=[[1, 1]])["loss"])
    assert Perplexity().compute(predictions=[[1e4]], references=[[1]])["perplexity"] == math.inf


def test_bad_input_is_an_error():
    with pytest.raises(UserError, match="every label is -100"):
        text_metrics([[1.0]], [[1]], [[3, -100]], BYTE_LENGTHS)
    with pytest.raises(UserError, match="nothing to evaluate"):
        Perplexity().compute()
    with pytest.raises(ValueError, match=r"\[rows, tokens\]"):
        NextTokenAccuracy().add_batch(predictions=[[1, 2]], references=[[1, 2, 3]])
    with pytest.raises(UserError, match="nothing to evaluate"):
        BitsPerByte(BYTE_LENGTHS).compute(predictions=np.zeros((0, 3)), references=np.zeros((0, 3), int))


def test_no_network_and_no_file(tmp_path):
    """In a fresh process with a network that always fails and a cache folder that cannot be created."""
    (tmp_path / "file").write_text("a file, so that no folder can be created below it")
    code = (
        "import socket\n"
        "def refuse(*args): raise OSError('no network')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "from creature.metrics import text_metrics\n"
        "print(text_metrics([[1.0]], [[1]], [[0, 1]], [1, 1])['loss'])\n"
    )
    environment = {**os.environ, "HF_METRICS_CACHE": str(tmp_path / "file" / "metrics")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "1.0", done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
