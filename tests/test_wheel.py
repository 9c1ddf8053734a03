"""The wheel: everything is in it, and it works from an empty folder, without the project beside it."""

import os
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import yaml

from creature import report
from creature.settings import CONFIGS, PROJECT, parse_settings

pytestmark = pytest.mark.skipif(not (PROJECT / "setup.py").is_file(), reason="the project's folder is not here")

BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"

# With what a wheel brings and with other packages, but not with this project, which may be installed editable; and,
# once the libraries are loaded, with nothing that only POSIX has.
STRANGER = """
import os, runpy, signal, sys, types
from pathlib import Path
import accelerate, datasets, evaluate, matplotlib.pyplot, tiktoken, torch, transformers.trainer

sys.modules.update(dict.fromkeys(("fcntl", "termios", "resource", "pwd", "grp")))
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=lambda *_: None)
for name in ("fork", "getpgid", "getpgrp", "getuid", "kill", "killpg", "setpgid", "setsid", "tcgetpgrp", "tcsetpgrp",
             "mkfifo", "sched_getaffinity"):
    os.__dict__.pop(name, None)
for name in ("SIGALRM", "SIGCONT", "SIGHUP", "SIGKILL", "SIGTSTP", "SIGTTOU", "alarm", "pthread_sigmask"):
    signal.__dict__.pop(name, None)

sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
wheel, corpus = map(Path, sys.argv[1:])

def run(module, *flags):
    sys.argv = [module, *map(str, flags)]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, (module, end.code)

run("run_clm_creature", "--data", corpus, "--dry_run", "--hidden_size", 16, "--intermediate_size", 32,
    "--num_hidden_layers", 1, "--num_attention_heads", 2, "--max_position_embeddings", 64, "--tokens_per_step", 128)
run("creature_scripts.generate_text", "--checkpoint", "checkpoints/dry_run", "--prompt", "Once", "--max_new_tokens", 3)
run("creature_scripts.check_environment", "--help")

from creature import report
from creature.settings import CONFIGS, parse_settings
from transformers import AutoTokenizer

assert parse_settings(["--config", "configs/small_config.yaml"]).model["hidden_size"] == 768
tokenizer = AutoTokenizer.from_pretrained("checkpoints/dry_run")
tokenizer.chat_template = (CONFIGS / "chat_template.jinja").read_text(encoding="utf-8")
print(tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}], tokenize=False))
names = ("_creature", "creature", "creature_scripts")
own = [module for name, module in list(sys.modules.items()) if name.partition(".")[0].endswith(names)]
files = [Path(module.__file__) for module in own if getattr(module, "__file__", None)]
assert len(files) > 20 and all(wheel in file.parents for file in files), files
print("all of it from the wheel")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this project, built without a network from a copy, and unpacked as pip would."""
    pytest.importorskip("setuptools", minversion="70.1")  # older ones need the package `wheel`
    place = tmp_path_factory.mktemp("wheel")
    copy_project(place / "project")
    done = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=place / "project", capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(place / "project" / "dist" / done.stdout.split()[-1]) as file:
        file.extractall(place / "site")
    return place / "site"


def copy_project(folder):
    """What a wheel is built from; tests, data and earlier builds stay behind."""
    names = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "*_creature.py")
    files = [path for name in names for path in PROJECT.glob(name)]
    for name in ("creature", "scripts", "configs"):
        files += [path for path in (PROJECT / name).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    for path in files:
        copy = folder / path.relative_to(PROJECT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())


def test_every_module_script_and_configuration_is_in_the_wheel(wheel):
    sources = {path.name: path for path in PROJECT.glob("*_creature.py")}
    for folder, inside in (("creature", "creature"), ("scripts", "creature_scripts"), ("configs", "creature/configs")):
        for path in (PROJECT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                sources[f"{inside}/{path.relative_to(PROJECT / folder).as_posix()}"] = path
    packed = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    assert {name for name in packed if ".dist-info/" not in name} == sources.keys()
    for name, path in sources.items():
        assert (wheel / name).read_bytes() == path.read_bytes(), name
    assert any(name.endswith("LICENSE") for name in packed)


def test_the_code_hash_of_a_run_covers_every_folder_of_the_package(wheel, monkeypatch):
    monkeypatch.setattr(report, "PROJECT", wheel)
    monkeypatch.setattr(report, "__file__", str(wheel / "creature" / "report.py"))
    hashes = [report.code_hash()]
    for name in ("creature/files.py", "creature/data/mixture.py", "creature/data/text/sources.py", "creature/new/x.py"):
        path = wheel / name
        before = path.read_bytes() if path.exists() else None
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((before or b"") + b"# changed\n")
        hashes.append(report.code_hash())
        if before is not None:
            path.write_bytes(before)
    path.unlink()
    assert len(set(hashes)) == 5 and report.code_hash() == hashes[0]


def test_it_trains_and_generates_from_an_empty_folder_without_posix(wheel, tmp_path):
    ids = np.random.default_rng(0).integers(0, 40, 2000).cumsum() % 300
    corpus = tmp_path / "corpus.bin"
    ids.astype(np.uint16).tofile(corpus)
    empty = tmp_path / "empty"
    empty.mkdir()
    own = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "PYTHONPATH"))}
    own |= {"PYTHONPATH": str(wheel), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(wheel), str(corpus)], cwd=empty, env=own, capture_output=True, text=True,
        encoding="utf-8", errors="replace", timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "dry run passed" in done.stdout
    assert "User: Who are you?" in done.stdout
    assert done.stdout.endswith("all of it from the wheel\n")
    assert {path.name for path in empty.iterdir()} <= {"checkpoints", "data"}


def test_a_configuration_of_the_project_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_settings(["--config", "configs/1b_config.yaml"]).config == str(CONFIGS / "1b_config.yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "1b_config.yaml").write_text("model: {hidden_size: 64}\n", encoding="utf-8")
    assert parse_settings(["--config", "configs/1b_config.yaml"]).model == {"hidden_size": 64}  # its own comes first


def test_every_place_that_names_the_version_names_the_same():
    texts = {
        name: (PROJECT / name).read_text(encoding="utf-8") for name in ("setup.py", "CITATION.cff", "CHANGELOG.md")
    }
    (version,) = re.findall(r'^ +version="([\d.]+)"', texts["setup.py"], re.M)
    citation = yaml.safe_load(texts["CITATION.cff"])
    assert citation["version"] == version and citation["license"] == "Apache-2.0" and citation["cff-version"] == "1.2.0"
    assert re.search(rf"\b{re.escape(version)}\b", texts["CHANGELOG.md"].split("## [Unreleased]")[1])
    assert f"creature-{version}-py3" in (PROJECT / "docs" / "installing.md").read_text(encoding="utf-8")
