"""A source opened by `load_data`, for the tests about data."""

from types import SimpleNamespace

from creature.data import DataArguments, load_data


def open_blocks(source, block_size: int = 64, **options) -> SimpleNamespace:
    """
    train, validation (None: there is none) and info of `source`, in a vocabulary of 50,304 ids.

    `options` are fields of the data section. Nothing is held out for validation unless `validation_fraction` says so.
    """
    data = DataArguments(str(source), **{"validation_fraction": 0, **options})
    splits, info = load_data(data, block_size, 50304, progress=False)
    return SimpleNamespace(train=splits["train"], validation=splits.get("validation"), info=info)
