"""Datasets of the Hub: as a stream that is read no further than asked for, from a local folder laid out as one."""

import json

import datasets
import numpy as np
import pytest
from blocks import open_blocks

from creature.data.text.corpus import tokenize_corpus
from creature.data.text.sources import find_sources
from creature.data.text.tokenizer import load_encoding
from creature.errors import UserError

CARD = """---
license: cc0-1.0
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: data/test-*}
- config_name: tokens
  data_files: [{split: train, path: tokens/*}]
---
# Stories
"""
STORIES = [f"Story number {i}. " * (3 + i % 5) for i in range(60)]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder called stories: a card, 60 stories in two files, 5 others as test split, and a configuration of ids."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "stories"
    for name in ("data", "tokens"):
        (folder / name).mkdir(parents=True)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    for part, texts in (("train-00000", STORIES[:30]), ("train-00001", STORIES[30:]), ("test-00000", ["other"] * 5)):
        datasets.Dataset.from_dict({"text": texts}).to_parquet(folder / "data" / f"{part}.parquet")
    ids = [list(range(start, start + 50)) for start in range(0, 1000, 50)]
    datasets.Dataset.from_dict({"input_ids": ids}).to_parquet(folder / "tokens" / "train.parquet")
    return folder


def tokenize(name, **options):
    return tokenize_corpus([name], "corpus.bin", progress=False, overwrite=True, validation_fraction=0, **options)


def test_a_folder_with_a_card_is_the_dataset_that_the_card_describes(repository):
    assert tokenize("stories")["documents"] == 60  # not the card, not the test split
    ids = np.fromfile("corpus.bin", "<u2")
    assert load_encoding().decode(ids[: list(ids).index(50256)].tolist()) == STORIES[0]
    assert tokenize("stories::test")["documents"] == 5
    assert tokenize("stories:default")["documents"] == 60
    for name, words in (("stories::validation", "validation"), ("stories:french", "french")):
        with pytest.raises(UserError, match=words):
            tokenize(name)
    datasets.Dataset.from_dict({"text": ["secret"]}).to_parquet(repository.parent / "secret.parquet")
    (repository / "README.md").write_text(CARD.replace("tokens/*", "../secret.parquet"), encoding="utf-8")
    with pytest.raises(UserError, match="secret.parquet, outside itself"):
        tokenize("stories:tokens")
    (repository / "README.md").write_text("# Without a card\n")
    assert tokenize("stories/data")["documents"] == 65 and find_sources(["stories"])[0][0].kind != "hub"


def test_rows_that_end_early_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "README.md").write_text("---\nconfigs:\n- {config_name: default, data_files: a.csv}\n---\n")
    (tmp_path / "broken" / "a.csv").write_text('text,x\na,b\n"open,b\nc,d\n')
    for work in (tokenize, open_blocks):
        with pytest.raises(UserError, match="broken could not be read to the end .* repair the data"):
            work("broken")


def test_names():
    for name, configuration, split in (
        ("owner/name", "", "train"),
        ("owner/name:config:test", "config", "test"),
        ("owner/name::test", "", "test"),
    ):
        source = find_sources([name])[0][0]
        assert (source.kind, source.path, source.configuration, source.split) == ("hub", None, configuration, split)
    for name in ("corpus.bin", "a/b.txt", "a/b.bin"):
        with pytest.raises(UserError, match="does not exist"):
            find_sources([name])


def test_only_so_many_tokens_are_taken_and_no_more_is_read(repository, monkeypatch):
    whole = tokenize("stories")
    everything = np.fromfile("corpus.bin", "<u2")
    limited = tokenize("stories", train_tokens=300)
    ids = np.fromfile("corpus.bin", "<u2")
    assert len(ids) == limited["tokens"] == 300 and (ids == everything[:300]).all()
    assert limited["documents"] == (ids == 50256).sum() < whole["documents"]
    assert 0 < limited["text_bytes"] < whole["text_bytes"]
    assert tokenize("stories", train_tokens=10**9)["splits"] == whole["splits"]
    with pytest.raises(UserError, match="--train_tokens 0"):
        tokenize("stories", train_tokens=0)

    read = []

    def endless(source):
        for number in range(10**9):
            read.append(number)
            yield {"text": f"number {number}"}

    monkeypatch.setattr("creature.data.text.readers.open_rows", endless)
    assert tokenize("owner/endless", train_tokens=50_000)["tokens"] == 50_000
    assert len(read) < 200_000


def test_training_opens_them_and_stops_there(repository):
    options = {"block_size": 16, "validation_fraction": 0.1, "cache_dir": "cache"}
    splits = open_blocks("stories", **options, train_tokens=400)
    assert splits.info["tokens"] == 400 and len(splits.train) == 25
    more = open_blocks("stories", **options)
    assert more.info["tokens"] > 400 and (more.train[3]["input_ids"] == splits.train[3]["input_ids"]).all()
    rows = open_blocks("stories:tokens", **options | {"validation_fraction": 0}, train_tokens=130)
    assert rows.info["tokens"] == 130
    assert np.concatenate(rows.train["input_ids"]).tolist() == list(range(128))
    np.arange(100, dtype="<u2").tofile("corpus.bin")
    with pytest.raises(UserError, match="less than one block of 16"):
        open_blocks("corpus.bin", **options, train_tokens=10)
    # The folder has changed: nothing old is taken from the cache.
    datasets.Dataset.from_dict({"input_ids": [[7] * 64]}).to_parquet(repository / "tokens" / "train.parquet")
    assert open_blocks("stories:tokens", **options).train[0]["input_ids"].tolist() == [7] * 16


def test_folders_of_parquet_and_of_compressed_lines_are_input_too(tmp_path):
    import zstandard

    (tmp_path / "parquet").mkdir()
    (tmp_path / "lines").mkdir()
    for part in range(2):
        texts = STORIES[part * 30 : part * 30 + 30]
        datasets.Dataset.from_dict({"content": texts}).to_parquet(tmp_path / "parquet" / f"{part}.parquet")
        lines = "".join(json.dumps({"content": text}) + "\n" for text in texts)
        (tmp_path / "lines" / f"{part}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    options = {"block_size": 16, "text_column": "content", "cache_dir": str(tmp_path / "cache")}
    opened = [open_blocks(tmp_path / name, **options) for name in ("parquet", "lines")]
    assert opened[0].info["tokens"] == opened[1].info["tokens"] > 500
    assert opened[0].info["data_hash"] == opened[1].info["data_hash"]
