"""Folders of recordings, to merge and to split anew, and any data set with columns of sound or pictures."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from creature.data.recordings.media import encode_picture
from creature.data.recordings.schema import NAMED, TRACKS, RecordingError, load_recordings, untimed
from creature.data.recordings.sound import sound_rows
from creature.data.recordings.sources import HELD_OUT, ImportOptions, Job, Notes, list_files
from creature.data.recordings.transcripts import TEXT_COLUMNS, flatten_values
from creature.data.text.sources import is_arrow_folder
from creature.errors import UserError, first_line
from ticks_creature import TICK_SECONDS

if TYPE_CHECKING:
    from datasets import Dataset


def find_recordings(folder: Path, options: ImportOptions, notes: Notes) -> list[Job]:
    """A job for each split of a folder of recordings. Its rows keep what they are; groups are split anew."""
    splits, facts = load_recordings(folder)

    def rows(split: str, groups: list[str]) -> Iterator[tuple[dict, dict]]:
        for row, group in zip(splits[split], groups, strict=True):
            kinds = {NAMED[column] for column in TRACKS if row.get(column) is not None}
            names = {kind: facts["names"][kind] for kind in kinds}
            yield row | {"split_group": group}, names

    jobs = []
    for split, dataset in splits.items():
        own = zip(dataset["recording_id"], dataset["split_group"], strict=True)
        groups = [options.group(name) or group or name for name, group in own]
        jobs.append(Job(split, set(groups), partial(rows, split, groups), split == "validation", len(groups)))
    return jobs


def find_dataset(path: Path, options: ImportOptions, notes: Notes) -> list[Job]:
    """
    A job for each split of a data set with a column of sound or pictures: a folder of `save_to_disk` or of Parquet
    files, or owner/name[:configuration[:split]] on the Hub. A text or a class beside them is internal text at the end.

    Raises UserError if it cannot be opened, or has no such column.
    """
    import datasets

    name, only = path.as_posix(), None
    try:
        if is_arrow_folder(path):
            splits = datasets.load_from_disk(str(path))
        elif path.is_dir():
            files = [str(file) for file in list_files(path, (".parquet",))]
            held_out = [file for file in files if HELD_OUT.search(str(Path(file).relative_to(path).with_suffix("")))]
            given = {"train": [file for file in files if file not in held_out], "test": held_out}
            splits = datasets.load_dataset("parquet", data_files={split: some for split, some in given.items() if some})
        else:
            hub, configuration, only = (*name.split(":", 2), "", "")[:3]
            splits = datasets.load_dataset(hub, configuration or None)
    except Exception as error:  # a dozen unrelated types, each of which means that the data cannot be had
        raise UserError(
            f"{name} is neither a folder here nor a Hub data set that can be reached ({first_line(error)}): check the "
            "name, the configuration and split (owner/name:configuration:split) and the network"
        ) from error
    if isinstance(splits, datasets.Dataset):
        splits = {"train": splits}
    if only:
        splits = {split: dataset for split, dataset in splits.items() if split == only}
    jobs = [_split_job(split, dataset, options, notes) for split, dataset in splits.items()]
    if not jobs:
        raise UserError(f"{name} has no split {only}: leave it out to take all")
    return jobs


def _split_job(split: str, dataset: "Dataset", options: ImportOptions, notes: Notes) -> Job:
    import datasets

    features = dataset.features
    sounds = [name for name, feature in features.items() if isinstance(feature, datasets.Audio)]
    pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not sounds and not pictures:
        raise UserError(f"no column holds sound or pictures ({', '.join(features)}): import it as another --format")
    lower = {name.lower(): name for name in features}
    wanted = [options.label_column.lower()] if options.label_column else TEXT_COLUMNS
    text = next((lower[name] for name in wanted if name in lower), None)
    used = {*sounds[:1], *pictures, text}
    for name in (*sounds[:1], *pictures):
        dataset = dataset.cast_column(name, type(features[name])(decode=False))
    contents = dataset.select_columns([name for name in features if name in used])
    group_columns = [name for name in features if name not in used]
    words = getattr(features.get(text), "int2str", None)  # of a ClassLabel
    flat = [name for name in group_columns if getattr(features[name], "dtype", None) in ("string", "int32", "int64")]
    about = dataset.select_columns(flat) if flat else [{}] * len(dataset)
    numbered = ((f"{split}/{number}", row) for number, row in enumerate(about))
    groups = [options.group(name, row) or name for name, row in numbered]
    for name in group_columns:
        if options.group("", {name: "x"}) is None:
            notes.leave_out("a column that is neither sound, picture, text nor group", name)

    def rows() -> Iterator[tuple[dict, dict]]:
        for number, (row, group) in enumerate(zip(contents, groups, strict=True)):
            name = f"{split}/{number}"
            value = row.get(text)
            said = words(value) if words and value is not None and value >= 0 else flatten_values(value)
            try:
                images = [
                    {"name": one, "images": [encode_picture(_content(row[one]), options.image_size)], "times": [0.0]}
                    for one in pictures
                    if row[one]
                ]
                if sounds and row[sounds[0]]:
                    for part, names in sound_rows(_content(row[sounds[0]]), name, group, untimed(said), notes):
                        yield part | {"images": images or None}, names
                        images = []  # the pictures belong to the beginning
                elif images:
                    row = {"recording_id": name, "split_group": group, "duration": TICK_SECONDS, "images": images}
                    yield row | {"internal_text": untimed(said) if said else None}, {}
                else:
                    raise RecordingError("neither sound nor picture in it")
            except (RecordingError, OSError) as error:
                notes.leave_out(first_line(error), name)

    return Job(split, set(groups), rows, bool(HELD_OUT.search(split)), len(dataset))


def _content(value: dict) -> bytes:
    return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
