"""The loading function: from the data section of the settings to blocks to train and to evaluate on."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from creature.data.text.sources import TOKEN_FILES, is_arrow_folder
from creature.errors import UserError
from creature.files import one_at_a_time
from creature.settings import DataArguments

if TYPE_CHECKING:
    from datasets import DatasetDict

TRIES = 10  # to open a corpus that is being replaced


def load_data(
    data: DataArguments,
    block_size: int,
    vocab_size: int,
    *,
    mixture_blocks: int = -1,
    seed: int = 0,
    progress: bool = True,
) -> "tuple[DatasetDict, dict]":
    """
    (the blocks of `data.data` as a DatasetDict, facts about them).

    "train", and "validation" where there is any, have the one column `input_ids`, each row a block of `block_size`
    consecutive tokens; only the last, short block of a split is left out. "validation" is the corpus's own validation
    stream (corpus.valid.bin, val.bin, ...). Where that has less than one block, the last `validation_fraction` of the
    training blocks are held out, at least one; with 0, nothing is.

    A name in `data.data` is a .bin stream (uint16, or what its manifest, Megatron-LM's index beside it, its header or
    the ids themselves say), a 1-D integer .npy or .pt, a folder with train.bin and val.bin (or valid.bin,
    validation.bin), an Arrow folder (of `save_to_disk` or tokenize_corpus), or text: files, a folder, a glob or a Hub
    dataset (or a folder laid out as one). Text is tokenized into
    `data.cache_dir` and used again while the input stays the same (a Hub dataset: while the cached file is there). With
    `data.train_tokens`, only that many tokens are trained on, and the text is read no further. Several names are a
    mixture (creature.data.mixture): with weights, of `mixture_blocks` blocks in an order given by `seed`.

    The facts: path, source (for a model card), tokens and validation_tokens (before cutting into blocks), dtype,
    data_hash, tokenizer_hash (None without a manifest), ordered (whether the rows of "train" are in training order,
    and are not to be shuffled), and of a mixture parts.

    A corpus that another process replaces meanwhile is opened as it was or as it is then, never some of both.

    Raises UserError, naming the file and the remedy, for a source that is missing, empty, damaged, of another
    tokenizer, shorter than one block, or has ids that are negative or >= `vocab_size`.
    """
    if block_size < 2:
        raise UserError(f"block_size {block_size} is too small: a block needs at least 2 tokens, 2048 is usual")
    if not 0 <= data.validation_fraction < 1:
        raise UserError(f"validation_fraction {data.validation_fraction} is not in [0, 1): a usual value is 0.005")
    if isinstance(data.data, str) or len(data.data) == 1:
        name = data.data if isinstance(data.data, str) else str(data.data[0])
        return _load_whole(replace(data, data=name), block_size, vocab_size, progress)
    from creature.data.mixture import mix, parse_parts

    names, shares = parse_parts(data.data)
    if shares and mixture_blocks < 1:
        raise UserError("a mixture with weights has no epochs: say how long to train with --max_steps")
    parts = [_load_whole(replace(data, data=name), block_size, vocab_size, progress) for name in names]
    return mix(parts, shares, mixture_blocks, seed)


def _load_whole(data: DataArguments, block_size: int, vocab_size: int, progress: bool) -> "tuple[DatasetDict, dict]":
    """`_load_corpus`, again if the corpus was replaced meanwhile."""
    path = Path(data.data)
    for _ in range(TRIES):
        before = _files_state(path)
        try:
            loaded = _load_corpus(data, block_size, vocab_size, progress)
        except (UserError, OSError):
            if _files_state(path) == before:
                raise
        else:
            if _files_state(path) == before:
                return loaded
    raise UserError(f"{data.data} is replaced again and again while it is opened: wait until that is done")


def _files_state(path: Path) -> list[tuple]:
    """
    Name, inode, size and time of the corpus at `path` and of the files beside it: another once it was replaced.

    Whoever replaces one holds a lock meanwhile (`creature.data.text.corpus`), so that no file is missing here.
    """
    within = path if path.is_dir() and not is_arrow_folder(path) else path.parent
    if not within.is_dir():
        return []
    with one_at_a_time(within):
        if within == path:
            found = [file for file in path.iterdir() if file.suffix.lower() in (*TOKEN_FILES, ".json")]
        elif path.is_dir():
            found = [path]
        else:
            found = [file for file in within.iterdir() if file.name.startswith(path.stem) and file.is_file()]
        states = [(file.name, file.stat()) for file in sorted(found)]
    return [(name, state.st_ino, state.st_size, state.st_mtime_ns) for name, state in states]


def _load_corpus(data: DataArguments, block_size: int, vocab_size: int, progress: bool) -> "tuple[DatasetDict, dict]":
    # `datasets` takes a second to import, which scripts that only need a tokenizer would wait for.
    from datasets import DatasetDict

    from creature.data.blocks import dataset_of_blocks
    from creature.data.text.opening import open_corpus

    corpus = open_corpus(data, block_size=block_size, progress=progress)
    train, validation = corpus.train, corpus.validation
    tokens, blocks = train.check(vocab_size, corpus.manifest), train.count_blocks(block_size)
    if blocks < 1:
        raise UserError(
            f"{train.name} has {tokens:,} tokens, less than one block of {block_size:,}: "
            "add text, or choose a smaller block size"
        )
    validation_tokens = validation.check(vocab_size, corpus.manifest) if validation else 0
    held_out = (validation, 0, validation.count_blocks(block_size) if validation else 0)
    if not held_out[2] and data.validation_fraction > 0 and blocks > 1:
        count = max(1, round(data.validation_fraction * blocks))
        blocks -= count
        held_out, validation_tokens = (train, blocks, count), count * block_size
        tokens -= validation_tokens
    if data.train_tokens is not None and data.train_tokens < tokens:
        if data.train_tokens < block_size:
            raise UserError(f"train_tokens {data.train_tokens:,} is less than one block of {block_size:,}: raise it")
        tokens, blocks = data.train_tokens, min(blocks, data.train_tokens // block_size)
    splits = DatasetDict(train=dataset_of_blocks(train, block_size, 0, blocks, "train"))
    if held_out[2]:
        stream, start, count = held_out
        splits["validation"] = dataset_of_blocks(stream, block_size, start, count, "validation")
    return splits, {
        "path": train.name,
        "source": corpus.source,
        "tokens": tokens,
        "validation_tokens": validation_tokens,
        "dtype": str(train.arrays()[0].type),
        "data_hash": train.content_hash(),
        "tokenizer_hash": corpus.manifest["tokenizer_hash"] if corpus.manifest else None,
        "ordered": False,
    }
