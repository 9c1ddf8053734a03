"""Settings: the YAML file first, flags on top, and every mistake at once, in words, without heavy imports."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from creature.checkpoints import check_output
from creature.errors import UserError
from creature.settings import DEFAULT_CONFIG, DRY_RUN_FOLDER, PROJECT, known_fields, parse_settings

SCRIPT = PROJECT / "run_clm_creature.py"


def write(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flags_override_the_file_and_the_file_overrides_the_defaults(tmp_path):
    config = write(tmp_path, "model:\n  hidden_size: 64\n  num_hidden_layers: 3\ntraining:\n  learning_rate: 6e-4\n")
    settings = parse_settings(["--config", config, "--num-hidden-layers", "2", "--max_steps=50"])
    assert settings.model == {"hidden_size": 64, "num_hidden_layers": 2}
    assert settings.training["learning_rate"] == 6e-4  # YAML 1.1 reads 6e-4 as text
    assert settings.training["max_steps"] == 50
    assert settings.given == {"num_hidden_layers", "max_steps"}
    assert not settings.dry_run


def test_every_kind_of_value_arrives_in_its_type(tmp_path):
    config = write(tmp_path, "training: {report_to: [tensorboard], bf16: true, run_name: null, save_total_limit: 2}\n")
    settings = parse_settings([
        "--config", config, "--tf32", "--no_logging_first_step", "--loss_weights", "{internal_text: 1.0}",
        "--eval_steps", "0.1", "--warmup_steps", "20", "--run_name", "night", "--fp16", "false",
    ])  # fmt: skip
    training = settings.training
    assert training["report_to"] == ["tensorboard"] and training["bf16"] is True and training["tf32"] is True
    assert training["logging_first_step"] is False and training["fp16"] is False
    assert settings.model["loss_weights"] == {"internal_text": 1.0}
    assert training["eval_steps"] == 0.1 and training["warmup_steps"] == 20 and training["run_name"] == "night"


def test_all_problems_are_reported_at_once_with_the_nearest_name(tmp_path):
    config = write(
        tmp_path,
        "model:\n  hiden_size: 64\n  num_hidden_layers: many\n  n_head: 4\n  ffn_hidden_size: 256\n"
        "  attention_dropout: 3\n  vocab_size: 0\n"
        "training:\n  max_steps: true\n  hidden_size: 3\n  use_liger_kernel: true\nlogging:\n  level: 3\n",
    )
    with pytest.raises(UserError) as caught:
        parse_settings(["--config", config, "--learning-rat", "1", "--save_steps", "often"])
    text = str(caught.value)
    for part in (
        "hiden_size (did you mean hidden_size?)",
        "num_hidden_layers must be a whole number, not 'many'",
        "n_head (did you mean num_attention_heads?)",
        "ffn_hidden_size (did you mean intermediate_size?)",
        "attention_dropout must lie between 0 and 1, not 3",
        "vocab_size must be at least 1, not 0",
        "max_steps must be a whole number, not true",
        "hidden_size belongs under model:",
        "use_liger_kernel",
        "unknown section 'logging'",
        "--learning-rat (did you mean learning_rate?)",
        "save_steps must be a number, not 'often'",
    ):
        assert part in text, part


def test_a_number_without_a_point_is_one_in_a_mapping_too(tmp_path):
    # YAML 1.1 reads 1e-5 as text.
    flags = ["--lr_scheduler_kwargs", "{min_lr: 1e-5, num_cycles: 2}", "--loss_weights", '{"internal_text": 1E-1}']
    config = write(tmp_path, "training:\n  lr_scheduler_kwargs: {min_lr: 1e-5, num_cycles: 2}\n  run_name: '1e5'\n")
    for settings in (parse_settings(flags), parse_settings(["--config", config])):
        assert settings.training["lr_scheduler_kwargs"] == {"min_lr": 1e-5, "num_cycles": 2}
    assert (
        settings.training["run_name"] == "1e5" and parse_settings(flags).model["loss_weights"]["internal_text"] == 0.1
    )


BAD_VALUES = {
    "--seed -1": "seed must be at least 0 and below 2**32, not -1",
    "--data_seed 4294967296": "data_seed must be at least 0 and below 2**32",
    "--adam_beta1 1.5": "adam_beta1 must be at least 0 and below 1, not 1.5",
    "--adam_beta2 1": "adam_beta2 must be at least 0 and below 1",
    "--adam_epsilon 0": "adam_epsilon must be greater than 0",
    "--num_train_epochs nan": "num_train_epochs must be greater than 0",
    "--per_device_eval_batch_size 0": "per_device_eval_batch_size must be greater than 0",
    "--eval_delay -1": "eval_delay must be 0 or more",
    "--neftune_noise_alpha -1": "neftune_noise_alpha must be 0 or more",
    "--cpu_threads 100000000000": "cpu_threads must be at most 65,536",
    "--train_sampling_strategy by_lot": "train_sampling_strategy must be one of random, sequential",
    "--lr_scheduler_kwargs min_lr=1": "lr_scheduler_kwargs must be a mapping",
    "--fsdp_config nowhere.json": "fsdp_config nowhere.json is no file",
    "--deepspeed zero.json": "deepspeed has no place here",
    "--metric_for_best_model bleu": "metric_for_best_model must be one of loss, perplexity, bits_per_byte, accuracy",
    "--optim sgd": "optim has no effect beside Muon",
    "--prompt Once\udcc3": "prompt holds half a character at position 4",  # a byte that is no UTF-8
    "--dataloader_persistent_workers": "dataloader_persistent_workers is for worker processes",
}


def test_every_value_that_cannot_be_is_told_at_once(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as `accelerate launch --use_deepspeed` does
    with pytest.raises(UserError) as caught:
        parse_settings(" ".join(BAD_VALUES).split())
    text = str(caught.value)
    assert text.startswith(f"{len(BAD_VALUES) + 1} problems") and "accelerate is set to start DeepSpeed" in text
    for part in BAD_VALUES.values():
        assert part in text, part
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    assert parse_settings(["--data", "old\udcc3.txt"]).data.data == "old\udcc3.txt"  # a file name may be any bytes


def test_the_best_checkpoint_is_the_one_of_the_better_metric():
    with pytest.raises(UserError, match="save_strategy best needs to know by what: give --metric_for_best_model"):
        parse_settings(["--save_strategy", "best"])
    with pytest.raises(UserError, match="greater_is_better true would take the worst perplexity for the best"):
        parse_settings(["--metric_for_best_model", "eval_perplexity", "--greater_is_better"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("- a\n- b\n", "must be a mapping"),
        ("model: [1, 2]\n", "must be a mapping of fields"),
        ("model: {hidden_size: 64\n", "line 2 is not valid YAML"),
        ("model:\n  hidden_size: 64\n  hidden_size: 32\n", "occurs twice"),
        ("model:\n  hidden_size: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("training: {tokens_per_step: -1}\n", "must be greater than 0"),
        ("training: {max_steps: 100, num_train_epochs: 2}\n", "give one of them"),
        ("data: {block_size: 4096}\n", "longer than max_position_embeddings 2048: lower the one"),
        ("model: {use_value_embeddings: true}\n", "use_value_embeddings: the tables.*are gone, leave it out"),
    ],
)
def test_broken_files_are_named_in_words(tmp_path, content, words):
    with pytest.raises(UserError, match=words):
        parse_settings(["--config", write(tmp_path, content)])


def test_a_missing_file_and_a_binary_one(tmp_path):
    with pytest.raises(UserError, match="no configuration file"):
        parse_settings(["--config", str(tmp_path / "nowhere.yaml")])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="UTF-8|not valid YAML"):
        parse_settings(["--config", str(tmp_path / "binary.yaml")])


def test_ten_steps_are_a_dry_run_unless_a_folder_is_named():
    assert parse_settings(["--max_steps", "10"]).training["output_dir"] == DRY_RUN_FOLDER
    assert parse_settings(["--dry-run"]).training["max_steps"] == 10
    named = parse_settings(["--max_steps", "10", "--output_dir", "elsewhere"])
    assert not named.dry_run and named.training["output_dir"] == "elsewhere"
    assert not parse_settings(["--max_steps", "11"]).dry_run
    with pytest.raises(UserError, match="--resume"):
        parse_settings(["--dry_run", "--resume"])
    with pytest.raises(UserError, match="dry run has 10 steps"):
        parse_settings(["--dry_run", "--max_steps", "500"])


@pytest.mark.parametrize("as_flags", [True, False])
def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch, as_flags):
    # No shell expands the one of --output_dir=~/run, or in a YAML file.
    for name in ("HOME", "USERPROFILE"):  # the latter is that of Windows
        monkeypatch.setenv(name, str(tmp_path))
    paths = {
        "data": {"data": ["~/a.bin:0.7", "~/b.bin:0.3"], "tokenizer_name": "~/tokenizer", "cache_dir": "~/cache"},
        "training": {"output_dir": "~/run", "fsdp_config": "~/fsdp.json", "accelerator_config": "~/accelerator.json"},
    }
    for name in ("fsdp.json", "accelerator.json"):
        (tmp_path / name).write_text("{}")
    write(tmp_path, yaml.safe_dump({"model": {"hidden_size": 64}} | ({} if as_flags else paths)))
    flags = ["--config=~/config.yaml"]
    for name, value in (paths["data"] | paths["training"]).items() if as_flags else ():
        flags += [f"--{name}={value}"] if isinstance(value, str) else [f"--{name}", *value]
    settings = parse_settings(flags)
    assert settings.model == {"hidden_size": 64}
    found = {name: getattr(settings.data, name) for name in paths["data"]} | settings.training
    expected = paths["data"] | paths["training"]
    assert found == yaml.safe_load(yaml.safe_dump(expected).replace("~", str(tmp_path)))
    resumed = parse_settings([*flags, "--resume=~/run/checkpoint-5"])
    assert resumed.resume == f"{tmp_path}/run/checkpoint-5"

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"status": "finished", "must_match": {}}')
    with pytest.raises(UserError, match="holds a finished run"):
        check_output(settings)


def test_epochs_given_as_a_flag_replace_the_steps_of_the_file():
    settings = parse_settings(["--num_train_epochs", "2"])
    assert settings.training["num_train_epochs"] == 2 and "max_steps" not in settings.training


def test_the_field_table_is_the_dataclasses_own():
    from dataclasses import fields

    from configuration_creature import CreatureConfig
    from creature.settings import DataArguments
    from creature.training_arguments import CreatureTrainingArguments

    known = known_fields()
    names = {f.name for f in fields(CreatureTrainingArguments)} - {"use_cache"}
    assert {name for name, info in known.items() if info.section == "training"} == names
    assert {name for name, info in known.items() if info.section == "data"} == {f.name for f in fields(DataArguments)}
    assert set(CreatureConfig.__annotations__) == {n for n, info in known.items() if info.section == "model"}


@pytest.mark.parametrize("path", sorted((PROJECT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_are_valid_and_state_their_true_size(path):
    from configuration_creature import CreatureConfig
    from creature.estimate import count_parameters

    settings = parse_settings(["--config", str(path)])
    counts = count_parameters(CreatureConfig(**settings.model))
    line = (
        f"# Parameters: {counts['total']:,} in all, {counts['text_only']:,} of them text only "
        f"(token table {counts['token_table']:,}, body {counts['body']:,})."
    )
    assert line in path.read_text().splitlines()


def test_the_default_configuration_is_the_guides():
    values = yaml.safe_load(DEFAULT_CONFIG.read_text())
    model, training = values["model"], values["training"]
    assert (model["num_hidden_layers"], model["hidden_size"], model["num_attention_heads"]) == (6, 512, 8)
    assert (model["intermediate_size"], model["max_position_embeddings"]) == (2048, 2048)
    assert training["tokens_per_step"] == 32 * 2048 and training["max_steps"] == 31250
    assert (training["logging_steps"], training["save_steps"]) == (100, 5000)


def test_help_and_a_wrong_flag_answer_without_heavy_imports():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['run_clm_creature.py'] + sys.argv[1:]\n"
        f"try:\n    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    heavy = [name for name in ('torch', 'transformers', 'datasets', 'accelerate') if name in sys.modules]\n"
        "    print('exit', end.code, 'heavy', heavy)\n"
    )
    for flag, exit_code in (("--help", 0), ("--no_such_flag", 1)):
        done = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True, cwd=PROJECT)
        assert f"exit {exit_code} heavy []" in done.stdout, done.stdout[-300:] + done.stderr
    assert "unknown flag --no_such_flag" in done.stderr and "Traceback" not in done.stderr
