"""A saved folder is a whole model: its code loads in a process that knows nothing of this project."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from creatures import ALL_STREAMS, GPT2, micro_model, random_batch
from safetensors.torch import load_file, save_file

import modeling_creature
from creature.data.text.tokenizer import load_tokenizer
from processing_creature import CreatureProcessor

FILES = {path.name for path in Path(modeling_creature.__file__).parent.glob("*_creature.py")} - {"run_clm_creature.py"}
# What travels with the processor of recordings, where one is saved.
PROCESSOR_FILES = {"codec_creature.py", "feature_extraction_creature.py", "processing_creature.py", "ticks_creature.py"}
MODEL_FILES = sorted(FILES - PROCESSOR_FILES)

# The project may be installed, even editable, for this very interpreter: bar its modules by name, before anything else.
PREAMBLE = f"""
import importlib.abc, sys

class Bar(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {[Path(name).stem for name in sorted(FILES)] + ["creature", "creatures"]!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Bar())
try:
    import modeling_creature
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the project can be imported here")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, GenerationConfig
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved creature that was pushed nowhere, a batch, and what the creature says to it."""
    path = tmp_path_factory.mktemp("saved") / "creature"
    model = micro_model()
    model.save_pretrained(path)
    batch = random_batch(model.config)
    with torch.no_grad():
        out = model(**batch, output_streams=ALL_STREAMS)
    save_file(batch, path.parent / "batch.safetensors")
    expected = {name: out[name].contiguous() for name in ("loss", "logits", "audio_logits", "animation")}
    settings = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
    expected["sequences"] = model.generate(batch["input_ids"], **settings)
    streams = model.generate(batch["input_ids"], output_streams=ALL_STREAMS, **settings)
    expected["audio"] = streams.audio.contiguous()
    save_file(expected, path.parent / "expected.safetensors")
    return path


def run_elsewhere(code: str, cwd: Path, home: Path) -> str:
    """Run code in another process and folder that can import transformers, and of this project nothing."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    project = Path(modeling_creature.__file__).parent.resolve()
    paths = [path for path in environment.pop("PYTHONPATH", "").split(os.pathsep) if path]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if Path(path).resolve() != project)
    script = cwd / "script.py"
    script.write_text(PREAMBLE + textwrap.dedent(code), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_folder_carries_its_code(folder):
    project = Path(modeling_creature.__file__).parent
    for name in MODEL_FILES:
        assert (folder / name).read_text(encoding="utf-8") == (project / name).read_text(encoding="utf-8"), name
    assert not (folder / "run_clm_creature.py").exists()


def test_loads_generates_and_saves_again_in_a_process_without_the_project(folder, tmp_path):
    code = f"""
    folder, again = {str(folder)!r}, {str(tmp_path / "again")!r}
    batch = load_file({str(folder.parent / "batch.safetensors")!r})
    expected = load_file({str(folder.parent / "expected.safetensors")!r})

    def check(folder):
        # First, while nothing but the folder tells AutoModel of the backbone: so servers load it.
        assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "CreatureModel"
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__name__ == "MultiModalCreature" and type(config).__name__ == "CreatureConfig"
        assert type(model).__module__.startswith("transformers_modules.")
        with torch.no_grad():
            out = model(**batch, output_streams={ALL_STREAMS!r})
        for name in ("loss", "logits", "audio_logits", "animation"):
            assert torch.equal(out[name], expected[name]), name
        settings = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert torch.equal(model.generate(batch["input_ids"], **settings), expected["sequences"])
        streams = model.generate(batch["input_ids"], output_streams={ALL_STREAMS!r}, **settings)
        assert torch.equal(streams.audio, expected["audio"])
        # A config object of one load and the class of another: two modules of the same file.
        other = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        assert other.num_parameters() == model.num_parameters()
        # It is trainable here, too.
        model.train()(**batch).loss.backward()
        return model

    check(folder).save_pretrained(again)
    check(again)
    print("loaded twice")
    """
    assert "loaded twice" in run_elsewhere(code, tmp_path, tmp_path / "home")
    weights = load_file(tmp_path / "again" / "model.safetensors")
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(weights[name], value), name
    for name in MODEL_FILES:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_the_processor_travels_with_the_model(tmp_path):
    folder = tmp_path / "creature"
    model = micro_model(**GPT2, num_mel_bins=8, audio_frames_per_tick=8)
    processor = CreatureProcessor.from_config(model.config, load_tokenizer())
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    assert {path.name for path in folder.glob("*.py")} == FILES
    sound = torch.randn(4000, 2)
    expected = processor(audio=sound.numpy(), sampling_rate=8000, text="Who")
    save_file({**expected, "sound": sound}, tmp_path / "expected.safetensors")
    code = f"""
    expected = load_file({str(tmp_path / "expected.safetensors")!r})
    sound = expected.pop("sound").numpy()
    for folder in ({str(folder)!r}, {str(tmp_path / "again")!r}):
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        assert type(processor).__module__.startswith("transformers_modules."), type(processor)
        inputs = processor(audio=sound, sampling_rate=8000, text="Who")
        assert inputs.keys() == expected.keys() and all(torch.equal(inputs[name], expected[name]) for name in inputs)
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        (said,) = processor.decode_outputs(model.generate(**inputs, max_new_tokens=3, do_sample=False))
        model.save_pretrained({str(tmp_path / "again")!r})
        processor.save_pretrained({str(tmp_path / "again")!r})
    print("heard", said["internal_text"][0]["word"])
    """
    assert "heard Who" in run_elsewhere(code, tmp_path, tmp_path / "home")


def test_without_trust_nothing_of_the_folder_is_run(folder, tmp_path):
    code = f"""
    try:
        AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=False)
    except ValueError as error:
        print("refused:", "trust_remote_code" in str(error))
    """
    assert "refused: True" in run_elsewhere(code, tmp_path, tmp_path / "home")


def test_in_process_no_trust_is_needed(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is modeling_creature.MultiModalCreature
