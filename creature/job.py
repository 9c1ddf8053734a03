"""The steps of the training job, each a function that `run_clm_creature.py` calls; finalize.py has the last."""

import copy
import functools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from accelerate import DistributedType
from accelerate.utils import DynamoBackend, gather_object
from datasets import DatasetDict
from transformers import PrinterCallback, ProgressCallback, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import trainer_log_levels

from configuration_creature import CreatureConfig
from creature import checkpoints
from creature.callbacks import (
    ConsoleLog,
    DecayCheckpoint,
    FirstStep,
    HealthAdvice,
    MetricsFile,
    Samples,
    StopSignals,
    Throughput,
)
from creature.data import block_collator, collate_rows, load_data
from creature.data.recordings.rows import open_rows
from creature.data.text.tokenizer import gpt2_hash, load_tokenizer, special_ids, token_byte_lengths, tokenizer_hash
from creature.data_parallel import LostProcess
from creature.errors import UserError, first_line, is_out_of_memory, raise_all
from creature.estimate import fit_micro_batch
from creature.finalize import SAMPLING, sample
from creature.launch import parent_to_watch
from creature.loading import ids_without_text
from creature.plan import Plan, sharded, training_values
from creature.resume import ResumedRun, set_aside_later
from creature.rounds.start import (
    Trained,
    find_codec,
    find_recordings,
    make_config,
    reset_unused_rows,
    round_config,
    start_model,
)
from creature.rounds.trainer import RoundTrainer
from creature.settings import DataArguments, Settings
from creature.trainer import CreatureTrainer, schedule_arguments
from creature.training_arguments import CreatureTrainingArguments
from modeling_creature import MultiModalCreature
from processing_creature import CreatureProcessor

DRY_RUN_EVAL_BLOCKS = 2
DRY_RUN_EVAL_CLIPS = 8


@dataclass(frozen=True)
class Data:
    """
    What a run learns from.

    Args:
        splits: "train", perhaps "validation", and of a round on recordings perhaps "text", whose loss is watched.
        info: facts for run.json.
        tokenizer: of the text; saved with the model, in a round on recordings as a part of `processor`.
        collate: rows of "train" -> a batch.
        notes: what the user should know.
    """

    splits: dict
    info: dict
    tokenizer: transformers.PreTrainedTokenizerBase
    collate: Callable[[list], dict]
    notes: tuple[str, ...]
    processor: CreatureProcessor | None = None


def build_config(settings: Settings, resumed: ResumedRun | None = None) -> tuple[CreatureConfig, Trained]:
    """
    (the model's configuration, with the ids of the tokenizer, what of the model is trained); UserError with every
    problem of its values.
    """
    ids, name = {}, settings.data.tokenizer_name
    if name != "gpt2":
        tokenizer = load_tokenizer(name)
        ids = special_ids(tokenizer) if tokenizer_hash(tokenizer) != gpt2_hash() else {}
    ids = {field: value for field, value in ids.items() if field not in settings.given}
    if settings.on_recordings:
        return round_config(settings, find_recordings(settings), ids, resumed)
    _check_round_of_text(settings)
    config = make_config(settings.model | ids)
    streams = tuple(name for name, weight in config.loss_weights.items() if weight)
    return config, Trained(("internal_voice",), streams, settings.round.train_backbone)


def _check_round_of_text(settings: Settings) -> None:
    """UserError for settings that only a round on recordings follows."""
    given = [name for name in ("train_senses", "train_streams", "sense_dropout") if getattr(settings.round, name)]
    given += [name for name in ("text_data", "clip_ticks", "text_share", "codec") if name in settings.given]
    if given:
        raise UserError(
            f"{', '.join(given)} is for recordings, and --data names text: leave it out, or name recordings"
        )


def build_arguments(
    settings: Settings, config: CreatureConfig, plan: Plan, resumed: ResumedRun | None
) -> CreatureTrainingArguments:
    """
    TrainingArguments for this machine; this starts the process group where there are several processes.

    A resumed run keeps the name that trackers know, and the first steps that it began with: a share of its length is
    that of the old length, not of an extended one.
    """
    training = settings.training
    values = training_values(settings, plan)
    values["report_to"] = values.get("report_to") or "none"  # a flag that says none arrives as None
    values["push_to_hub"] = bool(training.get("push_to_hub")) and not settings.dry_run
    name = f"{Path(settings.output_dir).name}-{time.strftime('%m%d-%H%M%S')}"
    values.setdefault("run_name", resumed.run.get("run_name", name) if resumed else name)
    for name in {"warmup_steps", "batch_warmup_steps"} - settings.given if resumed else ():
        values[name] = resumed.must_match[name]
    if not values.get("num_train_epochs") and values.get("max_steps", -1) <= 0:
        raise UserError("nothing says how long to train: give --max_steps or --num_train_epochs")
    try:
        args = CreatureTrainingArguments(**values)
    except (
        ValueError,
        TypeError,
        NotImplementedError,
    ) as error:  # the last is accelerate's
        raise UserError(f"the training section is not valid: {error}") from error
    raise_all(_find_problems(args, config, sharded(training)))
    if plan.world_size > 1:
        _check_batches_agree(gather_object([(plan.micro_batch, plan.accumulation)]))
    if args.n_gpu > 1:
        args._n_gpu = 1  # else the Trainer uses nn.DataParallel, which counts the batch differently
    if plan.threads:
        torch.set_num_threads(plan.threads)
    transformers.utils.logging.disable_progress_bar()  # of writing and reading model files
    return args


def _check_batches_agree(batches: list[tuple[int, int]]) -> None:
    """UserError where the processes chose different (micro-batch, accumulation): they would wait for each other."""
    if len(set(batches)) > 1:
        sizes = [micro for micro, _ in batches]
        raise UserError(
            f"the GPUs have different free memory: micro-batches of {', '.join(map(str, sizes))} fit processes 0 to "
            f"{len(sizes) - 1}; use --per_device_train_batch_size {min(sizes)}, or free the fuller ones"
        )


def _find_problems(args, config: CreatureConfig, is_sharded: bool) -> list[str]:
    """What cannot work although every value is a possible one, in words; by trying it, before any data is read."""
    trials = (
        (
            _try_trackers,
            f"--report_to {' '.join(args.report_to)} does not work here",
            "install what is missing, or leave it out; metrics.jsonl has the same numbers",
        ),
        (
            _try_optimizer,
            f"--optim {args.optim.value} does not work here",
            "install what is missing, correct --optim_args, or choose another",
        ),
        (
            _try_schedule,
            f"--lr_scheduler_type {args.lr_scheduler_type.value} does not work",
            "give or correct --lr_scheduler_kwargs '{name: value}', or choose another",
        ),
        (
            _try_compiler,
            "torch.compile does not work as set",
            "correct --torch_compile_mode and --torch_compile_backend, or leave them out",
        ),
    )
    problems = []
    for trial, what, remedy in trials:
        try:
            trial(args, config)
        except Exception as error:  # of many types, by as many libraries
            problems.append(f"{what} ({first_line(error)}): {remedy}")
    for name in ("log_level", "log_level_replica"):
        if getattr(args, name) not in trainer_log_levels:
            problems.append(f"{name} must be one of {', '.join(trainer_log_levels)}, not {getattr(args, name)!r}")
    alone = args.distributed_state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU)
    if alone and is_sharded:
        problems.append("accelerate shards models over GPUs only, here it stays whole: use configs/accelerate/ddp.yaml")
    if args.sample_steps and is_sharded:
        problems.append("--sample_steps needs the whole model in one process, and FSDP spreads it: leave it out")
    return problems


def _try_trackers(args, config: CreatureConfig) -> None:
    for tracker in get_reporting_integration_callbacks(args.report_to):
        tracker()  # raises where its library is missing


def _try_optimizer(args, config: CreatureConfig) -> None:
    """Make the optimizer of `--optim` where it is used; some look for the layers of the model that they are for."""
    if args.matrix_learning_rate:
        return
    with torch.device("meta"):
        model = MultiModalCreature(config)
    optimizer, options = CreatureTrainer.get_optimizer_cls_and_kwargs(args, model)
    if not options.keys() & {"params", "model", "optimizer_dict"}:
        optimizer([torch.nn.Parameter(torch.zeros(2, 2))], **options)


def _try_schedule(args, config: CreatureConfig) -> None:
    """Make the schedule and ask it for rates from the first to the last step."""
    steps = args.max_steps if args.max_steps > 0 else 1000
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], args.learning_rate)
    options = schedule_arguments(args, steps)
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, options)
    for factor in getattr(schedule, "lr_lambdas", ()):
        for step in (0, steps // 2, steps):
            if not 0 <= factor(step) < math.inf:
                raise ValueError(f"its rate at step {step} is {args.learning_rate * factor(step):g}")


def _try_compiler(args, config: CreatureConfig) -> None:
    if args.torch_compile:
        DynamoBackend(args.torch_compile_backend.upper())  # those that accelerate knows
        torch.compile(torch.nn.Identity(), mode=args.torch_compile_mode, backend=args.torch_compile_backend)


def open_data(settings: Settings, config: CreatureConfig, plan: Plan, args) -> Data:
    """The data; a sample is written first where none was named. The main process goes first."""
    if settings.on_recordings:
        return _open_recordings(settings, config, plan, args)
    asked, notes = settings.data, []
    with args.main_process_first(desc="data"):
        data = replace(asked, data=asked.data or _sample_corpus(asked))
        count = args.max_steps * plan.tokens_per_step // plan.block_size
        blocks, info = load_data(data, plan.block_size, config.vocab_size, mixture_blocks=count, seed=args.data_seed)
    tokenizer = load_tokenizer(data.tokenizer_name)
    tokenizer.model_max_length = config.max_position_embeddings  # saved with it, and what `truncation=True` means
    _check_tokenizer(tokenizer, info, config)
    collate = block_collator(tokenizer, data.separate_documents)
    if not asked.data:
        notes.append(
            f"no --data given: training on the sample corpus {data.data}, which teaches little beyond its stories"
        )
    for part in info["parts"] if info["ordered"] else ():
        notes.append(
            f"{part['path']} gives {part['share']:.4g} of the blocks: its {part['tokens']:,} tokens are seen "
            f"{part['times_seen']:.3g} times"
        )
    if "vocab_size" not in settings.given and data.tokenizer_name != "gpt2":
        notes.append(f"vocab_size {config.vocab_size:,} and the special ids follow from {data.tokenizer_name}")
    limit = data.max_eval_blocks or (DRY_RUN_EVAL_BLOCKS if settings.dry_run else None)
    if "validation" not in blocks:
        if "eval_strategy" in settings.given and args.eval_strategy != "no":
            raise UserError("no validation text to evaluate on: raise --validation_fraction, or use --eval_strategy no")
        if args.metric_for_best_model is not None:  # also the Trainer's own, of a schedule that follows the loss
            raise UserError(
                "no validation text, so neither the best checkpoint nor a schedule that follows the loss is known: "
                "raise --validation_fraction, or leave out what needs them"
            )
        notes.append("no validation text, so nothing is evaluated; --validation_fraction holds some out")
    elif limit and limit < len(blocks["validation"]):
        blocks = DatasetDict(blocks | {"validation": blocks["validation"].select(range(limit))})
        notes.append(f"evaluating on the first {limit} validation blocks")
    if data.separate_documents and not any(tokenizer.eos_token_id in row["input_ids"] for row in blocks["train"]):
        notes.append("separate_documents has no effect: nothing in the data ends with the tokenizer's end-of-text")
    info |= {"tokenizer_hash": tokenizer_hash(tokenizer)}
    return Data(dict(blocks), info, tokenizer, collate, tuple(notes))


def _open_recordings(settings: Settings, config: CreatureConfig, plan: Plan, args) -> Data:
    """The data of a round on recordings."""
    data, notes = settings.data, []
    tokenizer = load_tokenizer(data.tokenizer_name)
    processor = CreatureProcessor.from_config(config, tokenizer, find_codec(settings))
    count = args.max_steps * plan.tokens_per_step // plan.block_size if args.max_steps > 0 else None
    with args.main_process_first(desc="data"):
        splits, info, like = open_rows(data, find_recordings(settings), processor, count, args.data_seed)
    _check_tokenizer(tokenizer, info, config)
    if not settings.data_names:
        notes.append(f"no --data given: training on a minute of recordings that were made up, in {info['path']}")
        if processor.codec is not None and not data.codec and not settings.round.init_from:
            notes.append("no --codec given: the codes of the voice are those of an untrained codec")
    for folder, facts in info["clips"].items():
        notes += [f"{folder}: {text}" for text in _about_clips(facts)]
    if data.text_data:
        notes.append(f"{info['text_rows']:.0%} of the rows are text")
    limit = data.max_eval_blocks or (DRY_RUN_EVAL_CLIPS if settings.dry_run else None)
    for name in ("validation", "text"):
        if limit and name in splits and limit < len(splits[name]):
            splits[name] = splits[name].select(range(limit))
            notes.append(f"evaluating on the first {limit} {'clips' if name == 'validation' else 'blocks of text'}")
    if "validation" not in splits:
        if args.metric_for_best_model is not None:
            raise UserError(
                "no recordings are held out, so no checkpoint is known to be the best: import them again "
                "with --validation_fraction, or leave out --metric_for_best_model"
            )
        notes.append("no recordings are held out, so nothing is evaluated; import them with --validation_fraction")
    info |= {"tokenizer_hash": tokenizer_hash(tokenizer)}
    collate = functools.partial(collate_rows, ticks=data.clip_ticks, like=like)
    return Data(splits, info, tokenizer, collate, tuple(notes), processor)


def _about_clips(facts: dict) -> list[str]:
    """What `make_clips` found, in words: recordings left out and cut, columns that are not used."""
    lines = []
    for split, counts in facts["splits"].items():
        if left_out := counts["left_out"]:
            recording, why = next(iter(left_out.items()))
            lines.append(
                f"{len(left_out)} of {len(left_out) + counts['recordings']} recordings of {split} left out; "
                f"{recording}: {why}"
            )
        if counts["cut"]:
            lines.append(f"{counts['cut']} recordings of {split} are longer than clip_ticks, and were cut")
    return lines + [f"{column} is not used: {why}" for column, why in facts["unused"].items()]


def _sample_corpus(data: DataArguments) -> str:
    from creature.data.text.stories import write_story_corpus

    path = Path(data.cache_dir) / f"sample_stories_{data.sample_corpus_tokens}.txt"
    if not path.is_file():
        print(f"no --data given: writing a sample corpus of {data.sample_corpus_tokens:,} tokens to {path}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_story_corpus(path, data.sample_corpus_tokens, seed=0)
    return str(path)


def _check_tokenizer(tokenizer, info: dict, config: CreatureConfig) -> None:
    """UserError where the data was tokenized with another tokenizer, or the model has too few ids."""
    if info.get("tokenizer_hash") not in (None, tokenizer_hash(tokenizer)):
        raise UserError(
            f"{info['path']} was tokenized with another tokenizer than the one in use: give its --tokenizer_name, or "
            "tokenize the text again"
        )
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer):,} ids and the model {config.vocab_size:,}: raise vocab_size to a "
            f"multiple of 64 of at least {len(tokenizer):,}"
        )


def total_steps(args, plan: Plan, data: Data) -> int:
    """Optimizer steps of the whole run, from max_steps or from the epochs."""
    if args.max_steps > 0:
        return args.max_steps
    batches = math.ceil(len(data.splits["train"]) / (plan.micro_batch * plan.world_size))
    return max(1, math.ceil(args.num_train_epochs * max(1, math.ceil(batches / plan.accumulation))))


def build_model(
    settings: Settings, config: CreatureConfig, trained: Trained, seed: int, resumed: ResumedRun | None
) -> tuple[MultiModalCreature, tuple[str, ...]]:
    """
    (the creature that the run begins with, notes): fresh from the seed, or that of `init_from`, with everything frozen
    that the run does not train. A run that is resumed reads its weights later.
    """
    model, notes = start_model(config, None if resumed else settings.round.init_from, seed)
    if settings.on_recordings and settings.round.init_from and not resumed:
        if count := reset_unused_rows(model, len(load_tokenizer(settings.data.tokenizer_name))):
            notes.append(
                f"{count} rows of the token table that no text has used, silence among them, begin as the mean row"
            )
    fresh = not settings.round.init_from and not resumed
    if settings.on_recordings and fresh and trained.backbone and settings.backbone_rate < 1:
        notes.append(
            f"the layers know nothing yet and learn at {settings.backbone_rate:g} of the rates: give --init_from, or "
            "--backbone_rate 1"
        )
    model.train_only(trained.senses, trained.streams, trained.backbone)
    # Saved as generation_config.json: a small model repeats itself under greedy decoding, and servers use the
    # temperature of a request only where the model samples.
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = transformers.GenerationConfig(**ids, **SAMPLING)
    return model, tuple(notes)


def open_folder(settings: Settings, args, run: dict, resumed: ResumedRun | None) -> None:
    """On the main process, take the output folder, unless another run has been there meanwhile; write run.json."""
    folder, parameters = Path(settings.output_dir), run["parameters"]
    with args.main_process_first(desc="output folder"):
        if args.process_index != 0:
            return
        checkpoints.require_space(folder, 4 * parameters["total"] + 8 * parameters["trainable"])
        checkpoints.lock_output(folder)
        checkpoints.check_output(settings)
        if resumed and checkpoints.read_run(folder) != resumed.run:
            raise UserError(
                f"another run has been in {folder} since this one was started: look at it, then start again"
            )
        checkpoints.clear_output(folder, keep=resumed is not None)
        if resumed:
            set_aside_later(resumed)
            checkpoints.rewind_metrics(folder, resumed.step)
        checkpoints.write_run(folder, run)


def build_trainer(
    settings: Settings, data: Data, run: dict, args, model, resumed: ResumedRun | None
) -> CreatureTrainer:
    """The Trainer with everything that watches the run."""
    args = copy.copy(args)
    if "validation" not in data.splits:
        args.eval_strategy = IntervalStrategy.NO
    # The files of the rounds set it, and the Trainer would evaluate at the start all the same.
    args.eval_on_start &= args.eval_strategy != IntervalStrategy.NO
    if data.info["ordered"]:
        args.train_sampling_strategy = "sequential"
    throughput = Throughput(run["flops_per_token"], run["peak_flops"])
    signals = StopSignals(parent_to_watch()).install()
    common = {
        "model": model,
        "args": args,
        "train_dataset": data.splits["train"],
        "eval_dataset": data.splits.get("validation"),
        "data_collator": data.collate,
        "byte_lengths": token_byte_lengths(data.tokenizer, model.config.vocab_size),
        "throughput": throughput,
        "signals": signals,
        "backbone_rate": settings.backbone_rate,
        "other_rows": ids_without_text(model.config, data.tokenizer),
    }
    if data.processor is None:
        trainer = CreatureTrainer(**common, processing_class=data.tokenizer)
    else:
        trainer = RoundTrainer(
            **common,
            processing_class=data.processor,
            text_dataset=data.splits.get("text"),
            sense_dropout=settings.round.sense_dropout,
        )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(MetricsFile(args.output_dir, resumed.seconds_trained if resumed else 0.0))
    trainer.add_callback(FirstStep())
    if args.world_size > 1:
        trainer.add_callback(LostProcess())
    unit = "ticks" if settings.on_recordings else "tokens"
    trainer.add_callback(ConsoleLog(throughput, bar=False if args.disable_tqdm else None, unit=unit))
    scaled_down = settings.dry_run and args.device.type == "cpu"  # too slow to judge its speed
    trainer.add_callback(HealthAdvice(min_samples_per_second=0.0 if scaled_down else 5.0))
    if run["decay_start"] and not settings.dry_run:
        trainer.protected_steps.add(run["decay_start"])
        trainer.add_callback(DecayCheckpoint(run["decay_start"]))
    if args.sample_steps:
        draw = functools.partial(sample, trainer.model, data.tokenizer)
        trainer.add_callback(Samples(draw, settings.data.prompt, args.sample_steps))
    return trainer


def train(
    trainer: CreatureTrainer, settings: Settings, plan: Plan, trained: Trained, resumed: ResumedRun | None
) -> None:
    """Train to the end or to a signal; out of memory ends in a UserError that names the batch that would fit."""
    try:
        if resumed and resumed.step >= trainer.args.max_steps > 0:
            trainer.load_finished(resumed.checkpoint)  # only evaluation or final model are missing
        else:
            trainer.train(resume_from_checkpoint=str(resumed.checkpoint) if resumed else None)
        if trainer.state.global_step >= trainer.state.max_steps:
            trainer.make_up_evaluation()
    except Exception as error:
        tracker = type(error).__module__.partition(".")[0]
        if tracker in trainer.args.report_to:
            raise UserError(
                f"{tracker} failed ({first_line(error)}): put that right (docs/tracking.md), or leave out "
                f"--report_to {tracker}; metrics.jsonl has the same numbers"
            ) from error
        if not is_out_of_memory(error):
            raise
        form = {"compiled": plan.compiled, **asdict(trained)}
        fits = fit_micro_batch(trainer.model.config, plan.block_size, plan.device, plan.precision, **form)
        divisors = [d for d in range(1, plan.micro_batch) if plan.micro_batch % d == 0]
        smaller = max((d for d in divisors if d <= max(fits, 1)), default=0)
        # transformers 5.17 calls it gradient checkpointing.
        kind = "activation" if hasattr(trainer.args, "activation_checkpointing") else "gradient"
        remedy = (
            f"use --per_device_train_batch_size {smaller} (the tokens of a step stay {plan.tokens_per_step:,})"
            if smaller
            else f"one row does not fit: use a smaller --{settings.row_name} or model, or --{kind}_checkpointing"
        )
        raise UserError(f"out of memory on {plan.device.name} with micro-batch {plan.micro_batch}: {remedy}") from error
