"""`creature.fast` on a CPU: the numbers and parameters of the plain model, and no trace in a checkpoint."""

import torch
from creatures import gradients, micro_model, random_batch

from creature import fast
from creature.fast.layers import FastAttention, FastMLP
from modeling_creature import MultiModalCreature


def test_a_model_with_fast_parts_is_the_same_model(tmp_path):
    plain, faster = micro_model(), micro_model()
    fast.apply(faster)
    assert all(type(layer.self_attn) is FastAttention for layer in faster.model.layers)
    assert all(type(layer.mlp) is FastMLP for layer in faster.model.layers)
    assert list(plain.state_dict()) == list(faster.state_dict())
    batch = random_batch(plain.config)
    losses = [model.train()(**batch).loss for model in (plain, faster)]
    assert torch.equal(*losses)
    losses[0].backward(), losses[1].backward()
    expected, found = gradients(plain), gradients(faster)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    ids = batch["input_ids"]
    tokens = [model.eval().generate(ids, max_new_tokens=8, do_sample=False) for model in (plain, faster)]
    assert torch.equal(*tokens)
    faster.save_pretrained(tmp_path)
    loaded = MultiModalCreature.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, plain(ids).logits)
    assert not any("fast" in path.name or "kernels" in path.name for path in tmp_path.iterdir())


def test_other_activations_keep_the_plain_mlp():
    model = micro_model(hidden_act="gelu")
    fast.apply(model)
    assert not any(isinstance(layer.mlp, FastMLP) for layer in model.model.layers)
