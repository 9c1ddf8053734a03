"""The job as a user runs it, on a micro creature: dry run, real run, resume, and every bad input."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from creatures import MICRO
from safetensors.torch import load_file
from test_checkpoints import held_by_another_process

import run_clm_creature
from creature import checkpoints
from creature.errors import UserError

PROJECT = Path(run_clm_creature.__file__).parent


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to run in, with a micro configuration and 2,000 tokens that can be learned."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "micro.yaml").write_text(yaml.safe_dump(MICRO))
    ids = np.random.default_rng(0).integers(0, 40, 2000).cumsum() % 300
    ids.astype(np.uint16).tofile(tmp_path / "corpus.bin")
    return tmp_path


def run(monkeypatch, *flags):
    """The whole script in this process."""
    command = ["run_clm_creature.py", "--config", "micro.yaml", "--data", "corpus.bin", *map(str, flags)]
    monkeypatch.setattr(sys, "argv", command)
    assert run_clm_creature.main() == 0


def start(*flags, launcher=(), **options):
    command = [*(launcher or [sys.executable]), str(PROJECT / "run_clm_creature.py"), "--config", "micro.yaml"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return subprocess.Popen(
        [*command, "--data", "corpus.bin", *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, **options,
    )  # fmt: skip


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_same_weights(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def curve(folder, key="loss"):
    return {entry["step"]: entry[key] for entry in checkpoints.read_metrics(folder) if key in entry}


def test_a_run_says_what_it_waits_for_until_the_first_step(place, monkeypatch, capsys):
    run(monkeypatch, "--max_steps", 2)
    output = capsys.readouterr().out
    waits = ["loading torch", "opening the data", "building the model", "the first step", "first step done", "\nstep "]
    places = [output.index(text) for text in waits]
    assert places == sorted(places) and output.count("first step done") == 1
    described = checkpoints.read_run(place / "checkpoints" / "dry_run")
    assert described["seconds_to_first_step"] > 0


def test_a_dry_run_checks_everything_and_can_be_repeated(place, monkeypatch, capsys):
    (place / "checkpoints" / "text_only").mkdir(parents=True)
    keep = place / "checkpoints" / "text_only" / "precious"
    keep.write_text("a real run")
    for _ in range(2):
        run(monkeypatch, "--max_steps", 10)
        output = capsys.readouterr().out
        assert "dry run passed" in output and "no sense yet: Once upon a time" in output
    assert keep.read_text() == "a real run"
    folder = place / "checkpoints" / "dry_run"
    described = json.loads((folder / "run.json").read_text())
    assert described["dry_run"] == "passed" and described["status"] == "finished" and described["kind"] == "dry_run"
    counted = sum(value.numel() for value in weights(folder).values())
    assert described["parameters"]["total"] == counted > described["parameters"]["trainable"] > 0
    for name in ("loss.png", "throughput.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    card = (folder / "README.md").read_text()
    assert "validation loss" in card and "trust_remote_code" in card
    assert "micro-batch 2 x block 32 x accumulation" in output and "parameters" in output

    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "assert not any(name.endswith('_creature') for name in sys.modules)\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(type(model).__name__, len(AutoTokenizer.from_pretrained(sys.argv[1])))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(folder)], cwd=place, capture_output=True, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hf")},
    )  # fmt: skip
    assert done.stdout.startswith("MultiModalCreature 50259"), done.stderr[-500:]


def test_a_stopped_run_resumes_to_the_same_weights_and_the_same_log(place, monkeypatch, capsys):
    run(monkeypatch, "--max_steps", 12, "--output_dir", "whole")
    process = None
    monkeypatch.setattr("creature.callbacks.StopSignals.poll", lambda self: bool(process))

    def stop(self, args, state, control, **kwargs):
        nonlocal process
        process = state.global_step == 5
        return original(self, args, state, control, **kwargs)

    from creature.callbacks import StopSignals

    original = StopSignals.on_step_end
    monkeypatch.setattr(StopSignals, "on_step_end", stop)
    run(monkeypatch, "--max_steps", 12, "--output_dir", "broken")
    assert "stopped after step 5 and saved; resume with: " in capsys.readouterr().out
    assert json.loads(Path("broken/run.json").read_text())["status"] == "stopped"
    monkeypatch.setattr(StopSignals, "on_step_end", original)
    process = None
    with pytest.raises(UserError, match="unfinished run with checkpoint-5.*--resume"):
        run(monkeypatch, "--max_steps", 12, "--output_dir", "broken")
    truncated = Path("broken/checkpoint-9")
    truncated.mkdir()
    Path("broken/run.json").write_bytes(Path("broken/run.json").read_bytes()[:1000])
    run(monkeypatch, "--max_steps", 12, "--output_dir", "broken", "--resume")
    output = capsys.readouterr().out
    assert "skipped checkpoint-9" in output and "its copy in a checkpoint is read" in output
    assert json.loads(Path("broken/run.json").read_text())["status"] == "finished"
    assert_same_weights("whole", "broken")
    assert curve("whole") == curve("broken")


def test_a_signal_in_the_last_step_costs_neither_the_evaluation_nor_the_model(place, monkeypatch):
    from creature.callbacks import StopSignals
    from creature.trainer import CreatureTrainer

    run(monkeypatch, "--max_steps", 6, "--output_dir", "whole")
    original = StopSignals.on_step_end

    def signal_at_the_end(self, args, state, control, **kwargs):
        self.requested = "SIGTERM" if state.global_step == 6 else ""
        return original(self, args, state, control, **kwargs)

    def leave(self):
        raise SystemExit(143)  # as a second signal would

    monkeypatch.setattr(StopSignals, "on_step_end", signal_at_the_end)
    run(monkeypatch, "--max_steps", 6, "--output_dir", "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(CreatureTrainer, "make_up_evaluation", leave)
        with pytest.raises(SystemExit):
            run(patch, "--max_steps", 6, "--output_dir", "twice")
    assert not curve("twice", "eval_loss") and not Path("twice/model.safetensors").exists()
    run(monkeypatch, "--max_steps", 6, "--output_dir", "twice", "--resume")
    for folder in ("stopped", "twice"):
        assert checkpoints.read_run(folder)["status"] == "finished"
        assert curve(folder, "eval_loss") == curve("whole", "eval_loss") and curve(folder) == curve("whole")
        assert_same_weights(folder, "whole")


def test_a_finished_run_is_extended_as_if_it_had_been_longer_from_the_start(place, monkeypatch):
    # Its first steps are those that a share of the shorter length says.
    run(monkeypatch, "--max_steps", 12, "--output_dir", "short", "--logging_steps", 1, "--batch_warmup_steps", 0.25)
    with pytest.raises(UserError, match="has its 12 steps already"):
        run(monkeypatch, "--max_steps", 12, "--output_dir", "short", "--resume")
    run(monkeypatch, "--max_steps", 16, "--output_dir", "short", "--logging_steps", 1, "--resume")
    run(monkeypatch, "--max_steps", 16, "--output_dir", "long", "--logging_steps", 1, "--batch_warmup_steps", 3)
    assert_same_weights("short", "long")
    rates = curve("short", "learning_rate")
    assert rates == curve("long", "learning_rate")
    assert all(abs(rates[step] - rates[step - 1]) <= 0.5e-2 for step in range(2, 17))


def test_what_differs_from_the_run_to_resume_is_spelled_out(place, monkeypatch, capsys):
    run(monkeypatch, "--max_steps", 12, "--output_dir", "a", "--save_steps", 4)
    saved = json.loads(Path("a/run.json").read_text())
    checkpoints.write_run("a", saved | {"status": "stopped"})
    for path in ("a/checkpoint-12", "a/checkpoint-9"):
        if Path(path).exists():
            checkpoints.shutil.rmtree(path)
    again = ("--max_steps", 12, "--output_dir", "a", "--resume")
    with pytest.raises(UserError, match="micro_batch was 2 and is now 1"):
        run(monkeypatch, *again, "--per_device_train_batch_size", 1)
    with pytest.raises(UserError, match="adam_beta2 was 0.98 and is now 0.99; adam_epsilon was 1e-10 and is now 1e-08"):
        run(monkeypatch, *again, "--adam_beta2", 0.99, "--adam_epsilon", 1e-8)
    with pytest.raises(UserError, match="learning_rate was 0.01 and is now 0.001.*--accept_changes"):
        run(monkeypatch, *again, "--learning_rate", 1e-3)
    with pytest.raises(UserError, match="another configuration: model.intermediate_size was 32 and is now 64"):
        run(monkeypatch, *again, "--intermediate_size", 64)
    other = np.fromfile("corpus.bin", dtype=np.uint16)[::-1]
    other.tofile("corpus.bin")
    with pytest.raises(UserError, match="data_hash was"):
        run(monkeypatch, *again)
    other[::-1].tofile("corpus.bin")
    run(monkeypatch, *again, "--learning_rate", 1e-3, "--accept_changes")
    assert "accepted: learning_rate" in capsys.readouterr().out
    assert curve("a", "learning_rate")[12] < 1e-3


def test_documents_kept_apart_change_the_run_and_stay_so_when_it_resumes(place, monkeypatch, capsys):
    run(monkeypatch, "--max_steps", 1, "--separate_documents")
    assert "separate_documents has no effect" in capsys.readouterr().out
    ids = np.fromfile("corpus.bin", dtype=np.uint16)
    ids[::7] = 50256
    ids.tofile("corpus.bin")
    settings = ("--max_steps", 12, "--logging_steps", 1, "--save_steps", 4, "--eval_steps", 12)
    run(monkeypatch, *settings, "--output_dir", "plain")
    assert "kept apart" not in capsys.readouterr().out
    run(monkeypatch, *settings, "--output_dir", "apart", "--separate_documents")
    output = capsys.readouterr().out
    assert ", documents kept apart\n" in output and "no effect" not in output
    assert curve("apart")[1] != curve("plain")[1] and curve("apart", "tokens") == curve("plain", "tokens")
    assert curve("apart", "eval_loss")[12] != curve("plain", "eval_loss")[12]

    described = json.loads(Path("apart/run.json").read_text())
    assert described["must_match"]["separate_documents"] is True
    checkpoints.write_run("apart", described | {"status": "stopped"})
    checkpoints.shutil.rmtree("apart/checkpoint-12")
    shortened = (*settings, "--output_dir", "apart", "--resume")
    with pytest.raises(UserError, match="separate_documents was True and is now False"):
        run(monkeypatch, *shortened)
    before = weights("apart")
    run(monkeypatch, *shortened, "--separate_documents")
    assert all(torch.equal(value, before[name]) for name, value in weights("apart").items())


def test_a_run_into_a_folder_that_another_one_writes_to_is_refused(place, monkeypatch):
    (place / "out").mkdir()
    with held_by_another_process("out"), pytest.raises(UserError, match="another run is writing"):
        run(monkeypatch, "--max_steps", 12, "--output_dir", "out")
    assert not any((place / "out").glob("[!.]*"))
    run(monkeypatch, "--max_steps", 12, "--output_dir", "out")
    assert checkpoints.read_run("out")["status"] == "finished" and sorted(curve("out")) == [1, 3, 6, 9, 12]


def test_a_final_model_that_cannot_be_written_is_told_and_written_by_the_next_resume(place, monkeypatch):
    from creature.trainer import CreatureTrainer

    real = CreatureTrainer.save_model

    def full(self, folder, _internal_call=False):
        if Path("out/checkpoint-12").exists():  # the last checkpoint is written, the final model follows
            raise Exception("No space left on device (os error 28)")
        real(self, folder, _internal_call)

    with monkeypatch.context() as patch:
        patch.setattr(CreatureTrainer, "save_model", full)
        with pytest.raises(UserError, match="the disk is full.*--resume from checkpoint-12, which is intact"):
            run(patch, "--max_steps", 12, "--output_dir", "out")
    assert not Path("out/model.safetensors").exists()
    run(monkeypatch, "--max_steps", 12, "--output_dir", "out", "--resume")
    assert_same_weights("out", "out/checkpoint-12")


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send SIGTERM to be caught")
def test_sigterm_saves_and_leaves_with_0_and_the_way_to_go_on(place):
    process = start("--max_steps", 5000, "--output_dir", "run", "--logging_steps", 1)
    for line in process.stdout:
        if line.startswith("step      2/"):
            break
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "saved; resume with:" in output and "--resume" in output
    newest, skipped = checkpoints.newest_complete("run")
    assert newest is not None and not skipped


def test_errors_end_in_one_sentence_and_exit_code_1(place):
    process = start("--max_steps", 10, "--data", "nowhere.bin")
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 1, errors
    # Beside what other libraries say when they are loaded:
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "nowhere.bin" in lines[0]
    assert "Traceback" not in errors
    assert not (place / "checkpoints").exists()


def test_a_failing_rank_ends_all_of_them(place):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", "--quiet"]
    process = start("--max_steps", 10, "--data", "nowhere.bin", launcher=launcher)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 1 and "Traceback" not in errors
    assert "error: " in errors and "nowhere.bin" in errors


def test_a_process_whose_partner_has_ended_says_that_alone(monkeypatch, capsys):
    def main():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:33413.")

    with pytest.raises(RuntimeError):
        run_clm_creature.launch.run(main)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as caught:
        run_clm_creature.launch.run(main)
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("error: another process of this run has ended")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "empty.bin"], "empty"),
        (["--data", "odd.bin"], "odd"),
        (["--data", "large.bin"], "id 60000 at position 3"),
        (["--data", "short.bin"], "block"),
        (["--data", "latin.txt"], "UTF-8"),
        (["--data", "list.pt"], "list.pt"),
        (["--hidden_size", "17"], "hidden_size"),
        (["--vocab_size", "100"], "vocab"),
        (["--use_cpu", "false"], "there is none"),
        (["--lr_scheduler_type", "linar"], "linar"),
        (["--fp16"], "fp16"),
        (["--per_device_train_batch_size", "3"], "does not divide the 4 blocks"),
        (["--tokens_per_step", "100"], "--tokens_per_step 96"),
        (["--output_dir", "corpus.bin"], "is a file"),
        (["--tokenizer_name", "no_tokenizer"], "tokenizer"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(place, monkeypatch, flags, words):
    if "--use_cpu" in flags and (torch.cuda.is_available() or torch.backends.mps.is_available()):
        pytest.skip("--use_cpu false is no bad input where there is a GPU")
    Path("empty.bin").write_bytes(b"")
    Path("odd.bin").write_bytes(b"\x01\x00\x02")
    np.array([1, 2, 3, 60000] * 100, dtype=np.uint16).tofile("large.bin")
    np.arange(20, dtype=np.uint16).tofile("short.bin")
    Path("latin.txt").write_bytes(b"caf\xe9 \xff\xfe" * 200)
    torch.save([1, 2, 3], "list.pt")
    Path("no_tokenizer").mkdir()
    with pytest.raises(UserError) as caught:
        run(monkeypatch, "--max_steps", 20, "--output_dir", "out", *flags)
    assert words in str(caught.value)
    assert not Path("out").exists()


def test_what_does_not_work_here_is_told_at_once_and_before_the_data_is_opened(place, monkeypatch):
    monkeypatch.setattr("creature.plan.compiler_available", lambda device: (True, "as on most machines"))
    with pytest.raises(UserError) as caught:
        run(
            monkeypatch, "--data", "nowhere.bin", "--matrix_learning_rate", 0, "--optim", "adamw_torch_xla",
            "--lr_scheduler_type", "cosine_with_min_lr", "--report_to", "nobody", "--log_level", "loud",
            "--torch_compile_mode", "fastest", "--max_steps", 20,
        )  # fmt: skip
    text = str(caught.value)
    assert text.startswith("5 problems") and "nowhere.bin" not in text
    for words in (
        "--optim adamw_torch_xla does not work here (Trainer failed to import",
        "--lr_scheduler_type cosine_with_min_lr does not work (One of min_lr or min_lr_rate",
        "--report_to nobody does not work here",
        "log_level must be one of detail, debug, info",
        "torch.compile does not work as set (Unrecognized mode=fastest",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("polynomial", "{lr_end: -1}", "its rate at step 10 is -0.43"),
        ("inverse_sqrt", "{timescale: 0}", "division by zero"),
        ("warmup_stable_decay", "{cycles: 2}", "unexpected keyword argument 'cycles'"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(place, monkeypatch, kind, options, reason):
    with pytest.raises(UserError, match=f"--lr_scheduler_type {kind} does not work.*{reason}"):
        run(monkeypatch, "--max_steps", 20, "--lr_scheduler_type", kind, "--lr_scheduler_kwargs", options)


def test_the_smallest_rate_of_a_schedule_and_the_best_checkpoint_are_as_asked_for(place, monkeypatch):
    run(
        monkeypatch, "--max_steps", 4, "--lr_scheduler_type", "cosine_with_min_lr", "--warmup_steps", 0,
        "--lr_scheduler_kwargs", "{min_lr: 4e-3}", "--output_dir", "out", "--logging_steps", 1, "--eval_steps", 1,
        "--metric_for_best_model", "perplexity", "--adam_beta1", 0,
    )  # fmt: skip
    rates = curve("out", "learning_rate")
    assert rates[1] == pytest.approx(1e-2) and 4e-3 < rates[4] < 5e-3
    state = json.loads(Path("out/checkpoint-4/trainer_state.json").read_text())
    assert state["best_metric"] == min(curve("out", "eval_perplexity").values())


def test_a_run_that_is_about_to_repeat_its_data_says_so(place, monkeypatch, capsys):
    settings = ("--eval_strategy", "no", "--decay_steps", 10, "--max_steps", 20)
    run(monkeypatch, "--output_dir", "once", *settings)
    assert "the data will be seen" not in capsys.readouterr().out
    run(monkeypatch, "--output_dir", "often", "--train_tokens", 480, *settings)
    output = " ".join(capsys.readouterr().out.split())
    assert "the data will be seen 5." in output and "overfits" in output


def test_out_of_memory_names_the_batch_that_fits(place, monkeypatch):
    from creature.trainer import CreatureTrainer

    def explode(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(CreatureTrainer, "train", explode)
    with pytest.raises(UserError, match="micro-batch 4: use --per_device_train_batch_size [12] "):
        run(monkeypatch, "--max_steps", 20, "--output_dir", "out", "--per_device_train_batch_size", 4)


def test_without_validation_text_nothing_is_evaluated_and_that_is_said(place, monkeypatch, capsys):
    flags = ("--max_steps", 2, "--output_dir", "out", "--eval_on_start", "true")
    run(monkeypatch, *flags, "--validation_fraction", "0.0")
    assert "no validation text" in capsys.readouterr().out
    assert not curve("out", "eval_loss")
    run(monkeypatch, *flags, "--eval_strategy", "no", "--overwrite_output_dir")
    assert not curve("out", "eval_loss")
    capsys.readouterr()
    run(monkeypatch, *flags, "--overwrite_output_dir")
    assert "not drawn" not in capsys.readouterr().out  # of a speed that is not known yet
    assert sorted(curve("out", "eval_loss")) == [0, 2]
    with pytest.raises(UserError, match="no validation text, so neither the best checkpoint nor a schedule"):
        run(monkeypatch, "--max_steps", 2, "--lr_scheduler_type", "reduce_lr_on_plateau", "--validation_fraction", 0)


def test_float8_for_the_head_is_said_and_kept_in_mind(place, monkeypatch, capsys):
    monkeypatch.setattr("creature.report._float8_head", lambda plan, config: True)  # as on a Hopper GPU
    said = "the head in float8"
    run(monkeypatch, "--max_steps", 4, "--output_dir", "fp32")
    assert said not in capsys.readouterr().out and not checkpoints.read_run("fp32")["must_match"]["fp8_head"]
    run(monkeypatch, "--max_steps", 4, "--output_dir", "bf16", "--bf16")
    assert said in capsys.readouterr().out and checkpoints.read_run("bf16")["must_match"]["fp8_head"]
    with pytest.raises(UserError, match="fp8_head was True and is now False"):
        run(monkeypatch, "--max_steps", 8, "--output_dir", "bf16", "--bf16", "--fp8_head", "false", "--resume")
