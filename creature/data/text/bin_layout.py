"""How a .bin file without a manifest stores its ids: by the index beside it, its header, or the ids themselves.

nanoGPT's uint16 ids without a header are the rule. llm.c and modded-nanogpt write a header of 256 int32, Megatron-LM an
.idx beside the file, and others ids of four or eight bytes: read as uint16, these would be ids with zeros in between.
"""

import codecs
import logging
import os
import struct
from pathlib import Path

import numpy as np

from creature.errors import UserError

logger = logging.getLogger(__name__)

PIECE, PIECES = 1 << 16, 64  # bytes of a sample of the ids, and the number of samples
FEWEST = 8  # ids other than 0, below which nothing is told by them
LARGEST = 1 << 20  # an id from which on it is none of any tokenizer
HEADER_BYTES = 1024  # of llm.c and modded-nanogpt: magic, version, number of ids, zeros
HEADERS = {20240520: (1, "uint16"), 20240801: (7, "uint32")}  # magic: version, type of the ids
MEGATRON = b"MMIDIDX\0\0"
MEGATRON_DOCUMENTS = 1 << 10  # whose last ids are looked at
MEGATRON_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}


def bin_layout(path: Path) -> tuple[str, int]:
    """
    (the type of the ids in a .bin file, the bytes before the first).

    Raises UserError for a file that is recognised and holds no ids, whose ids are of a kind that is not read, or whose
    header or index does not fit it.
    """
    index = path.with_suffix(".idx")
    if index.is_file():
        dtype = _megatron_type(path, index)
        if dtype:
            return dtype, 0
    with open(path, "rb") as file:
        beginning = file.read(HEADER_BYTES)
    if beginning.startswith((b"PK\x03\x04", b"\x93NUMPY")):
        raise UserError(f"{path} is no stream of ids but a file of PyTorch or numpy: name it .pt or .npy")
    if len(beginning) == HEADER_BYTES:
        magic, version, count = struct.unpack("<3i", beginning[:12])
        if 20240101 <= magic < 20250101 and not any(beginning[64:]):  # a date
            return _header_type(path, magic, version, count), HEADER_BYTES
    return _type_of_ids(path), 0


def _header_type(path: Path, magic: int, version: int, count: int) -> str:
    if HEADERS.get(magic, ())[:1] != (version,):
        raise UserError(
            f"{path} has a header of llm.c ({magic}, version {version}) that is not one of a stream of ids: "
            "name the file with the ids"
        )
    dtype = HEADERS[magic][1]
    size, width = path.stat().st_size - HEADER_BYTES, np.dtype(dtype).itemsize
    if size != count * width:
        raise UserError(
            f"{path} has {size:,} bytes behind its header, which says {count:,} ids of {width} bytes: "
            "the file is cut off; copy or write it again"
        )
    return dtype


def _megatron_type(path: Path, index: Path) -> str | None:
    """The type of the ids by Megatron-LM's index of a .bin file; None for an .idx of another kind."""
    with open(index, "rb") as file:
        head = file.read(34)
    if head.startswith(b"TNTIDX"):
        raise UserError(f"{path} is of Megatron-LM's old kind (TNTIDX): write it again with --dataset-impl mmap")
    if not head.startswith(MEGATRON) or len(head) < 34:
        return None
    _, code, pieces, ends = struct.unpack("<QBQQ", head[9:])
    dtype = MEGATRON_TYPES.get(code)
    if dtype is None:
        raise UserError(f"{path} holds no token ids: its index {index} says type {code}, which is none of integers")
    # Documents are of one or several pieces, end to end in the file: their lengths, their places, and after which
    # piece each document ends.
    size, width = path.stat().st_size, np.dtype(dtype).itemsize
    fits = index.stat().st_size >= 34 + 12 * pieces + 8 * ends
    lengths = np.memmap(index, "<i4", "r", 34, (pieces,)) if fits and pieces else np.empty(0, "<i4")
    if not fits or lengths.min(initial=0) < 0 or int(lengths.sum(dtype=np.int64)) * width != size:
        raise UserError(
            f"{path} has {size:,} bytes, which are not the ids that its index {index.name} lists: "
            "one of them is cut off or of another data set; copy both again"
        )
    ends = np.fromfile(index, "<i8", min(ends, MEGATRON_DOCUMENTS), offset=34 + 12 * pieces)
    ends = ends[(ends > 0) & (ends <= pieces)]
    last = np.cumsum(lengths[: ends.max(initial=0)], dtype=np.int64)[ends - 1] - 1
    if size and len(np.unique(np.memmap(path, dtype, "r")[last[last >= 0]])) > 1:
        logger.warning("the documents of %s do not end in one id (see --append-eod): nothing stands between them", path)
    return dtype


def _type_of_ids(path: Path) -> str:
    sample = _sample(path)
    for dtype, name in (("<i8", "int64"), ("<i4", "uint32"), (">i8", ""), (">i4", "")):
        ids = np.frombuffer(sample, dtype)
        if _are_ids(ids):
            if not name:
                raise UserError(f"{path} has its ids with the highest byte first: store them as little-endian uint16")
            return "int32" if name == "uint32" and ids.min() < 0 else name
    if _is_text(sample[:PIECE]):
        raise UserError(f"{path} is text, not ids: give it a name that ends in .txt")
    if _are_bytes(np.frombuffer(sample, np.uint8)):
        raise UserError(f"{path} has ids of one byte: store them as uint16, two bytes each")
    return "uint16"


def _sample(path: Path) -> bytes:
    """Bytes of all parts of a file, each beginning at a multiple of 8."""
    size = os.path.getsize(path)
    if size <= PIECE * PIECES:
        return path.read_bytes()[: size // 8 * 8]
    with open(path, "rb") as file:
        parts = []
        for i in range(PIECES):
            file.seek((size - PIECE) * i // (PIECES - 1) // 8 * 8)
            parts.append(file.read(PIECE))
    return b"".join(parts)


def _are_ids(ids: np.ndarray) -> bool:
    """
    Whether numbers of four or eight bytes look like ids, which pairs of uint16 ids do not.

    Of two uint16 ids, the second would have to be 0 each time (or 65,535, below a negative id). Ids from 65,536 on are
    taken for such where their lower halves are large, too, so that both uint16 ids would be of quite different kinds.
    """
    if np.count_nonzero(ids) < FEWEST or ids.min() <= -LARGEST or ids.max() >= LARGEST:
        return False
    return ids.max() < 1 << 16 or (ids & 0xFFFF).max() >= 1 << 14


def _is_text(sample: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        return False
    return len(text) >= 64 and all(c.isprintable() or c.isspace() for c in text)


def _are_bytes(values: np.ndarray) -> bool:
    """Whether the bytes at even and at odd places are alike; those of uint16 ids are far from it."""
    if len(values) < 1 << 12:
        return False
    low, high = (np.bincount(values[start::2], minlength=256) for start in (0, 1))
    both = low + high
    return 1 < np.count_nonzero(both) < 200 and both[0] < len(values) / 2 and np.abs(low - high).sum() < len(values) / 5
