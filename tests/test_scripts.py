"""The tools at the command line: what they print, where, and how they refuse. One micro run serves them all."""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from creatures import load_script

from configuration_creature import CreatureConfig
from creature import checkpoints
from creature.data.text.tokenizer import load_tokenizer
from creature.errors import UserError
from modeling_creature import MultiModalCreature

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
TOOLS = (
    "tokenize_corpus",
    "train_tokenizer",
    "collect_shards",
    "make_sample_corpus",
    "estimate",
    "plot_run",
    "generate_text",
    "demo",
    "live",
    "evaluate_text",
    "evaluate_recordings",
    "inspect_corpus",
    "import_recordings",
    "train_codec",
    "export",
    "check_environment",
)
MICRO = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "sense_hidden_size": 8,
    "max_position_embeddings": 64,
    "num_touch_points": 8,
    "vision_channels": [4, 8, 12, 24],
    "depth_hidden_size": 16,
    "audio_codebook_size": 32,
}
MICRO_FLAGS = [word for name, value in MICRO.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run with two checkpoints and a final model, as the training job leaves it, of an untrained micro creature."""
    folder = tmp_path_factory.mktemp("runs") / "text_only"
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    for name in ("checkpoint-5", "checkpoint-10", "."):
        place = folder / name
        model = MultiModalCreature(CreatureConfig(**MICRO))
        with torch.no_grad():  # so that what is read changes what is said
            model.model.layers[0].self_attn.o_proj.weight.mul_(50)
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        if name != ".":
            for needed in checkpoints.NEEDED_FILES:
                (place / needed).write_text(json.dumps({"global_step": checkpoints.step_of(place)}))
            checkpoints.seal_checkpoint(place)
    config = json.loads(json.dumps(model.config.to_dict(), default=str))
    run = {
        "must_match": {"model": config},
        "kind": "dry_run",
        "dry_run": "passed",
        "status": "finished",
        "steps_done": 20,
    }
    checkpoints.write_run(folder, run)
    lines = [{"step": step, "tokens": step * 64, "time": step, "loss": 11 - step / 10} for step in range(1, 21)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "story.txt"
    path.write_text("Once upon a time a fox met a hen by the river. " * 40, encoding="utf-8")
    return path


@pytest.fixture
def tool(run_script):
    return run_script


@pytest.mark.parametrize("name", TOOLS)
def test_help_answers_without_heavy_imports(name, tmp_path):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{name}.py', '--help']\n"
        f"try:\n    runpy.run_path({str(SCRIPTS / name) + '.py'!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    heavy = [name for name in ('torch', 'transformers', 'datasets', 'matplotlib') if name in sys.modules]\n"
        "    print('exit', end.code, 'heavy', heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "examples:" in done.stdout and "exit 0 heavy []" in done.stdout and not done.stderr, done.stderr


@pytest.mark.parametrize("folder", [SCRIPTS, SCRIPTS.with_name("benchmarks")], ids=lambda folder: folder.name)
def test_a_tilde_is_the_home_folder_in_every_path(folder, tmp_path, monkeypatch):
    """Whatever takes text either expands it or is listed here."""
    no_paths = {"prompt", "host", "card", "text_column", "variants"}
    no_paths |= {"split_group", "validation_groups", "label_column", "license", "senses", "streams", "id", "flags"}
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(sys, "path", sys.path[:])  # which some benchmarks change
    parsers = []

    def keep(parser, *arguments):
        parsers.append(parser)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", keep)
    for script in sorted(folder.glob("*.py")):
        module = load_script(script.stem, folder)
        with pytest.raises(SystemExit):
            getattr(module, "parse_arguments", module.main)()
        for action in parsers[-1]._actions:
            if action.nargs == 0 or action.choices or action.type in (int, float) or action.dest in no_paths:
                continue
            assert action.type and action.type("~/x") == f"{tmp_path}/x", f"{script.name} {action.dest}"
    assert len(parsers) == len(list(folder.glob("*.py")))


HALF = "Once\udcc3"  # what Python makes of a byte in the command line that is no UTF-8


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("generate_text", ["--checkpoint", "RUN", "--prompt", HALF]),
        ("evaluate_text", ["--checkpoint", "RUN", "--data", "TEXT", "--all", "--prompt", HALF]),
        ("export", ["--checkpoint", "RUN", "--format", "torch", "--output", HALF]),
        ("tokenize_corpus", ["--input", "TEXT", "--output", "a.bin", "--text_column", HALF]),
        ("train_tokenizer", ["--input", "TEXT", "--output", HALF]),
    ],
)
def test_half_a_character_is_named(tool, run_folder, text_file, name, flags):
    places = {"RUN": run_folder, "TEXT": text_file}
    code, _, error = tool(name, *(places.get(flag, flag) for flag in flags))
    assert code == 1 and f"{flags[-2]} holds half a character at position 4" in error and error.count("\n") == 1


def test_half_a_character_in_the_browser_is_named():
    with pytest.raises(UserError, match="the prompt holds half a character at position 1"):
        next(load_script("demo").continue_text(None, None, "a\ud83d", 0.8, 1.0, 5))  # half of a pair


# ---------------------------------------------------------------------------------------------------------------------
# estimate, plot_run
# ---------------------------------------------------------------------------------------------------------------------


def test_estimate_prints_the_tables(tool):
    code, out, _ = tool("estimate", "--tokens", "1e9", *MICRO_FLAGS)
    assert code == 0
    for words in (
        "token table",
        "FLOPs per token",
        "= peak",
        "RTX 3090",
        "H200",
        "this machine",
        "1 B tokens",
        "assumed",
    ):
        assert words in out


def test_estimate_takes_the_runs_fields_and_cards(tool):
    hours = {}
    for layers in (2, 4):
        _, out, _ = tool(
            "estimate", "--card", "NVIDIA GeForce RTX 4090", "--num_hidden_layers", layers, "--micro_batch", 2
        )
        assert "micro-batch 2 x 2,048" in out and "RTX 3090" not in out
        hours[layers] = float(re.search(r"RTX 4090 .*?([\d.,]+)  MFU", out).group(1))
    assert hours[4] > hours[2]


def test_estimate_of_two_cards_says_what_it_assumes(tool):
    flags = ("--tokens_per_step", 131072, "--card", "H200")
    found = []
    for cards in (1, 2):
        code, out, _ = tool("estimate", *flags, "--cards", cards)
        assert code == 0
        found.append(float(re.search(r"([\d,]+)  +[\d.]+ [BT]  .*MFU", out).group(1).replace(",", "")))
    assert 1.8 < found[1] / found[0] < 2
    assert "2 x H200" in out and "NVLink 450 GB/s" in out and "micro-batch 32 x 2,048" in out
    assert "this machine" not in out and "as if it were reached" in out
    code, _, err = tool("estimate", "--cards", 3)
    assert code == 1 and "blocks of 2,048 for 3 cards: use --tokens_per_step 67584" in err


def test_estimate_refuses_in_words(tool):
    code, _, err = tool("estimate", "--card", "GTX 9")
    assert code == 1 and "unknown card 'GTX 9': use one of" in err
    assert "did you mean hidden_size" in tool("estimate", "--hiden_size", "3")[2]
    code, _, err = tool("estimate", "--num_attention_heads", "7")
    assert code == 1 and "multiple of num_attention_heads" in err
    assert "no configuration file" in tool("estimate", "--config", "nope.yaml")[2]
    assert tool("estimate", "--tokens", "0")[0] == 2
    code, _, err = tool("estimate", "--senses", "hearing")
    assert code == 1 and "unknown sense 'hearing': use some of internal_voice" in err


def test_estimate_of_a_round_with_senses(tool):
    flags = ("--senses", "audio", "--streams", "internal_text", "animation", "--tokens", "1e6")
    code, out, _ = tool("estimate", *MICRO_FLAGS, *flags)
    assert code == 0 and "FLOPs per tick" in out and "ticks/s" in out and "1 M ticks" in out
    assert "FLOPs per token" not in out and "in the batch" in out


def test_plot_run(tool, run_folder, tmp_path):
    code, out, err = tool("plot_run", run_folder, "--output", "curves.png")
    assert code == 0 and out == "curves.png\n" and not err and (tmp_path / "curves.png").is_file()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "metrics.jsonl").write_text((run_folder / "metrics.jsonl").read_text() + '{"step": 21, "lo')
    code, out, err = tool("plot_run", run_folder, broken, "--x", "tokens")
    assert code == 0 and out == "runs.png\n" and err.startswith("warning: ") and "1 of 21 lines" in err
    code, out, err = tool("plot_run", "missing")
    assert code == 1 and err.startswith("error: there is no run folder missing") and not out


# ---------------------------------------------------------------------------------------------------------------------
# generate_text
# ---------------------------------------------------------------------------------------------------------------------


def test_generate_prints_text_only_on_stdout(tool, run_folder):
    arguments = ("--checkpoint", run_folder, "--prompt", "Once upon a time", "--max_new_tokens", 5, "--seed", 3)
    code, out, err = tool("generate_text", *arguments)
    assert code == 0 and out.startswith("Once upon a time") and out.endswith("\n") and len(out) > 20
    assert "parameters" in err and "tokens/s" in err
    assert tool("generate_text", *arguments)[1] == out  # the same seed, the same text
    assert tool("generate_text", *arguments[:-1], 4)[1] != out


def test_generate_greedy_and_samples(tool, run_folder):
    base = ("--checkpoint", run_folder / "checkpoint-5", "--prompt", "The", "--max_new_tokens", 4)
    assert tool("generate_text", *base, "--greedy")[1] == tool("generate_text", *base, "--greedy")[1]
    _, out, _ = tool("generate_text", *base, "--num_samples", 3)
    assert out.count("\n---\n") == 2


def test_generate_takes_the_newest_complete_checkpoint(tool, run_folder, tmp_path):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run_folder, unfinished)
    (unfinished / "model.safetensors").unlink()
    arguments = ("--checkpoint", unfinished, "--prompt", "x", "--max_new_tokens", 2)
    assert "checkpoint-10:" in tool("generate_text", *arguments)[2]
    (unfinished / "checkpoint-10" / checkpoints.COMPLETE_FILE).unlink()
    assert "checkpoint-5:" in tool("generate_text", *arguments)[2]
    shutil.rmtree(unfinished / "checkpoint-5")
    code, _, err = tool("generate_text", *arguments)
    assert code == 1 and "no complete checkpoint" in err and "checkpoint-10" in err


def test_generate_stops_at_the_context(tool, run_folder):
    code, _, err = tool("generate_text", "--checkpoint", run_folder, "--prompt", "a " * 30, "--max_new_tokens", 500)
    assert code == 0 and "leaves room for" in err
    code, _, err = tool("generate_text", "--checkpoint", run_folder, "--prompt", "word " * 100)
    assert code == 1 and "shorten the prompt" in err


def test_generate_refuses_in_words(tool, run_folder, tmp_path):
    def refusal(folder, *arguments):
        code, out, err = tool("generate_text", "--checkpoint", folder, "--prompt", "x", *arguments)
        assert not out and "Traceback" not in err
        return code, err

    assert refusal("missing") == (
        1,
        "error: there is no folder missing: give that of a run, such as checkpoints/text_only\n",
    )
    (tmp_path / "empty").mkdir()
    assert "holds no model and no checkpoint" in refusal("empty")[1]
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal("file")[1]
    damaged = tmp_path / "damaged"
    shutil.copytree(run_folder, damaged)
    (damaged / "model.safetensors").write_bytes(b"\0" * 100)
    assert "cannot be loaded" in refusal("damaged")[1]
    (damaged / "config.json").write_text('{"model_type": "gpt2"}')
    assert "a model of type 'gpt2'" in refusal("damaged")[1]
    (damaged / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal("damaged")[1]
    assert refusal(run_folder, "--temperature", "0")[0] == 2
    assert refusal(run_folder, "--top_p", "1.5")[0] == 2
    assert refusal(run_folder, "--greedy", "--top_k", "3")[0] == 2


# ---------------------------------------------------------------------------------------------------------------------
# evaluate_text
# ---------------------------------------------------------------------------------------------------------------------


def numbers(out):
    return {line[:14].strip(): float(line[14:]) for line in out.splitlines()}


def test_evaluate_equals_the_loss_of_the_model(tool, run_folder, text_file):
    code, out, err = tool("evaluate_text", "--checkpoint", run_folder, "--data", text_file, "--batch_size", 3)
    assert code == 0 and "all of it" in err
    result = numbers(out)
    ids = torch.tensor(load_tokenizer()(text_file.read_text())["input_ids"])
    blocks = ids[: len(ids) // 64 * 64].view(-1, 64)
    model = MultiModalCreature.from_pretrained(run_folder).eval()
    with torch.no_grad():
        loss = model(input_ids=blocks, labels=blocks).loss.item()
    assert result["loss"] == pytest.approx(loss, abs=2e-4)
    assert result["perplexity"] == pytest.approx(2.718281828**loss, rel=1e-3)
    assert 0 < result["bits per byte"] < 16 and 0 <= result["accuracy"] < 0.1


def test_evaluate_keeps_documents_apart_as_the_run_did(tool, run_folder, tmp_path):
    stories = tmp_path / "stories.txt"
    animals = ("fox", "hen", "heron", "wolf", "crab", "moth", "goat")
    texts = (f"{animal} {animal} and {animal}.\n<|endoftext|>\n" for animal in animals)
    stories.write_text("".join(texts) * 20, encoding="utf-8")
    arguments = ("--checkpoint", run_folder, "--data", stories)
    code, out, err = tool("evaluate_text", *arguments, "--separate_documents")
    assert code == 0 and "blocks, documents kept apart" in err
    plain = tool("evaluate_text", *arguments)[1]
    assert numbers(out)["perplexity"] != numbers(plain)["perplexity"]  # of more digits than the loss
    assert plain == tool("evaluate_text", *arguments, "--no-separate_documents")[1]
    run = checkpoints.read_run(run_folder)
    checkpoints.write_run(run_folder, run | {"must_match": run["must_match"] | {"separate_documents": True}})
    try:
        assert tool("evaluate_text", *arguments)[1] == out
    finally:
        checkpoints.write_run(run_folder, run)


def test_evaluate_all(tool, run_folder, text_file, tmp_path):
    arguments = ("--checkpoint", run_folder, "--data", text_file, "--all", "--max_blocks", 2, "--output", "all.png")
    code, out, _ = tool("evaluate_text", *arguments)
    rows = [line.split() for line in out.splitlines()[1:4]]
    assert code == 0 and [row[0] for row in rows] == ["5", "10", "20"]
    assert len({row[1] for row in rows}) == 3  # three models, three losses
    assert out.count("Once upon a time") == 3 and (tmp_path / "all.png").is_file()


def test_evaluate_documents(tool, run_folder, text_file, tmp_path):
    (tmp_path / "a.txt").write_text("A fox met a hen.\n<|endoftext|>\nThe hen ran — away.", encoding="utf-8")
    (tmp_path / "b.txt").write_text(text_file.read_text(), encoding="utf-8")
    code, out, err = tool("evaluate_text", "--checkpoint", run_folder, "--data", "*.txt", "--documents")
    assert code == 0, err
    header, *lines = [re.split(r"\s{2,}", line) for line in out.splitlines()]
    assert header == ["document", "tokens", "bytes", "loss", "perplexity", "bits per byte", "accuracy"]
    assert [line[0] for line in lines] == ["a.txt", "a.txt:2", "b.txt", "all 3"]
    table = [[float(cell.replace(",", "")) for cell in line[1:]] for line in lines]
    assert table[1][1] == len("The hen ran — away.".encode())
    for column in (0, 1):
        assert sum(row[column] for row in table[:3]) == table[3][column]
    assert table[3][2] == pytest.approx(sum(row[0] * row[2] for row in table[:3]) / table[3][0], abs=1e-3)
    for tokens, size, loss, perplexity, bits, _ in table:
        assert perplexity == pytest.approx(2.718281828**loss, rel=1e-3)
        assert bits == pytest.approx(loss * tokens / size / 0.693147, abs=1e-3)
    short = tool("evaluate_text", "--checkpoint", run_folder, "--data", "b.txt", "--documents", "--block_size", 8)[1]
    assert short.splitlines()[1].split()[1:3] == out.splitlines()[3].split()[1:3]
    assert short.splitlines()[1].split()[3] != out.splitlines()[3].split()[3]  # less to read before each token


def test_evaluate_refuses_in_words(tool, run_folder, text_file, tmp_path):
    def refusal(*arguments):
        code, out, err = tool("evaluate_text", *arguments)
        assert code in (1, 2) and not out and "Traceback" not in err
        return err

    assert "nope.bin" in refusal("--checkpoint", run_folder, "--data", "nope.bin")
    assert "no folder missing" in refusal("--checkpoint", "missing", "--data", text_file)
    assert "figure of --all" in refusal("--checkpoint", run_folder, "--data", text_file, "--output", "x.png")
    assert "no validation split" in refusal("--checkpoint", run_folder, "--data", text_file, "--split", "validation")
    documents = ("--checkpoint", run_folder, "--documents", "--data")
    assert "holds tokens" in refusal(*documents, "corpus.bin")
    assert "leave out --all" in refusal(*documents, text_file, "--all")
    assert "leave out --separate_documents" in refusal(*documents, text_file, "--separate_documents")
    assert "context: 64 at most" in refusal(*documents, text_file, "--block_size", 65)
    (tmp_path / "short.txt").write_text("too short")
    assert "block" in refusal("--checkpoint", run_folder, "--data", "short.txt")


# ---------------------------------------------------------------------------------------------------------------------
# check_environment
# ---------------------------------------------------------------------------------------------------------------------


def test_ready(tool, run_folder, text_file):
    code, out, _ = tool(
        "check_environment", "--data", text_file, "--dry_run_dir", run_folder, "--max_steps", "100", *MICRO_FLAGS
    )
    assert code == 0 and "[ ]" not in out and out.count("[x]") == 8 and "ready: start with" in out, out


def test_every_failed_check_says_the_remedy(tool, run_folder, tmp_path):
    code, out, _ = tool("check_environment")
    assert code == 1 and "2 of 8 checks failed" in out
    assert re.search(r"\[ \] data file: no --data: make a token file with scripts/tokenize_corpus.py", out)
    assert re.search(r"\[ \] dry run: no dry run in checkpoints.dry_run: run accelerate launch", out)
    _, out, _ = tool("check_environment", "--data", "nope.bin", "--dry_run_dir", run_folder)
    assert "[ ] data file: nope.bin" in out
    assert re.search(r"\[ \] dry run: .* had another configuration \(model\.\w+ was", out)
    code, out, _ = tool("check_environment", "--hidden_size", "0")
    assert code == 1 and "[ ] configuration: " in out and "hidden_size must be at least 1, not 0" in out
    assert not list(tmp_path.iterdir())  # it writes nothing
    (tmp_path / "utf16.txt").write_text("some words", encoding="utf-16")
    _, out, _ = tool("check_environment", "--data", "utf16.txt", "--dry_run_dir", run_folder)
    assert "[ ] data file: utf16.txt is UTF-16 text" in out


def test_missing_and_old_packages_are_named(tool, monkeypatch):
    from importlib import metadata

    original = metadata.version

    def version(name):
        if name == "evaluate":
            raise metadata.PackageNotFoundError(name)
        return "4.0.0" if name == "transformers" else original(name)

    monkeypatch.setattr(metadata, "version", version)
    code, out, _ = tool("check_environment")
    assert code == 1 and "evaluate is missing" in out and "transformers is 4.0.0, needed is" in out
    assert "pip install -c constraints.txt -e ." in out


def test_too_little_disk_fails_the_check(tool, monkeypatch):
    monkeypatch.setattr("creature.files.free_bytes", lambda path: 10**6)
    code, out, _ = tool("check_environment", *MICRO_FLAGS)
    assert code == 1 and re.search(r"\[ \] free disk: .* free some space", out)
