"""A trained creature and its tokenizer from a folder: of a run, of one of its checkpoints, or of a saved model."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from creature.checkpoints import list_checkpoints, newest_complete
from creature.errors import UserError, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from configuration_creature import CreatureConfig
    from modeling_creature import MultiModalCreature

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def has_model(folder: str | Path) -> bool:
    """Whether a folder holds a configuration and weights."""
    return (Path(folder) / "config.json").is_file() and any((Path(folder) / name).is_file() for name in WEIGHT_FILES)


def find_model(folder: str | Path) -> Path:
    """
    The folder to load from: the one given when it holds a model, else the newest complete checkpoint in it.

    Raises UserError when there is neither.
    """
    folder = Path(folder)
    if not folder.exists():
        raise UserError(f"there is no folder {folder}: give that of a run, such as checkpoints/text_only")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: give the folder of a run or of a checkpoint")
    if has_model(folder):
        return folder
    newest, skipped = newest_complete(folder)
    if newest is not None and has_model(newest):
        return newest
    reasons = "; ".join(f"{name}: {why}" for name, why in skipped)
    if list_checkpoints(folder):
        raise UserError(
            f"{folder} has no complete checkpoint{f' ({reasons})' if reasons else ''}: train on, or use another"
        )
    raise UserError(f"{folder} holds no model and no checkpoint: give the folder of a run or of a checkpoint")


def load_config(folder: str | Path) -> "CreatureConfig":
    """The configuration saved in `folder`; UserError when it is damaged or of another kind of model."""
    from configuration_creature import CreatureConfig

    try:
        kind = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}/config.json cannot be read: use another checkpoint") from error
    if kind != "creature":
        raise UserError(
            f"{folder} holds a model of type {kind!r}, not a creature: give the folder of a run of this library"
        )
    try:
        return CreatureConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder}/config.json is not valid ({first_line(error)}): use another checkpoint") from error


def load_model(folder: str | Path, device: str, dtype: "torch.dtype | None" = None) -> "MultiModalCreature":
    """The creature saved in `folder`, in evaluation mode; UserError when it is damaged or of another kind."""
    from safetensors import SafetensorError

    from modeling_creature import MultiModalCreature

    config = load_config(folder)
    try:
        model = MultiModalCreature.from_pretrained(folder, config=config, **({"dtype": dtype} if dtype else {}))
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(
            f"the model in {folder} cannot be loaded ({first_line(error)}): use another checkpoint"
        ) from error
    return model.to(device).eval()


def load_own_tokenizer(folder: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer saved with a model, or with the run around a checkpoint, or GPT-2's where none was saved."""
    # AutoTokenizer looks at the configuration too, and asks for trust in remote code where it does not know the type.
    import modeling_creature  # noqa: F401
    from creature.tokenizer import load_tokenizer

    for place in (Path(folder), Path(folder).parent):
        if any((place / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            return load_tokenizer(str(place))
    return load_tokenizer()
