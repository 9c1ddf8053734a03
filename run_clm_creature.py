"""Train a MultiModalCreature as a causal language model on its internal voice.

    accelerate launch run_clm_creature.py --max_steps 10           # dry run: ten steps with every check
    accelerate launch run_clm_creature.py --data corpus.bin        # the real run, into checkpoints/text_only
    accelerate launch run_clm_creature.py --data corpus.bin --resume

Settings come from a YAML file (--config, configs/text_only_config.yaml by default) with the sections model, data and
training; any field of any section is also a flag, with dashes or underscores: --hidden_size 256 --learning-rate 1e-3.
--help lists them all. Ctrl+C or SIGTERM finishes the step, saves, and says how to resume; before the first step it ends
the run at once.
"""

from creature import checkpoints, launch
from creature.settings import parse_settings


def main() -> int | None:
    """Parse, check, data, model, Trainer, report."""
    settings = parse_settings()
    folder = settings.training.get("output_dir", "checkpoints/text_only")
    mark = checkpoints.read_mark(folder)
    checkpoints.check_output(
        folder, dry_run=settings.dry_run, resume=bool(settings.resume), overwrite=settings.overwrite_output_dir
    )
    code = launch.start_cpu_processes()
    if code is not None:
        return code

    # Heavy imports come after the settings are known to be right.
    launch.keep_compiled_code()
    launch.say_waiting("loading torch and transformers")
    from creature import finalize, job, report
    from creature.data.text.tokenizer import load_tokenizer
    from creature.plan import plan_run

    old = checkpoints.read_resumed(folder) if settings.resume else None
    config = job.build_config(settings)
    plan = plan_run(settings, config, old["identity"] if old else None)
    args = job.build_arguments(settings, plan, old)
    launch.say_waiting("opening the data")
    splits, info, data = job.build_data(settings, plan, config, args)
    tokenizer = load_tokenizer(data.tokenizer_name)
    info["tokenizer_hash"] = job.check_tokenizer(tokenizer, info, config)
    job.check_documents(tokenizer, data, splits, plan.notes)

    steps = job.total_steps(args, plan, splits)
    for name in {"warmup_steps", "batch_warmup_steps"} - settings.given if old else ():
        setattr(args, name, old["identity"].get(name, 0))  # a share of the old length, not of an extended one
    checkpoint = job.resume_point(settings, folder, args, old, steps)
    launch.say_waiting("building the model")
    model = job.build_model(config, args)
    run = report.describe_run(settings, plan, args, model, info, steps)
    if old:
        job.check_identity(old, run, settings.accept_changes)
    seconds_before = job.open_folder(folder, args, run, checkpoint, keep=bool(settings.resume), mark=mark)
    if args.process_index == 0:
        print(report.run_table(run), flush=True)

    trainer = job.build_trainer(settings, data, run, args, model, splits, tokenizer, seconds_before)
    job.train(trainer, plan, config, checkpoint)
    finalize.finish(trainer, settings, data, run, splits)
    trainer.accelerator.end_training()
    trainer.signals.restore()
    return 0


if __name__ == "__main__":
    launch.run(main)
