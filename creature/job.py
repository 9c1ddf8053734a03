"""The steps of the training job, each a function that `run_clm_creature.py` calls; finalize.py has the last."""

import copy
import functools
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from accelerate import DistributedType
from accelerate.utils import DynamoBackend
from datasets import DatasetDict
from transformers import PrinterCallback, ProgressCallback, get_scheduler, set_seed
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
from creature.data import block_collator, load_data
from creature.data.text.tokenizer import gpt2_hash, load_tokenizer, special_ids, token_byte_lengths, tokenizer_hash
from creature.errors import UserError, first_line, is_out_of_memory, raise_all
from creature.estimate import fit_micro_batch
from creature.finalize import SAMPLING, sample
from creature.launch import parent_to_watch
from creature.plan import Plan, sharded, training_values
from creature.resume import ResumedRun, set_aside_later
from creature.settings import DataArguments, Settings
from creature.trainer import CreatureTrainer, schedule_arguments
from creature.training_arguments import CreatureTrainingArguments
from modeling_creature import MultiModalCreature

DRY_RUN_EVAL_BLOCKS = 2


@dataclass(frozen=True)
class Data:
    """
    What a run learns from: blocks to train on and perhaps to evaluate on, facts for run.json, the tokenizer, and notes.
    """

    blocks: DatasetDict
    info: dict
    tokenizer: transformers.PreTrainedTokenizerBase
    notes: tuple[str, ...]


def build_config(settings: Settings) -> CreatureConfig:
    """The model's configuration, with the ids of the tokenizer; UserError with every problem of its values."""
    ids, name = {}, settings.data.tokenizer_name
    if name != "gpt2":
        tokenizer = load_tokenizer(name)
        ids = special_ids(tokenizer) if tokenizer_hash(tokenizer) != gpt2_hash() else {}
    ids = {field: value for field, value in ids.items() if field not in settings.given}
    try:
        return CreatureConfig(**settings.model | ids)
    except (ValueError, TypeError) as error:
        text = " ".join(str(error.__cause__ or error).split()).removeprefix("CreatureConfig: ")
        raise UserError(f"the model section is not valid: {text}") from error


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
    if args.n_gpu > 1:
        args._n_gpu = 1  # else the Trainer uses nn.DataParallel, which counts the batch differently
    if plan.threads:
        torch.set_num_threads(plan.threads)
    transformers.utils.logging.disable_progress_bar()  # of writing and reading model files
    return args


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
    """The data; a sample corpus is written first where none was named. The main process goes first."""
    asked, notes = settings.data, []
    with args.main_process_first(desc="data"):
        data = replace(asked, data=asked.data or _sample_corpus(asked))
        count = args.max_steps * plan.tokens_per_step // plan.block_size
        blocks, info = load_data(data, plan.block_size, config.vocab_size, mixture_blocks=count, seed=args.data_seed)
    tokenizer = load_tokenizer(data.tokenizer_name)
    tokenizer.model_max_length = config.max_position_embeddings  # saved with it, and what `truncation=True` means
    _check_tokenizer(tokenizer, info, config)
    block_collator(tokenizer, data.separate_documents)  # UserError where documents cannot be kept apart
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
    return Data(blocks, info | {"tokenizer_hash": tokenizer_hash(tokenizer)}, tokenizer, tuple(notes))


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
    batches = math.ceil(len(data.blocks["train"]) / (plan.micro_batch * plan.world_size))
    return max(1, math.ceil(args.num_train_epochs * max(1, math.ceil(batches / plan.accumulation))))


def build_model(config: CreatureConfig, seed: int) -> MultiModalCreature:
    """A fresh creature from the seed, with everything but the internal voice frozen."""
    set_seed(seed)
    model = MultiModalCreature(config)
    streams = tuple(name for name, weight in config.loss_weights.items() if weight)
    model.train_only(senses=("internal_voice",), streams=streams)
    # Saved as generation_config.json: a small model repeats itself under greedy decoding, and servers use the
    # temperature of a request only where the model samples.
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = transformers.GenerationConfig(**ids, **SAMPLING)
    return model


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
    if "validation" not in data.blocks:
        args.eval_strategy = IntervalStrategy.NO
    if data.info["ordered"]:
        args.train_sampling_strategy = "sequential"
    throughput = Throughput(run["flops_per_token"], run["peak_flops"])
    signals = StopSignals(parent_to_watch()).install()
    trainer = CreatureTrainer(
        model=model,
        args=args,
        train_dataset=data.blocks["train"],
        eval_dataset=data.blocks.get("validation"),
        data_collator=block_collator(data.tokenizer, settings.data.separate_documents),
        processing_class=data.tokenizer,
        byte_lengths=token_byte_lengths(data.tokenizer, model.config.vocab_size),
        throughput=throughput,
        signals=signals,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(MetricsFile(args.output_dir, resumed.seconds_trained if resumed else 0.0))
    trainer.add_callback(FirstStep())
    trainer.add_callback(ConsoleLog(throughput, bar=False if args.disable_tqdm else None))
    scaled_down = settings.dry_run and args.device.type == "cpu"  # too slow to judge its speed
    trainer.add_callback(HealthAdvice(min_samples_per_second=0.0 if scaled_down else 5.0))
    if run["decay_start"] and not settings.dry_run:
        trainer.protected_steps.add(run["decay_start"])
        trainer.add_callback(DecayCheckpoint(run["decay_start"]))
    if args.sample_steps:
        draw = functools.partial(sample, trainer.model, data.tokenizer)
        trainer.add_callback(Samples(draw, settings.data.prompt, args.sample_steps))
    return trainer


def train(trainer: CreatureTrainer, plan: Plan, resumed: ResumedRun | None) -> None:
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
        fits = fit_micro_batch(
            trainer.model.config, plan.block_size, plan.device, plan.precision, compiled=plan.compiled
        )
        divisors = [d for d in range(1, plan.micro_batch) if plan.micro_batch % d == 0]
        smaller = max((d for d in divisors if d <= max(fits, 1)), default=0)
        # transformers 5.17 calls it gradient checkpointing.
        kind = "activation" if hasattr(trainer.args, "activation_checkpointing") else "gradient"
        remedy = (
            f"use --per_device_train_batch_size {smaller} (the tokens of a step stay {plan.tokens_per_step:,})"
            if smaller
            else f"one block does not fit: use a smaller --block_size, --{kind}_checkpointing, or a smaller model"
        )
        raise UserError(f"out of memory on {plan.device.name} with micro-batch {plan.micro_batch}: {remedy}") from error
