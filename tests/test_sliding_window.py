"""A sliding window: attention sees so many ticks, in training, in the cache, in `step` and in `generate` alike."""

import pytest
import torch
from creatures import (
    ALL_STREAMS,
    assert_close,
    gradients,
    micro_model,
    random_batch,
    without_targets,
)
from transformers import AttentionInterface

import modeling_creature
from layers_creature import eager_attention_forward

WINDOW, TICKS = 4, 12
GREEDY = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)


def windowed(**changes):
    return micro_model(**{"sliding_window": WINDOW, "tie_word_embeddings": False, **changes})


@pytest.fixture(scope="module")
def model():
    return windowed()


@pytest.fixture(scope="module")
def ids(model):
    return random_batch(model.config, rows=3, ticks=TICKS)["input_ids"]


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_tick_sees_the_window_of_every_layer_and_no_tick_before(kind, layers, ids):
    model = windowed(num_hidden_layers=layers, attn_implementation=kind)
    seen = layers * (WINDOW - 1) + 1
    with torch.no_grad():
        whole = model(ids).logits[:, -1]
        torch.testing.assert_close(model(ids[:, -seen:]).logits[:, -1], whole, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(model(ids[:, 1 - seen :]).logits[:, -1], whole, atol=1e-4)
        changed = ids.clone()
        changed[:, :-seen] = (changed[:, :-seen] + 1) % 120
        torch.testing.assert_close(model(changed).logits[:, -1], whole, atol=1e-5, rtol=1e-5)


def test_a_kernel_that_makes_its_own_mask_is_told_the_window(model, ids):
    """As the flash kernels of transformers."""

    def attention(module, query, key, value, attention_mask, scaling, sliding_window=None, **kwargs):
        ticks = torch.arange(query.shape[2])
        distance = ticks[:, None] - ticks
        mask = torch.zeros(distance.shape).masked_fill((distance < 0) | (distance >= sliding_window), float("-inf"))
        return eager_attention_forward(module, query, key, value, mask, scaling)

    AttentionInterface.register("own_mask", attention)
    with torch.no_grad():
        logits = windowed(attn_implementation="own_mask")(ids, use_cache=False).logits
        torch.testing.assert_close(logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_samples_within_the_window_train_without_a_mask(ids, monkeypatch):
    """The same kernels, and so the same bits, as with full attention."""

    def refuse(*arguments, **named):
        raise AssertionError("a mask was made")

    batch = random_batch(windowed().config, rows=2, ticks=WINDOW)
    steps = []
    for window in (None, WINDOW):
        model = windowed(sliding_window=window).train()
        with monkeypatch.context() as patch:
            for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
                patch.setattr(modeling_creature, name, refuse)
            loss = model(**batch).loss
        loss.backward()
        steps.append({"loss": loss.detach(), **gradients(model)})
    assert_close(steps[1], steps[0], atol=0.0, rtol=0.0)
    full, cut = (windowed(sliding_window=window)(ids).logits for window in (None, WINDOW))
    torch.testing.assert_close(full[:, :WINDOW], cut[:, :WINDOW], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(full[:, WINDOW], cut[:, WINDOW], atol=1e-3)
    longer = windowed()(ids[:, : WINDOW + 1]).logits  # by one tick
    torch.testing.assert_close(longer, cut[:, : WINDOW + 1], atol=1e-5, rtol=1e-5)


def test_a_compiled_step_has_the_same_gradients():
    batch, steps = random_batch(windowed().config, rows=2, ticks=TICKS), []
    batch = {name: batch[name] for name in ("input_ids", "labels")}  # the window is the backbone's, whatever it reads
    for compiled in (False, True):
        model = windowed().train()
        step = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        loss = step(**batch).loss
        loss.backward()
        steps.append({"loss": loss.detach(), **gradients(model)})
    assert_close(steps[1], steps[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_packed_clips_have_windows_of_their_own(kind, ids):
    model = windowed(attn_implementation=kind)
    positions = torch.tensor([[*range(7), *range(5)]]).expand(3, -1)
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        for start, end in ((0, 7), (7, TICKS)):
            alone = model(ids[:, start:end]).logits
            torch.testing.assert_close(packed[:, start:end], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [[1] * TICKS, [2, 1, 5, 3, 1], [9, 1, 2]])
def test_steps_give_what_one_pass_over_all_ticks_gives_and_keep_a_window(kind, lengths):
    model = windowed(attn_implementation=kind)
    senses = without_targets(random_batch(model.config, rows=3, ticks=TICKS))
    with torch.no_grad():
        whole = model(**senses, use_cache=False, output_streams=ALL_STREAMS)
    cache, tick = None, 0
    for length in lengths:
        out = model.step(cache, **ticks_of(senses, tick, tick + length))
        cache, tick = out.past_key_values, tick + length
        torch.testing.assert_close(out.logits, whole.logits[:, tick - 1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out.animation, whole.animation[:, tick - 1], atol=1e-4, rtol=1e-4)
        assert torch.equal(out.external_text, whole.external_text_logits[:, tick - 1].argmax(-1))
        assert cache.get_seq_length() == tick
        assert all(keys.shape[2] == WINDOW for keys in cache.cache.keys)


def ticks_of(batch: dict, start: int, end: int) -> dict:
    return {name: value[:, start:end] for name, value in batch.items()}


@pytest.mark.parametrize("prompt", [2, WINDOW - 1, WINDOW, WINDOW + 1, TICKS])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prefill_chunk_size": 3},
        {"output_streams": ("audio", "animation")},
    ],
    ids=lambda how: "-".join(map(str, how.values())),
)
def test_generation_is_teacher_forcing(model, ids, prompt, padded, how):
    given, mask = ids[:, :prompt], torch.ones(3, prompt, dtype=torch.long)
    if padded:
        mask[1, : prompt // 2] = mask[2, : prompt - 1] = 0
        given = given.masked_fill(mask == 0, model.config.pad_token_id)
    out = model.generate(given, attention_mask=mask, **GREEDY, **how)
    if "output_streams" in how:
        out, emitted = out.sequences, out
    new = out[:, prompt:]
    mask = torch.nn.functional.pad(mask, (0, new.shape[1]), value=1)
    copies = {}
    if "output_streams" in how:
        copies["audio_codes"] = torch.nn.functional.pad(emitted.audio, (0, 0, prompt, 0), value=-100)
        copies["animation"] = torch.nn.functional.pad(emitted.animation, (0, 0, prompt, 0))
        copies["action"] = torch.nn.functional.pad(emitted.action, (0, 0, 0, 0, prompt, 0))
        copies["animation_mask"] = copies["action_mask"] = (torch.arange(out.shape[1]) >= prompt).expand(3, -1)
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(out, attention_mask=mask, position_ids=positions, use_cache=False, **copies).logits
    assert torch.equal(logits[:, prompt - 1 : -1].argmax(-1), new)
    assert len(new.unique()) > 3


def test_beams_and_assisted_generation(model, ids):
    with torch.no_grad():
        greedy = model.generate(ids[:1], **GREEDY)
        assert torch.equal(model.generate(ids[:1], prompt_lookup_num_tokens=2, **GREEDY), greedy)
        cached, without = (model.generate(ids, num_beams=3, use_cache=use, **GREEDY) for use in (True, False))
    assert torch.equal(cached, without)
