"""Train a MultiModalCreature: round one its internal voice on text, later rounds senses and streams on recordings.

    accelerate launch run_clm_creature.py --max_steps 10           # dry run: ten steps with every check
    accelerate launch run_clm_creature.py --data corpus.bin        # the real run, into checkpoints/text_only
    accelerate launch run_clm_creature.py --data corpus.bin --resume
    accelerate launch run_clm_creature.py --config configs/rounds/hear.yaml --init_from checkpoints/text_only \\
        --data recordings/speech --text_data corpus.bin

Settings come from a YAML file (--config, configs/text_only_config.yaml by default) with the sections model, data, round
and training; any field of any section is also a flag, with dashes or underscores: --hidden_size 256 --learning-rate
1e-3. --help lists them all. Ctrl+C or SIGTERM finishes the step, saves, and says how to resume; before the first step
it ends the run at once.
"""

from creature import checkpoints, launch
from creature.settings import parse_settings


def main() -> int | None:
    """Settings -> plan -> arguments -> data -> model -> Trainer -> final model; the exit code."""
    settings = parse_settings()
    checkpoints.check_output(settings)
    code = launch.start_cpu_processes()
    if code is not None:  # of the processes that were started to do the work
        return code

    # Heavy imports come after the settings are known to be right.
    launch.keep_compiled_code()
    launch.say_waiting("loading torch and transformers")
    from creature import fast, finalize, job, report, resume
    from creature.plan import plan_run
    from creature.trainer import schedule_steps

    # What the settings, this machine and the run to resume decide, before any work is done.
    resumed = resume.find_run(settings)
    config, trained = job.build_config(settings, resumed)
    plan = plan_run(settings, config, resumed, trained)
    args = job.build_arguments(settings, config, plan, resumed)

    launch.say_waiting("opening the data")
    data = job.open_data(settings, config, plan, args)
    steps = job.total_steps(args, plan, data)
    if resumed:
        resumed = resume.choose_checkpoint(resumed, settings, steps, decay_steps=schedule_steps(args, steps)[1])

    launch.say_waiting("building the model")
    model, found = job.build_model(settings, config, trained, args.seed, resumed)
    fast.apply(model, float8=args.fp8_head)
    notes = data.notes + found + ((f"resuming from {resumed.checkpoint.name}",) if resumed else ())
    run = report.describe_run(settings, data.info, plan, args, model, trained, steps, notes)
    if resumed:
        resume.check_same_run(resumed, run["must_match"], settings.accept_changes)
    job.open_folder(settings, args, run, resumed)
    if args.process_index == 0:
        print(report.format_run(run), flush=True)

    trainer = job.build_trainer(settings, data, run, args, model, resumed)
    job.train(trainer, settings, plan, trained, resumed)
    finalize.finish(trainer, settings, data, run)
    trainer.accelerator.end_training()
    trainer.signals.restore()
    return 0


if __name__ == "__main__":
    launch.run(main)
