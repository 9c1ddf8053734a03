"""The commands of the README and of the guide, run as they stand there, on a creature and a corpus of tiny size.

A copy of the project gets smaller configurations and a folder `books` of made-up stories; then the shell commands of
the pages are run in it, in their order, each once. Not run are installs (.ci/run does them), blocks marked `gpu`, and
what differs from a command before it in a flag alone; their flags and files are checked all the same.
"""

import ast
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from configuration_creature import CreatureConfig
from creature.data.text.stories import write_story_corpus
from creature.estimate import count_parameters
from creature.settings import OTHER_NAMES, PROJECT, known_fields, parse_settings

README = PROJECT / "README.md"
GUIDE = PROJECT / "docs" / "text_only_training.md"
PAGES = (README, GUIDE)
EVERY_PAGE = sorted([*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md")])
CONFIGS = sorted(path.name for path in (PROJECT / "configs").glob("*.yaml"))

TINY_MODEL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
TINY_STEPS = 24
# Two blocks a step: with a table of 50,304 rows, tokens are what costs.
TINY_TRAINING = {"tokens_per_step": 128, "max_steps": TINY_STEPS, "logging_steps": 4, "save_steps": 8, "eval_steps": 20}
# What a page asks of a real run and nobody wants to wait for. Each has to occur.
SHORTER = {"--resume --max_steps 62500": f"--resume --max_steps {TINY_STEPS + 8}", "--tokens 300000": "--tokens 3000"}
# What a command before it does as well, with other flags.
DONE_BEFORE = (
    "python scripts/estimate.py --config configs/small_config.yaml",
    'python scripts/generate_text.py --checkpoint checkpoints/text_only --prompt "The sea" --greedy '
    "--max_new_tokens 30",
    "accelerate launch run_clm_creature.py --config configs/small_config.yaml --data data/corpus.bin",
)
INSTALLS = ("pip install", "python3 -m venv", "source ")
FULL_RUN = "accelerate launch run_clm_creature.py --data data/corpus.bin"


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """(mark, text) of the fenced blocks of a language; the mark is the second word after the fence."""
    found = re.findall(rf"^```{language}(?: (\w+))?\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    assert found, f"{page.name} has no {language} block"
    return found


def commands(text: str, continuation: str = "\\") -> list[str]:
    """The commands of a block: continued lines joined, `a && b` cut in two."""
    joined = text.replace(f"{continuation}\n", " ")
    lines = [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return [" ".join(command.split()) for line in lines for command in line.split("&&")]


def bash_commands(page: Path) -> list[tuple[str, str]]:
    return [(mark, command) for mark, text in blocks(page, "bash") for command in commands(text)]


ALL_COMMANDS = [(page.name, mark, command) for page in PAGES for mark, command in bash_commands(page)]


def is_install(command: str) -> bool:
    return command.startswith((*INSTALLS, "pytest"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of the project with tiny configurations and text, and no trace of this checkout."""
    folder = tmp_path_factory.mktemp("project") / "clone"
    folder.mkdir()
    for name in ("creature", "scripts", "configs"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*PROJECT.glob("*.py"), PROJECT / "constraints.txt"]:
        shutil.copy(path, folder)
    for path in (folder / "configs").glob("*.yaml"):
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        settings["model"] |= TINY_MODEL
        settings["training"] |= TINY_TRAINING
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    for seed in range(3):
        write_story_corpus(folder / "books" / f"stories_{seed}.txt", 20_000, seed=seed)
    return folder


@pytest.fixture(scope="module")
def environment(place):
    """The shell of somebody who has installed the project: `python` and `accelerate` are this interpreter's."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "PYTHONPATH"))}
    own["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), own.get("PATH", "")])
    return own | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hf"), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}


def execute(command: str, place: Path, environment: dict, stop_after: str | None = None) -> str:
    """
    Run a command as it stands; returns what it printed.

    stop_after: press Ctrl+C when this appears. The exit code is then the launcher's, which has got the signal too.
    """
    program = shutil.which(shlex.split(command)[0], path=environment["PATH"])
    assert program, f"{command}: there is no such program"
    process = subprocess.Popen(
        [program, *shlex.split(command)[1:]], cwd=place, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace", start_new_session=True,
    )  # fmt: skip
    lines = []
    for line in process.stdout:
        lines.append(line)
        if stop_after and stop_after in line:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the whole group
    output = "".join(lines)
    assert process.wait() == 0 or stop_after, f"{command} ended with {process.returncode}:\n{output[-2000:]}"
    return output


def test_the_commands_of_both_pages_run(place, environment):
    guide = [command for mark, command in bash_commands(GUIDE) if not mark and not is_install(command)]
    readme = [command for mark, command in bash_commands(README) if not mark and not is_install(command)]
    real_run = readme[1:]
    assert [command for command in guide if command in real_run] == real_run, "the guide tells another real run"

    outputs = {}
    assert set(DONE_BEFORE) <= set(guide)
    for command in dict.fromkeys([*readme[:1], *guide]):
        if command in DONE_BEFORE:
            continue
        # The launcher is started for the first run, and for the one that is interrupted.
        shorter = command if command in (readme[0], FULL_RUN) else command.replace("accelerate launch", "python")
        for before, after in SHORTER.items():
            shorter = shorter.replace(before, after)
        # The full run is interrupted, so that the command after it has something to resume.
        stop = "step      4/" if command == FULL_RUN and os.name == "posix" else None
        if command == f"{FULL_RUN} --resume" and os.name != "posix":
            continue
        outputs[command] = execute(shorter, place, environment, stop)
    assert all(any(before in command for command in outputs) for before in SHORTER)

    first = outputs[readme[0]]
    shown = blocks(README, "text")[0][1]
    for line in shown.splitlines():
        label = line.split("  ")[0] if "  " in line else " ".join(line.split()[:2])
        assert label.strip(". ") in first, f"the README promises {line!r}"
    assert "dry run passed" in first.splitlines()[-1]
    assert "dry run passed" in outputs[f"{FULL_RUN} --dry_run"]
    assert "not ready" not in outputs["python scripts/check_environment.py --data data/corpus.bin"]
    if os.name == "posix":
        assert f"resume with: {FULL_RUN} --resume" in outputs[FULL_RUN]
        assert f"finished {TINY_STEPS} steps" in outputs[f"{FULL_RUN} --resume"]
    assert f"finished {TINY_STEPS + 8} steps" in outputs[f"{FULL_RUN} --resume --max_steps 62500"]
    assert "Once upon a time" in outputs[real_run[-1]]

    # Where things land, as the README has it, and its notebook cells on what was trained.
    run = place / "checkpoints" / "text_only"
    promised = "README.md loss.png throughput.png run.json metrics.jsonl model.safetensors curves.png evaluation.png"
    for name in promised.split():
        assert (run / name).is_file(), name
    cells = "\n".join(text for _, text in blocks(README, "python"))
    (place / "notebook.py").write_text(cells, encoding="utf-8")
    assert "Once upon a time" in execute("python notebook.py", place, environment)


@pytest.mark.parametrize(("page", "mark", "command"), ALL_COMMANDS, ids=[f"{c[:60]}" for _, _, c in ALL_COMMANDS])
def test_files_and_flags_of_a_command_exist(page, mark, command, monkeypatch):
    monkeypatch.chdir(PROJECT)
    words = shlex.split(command)
    if words[:2] == ["pip", "install"]:
        assert words[2:5] == ["-c", "constraints.txt", "-e"] and re.fullmatch(r"\.(\[\w+\])?", words[5]), command
        assert f'"{words[5][2:-1]}": [' in (PROJECT / "setup.py").read_text(encoding="utf-8") or words[5] == "."
        return
    for word in words:
        if word.endswith((".py", ".yaml")):
            assert (PROJECT / word).is_file(), f"{page} names {word}"
    if words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        arguments, unknown = launch_command_parser().parse_known_args(words[2:])
        assert arguments.training_script == "run_clm_creature.py" and not unknown
        parse_settings(arguments.training_script_args)


def test_ci_runs_the_test_command_of_the_readme():
    command = blocks(README, "bash")[1][1].strip()
    assert "pytest" in command
    assert f"\n{command}\n" in (PROJECT / ".ci" / "run").read_text(encoding="utf-8")


def test_ci_tests_with_the_oldest_transformers_that_setup_allows():
    (oldest,) = re.findall(r'"transformers>=([\d.]+),', (PROJECT / "setup.py").read_text(encoding="utf-8"))
    assert f"pip install transformers=={oldest}.0\n" in (PROJECT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.name)
def test_commands_need_no_more_for_powershell_than_docs_installing_says(page):
    """Batch scripts apart: quotes around what PowerShell would take apart, and no variables, pipes or redirections."""
    for block in re.findall(r"^```bash.*?\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
        for command in commands(block) if not block.startswith("#!/") else ():
            bare = re.sub(r'"[^"$`]*"', "", command)
            assert not re.search(r"[$`|<>;(){}@,*]|^(export|set|if|for) ", bare), f"{page.name}: {command}"


def test_powershell_blocks_say_what_the_shell_blocks_say():
    """Block by block the same commands; only line continuation, folders and making the environment differ."""
    shell, windows = blocks(GUIDE, "bash"), blocks(GUIDE, "powershell")
    assert [mark for mark, _ in shell] == [mark for mark, _ in windows]
    same = {"py -m venv .venv": "python3 -m venv .venv", ".venv\\Scripts\\Activate.ps1": "source .venv/bin/activate"}
    for (_, left), (_, right) in zip(shell, windows, strict=True):
        assert "&&" not in right, "Windows PowerShell 5 does not know &&"
        assert commands(left) == [same.get(command, command) for command in commands(right, "`")]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_counts_in_the_readme_are_true(name):
    settings = yaml.safe_load((PROJECT / "configs" / name).read_text(encoding="utf-8"))
    counts = count_parameters(CreatureConfig(**settings["model"]))
    shape = f"{settings['model']['num_hidden_layers']} x {settings['model']['hidden_size']}"
    (row,) = re.findall(rf"^\| \[{name}\].*$", README.read_text(encoding="utf-8"), re.M)
    cells = [cell.strip() for cell in row.strip("|").split("|")[1:]]
    sizes = (counts["total"], counts["text_only"], counts["token_table"], counts["body"])
    assert cells == [shape] + [f"{size:,}" for size in sizes]


def test_the_fields_and_names_in_the_guide_are_true():
    text, fields = GUIDE.read_text(encoding="utf-8"), known_fields()
    settings = yaml.safe_load((PROJECT / "configs" / "text_only_config.yaml").read_text(encoding="utf-8"))
    rows = re.findall(r"^\| (model|data|training) \| `(\w+)` \| (\S+) \|", text, re.M)
    assert len(rows) > 10
    for section, name, value in rows:
        assert fields[name].section == section
        assert yaml.safe_load(value) == settings[section][name], f"the guide says {name} = {value}"
    table = text.split("| elsewhere | here |")[1].split("\n\n")[0]
    mapped = set()
    for elsewhere, here in re.findall(r"^\| (.*) \| (.*) \|$", table, re.M):
        names = re.findall(r"`(\w+)`", elsewhere)
        mapped |= set(names)
        assert all(OTHER_NAMES[name] == here.strip("`") for name in names), elsewhere
    assert mapped == OTHER_NAMES.keys()
    for name in re.findall(r"`--(\w+)[ `]", text):
        scripts = "".join(path.read_text(encoding="utf-8") for path in (PROJECT / "scripts").glob("*.py"))
        own = {"config", "dry_run", "resume", "overwrite_output_dir", "accept_changes", "machine_rank", "num_processes"}
        assert name in fields or name in own | {"quiet"} or f'"--{name}"' in scripts or f'"{name}"' in scripts, name


def test_the_errors_in_the_guide_are_those_that_the_code_prints():
    """Each quoted message, piece by piece between its gaps, is in some text of the code."""
    texts = []
    for path in [*PROJECT.glob("*_creature.py"), *(PROJECT / "creature").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    table = GUIDE.read_text(encoding="utf-8").split("| symptom | cause | remedy |")[1].split("\n\n")[0]
    messages = re.findall(r"^\| `(.*?)` \|", table, re.M)
    assert len(messages) > 15
    for message in messages:
        for piece in message.split("..."):
            assert any(piece.strip(" :") in text for text in texts), f"no message has {piece!r}"


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
