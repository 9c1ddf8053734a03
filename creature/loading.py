"""A trained creature and its tokenizer from a folder: of a run, of one of its checkpoints, or of a saved model."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from creature.checkpoints import list_checkpoints, newest_complete, read_run
from creature.errors import UserError, first_line, is_out_of_memory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from configuration_creature import CreatureConfig
    from modeling_creature import MultiModalCreature
    from processing_creature import CreatureProcessor

WEIGHT_INDEX = "model.safetensors.index.json"
WEIGHT_FILES = ("model.safetensors", WEIGHT_INDEX)  # no pickles


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
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder}/config.json cannot be read: use another checkpoint") from error
    if kind != "creature":
        raise UserError(
            f"{folder} holds a model of type {kind!r}, not a creature: give the folder of a run of this library"
        )
    try:
        return CreatureConfig.from_pretrained(folder)
    except Exception as error:  # of many types: a configuration is checked by transformers, then by us
        raise UserError(f"{folder}/config.json is not valid ({first_line(error)}): use another checkpoint") from error


def check_weights(folder: str | Path, config: "CreatureConfig | None" = None) -> None:
    """
    UserError where an index of weights names files outside its folder, or there are fewer weights than `config` says.

    A config.json of a few bytes can ask for more parameters than any memory holds, so this comes before the model.
    """
    folder, files = Path(folder), {"model.safetensors"}
    if (folder / WEIGHT_INDEX).is_file():
        try:
            files = set(json.loads((folder / WEIGHT_INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{folder}/{WEIGHT_INDEX} cannot be read: use another checkpoint") from error
    if not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in files):
        raise UserError(f"{folder}/{WEIGHT_INDEX} names other files than weights beside it: use another checkpoint")
    if config is None:
        return
    stored = sum((folder / name).stat().st_size for name in files if (folder / name).is_file())
    least = (  # a lower bound: counting all parameters would take a model
        config.hidden_size * (config.vocab_size + 2 * config.num_hidden_layers * config.intermediate_size)
        + (_least_eyes(config) if config.num_cameras else 0)
        + config.depth_num_layers * config.depth_hidden_size**2
        + config.num_audio_codebooks * config.audio_codebook_size
        + config.num_touch_points
        + config.num_joints
        + config.body_state_size
        + config.num_mel_bins * config.audio_frames_per_tick
    )
    if least > stored:  # every parameter takes more than a byte
        raise UserError(
            f"the model in {folder} cannot be loaded (config.json has more than {least:,} parameters, and the "
            f"weights have {stored:,} bytes): use another checkpoint"
        )


def _least_eyes(config: "CreatureConfig") -> int:
    sizes = [3 * config.num_cameras, *config.vision_channels]
    places = math.prod(side >> len(config.vision_channels) for side in config.image_shape)
    convolutions = sum(16 * before * after for before, after in zip(sizes, sizes[1:], strict=False))
    return convolutions + places * sizes[-1] * config.sense_hidden_size


def load_model(folder: str | Path, device: str, dtype: "torch.dtype | None" = None) -> "MultiModalCreature":
    """The creature saved in `folder`, in evaluation mode; UserError when it is damaged or of another kind."""
    from modeling_creature import MultiModalCreature

    config = load_config(folder)
    try:
        check_weights(folder, config)
        options = {"dtype": dtype} if dtype else {}
        options |= {"use_safetensors": True, "output_loading_info": True}
        model, info = MultiModalCreature.from_pretrained(folder, config=config, **options)
        lacking = [name for name in sorted(info["missing_keys"]) if _is_needed(model, name)]
        if lacking:
            raise UserError(f"the weights in {folder} lack {lacking[0]}, as an earlier version's do: use another")
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = first_line(error)
        if "ignore_mismatched_sizes" in reason:  # an argument that is not the user's
            reason = "its weights have other shapes, as those of an earlier version or of another config.json have"
        raise UserError(f"the model in {folder} cannot be loaded ({reason}): use another checkpoint") from error
    return model.to(device).eval()


def _is_needed(model: "MultiModalCreature", name: str) -> bool:
    """Whether a creature computes with a weight: not if it is of a sense that has learned nothing."""
    sense = re.match(r"model\.senses\.(\w+)\.", name)
    return not sense or bool(getattr(model.model.senses, sense[1]).proj.weight.any())


def load_to_generate(folder: Path, wanted: str | None = None):
    """(the model in half precision where the device computes in it, its Device): on a GPU if there is one."""
    import torch
    import transformers

    from creature.hardware import device_info

    transformers.utils.logging.disable_progress_bar()
    device = device_info(wanted)
    half = device.kind == "cuda" and device.bf16
    return load_model(folder, device.kind, torch.bfloat16 if half else torch.float32), device


def trained_ticks(folder: str | Path, otherwise: int) -> int:
    """The most ticks of a clip in the run of a model on recordings, by its run.json; `otherwise` without such a run."""
    run = read_run(folder) or read_run(Path(folder).resolve().parent) or {}
    return run["must_match"]["block_size"] if run.get("on_recordings") else otherwise


def ids_without_text(config: "CreatureConfig", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids that stand for no text and that a text must not contain: NULL, padding, spare rows of the table."""
    spare = set(range(len(tokenizer), config.vocab_size))
    return sorted((spare | {config.null_token_id, config.pad_token_id}) - {None, config.eos_token_id})


def saved_codec(folder: str | Path) -> Path | None:
    """The folder of the codec that was saved with a model, or with the run around a checkpoint; None without one."""
    from codec_creature import CODEC_FOLDER

    places = (Path(place) / CODEC_FOLDER for place in (folder, Path(folder).parent))
    return next((place for place in places if (place / "config.json").is_file()), None)


def codec_hash(codec: "PreTrainedModel") -> str:
    """Hex digits that are others when a codec, or its sizes, are."""
    sizes = {name: value for name, value in codec.config.to_dict().items() if isinstance(value, int | float | list)}
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True, default=str).encode("utf-8"))
    for name, weights in sorted(codec.state_dict().items()):
        digest.update(name.encode("utf-8") + weights.cpu().numpy().tobytes())
    return digest.hexdigest()


def load_processor(folder: str | Path, config: "CreatureConfig") -> "CreatureProcessor":
    """The processor of the creature saved in `folder`, with its configuration, tokenizer and codec."""
    from codec_creature import load_codec
    from processing_creature import CreatureProcessor

    codec = saved_codec(folder)
    try:
        return CreatureProcessor.from_config(config, load_saved_tokenizer(folder), codec and load_codec(codec))
    except ValueError as error:
        raise UserError(first_line(error)) from error


def load_saved_tokenizer(folder: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer saved with a model, or with the run around a checkpoint, or GPT-2's where none was saved."""
    # AutoTokenizer reads the configuration too, and asks for trust_remote_code where its type is not registered.
    import modeling_creature  # noqa: F401
    from creature.data.text.tokenizer import load_tokenizer

    for place in (Path(folder), Path(folder).parent):
        if any((place / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            return load_tokenizer(str(place))
    return load_tokenizer()
