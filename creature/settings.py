"""Settings of a run: a YAML file with the sections model, data, round and training first, flags on top.

Reading them imports neither torch nor transformers, so that `--help` and a wrong flag answer at once: names, types and
help texts are read from the source of the dataclasses. HfArgumentParser would have to import them, which takes 25 times
as long, and it stops at the first wrong value (docs/decisions.md).
"""

import argparse
import ast
import contextlib
import difflib
import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from creature.errors import UserError, raise_all, require_unicode
from creature.files import user_path
from creature.limits import find_bad_values
from creature.rounds.arguments import RoundArguments
from creature.yaml_file import load_yaml, parse_yaml

PROJECT = Path(__file__).resolve().parent.parent
IN_WHEEL = Path(__file__).with_name("configs")  # setup.py puts them there
CONFIGS = IN_WHEEL if IN_WHEEL.is_dir() else PROJECT / "configs"
DEFAULT_CONFIG = CONFIGS / "text_only_config.yaml"
DEFAULT_FOLDER = "checkpoints/text_only"
DRY_RUN_FOLDER = "checkpoints/dry_run"
DRY_RUN_STEPS = 10
SECTIONS = ("model", "data", "round", "training")
# Fields of the training section that are paths, or may be: those of DataArguments expand themselves.
PATHS = ("output_dir", "resume_from_checkpoint", "fsdp_config", "accelerator_config")
RECORDINGS = "recordings.json"  # in every folder of recordings
BACKBONE_RATE = 0.03  # with it text loses 0.01 to 0.02 nats in a round, with 0.1 0.03 to 0.07 (docs/experiments.md)
MOST_PROBLEMS = 20  # reported at once; a file with more is no configuration

# Names of other libraries, where the nearest name here would be a wrong guess.
OTHER_NAMES = {
    "batch_size": "per_device_train_batch_size",
    "context_length": "max_position_embeddings",
    "d_model": "hidden_size",
    "dataset_name": "data",
    "dropout": "attention_dropout",
    "ffn_dim": "intermediate_size",
    "ffn_hidden_size": "intermediate_size",
    "lr": "learning_rate",
    "max_seq_len": "max_position_embeddings",
    "max_seq_length": "max_position_embeddings",
    "micro_batch_size": "per_device_train_batch_size",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_layers": "num_hidden_layers",
}

# Fields of the first models, where the nearest name here would be a wrong guess too.
REMOVED = ("use_value_embeddings", "per_layer_embedding_size")

# Fields of TrainingArguments that this job would ignore, or that would make its numbers wrong.
_NO_WRAPPER = "the job averages gradients itself, without DistributedDataParallel"
REFUSED = {
    "auto_find_batch_size": "it changes the batch in the middle of a run; give --per_device_train_batch_size",
    "batch_eval_metrics": "the evaluation is token-weighted over the whole validation split",
    "ddp_broadcast_buffers": _NO_WRAPPER,
    "ddp_bucket_cap_mb": _NO_WRAPPER,
    "ddp_find_unused_parameters": _NO_WRAPPER,
    "ddp_static_graph": _NO_WRAPPER,
    "deepspeed": "the job shards a model with FSDP 2 (configs/accelerate/fsdp2.yaml), not with DeepSpeed",
    "do_eval": "evaluation is set by --eval_strategy",
    "do_predict": "this job only trains",
    "do_train": "this job always trains",
    "enable_jit_checkpoint": "SIGTERM and Ctrl+C always save here",
    "ignore_data_skip": "a resumed run would see other batches than an unbroken one",
    "label_names": "the creature's labels are fixed by its streams",
    "label_smoothing_factor": "the creature computes its own losses, without smoothing",
    "liger_kernel_config": "Liger has no kernels for this model type",
    "local_rank": "the launcher sets it",
    "logging_nan_inf_filter": "a NaN loss is never hidden here: the run stops",
    "parallelism_config": "no flag can hold it, and the job uses DDP or FSDP 2 (configs/accelerate/)",
    "prediction_loss_only": "the evaluation always gives loss, perplexity, bits per byte and accuracy",
    "remove_unused_columns": "the collator decides what the model sees",
    "use_liger_kernel": "Liger has no kernels for this model type",
}


@dataclass(frozen=True)
class DataArguments:
    """What the creature learns from."""

    data: None | str | list[str] = field(  # in the order that HfArgumentParser can read
        default=None,
        metadata={
            "help": "Token file (.bin, .npy, .pt), Arrow folder, text file or folder, Hub dataset "
            "(owner/name:configuration:split), or folder of recordings; several make a mixture, with weights as in "
            "a.bin:0.7 b.bin:0.3. Without it a small sample is made under data/."
        },
    )
    text_column: str = field(default="text", metadata={"help": "Where records of text data have their text."})
    train_tokens: int | None = field(
        default=None,
        metadata={"help": "Take only the first so many training tokens of the data; a Hub dataset is read no further."},
    )
    tokenizer_name: str = field(
        default="gpt2",
        metadata={
            "help": "gpt2 (from the installed package, no network), a folder, or a Hub name. vocab_size and the "
            "special ids follow it."
        },
    )
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens in a training sample; max_position_embeddings by default."}
    )
    separate_documents: bool = field(
        default=False,
        metadata={
            "help": "Keep the documents of a block apart, in training and evaluation: no attention across a document "
            "end, and positions that restart."
        },
    )
    validation_fraction: float = field(
        default=0.005, metadata={"help": "Share of the documents held out where the data has no validation split."}
    )
    max_eval_blocks: int | None = field(
        default=None, metadata={"help": "Evaluate on the first so many validation blocks; on all of them by default."}
    )
    cache_dir: str = field(default="data", metadata={"help": "Where raw text is kept once it is tokenized."})
    sample_corpus_tokens: int = field(
        default=400_000, metadata={"help": "Size of the sample corpus that is made when no --data is given."}
    )
    clip_ticks: int = field(
        default=512, metadata={"help": "Ticks in a row of clips, and the longest clip; a tick is 80 ms."}
    )
    text_data: None | str | list[str] = field(
        default=None,
        metadata={"help": "Text that is trained beside recordings, named like --data, so that none is lost."},
    )
    text_share: float = field(default=0.5, metadata={"help": "Share of the rows that --text_data has."})
    codec: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the codec that turns the voice of recordings into codes (scripts/train_codec.py), or a "
            "Mimi's name on the Hub; that of --init_from by default."
        },
    )
    prompt: str = field(
        default="Once upon a time", metadata={"help": "What the samples of a run continue, in its log and its card."}
    )

    def __post_init__(self):
        for name in ("data", "text_data", "tokenizer_name", "cache_dir", "codec"):
            object.__setattr__(self, name, user_path(getattr(self, name)))


@dataclass(frozen=True)
class Settings:
    """What the user asked for, checked by name and type; `given` holds the fields that came as flags."""

    model: dict[str, Any] = field(default_factory=dict)
    data: DataArguments = DataArguments()
    round: RoundArguments = RoundArguments()
    training: dict[str, Any] = field(default_factory=dict)
    given: frozenset[str] = frozenset()
    config: str = ""
    dry_run: bool = False
    resume: str | bool = False
    overwrite_output_dir: bool = False
    accept_changes: bool = False

    @property
    def output_dir(self) -> str:
        """The folder of the run."""
        return self.training.get("output_dir") or DEFAULT_FOLDER

    @property
    def on_recordings(self) -> bool:
        """Whether this is a round on recordings, which are named by `data` or made up for `train_senses`."""
        found = [is_recordings(name) for name in self.data_names]
        if any(found) and not all(found):
            text = self.data_names[found.index(False)]
            raise UserError(f"{text} is no folder of recordings, and the rest of --data is: name text by --text_data")
        return any(found) or bool(self.round.train_senses and not found)

    @property
    def backbone_rate(self) -> float:
        """The rates of the backbone as a share of those of senses and streams."""
        if self.round.backbone_rate is not None:
            return self.round.backbone_rate
        return BACKBONE_RATE if self.on_recordings and self.round.init_from else 1.0

    @property
    def data_names(self) -> list[str]:
        """What `data` names, each perhaps with a weight."""
        names = self.data.data or []
        return [names] if isinstance(names, str) else [str(name) for name in names]

    @property
    def row_length(self) -> int | None:
        """Tokens or ticks of a row that is trained on; None for the model's whole context."""
        return getattr(self.data, self.row_name)

    @property
    def row_name(self) -> str:
        """The setting that is the length of a row."""
        return "clip_ticks" if self.on_recordings else "block_size"


def is_recordings(name: str) -> bool:
    """Whether a name in `data`, perhaps with a weight, is that of a folder of recordings."""
    return any(Path(path, RECORDINGS).is_file() for path in (name, re.sub(r":[\d.]+$", "", name)))


# ---------------------------------------------------------------------------------------------------------------------
# Which fields there are
# ---------------------------------------------------------------------------------------------------------------------

KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "dict": "a mapping",
    "none": "null",
}
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class FieldInfo:
    """A field of a dataclass as its source declares it; `kinds` are names of Python types, "none" and "other"."""

    name: str
    section: str
    kinds: frozenset[str]
    help: str
    default: str
    choices: tuple[str, ...] = ()

    @property
    def is_switch(self) -> bool:
        """Whether the flag needs no value."""
        return "bool" in self.kinds and not self.kinds & {"str", "int", "float"}

    def convert(self, value: Any) -> Any:
        """The value in the type of the field; text is read as what it stands for. Raises ValueError in words."""
        if isinstance(value, str):
            value = self._read_text(value)
        if isinstance(value, float) and value.is_integer() and "float" not in self.kinds:
            value = int(value)
        kind = "none" if value is None else type(value).__name__
        if kind == "int" and abs(value) >= 1 << 63:
            raise ValueError(f"{self.name} is a number of {value.bit_length()} bits, and no setting is that large")
        if self.choices and value is not None and value not in self.choices:
            raise ValueError(f"{self.name} must be one of {', '.join(self.choices)}, not {value!r}")
        if self.kinds & {kind, "other"} or (kind == "int" and "float" in self.kinds):
            return value
        wanted = self.kinds - {"int"} if "float" in self.kinds else self.kinds
        wanted = " or ".join(words for name, words in KINDS.items() if name in wanted)
        shown = {"dict": "a mapping", "list": "a list", "none": "null", "bool": str(value).lower()}
        raise ValueError(f"{self.name} must be {wanted}, not {shown.get(kind, repr(value))}")

    def _read_text(self, text: str) -> Any:
        """What a text stands for in this field; the text itself where it stands for nothing else."""
        word = text.lower()
        if "\0" in text:  # no path or name can hold one
            raise ValueError(f"{self.name} holds a NUL character")
        if self.name != "data":  # the names of files may be any bytes
            require_unicode(self.name, text)
        if "none" in self.kinds and word in ("none", "null", ""):
            return None
        if "bool" in self.kinds and word in BOOLEANS:
            return BOOLEANS[word]
        if self.kinds & {"int", "float"}:
            for number in (int, float):
                with contextlib.suppress(ValueError):
                    return number(text.replace(",", ""))
        elif "bool" in self.kinds and text in ("0", "1"):
            return text == "1"
        if self.kinds & {"list", "dict"} and text[:1] in ("[", "{"):
            with contextlib.suppress(yaml.YAMLError):
                value = parse_yaml(text)
                if type(value).__name__ in self.kinds:
                    return value
        return text.split() if self.kinds <= {"list", "none"} else text


def known_fields() -> dict[str, FieldInfo]:
    """Every field of the four sections by name; no name occurs in two sections."""
    transformers = Path(importlib.util.find_spec("transformers").origin).parent
    model = _read_fields(PROJECT / "configuration_creature.py", "CreatureConfig", "model")
    data = _read_fields(Path(__file__), "DataArguments", "data")
    round_ = _read_fields(Path(__file__).with_name("rounds") / "arguments.py", "RoundArguments", "round")
    training = _read_fields(transformers / "training_args.py", "TrainingArguments", "training")
    training |= _read_fields(Path(__file__).with_name("training_arguments.py"), "CreatureTrainingArguments", "training")
    training.pop("use_cache")  # the model's field of this name is the one that counts
    fields = model | data | round_ | training
    assert len(fields) == sum(map(len, (model, data, round_, training)))
    return fields


def _read_fields(path: Path, class_name: str, section: str) -> dict[str, FieldInfo]:
    """The annotated fields in the body of one class, in order, without importing the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    found = [_read_field(node, section) for node in body if isinstance(node, ast.AnnAssign)]
    return {info.name: info for info in found}


def _read_field(node: ast.AnnAssign, section: str) -> FieldInfo:
    annotation = re.sub(r"\[[^|]*\]", "", ast.unparse(node.annotation))  # list[str] -> list
    kinds = {part.strip().replace("None", "none") for part in annotation.split("|")}
    kinds = kinds & KINDS.keys() if kinds & KINDS.keys() - {"none"} else {"other"}  # enums are written as text
    default, known = node.value, {}
    if isinstance(node.value, ast.Call):
        options = {keyword.arg: keyword.value for keyword in node.value.keywords}
        default, metadata = options.get("default"), options.get("metadata")
        for key, value in zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ():
            with contextlib.suppress(ValueError):  # no constant
                known[key.value] = ast.literal_eval(value)
    default = ast.unparse(default) if default else ""
    choices = tuple(known.get("choices", ()))
    return FieldInfo(node.target.id, section, frozenset(kinds), known.get("help", ""), default, choices)


# ---------------------------------------------------------------------------------------------------------------------
# The YAML file
# ---------------------------------------------------------------------------------------------------------------------


def _suggest(name: str, candidates) -> str:
    if name in REMOVED:
        return ": the tables by token of the first models are gone, leave it out"
    close = [OTHER_NAMES[name]] if name in OTHER_NAMES else difflib.get_close_matches(name, list(candidates), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _read_config(path: str, fields: dict[str, FieldInfo]) -> tuple[dict[str, Any], list[str]]:
    """(the fields that a YAML file sets, converted; every problem with it)."""
    try:
        sections = load_yaml(path)
    except UserError as error:
        return {}, [str(error)]
    values, problems = {}, []
    for section, content in sections.items():
        if section not in SECTIONS:
            info = fields.get(section) if isinstance(section, str) else None
            hint = f": it belongs under {info.section}:" if info else _suggest(str(section), SECTIONS)
            problems.append(f"unknown section {section!r} in {path}{hint}")
            continue
        if content is not None and not isinstance(content, dict):
            problems.append(f"section {section}: in {path} must be a mapping of fields")
            continue
        for name, value in (content or {}).items():
            if len(problems) >= MOST_PROBLEMS:
                return values, problems
            info = fields.get(name) if isinstance(name, str) else None
            if info is None:
                names = [name for name, info in fields.items() if info.section == section]
                problems.append(f"unknown field {section}.{name}{_suggest(str(name), names)}")
            elif info.section != section:
                problems.append(f"field {section}.{name} belongs under {info.section}:")
            else:
                try:
                    values[name] = info.convert(value)
                except ValueError as error:
                    problems.append(f"{section}.{error}")
    return values, problems


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------

JOB_FLAGS: dict[str, dict[str, Any]] = {
    "config": {"help": f"YAML file with the sections {', '.join(SECTIONS)} (default: configs/{DEFAULT_CONFIG.name})"},
    "dry_run": {
        "action": "store_true",
        "help": f"{DRY_RUN_STEPS} steps with every check, in {DRY_RUN_FOLDER}; so is --max_steps {DRY_RUN_STEPS} or "
        "fewer without --output_dir",
    },
    "resume": {
        "nargs": "?",
        "const": True,
        "metavar": "CHECKPOINT",
        "help": "continue from the newest complete checkpoint of the run, or from the one named",
    },
    "overwrite_output_dir": {"action": "store_true", "help": "delete the run that the output folder holds"},
    "accept_changes": {"action": "store_true", "help": "resume although the data, the batch or the rates changed"},
}
# Flags of several scripts that read text.
CORPUS_FLAGS: dict[str, dict[str, Any]] = {
    "validation_fraction": {
        "type": float,
        "default": 0.005,
        "metavar": "F",
        "help": "share of the documents that goes to validation, chosen by a hash of each (default 0.005; 0: none)",
    },
    "text_column": {
        "default": "text",
        "metavar": "NAME",
        "help": "where records (jsonl, json, csv, parquet, Hub) have their text (default text)",
    },
}


def spellings(name: str) -> list[str]:
    """The ways of writing a flag: --text_column and --text-column."""
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


def build_parser(fields: dict[str, FieldInfo]) -> argparse.ArgumentParser:
    """The command line: the job's own flags, then every field of the four sections, as text."""
    parser = argparse.ArgumentParser(
        prog="run_clm_creature.py",
        usage="accelerate launch run_clm_creature.py [--config FILE] [--data DATA] [--dry_run] [--resume] [--FIELD X]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Train a MultiModalCreature, on text or on recordings. Settings come from --config; any field is "
        "also a flag, with dashes or underscores. See configs/, docs/text_only_training.md and docs/rounds.md.",
    )
    job = parser.add_argument_group("job")
    for name, options in JOB_FLAGS.items():
        job.add_argument(*spellings(name), **options)
    groups = {section: parser.add_argument_group(f"{section} (the {section}: section)") for section in SECTIONS}
    for name, info in fields.items():
        # Of our own fields all of it; of those of transformers, some of which have a page, the first sentence.
        sentence = info.help if info.section in ("data", "round") else re.split(r"(?<=\.)\s", info.help)[0]
        shown = f" (default: {info.default})".replace("%", "%%") if info.default not in ("", "None") else ""
        help_text = argparse.SUPPRESS if name in REFUSED else (sentence + shown).strip() or None
        extra = {"nargs": "+"} if "list" in info.kinds else {"nargs": "?", "const": "true"} if info.is_switch else {}
        metavar = next(
            (kind.upper() for kind in ("dict", "list", "float", "int", "bool") if kind in info.kinds), "TEXT"
        )
        groups[info.section].add_argument(*spellings(name), dest=name, metavar=metavar, help=help_text, **extra)
        if info.is_switch:
            groups[info.section].add_argument(
                *spellings(f"no_{name}"), dest=name, action="store_const", const="false", help=argparse.SUPPRESS
            )
    return parser


def _read_flags(argv: list[str] | None, fields: dict[str, FieldInfo]) -> tuple[dict, dict, list[str]]:
    """(the job's own flags, the fields that flags set, every problem); a misuse of argparse exits with 2."""
    parser = build_parser(fields)
    known, unknown = parser.parse_known_args(argv)
    names = {option[2:].replace("-", "_") for action in parser._actions for option in action.option_strings}
    problems = []
    for flag in [text.split("=")[0] for text in unknown if text.startswith("--")]:
        problems.append(f"unknown flag {flag}{_suggest(flag[2:].replace('-', '_'), names)}")
    if unknown and not problems:
        problems.append(f"{unknown[0]!r} follows no flag: data is named by --data, a configuration by --config")
    job, values = {}, {}
    for name, value in vars(known).items():
        if name not in fields:
            job[name] = value
            continue
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        try:
            values[name] = fields[name].convert(value)
        except ValueError as error:
            problems.append(f"--{error}")
    return job, values, problems


# ---------------------------------------------------------------------------------------------------------------------
# Both together
# ---------------------------------------------------------------------------------------------------------------------


def parse_settings(argv: list[str] | None = None) -> Settings:
    """
    Read the YAML file and the flags on top of it.

    Raises UserError with every problem of the file and of the flags at once, each with the nearest known name.
    """
    fields = known_fields()
    job, flags, flag_problems = _read_flags(argv, fields)
    job |= {name: user_path(job[name]) for name in ("config", "resume") if name in job}
    path = job.get("config", str(DEFAULT_CONFIG))
    if not Path(path).exists() and (CONFIGS.parent / path).is_file():
        path = str(CONFIGS.parent / path)  # configs/small_config.yaml, from a folder that has no configs/
    values, problems = _read_config(path, fields)
    problems += flag_problems
    problems += [f"{name} has no place here: {REFUSED[name]}" for name in REFUSED if name in values | flags]
    if "num_train_epochs" in flags and "max_steps" not in flags:
        values.pop("max_steps", None)  # the flag says how long to train, so the file's number of steps does not count
    values |= flags
    values |= {name: user_path(values[name]) for name in PATHS if name in values}
    mappings = {name for name, info in fields.items() if "dict" in info.kinds and name not in REFUSED}
    problems += find_bad_values(values, mappings)
    if len(problems) == 1 and problems[0].startswith("unknown"):
        problems[0] += "; --help lists every field"
    raise_all(problems)
    model, data, round_, training = (
        {name: value for name, value in values.items() if fields[name].section == section} for section in SECTIONS
    )
    resume = job.get("resume") or training.pop("resume_from_checkpoint", None) or False
    dry_run = job.get("dry_run", False)
    if dry_run or (0 < training.get("max_steps", -1) <= DRY_RUN_STEPS and not resume and "output_dir" not in flags):
        dry_run, training = True, _dry_run_training(training, resume, set(flags))
    job |= {"config": path, "resume": resume, "dry_run": dry_run}
    return Settings(model, DataArguments(**data), RoundArguments(**round_), training, frozenset(flags), **job)


def _dry_run_training(training: dict[str, Any], resume: str | bool, given: set[str]) -> dict[str, Any]:
    """The training section of a dry run: at most ten steps, in a folder of its own unless a flag names one."""
    if resume:
        raise UserError("a dry run starts afresh each time: leave out --resume, or --dry_run to resume the real run")
    changes = {} if "output_dir" in given else {"output_dir": DRY_RUN_FOLDER}
    if not 0 < training.get("max_steps", -1) <= DRY_RUN_STEPS:
        if "max_steps" in given:
            raise UserError(f"a dry run has {DRY_RUN_STEPS} steps: leave out --max_steps, or --dry_run")
        changes["max_steps"] = DRY_RUN_STEPS
        training = {name: value for name, value in training.items() if name != "num_train_epochs"}
    return training | changes
