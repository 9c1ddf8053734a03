"""Tokens on disk as a `datasets.Dataset` of blocks, without a copy.

`pyarrow.FixedSizeListArray` cuts the memory-mapped tokens into rows: any block size opens in milliseconds, an epoch
reads 2 bytes a token, and DataLoader workers share the pages, because the pickle of such a dataset names the files.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.table import InMemoryTable, MemoryMappedTable

from creature.data.text.token_stream import TokenStream

TRANSFORMS = ("slice filter flatten combine_chunks cast replace_schema_metadata add_column append_column remove_column "
              "set_column rename_columns drop select").split()  # fmt: skip


class BlockTable(MemoryMappedTable):
    """
    A table over a token stream, whose pickle names `origin` (stream, block size, start, count) and the transforms.

    `MemoryMappedTable` itself maps Arrow's own files only; a plain pyarrow.Table would be pickled with all its data.
    """

    def __init__(self, table: pa.Table, origin: tuple, transforms: tuple = ()):
        super().__init__(table, path=origin[0].files[0])
        self.origin, self.transforms = origin, transforms

    def __reduce__(self):
        return _open_table, (self.origin, self.transforms)


def _open_table(origin: tuple, transforms: tuple = ()) -> BlockTable:
    stream, block_size, start, count = origin
    table = BlockTable(stream.table(block_size, start, count), origin)
    for name, arguments, named in transforms:
        table = getattr(table, name)(*arguments, **named)
    return table


def _transform(name: str) -> Callable:
    def apply(self: BlockTable, *arguments, **named) -> BlockTable:
        table = getattr(InMemoryTable(self.table), name)(*arguments, **named).table
        return BlockTable(table, self.origin, (*self.transforms, (name, arguments, named)))

    return apply


for _name in TRANSFORMS:
    setattr(BlockTable, _name, _transform(_name))


def dataset_of_blocks(stream: TokenStream, block_size: int, start: int, count: int, split: str) -> datasets.Dataset:
    """Blocks `start` to `start + count` of a stream as a Dataset with the one column input_ids, in numpy format."""
    # Without a fingerprint, `datasets` would hash the data for one.
    text = f"{stream.content_hash()} {(block_size, start, count)}"
    fingerprint = hashlib.sha256(text.encode("ascii")).hexdigest()[:16]
    table = _open_table((stream, block_size, start, count))
    return datasets.Dataset(table, split=datasets.NamedSplit(split), fingerprint=fingerprint).with_format("numpy")


def describe_arrow_folder(folder: Path, features: datasets.Features, split: str, digest: str) -> None:
    """
    Write what `datasets.load_from_disk` needs beside folder/data-00000-of-00001.arrow.

    digest: hex digits that are others when the content is; `datasets` names its caches after the first 16.
    """
    datasets.DatasetInfo(features=features).write_to_directory(folder)
    state = {
        "_data_files": [{"filename": "data-00000-of-00001.arrow"}],
        "_fingerprint": digest[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
