"""Hostile and broken folders of runs, checkpoints and models: one sentence, no hang, and nothing in them is executed.

A checkpoint is sealed again after the damage, as by somebody who means harm.
"""

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from creatures import GPT2, micro_model
from damage import BROKEN_JSON, Trap, answer, changed, damaged, dumped, examples, no_hang
from hypothesis import example, given
from hypothesis import strategies as st

from creature import checkpoints
from creature.settings import Settings

LINE = {"step": 3, "tokens": 192, "time": 1.5, "loss": 3.2, "loss_internal_text": 3.2, "loss_audio": 2.0, "mfu": 0.3}
LINE |= {"tokens_per_second": 100.5, "peak_memory_bytes": 10**9, "eval_loss": 3.0}


def draw_metrics(folder, x: str) -> None:
    from creature.plots import plot_runs

    checkpoints.rewind_metrics(folder, 100)
    plot_runs([folder], folder / "loss.svg", x=x)


@pytest.mark.filterwarnings("ignore:.*left out")
def test_damaged_metrics_are_left_out_or_told(tmp_path):
    lines = [LINE | {"step": step, "time": step * 1.5, "tokens": 64 * step} for step in (1, 2, 3, 4)]

    @examples(10)
    @given(
        changed(lines).map(lambda d: "\n".join(map(dumped, d if isinstance(d, list) else [d])).encode())
        | damaged("\n".join(map(dumped, lines)).encode())
        | st.sampled_from(BROKEN_JSON).map(lambda text: (dumped(LINE) + "\n" + text).encode()),
        st.sampled_from(["step", "tokens", "time"]),
    )
    @example("\n".join(dumped(LINE | {"loss": x}) for x in (1e308, -1e308, 10**400, 1e99)).encode(), "step")
    @example(b'{"step": 1, "loss": 2.0, "time": 1}\n{"step": 2, "loss_a": 1.0, "loss_b": 2.0}', "time")
    def check(data, x):
        (tmp_path / "metrics.jsonl").write_bytes(data)
        answer(draw_metrics, tmp_path, x)

    check()
    for text in BROKEN_JSON:
        (tmp_path / "metrics.jsonl").write_text(dumped(LINE) + "\n" + text)
        answer(checkpoints.rewind_metrics, tmp_path, 100)
        assert checkpoints.read_metrics(tmp_path) == [LINE]


SEALED = ("trainer_state.json", "scheduler.pt", "optimizer.pt", "model.safetensors")


def test_a_damaged_seal_or_state_skips_the_checkpoint(tmp_path):
    """Whatever complete.json and trainer_state.json say, the checkpoint is whole or is skipped, and none is opened."""
    good = tmp_path / "checkpoint-3"
    good.mkdir()
    (tmp_path / "outside").write_text("secret")
    for name in SEALED:
        (good / name).write_text(json.dumps({"global_step": 3}) if name.endswith("json") else "x" * 50)
    checkpoints.seal_checkpoint(good)
    texts = {name: (good / name).read_bytes() for name in ("complete.json", "trainer_state.json")}
    documents = {name: json.loads(text) for name, text in texts.items()}

    @examples(80)
    @given(
        st.sampled_from(sorted(texts)).flatmap(
            lambda name: st.tuples(
                st.just(name),
                changed(documents[name]).map(lambda d: dumped(d).encode())
                | damaged(texts[name])
                | st.sampled_from(BROKEN_JSON).map(str.encode),
            )
        )
    )
    def check(damage):
        for name, text in (texts | dict([damage])).items():
            (good / name).write_bytes(text)
        with no_hang():
            newest, skipped = checkpoints.newest_complete(tmp_path)
        assert newest == good or skipped[0][1]

    check()
    for outside in ("../outside", str(tmp_path / "outside"), "a/../../outside", "a\0", "x" * 5000, "", "."):
        files = {**documents["complete.json"]["files"], outside: {"bytes": 6, "sha256": "0"}}
        (good / "complete.json").write_text(json.dumps({"files": files}))
        assert checkpoints.problem_with(good)


RUN = {
    "kind": "run",
    "status": "started",
    "steps": 10,
    "decay_start": 6,
    "must_match": {
        "max_steps": 10, "schedule": "warmup_stable_decay", "warmup_steps": 1, "decay_steps": 4, "micro_batch": 2,
        "world_size": 1, "model": {"hidden_size": 32}, "data_hash": "x", "separate_documents": False,
        "batch_warmup_steps": 2, "fp8_head": False,
    },
}  # fmt: skip


def ask_for(folder, resume: bool) -> None:
    """What a run reads of run.json, before and with --resume."""
    from creature.resume import check_same_run, choose_checkpoint, find_run

    settings = Settings(training={"output_dir": str(folder)}, resume=resume)
    checkpoints.check_output(settings)
    if not resume:
        return
    resumed = find_run(settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "find_checkpoint", lambda *_: (Path("checkpoint-1"), []))
        for steps in (8, 10, 12):
            choose_checkpoint(resumed, settings, steps, decay_steps=4)
    check_same_run(resumed, RUN["must_match"], accept_changes=False)


def test_a_damaged_run_json_is_taken_or_told(tmp_path):
    @examples(60)
    @given(
        changed(RUN).map(lambda d: dumped(d).encode())
        | damaged(dumped(RUN).encode())
        | st.sampled_from(BROKEN_JSON).map(str.encode),
        st.booleans(),
    )
    @example(dumped(RUN).encode(), True)
    def check(data, resume):
        (tmp_path / "run.json").write_bytes(data)
        answer(ask_for, tmp_path, resume)

    check()
    (tmp_path / "run.json").write_text(dumped(RUN))
    assert answer(ask_for, tmp_path, resume=True) is None


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and models
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from test_trainer import StopAt, make_trainer

    folder = tmp_path_factory.mktemp("trained")
    make_trainer(folder, callbacks=[StopAt(2)]).train()
    return folder / "checkpoint-2"


def resume(checkpoint) -> None:
    from test_trainer import make_trainer

    make_trainer(checkpoint.parent, max_steps=3).train(resume_from_checkpoint=str(checkpoint))


def resealed(trained, folder, name: str, data: bytes | None) -> Path:
    """A copy of a checkpoint with one file of other content, or without it."""
    shutil.rmtree(folder, ignore_errors=True)
    copy = folder / "checkpoint-2"
    shutil.copytree(trained, copy)
    (copy / name).unlink(missing_ok=True)
    if data is not None:
        (copy / name).write_bytes(data)
    checkpoints.seal_checkpoint(copy)
    return copy


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_a_pickle_in_a_checkpoint_is_never_run(name, trained, tmp_path):
    for save in (lambda trap, path: path.write_bytes(pickle.dumps(trap)), torch.save):
        save(Trap(tmp_path / "trapped"), tmp_path / "trap")
        checkpoint = resealed(trained, tmp_path / "run", name, (tmp_path / "trap").read_bytes())
        if name == "pytorch_model.bin":
            (checkpoint / "model.safetensors").unlink()
        assert "cannot be resumed" in answer(resume, checkpoint)
        assert not (tmp_path / "trapped").exists()


def test_weights_are_read_from_safetensors_only(trained, tmp_path):
    from safetensors.torch import load_file

    weights = load_file(trained / "model.safetensors")
    torch.save(weights, tmp_path / "weights")
    checkpoint = resealed(trained, tmp_path / "run", "pytorch_model.bin", (tmp_path / "weights").read_bytes())
    (checkpoint / "model.safetensors").unlink()
    assert "cannot be resumed" in answer(resume, checkpoint)
    assert "no model" in answer(load, checkpoint)


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_sharded_checkpoints_with_their_pickled_index_are_refused_before_any_is_written(kind):
    from torch.distributed.fsdp import StateDictType

    from creature.saving import refuse_shards

    plugin = SimpleNamespace(state_dict_type=StateDictType[kind])
    assert (answer(refuse_shards, plugin) is None) == (kind == "FULL_STATE_DICT")


def test_a_damaged_state_in_a_checkpoint_is_taken_or_told(trained, tmp_path):
    contents = {path.name: path.read_bytes() for path in trained.iterdir()}
    documents = {name: json.loads(contents[name]) for name in ("trainer_state.json", "log_window_0.json")}

    @examples(25)
    @given(
        st.sampled_from(sorted(documents)).flatmap(
            lambda name: st.tuples(st.just(name), changed(documents[name]).map(lambda d: dumped(d).encode()))
        )
        | st.sampled_from(["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"]).flatmap(
            lambda name: st.tuples(st.just(name), damaged(contents[name]))
        )
    )
    def check(damage):
        checkpoint = resealed(trained, tmp_path / "run", *damage)
        if checkpoints.problem_with(checkpoint) is None:
            answer(resume, checkpoint)

    check()


def load(folder) -> None:
    from creature.loading import find_model, load_model

    load_model(find_model(folder), "cpu")


def test_a_damaged_model_is_taken_or_told(trained, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(trained / name, folder)
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = json.loads(contents["config.json"])
    assert answer(load, folder) is None

    @examples(50)
    @given(
        st.tuples(st.just("config.json"), changed(config).map(lambda d: dumped(d).encode()))
        | st.tuples(st.just("config.json"), st.sampled_from(BROKEN_JSON).map(str.encode))
        | st.tuples(st.just("model.safetensors"), damaged(contents["model.safetensors"]))
    )
    def check(damage):
        for name, data in (contents | dict([damage])).items():
            (folder / name).write_bytes(data)
        answer(load, folder)

    check()
    sizes = ("num_hidden_layers", "hidden_size", "vocab_size", "num_touch_points", "num_joints")
    for field in (*sizes, "num_cameras", "vision_image_size", "body_state_size", "num_mel_bins"):
        (folder / "config.json").write_text(dumped(config | {field: 2**40}))
        assert answer(load, folder), field


def test_weights_of_other_shapes_are_told_in_words_of_the_user(trained, tmp_path):
    """As those of the eyes of an earlier version have."""
    shutil.copy(trained / "model.safetensors", tmp_path)
    config = json.loads((trained / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        dumped(config | {"vision_channels": [2 * size for size in config["vision_channels"]]})
    )
    told = answer(load, tmp_path)
    assert "weights have other shapes, as those of an earlier version" in told and "ignore_mismatched" not in told


@pytest.mark.parametrize("learned", [True, False])
def test_weights_that_are_not_there_are_told_of_where_they_matter(tmp_path, learned):
    """A creature from before the eyes had convolutions reads and writes, unless it had learned to see."""
    model = micro_model(**GPT2)
    model.model.senses.vision.proj.weight.data.fill_(float(learned))
    weights = {name: value for name, value in model.state_dict().items() if "vision.layers" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    told = answer(load, tmp_path)
    assert "lack model.senses.vision.layers.0.bias, as an earlier version's do" in told if learned else told is None


@pytest.mark.parametrize("cameras", [1, 100_000])
def test_no_eyes_have_fewer_weights_than_their_sizes_ask_for(tmp_path, cameras):
    eyes = dict(num_cameras=cameras, vision_image_size=2, vision_channels=[7])
    micro_model(**eyes).to(torch.bfloat16).save_pretrained(tmp_path)
    assert answer(load, tmp_path) is None


def test_an_index_of_weights_cannot_leave_its_folder(trained, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(trained / "config.json", folder)
    shutil.copy(trained / "model.safetensors", tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "weights.bin", 3, None):
        index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
        (folder / "model.safetensors.index.json").write_text(dumped(index))
        assert "other files than weights beside it" in answer(load, folder)


def test_code_in_a_folder_of_a_model_or_tokenizer_is_not_run(trained, tmp_path):
    from creature.loading import load_saved_tokenizer

    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(trained / "model.safetensors", folder)
    code = f"open({str(tmp_path / 'trapped')!r}, 'w')\n"
    for name in ("evil.py", "modeling_creature.py", "configuration_creature.py", "tokenization_creature.py"):
        (folder / name).write_text(code)
    classes = {name: "evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    config = json.loads((trained / "config.json").read_text()) | {"auto_map": classes}
    (folder / "config.json").write_text(dumped(config))
    tokenizer = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(dumped(tokenizer))
    answer(load, folder)
    assert answer(load_saved_tokenizer, folder)
    assert not (tmp_path / "trapped").exists()
