"""Settings of a run: a YAML file with the sections model, data and training first, flags on top.

Reading them imports neither torch nor transformers, so that `--help` and a wrong flag answer at once: which fields
there are, and of which type, is read from the source of the dataclasses (`CreatureConfig`, `DataArguments` and
`CreatureTrainingArguments`) without running it. The dataclasses themselves are built afterwards, by HfArgumentParser.
"""

import argparse
import ast
import difflib
import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from creature.errors import UserError, first_line

PROJECT = Path(__file__).resolve().parent.parent
IN_WHEEL = Path(__file__).with_name("configs")  # setup.py puts them there
CONFIGS = IN_WHEEL if IN_WHEEL.is_dir() else PROJECT / "configs"
DEFAULT_CONFIG = CONFIGS / "text_only_config.yaml"
DRY_RUN_FOLDER = "checkpoints/dry_run"
DRY_RUN_STEPS = 10
SECTIONS = ("model", "data", "training")
LARGEST_CONFIG = 1 << 20  # bytes
LARGEST_BATCH = 1 << 40  # tokens a step
MOST_PROBLEMS = 20  # told at once; a file with more is no configuration

# What people write who come from other libraries, and what it is called here.
OTHER_NAMES = {
    "batch_size": "per_device_train_batch_size",
    "block": "block_size",
    "context_length": "max_position_embeddings",
    "d_model": "hidden_size",
    "dataset": "data",
    "dataset_config_name": "data",
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
    "steps": "max_steps",
    "tokenizer": "tokenizer_name",
    "train_steps": "max_steps",
    "warmup_ratio": "warmup_steps",
}

# Fields that TrainingArguments has and that this job would ignore or that would make its numbers wrong.
REFUSED = {
    "auto_find_batch_size": "it changes the batch in the middle of a run; give --per_device_train_batch_size",
    "batch_eval_metrics": "the evaluation is token-weighted over the whole validation split",
    "compute_metrics": "the evaluation is token-weighted over the whole validation split",
    "do_eval": "evaluation is set by --eval_strategy",
    "do_predict": "this job only trains",
    "do_train": "this job always trains",
    "ignore_data_skip": "a resumed run would see other batches than an unbroken one",
    "label_names": "the creature's labels are fixed by its streams",
    "label_smoothing_factor": "the creature computes its own losses, without smoothing",
    "liger_kernel_config": "Liger has no kernels for this model type",
    "local_rank": "the launcher sets it",
    "logging_nan_inf_filter": "a NaN loss is never hidden here: the run stops",
    "enable_jit_checkpoint": "SIGTERM and Ctrl+C always save here",
    "prediction_loss_only": "the evaluation always gives loss, perplexity, bits per byte and accuracy",
    "remove_unused_columns": "the collator decides what the model sees",
    "use_liger_kernel": "Liger has no kernels for this model type",
}


@dataclass
class DataArguments:
    """What the creature learns from."""

    data: None | str | list[str] = field(  # in the order that HfArgumentParser can read
        default=None,
        metadata={
            "help": "Token file (.bin, .npy, .pt), Arrow folder, text file or folder, or Hub dataset "
            "(owner/name:configuration:split); several make a mixture, with weights as in a.bin:0.7 b.bin:0.3. Without "
            "it a small sample corpus is made under data/."
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
    prompt: str = field(
        default="Once upon a time", metadata={"help": "What the samples of a run continue, in its log and its card."}
    )


@dataclass
class Settings:
    """Everything the user asked for, checked by name and type; `given` holds the fields that came as flags."""

    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    given: set[str] = field(default_factory=set)
    config: str = ""
    dry_run: bool = False
    resume: str | bool = False
    overwrite_output_dir: bool = False
    accept_changes: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# Which fields there are
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class FieldInfo:
    """One field of a dataclass as its source declares it: its section, the kinds of value it takes, its help text."""

    name: str
    section: str
    kinds: frozenset[str]
    help: str
    default: str

    def convert(self, value: Any) -> Any:
        """The value in the type of the field; a value from a flag is text. Raises ValueError in words."""
        if isinstance(value, str):
            if "\0" in value:  # no path or name can hold one
                raise ValueError(f"{self.name} holds a NUL character")
            value = self._from_text(value)
            if type(value) is not int:
                return value
        if type(value) is int and abs(value) >= 1 << 63:
            raise ValueError(f"{self.name} is a number of {value.bit_length()} bits, and no setting is that large")
        if isinstance(value, bool):
            accepted = "bool" in self.kinds
        elif isinstance(value, int):
            accepted = self.kinds & {"int", "float"}
        elif isinstance(value, float):
            accepted = "float" in self.kinds or ("int" in self.kinds and value.is_integer())
            if accepted and "float" not in self.kinds:
                value = int(value)
        else:
            accepted = ("none" if value is None else type(value).__name__) in self.kinds
        if not accepted and "other" not in self.kinds:
            raise ValueError(f"{self.name} must be {self.describe()}, not {_yaml_name(value)}")
        return value

    def _from_text(self, text: str) -> Any:
        if "none" in self.kinds and text.lower() in ("none", "null", ""):
            return None
        if "bool" in self.kinds and text.lower() in ("true", "yes", "on", "false", "no", "off"):
            return text.lower() in ("true", "yes", "on")
        for kind, parse in (("int", int), ("float", float)):
            if kind in self.kinds or (kind == "int" and "float" in self.kinds):
                try:
                    return parse(text.replace("_", "").replace(",", "")) if kind == "int" else parse(text)
                except ValueError:
                    pass
        if "bool" in self.kinds and text in ("0", "1"):
            return text == "1"
        if self.kinds & {"list", "dict"} and text[:1] in ("[", "{"):
            try:
                value = parse_yaml(text)
            except yaml.YAMLError:
                value = text
            if type(value).__name__ in self.kinds:
                return value
        if self.kinds & {"str", "other"}:
            return text
        if self.kinds <= {"list", "none"}:
            return text.split()
        raise ValueError(f"{self.name} must be {self.describe()}, not {text!r}")

    def describe(self) -> str:
        names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
        names |= {"list": "a list", "dict": "a mapping", "none": "null"}
        kinds = [kind for kind in names if kind in self.kinds and not (kind == "int" and "float" in self.kinds)]
        return " or ".join(names[kind] for kind in kinds)


def _yaml_name(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _read_fields(path: Path, class_name: str, section: str) -> dict[str, FieldInfo]:
    """The annotated fields in the body of one class, in order, without importing the file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            found = [_read_field(item, section) for item in node.body if isinstance(item, ast.AnnAssign)]
            return {info.name: info for info in found}
    raise AssertionError(f"{class_name} is not in {path}")


def _read_field(node: ast.AnnAssign, section: str) -> FieldInfo:
    known = {"int", "float", "bool", "str", "list", "dict", "None"}
    annotation = re.sub(r"\[[^|]*\]", "", ast.unparse(node.annotation))  # list[str] -> list
    kinds = {part.strip() for part in annotation.split("|")}
    if kinds & known - {"None"}:
        kinds &= known  # enums of transformers are spelled as text
    else:
        kinds = {"other"}
    help_text, default = "", node.value
    if isinstance(node.value, ast.Call):
        default = None
        for keyword in node.value.keywords:
            if keyword.arg == "default":
                default = keyword.value
            elif keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
                for key, value in zip(keyword.value.keys, keyword.value.values, strict=True):
                    if ast.literal_eval(key) == "help" and isinstance(value, ast.Constant):
                        help_text = value.value
    kinds = frozenset("none" if kind == "None" else kind for kind in kinds)
    return FieldInfo(node.target.id, section, kinds, help_text, ast.unparse(default) if default else "")


def known_fields() -> dict[str, FieldInfo]:
    """Every field of the three sections by name; no name occurs in two sections."""
    transformers = Path(importlib.util.find_spec("transformers").origin).parent
    model = _read_fields(PROJECT / "configuration_creature.py", "CreatureConfig", "model")
    data = _read_fields(Path(__file__), "DataArguments", "data")
    training = _read_fields(transformers / "training_args.py", "TrainingArguments", "training")
    training |= _read_fields(Path(__file__).with_name("training_arguments.py"), "CreatureTrainingArguments", "training")
    training.pop("use_cache")  # the model's field of this name is the one that counts
    assert not (model.keys() & data.keys() | model.keys() & training.keys() | data.keys() & training.keys())
    return model | data | training


# ---------------------------------------------------------------------------------------------------------------------
# YAML and flags
# ---------------------------------------------------------------------------------------------------------------------


class _UniqueKeyLoader(yaml.SafeLoader):
    """
    A safe YAML loader that refuses a key written twice (the first value would be lost in silence) and aliases, by which
    a few lines stand for more than any memory holds.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"write out what *{event.anchor} means", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict | set):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} occurs twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """What a YAML text says, in plain Python types; YAMLError where it is not valid."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deep") from None
    except ValueError as error:
        raise yaml.YAMLError(first_line(error)) from error
    except (TypeError, LookupError, AttributeError) as error:  # so fail the readers of tags: `!!int ''`, `!!bool maybe`
        raise yaml.YAMLError("a value is not what its tag says") from error


def load_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file; UserError where the file is missing, is not text or is not a mapping."""
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_CONFIG + 1)
        if len(data) > LARGEST_CONFIG:
            raise UserError(f"{path} has more than {LARGEST_CONFIG >> 20} MiB: --config takes a YAML file of settings")
        content = parse_yaml(data.decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no configuration file {path}: the project's configs/ has examples") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: --config takes a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: save the configuration as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{path}{where} is not valid YAML ({problem}): correct it there") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a mapping with the sections {', '.join(SECTIONS)}")
    return content


def _suggest(name: str, candidates) -> str:
    if name in OTHER_NAMES:
        return f" (did you mean {OTHER_NAMES[name]}?)"
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def _read_config(path: str | Path, fields: dict[str, FieldInfo], problems: list[str]) -> dict[str, Any]:
    """The fields set in a YAML file, converted; every problem is added to `problems`."""
    values = {}
    for section, content in load_yaml(path).items():
        if section not in SECTIONS:
            home = fields[section].section if section in fields else None
            hint = f": it belongs under {home}:" if home else _suggest(str(section), SECTIONS)
            problems.append(f"unknown section {section!r} in {path}{hint}")
            continue
        if content is not None and not isinstance(content, dict):
            problems.append(f"section {section}: in {path} must be a mapping of fields")
            continue
        own = [name for name, info in fields.items() if info.section == section]
        for name, value in (content or {}).items():
            if len(problems) >= MOST_PROBLEMS:
                return values
            info = fields.get(name) if isinstance(name, str) else None
            if info is None:
                problems.append(f"unknown field {section}.{name}{_suggest(str(name), own)}")
            elif info.section != section:
                problems.append(f"field {section}.{name} belongs under {info.section}:")
            else:
                try:
                    values[name] = info.convert(value)
                except ValueError as error:
                    problems.append(f"{section}.{error}")
    return values


def build_parser(fields: dict[str, FieldInfo]) -> argparse.ArgumentParser:
    """The command line: the job's own flags, then every field of the three sections, as text."""
    parser = argparse.ArgumentParser(
        prog="run_clm_creature.py",
        usage="accelerate launch run_clm_creature.py [--config FILE] [--data DATA] [--dry_run] [--resume] [--FIELD X]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Train a MultiModalCreature on text. Settings come from --config; any field is also a flag, with "
        "dashes or underscores.",
        epilog="Launch with `accelerate launch run_clm_creature.py`; see configs/ and docs/text_only_training.md.",
    )
    job = parser.add_argument_group("job")
    job.add_argument("--config", help="YAML file with the sections model, data, training (default: configs/"
                     f"{DEFAULT_CONFIG.name})")  # fmt: skip
    job.add_argument("--dry_run", "--dry-run", action="store_true",
                     help=f"{DRY_RUN_STEPS} steps with every check, in {DRY_RUN_FOLDER}; so does --max_steps "
                     f"{DRY_RUN_STEPS} or fewer without --output_dir")  # fmt: skip
    job.add_argument("--resume", nargs="?", const=True, metavar="CHECKPOINT",
                     help="continue from the newest complete checkpoint of the run, or from the one named")  # fmt: skip
    job.add_argument("--overwrite_output_dir", "--overwrite-output-dir", action="store_true",
                     help="delete the run that the output folder holds")  # fmt: skip
    job.add_argument("--accept_changes", "--accept-changes", action="store_true",
                     help="resume although the data, the batch or the model's settings changed")  # fmt: skip
    groups = {section: parser.add_argument_group(f"{section} (the {section}: section)") for section in SECTIONS}
    for name, info in fields.items():
        options = spellings(name)
        sentence = re.split(r"(?<=\.)\s", info.help)[0]
        shown = f" (default: {info.default})" if info.default not in ("", "None") else ""
        help_text = (sentence + shown.replace("%", "%%")).strip() or None
        extra = {"nargs": "+"} if info.kinds & {"list"} else {"nargs": "?", "const": "true"} if _is_switch(info) else {}
        if name in REFUSED:
            help_text = argparse.SUPPRESS
        groups[info.section].add_argument(*options, dest=name, metavar=_metavar(info), help=help_text, **extra)
        if _is_switch(info):
            off = [f"--no_{name}", f"--no-{name.replace('_', '-')}"]
            groups[info.section].add_argument(
                *off, dest=name, action="store_const", const="false", help=argparse.SUPPRESS
            )
    return parser


# What several scripts that read text ask for.
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
    return [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])


def _is_switch(info: FieldInfo) -> bool:
    return "bool" in info.kinds and not info.kinds & {"str", "int", "float"}


def _metavar(info: FieldInfo) -> str:
    for kind, name in (("dict", "JSON"), ("list", "TEXT"), ("float", "NUMBER"), ("int", "INT"), ("bool", "BOOL")):
        if kind in info.kinds:
            return name
    return "TEXT"


def _read_flags(argv: list[str] | None, fields: dict[str, FieldInfo], problems: list[str]) -> tuple[dict, dict]:
    """(the job's own flags, the fields set as flags); problems are collected, a misuse of argparse exits with 2."""
    parser = build_parser(fields)
    known, unknown = parser.parse_known_args(argv)
    flags = vars(known)
    options = [option for action in parser._actions for option in action.option_strings]
    for text in unknown:
        if text.startswith("--"):
            name = text.split("=")[0][2:].replace("-", "_")
            hint = _suggest(name, {option[2:].replace("-", "_") for option in options})
            problems.append(f"unknown flag {text.split('=')[0]}{hint}")
    if unknown and not any(text.startswith("--") for text in unknown):
        problems.append(f"{unknown[0]!r} follows no flag: data is named by --data, a configuration by --config")
    job = {name: flags.pop(name) for name in list(flags) if name not in fields}
    values = {}
    for name, text in flags.items():
        try:
            if isinstance(text, list):  # several words of a list field
                text = text[0] if len(text) == 1 else text
            values[name] = fields[name].convert(text)
        except ValueError as error:
            problems.append(f"--{error}")
    return job, values


def parse_settings(argv: list[str] | None = None) -> Settings:
    """
    Read the YAML file and the flags on top of it.

    Raises UserError with every problem of the file and of the flags at once, each with the nearest known name.
    """
    fields = known_fields()
    problems: list[str] = []
    job, flags = _read_flags(argv, fields, problems)
    path = job.get("config", str(DEFAULT_CONFIG))
    if not Path(path).exists() and (CONFIGS.parent / path).is_file():
        path = str(CONFIGS.parent / path)  # configs/small_config.yaml, from a folder that has no configs/
    try:
        values = _read_config(path, fields, problems)
    except UserError as error:
        values = {}
        problems.append(str(error))
    for name in (values | flags).keys() & REFUSED.keys():
        problems.append(f"{name} has no place here: {REFUSED[name]}")
    if "num_train_epochs" in flags and "max_steps" not in flags:
        values.pop("max_steps", None)  # the flag says how long to train, so the file's number of steps does not count
    values |= flags
    _check_values(values, problems)
    if problems:
        raise UserError(_all_at_once(problems))
    sections = {section: {n: v for n, v in values.items() if fields[n].section == section} for section in SECTIONS}
    settings = Settings(**sections, given=set(flags), **(job | {"config": path}))
    _settle_run(settings)
    return settings


def _check_values(values: dict[str, Any], problems: list[str]) -> None:
    """Ranges that need no library to check."""
    for name in ("tokens_per_step", "per_device_train_batch_size", "gradient_accumulation_steps", "block_size",
                 "sample_corpus_tokens", "train_tokens", "max_eval_blocks", "save_steps", "logging_steps",
                 "eval_steps"):  # fmt: skip
        value = values.get(name)
        if value is not None and not isinstance(value, str) and not 0 < value < float("inf"):
            problems.append(f"{name} must be greater than 0, not {value}")
    if values.get("tokens_per_step", 0) > LARGEST_BATCH:
        problems.append(f"tokens_per_step must be at most {LARGEST_BATCH:,}, not {values['tokens_per_step']}")
    for name in ("learning_rate", "warmup_steps", "batch_warmup_steps", "decay_steps", "weight_decay", "max_grad_norm",
                 "sample_steps"):  # fmt: skip
        value = values.get(name)
        if value is not None and not isinstance(value, str) and not 0 <= value < float("inf"):
            problems.append(f"{name} must be 0 or more, not {value}")
    fraction = values.get("validation_fraction", 0)
    if not 0 <= fraction < 1:
        problems.append(f"validation_fraction must be at least 0 and below 1, not {fraction}")
    if "max_steps" in values and "num_train_epochs" in values and values["max_steps"] > 0:
        problems.append("max_steps and num_train_epochs both say how long to train: give one of them")
    if values.get("max_steps", 1) == 0 or values.get("max_steps", 1) < -1:
        problems.append(f"max_steps must be greater than 0, not {values['max_steps']}")
    block, context = values.get("block_size"), values.get("max_position_embeddings", 2048)
    if block is not None and 0 < context < block:
        problems.append(f"block_size {block} is longer than max_position_embeddings {context}")


def _all_at_once(problems: list[str]) -> str:
    if len(problems) == 1:
        return f"{problems[0]}; --help lists every field" if problems[0].startswith("unknown") else problems[0]
    return f"{len(problems)} problems with the settings: " + "; ".join(problems)


def _settle_run(settings: Settings) -> None:
    """Dry run or real run, and the folder that follows from it."""
    training = settings.training
    settings.resume = settings.resume or training.pop("resume_from_checkpoint", None) or False
    steps = training.get("max_steps", -1)
    asked, named = settings.dry_run, "output_dir" in settings.given
    settings.dry_run = asked or (0 < steps <= DRY_RUN_STEPS and not named and not settings.resume)
    if not settings.dry_run:
        return
    if settings.resume:
        raise UserError("a dry run starts afresh each time: leave out --resume, or --dry_run to resume the real run")
    if not 0 < steps <= DRY_RUN_STEPS:
        if "max_steps" in settings.given:
            raise UserError(f"a dry run has {DRY_RUN_STEPS} steps: leave out --max_steps, or --dry_run")
        training["max_steps"] = DRY_RUN_STEPS
        training.pop("num_train_epochs", None)
    if not named:
        training["output_dir"] = DRY_RUN_FOLDER
