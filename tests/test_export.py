"""Exported graphs give the creature's logits at any batch and length; servers find what they look for in the model."""

import functools
import importlib.util
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from creatures import micro_model
from torch import nn
from transformers import AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_creature import CreatureModel, MultiModalCreature


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "creature"
    micro_model().save_pretrained(path)
    return path


@pytest.fixture
def export(run_script):
    return functools.partial(run_script, "export")


def padded_batches():
    """ids, mask and the creature's logits at the ticks that are there, for several batch sizes and lengths."""
    model = micro_model()
    for rows, ticks in ((1, 1), (2, 5), (4, 33), (1, 64)):
        ids = torch.randint(0, 120, (rows, ticks), generator=torch.Generator().manual_seed(ticks))
        mask = torch.ones_like(ids)
        mask[1:, : ticks // 2] = 0
        with torch.no_grad():
            yield ids, mask, model(input_ids=ids, attention_mask=mask).logits[mask.bool()]


def test_a_torch_program_runs_without_the_library(export, folder, tmp_path):
    code, out, err = export("--checkpoint", folder, "--format", "torch", "--output", tmp_path / "creature.pt2")
    assert code == 0 and "largest difference of logits" in out, err
    batches = [(ids, mask) for ids, mask, _ in padded_batches()]
    torch.save(batches, tmp_path / "batches.pt")
    program = """
    import sys
    import torch
    run = torch.export.load("creature.pt2").module()
    found = [run(input_ids=ids, attention_mask=mask)[mask.bool()] for ids, mask in torch.load("batches.pt")]
    assert not {"modeling_creature", "creature", "transformers"} & set(sys.modules)
    torch.save([logits.detach() for logits in found], "found.pt")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, check=True, timeout=240)
    for found, (_, _, expected) in zip(torch.load(tmp_path / "found.pt"), padded_batches(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(Exception, match="64"):  # beyond the context, positions were never trained
        torch.export.load(tmp_path / "creature.pt2").module()(
            input_ids=torch.zeros(1, 65, dtype=torch.long), attention_mask=torch.ones(1, 65, dtype=torch.long)
        )


def test_an_onnx_graph_gives_the_same_logits(export, folder):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    code, out, err = export("--checkpoint", folder, "--format", "onnx")
    assert code == 0 and "largest difference of logits" in out, err
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert {one.name: one.shape for one in session.get_inputs()} == {
        "input_ids": ["batch", "length"],
        "attention_mask": ["batch", "length"],
    }
    assert [(one.name, one.shape) for one in session.get_outputs()] == [("logits", ["batch", "length", 128])]
    for ids, mask, expected in padded_batches():
        (logits,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        np.testing.assert_allclose(logits[mask.numpy() == 1], expected.numpy(), rtol=0, atol=1e-4)


def test_export_refuses_in_words(export, folder, tmp_path, monkeypatch):
    code, _, err = export("--checkpoint", folder, "--format", "torch", "--output", tmp_path / "creature.onnx")
    assert code == 1 and "ends in .pt2" in err
    code, _, err = export("--checkpoint", tmp_path / "nothing", "--format", "torch")
    assert code == 1 and "there is no folder" in err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = export("--checkpoint", folder, "--format", "onnx")
    assert code == 1 and "pip install onnx onnxscript onnxruntime" in err


# ---------------------------------------------------------------------------------------------------------------------
# vLLM, which is not installed here: what its transformers backend does to a model, done by hand
# ---------------------------------------------------------------------------------------------------------------------


class ServedLinear(nn.Module):
    """What a server puts in the place of a Linear: a matrix product, and nothing else that a Linear has."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(linear.weight.shape))
        self.bias = None if linear.bias is None else nn.Parameter(torch.empty(linear.bias.shape))

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class ServedEmbedding(nn.Module):
    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(embedding.weight.shape))

    def forward(self, ids):
        return self.weight[ids]


class ServedAttention:
    """A layer's attention with a cache of its own, over tokens [n, heads * head_dim]."""

    def __init__(self, config):
        self.config, self.scale, self.keys, self.values = config, None, [], []

    def forward(self, query, key, value):
        self.keys.append(key)
        self.values.append(value)
        query, key, value = (
            x.view(len(x), -1, self.config.head_dim).transpose(0, 1)
            for x in (query, torch.cat(self.keys), torch.cat(self.values))
        )
        seen = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril(key.shape[1] - query.shape[1])
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=self.scale, enable_gqa=True
        )
        return out.transpose(0, 1).flatten(1)


def served_attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    assert attention_mask is None
    instance = attention_instances[module.layer_idx]
    instance.scale = scaling
    query, key, value = (x.transpose(1, 2).reshape(x.shape[-2], -1) for x in (query, key, value))
    return instance.forward(query, key, value), None


def replace(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, ServedLinear(child))
        else:
            replace(child)


@torch.no_grad()
def test_a_server_with_attention_and_layers_of_its_own_gets_the_same_logits(folder):
    """Layers replaced, weights loaded by name, positions in place of a cache; the prompt, then token by token."""
    expected = MultiModalCreature.from_pretrained(folder)
    ALL_ATTENTION_FUNCTIONS.register("served", served_attention)
    config = expected.config.__class__.from_pretrained(folder)
    config._attn_implementation = "served"
    with torch.device("meta"):
        backbone = AutoModel.from_config(config)
    assert type(backbone) is CreatureModel and backbone.is_backend_compatible()
    # One module that is not causal, and vLLM takes the model for an encoder.
    assert all(getattr(module, "is_causal", True) for module in backbone.modules())
    replace(backbone)
    backbone.set_input_embeddings(ServedEmbedding(backbone.get_input_embeddings()))
    backbone.to_empty(device="cpu")
    backbone.rotary_emb.inv_freq = expected.model.rotary_emb.inv_freq.clone()
    loaded = backbone.load_state_dict(expected.model.state_dict(), strict=True)
    assert not loaded.missing_keys and not loaded.unexpected_keys

    instances = {layer: ServedAttention(config) for layer in range(config.num_hidden_layers)}
    ids = torch.randint(0, 120, (1, 12), generator=torch.Generator().manual_seed(0))
    states = []
    for begin, end in ((0, 7), *((tick, tick + 1) for tick in range(7, 12))):
        outputs = backbone(
            input_ids=ids[:, begin:end],
            inputs_embeds=None,
            use_cache=False,
            position_ids=torch.arange(begin, end)[None],
            attention_instances=instances,
            forward_batch=None,
            return_dict=False,
        )
        states.append(outputs[0][0])
    logits = torch.cat(states) @ backbone.get_input_embeddings().weight.t()
    torch.testing.assert_close(logits, expected(ids).logits[0], rtol=1e-4, atol=1e-5)


def test_every_planned_module_is_there():
    model = micro_model()
    names = {name for name, _ in model.model.named_modules()}
    for plan in (model.config.base_model_tp_plan, model.config.base_model_pp_plan):
        for pattern in plan:
            assert pattern.replace("*", "0") in names
