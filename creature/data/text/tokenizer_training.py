"""Your own tokenizer: byte-level BPE like GPT-2's, its merges learned from a corpus of any size."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from creature.data.text.pieces import read_pieces
from creature.data.text.tokenizer import END_OF_TEXT_TOKEN, NULL_TOKEN, PAD_TOKEN, load_tokenizer
from creature.errors import UserError, require_unicode
from creature.files import require_writable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = (END_OF_TEXT_TOKEN, NULL_TOKEN, PAD_TOKEN)  # behind the merges, in GPT-2's order
SMALLEST, LARGEST = 320, 1 << 20  # ids: the 256 bytes, the special tokens and some merges, up to a multiple of 64


def train_tokenizer(
    inputs: list[str],
    output: str,
    *,
    vocab_size: int = 8192,
    text_column: str = "text",
    train_characters: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict:
    """
    Learn a byte-level BPE tokenizer from `inputs` (see creature.data.text.sources) and save it as the folder `output`.

    AutoTokenizer loads the folder, and `--tokenizer_name` takes it. `vocab_size` counts the special tokens (end of
    text, NULL, padding) and is rounded up to a multiple of 64, as a model's table is; a small corpus may give fewer.
    `train_characters`: stop reading after about that many. Text is split as GPT-2 splits it, so that a corpus for this
    tokenizer is cut into pieces at the same places.

    Returns the vocabulary's size, the documents and characters read, and the bytes per token in the first piece of
    text. Raises UserError for bad input, a size out of range, and an output that exists (without `overwrite`).
    """
    if not SMALLEST <= vocab_size <= LARGEST:
        raise UserError(f"--vocab_size {vocab_size:,} is not in {SMALLEST} to {LARGEST:,}: 4,096 to 65,536 are usual")
    require_unicode("--output", output)
    folder = Path(output)
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        if not overwrite or not (folder / "tokenizer.json").is_file():
            remedy = "pass --overwrite to replace it" if (folder / "tokenizer.json").is_file() else "name a new folder"
            raise UserError(f"--output {output} exists already: choose another, or {remedy}")
    require_writable(folder.parent)
    vocab_size = -(-vocab_size // 64) * 64
    counts: dict = {"documents": 0, "characters": 0, "first": ""}
    with closing(read_pieces(inputs, text_column, progress)) as pieces:
        tokenizer = _learn(_counted(pieces, counts, train_characters), vocab_size - len(SPECIAL_TOKENS))
    if not counts["characters"]:
        raise UserError(f"there is no text in {', '.join(inputs)}: the input is empty, name one that is not")
    tokenizer.save_pretrained(folder)
    first = counts.pop("first")
    ids = load_tokenizer(str(folder))(first, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    return counts | {"vocab_size": len(tokenizer), "bytes_per_token": len(first.encode("utf-8")) / max(len(ids), 1)}


def _counted(pieces: Iterator[list[tuple[str, bool]]], counts: dict, limit: int | None) -> Iterator[list[str]]:
    for batch in pieces:
        texts = [text for text, _ in batch]
        counts["first"] = counts["first"] or "".join(texts)
        counts["documents"] += sum(ends for _, ends in batch)
        counts["characters"] += sum(map(len, texts))
        yield texts
        if limit is not None and counts["characters"] >= limit:
            return


def _learn(texts: Iterator[list[str]], vocab_size: int) -> "PreTrainedTokenizerFast":
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    # Every byte is in the vocabulary, seen or not, so that every text has ids.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT_TOKEN, eos_token=END_OF_TEXT_TOKEN, unk_token=END_OF_TEXT_TOKEN,
        pad_token=PAD_TOKEN, padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip
