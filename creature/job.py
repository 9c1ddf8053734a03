"""The steps of the training job up to its end (finalize.py), each a function that `run_clm_creature.py` calls."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import transformers
from accelerate import DistributedType
from datasets import DatasetDict
from transformers import PrinterCallback, ProgressCallback, set_seed
from transformers.integrations import get_reporting_integration_callbacks

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
from creature.errors import UserError, first_line, is_out_of_memory
from creature.estimate import fit_micro_batch
from creature.finalize import SAMPLING, sample
from creature.launch import parent_to_watch
from creature.plan import Plan, sharded, training_values
from creature.settings import DataArguments, Settings
from creature.trainer import CreatureTrainer, schedule_steps
from creature.training_arguments import CreatureTrainingArguments
from modeling_creature import MultiModalCreature

DRY_RUN_EVAL_BLOCKS = 2


def build_config(settings: Settings) -> CreatureConfig:
    """The model's configuration; UserError with every problem of its values."""
    name = settings.data.get("tokenizer_name", "gpt2")
    if name != "gpt2":
        _follow_tokenizer(settings, load_tokenizer(name))
    try:
        return CreatureConfig(**settings.model)
    except (ValueError, TypeError) as error:
        text = str(error.__cause__ or error)
        raise UserError(f"the model section is not valid: {' '.join(text.split())}") from error


def _follow_tokenizer(settings: Settings, tokenizer) -> None:
    """Give the model the ids of a tokenizer that is not GPT-2's, but for those that flags name."""
    if tokenizer_hash(tokenizer) == gpt2_hash():
        return
    ids = special_ids(tokenizer)
    settings.model |= {name: value for name, value in ids.items() if name not in settings.given}


def build_arguments(settings: Settings, plan: Plan, old: dict | None = None) -> CreatureTrainingArguments:
    """
    TrainingArguments for this machine; this starts the process group where there are several processes.

    `old` is the run.json of a run that is resumed: trackers are given its name again.
    """
    values = training_values(settings, plan)
    values["report_to"] = values.get("report_to") or "none"  # a flag that says none arrives as None
    folder = Path(values.get("output_dir", "checkpoints/text_only"))
    values.setdefault("run_name", (old or {}).get("run_name", f"{folder.name}-{time.strftime('%m%d-%H%M%S')}"))
    try:
        (args,) = transformers.HfArgumentParser(CreatureTrainingArguments).parse_dict(values)
    except (ValueError, TypeError, NotImplementedError) as error:  # the last one from accelerate, of what it lacks
        raise UserError(f"the training section is not valid: {error}") from error
    _check_trackers(args.report_to)
    if args.max_steps <= 0 and "num_train_epochs" not in values:
        raise UserError("how long to train is not said: give --max_steps or --num_train_epochs")
    if args.matrix_learning_rate and "optim" in settings.given:
        raise UserError("--optim has no effect beside Muon: leave it out, or give --matrix_learning_rate 0")
    alone = args.distributed_state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU)
    if alone and sharded(settings.training):
        raise UserError("accelerate shards models over GPUs only, here it stays whole: use configs/accelerate/ddp.yaml")
    if args.sample_steps and sharded(settings.training):
        raise UserError("--sample_steps needs the whole model in one process, and FSDP spreads it: leave it out")
    if args.n_gpu > 1:
        # nn.DataParallel would count the batch differently; accelerate launch is the way to several GPUs.
        plan.notes.append(f"using 1 of {args.n_gpu} GPUs; `accelerate launch` without --num_processes uses all")
        args._n_gpu = 1
    args.push_to_hub = args.push_to_hub and not settings.dry_run
    transformers.utils.logging.disable_progress_bar()  # of writing and reading model files
    return args


def _check_trackers(names: list[str]) -> None:
    try:
        for tracker in get_reporting_integration_callbacks(names):
            tracker()  # each looks for its library
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(
            f"--report_to {' '.join(names)} does not work here ({first_line(error)}): install what is missing, or "
            "leave it out; metrics.jsonl has the same numbers"
        ) from error


def build_data(settings: Settings, plan: Plan, config: CreatureConfig, args) -> tuple[DatasetDict, dict, DataArguments]:
    """(the blocks, facts about them, the data section): a sample corpus is written first where no data was named."""
    (data,) = transformers.HfArgumentParser(DataArguments).parse_dict(settings.data)
    with args.main_process_first(desc="data"):
        data = replace(data, data=data.data or _sample_corpus(data, plan.notes))
        blocks = args.max_steps * plan.tokens_per_step // plan.block_size
        splits, info = load_data(data, plan.block_size, config.vocab_size, mixture_blocks=blocks, seed=args.data_seed)
    if info["ordered"]:
        args.train_sampling_strategy = "sequential"
        plan.notes += [
            f"{part['path']} gives {part['share']:.4g} of the blocks: its {part['tokens']:,} tokens are seen "
            f"{part['times_seen']:.3g} times"
            for part in info["parts"]
        ]
    if "vocab_size" not in settings.given and data.tokenizer_name != "gpt2":
        plan.notes.append(f"vocab_size {config.vocab_size:,} and the special ids follow from {data.tokenizer_name}")
    limit = data.max_eval_blocks or (DRY_RUN_EVAL_BLOCKS if settings.dry_run else None)
    if "validation" not in splits:
        if "eval_strategy" in settings.given and args.eval_strategy != "no":
            raise UserError("no validation text to evaluate on: raise --validation_fraction, or use --eval_strategy no")
        args.eval_strategy = transformers.trainer_utils.IntervalStrategy("no")
        plan.notes.append("no validation text, so nothing is evaluated; --validation_fraction holds some out")
    elif limit and limit < len(splits["validation"]):
        splits["validation"] = splits["validation"].select(range(limit))
        plan.notes.append(f"evaluating on the first {limit} validation blocks")
    return splits, info, data


def _sample_corpus(data: DataArguments, notes: list[str]) -> str:
    from creature.data.text.stories import write_story_corpus

    path = Path(data.cache_dir) / f"sample_stories_{data.sample_corpus_tokens}.txt"
    if not path.is_file():
        print(f"no --data given: writing a sample corpus of {data.sample_corpus_tokens:,} tokens to {path}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_story_corpus(path, data.sample_corpus_tokens, seed=0)
    notes.append(f"no --data given: training on the sample corpus {path}, which teaches little beyond its own stories")
    return str(path)


def total_steps(args, plan: Plan, splits) -> int:
    """Optimizer steps of the whole run, from max_steps or from the epochs."""
    if args.max_steps > 0:
        return args.max_steps
    batches = -(-len(splits["train"]) // (plan.micro_batch * plan.world_size))
    return max(1, int(-(-args.num_train_epochs * max(1, -(-batches // plan.accumulation)) // 1)))


def resume_point(settings: Settings, folder: str, args, old: dict | None, steps: int) -> Path | None:
    """
    The checkpoint to go on from, or None for a new run. Moves later checkpoints of an extended run out of the way.

    A run that is extended goes on where its learning rate began to fall, so that the rate does not jump: from there on
    it is the run that a longer one would have been.
    """
    if not settings.resume:
        return None
    at_most = None
    if old["identity"]["max_steps"] != steps:
        at_most = old.get("decay_start")
        if old["identity"]["schedule"] != "warmup_stable_decay":
            at_most = None if settings.accept_changes else _refuse_horizon(old, steps)
        elif steps < old["identity"]["max_steps"]:
            at_most = min(at_most, steps - schedule_steps(args, steps)[1])
    checkpoint, skipped = checkpoints.choose_checkpoint(folder, settings.resume, at_most)
    for name, why in skipped:
        print(f"skipped {name}: {why}", flush=True)
    if at_most is not None and checkpoints.step_of(checkpoint) > at_most:
        raise UserError(f"{checkpoint.name} is past step {at_most}, where the rate began to fall: give a bare --resume")
    step = checkpoints.step_of(checkpoint)
    if step >= steps and old.get("status") == "finished":
        raise UserError(f"the run has its {steps} steps already: give more --max_steps to extend it")
    return checkpoint


def _refuse_horizon(old: dict, steps: int) -> None:
    raise UserError(
        f"max_steps was {old['identity']['max_steps']} and is now {steps}, and the learning rate of a "
        f"{old['identity']['schedule']} schedule would jump: resume with the old value, or --accept_changes"
    )


def check_identity(old: dict, new: dict, accept: bool) -> None:
    """UserError when a resumed run would not go on as it began, with every difference; max_steps may grow."""
    ignored = {"max_steps", "decay_steps"}
    unsaid = ("matrix_momentum", "adam_beta1", "adam_beta2", "adam_epsilon")  # by runs of earlier versions
    before = {"separate_documents": False, "batch_warmup_steps": 0, "fp8_head": False}
    before |= {key: new["identity"].get(key) for key in unsaid} | old["identity"]
    found = checkpoints.differences(
        {k: v for k, v in before.items() if k not in ignored},
        {k: v for k, v in new["identity"].items() if k not in ignored},
    )
    found += checkpoints.differences(
        {"decay_steps": old["identity"]["decay_steps"]}, {"decay_steps": new["identity"]["decay_steps"]}
    ) if old["identity"]["max_steps"] == new["identity"]["max_steps"] else []  # fmt: skip
    model = [text for text in found if text.startswith("model.")]
    if model:
        raise UserError(f"the checkpoint is of another configuration: {'; '.join(model)}; resume it with its own")
    if found and not accept:
        raise UserError(f"this run is not the one to resume: {'; '.join(found)}; --accept_changes goes on all the same")
    for text in found:
        print(f"accepted: {text}", flush=True)


def set_aside_later(folder: str, checkpoint: Path) -> None:
    """Rename what is newer than the checkpoint we go on from, so that no later --resume takes it for this run's."""
    for path in checkpoints.list_checkpoints(folder):
        if checkpoints.step_of(path) > checkpoints.step_of(checkpoint):
            target = path.with_name(path.name.replace("checkpoint", checkpoints.REPLACED))
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)


def build_model(config: CreatureConfig, args) -> MultiModalCreature:
    """A fresh creature from the seed, with everything but the internal voice frozen."""
    set_seed(args.seed)
    model = MultiModalCreature(config)
    weights = config.loss_weights
    streams = tuple(name for name, weight in weights.items() if weight)
    model.train_only(senses=("internal_voice",), streams=streams)
    # Saved as generation_config.json: a small model that always takes the likeliest token goes round in circles, and
    # servers use the temperature of a request only where the model samples.
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = transformers.GenerationConfig(**ids, **SAMPLING)
    return model


def build_trainer(
    settings: Settings, data: DataArguments, run: dict, args, model, splits, tokenizer, seconds_before: float
):
    """The Trainer with everything that watches the run."""
    tokenizer.model_max_length = model.config.max_position_embeddings  # saved with it, and what `truncation=True` means
    throughput = Throughput(run["flops_per_token"], run["peak_flops"])
    signals = StopSignals(parent_to_watch()).install()
    trainer = CreatureTrainer(
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits.get("validation"),
        data_collator=block_collator(tokenizer, data.separate_documents),
        processing_class=tokenizer,
        byte_lengths=token_byte_lengths(tokenizer, model.config.vocab_size),
        throughput=throughput,
        signals=signals,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(MetricsFile(args.output_dir, seconds_before))
    trainer.add_callback(FirstStep())
    trainer.add_callback(ConsoleLog(throughput, bar=False if args.disable_tqdm else None))
    scaled_down = settings.dry_run and args.device.type == "cpu"  # its speed says nothing
    trainer.add_callback(HealthAdvice(min_samples_per_second=0.0 if scaled_down else 5.0))
    if run["decay_start"] and not settings.dry_run:
        trainer.protected_steps.add(run["decay_start"])
        trainer.add_callback(DecayCheckpoint(run["decay_start"]))
    if args.sample_steps:
        trainer.add_callback(
            Samples(lambda prompt: sample(trainer.model, tokenizer, prompt), data.prompt, args.sample_steps)
        )
    return trainer


def train(trainer: CreatureTrainer, plan: Plan, config: CreatureConfig, checkpoint: Path | None) -> None:
    """Train to the end or to a signal; running out of memory ends in a sentence that names the batch that would fit."""
    try:
        if checkpoint and checkpoints.step_of(checkpoint) >= trainer.args.max_steps > 0:
            trainer.load_finished(checkpoint)  # only its end was lost
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
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
        fits = fit_micro_batch(config, plan.block_size, plan.device, plan.precision, compiled=plan.compiled)
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


def check_tokenizer(tokenizer, info: dict, config: CreatureConfig) -> str:
    """The hash of the tokenizer; UserError where the data was made with another, or the model has too few ids."""
    own = tokenizer_hash(tokenizer)
    if info.get("tokenizer_hash") not in (None, own):
        raise UserError(
            f"{info['path']} was tokenized with another tokenizer than the one in use: give its --tokenizer_name, or "
            "tokenize the text again"
        )
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer):,} ids and the model {config.vocab_size:,}: raise vocab_size to a "
            f"multiple of 64 of at least {len(tokenizer):,}"
        )
    return own


def check_documents(tokenizer, data: DataArguments, splits: DatasetDict, notes: list[str]) -> None:
    """UserError where documents cannot be kept apart, a note where there are none to keep apart."""
    block_collator(tokenizer, data.separate_documents)
    if data.separate_documents and not any(tokenizer.eos_token_id in row["input_ids"] for row in splits["train"]):
        notes.append("separate_documents has no effect: nothing in the data ends with the tokenizer's end-of-text")


def open_folder(folder: str, args, run: dict, checkpoint: Path | None, *, keep: bool, mark: bytes | None) -> float:
    """
    Take the output folder for this run and write run.json; the main process does, the others wait.

    `mark` is what `checkpoints.read_mark` gave before the folder was looked at: nobody may have been there since.
    Returns the seconds that the run has trained before, 0.0 for a new one.
    """
    seconds = 0.0
    with args.main_process_first(desc="output folder"):
        if args.process_index == 0:
            weights = 4 * run["parameters"]["total"]
            checkpoints.require_space(folder, weights + 8 * run["parameters"]["trainable"])
            checkpoints.hold_output(folder, mark)
            checkpoints.claim_output(folder, keep=keep)
            if checkpoint is not None:
                set_aside_later(folder, checkpoint)
                entries = checkpoints.rewind_metrics(folder, checkpoints.step_of(checkpoint))
                seconds = max((entry.get("time", 0.0) for entry in entries), default=0.0)
                run["notes"].append(f"resuming from {checkpoint.name}")
            checkpoints.write_run(folder, run)
    return seconds
