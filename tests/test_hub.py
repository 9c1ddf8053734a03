"""The folder of a run as a repository: its model card, its way to a hub and back, and how a stranger loads it."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from creatures import GPT2, MICRO, micro_model
from huggingface_hub import ModelCard
from loopback_hub import loopback_hub
from safetensors.torch import load_file
from test_remote_code import PREAMBLE
from transformers import AutoModelForCausalLM, TorchAoConfig

import modeling_creature
import run_clm_creature
from creature import checkpoints
from creature.card import card_text
from creature.data.text.stories import write_story_corpus
from creature.errors import UserError

PROJECT = Path(modeling_creature.__file__).parent
NAME = "someone/micro"
SETTINGS = {
    "model": MICRO["model"]
    | dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, max_position_embeddings=64, attention_dropout=0),
    "training": dict(
        tokens_per_step=128, per_device_train_batch_size=2, logging_steps=2, save_steps=6, eval_steps=6, max_steps=12,
        cpu_threads=1, output_dir="micro", push_to_hub=True, hub_model_id=NAME,
    ),
}  # fmt: skip

# What a stranger does: by name from the hub, with the code blocks of the card, in every way it should load.
ELSEWHERE = """
from transformers import AutoTokenizer, TorchAoConfig, pipeline

name, again = "someone/micro", "someone/again"
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
inputs = tokenizer(["Once upon a time there was", "The"], return_tensors="pt", padding=True)
report = {"context": tokenizer.model_max_length, "pad": tokenizer.pad_token, "side": tokenizer.padding_side}

def load(**options):
    return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, **options)

def look(key, model):
    with torch.no_grad():
        logits = model(**inputs).logits.float()
    text = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    error = ((logits - exact).norm() / exact.norm()).item()
    kinds = sorted({type(parameter).__name__ for parameter in model.model.layers.parameters()})
    report[key] = {"dtype": str(model.dtype), "error": error, "kinds": kinds, "new": text.shape[1]}
    return model

report["backbone"] = type(AutoModel.from_pretrained(name, trust_remote_code=True)).__name__
plain = load()
assert type(plain).__module__.startswith("transformers_modules."), type(plain)
with torch.no_grad():
    exact = plain(**inputs).logits
report["samples"] = plain.generation_config.do_sample
look("auto", load(device_map="auto"))
look("bf16", load(dtype=torch.bfloat16))
try:
    import torchao.quantization as ao
except ImportError:
    pass
else:
    look("8 bit", load(quantization_config=TorchAoConfig(ao.Int8WeightOnlyConfig()), device_map="cpu"))
    four = ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32))
    rest = ["model.senses", "streams"]
    look("4 bit", load(quantization_config=TorchAoConfig(four, modules_to_not_convert=rest), device_map="cpu"))

# What came from a hub goes to a hub, with its code.
plain.push_to_hub(again)
tokenizer.push_to_hub(again)
second = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
report["again"] = all(torch.equal(a, b) for a, b in zip(plain.parameters(), second.parameters(), strict=True))
print("report: " + json.dumps(report))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub to which a micro run has been pushed by the training job itself; `place` is where it ran."""
    place = tmp_path_factory.mktemp("run")
    (place / "micro.yaml").write_text(yaml.safe_dump(SETTINGS))
    write_story_corpus(place / "stories.txt", 4000, seed=0)
    with loopback_hub() as hub, pytest.MonkeyPatch.context() as patch:
        hub.place = place
        patch.chdir(place)
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        patch.setattr("transformers.utils.hub._hf_api", None)  # made once, it keeps the address of that time
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        patch.setenv("HF_TOKEN", "hf_of_nobody")
        patch.setattr(sys, "argv", ["run_clm_creature.py", "--config", "micro.yaml", "--data", "stories.txt"])
        assert run_clm_creature.main() == 0
        yield hub


@pytest.fixture(scope="module")
def report(hub, tmp_path_factory):
    """What `ELSEWHERE` and the code of the card print in a process that knows nothing of this project."""
    place = tmp_path_factory.mktemp("elsewhere")
    card = hub.files[NAME]["README.md"].decode("utf-8")
    blocks = [block.replace('"micro"', f'"{NAME}"') for block in re.findall(r"```python\n(.*?)```", card, re.S)]
    assert len(blocks) == 2 and all(NAME in block for block in blocks)
    script = place / "script.py"
    script.write_text("\n".join([PREAMBLE, "import json", textwrap.dedent(ELSEWHERE), *blocks]), encoding="utf-8")
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONPATH" and "OFFLINE" not in name}
    environment |= {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_of_nobody", "HF_HOME": str(place / "home")}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=place, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("Once upon a time") == 2, "the two examples of the card continue their prompt"
    (line,) = re.findall(r"^report: (.*)$", done.stdout, re.M)
    return json.loads(line)


def test_a_run_pushes_its_folder_and_nothing_that_only_a_resume_needs(hub):
    folder, pushed = hub.place / "micro", hub.files[NAME]
    assert hub.commits[0] == "End of training, step 12"
    code = {path.name for path in PROJECT.glob("*_creature.py")} - {"run_clm_creature.py"}
    # For recordings: no model file reads them.
    code -= {"codec_creature.py", "feature_extraction_creature.py", "processing_creature.py", "ticks_creature.py"}
    others = {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "loss.png", "throughput.png", "metrics.jsonl",
    }  # fmt: skip
    assert set(pushed) == code | others
    assert all((folder / name).read_bytes() == content for name, content in pushed.items())
    assert str(hub.place) not in pushed["README.md"].decode("utf-8")
    assert checkpoints.list_checkpoints(folder), "they stay where they are"


def test_a_repository_that_cannot_be_had_is_told_before_the_training(hub, monkeypatch):
    monkeypatch.chdir(hub.place)
    command = ["run_clm_creature.py", "--config", "micro.yaml", "--data", "stories.txt", "--output_dir", "other"]
    monkeypatch.setattr(sys, "argv", [*command, "--hub_model_id", "no/such/name"])
    with pytest.raises(UserError, match="--push_to_hub finds no way.*`hf auth login`"):
        run_clm_creature.main()
    assert not (hub.place / "other" / "metrics.jsonl").exists()


def test_a_failed_push_costs_nothing_and_says_how_to_do_it(hub, monkeypatch, capsys):
    from types import SimpleNamespace

    from creature.finalize import _push

    args = SimpleNamespace(hub_token=None, hub_revision=None)
    trainer = SimpleNamespace(args=args, hub_model_id=NAME, state=SimpleNamespace(global_step=12))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    _push(trainer, hub.place / "micro")
    output = capsys.readouterr().out
    assert "not pushed" in output and f"hf upload {NAME} " in output and "--exclude 'checkpoint-*'" in output


def test_the_card_says_what_was_measured(hub):
    folder = hub.place / "micro"
    card = ModelCard.load(folder / "README.md")
    last = [entry for entry in checkpoints.read_metrics(folder) if "eval_loss" in entry][-1]
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured == pytest.approx(
        {
            "loss": last["eval_loss"],
            "perplexity": last["eval_perplexity"],
            "bits_per_byte": last["eval_bits_per_byte"],
            "accuracy": last["eval_accuracy"],
        },
        abs=1e-5,
    )
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert {result.dataset_type for result in card.data.eval_results} == {"stories-txt"}
    run = checkpoints.read_run(folder)
    assert f"| perplexity | {last['eval_perplexity']:.2f} |" in card.text
    assert f"1 x {run['device']}, fp32" in card.text and "stories.txt, " in card.text
    assert f"{run['data']['tokens']:,} tokens" in card.text and "| tokens seen | 1,536, " in card.text
    assert "(loss.png)" in card.text and (folder / "loss.png").is_file()
    assert len(run["samples"]) == 3 and all(f"> {sample.splitlines()[0]}" in card.text for sample in run["samples"])


def test_the_card_leaves_out_what_was_not_measured(hub, tmp_path):
    run = checkpoints.read_run(hub.place / "micro")
    bare = ModelCard(card_text(tmp_path / "bare", {key: run[key] for key in run if key != "samples"}))
    assert bare.data.eval_results is None and "Nothing was evaluated" in bare.text
    assert "## Samples" not in bare.text and "loss.png" not in bare.text and "tokens/s" not in bare.text
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "eval_loss": 800.0, "eval_perplexity": Infinity}\n')
    card = ModelCard(card_text(tmp_path, run))
    assert [result.metric_type for result in card.data.eval_results] == ["loss"] and "perplexity" not in card.text


def test_a_dataset_of_the_hub_is_linked(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = checkpoints.read_run(hub.place / "micro")
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "eval_loss": 5.0}\n')
    run["data"]["source"] = "someone/Tales:plain:train"
    data = ModelCard(card_text(tmp_path, run)).data
    assert data.datasets == ["someone/Tales"] and data.eval_results[0].dataset_type == "someone/Tales"


def test_a_stranger_loads_it_by_name_in_every_way(report):
    assert report["context"] == 64 and report["pad"] == "<|pad|>" and report["side"] == "left"
    assert report["samples"] is True and report["backbone"] == "CreatureModel"
    assert report["auto"]["error"] == 0 and report["auto"]["dtype"] == "torch.float32"
    assert report["bf16"]["dtype"] == "torch.bfloat16" and 0 < report["bf16"]["error"] < 0.03
    assert report["auto"]["new"] == report["bf16"]["new"]
    assert report["again"] is True


@pytest.mark.parametrize(
    "bits, kind, most", [("8 bit", "Int8Tensor", 0.02), ("4 bit", "IntxUnpackedToInt8Tensor", 0.2)]
)
def test_torchao_quantizes_its_weights_as_it_loads(report, bits, kind, most):
    pytest.importorskip("torchao")
    assert kind in report[bits]["kinds"], "the matrices of the backbone are quantized"
    assert 0 < report[bits]["error"] < most
    assert report[bits]["new"] == report["auto"]["new"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bits", [8, 4])
def test_torchao_quantizes_on_a_gpu(bits, tmp_path):
    ao = pytest.importorskip("torchao.quantization")
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    plain = micro_model(**sizes, **GPT2)
    plain.save_pretrained(tmp_path)
    packed = {"group_size": 32, "int4_packing_format": "tile_packed_to_4d"}
    config = ao.Int8WeightOnlyConfig() if bits == 8 else ao.Int4WeightOnlyConfig(**packed)
    quantization = TorchAoConfig(config, modules_to_not_convert=["model.senses", "streams"])
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=quantization, device_map="cuda"
    )
    prompt = torch.randint(0, 50000, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, logits = plain(prompt).logits, model(prompt.cuda()).logits.float().cpu()
    assert 0 < (logits - exact).norm() / exact.norm() < (0.05 if bits == 8 else 0.4)
    assert type(model.model.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter
    # Through the CUDA graph of the fast loop, and through the loop of transformers.
    options = {"max_new_tokens": 8, "do_sample": False}
    fast = model.generate(prompt.cuda(), **options)
    assert torch.equal(fast, model.generate(prompt.cuda(), cache_implementation="dynamic", **options))


def test_what_is_pushed_again_says_of_itself_where_its_code_is(report, hub):
    again = hub.files["someone/again"]
    modules = json.loads(again["config.json"])["auto_map"]
    assert modules == json.loads(hub.files[NAME]["config.json"])["auto_map"]
    assert set(modules) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForMultimodalLM"}
    assert all(f"{value.partition('.')[0]}.py" in again for value in modules.values())
    assert again["modeling_creature.py"] == (PROJECT / "modeling_creature.py").read_bytes()
    path = hub.place / "again.safetensors"
    path.write_bytes(again["model.safetensors"])
    assert load_file(path).keys() == load_file(hub.place / "micro" / "model.safetensors").keys()
