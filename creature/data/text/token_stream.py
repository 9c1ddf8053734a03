"""Token ids on disk (.bin, .npy, .pt or Arrow files) as flat arrays over the mapped files, checked and hashed."""

import hashlib
import logging
import os
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from creature.errors import UserError, first_line

logger = logging.getLogger(__name__)

SCANNED_WHOLE = 64 << 20  # bytes up to which every id is checked at each opening, whatever a manifest says
SAMPLE, SAMPLES = 1 << 16, 64  # size of a sample of a large file (bytes to hash, ids to check), and their number
HASHED_WHOLE = SAMPLE * SAMPLES  # bytes up to which a file's whole content is hashed


@dataclass(frozen=True)
class TokenStream:
    """The token ids of one split on disk: one .bin, .npy or .pt, or its .arrow files. Pickled, it is a few names."""

    kind: str  # bin, npy, pt or arrow
    files: tuple[str, ...]
    dtype: str = "uint16"  # of a .bin; the other files have theirs inside
    offset: int = 0  # bytes of a .bin before the first id

    @property
    def name(self) -> str:
        return self.files[0] if self.kind != "arrow" else str(Path(self.files[0]).parent)

    def arrays(self) -> list[pa.Array]:
        """The tokens as flat Arrow arrays over the mapped files. Only headers are read."""
        if self.kind == "arrow":
            return [flat_ids(chunk) for file in self.files for chunk in arrow_column(file).chunks]
        opened = {"bin": self._open_bin, "npy": self._open_npy, "pt": self._open_pt}[self.kind]()
        if opened.dtype.kind not in "iu":
            raise UserError(f"{self.name} holds {opened.dtype.name} values, not token ids: store integers (uint16)")
        if opened.size == 0:
            raise UserError(f"{self.name} is empty: tokenize some text into it first")
        if opened.ndim != 1:  # rows would be joined without a document end between them
            raise UserError(
                f"{self.name} has the shape {list(opened.shape)}, and token ids are one row: put the end-of-text id "
                "after each document and save ids.reshape(-1)"
            )
        return [pa.Array.from_buffers(pa.from_numpy_dtype(opened.dtype), len(opened), [None, pa.py_buffer(opened)])]

    def _open_bin(self) -> np.ndarray:
        size, width = os.path.getsize(self.name) - self.offset, np.dtype(self.dtype).itemsize
        if size <= 0:
            raise UserError(f"{self.name} is empty: tokenize some text into it first")
        if size % width:
            raise UserError(
                f"{self.name} has {size:,} bytes, which is no whole number of {self.dtype} tokens: "
                "the file is cut off or not a token stream; copy it again, or write it again with tokenize_corpus.py"
            )
        return np.memmap(self.name, np.dtype(self.dtype).newbyteorder("<"), "r", self.offset)

    def _open_npy(self) -> np.ndarray:
        try:
            array = np.load(self.name, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # of many types, SyntaxError among them: the header is Python text
            raise UserError(
                f"{self.name} is not a plain .npy array ({first_line(error)}): save it again with numpy.save"
            ) from error
        if not isinstance(array, np.ndarray):
            raise UserError(f"{self.name} is an archive of arrays (.npz), not a .npy: save the one with numpy.save")
        if not array.dtype.isnative or not array.flags.c_contiguous:
            raise UserError(f"{self.name} is stored in a foreign order: save numpy.ascontiguousarray of it as uint16")
        return array

    def _open_pt(self) -> np.ndarray:
        import torch

        try:
            with warnings.catch_warnings(), open(self.name, "rb") as file:
                warnings.simplefilter("ignore")  # about pickles of other versions
                archive = file.read(4) == b"PK\x03\x04"  # before torch 1.6 it was none, and cannot be mapped
                if archive and any(entry.compress_type for entry in zipfile.ZipFile(file).infolist()):
                    raise ValueError("it is compressed, which torch.save never does")
                tensor = torch.load(self.name, map_location="cpu", weights_only=True, mmap=archive)
        except Exception as error:  # of a dozen types, each of which means that torch.save did not write the file
            raise UserError(
                f"{self.name} is a pickle of something else than a tensor, or damaged; it was not executed: "
                "save the token ids with torch.save(tensor, path)"
            ) from error
        if not isinstance(tensor, torch.Tensor):
            raise UserError(
                f"{self.name} holds a {type(tensor).__name__}, not a tensor: save the token ids with torch.save(tensor)"
            )
        if tensor.is_floating_point() or tensor.is_complex():
            raise UserError(f"{self.name} holds {tensor.dtype} values, not token ids: store integers (uint16)")
        # A view repeats few numbers on disk: a contiguous copy of it could fill any memory.
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise UserError(f"{self.name} is no plain contiguous tensor: save it with torch.save(tensor.clone())")
        return tensor.detach().numpy()

    def check(self, vocab_size: int, manifest: dict | None) -> int:
        """
        The number of tokens; UserError for an id outside the vocabulary, or a size other than the manifest's.

        All ids are read (at the speed of the disk: 1 to 3 s per 10^9 tokens), but of a file above 64 MiB whose manifest
        has the largest id, only samples.
        """
        arrays = self.arrays()
        tokens = sum(map(len, arrays))
        entry = self._manifest_entry(manifest)
        if entry and entry["tokens"] != tokens:
            raise UserError(
                f"{self.name} has {tokens:,} tokens where its manifest says {entry['tokens']:,}: "
                "the file was changed or cut off; copy or tokenize it again, or delete the manifest"
            )
        size = sum(array.nbytes for array in arrays)
        sampled = entry is not None and entry["largest_id"] < vocab_size and size > SCANNED_WHOLE
        if not sampled and size > 4 << 30:
            logger.warning("checking all %.1f GB of token ids of %s, which has no manifest", size / 1e9, self.name)
        position, chunk = 0, 1 << 22
        for array in arrays:
            ids = array.to_numpy(zero_copy_only=True)
            step, length = (max(chunk, len(ids) // SAMPLES), SAMPLE) if sampled else (chunk, chunk)
            for start in range(0, len(ids), step):
                check_ids(ids[start : start + length], position + start, vocab_size, self.name)
            position += len(ids)
        return tokens

    def _manifest_entry(self, manifest: dict | None) -> dict | None:
        name = Path(self.name).name
        entries = (manifest or {}).get("splits", {}).values()
        return next((entry for entry in entries if entry["file"] == name), None)

    def count_blocks(self, block_size: int) -> int:
        return sum(len(array) // block_size for array in self.arrays())

    def fits(self, block_size: int) -> bool:
        """Whether no row of `block_size` spans two buffers."""
        return all(len(array) % block_size == 0 for array in self.arrays()[:-1])

    def content_hash(self) -> str:
        """A hash of the size, the beginning, the end and 64 places between, of every file."""
        return hashlib.sha256("".join(map(sampled_hash, self.files)).encode("ascii")).hexdigest()

    def table(self, block_size: int, start: int, count: int) -> pa.Table:
        """Blocks `start` to `start + count` as rows; a view of the file."""
        blocks = [
            pa.FixedSizeListArray.from_arrays(array.slice(0, len(array) // block_size * block_size), block_size)
            for array in self.arrays()
        ]
        return pa.table({"input_ids": pa.chunked_array(blocks)}).slice(start, count)


def check_ids(ids: np.ndarray, position: int, vocab_size: int, name: str) -> None:
    """Raise UserError for the first of `ids` outside the vocabulary; they begin at `position` of the file `name`."""
    if not len(ids):
        return
    low = int(ids.min()) if ids.dtype.kind == "i" else 0
    if low < 0 or int(ids.max()) >= vocab_size:
        where = int(np.argmax((ids >= vocab_size) | (ids < 0)))
        raise UserError(
            f"{name} has id {ids[where]} at position {position + where:,}, outside a vocabulary of {vocab_size:,}: "
            "it is of another tokenizer, or no token file; name its tokenizer with --tokenizer_name, or tokenize again"
        )


def sampled_hash(path: str | os.PathLike) -> str:
    """A sha256 over a file's size and samples of it: milliseconds for any size, and the whole content up to 4 MiB."""
    size = os.path.getsize(path)
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with open(path, "rb") as file:
        if size <= HASHED_WHOLE:
            digest.update(file.read())
        else:
            for i in range(SAMPLES):
                file.seek((size - SAMPLE) * i // (SAMPLES - 1))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def arrow_column(file: str) -> pa.ChunkedArray:
    """The column input_ids of a mapped .arrow file; UserError where the file is damaged."""
    try:
        table = pa.ipc.open_stream(pa.memory_map(file)).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} is not a whole Arrow file ({error}): copy it again, or tokenize again") from error
    return table.column("input_ids")


def flat_ids(rows: pa.Array) -> pa.Array:
    """The values of a list array as one flat array, without a copy."""
    flat = rows.flatten()
    if flat.null_count or rows.null_count or not pa.types.is_integer(flat.type):
        raise UserError(f"the column input_ids holds {rows.type} with nulls or no integers: store lists of token ids")
    return flat
