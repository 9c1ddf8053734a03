"""A tokenizer trained on one's own text: what it is, and that corpus, model and checkpoint follow it."""

import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml
from creatures import MICRO
from transformers import AutoModelForCausalLM, AutoTokenizer

import run_clm_creature
from creature.data.text import corpus, pieces
from creature.data.text.corpus import tokenize_corpus
from creature.data.text.tokenizer import load_tokenizer, special_ids, token_byte_lengths
from creature.data.text.tokenizer_training import train_tokenizer
from creature.errors import UserError

STORIES = "\n<|endoftext|>\n".join(
    f"Kas {i} nägi jões {i * 7} kala ja ütles: “Tere, väike kala, kuhu sa ujud?” Kala ei vastanud." for i in range(400)
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with text.txt and tokenizer/, of 448 ids."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "text.txt").write_text(STORIES, encoding="utf-8")
    counts = train_tokenizer([str(folder / "text.txt")], str(folder / "tokenizer"), vocab_size=400, progress=False)
    assert counts["documents"] == 400 and counts["characters"] == len(STORIES.replace("\n<|endoftext|>\n", ""))
    assert counts["vocab_size"] == 448 and counts["bytes_per_token"] > 3
    return folder


def test_it_loads_as_any_tokenizer_and_keeps_every_text(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained / "tokenizer")
    assert len(tokenizer) == 448 and tokenizer.padding_side == "left"
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|null|>", "<|pad|>"]) == [445, 446, 447]
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 445 and tokenizer.pad_token_id == 447
    for text in (STORIES[:500], "漢字 🙂 \x00\r\n\t  two  spaces", "don 't , ok ?"):
        assert tokenizer.decode(tokenizer(text, split_special_tokens=True)["input_ids"]) == text
    assert token_byte_lengths(tokenizer, 448)[:445].min() == 1
    again = train_tokenizer([str(trained / "text.txt")], str(trained / "again"), vocab_size=400, progress=False)
    assert again["vocab_size"] == 448
    first, second = ((trained / name / "tokenizer.json").read_bytes() for name in ("tokenizer", "again"))
    assert first == second


def test_corpus_model_and_checkpoint_follow_it(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = str(trained / "tokenizer")
    manifest = tokenize_corpus(
        [str(trained / "text.txt")], "corpus.bin", tokenizer_name=name, validation_fraction=0.05, progress=False
    )
    assert manifest["dtype"] == "uint16" and manifest["end_of_text"] == 445
    ids = np.fromfile("corpus.bin", "<u2")
    assert load_tokenizer(name).decode(ids[: list(ids).index(445)]) in STORIES.split("\n<|endoftext|>\n")
    Path("micro.yaml").write_text(yaml.safe_dump(MICRO | {"data": {"tokenizer_name": name}}))
    flags = ["--config", "micro.yaml", "--data", "corpus.bin", "--max_steps", "2", "--use_cpu", "--output_dir", "out"]
    monkeypatch.setattr(sys, "argv", ["run_clm_creature.py", *flags])
    assert run_clm_creature.main() == 0
    assert "vocab_size 448 and the special ids follow from" in capsys.readouterr().out
    config = AutoModelForCausalLM.from_pretrained("out").config
    assert config.vocab_size == 448  # the file says 50304
    assert (config.bos_token_id, config.eos_token_id, config.null_token_id, config.pad_token_id) == (445, 445, 446, 447)
    assert json.loads(Path("out/run.json").read_text())["must_match"]["tokenizer_hash"] == manifest["tokenizer_hash"]
    assert len(AutoTokenizer.from_pretrained("out")) == 448
    monkeypatch.setattr(sys, "argv", ["run_clm_creature.py", *flags, "--tokenizer_name", "gpt2", "--output_dir", "new"])
    with pytest.raises(UserError, match="another tokenizer"):
        run_clm_creature.main()


def test_workers_are_threads_that_tokenize(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "LONGEST_RUN", 1000)  # many batches
    threads, encode = set(), corpus._Encoder.__call__

    def note(encoder, batch):
        threads.add(threading.current_thread())
        return encode(encoder, batch)

    monkeypatch.setattr(corpus._Encoder, "__call__", note)
    for workers in (1, 3):
        threads.clear()
        name, output = str(trained / "tokenizer"), str(tmp_path / f"{workers}.bin")
        tokenize_corpus([str(trained / "text.txt")], output, workers=workers, tokenizer_name=name, progress=False)
        assert (threading.main_thread() in threads) == (workers == 1)
    assert (tmp_path / "1.bin").read_bytes() == (tmp_path / "3.bin").read_bytes()


def test_special_tokens_that_a_tokenizer_lacks_get_spare_ids(trained):
    tokenizer = load_tokenizer(str(trained / "tokenizer"))
    tokenizer.pad_token = None
    ids = {"vocab_size": 512, "eos_token_id": 445, "bos_token_id": 445, "null_token_id": 446, "pad_token_id": 448}
    assert special_ids(tokenizer) == ids
    assert special_ids(load_tokenizer("gpt2"))["vocab_size"] == 50304


def test_what_cannot_be_done_is_said_first(trained, tmp_path):
    text = str(trained / "text.txt")
    with pytest.raises(UserError, match="--vocab_size 100 is not in 320 to"):
        train_tokenizer([text], str(tmp_path / "new"), vocab_size=100, progress=False)
    with pytest.raises(UserError, match="pass --overwrite to replace it"):
        train_tokenizer([text], str(trained / "tokenizer"), progress=False)
    with pytest.raises(UserError, match="name a new folder"):
        train_tokenizer([text], str(trained), overwrite=True, progress=False)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="there is no text in"):
        train_tokenizer([str(tmp_path / "empty.txt")], str(tmp_path / "new"), progress=False)
    assert not (tmp_path / "new").exists()
    few = train_tokenizer([text], str(tmp_path / "few"), vocab_size=60_000, train_characters=1000, progress=False)
    assert few["vocab_size"] < 60_000 and few["characters"] >= 1000
