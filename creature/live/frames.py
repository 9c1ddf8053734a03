"""The frames of a creature that is served, as docs/live.md has them: lengths, a JSON header, the bytes of arrays."""

import json
import math
import struct

import numpy as np

LENGTHS = struct.Struct("<II")  # bytes of the header, bytes of the arrays
LONGEST_HEADER, LONGEST_ARRAYS = 1 << 16, 1 << 24
DTYPES = {"uint8": "u1", "int16": "<i2", "int32": "<i4", "float32": "<f4"}


class FrameError(ValueError):
    """A frame after which nothing more can be read: where the next one begins is not known."""


def pack(header: dict, arrays: dict[str, np.ndarray] | None = None) -> bytes:
    """A frame with these entries of its header and these arrays; floats become float32, ids int32."""
    names, pieces = [], []
    for name, value in (arrays or {}).items():
        value = np.asarray(value)
        dtype = str(value.dtype) if str(value.dtype) in DTYPES else "float32" if value.dtype.kind == "f" else "int32"
        names.append([name, dtype, list(value.shape)])
        pieces.append(value.astype(DTYPES[dtype]).tobytes())
    text, body = json.dumps(header | {"arrays": names}).encode(), b"".join(pieces)
    return LENGTHS.pack(len(text), len(body)) + text + body


def unpack_lengths(data: bytes) -> tuple[int, int]:
    """Bytes of the header and of the arrays that follow; FrameError where they are more than a frame may have."""
    header, arrays = LENGTHS.unpack(data)
    if header > LONGEST_HEADER or arrays > LONGEST_ARRAYS:
        raise FrameError(
            f"The frame says that its header has {header:,} bytes and its arrays {arrays:,}: send at most "
            f"{LONGEST_HEADER:,} and {LONGEST_ARRAYS:,}, and begin every frame with its two lengths."
        )
    return header, arrays


def unpack(header: bytes, body: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    """
    The entries of a header and the arrays of a frame. Nothing in it is executed, only numbers and text are read.

    Raises:
        ValueError: for a header that is not JSON as the format has it, or arrays that do not fill the bytes.
    """
    try:
        entries = json.loads(header.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError("The header is not JSON in UTF-8: see the format in docs/live.md.") from None
    if not isinstance(entries, dict) or not isinstance(entries.get("kind"), str):
        raise ValueError('The header is not an object with a "kind": send "hello", "tick" or "reset".')
    listed = entries.pop("arrays", [])
    arrays, start = {}, 0
    for entry in listed if isinstance(listed, list) else [None]:
        name, dtype, shape = _array_entry(entry)
        size = math.prod(shape)
        end = start + size * np.dtype(DTYPES[dtype]).itemsize
        if name in arrays or end > len(body):
            reason = "is there twice" if name in arrays else f"{shape} has more bytes than the frame"
            raise ValueError(f"The array {name} {reason}: send every array once, whole and in the order of the header.")
        arrays[name] = np.frombuffer(body, DTYPES[dtype], size, start).reshape(shape)
        start = end
    if start != len(body):
        raise ValueError(f"The arrays of the header have {start:,} bytes and the frame {len(body):,}: send the same.")
    return entries, arrays


def _array_entry(entry) -> tuple[str, str, list[int]]:
    good = isinstance(entry, list) and len(entry) == 3 and all(isinstance(word, str) for word in entry[:2])
    if not good or entry[1] not in DTYPES or not isinstance(entry[2], list) or len(entry[2]) > 8:
        raise ValueError(f'"arrays" is a list of [name, dtype, shape] with a dtype out of {", ".join(DTYPES)}.')
    if not all(type(size) is int and 0 <= size <= LONGEST_ARRAYS for size in entry[2]):
        raise ValueError(f"A shape is a list of whole numbers from 0 to {LONGEST_ARRAYS:,}.")
    return entry[0], entry[1], entry[2]
