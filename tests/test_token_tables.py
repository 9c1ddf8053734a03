"""What a token brings along beside its embedding: values for attention, and factors for units of every MLP."""

import pytest
import torch
from creatures import TABLES, micro_model


def test_values_behind_the_first_layer_begin_with_its_alone():
    model = micro_model(random=False, num_hidden_layers=4, use_value_embeddings=True)
    layers = [layer.self_attn for layer in model.model.layers]
    assert [layer.adds_first_values for layer in layers] == [False, True, True, True]
    assert [bool(layer.v_proj.weight.any()) for layer in layers] == [True, False, False, False]
    assert [layer.value_gate is not None for layer in layers] == [False, False, False, True]
    assert not layers[3].value_gate.weight.any()
    std = model.config.initializer_range
    assert model.model.embed_values.weight.std().item() == pytest.approx(2.5 * std, rel=0.05)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(std, rel=0.05)
    scales = [layer.input_scale for layer in model.model.layers]
    assert [scale is not None for scale in scales] == [False, True, True, True]


@pytest.mark.parametrize("name, size", TABLES.items())
def test_tables_by_token_reach_what_the_ids_say_and_need_them(name, size):
    model = micro_model(**{name: size})
    values = name == "use_value_embeddings"
    table = (model.model.embed_values if values else model.model.embed_per_layer).weight
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        logits = model(ids).logits
        rows = table.view(model.config.vocab_size, -1)
        rows[5] = rows[5].flip(0)
        changed = model(ids).logits
        assert torch.equal(changed[:, :2], logits[:, :2]) and not torch.allclose(changed[:, 2:], logits[:, 2:])
        alone = model(inputs_embeds=model.model.embed_tokens(ids)).logits
        assert not torch.allclose(alone, changed)
        table.fill_(0.0 if values else 1.0)  # added to the values; factors, once they are normalized
        torch.testing.assert_close(model(ids).logits, alone)


def test_more_factors_than_units_are_as_many_as_there_are():
    model = micro_model(per_layer_embedding_size=1000)
    size = model.config.intermediate_size
    assert model.config.per_layer_embedding_size == model.model.embed_per_layer.embedding_dim == size
    assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


@pytest.mark.parametrize("grad", [False, True])
def test_a_token_scales_the_first_units_of_each_mlp(grad):
    model = micro_model(per_layer_embedding_size=8)
    mlp, units = model.model.layers[1].mlp, []
    mlp.down_proj.register_forward_pre_hook(lambda module, inputs: units.append(inputs[0].detach()))
    ids = torch.tensor([[3, 4, 5]])
    table = model.model.embed_per_layer.weight
    with torch.no_grad():
        table.fill_(1.0)
    with torch.set_grad_enabled(grad):
        model(ids)
    with torch.no_grad():
        table[4 * model.config.num_hidden_layers + 1] *= torch.tensor([3.0, -1.0] * 4)  # token 4 in the second layer
    with torch.set_grad_enabled(grad):
        model(ids)
    scales = torch.tensor([3.0, -1.0] * 4) / 5**0.5  # a root mean square of 1
    torch.testing.assert_close(units[1][0, 1, :8], units[0][0, 1, :8] * scales)
    assert torch.equal(units[1][0, 1, 8:], units[0][0, 1, 8:]) and torch.equal(units[1][0, ::2], units[0][0, ::2])
