"""Scores of documents: every token once, in windows; lm_eval and the library give the same numbers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from creatures import GPT2, micro_config
from torch.nn.functional import cross_entropy

from creature.data.text.tokenizer import load_tokenizer, token_byte_lengths
from creature.errors import UserError
from creature.evaluation import score_documents, whole_documents, windows
from creature.metrics import IGNORE_INDEX, text_metrics
from modeling_creature import MultiModalCreature

PROJECT = Path(__file__).resolve().parent.parent
CONTEXT = 32


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """The folder of an untrained micro creature with the GPT-2 vocabulary and a context of 32 ticks."""
    folder = tmp_path_factory.mktemp("speaker")
    torch.manual_seed(0)
    config = micro_config(loss_weights=None, max_position_embeddings=CONTEXT, **GPT2)
    model = MultiModalCreature(config)
    with torch.no_grad():  # an untrained table makes every text equally likely
        model.model.embed_tokens.weight.mul_(20)
    model.save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of text: a file of two documents, one of a single long one, and records."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "two.txt").write_text("The sea was calm — très calme.\n<|endoftext|>\nA fox ran.\n", encoding="utf-8")
    (folder / "long.txt").write_text(" ".join(f"Day {day}: the hen laid an egg." for day in range(16)))
    lines = [{"text": "One line, with <|endoftext|> in it."}, {"text": ""}, {"text": "Another."}]
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def names(folder: Path) -> list[str]:
    return [name.removeprefix(f"{folder.as_posix()}/") for name, _ in whole_documents(str(folder))]


def test_documents_are_named_by_their_file(texts):
    assert names(texts) == ["long.txt", "records.jsonl", "records.jsonl:3", "two.txt", "two.txt:2"]
    documents = [text for _, text in whole_documents(str(texts / "two.txt"))]
    assert documents == ["The sea was calm — très calme.", "A fox ran.\n"]
    with pytest.raises(UserError, match="name the text"):
        list(whole_documents("corpus.bin"))


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 11])
def test_windows_predict_every_token_once(length):
    ids = np.arange(100, 100 + length)
    before = np.concatenate(([7], ids[:-1]))
    predicted = []
    for inputs, targets in windows(ids, 7, 4):
        assert len(inputs) == len(targets) == min(length, 4)
        counted = targets != IGNORE_INDEX
        for given, target in zip(inputs[counted], targets[counted], strict=True):
            assert given == before[target - 100]
        predicted += targets[counted].tolist()
    assert predicted == ids.tolist()


def test_scores_equal_a_loop_over_tokens(speaker, texts):
    model, tokenizer = MultiModalCreature.from_pretrained(speaker).eval(), load_tokenizer()
    documents = list(whole_documents(str(texts)))
    scores = score_documents(model, tokenizer, documents, block_size=CONTEXT)
    assert list(scores) == [name for name, _ in documents]
    lengths = token_byte_lengths(tokenizer, 50304)
    for name, text in documents:
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        nats, hits = 0.0, 0
        for position in range(len(ids)):
            window = position // CONTEXT * CONTEXT
            begin = max(0, min(window, len(ids) - CONTEXT))
            context = ([50256] + ids)[begin : position + 1]
            with torch.no_grad():
                logits = model(torch.tensor([context])).logits[0, -1]
            nats += float(cross_entropy(logits, torch.tensor(ids[position])))
            hits += int(logits.argmax() == ids[position])
        score = scores[name]
        assert score.tokens == len(ids) and score.correct == hits
        assert score.bytes == len(text.encode("utf-8")) == lengths[ids].sum()
        assert score.nats == pytest.approx(nats, rel=1e-5)
    # The metrics are those of creature/metrics.py.
    score = scores[documents[0][0]]
    ids = np.array(tokenizer(documents[0][1])["input_ids"])
    even = np.full((1, len(ids)), score.loss)
    expected = text_metrics(even, np.zeros((1, len(ids))), np.concatenate(([0], ids))[None], lengths)
    for metric in ("loss", "perplexity", "bits_per_byte"):
        assert getattr(score, metric) == pytest.approx(expected[metric], rel=1e-6)


def test_scores_do_not_depend_on_the_batch(speaker, texts):
    model, tokenizer = MultiModalCreature.from_pretrained(speaker).eval(), load_tokenizer()
    runs = [
        score_documents(model, tokenizer, whole_documents(str(texts)), block_size=CONTEXT, batch_size=size)
        for size in (1, 5)
    ]
    for name, score in runs[0].items():
        assert runs[1][name].nats == pytest.approx(score.nats, rel=1e-5)
        assert (runs[1][name].tokens, runs[1][name].bytes) == (score.tokens, score.bytes)


def test_nothing_to_score_is_an_error(speaker):
    model = MultiModalCreature.from_pretrained(speaker).eval()
    with pytest.raises(UserError, match="no document has any text"):
        score_documents(model, load_tokenizer(), [("empty", "")], block_size=CONTEXT)
    tokenizer = load_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="set its eos_token"):
        score_documents(model, tokenizer, [("a", "a")], block_size=CONTEXT)


def test_lm_eval_finds_the_same_bits_per_byte(speaker, texts):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    # Both read everything but the marker inside a line, which lm_eval takes for the token.
    data = str(texts / "[lt]*.txt")
    manager = TaskManager(
        include_path=str(PROJECT / "configs" / "lm_eval"), include_defaults=False, metadata={"data": data}
    )
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(speaker), "trust_remote_code": True},
        tasks=["text_perplexity"],
        task_manager=manager,
        device="cpu",
        batch_size=3,
        bootstrap_iters=0,
    )["results"]["text_perplexity"]
    model = MultiModalCreature.from_pretrained(speaker).eval()
    scores = score_documents(model, load_tokenizer(), whole_documents(data), block_size=CONTEXT)
    nats, size = sum(score.nats for score in scores.values()), sum(score.bytes for score in scores.values())
    assert len(scores) == 3 and max(score.tokens for score in scores.values()) > 4 * CONTEXT
    assert found["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / size, abs=1e-3)
    assert found["byte_perplexity,none"] == pytest.approx(math.exp(nats / size), rel=1e-3)
