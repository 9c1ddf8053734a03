"""A round: the creature that it starts from, the organs that its recordings need, and what of it is trained."""

import copy
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging as transformers_logging

from codec_creature import CreatureCodec, CreatureCodecConfig, check_codec, codec_organs, load_codec
from configuration_creature import SENSES, STREAMS, CreatureConfig
from creature.data.mixture import parse_parts
from creature.data.recordings.clips import NO_CODEC, fed_by, has_column, organs_of, widen_limits
from creature.data.recordings.made_up import write_made_up_recordings
from creature.data.recordings.schema import load_recordings
from creature.errors import UserError, first_line
from creature.files import one_at_a_time
from creature.loading import check_weights, codec_hash, find_model, load_config, saved_codec
from creature.resume import ResumedRun
from creature.settings import Settings
from modeling_creature import MultiModalCreature
from senses_creature import SENSE_TABLE

# What the body of a creature is made of; it follows the recordings as one, because it is felt and moved as one.
BODY = (
    "num_joints", "body_state_size", "body_state_mean", "body_state_std", "body_state_names", "action_size",
    "action_mean", "action_std", "action_names", "num_blend_shapes",
)  # fmt: skip
VOICE = ("num_audio_codebooks", "audio_codebook_size")
BODY_SENSES = {"proprioception", "own_command", "own_action"}
NO_FIELDS = ("architectures", "auto_map", "dtype", "model_type", "transformers_version")  # of config.json
# By a sense that is trained, the recordings that are made up where none are named.
MADE_UP = {"audio": "hear", "vision": "see", "touch": "touch", "proprioception": "move"}


@dataclass(frozen=True)
class Trained:
    """Which parts of the creature a run trains: `senses` out of `SENSES`, `streams` out of `STREAMS`, and the rest."""

    senses: tuple[str, ...]
    streams: tuple[str, ...]
    backbone: bool = True


TEXT_ALONE = Trained(("internal_voice",), ("internal_text",))


def find_recordings(settings: Settings) -> list[tuple[str, Fraction | None]]:
    """The folders of recordings that `data` names, each with its share; without any, one that is made up here."""
    if settings.data_names:
        names, shares = parse_parts(settings.data_names)
        return list(zip(names, shares or [None] * len(names), strict=True))
    senses = settings.round.train_senses
    kinds = [kind for sense, kind in MADE_UP.items() if sense in senses]
    kind = "whole" if len(kinds) > 1 else next(iter(kinds), None)
    if kind == "hear" and "audio" in (settings.round.train_streams or ()):
        kind = "speak"
    if kind is None:
        raise UserError(f"no recordings are made up for {', '.join(senses)}: name a folder of recordings with --data")
    folder = Path(settings.data.cache_dir, f"made_up_{kind}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder.parent):
        if not folder.is_dir():
            write_made_up_recordings(folder, kind)
    return [(str(folder), None)]


def round_config(
    settings: Settings, recordings: list[tuple[str, Fraction | None]], fallback: dict, resumed: ResumedRun | None
) -> tuple[CreatureConfig, Trained]:
    """
    (the configuration of a round on recordings, what of the creature it trains).

    It is that of the run that is resumed, that of `init_from`, or without either that of the model section. An organ
    that was never trained follows the recordings: number of cameras, joints, measured and commanded numbers with their
    statistics; the books of the voice follow the codec. The model section comes last; whether it fits the weights is
    known when they are read (`start_model`).

    Args:
        recordings: see `find_recordings`. fallback: fields that the tokenizer decides, where nothing is there to begin
            with.

    Raises UserError for a folder that holds no creature, values that cannot be, names of senses and streams that do not
    exist, and those that the recordings do not feed.
    """
    found, organs = dict(fallback), {}
    opened = [load_recordings(folder) for folder, _ in recordings]
    for splits, facts in reversed(opened):
        own = organs_of(splits, facts)
        if own.get("num_joints") and organs.get("num_joints"):
            own |= widen_limits(own, organs)
        organs |= own
    codec = find_codec(settings)
    if codec is not None:
        organs |= codec_organs(codec)
        if settings.data.codec and not any(has_column(splits, "voice") for splits, _ in opened):
            raise UserError(f"--codec {settings.data.codec} is for a voice, and no recording has one: leave it out")
    if resumed:
        found, organs = dict(resumed.must_match["model"]), {}
    elif settings.round.init_from:
        folder = find_model(settings.round.init_from)
        found, trained = load_config(folder).to_dict(), trained_senses(folder)
        kept = {*(BODY if trained & BODY_SENSES else ()), *(("num_cameras",) if "vision" in trained else ())}
        kept |= set(VOICE if "own_voice" in trained else ())
        if "num_joints" in kept and organs.get("num_joints"):
            organs |= widen_limits(organs, found)
        organs = {name: value for name, value in organs.items() if name not in kept}
    values = {name: value for name, value in found.items() if name not in NO_FIELDS} | organs | settings.model
    config = make_config(values)
    if codec is not None and config.num_audio_codebooks:
        _explain(check_codec, codec, config.num_audio_codebooks, config.audio_codebook_size)
    fed = [fed_by(splits, config, codec is not None) for splits, _ in opened]
    senses, streams = (list(dict.fromkeys(name for one in fed for name in one[kind])) for kind in (0, 1))
    lacks_codec = codec is None and any(has_column(splits, "voice") for splits, _ in opened)
    trained = Trained(*_find_trained(settings, senses, streams, lacks_codec), settings.round.train_backbone)
    config = make_config(values | {"loss_weights": _loss_weights(settings, trained)})
    if settings.data.clip_ticks > config.max_position_embeddings:
        raise UserError(
            f"clip_ticks {settings.data.clip_ticks} is longer than the creature's context of "
            f"{config.max_position_embeddings} ticks: lower it"
        )
    return config, trained


def find_codec(settings: Settings) -> PreTrainedModel | None:
    """
    The codec that `codec` names, or that of the creature that the run begins with; None without either, but of
    recordings that are made up an untrained one, where a voice is trained.

    Raises UserError for one that cannot be loaded, or is not that with which the creature has learned to speak.
    """
    transformers_logging.disable_progress_bar()  # of reading it
    named, start = settings.data.codec, settings.round.init_from
    own = saved_codec(find_model(start)) if start else None
    if named is None and not own and not settings.data_names and "audio" in (settings.round.train_streams or ()):
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            return CreatureCodec(CreatureCodecConfig()).eval()
    if named is None or (own and Path(named).is_dir() and own.samefile(named)):
        return _explain(load_codec, own) if own else None
    codec = _explain(load_codec, named)
    if own and "own_voice" in trained_senses(find_model(start)):
        if codec_hash(codec) != codec_hash(_explain(load_codec, own)):
            raise UserError(f"{start} has learned to speak with another codec than {named}: leave out --codec")
    return codec


def _explain(function, *arguments):
    """What a function of the model files returns; its ValueError is a UserError here."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise UserError(first_line(error)) from error


def make_config(values: dict) -> CreatureConfig:
    """The configuration with these values; UserError with every problem of them."""
    try:
        return CreatureConfig(**values)
    except (ValueError, TypeError) as error:
        text = " ".join(str(error.__cause__ or error).split()).removeprefix("CreatureConfig: ")
        raise UserError(f"the model section is not valid: {text}") from error


def _loss_weights(settings: Settings, trained: Trained) -> dict[str, float]:
    """`loss_weights` of the settings, or 1 for each of the streams that are trained."""
    weights = settings.model.get("loss_weights")
    if weights is None:
        return dict.fromkeys(trained.streams, 1.0)
    weighed = {name for name, weight in weights.items() if weight}
    if weighed != set(trained.streams):
        raise UserError(
            f"loss_weights weighs {', '.join(sorted(weighed))}, and the round trains {', '.join(trained.streams)}: "
            "leave loss_weights out, or give train_streams"
        )
    return weights


def trained_senses(folder: Path) -> set[str]:
    """The senses and efference copies of a saved creature that were ever trained: their last matrix is not zero."""
    check_weights(folder)
    keys = {f"model.senses.{sense.name}.proj.weight": sense.name for sense in SENSE_TABLE}
    trained = set()
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                trained |= {keys[key] for key in file.keys() if key in keys and file.get_tensor(key).any()}
    except Exception as error:  # of the library that reads them
        raise UserError(f"the weights in {folder} cannot be read ({first_line(error)}): use another folder") from error
    return trained


def start_model(config: CreatureConfig, start: str | None, seed: int) -> tuple[MultiModalCreature, list[str]]:
    """
    (a creature of this configuration with the weights of the folder `start`, notes on what was taken and what is new);
    without `start`, a fresh one.

    Parts that `start` lacks, or has for another organ that was never trained, begin fresh.

    Raises UserError where the backbone differs, or an organ that was trained.
    """
    set_seed(seed)
    if start is None:
        return MultiModalCreature(config), []
    folder = find_model(start)
    check_weights(folder)
    try:
        model, info = MultiModalCreature.from_pretrained(
            folder,
            config=copy.deepcopy(config),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            dtype=torch.float32,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the model in {folder} cannot be loaded ({first_line(error)}): use another folder") from error
    resized = [name[0] if isinstance(name, tuple) else name for name in info["mismatched_keys"]]
    fresh = sorted({*info["missing_keys"], *resized})
    sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    trained = trained_senses(folder)
    for name in fresh:
        place = name.split(".")
        if place[:2] != ["model", "senses"] and place[0] != "streams":
            raise UserError(
                f"the model section does not fit {folder} ({name} would have the shape {list(sizes.get(name, ()))}): "
                "leave out what says how large the backbone is"
            )
        if place[:2] == ["model", "senses"] and place[2] in trained:
            raise UserError(
                f"{folder} has learned {place[2]} with another organ, or in an earlier version ({name} would have the "
                f"shape {list(sizes[name])}): take recordings of the same organ, leave its size out of the model "
                "section, or start from another creature"
            )
    notes = [f"starts from {folder}" + (f", which has learned {', '.join(sorted(trained))}" if trained else "")]
    parts = sorted({".".join(name.split(".")[: 3 if name.startswith("model") else 2]) for name in fresh})
    if parts:
        names = ", ".join(part.removeprefix("model.").replace("senses.", "").replace("streams.", "") for part in parts)
        notes.append(f"new in this round: {names}")
    return model, notes


@torch.no_grad()
def reset_unused_rows(model: MultiModalCreature, known: int) -> int:
    """
    Set the rows of the token table that training on text has only pushed down to the mean of the rows it used, and
    return how many they are; `known`: the ids of the tokenizer, those above are spare.

    Softmax pushes all rows that are never a target in the same direction, far enough that the first NULL of a round
    costs more than 10 nats. Spare rows are never used; NULL and padding are unused as long as they lie among them.
    """
    table, config = model.model.embed_tokens.weight, model.config
    special = {config.null_token_id, config.pad_token_id} - {None}
    spare = [row for row in range(known, config.vocab_size) if row not in special]
    if len(spare) < 2:
        return 0
    centre = table[spare].mean(dim=0)
    farthest = (table[spare] - centre).norm(dim=1).max()
    unused = spare + [row for row in special if (table[row] - centre).norm() <= 2 * farthest]
    used = torch.ones(len(table), dtype=torch.bool)
    used[unused] = False
    mean = table[used].mean(dim=0)
    if (centre - mean).norm() <= farthest:  # a fresh model, or rows that were reset before
        return 0
    table[unused] = mean
    if model.lm_head.weight is not table:
        model.lm_head.weight[unused] = model.lm_head.weight[used].mean(dim=0)
    return len(unused)


def _find_trained(
    settings: Settings, fed_senses: list[str], fed_streams: list[str], lacks_codec: bool
) -> list[tuple[str, ...]]:
    """
    [the senses, the streams] that a round trains: those that the settings name, or all that the recordings feed.

    Text beside the recordings always trains the internal voice and text. lacks_codec: whether the recordings have a
    voice that nothing turns into codes.
    """
    chosen = []
    texts = {"internal_voice", "internal_text"} if settings.data.text_data else set()
    for kind, asked, fed, known in (
        ("senses", settings.round.train_senses, fed_senses, SENSES),
        ("streams", settings.round.train_streams, fed_streams, STREAMS),
    ):
        fed = [name for name in known if name in fed or name in texts]
        asked = fed if asked is None else [*asked, *texts.intersection(known)]
        for name in asked:
            if name not in known:
                raise UserError(f"train_{kind} names {name!r}: the {kind} are {', '.join(known)}")
            if name == "audio" and kind == "streams" and name not in fed and lacks_codec:
                raise UserError(f"train_streams names audio, and of the voice in the recordings {NO_CODEC}")
            if name not in fed:
                raise UserError(
                    f"train_{kind} names {name}, and the recordings feed only {', '.join(fed) or 'none'}: leave it "
                    "out, or add recordings that have it"
                )
        chosen.append(tuple(name for name in known if name in asked))
    if not chosen[1]:
        raise UserError("the recordings hold nothing that a stream could learn from: no words, no commands")
    return chosen
