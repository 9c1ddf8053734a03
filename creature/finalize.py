"""After the training: the final model, its samples, plots and card, the push to the Hub, the checks of a dry run."""

import copy
import os
import shlex
import shutil
import statistics
from pathlib import Path

import huggingface_hub
import torch
from transformers import AutoModelForCausalLM

from creature import checkpoints
from creature.card import write_card
from creature.data import spread_pictures
from creature.errors import UserError, first_line
from creature.files import explain_write_errors
from creature.loading import load_model
from creature.saving import resume_hint
from creature.settings import Settings
from creature.trainer import CreatureTrainer
from processing_creature import TARGETS

SAMPLES = 3  # of the model card
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 50}
# Not pushed: what only a resume needs, and run.json, which has paths of this machine.
NOT_PUSHED = ["checkpoint-*", f"{checkpoints.REPLACED}-*", checkpoints.RUN_FILE, ".*"]


def sample(model, tokenizer, prompt: str, max_new_tokens: int = 40, seed: int = 0) -> str:
    """A seeded continuation of a prompt, prompt included; leaves the random state and the model's mode as they were."""
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    training, room = model.training, model.config.max_position_embeddings - inputs["input_ids"].shape[1]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        ids = model.eval().generate(
            **inputs,
            **SAMPLING,
            max_new_tokens=max(1, min(max_new_tokens, room)),
            pad_token_id=tokenizer.pad_token_id,
        )
    model.train(training)
    return " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())


def finish(trainer: CreatureTrainer, settings: Settings, data, run: dict) -> None:
    """After training: the final model, plots and card, the checks of a dry run; or the command that resumes."""
    folder, step = Path(trainer.args.output_dir), trainer.state.global_step
    stopped = trainer.signals.stopped and step < trainer.state.max_steps
    if stopped:
        if trainer.is_world_process_zero():
            checkpoints.update_run(folder, status="stopped", steps_done=step)
            print(f"stopped after step {step:,} and saved; resume with: {resume_command(run['command'])}", flush=True)
        return
    _publish(trainer, folder)
    if not trainer.is_world_process_zero():
        return
    model = _plain_model(trainer, folder)
    trained, samples = run["must_match"]["trained"], []
    if "internal_voice" in trained["senses"] and "internal_text" in trained["streams"]:
        samples = [sample(model, data.tokenizer, settings.data.prompt, 80, seed) for seed in range(SAMPLES)]
    if settings.dry_run:
        check_saved(model, folder / f"checkpoint-{step}", data.collate([data.splits["train"][0]]))
        if samples:
            print(f"continuation after {step} steps, which teach no sense yet: {samples[0]}", flush=True)
    run = (checkpoints.read_run(folder) or run) | {"status": "finished", "steps_done": step, "samples": samples}
    run |= {"dry_run": "passed"} if settings.dry_run else {}
    if memory := max((entry.get("peak_memory_bytes", 0) for entry in checkpoints.read_metrics(folder)), default=0):
        run["peak_memory_bytes"] = memory
    _plot(folder)
    write_card(folder, run, data.tokenizer)
    checkpoints.write_run(folder, run)
    if trainer.args.push_to_hub:
        _push(trainer, folder)
    if settings.dry_run:
        print(f"dry run passed: {step} steps, checkpoint written, read back with equal logits", flush=True)
    else:
        print(f"finished {step:,} steps; the model is in {folder}{compare_speed(run, folder)}", flush=True)


def compare_speed(run: dict, folder: Path) -> str:
    """The median speed of a run beside what scripts/estimate.py expects of its card; "" where it expects nothing."""
    speeds = [e["tokens_per_second"] for e in checkpoints.read_metrics(folder) if e.get("tokens_per_second")]
    if not run.get("expected_seconds") or not speeds:
        return ""
    speed, expected = statistics.median(speeds), run["tokens"] / run["expected_seconds"]
    return f"; {speed:,.0f} tokens/s, {speed / expected:.2f} times the estimate for {run['device']}"


def _publish(trainer: CreatureTrainer, folder: Path) -> None:
    """Write the final model and its tokenizer aside, then move each file into the folder of the run."""
    aside = folder / checkpoints.WRITING_FOLDER
    with explain_write_errors(folder, lambda: resume_hint(folder)):
        trainer.save_model(str(aside), _internal_call=True)  # without a push: the card is still missing
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            (aside / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nothing reads
            checkpoints.unify_modes(aside)
            for path in sorted(aside.iterdir()):
                if path.is_dir():  # the codec; a folder replaces none that holds something
                    shutil.rmtree(folder / path.name, ignore_errors=True)
                os.replace(path, folder / path.name)
            aside.rmdir()
    trainer.accelerator.wait_for_everyone()


def _push(trainer: CreatureTrainer, folder: Path) -> None:
    """Upload the finished folder of the run with card and plots; a failure is printed with the command to repeat it."""
    args = trainer.args
    name = trainer.hub_model_id
    try:
        commit = huggingface_hub.HfApi().upload_folder(
            repo_id=name, folder_path=folder, token=args.hub_token, revision=args.hub_revision,
            ignore_patterns=NOT_PUSHED, commit_message=f"End of training, step {trainer.state.global_step}",
        )  # fmt: skip
    except Exception as error:  # of many types: network, rights, quota
        left_out = " ".join(f"--exclude {shlex.quote(pattern)}" for pattern in NOT_PUSHED)
        command = f"hf upload {name} {shlex.quote(str(folder))} . {left_out}"
        print(f"not pushed ({first_line(error)}); later: {command}", flush=True)
    else:
        print(f"pushed: {commit.commit_url}", flush=True)


def _plain_model(trainer: CreatureTrainer, folder: Path):
    """The trained model without wrappers and autocast; under FSDP, which shards it, the one that was just saved."""
    if trainer.is_fsdp_enabled:
        return load_model(folder, str(trainer.args.device))
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False, keep_torch_compile=False)


def check_saved(model, checkpoint: Path, batch: dict) -> None:
    """Read a checkpoint back from the disk and compare its logits with the model's, bit for bit, on the CPU."""
    batch = spread_pictures(batch)
    batch = {name: value[:, :256] for name, value in batch.items() if name not in (*TARGETS, "cu_seq_lens_q")}
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    trained = (model if model.device.type == "cpu" else copy.deepcopy(model).cpu()).eval()
    with torch.no_grad():
        same = torch.equal(trained(**batch).logits.float(), loaded(**batch).logits.float())
    if not same:
        raise UserError(
            f"the model read back from {checkpoint} gives other logits than the trained one: report this bug"
        )


def _plot(folder: Path) -> None:
    from creature.plots import plot_runs, plot_senses

    figures = {"loss.png": lambda path: plot_runs([folder], path), "senses.png": lambda path: plot_senses(folder, path)}
    if any("tokens_per_second" in entry for entry in checkpoints.read_metrics(folder)):  # in no run of a few steps
        figures["throughput.png"] = lambda path: plot_runs([folder], path, ("tokens_per_second", "mfu"))
    for name, draw in figures.items():
        try:
            draw(folder / name)
        except Exception as error:  # the run is finished, with or without plots
            print(f"{name} was not drawn: {error}", flush=True)


def resume_command(command: str) -> str:
    """The command of a run with --resume; flags that only a new run takes are left out."""
    new_run_only = {"--overwrite_output_dir", "--overwrite-output-dir", "--accept_changes", "--accept-changes"}
    words = [word for word in shlex.split(command) if word not in new_run_only]
    return shlex.join(words if "--resume" in words else [*words, "--resume"])
