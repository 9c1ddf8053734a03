"""The notebooks: committed clean, and executed on one micro run, with figures that are not empty."""

import base64
import io
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from creatures import MICRO

nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
NAMES = ("01_first_run", "02_generate", "03_compare_runs", "04_look_inside", "05_recordings", "06_live")
FIGURES = {"01_first_run": 1, "02_generate": 2, "03_compare_runs": 5, "04_look_inside": 3}
FIGURES |= {"05_recordings hear": 3, "05_recordings move": 3, "06_live hear": 2}
ORGANS = ("num_joints", "num_blend_shapes")  # which follow the recordings


def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)


def test_these_are_all():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_committed_valid_small_and_without_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 12_000
    assert notebook.cells[0].cell_type == "markdown" and "parameters" in notebook.cells[1].metadata.tags
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
            compile(re.sub(r"(?m)^( *)!.*", r"\1pass", cell.source), name, "exec")
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert all((NOTEBOOKS / link).is_file() for link in re.findall(r"\]\(([^)]*)\)", text))


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """
    Every notebook after its execution: the first trains the run that the others look at, the fifth is executed for two
    kinds of recordings, and the last lives in the first of them.
    """
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    folder = tmp_path_factory.mktemp("notebooks")
    model = {**MICRO["model"], "num_hidden_layers": 2, "max_position_embeddings": 64}
    micro = {"model": model, "training": {**MICRO["training"], "eval_steps": 4, "logging_steps": 2}}
    (folder / "micro.yaml").write_text(yaml.safe_dump(micro), encoding="utf-8")
    ids = np.random.default_rng(0).integers(0, 40, 4000).cumsum() % 300
    ids.astype(np.uint16).tofile(folder / "corpus.bin")
    runs = folder / "first", folder / "second"
    small = {name: value for name, value in MICRO["model"].items() if name not in ORGANS} | MICRO["training"]
    small |= {"max_position_embeddings": 64, "clip_ticks": 64, "max_steps": 12, "cache_dir": folder / "data"}
    environment = {
        "CREATURE_RUN": str(runs[0]),
        "CREATURE_RUNS": os.pathsep.join(map(str, runs)),
        "CREATURE_FLAGS": f"--config {folder / 'micro.yaml'} --data {folder / 'corpus.bin'} --max_steps 12",
        "CREATURE_NEW_TOKENS": "20",
        "CREATURE_ROUND_FLAGS": " ".join(f"--{name} {value}".replace(", ", ",") for name, value in small.items()),
        "PYTHONPATH": os.pathsep.join([str(NOTEBOOKS.parent), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_PLATFORM_DIRS": "1",
    }

    def execute(name):
        name, _, kind = name.partition(" ")
        notebook, place = read(name), {"metadata": {"path": str(NOTEBOOKS)}}
        of_kind = {"CREATURE_KIND": kind, "CREATURE_RECORDINGS": str(folder / "recordings" / kind)}
        of_kind |= {"CREATURE_CHECKPOINT": str(folder / f"round_{kind}")}
        nbclient.NotebookClient(notebook, timeout=180, resources=place).execute(env=os.environ | of_kind)
        return notebook

    with pytest.MonkeyPatch.context() as patch:
        for variable, value in environment.items():
            patch.setenv(variable, value)
        done = {NAMES[0]: execute(NAMES[0])}
        copy_run(*runs)
        with ThreadPoolExecutor(2) as pool:
            others = [name for name in FIGURES if name not in (NAMES[0], "06_live hear")]
            done |= dict(zip(others, pool.map(execute, others), strict=True))
        done["06_live hear"] = execute("06_live hear")  # lives what 05_recordings has trained
    if keep := os.environ.get("CREATURE_KEEP_NOTEBOOKS"):  # to look at them
        for name, notebook in done.items():
            nbformat.write(notebook, Path(keep) / f"{name}.ipynb")
    return done


def copy_run(first, second):
    """A second run, as another learning rate would leave it."""
    second.mkdir()
    run = json.loads((first / "run.json").read_text(encoding="utf-8"))
    run["must_match"]["learning_rate"] /= 2
    (second / "run.json").write_text(json.dumps(run), encoding="utf-8")
    lines = map(json.loads, (first / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    worse = [{key: value + 0.2 if "loss" in key else value for key, value in line.items()} for line in lines]
    (second / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in worse), encoding="utf-8")


def outputs(notebook, kind):
    """Everything of one MIME type that a notebook shows, in order; "text" for what it prints."""
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    if kind == "text":
        return "".join(output.text for output in shown if output.output_type == "stream")
    return [output.data[kind] for output in shown if kind in output.get("data", {})]


@pytest.mark.parametrize("name", FIGURES)
def test_a_notebook_runs_and_its_figures_show_something(executed, name):
    from matplotlib import image

    pictures = outputs(executed[name], "image/png")
    assert len(pictures) == FIGURES[name]
    for picture in pictures:
        pixels = image.imread(io.BytesIO(base64.b64decode(picture)))[..., :3]
        assert pixels.shape[0] > 200 and pixels.std() > 0.05
    printed = outputs(executed[name], "text").replace("TqdmWarning", "")  # where ipywidgets are missing
    assert "Warning" not in printed and "error:" not in printed


def test_the_first_run_trains_and_speaks(executed):
    text = outputs(executed["01_first_run"], "text")
    assert "12/12" in text and "the model is in" in text and "Once upon a time" in text


def test_generation_shows_one_text_for_each_way(executed):
    text = outputs(executed["02_generate"], "text")
    assert text.count("One day, a") == 6  # greedy, three temperatures, top-p, streamed


def test_the_comparison_tells_settings_and_results_apart(executed):
    settings, results = outputs(executed["03_compare_runs"], "text/html")
    assert "learning_rate" in settings and "hidden_size" not in settings
    assert "bits_per_byte" in results and "second" in results


def test_a_silent_sense_does_nothing_and_surprise_has_a_color(executed):
    assert "absent: 0, heard by a sense that is not trained: 0" in outputs(executed["04_look_inside"], "text")
    (colored,) = outputs(executed["04_look_inside"], "text/html")
    assert colored.count("background:rgb") > 20 and "nats" in colored


def test_a_round_shows_its_arguments_and_what_is_thought_beside_the_true_words(executed):
    heard, moved = executed["05_recordings hear"], executed["05_recordings move"]
    assert "making up recordings" in outputs(heard, "text") and "without audio" in outputs(heard, "text")
    assert re.search(r"input_features +float32 +\[1, \d+, 512\]", outputs(heard, "text"))
    assert re.search(r"action_targets +float32 +\[1, \d+, 4, 2\]", outputs(moved, "text"))
    (table,) = outputs(heard, "text/html")
    assert "thought" in table and re.search(r"(low|middle|high) \(\d\.\d\d s\)", table)
    assert not outputs(moved, "text/html")


def test_a_live_creature_thinks_beside_what_was_recorded(executed):
    text = outputs(executed["06_live hear"], "text")
    assert re.search(r"time +hears +thinks +recorded", text) and re.search(r"\d+ ticks, .* times real time", text)
    assert re.search(r"\d\.\d\d s +\S", text) and "a tick takes" in text
