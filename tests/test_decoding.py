"""The fast loop of generation gives the tokens of transformers' loop, and leaves nothing in model or checkpoint.

In place of a CUDA graph, an object runs the recorded pass again: buffers, mask and what is kept between calls are those
of a GPU.
"""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from creatures import Listener, left_padded, micro_model, random_batch
from torch import nn
from transformers import CompileConfig, DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.generation import stopping_criteria

import decoding_creature
import generation_creature
from modeling_creature import MultiModalCreature

PROMPT, NEW = 5, 12
GREEDY = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None)
SAMPLED = dict(max_new_tokens=NEW, do_sample=True, eos_token_id=None, temperature=1.3)


@pytest.fixture
def model():
    return micro_model(tie_word_embeddings=False)


@pytest.fixture
def prompt(model):
    return random_batch(model.config, rows=3, ticks=PROMPT)["input_ids"]


@pytest.fixture
def decoded(monkeypatch):
    """A list that grows by one with every call that the fast loop serves."""
    calls = []

    def spy(*arguments):
        calls.append(arguments)
        return decoding_creature.decode(*arguments)

    monkeypatch.setattr(generation_creature, "decode", spy)
    return calls


@pytest.fixture
def recorded(monkeypatch):
    """Graphs on the CPU, end-of-text checked every four tokens; a list of the compiler settings of each recording."""
    recordings = []

    class Graph:
        def __init__(self, decoder, model):
            self.decoder, self.model = weakref.ref(decoder), weakref.ref(model)

        def replay(self):
            decoder = self.decoder()
            with torch.no_grad():
                decoder.outputs.copy_(decoder._pass(self.model(), decoder.tick))

    def capture(self, model, settings=None):
        with torch.inference_mode(False), torch.no_grad():
            self.outputs = self._pass(model, self.tick).clone()
        self.graph, self.fingerprint = Graph(self, model), decoding_creature.fingerprint(model)
        recordings.append(settings)
        return self

    monkeypatch.setattr(decoding_creature.Decoder, "capture", capture)
    monkeypatch.setattr(decoding_creature, "is_recordable", lambda model: True)
    monkeypatch.setattr(decoding_creature, "can_compile", lambda model: True)
    monkeypatch.setitem(decoding_creature.CHECK_EVERY, "cpu", 4)
    return recordings


@pytest.fixture(params=["eager", "recorded"])
def how(request):
    return request.getfixturevalue("recorded") if request.param == "recorded" else None


def stock(model, *arguments, **settings):
    """What the loop of transformers gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation_creature, "can_decode", lambda *_: False)
        return model.generate(*arguments, **settings)


# --- the same tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        GREEDY,
        SAMPLED,
        {**SAMPLED, "top_k": 7},
        {**SAMPLED, "temperature": 1.0, "top_k": 200},
        {**SAMPLED, "top_k": 7, "top_p": 0.9, "min_p": 0.02, "num_return_sequences": 3},
        {**GREEDY, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "bad_words_ids": [[3], [5, 6]]},
        {**GREEDY, "max_new_tokens": 1},
        {**GREEDY, "max_new_tokens": None, "max_length": 11},
        {**GREEDY, "prefill_chunk_size": 2},
    ],
    ids=["greedy", "sampled", "top_k", "top_k of all", "warped", "penalties", "one token", "max_length", "chunks"],
)
@pytest.mark.parametrize("padded", [False, True])
def test_the_same_tokens_as_the_loop_of_transformers(model, prompt, decoded, how, settings, padded):
    ids, mask = left_padded(model, prompt) if padded else (prompt, torch.ones_like(prompt))
    torch.manual_seed(7)
    expected = stock(model, ids, attention_mask=mask, **settings)
    assert not decoded
    for _ in range(2):  # the second time on what the first one has left
        torch.manual_seed(7)
        assert torch.equal(model.generate(ids, attention_mask=mask, **settings), expected)
    assert len(decoded) == 2 and expected.is_contiguous()
    assert expected.shape[1] <= PROMPT + 1 or len(expected[:, PROMPT:].unique()) > 3


def test_past_the_trained_context_the_reminder_of_transformers_is_given_once(prompt, decoded, how, monkeypatch):
    said = []
    monkeypatch.setattr(stopping_criteria.logger, "warning_once", said.append)
    model = micro_model(max_position_embeddings=PROMPT + 3)
    model.generate(prompt, max_new_tokens=3, eos_token_id=None)
    assert not said  # the context is full, not exceeded
    model.generate(prompt, max_new_tokens=12, eos_token_id=None)
    assert len(decoded) == 2 and len(said) == 1 and "exceeded the model's predefined maximum length" in said[0]
    stock(model, prompt, max_new_tokens=12, eos_token_id=None)
    assert set(said[1:]) == set(said[:1])


@pytest.mark.parametrize("pad", [None, 125])
@pytest.mark.parametrize("end_at", [0, 3, 4, 6, NEW - 1])
def test_the_end_of_text_ends_each_row(model, prompt, decoded, how, end_at, pad):
    free = stock(model, prompt, **GREEDY)
    # Ends that every row meets, the slowest one at `end_at` or later, and ends that not every row meets.
    every, some = free[:, PROMPT + end_at].tolist(), [free[1, PROMPT + end_at].item()]
    for ends in (every, some, some[0]):
        settings = {**GREEDY, "eos_token_id": ends, "pad_token_id": pad}
        for extra in ({}, {"min_new_tokens": 6}):
            expected = stock(model, prompt, **settings, **extra)
            assert torch.equal(model.generate(prompt, **settings, **extra), expected)
            alone = stock(model, prompt[1:2], **settings, **extra)
            assert torch.equal(model.generate(prompt[1:2], **settings, **extra), alone)
    assert len(decoded) == 12


@pytest.mark.parametrize("both", [False, True])
def test_prompt_of_embeddings(model, prompt, decoded, how, both):
    with torch.no_grad():
        given = {"inputs_embeds": model.model.embed_tokens(prompt)} | ({"input_ids": prompt} if both else {})
    expected = stock(model, **given, **GREEDY)
    assert torch.equal(model.generate(**given, **GREEDY), expected) and len(decoded) == 1


def test_a_prompt_as_long_as_the_context(model, decoded, how):
    ids = random_batch(model.config, rows=2, ticks=model.config.max_position_embeddings)["input_ids"]
    assert torch.equal(model.generate(ids, **GREEDY), stock(model, ids, **GREEDY)) and len(decoded) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 2},
        {"tie_word_embeddings": True},
        {"attn_implementation": "eager"},
        {"sliding_window": 2},
        {"sliding_window": PROMPT},
        {"sliding_window": PROMPT + 3},
        {"sliding_window": 40},
    ],
)
def test_other_architectures(prompt, decoded, how, changes):
    model = micro_model(**{"tie_word_embeddings": False, **changes})
    ids, mask = left_padded(model, prompt)
    expected = stock(model, ids, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected) and len(decoded) == 1


def test_bfloat16_and_inference_mode(prompt, decoded, how):
    model = micro_model(tie_word_embeddings=False).to(torch.bfloat16)
    with torch.inference_mode():
        first = model.generate(prompt, **GREEDY)
    assert torch.equal(model.generate(prompt, **GREEDY), first)
    assert first.shape == (3, PROMPT + NEW) and len(decoded) == 2


def test_a_draw_is_that_of_torch():
    probabilities = torch.randn(3, 2000).softmax(dim=-1) * (torch.rand(3, 2000) > 0.9)
    torch.manual_seed(0)
    expected = torch.multinomial(probabilities, num_samples=1)[:, 0]
    state = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(decoding_creature._draw(probabilities)[1], expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_are_an_error(model, prompt, decoded, how, bad):
    class Spoiler(LogitsProcessor):
        """Overwrites the scores of the last row at its third token."""

        def __call__(self, input_ids, scores):
            if input_ids.shape[1] == PROMPT + 2:
                scores[-1] = bad
            return scores

    settings = {**SAMPLED, "logits_processor": LogitsProcessorList([Spoiler()])}
    with pytest.raises(RuntimeError, match="no probabilities to sample from"):
        model.generate(prompt, **settings)
    listener = Listener()
    with pytest.raises(RuntimeError, match="no probabilities to sample from"):
        model.generate(prompt[:1], **settings, streamer=listener)
    assert len(listener.heard) == PROMPT + 2 and len(decoded) == 2
    with torch.no_grad():
        model.lm_head.weight[0] = bad  # no processor: a GPU checks every few tokens, and at the last one
    for changes in ({"max_new_tokens": 1}, {}, {"top_k": 7}):
        with pytest.raises(RuntimeError, match="no probabilities to sample from"):
            model.generate(prompt, **SAMPLED | changes)


def test_a_draw_follows_the_distribution(model, prompt, decoded):
    rows = prompt[:1].expand(4000, -1)
    torch.manual_seed(0)
    drawn = model.generate(rows, do_sample=True, max_new_tokens=2, eos_token_id=None, top_k=4)
    with torch.no_grad():
        scores = model(drawn[:1, : PROMPT + 1]).logits[0, -1].topk(4)
    same = drawn[:, PROMPT] == drawn[0, PROMPT]
    seen = torch.stack([(drawn[same, PROMPT + 1] == token).float().mean() for token in scores.indices])
    torch.testing.assert_close(seen, scores.values.softmax(-1), atol=4 / int(same.sum()) ** 0.5, rtol=0)
    assert len(decoded) == 1


# --- what the loop of transformers does ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"return_dict_in_generate": True, "output_scores": True},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"use_cache": False},
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 2},
        {"max_time": 100.0},
        {"output_streams": ("audio",)},
        {"external_voice_ids": torch.full((1, 3), 4)},
        {"past_key_values": DynamicCache()},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_settings_use_the_loop_of_transformers(model, prompt, decoded, settings):
    model.generate(prompt[:1], **GREEDY, **settings)
    assert not decoded


def test_a_model_in_training_or_with_another_attention_uses_the_loop_of_transformers(model, prompt, decoded):
    model.train().generate(prompt, **GREEDY)
    model.eval().set_attn_implementation("flex_attention")
    assert not decoding_creature.can_decode(model, None, model.generation_config, False, {})
    assert not decoded


class Counted(LogitsProcessor):
    def __init__(self):
        self.lengths = []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.view(-1).shape[0] // len(scores))
        scores[:, 3] = float("-inf")
        return scores


def test_streamers_and_logits_processors_see_each_token_once(model, prompt, decoded, how):
    end = stock(model, prompt[:1], **GREEDY)[0, PROMPT + 4].item()
    settings = {**GREEDY, "eos_token_id": end}
    listener, counted = Listener(), Counted()
    out = model.generate(prompt[:1], streamer=listener, **settings)
    assert listener.heard == out[0].tolist() and listener.ended and out[0, -1] == end
    out = model.generate(prompt, logits_processor=LogitsProcessorList([counted]), **settings)
    assert counted.lengths == list(range(PROMPT, out.shape[1]))
    assert torch.equal(out, stock(model, prompt, logits_processor=LogitsProcessorList([Counted()]), **settings))
    assert len(decoded) == 2


def test_hooks_are_called(model, prompt, decoded, how):
    heard = []
    handle = model.model.norm.register_forward_hook(lambda module, args, output: heard.append(output.shape[1]))
    out = model.generate(prompt, **GREEDY)
    assert heard == [PROMPT] + [1] * (NEW - 1) and len(decoded) == 1
    handle.remove()
    assert torch.equal(model.generate(prompt, **GREEDY), out)
    # As where the training job casts: another `forward` on the model itself.
    model.forward, forward = lambda **inputs: heard.append("forward") or forward(**inputs), model.forward
    assert torch.equal(model.generate(prompt, **GREEDY), out) and heard.count("forward") == NEW
    del model.forward
    # The hooks that transformers leaves behind are idle, and cost a model nothing of its speed.
    model.generate(prompt, **GREEDY, return_dict_in_generate=True, output_hidden_states=True)
    assert decoding_creature.is_bare(model)


def test_replaced_modules_are_used(model, prompt, how):
    """A linear layer of another class, as adapters and quantization put in, and a head with a bias."""
    plain = model.generate(prompt, **GREEDY)

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    changed = copy.deepcopy(model)
    doubled = Doubled(32, 64, bias=False)
    doubled.weight = changed.model.layers[0].mlp.up_proj.weight
    changed.model.layers[0].mlp.up_proj = doubled
    biased = copy.deepcopy(model)
    biased.lm_head = nn.Linear(32, 128)
    biased.lm_head.weight = model.lm_head.weight
    for other in (changed, biased):
        out = other.generate(prompt, **GREEDY)
        assert torch.equal(out, stock(other, prompt, **GREEDY)) and not torch.equal(out, plain)


# --- graphs between calls --------------------------------------------------------------------------------------------


def test_a_graph_serves_the_next_calls_of_its_shape(model, prompt, recorded):
    for settings in (GREEDY, SAMPLED, {**GREEDY, "max_new_tokens": 7}):
        model.generate(prompt, **settings)
    assert recorded == [None]
    model.generate(prompt[:2], **GREEDY)
    model.generate(prompt, **GREEDY)
    assert recorded == [None, None]


def test_a_compile_config_compiles_once_for_each_of_its_settings(model, prompt, recorded):
    asked = {**GREEDY, "compile_config": CompileConfig()}
    model.generate(prompt, **{**GREEDY, "max_new_tokens": 200})
    model.generate(prompt, **asked, disable_compile=True)
    assert recorded == [None]
    for settings in (asked, asked, GREEDY):
        model.generate(prompt, **settings)
    assert recorded == [None, decoding_creature.compile_settings(CompileConfig())]
    model.generate(prompt, **GREEDY, compile_config=CompileConfig(fullgraph=True))
    assert len(recorded) == 3 and recorded[2]["fullgraph"]
    model.generation_config.compile_config = CompileConfig()
    model.generate(prompt[:1], **GREEDY, streamer=Listener())
    assert recorded[3:] == recorded[1:2]


def test_the_settings_of_a_compile_config():
    """Its own choices, but for graphs: torch.compile would refuse options beside a mode, and the step is recorded."""
    settings = decoding_creature.compile_settings
    assert settings(CompileConfig(dynamic=True)) == {
        "fullgraph": False, "dynamic": False, "backend": "inductor", "mode": None, "options": None
    }  # fmt: skip
    assert settings(CompileConfig(mode="max-autotune"))["mode"] == "max-autotune-no-cudagraphs"
    other = settings(CompileConfig(mode="default", backend="eager"))
    assert (other["mode"], other["backend"]) == ("default", "eager")
    torch.compile(lambda x: x, **settings(CompileConfig(options={"max_autotune": True})))


def test_a_compile_config_without_a_gpu_warns(model, prompt):
    with pytest.warns(UserWarning, match="`compile_config` is ignored"):
        out = model.generate(prompt, **GREEDY, compile_config=CompileConfig())
    assert torch.equal(out, stock(model, prompt, **GREEDY))


def test_a_failing_compiler_warns_once(model, prompt, recorded, monkeypatch):
    capture = decoding_creature.Decoder.capture

    def broken(self, model, settings=None):
        if settings is not None:
            raise RuntimeError("no C compiler")
        return capture(self, model, settings)

    monkeypatch.setattr(decoding_creature.Decoder, "capture", broken)
    asked = {**GREEDY, "compile_config": CompileConfig()}
    with pytest.warns(UserWarning, match="no C compiler"):
        out = model.generate(prompt, **asked)
    assert torch.equal(out, stock(model, prompt, **GREEDY))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(prompt, **asked)
    assert recorded == [None]


def test_weights_may_change_and_move(model, prompt, recorded):
    before = model.generate(prompt, **GREEDY)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    after = model.generate(prompt, **GREEDY)
    assert recorded == [None]  # written in place, they are read where they always were
    assert torch.equal(after, stock(model, prompt, **GREEDY)) and not torch.equal(after, before)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().roll(1, 0))
    assert torch.equal(model.generate(prompt, **GREEDY), stock(model, prompt, **GREEDY))
    assert recorded == [None, None]
    model.to(torch.float64)
    assert torch.equal(model.generate(prompt, **GREEDY), stock(model, prompt, **GREEDY))
    assert recorded == [None, None, None]


def test_buffers_of_an_earlier_call_change_nothing(model, prompt, recorded):
    expected = stock(model, prompt, **GREEDY)
    with torch.no_grad():
        weight = model.model.embed_tokens.weight[3].clone()
        model.model.embed_tokens.weight[3] = float("nan")
        model.generate(torch.full((3, 60), 3), **GREEDY)
        model.model.embed_tokens.weight[3] = weight
    assert torch.equal(model.generate(prompt, **GREEDY), expected) and recorded == [None]


def test_graphs_are_bounded_in_number_and_bytes(model, prompt, recorded, monkeypatch):
    for rows in range(1, decoding_creature.KEPT_GRAPHS + 3):
        model.generate(prompt[:1].expand(rows, -1), **{**GREEDY, "max_new_tokens": 3})
    kept = decoding_creature._graphs[model]
    assert [key[0] for key in kept] == list(range(3, decoding_creature.KEPT_GRAPHS + 3))
    room = 2 * max(decoder.bytes for decoder in kept.values())
    monkeypatch.setattr(decoding_creature, "KEPT_BYTES", room)
    model.generate(prompt[:1].expand(11, -1), **GREEDY)
    assert sum(decoder.bytes for decoder in kept.values()) <= room and list(kept)[-1][0] == 11
    recordings = len(recorded)
    monkeypatch.setattr(decoding_creature, "KEPT_BYTES", 1000)
    model.generate(prompt, **GREEDY)
    assert len(recorded) == recordings  # too large for a graph


def test_no_graph_outlives_its_model(prompt, recorded):
    model = micro_model()
    model.generate(prompt, **GREEDY)
    decoder = weakref.ref(*decoding_creature._graphs[model].values())
    assert decoder() is not None
    del model
    gc.collect()
    assert decoder() is None


def test_graphs_are_neither_copied_nor_saved(model, prompt, recorded, tmp_path):
    names, attributes = list(model.state_dict()), set(vars(model))
    out = model.generate(prompt, **GREEDY)
    assert list(model.state_dict()) == names and set(vars(model)) == attributes
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    model.save_pretrained(tmp_path)
    copies.append(MultiModalCreature.from_pretrained(tmp_path).eval())
    for other in copies:
        assert torch.equal(other.generate(prompt, **GREEDY), out)
    assert len(recorded) == 4


def test_two_threads_do_not_share_a_graph(model, prompt, recorded):
    """A call within a call stands for a second thread: both would write into the same buffers."""
    expected = model.generate(prompt, **GREEDY)

    class Inner(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] == PROMPT + 3:
                model.generate(prompt.flip(1), **GREEDY)
            return scores

    out = model.generate(prompt, logits_processor=LogitsProcessorList([Inner()]), **GREEDY)
    assert torch.equal(out, expected) and len(recorded) == 2


def test_a_tick_is_one_graph_for_the_compiler(model, prompt):
    """Without a break, for a break would mean a graph of CUDA in pieces; compiled by nobody, to be quick."""
    with torch.no_grad():
        prefilled = model(prompt, use_cache=True)
        logits = []
        settings = decoding_creature.compile_settings(CompileConfig(fullgraph=True, backend="eager"))
        bare = decoding_creature.bare_tick
        for tick in (bare, decoding_creature.compile_tick(bare, settings)):
            decoder = decoding_creature.Decoder(prefilled.past_key_values, 16, tick)
            decoder.load(prefilled.past_key_values, None, None)
            decoder.cache.visible = 15
            logits.append(decoder(model, prompt[:, 0]).clone())
    torch.testing.assert_close(logits[0], logits[1])
