"""From a name to data sets and batches: one loading function, and the collators."""

from creature.data.loading import Splits, block_collator, collate_blocks, load_splits, open_streams

__all__ = ["Splits", "block_collator", "collate_blocks", "load_splits", "open_streams"]
