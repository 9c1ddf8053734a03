"""From a name to data sets and batches: one loading function, and the collators."""

from creature.data.collators import block_collator, collate_blocks, collate_clips, collate_rows, spread_pictures
from creature.data.loading import load_data
from creature.settings import DataArguments

__all__ = [
    "DataArguments",
    "block_collator",
    "collate_blocks",
    "collate_clips",
    "collate_rows",
    "load_data",
    "spread_pictures",
]
