"""One model over several processes: FSDP 2 with the project's configuration, two CPU processes in place of GPUs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from creatures import MICRO, micro_model
from safetensors.torch import load_file

import run_clm_creature
from creature import checkpoints
from creature.errors import UserError
from creature.plan import plan_run
from creature.settings import Settings

PROJECT = Path(run_clm_creature.__file__).parent
SETTINGS = ["--config", "micro.yaml", "--data", "corpus.bin", "--use_cpu", "--max_steps", "8"]
SETTINGS += ["--batch_warmup_steps", "0"]  # sharded weights are updated once a step


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """
    A folder with one run four times: "one" of a single process; of two processes with FSDP "whole", "resumed" from its
    middle, and "half", its first step in bfloat16.
    """
    folder = tmp_path_factory.mktemp("scaling")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        model = MICRO["model"] | {"attention_dropout": 0.0, "num_hidden_layers": 2}
        training = MICRO["training"] | {"logging_steps": 1, "save_steps": 4, "eval_steps": 4}
        training["per_device_train_batch_size"] = 1
        Path("micro.yaml").write_text(yaml.safe_dump({"model": model, "training": training}))
        ids = np.random.default_rng(0).integers(0, 40, 2000).cumsum() % 300
        ids.astype(np.uint16).tofile("corpus.bin")
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--main_process_port", "0"]
        launcher += ["--config_file", str(PROJECT / "configs/accelerate/fsdp2.yaml"), "--mixed_precision", "no"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
        path = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
        sharded = subprocess.Popen(
            [*launcher, str(PROJECT / "tests/fsdp_on_cpu.py"), *SETTINGS, "--output_dir", "whole"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path},
        )  # fmt: skip
        patch.setattr(sys, "argv", ["run_clm_creature.py", *SETTINGS, "--output_dir", "one"])
        assert run_clm_creature.main() == 0
        try:
            output, _ = sharded.communicate(timeout=200)
        finally:
            sharded.terminate()  # the launcher forwards it
        assert sharded.returncode == 0, output[-3000:]
    return folder


def curve(folder, key="loss"):
    return {entry["step"]: entry[key] for entry in checkpoints.read_metrics(folder) if key in entry}


def test_two_shards_give_the_curve_of_one_process(runs):
    described = [json.loads((runs / name / "run.json").read_text())["must_match"] for name in ("one", "whole")]
    assert [own["world_size"] for own in described] == [1, 2] and described[1]["optimizer"] == "muon + adamw"
    for key in ("loss", "grad_norm", "eval_loss", "tokens"):
        assert curve(runs / "one", key) == pytest.approx(curve(runs / "whole", key), rel=1e-5), key
    before, after = (load_file(runs / name / "model.safetensors") for name in ("one", "whole"))
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-4)


def test_a_sharded_run_resumes_bit_for_bit(runs):
    whole, resumed = (load_file(runs / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert curve(runs / "whole") == curve(runs / "resumed")


def test_losses_leave_a_sharded_model_in_float32(runs):
    """accelerate's policy for bfloat16 rounds what a model returns: 10.8155 would become 10.8125."""
    assert curve(runs / "half")[1] == pytest.approx(curve(runs / "one")[1], abs=1e-3)


def test_a_sharded_run_saves_a_plain_model_with_its_code(runs):
    """It loads in a process without the project: the saved code must be the model's, not that of torch's wrapper."""
    code = (
        "from transformers import AutoModelForCausalLM\n"
        "for folder in ('whole', 'whole/checkpoint-4'):\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "    print(type(model).__name__, model.lm_head.weight is model.model.embed_tokens.weight)\n"
    )
    environment = os.environ | {"HF_HOME": str(runs / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=runs, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["MultiModalCreature", "True"] * 2, done.stderr
    for folder in ("whole", "whole/checkpoint-4"):
        assert json.loads((runs / folder / "config.json").read_text())["auto_map"] == {
            "AutoConfig": "configuration_creature.CreatureConfig",
            "AutoModel": "modeling_creature.CreatureModel",
            "AutoModelForMultimodalLM": "modeling_creature.MultiModalCreature",
            "AutoModelForCausalLM": "modeling_creature.MultiModalCreature",
        }
        assert "lm_head.weight" not in load_file(runs / folder / "model.safetensors")


def test_a_micro_batch_that_does_not_fit_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr("creature.plan.fit_micro_batch", lambda *args, **kwargs: 0)
    config = SimpleNamespace(max_position_embeddings=2048, hidden_size=512)
    for sharded, words in ((False, "smaller configuration"), (True, "give --per_device_train_batch_size")):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", str(sharded))
        with pytest.raises(UserError, match=words):
            plan_run(Settings(training={"use_cpu": True, "max_steps": 50}), config)


def test_fsdp_without_gpus_is_refused(runs, monkeypatch):
    monkeypatch.chdir(runs)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(sys, "argv", ["run_clm_creature.py", *SETTINGS, "--output_dir", "refused"])
    with pytest.raises(UserError, match="over GPUs only"):
        run_clm_creature.main()
    assert not Path("refused").exists()


def test_two_processes_of_tensor_parallelism_give_what_one_gives(tmp_path):
    model = micro_model(num_key_value_heads=2)
    model.save_pretrained(tmp_path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    launcher += ["--rdzv_endpoint", "localhost:0", str(PROJECT / "tests/tensor_parallel_on_cpu.py"), str(tmp_path)]
    path = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    done = subprocess.run(launcher, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    result = torch.load(tmp_path / "result.pt")
    assert result["rows of a process"] == model.config.intermediate_size // 2
    one, two = result["one"], result["two"]
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-5)
    torch.testing.assert_close(two["logits by embeddings"], two["logits"], rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_two_gpus_train_alike_whole_and_in_shards(tmp_path, compiled):
    model = MICRO["model"] | {"attention_dropout": 0.0, "hidden_size": 128, "intermediate_size": 256}
    training = MICRO["training"] | {"logging_steps": 1, "save_steps": 6, "eval_steps": 6}
    (tmp_path / "micro.yaml").write_text(yaml.safe_dump({"model": model, "training": training}))
    ids = np.random.default_rng(0).integers(0, 40, 2000).cumsum() % 300
    ids.astype(np.uint16).tofile(tmp_path / "corpus.bin")
    settings = ["--config", "micro.yaml", "--data", "corpus.bin", "--max_steps", "12", "--torch_compile", compiled]

    def launch(config: str, *flags: str) -> None:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--main_process_port", "0"]
        launcher += ["--mixed_precision", "bf16", "--config_file", str(PROJECT / "configs" / "accelerate" / config)]
        script = [str(PROJECT / "run_clm_creature.py"), *settings, *flags]
        done = subprocess.run([*launcher, *script], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    launch("ddp.yaml", "--output_dir", "ddp")
    launch("fsdp2.yaml", "--output_dir", "fsdp2")
    for key in ("loss", "eval_loss"):
        assert curve(tmp_path / "ddp", key) == pytest.approx(curve(tmp_path / "fsdp2", key), rel=5e-3), key
    before = load_file(tmp_path / "fsdp2" / "model.safetensors")
    shutil.rmtree(tmp_path / "fsdp2" / "checkpoint-12")
    checkpoints.update_run(tmp_path / "fsdp2", status="stopped")
    launch("fsdp2.yaml", "--output_dir", "fsdp2", "--resume")
    after = load_file(tmp_path / "fsdp2" / "model.safetensors")
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=2e-3)
