"""The model as transformers sees it: saving, attention, packing, checkpointing, compilation, precision, traps."""

import json
import math

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from creatures import (
    ALL_STREAMS,
    EVERY_WEIGHT,
    SENSE_ARGUMENTS,
    absent_is,
    assert_close,
    gradients,
    micro_config,
    micro_model,
    random_batch,
    randomize,
    select,
    without_targets,
)
from safetensors.torch import load_file, load_model, save_file
from transformers import AutoModel, AutoModelForCausalLM

from configuration_creature import SENSES, STREAMS, CreatureConfig
from modeling_creature import CreatureModel, MultiModalCreature

OUTPUTS = ("logits", "external_text_logits", "audio_logits", "animation", "action")


@pytest.fixture(scope="module")
def model():
    return micro_model()


@pytest.fixture(scope="module")
def batch(model):
    return random_batch(model.config)


@torch.no_grad()
def outputs(model, batch):
    out = model(**batch, output_streams=ALL_STREAMS)
    return {name: out[name] for name in OUTPUTS}


def training_step(model, batch, **named):
    """Loss and gradients of one batch in training mode."""
    model.train()
    loss = model(**batch, **named).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


# --- saving and loading ----------------------------------------------------------------------------------------------


def test_save_and_load_is_bit_equal(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    expected = outputs(model, batch)
    for loaded in (MultiModalCreature.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(loaded) is MultiModalCreature and not loaded.training
        for name, value in outputs(loaded, batch).items():
            assert torch.equal(value, expected[name]), name
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        continued = [creature.generate(batch["input_ids"], max_new_tokens=3) for creature in (loaded, model)]
        assert torch.equal(*continued)


@pytest.mark.parametrize("backbone", [False, True])
def test_a_file_holds_every_parameter_once_by_its_name(model, tmp_path, backbone):
    """The tied table, too: a stock Trainer resumes by the names in the model."""
    saved = model.model if backbone else model
    saved.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    parameters = dict(saved.named_parameters())
    assert stored.keys() == parameters.keys()
    assert all(torch.equal(stored[name], value) for name, value in parameters.items())
    loaded = type(saved).from_pretrained(tmp_path)
    assert all(torch.equal(value, parameters[name]) for name, value in loaded.named_parameters())


def test_tools_that_know_only_the_names_in_the_model_read_the_file(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    plain, tied = micro_model(seed=1), micro_model(seed=2)
    missing, unexpected = plain.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # the tied table, as for every tied model
    assert load_model(tied, tmp_path / "model.safetensors") == (set(), [])
    with init_empty_weights():
        empty = MultiModalCreature(micro_config())
    empty.tie_weights()
    dispatched = load_checkpoint_and_dispatch(empty, tmp_path, device_map={"": "cpu"}).eval()
    expected = outputs(model, batch)
    for loaded in (plain, tied, dispatched):
        assert_close(outputs(loaded, batch), expected, atol=0.0, rtol=0.0)


def test_untied_table(batch, tmp_path):
    model = micro_model(tie_word_embeddings=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = MultiModalCreature.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded, batch)["logits"], outputs(model, batch)["logits"])
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_buffers_outside_the_checkpoint_survive_loading(model, tmp_path):
    """They are uninitialised memory after `from_pretrained` unless something restores them."""
    model.save_pretrained(tmp_path)
    loaded = MultiModalCreature.from_pretrained(tmp_path)
    buffers = dict(loaded.named_buffers())
    assert {"model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"} <= {*buffers}
    for name, value in model.named_buffers():
        assert torch.equal(buffers[name], value), name


def test_loading_keeps_every_weight_and_initializes_missing_ones(model, tmp_path):
    """A projection that starts at zero keeps what it has learned; a weight that is missing begins as in a new model."""
    model.save_pretrained(tmp_path)
    loaded, info = MultiModalCreature.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, value in loaded.named_parameters():
        assert torch.equal(value, model.get_parameter(name)), name

    weights = load_file(tmp_path / "model.safetensors")
    table = "model.senses.own_voice.codes.weight"
    touch = {name: weights.pop(name) for name in [*weights] if name.startswith("model.senses.touch.") or name == table}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = MultiModalCreature.from_pretrained(tmp_path, output_loading_info=True)
    assert {*info["missing_keys"]} == {*touch}
    assert not loaded.model.senses.touch.proj.weight.any()
    assert 0.01 < loaded.get_parameter(table).std() < 0.03
    assert torch.equal(loaded.model.senses.audio.proj.weight, model.model.senses.audio.proj.weight)


@pytest.mark.parametrize("field", [{"use_value_embeddings": True}, {"per_layer_embedding_size": 64}])
def test_a_checkpoint_with_removed_tables_is_refused_in_a_sentence(model, tmp_path, field):
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(saved | field), encoding="utf-8")
    for kind in (MultiModalCreature, AutoModelForCausalLM, AutoModel):
        with pytest.raises(ValueError, match=f"{[*field][0]}.*load it with the version that trained it, or .*"):
            kind.from_pretrained(tmp_path)
    unused = {"use_value_embeddings": False, "per_layer_embedding_size": 0}
    (tmp_path / "config.json").write_text(json.dumps(saved | unused), encoding="utf-8")
    assert not hasattr(MultiModalCreature.from_pretrained(tmp_path).config, "use_value_embeddings")


def test_backbone_alone(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert type(backbone) is CreatureModel
    with torch.no_grad():
        hidden = backbone(batch["input_ids"]).last_hidden_state
        assert torch.equal(hidden, model(batch["input_ids"]).last_hidden_state)


def test_initial_weights():
    torch.manual_seed(0)
    config = micro_config(hidden_size=128, head_dim=None)
    model = MultiModalCreature(config)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    residual = model.model.layers[0].mlp.down_proj.weight.std().item()
    assert residual == pytest.approx(0.02 / math.sqrt(2 * config.num_hidden_layers), rel=0.1)
    eyes = model.model.senses.vision.layers[0].weight
    assert eyes.std().item() == pytest.approx(eyes.shape[1] ** -0.5, rel=0.15)  # pictures keep their size
    assert (model.model.norm.weight == 1).all() and (model.streams.audio.norm.weight == 1).all()
    assert model.streams.audio.position.weight.std() < 0.03
    for name, value in model.named_parameters():
        assert value.isfinite().all() and value.abs().max() <= 1, name
    # An untrained creature knows nothing: its loss is that of a blind guess, whatever it feels.
    losses = model.eval()(**random_batch(config)).losses
    assert losses["internal_text"].item() == pytest.approx(math.log(128), rel=0.05)
    assert losses["audio"].item() == pytest.approx(math.log(11), rel=0.05)


def test_the_same_seed_gives_the_same_creature():
    first, second = micro_model(random=False), micro_model(random=False)
    for name, value in first.named_parameters():
        assert torch.equal(value, second.get_parameter(name)), name


def test_the_default_creature_has_the_documented_size():
    with torch.device("meta"):
        model = MultiModalCreature(CreatureConfig())
    count = dict.fromkeys(("table", "body", "rest"), 0.0)
    for name, value in model.named_parameters():
        table = name == "model.embed_tokens.weight"
        body = name.startswith(("model.layers.", "model.norm."))
        count["table" if table else "body" if body else "rest"] += value.numel() / 1e6
    assert count["table"] == pytest.approx(25.8, abs=0.05)
    assert count["body"] == pytest.approx(18.9, abs=0.05)
    assert count["rest"] == pytest.approx(9.6, abs=0.05)


def test_auto_classes_know_the_creature():
    model = AutoModelForCausalLM.from_config(micro_config())
    assert type(model) is MultiModalCreature
    assert type(AutoModel.from_config(micro_config())) is CreatureModel


# --- outputs ---------------------------------------------------------------------------------------------------------


def test_logits_to_keep(model, batch):
    whole = outputs(model, batch)
    senses = without_targets(batch)
    whole_free = outputs(model, senses)
    for keep, ticks in ((1, slice(-1, None)), (3, slice(-3, None)), (torch.tensor([0, 5]), [0, 5])):
        with torch.no_grad():
            out = model(**batch, output_streams=ALL_STREAMS, logits_to_keep=keep)
            free = model(**senses, output_streams=ALL_STREAMS, logits_to_keep=keep)
        for name in OUTPUTS:
            torch.testing.assert_close(out[name], whole[name][:, ticks])
            torch.testing.assert_close(free[name], whole_free[name][:, ticks])


def test_modes_of_return_logits(model, batch):
    labels = batch["labels"]
    with torch.no_grad():
        full = model(**batch)
        assert full.logits is not None and full.token_losses is None and full.predictions is None
        chunked = model(**batch, return_logits=False)
    assert chunked.logits is None
    torch.testing.assert_close(chunked.loss, full.loss)
    each = torch.nn.functional.cross_entropy(full.logits[:, :-1].mT, labels[:, 1:], reduction="none")
    assert chunked.token_losses.shape == labels[:, 1:].shape and chunked.token_losses.dtype == torch.float32
    torch.testing.assert_close(chunked.token_losses, each)
    assert not chunked.token_losses[labels[:, 1:] == -100].any()
    assert torch.equal(chunked.predictions, full.logits[:, :-1].argmax(-1))

    training = micro_model().train()
    assert training(**batch).logits is None  # the largest tensor of all is never computed
    assert training(**batch, return_logits=True).logits.shape == full.logits.shape
    assert training(**without_targets(batch)).logits is not None
    assert training(**batch).token_losses is None


def test_unasked_streams_are_none_and_unknown_ones_refused(model, batch):
    out = model(**without_targets(batch))
    assert out.external_text_logits is out.audio_logits is out.animation is None
    assert model(**without_targets(batch), output_streams=("audio",)).animation is None
    with pytest.raises(ValueError, match="smell.*internal_text, external_text, audio, animation"):
        model(**batch, output_streams=("smell",))


def test_logits_come_first_in_a_tuple_or_second_after_the_loss(model, batch):
    ids, labels = batch["input_ids"], batch["labels"]
    expected = model(ids, labels=labels)
    assert torch.equal(model(ids, return_dict=False)[0], expected.logits)
    loss, logits, *_ = model(ids, labels=labels, return_dict=False)
    assert torch.equal(loss, expected.loss) and torch.equal(logits, expected.logits)


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("pixel_value", "pixel_values"),
        ("label", "labels"),
        ("external_text_labels", "external_text_targets"),
        ("smell", None),
        ("top_k", None),
    ],
)
def test_an_unknown_argument_is_an_error(model, batch, argument, meant):
    hint = f": did you mean `{meant}`[?]" if meant else "; the docstring of `MultiModalCreature.forward` lists them[.]"
    for call in (model, model.step):
        with pytest.raises(TypeError, match=f"^`forward` has no argument `{argument}`{hint}$"):
            call(input_ids=batch["input_ids"], **{argument: 5})
    with pytest.raises(TypeError, match=f"^`forward` has no argument `{argument}`"):
        model.model(batch["input_ids"], **{argument: 5})


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_hidden_states_and_attentions_are_the_backbones(kind, batch):
    """The eyes are a transformer of their own, whose states are none of the creature's."""
    model = micro_model(attn_implementation=kind)
    with torch.no_grad():
        out = model(**without_targets(batch), output_hidden_states=True, output_attentions=kind == "eager")
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    assert [tuple(state.shape) for state in out.hidden_states] == [(3, 8, 32)] * (layers + 1)
    if kind == "eager":
        assert [tuple(weights.shape) for weights in out.attentions] == [(3, heads, 8, 8)] * layers
        for weights in out.attentions:
            torch.testing.assert_close(weights.sum(-1), torch.ones(3, heads, 8))
            assert not weights.triu(1).any()


# --- attention, packing, positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["eager", "flex_attention"])
def test_attention_implementations_agree(kind, padded):
    # Not 8 ticks: for them, with grouped keys, torch 2.13's own flex_attention is wrong on a CPU without AVX-512.
    given = without_targets(random_batch(micro_config(), ticks=16))
    if padded:
        given["attention_mask"] = torch.ones(3, 16, dtype=torch.long)
        given["attention_mask"][0, :3] = 0
    real = given.get("attention_mask", torch.ones(3, 16)).bool()
    expected = outputs(micro_model(), given)
    model = micro_model(attn_implementation=kind)
    assert model.config._attn_implementation == kind
    # transformers compiles flex_attention, which takes a minute on a CPU; not compiled, it is the same computation.
    with torch.compiler.set_stance("force_eager"):
        found = outputs(model, given)
    for name, value in found.items():
        torch.testing.assert_close(value[real], expected[name][real], atol=1e-4, rtol=1e-4)


def test_attention_implementation_can_be_switched(batch):
    model = micro_model(num_attention_heads=4, num_key_value_heads=2)  # two pairs of heads, each with keys of its own
    expected = outputs(model, batch)["logits"]
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(outputs(model, batch)["logits"], expected, atol=1e-4, rtol=1e-4)


def test_eager_and_sdpa_have_the_same_gradients(batch):
    expected = training_step(micro_model(), batch)
    assert_close(training_step(micro_model(attn_implementation="eager"), batch), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_documents_do_not_see_each_other(kind, use_cache):
    model = micro_model(attn_implementation=kind)
    model.config.use_cache = use_cache
    whole = without_targets(random_batch(model.config, rows=2, ticks=9, presence=1.1))
    whole["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, -1)
    for labels in ({}, {"labels": whole["input_ids"]}):
        with torch.no_grad():
            packed = model(**whole, **labels)
        for start, end in ((0, 4), (4, 9)):
            alone = {name: value[:, start:end] for name, value in whole.items() if name != "position_ids"}
            with torch.no_grad():
                expected = model(**alone).logits
            torch.testing.assert_close(packed.logits[:, start:end], expected, atol=1e-5, rtol=1e-5)


def test_the_backbone_alone_keeps_packed_documents_apart():
    model = micro_model().model
    ids = torch.randint(0, 100, (1, 6), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with torch.no_grad():
        packed = model(ids, position_ids=positions).last_hidden_state
        torch.testing.assert_close(packed[:, 3:], model(ids[:, 3:]).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_positions_are_relative(model, batch):
    ids = batch["input_ids"]
    positions = torch.arange(8)[None].expand(3, -1)
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(model(ids, position_ids=positions + 20).logits, expected, atol=1e-4, rtol=1e-4)
        stretched = model(ids, position_ids=positions * 3, attention_mask=torch.ones_like(ids)).logits
    assert not torch.allclose(stretched, expected, atol=1e-2)


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}])
def test_rope_scaling(rope, batch):
    model = micro_model(rope_parameters={"rope_theta": 10000.0, **rope}, max_position_embeddings=4)
    scaled, plain = outputs(model, batch)["logits"], outputs(micro_model(), batch)["logits"]
    assert scaled.isfinite().all() and not torch.allclose(scaled, plain)


def test_cache_continues_where_it_was(model, batch):
    ids = batch["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :5], use_cache=True)
        second = model(ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), whole, atol=1e-5, rtol=1e-5)
    assert model(ids, labels=ids).past_key_values is None  # no loss needs a cache


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(batch, reentrant):
    expected = training_step(micro_model(), batch)
    model = micro_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    calls = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *arguments: calls.append(1))
    assert_close(training_step(model, batch), expected, atol=1e-6)
    assert len(calls) == 2 * model.config.num_hidden_layers  # each layer is run again in the backward pass


def test_resize_token_embeddings(batch, tmp_path):
    model = micro_model()
    before = outputs(model, batch)
    model.resize_token_embeddings(192)
    assert model.config.vocab_size == 192 and model.lm_head.weight is model.model.embed_tokens.weight
    after = outputs(model, batch)
    for name in ("logits", "external_text_logits"):
        assert after[name].shape[-1] == 192
        torch.testing.assert_close(after[name][..., :128], before[name])
    new = torch.full((1, 4), 191)
    assert model(new, external_voice_ids=new, labels=new, external_text_targets=new).loss.isfinite()
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(MultiModalCreature.from_pretrained(tmp_path), batch)["logits"], after["logits"])


def test_bf16_model(batch, tmp_path):
    full = micro_model()
    expected = outputs(full, batch)
    full.save_pretrained(tmp_path / "float32")
    model = MultiModalCreature.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    # Positions are counted in float32, also by a bf16 model: bf16 knows no 257.
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    step = training_step(model, batch)
    assert all(value.isfinite().all() for value in step.values())
    assert step["loss"].dtype == torch.float32
    model.eval()
    found = outputs(model, batch)
    for name in ("logits", "external_text_logits"):
        assert torch.nn.functional.cosine_similarity(found[name].float(), expected[name], dim=-1).min() > 0.98
    senses = select(batch, SENSE_ARGUMENTS, SENSES[1:])
    model.generate(batch["input_ids"], max_new_tokens=3, output_streams=ALL_STREAMS, **senses)
    model.save_pretrained(tmp_path / "bfloat16")
    loaded = MultiModalCreature.from_pretrained(tmp_path / "bfloat16")
    assert loaded.dtype == torch.bfloat16
    for name, value in outputs(loaded, batch).items():
        assert torch.equal(value, found[name]), name


def test_bf16_autocast(batch):
    exact = training_step(micro_model(), batch)
    model = micro_model()
    with torch.autocast("cpu", torch.bfloat16):
        step = training_step(model, batch)
    assert step["loss"].item() == pytest.approx(exact["loss"].item(), rel=2e-2)
    for name, value in step.items():
        assert value.dtype == torch.float32 and value.isfinite().all(), name
    table = "model.embed_tokens.weight"
    assert (step[table] - exact[table]).norm() / exact[table].norm() < 0.1


@pytest.mark.parametrize("chosen", [("internal_voice",), SENSES])
def test_compile_without_a_graph_break(chosen, batch):
    """A training step, text alone or with every sense, copy and stream; the compiled graph is the same computation."""
    poisoned = absent_is(batch, float("nan"))
    given = poisoned if chosen == SENSES else {name: poisoned[name] for name in ("input_ids", "labels")}
    given = given | {"further_targets": torch.tensor([0.5, 0.25])}
    expected = training_step(micro_model(), given)
    model = micro_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = training_step(compiled, given)
    found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
    assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_compile_evaluation(model, batch):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        given = {name: batch[name] for name in ("input_ids", "labels")}
        found, expected = compiled(**given, return_logits=False), model(**given, return_logits=False)
    torch.testing.assert_close(found.token_losses, expected.token_losses)


def test_training_learns(batch):
    """A few steps on one batch lower every stream's loss: the gradients point the right way."""
    model = micro_model(random=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        out = model(**batch)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.losses)
    for stream in STREAMS:
        assert losses[-1][stream] < 0.6 * losses[0][stream], stream


def test_frozen_parts(batch):
    model = micro_model()
    copies = {"external_text": ["own_text"], "audio": ["own_voice"], "animation": ["own_command", "own_action"]}
    for senses, streams in (
        (("internal_voice",), ("internal_text",)),
        (("internal_voice", "touch"), ("internal_text", "audio")),
        (("vision",), ("external_text", "animation")),
        (SENSES, STREAMS),
    ):
        model.train_only(senses=senses, streams=streams)
        alive = tuple(f"model.senses.{sense}." for sense in senses)
        alive += tuple(f"streams.{stream}." for stream in streams)
        alive += tuple(f"model.senses.{copy}." for stream in streams for copy in copies.get(stream, ()))
        alive += ("model.embed_tokens.", "model.embed_norm.", "model.layers.", "model.norm.", "lm_head.")
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == name.startswith(alive), (name, senses, streams)
        step = training_step(model, batch)
        for name, gradient in step.items():
            assert name == "loss" or name.startswith(alive) or not gradient.any(), name
    model.train_only()
    assert not any(value.requires_grad for value in model.model.senses.parameters())
    saved = model.state_dict()
    assert "streams.audio.out_proj.weight" in saved and "model.senses.touch.proj.weight" in saved
    for bad in (dict(senses=("smell",)), dict(streams=("smell",))):
        with pytest.raises(ValueError, match=r"\['smell'\]; known are internal_"):
            model.train_only(**bad)
    for bad in (dict(senses="vision"), dict(streams="audio")):
        with pytest.raises(ValueError, match="is a tuple of names"):
            model.train_only(**bad)


def test_a_config_of_another_class_gives_the_same_model(model, batch):
    """A class loaded from a folder is another than the one imported here, so `isinstance` must not be asked."""
    config = micro_config()
    twin = type("CreatureConfig", (CreatureConfig.__base__,), {"model_type": "creature"})
    stranger = twin(**{key: value for key, value in config.to_dict().items() if key != "model_type"})
    for name in ("audio_feature_size", "animation_size", "image_shape"):
        setattr(stranger, name, getattr(config, name))
    stranger._attn_implementation = "sdpa"
    torch.manual_seed(0)
    other, expected = randomize(MultiModalCreature(stranger).eval()), outputs(model, batch)
    for name, value in outputs(other, batch).items():
        assert torch.equal(value, expected[name]), name


def test_a_training_step_draws_nothing_at_random(batch):
    """An accumulated or resumed step is the same step, whatever the random numbers."""
    model, steps = micro_model(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        steps.append(training_step(model, batch))
    assert_close(steps[1], steps[0], atol=0.0, rtol=0.0)


def test_attention_dropout_is_for_training_only(batch):
    model = micro_model(attention_dropout=0.5)
    assert torch.equal(outputs(model, batch)["logits"], outputs(micro_model(), batch)["logits"])
    model.train()
    free = without_targets(batch)
    assert not torch.equal(outputs(model, free)["logits"], outputs(model, free)["logits"])


def test_a_saved_folder_names_its_class_and_its_end_of_text(tmp_path, model):
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved["architectures"] == ["MultiModalCreature"] and saved["loss_weights"] == EVERY_WEIGHT
    assert json.loads((tmp_path / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"] == 125
