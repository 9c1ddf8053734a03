"""Tokens that datatrove wrote on many machines, as one corpus: its .ds files concatenated, with a validation split.

datatrove's DocumentTokenizer writes for each task a .ds file, flat ids in the order of the documents, and a .ds.index,
where each document ends. The result is what `tokenize_corpus` writes for the same documents, except that here a hash of
a document's ids, not of its text, chooses its split.
"""

import hashlib
import json
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from creature.data.text.corpus import SPLITS, manifest_path
from creature.data.text.tokenizer import load_tokenizer, token_byte_lengths, tokenizer_hash
from creature.errors import UserError
from creature.files import replace_file, sha256_file

HASHED = 1 << 14  # ids of a document's beginning that choose its split
PIECE = 1 << 20  # ids in memory at a time, about; or one document, if it is longer


def collect_shards(
    folder: str,
    output: str,
    *,
    tokenizer_name: str = "gpt2",
    validation_fraction: float = 0.005,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> dict:
    """
    Write the .ds files in `folder` (and below), in order of their names, to `output`, a .bin; return its manifest.

    Beside it appear, as `tokenize_corpus` writes them, the .valid.bin with `validation_fraction` of the documents and
    the .manifest.json. Raises UserError for files that are missing, cut off, of another tokenizer, or whose documents
    do not end in its end-of-text, and for an output that exists (without `overwrite`).
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"--validation_fraction {validation_fraction} is not in [0, 1): a usual value is 0.005")
    target = Path(output)
    if target.suffix != ".bin" or target.is_dir():
        raise UserError(f"--output {output} has to be a file that ends in .bin")
    paths = (target, target.with_name(target.stem + ".valid.bin"))
    existing = [path for path in (*paths, manifest_path(target)) if path.exists()]
    if existing and not overwrite:
        raise UserError(f"{existing[0]} exists already: choose another --output, or pass --overwrite to replace it")
    files = sorted(Path(folder).rglob("*.ds"))
    if not files:
        raise UserError(f"there are no .ds files in {folder}: name the output_folder of datatrove's DocumentTokenizer")
    tokenizer = load_tokenizer(tokenizer_name)
    size = max(tokenizer.get_vocab().values()) + 1
    dtype = np.dtype("<u2" if size <= 1 << 16 else "<u4")
    began, byte_lengths = time.perf_counter(), token_byte_lengths(tokenizer, size)
    digests = [hashlib.sha256() for _ in SPLITS]
    tokens, documents, largest, text_bytes = [0, 0], [0, 0], [0, 0], 0
    with ExitStack() as stack:
        out = [stack.enter_context(replace_file(path)) for path in paths]
        for ids, ends in _pieces(files, dtype, progress):
            _check(ids, ends, size, tokenizer.eos_token_id, tokenizer_name)
            text_bytes += int(byte_lengths[ids].sum())
            splits = _choose(ids, ends, validation_fraction, seed)
            of_ids = np.repeat(splits, np.diff(ends, prepend=0))
            for split in np.unique(splits):
                own = np.ascontiguousarray(ids[of_ids == split])
                out[split].write(own)
                digests[split].update(own)
                tokens[split] += len(own)
                documents[split] += int((splits == split).sum())
                largest[split] = max(largest[split], int(own.max()))
        if not tokens[0]:
            raise UserError(
                f"no document of {folder} fell into the training split: lower --validation_fraction, or add documents"
            )
        manifest = {
            "format": "creature token corpus 1",
            "tokenizer": tokenizer_name,
            "tokenizer_hash": tokenizer_hash(tokenizer),
            "vocab_size": size,
            "end_of_text": tokenizer.eos_token_id,
            "dtype": dtype.name,
            "documents": sum(documents),
            "text_bytes": text_bytes,
            "tokens": sum(tokens),
            "splits": {
                split: {"file": path.name, "tokens": n, "documents": d, "largest_id": m, "sha256": digest.hexdigest()}
                for split, path, n, d, m, digest in zip(SPLITS, paths, tokens, documents, largest, digests, strict=True)
                if n
            },
            "validation_fraction": validation_fraction,
            "seed": seed,
            "inputs": [{"name": f.as_posix(), "bytes": f.stat().st_size, "sha256": sha256_file(f)} for f in files],
        }
        json.dump(manifest, stack.enter_context(replace_file(manifest_path(target), "w")), indent=2, ensure_ascii=False)
    if not tokens[1]:
        paths[1].unlink()
    return manifest | {"seconds": time.perf_counter() - began}


def _pieces(files: list[Path], dtype: np.dtype, progress: bool):
    """(ids [n], where each of their documents ends [documents]): whole documents, up to PIECE ids of them or one."""
    from tqdm import tqdm

    with tqdm(total=sum(f.stat().st_size for f in files), unit="B", unit_scale=True, disable=not progress) as bar:
        for file in files:
            index = file.with_name(file.name + ".index")
            if not index.is_file():
                raise UserError(f"{index} is missing: leave save_index of datatrove's DocumentTokenizer on")
            ends = np.fromfile(index, "<u8").astype(np.int64)
            count = int(ends[-1]) if len(ends) else 0
            if count * dtype.itemsize != file.stat().st_size or (np.diff(ends, prepend=0) < 1).any():
                raise UserError(
                    f"{file} has {file.stat().st_size:,} bytes where its index has {count:,} ids of "
                    f"{dtype.itemsize} bytes: it is cut off, or of another tokenizer"
                )
            ids = np.memmap(file, dtype, "r") if count else np.empty(0, dtype)
            first, start = 0, 0
            while first < len(ends):
                last = max(int(np.searchsorted(ends, start + PIECE, side="right")), first + 1)
                stop = int(ends[last - 1])
                yield np.asarray(ids[start:stop]), ends[first:last] - start
                bar.update((stop - start) * dtype.itemsize)
                first, start = last, stop


def _check(ids: np.ndarray, ends: np.ndarray, size: int, end_of_text: int | None, name: str) -> None:
    if int(ids.max()) >= size:
        raise UserError(f"the shards have id {int(ids.max())} where the tokenizer {name!r} has {size:,}: name theirs")
    if end_of_text is None or (ids[ends - 1] != end_of_text).any():
        raise UserError(
            f"not every document of the shards ends in the end-of-text of the tokenizer {name!r}: give datatrove's "
            "DocumentTokenizer its eos_token"
        )


def _choose(ids: np.ndarray, ends: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """The split of each document, int64 [documents]: 1 for validation. Copies of a document get the same split."""
    key, limit = seed.to_bytes(8, "little", signed=True), int(fraction * 2**64)
    splits = np.zeros(len(ends), dtype=np.int64)
    if limit:
        for i, (start, end) in enumerate(zip(np.append(0, ends[:-1]), ends, strict=True)):
            digest = hashlib.blake2b(ids[start : min(end, start + HASHED)].tobytes(), digest_size=8, key=key).digest()
            splits[i] = int.from_bytes(digest, "little") < limit
    return splits
