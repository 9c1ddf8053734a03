"""What datatrove tokenized, as a corpus: the same ids as tokenize_corpus makes, and shards that are not whole named."""

import json

import numpy as np
import pytest
from blocks import open_blocks

from creature.data.text.corpus import tokenize_corpus
from creature.data.text.shards import collect_shards
from creature.data.text.tokenizer import load_tokenizer
from creature.errors import UserError


def write_shards(folder, documents, shards=3):
    """As datatrove's DocumentTokenizer with eos_token: a .ds and a .ds.index for each task."""
    tokenizer = load_tokenizer()
    folder.mkdir()
    for shard in range(shards):
        own = documents[len(documents) * shard // shards : len(documents) * (shard + 1) // shards]
        ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in own]
        np.concatenate([np.array(one, "<u2") for one in ids]).tofile(folder / f"{shard:05d}_unshuffled.ds")
        np.cumsum([len(one) for one in ids]).astype("<u8").tofile(folder / f"{shard:05d}_unshuffled.ds.index")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    documents = [f"Story {i}. " + "Once upon a time, in a forest … " * (i % 9) for i in range(120)]
    write_shards(tmp_path / "shards", documents)
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return tmp_path


def collect(**options):
    return collect_shards("shards", "corpus.bin", **{"progress": False} | options)


def test_the_shards_are_the_corpus_that_one_machine_makes(place, monkeypatch):
    manifest = collect(validation_fraction=0)
    whole = tokenize_corpus(["stories.jsonl"], "whole.bin", validation_fraction=0, progress=False)
    assert (place / "corpus.bin").read_bytes() == (place / "whole.bin").read_bytes()
    for key in ("documents", "tokens", "text_bytes", "tokenizer_hash", "end_of_text", "dtype"):
        assert manifest[key] == whole[key], key
    assert manifest["splits"]["train"] == whole["splits"]["train"] | {"file": "corpus.bin"}
    assert not (place / "corpus.valid.bin").exists()

    monkeypatch.setattr("creature.data.text.shards.PIECE", 50)  # documents that are longer, and many pieces
    split = collect(validation_fraction=0.2, overwrite=True)
    assert split["tokens"] == whole["tokens"] and split["documents"] == 120
    assert 8 < split["splits"]["validation"]["documents"] < 45
    opened = open_blocks("corpus.bin", 16)
    assert opened.info["tokens"] == split["splits"]["train"]["tokens"]
    assert opened.info["validation_tokens"] == split["splits"]["validation"]["tokens"]
    first = (place / "corpus.valid.bin").read_bytes()
    assert collect(validation_fraction=0.2, overwrite=True)["splits"] == split["splits"]
    monkeypatch.undo()
    monkeypatch.chdir(place)
    collect(validation_fraction=0.2, overwrite=True)
    assert (place / "corpus.valid.bin").read_bytes() == first


def test_shards_that_are_not_whole_are_named_and_nothing_is_written(place):
    ids = place / "shards" / "00001_unshuffled.ds"
    index = ids.with_name(ids.name + ".index")
    content, ends = ids.read_bytes(), np.fromfile(index, "<u8")
    for change, words in (
        (lambda: ids.write_bytes(content[:-2]), "00001_unshuffled.ds has .* cut off"),
        (lambda: ids.write_bytes(content[:-2] + b"\x00\x00"), "end-of-text"),
        (lambda: ids.write_bytes(content[:-2] + b"\xff\xff"), "id 65535 where the tokenizer 'gpt2' has 50,259"),
        (lambda: (ends[::-1]).tofile(index), "cut off"),
        (lambda: index.unlink(), "save_index"),
    ):
        ids.write_bytes(content)
        ends.tofile(index)
        change()
        with pytest.raises(UserError, match=words):
            collect()
        assert not list(place.glob("corpus*")) and not list(place.glob(".corpus*"))
    with pytest.raises(UserError, match="there are no .ds files"):
        collect_shards("nowhere", "corpus.bin")
    with pytest.raises(UserError, match="ends in .bin"):
        collect_shards("shards", "corpus")


@pytest.mark.parametrize("own", [False, True])
def test_datatrove_itself_writes_what_is_collected(place, own):
    pytest.importorskip("datatrove")
    from datatrove.data import Document
    from datatrove.pipeline.tokens import DocumentTokenizer

    name = "gpt2"
    if own:
        from creature.data.text.tokenizer_training import train_tokenizer

        name = "tokenizer"
        train_tokenizer(["stories.jsonl"], name, vocab_size=400, progress=False)
    else:
        load_tokenizer().save_pretrained("tokenizer")
    lines = [json.loads(line)["text"] for line in (place / "stories.jsonl").read_text().splitlines()]
    for rank, part in enumerate((lines[:50], lines[50:])):
        made, tokenizer = str(place / "made"), str(place / "tokenizer" / "tokenizer.json")
        step = DocumentTokenizer(made, tokenizer, eos_token="<|endoftext|>", shuffle_documents=False)
        step.run((Document(text=text, id=str(i)) for i, text in enumerate(part)), rank=rank, world_size=2)
    collect_shards("made", "corpus.bin", tokenizer_name=name, validation_fraction=0, progress=False)
    tokenize_corpus(["stories.jsonl"], "whole.bin", tokenizer_name=name, validation_fraction=0, progress=False)
    assert (place / "corpus.bin").read_bytes() == (place / "whole.bin").read_bytes()
