"""Generation: `generate` on the internal text, all streams in parallel, and the live loop, against a loop by hand."""

import pytest
import torch
import torch.nn.functional as F
from creatures import (
    ALL_STREAMS,
    COPY_ARGUMENTS,
    GPT2,
    Listener,
    left_padded,
    micro_model,
    random_batch,
    select,
    without_targets,
)
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import generation_creature
from modeling_creature import CreatureModel
from motor_creature import pack_animation, rotation_vector, unpack_animation
from stepping_creature import Stepper

SIDE_STREAMS = ALL_STREAMS[1:]
PROMPT, NEW = 5, 6
GREEDY = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None)


@pytest.fixture(scope="module")
def model():
    # Tied and random, it would repeat one token for ever, and so would a loop that forgets everything.
    return micro_model(tie_word_embeddings=False)


@pytest.fixture(scope="module")
def prompt(model):
    return random_batch(model.config, rows=3, ticks=PROMPT)["input_ids"]


@pytest.fixture(scope="module")
def senses(model):
    """The outer senses of prompt and continuation, without efference copies."""
    batch = without_targets(random_batch(model.config, rows=3, ticks=PROMPT + NEW, seed=3))
    copies = {name for names in COPY_ARGUMENTS.values() for name in names}
    return {name: value for name, value in batch.items() if name not in copies | {"input_ids"}}


@pytest.fixture
def passes(monkeypatch):
    """A list that grows by the number of ticks of every backbone pass."""
    ticks = []
    forward = CreatureModel.forward

    def counted(self, *arguments, **named):
        out = forward(self, *arguments, **named)
        ticks.append(out.last_hidden_state.shape[1])
        return out

    monkeypatch.setattr(CreatureModel, "forward", counted)
    return ticks


def first_ticks(senses, ticks):
    """The first ticks of every sense."""
    return {name: value[:, :ticks] for name, value in senses.items()}


@torch.no_grad()
def loop(model, input_ids, senses, streams=SIDE_STREAMS, new_tokens=NEW, copies=None, **named):
    """
    Greedy generation of all streams written out: every tick a pass over everything from the start, without a cache.

    senses: as long as the text or shorter, then filled up with absence here.
    """
    rows, total = len(input_ids), input_ids.shape[1] + new_tokens
    config = model.config
    full = {}
    for name, value in senses.items():
        missing = total - value.shape[1]
        absent = -100 if value.dtype == torch.long and "touch" not in name else 0
        full[name] = F.pad(value, (0, 0) * (value.dim() - 2) + (0, max(missing, 0)), value=absent)
    masks = {"input_features": "input_features_mask", "joint_positions": "body_mask", "touch_values": "touch_mask"}
    for name, mask_name in masks.items():
        if name in senses and mask_name not in senses:
            shape = full["touch_points"].shape if name == "touch_values" else (rows, total)
            full[mask_name] = torch.zeros(shape, dtype=torch.bool)
            full[mask_name][:, : senses[name].shape[1]] = True
    said = {
        "external_text_ids": torch.full((rows, total), -100),
        "audio_codes": torch.full((rows, total, config.num_audio_codebooks), -100),
        "animation": torch.full((rows, total, config.animation_size), float("nan")),
        "animation_mask": torch.zeros(rows, total, dtype=torch.bool),
        "action": torch.full((rows, total, config.subframes_per_tick, config.action_size), float("nan")),
        "action_mask": torch.zeros(rows, total, dtype=torch.bool),
    }
    for name, value in (copies or {}).items():
        said[name][:, : value.shape[1]] = value
    # The stream "animation" emits an action, too.
    emitted = {output: [] for output in (*streams, *(("action",) if "animation" in streams else ()))}
    while input_ids.shape[1] < total:
        now = input_ids.shape[1]
        copies_now = {name: value[:, :now] for name, value in said.items()}
        if "attention_mask" in named:
            mask = F.pad(named["attention_mask"], (0, now - named["attention_mask"].shape[1]), value=1)
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)
            extra = {"attention_mask": mask, "position_ids": position_ids}
        else:
            extra = {}
        out = model(input_ids, output_streams=streams, use_cache=False, **first_ticks(full, now), **copies_now, **extra)
        tick = {
            "external_text": lambda out=out: out.external_text_logits[:, -1].argmax(-1),
            "audio": lambda out=out: model.streams.audio.emit(
                out.last_hidden_state[:, -1], model.model.senses.own_voice.code_table
            )[0],
            "animation": lambda out=out: out.animation[:, -1],
            "action": lambda out=out: out.action[:, -1],
        }
        names = {"external_text": "external_text_ids", "audio": "audio_codes"}
        for output in emitted:
            value = tick[output]()
            emitted[output].append(value)
            said[names.get(output, output)][:, now] = value
            if output not in names:
                said[f"{output}_mask"][:, now] = True
        input_ids = torch.cat((input_ids, out.logits[:, -1].argmax(-1)[:, None]), dim=1)
    return input_ids, {stream: torch.stack(ticks, dim=1) for stream, ticks in emitted.items()}


def assert_agrees(generated, expected):
    sequences, emitted = expected
    assert torch.equal(generated.sequences, sequences)
    for output, values in emitted.items():
        if output in ("animation", "action"):
            torch.testing.assert_close(generated[output], values, atol=1e-4, rtol=1e-4)
        else:
            assert torch.equal(generated[output], values), output
    for output in {*SIDE_STREAMS, "action"} - {*emitted}:
        assert getattr(generated, output) is None


# --- the internal text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_agrees_with_and_without_a_cache(model, prompt, how, padded):
    ids, mask = left_padded(model, prompt) if padded else (prompt, torch.ones_like(prompt))
    generated = model.generate(ids, attention_mask=mask, **GREEDY, **how)
    expected, _ = loop(model, ids, {}, streams=(), attention_mask=mask)
    assert torch.equal(generated, expected)
    assert len(generated[:, PROMPT:].unique()) > 3


def test_a_left_padded_row_gives_the_tokens_it_gives_alone(model, prompt):
    ids, mask = left_padded(model, prompt)
    together = model.generate(ids, attention_mask=mask, **GREEDY)
    for row in range(3):
        alone = model.generate(ids[row : row + 1, mask[row] == 1], **GREEDY)
        assert torch.equal(together[row, PROMPT:], alone[0, -NEW:])


def test_one_pass_per_token(model, prompt, passes):
    model.generate(prompt, **GREEDY)
    assert passes == [PROMPT] + [1] * (NEW - 1)


def test_beams_samples_and_several_sequences(model, prompt):
    beams = model.generate(prompt, num_beams=3, num_return_sequences=2, **GREEDY)
    assert beams.shape == (6, PROMPT + NEW)

    def score(sequences):
        with torch.no_grad():
            logits = model(sequences).logits[:, PROMPT - 1 : -1].log_softmax(-1)
        return logits.gather(2, sequences[:, PROMPT:, None]).sum((1, 2))

    greedy = model.generate(prompt, **GREEDY)
    assert score(beams[::2]).sum() > score(greedy).sum() and (score(beams[::2]) >= score(beams[1::2])).all()
    torch.manual_seed(0)
    settings = dict(max_new_tokens=NEW, do_sample=True, temperature=1.5, top_k=50, num_return_sequences=4)
    sampled = model.generate(prompt, **settings, eos_token_id=None)
    assert sampled.shape == (12, PROMPT + NEW)
    assert torch.equal(sampled[:, :PROMPT], prompt.repeat_interleave(4, dim=0))
    assert len(sampled[:4].unique(dim=0)) > 1
    torch.manual_seed(0)
    assert torch.equal(sampled, model.generate(prompt, **settings, eos_token_id=None))


class StopAfter(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_an_early_exit_drafts_the_tokens_of_plain_greedy_and_leaves_all_layers(prompt):
    model, settings = micro_model(num_hidden_layers=3, tie_word_embeddings=False), dict(GREEDY, max_new_tokens=20)
    layers = []
    model.model.layers[0].register_forward_hook(lambda *_: layers.append(model.config.num_hidden_layers))
    expected = model.generate(prompt[:1], **settings)
    for early in (1, 2):
        assert torch.equal(model.generate(prompt[:1], assistant_early_exit=early, **settings), expected)
        assert {early, 3} <= set(layers) and model.config.num_hidden_layers == 3

    def fail(ids, scores):
        if model.config.num_hidden_layers == 1:
            raise RuntimeError("while drafting")
        return scores

    with pytest.raises(RuntimeError, match="while drafting"):
        model.generate(prompt[:1], assistant_early_exit=1, logits_processor=LogitsProcessorList([fail]), **settings)
    assert model.config.num_hidden_layers == 3 and torch.equal(model.generate(prompt[:1], **settings), expected)


@pytest.mark.parametrize("streams", [(), SIDE_STREAMS])
def test_streamers_and_stopping_criteria(model, prompt, streams):
    listener = Listener()
    criteria = StoppingCriteriaList([StopAfter(PROMPT + 3)])
    out = model.generate(prompt[:1], streamer=listener, stopping_criteria=criteria, output_streams=streams, **GREEDY)
    sequences = out.sequences if streams else out
    assert sequences.shape == (1, PROMPT + 3)
    assert listener.heard == sequences[0].tolist() and listener.ended
    for stream in streams:
        assert out[stream].shape[1] == 3


@pytest.mark.parametrize("streams", [(), SIDE_STREAMS])
def test_end_of_text_ends_a_row_and_pads_it(model, prompt, streams):
    free = model.generate(prompt, output_streams=streams, **GREEDY)
    end = (free.sequences if streams else free)[1, PROMPT + 2].item()
    settings = {**GREEDY, "eos_token_id": end}
    out = model.generate(prompt, output_streams=streams, **settings)
    sequences = out.sequences if streams else out
    where = sequences[1].tolist().index(end, PROMPT)
    assert (sequences[1, where + 1 :] == model.config.pad_token_id).all()
    alone = model.generate(prompt[1:2], output_streams=streams, **settings)
    assert (alone.sequences if streams else alone).shape[1] == where + 1
    for stream in streams:
        # The body goes on until the last row has ended: the emissions are as many as the new tokens.
        assert out[stream].shape[:2] == (3, sequences.shape[1] - PROMPT)
        assert alone[stream].shape[1] == where + 1 - PROMPT


def test_scores_and_dicts(model, prompt):
    settings = dict(return_dict_in_generate=True, output_scores=True, output_logits=True, **GREEDY)
    for streams in ((), SIDE_STREAMS):
        out = model.generate(prompt, output_streams=streams, **settings)
        assert len(out.scores) == len(out.logits) == NEW
        assert torch.equal(torch.stack(out.logits, 1).argmax(-1), out.sequences[:, PROMPT:])
        assert out.past_key_values.get_seq_length() == PROMPT + NEW - 1


@pytest.mark.parametrize("streams", [(), SIDE_STREAMS])
def test_an_unknown_argument_is_an_error(model, prompt, streams):
    with pytest.raises(ValueError, match="pixel_value'"):
        model.generate(prompt, pixel_value=torch.zeros(1), output_streams=streams, **GREEDY)


def test_masks_of_zeros_and_ones_are_masks_of_booleans(model, prompt, senses):
    copies = select(random_batch(model.config, rows=3, ticks=PROMPT), COPY_ARGUMENTS, ["animation"])
    given = senses | copies
    integers = {name: value.long() if value.dtype == torch.bool else value for name, value in given.items()}
    expected, found = (
        model.generate(prompt, output_streams=SIDE_STREAMS, **named, **GREEDY) for named in (given, integers)
    )
    assert_agrees(found, (expected.sequences, {name: expected[name] for name in (*SIDE_STREAMS, "action")}))


@pytest.mark.parametrize(
    "wrong", [{"touch_points": torch.zeros(3, 2, 1, dtype=torch.long)}, {"body_mask": torch.ones(3, 2)}]
)
def test_a_part_of_a_sense_is_refused(model, prompt, wrong):
    with pytest.raises(ValueError, match="part of a sense"):
        model.generate(prompt, **wrong, **GREEDY)


# --- senses in generation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_senses_arrive_tick_by_tick(model, prompt, senses, how):
    generated = model.generate(prompt, **senses, **GREEDY, **how)
    expected, _ = loop(model, prompt, senses, streams=())
    assert torch.equal(generated, expected)
    assert not torch.equal(generated, model.generate(prompt, **GREEDY, **how))


def test_a_sense_shorter_than_the_text_is_absent_afterwards(model, prompt, senses):
    for ticks in (2, PROMPT + 2):
        short = first_ticks(senses, ticks)
        if ticks == 2:
            # Without masks, too: the ticks that are given are present, the ones beyond are not.
            for mask in ("input_features_mask", "body_mask", "touch_mask"):
                short.pop(mask)
        expected = loop(model, prompt, short)
        assert_agrees(model.generate(prompt, output_streams=SIDE_STREAMS, **short, **GREEDY), expected)
    longer = {name: value[:, : PROMPT + 2] for name, value in senses.items() if name.startswith("external")}
    mixed = {**senses, **longer}
    assert torch.equal(model.generate(prompt, **mixed, **GREEDY), loop(model, prompt, mixed, streams=())[0])


def test_beams_and_several_sequences_with_senses(model, prompt, senses):
    beams = model.generate(prompt, num_beams=3, num_return_sequences=3, **senses, **GREEDY)
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in senses.items()}
        alone = model.generate(prompt[row : row + 1], num_beams=3, num_return_sequences=3, **one, **GREEDY)
        assert torch.equal(beams[3 * row : 3 * row + 3], alone)
    torch.manual_seed(0)
    sampled = model.generate(
        prompt, do_sample=True, num_return_sequences=2, max_new_tokens=NEW, eos_token_id=None, **senses
    )
    assert sampled.shape == (6, PROMPT + NEW)


def test_prompt_of_embeddings(model, prompt, senses):
    with torch.no_grad():
        embeds = model.model.embed_tokens(prompt)
    for given in ({}, senses):
        expected = loop(model, prompt, given)
        out = model.generate(inputs_embeds=embeds, output_streams=SIDE_STREAMS, **given, **GREEDY)
        assert_agrees(out, (expected[0][:, PROMPT:], expected[1]))
        both = model.generate(prompt, inputs_embeds=embeds, output_streams=SIDE_STREAMS, **given, **GREEDY)
        assert torch.equal(both.sequences[:, -NEW:], expected[0][:, PROMPT:])
        assert torch.equal(both.external_text, expected[1]["external_text"])


# --- all streams in parallel -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("padded", [False, True])
def test_all_streams_agree_with_the_loop_by_hand(model, prompt, senses, how, padded):
    ids, named = prompt, {}
    if padded:
        ids, mask = left_padded(model, prompt)
        named = {"attention_mask": mask}
    for given in ({}, senses):
        expected = loop(model, ids, given, **named)
        assert_agrees(model.generate(ids, output_streams=ALL_STREAMS, **given, **named, **GREEDY, **how), expected)
        for stream in ("external_text", "audio"):
            assert len(expected[1][stream].unique()) > 2


@pytest.mark.parametrize("padded", [False, True])
def test_the_fast_step_draws_what_the_loop_of_transformers_draws(model, prompt, senses, padded, monkeypatch):
    ids, mask = left_padded(model, prompt) if padded else (prompt, torch.ones_like(prompt))
    settings = dict(max_new_tokens=NEW, do_sample=True, temperature=1.5, top_k=20, eos_token_id=int(prompt[0, 0]))
    drawn, steps = [], []
    for fast in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(generation_creature, "can_step", lambda model, answer=fast: answer)
            torch.manual_seed(5)
            drawn.append(model.generate(ids, attention_mask=mask, output_streams=ALL_STREAMS, **senses, **settings))
            steps.append(isinstance(drawn[-1].past_key_values, Stepper))
    assert steps == [True, False]
    for name in ("sequences", "external_text", "audio"):
        assert torch.equal(drawn[0][name], drawn[1][name]), name
    torch.testing.assert_close(drawn[0].animation, drawn[1].animation, atol=1e-4, rtol=1e-4)


def test_all_streams_take_one_backbone_pass_per_tick(model, prompt, senses, passes):
    model.generate(prompt, output_streams=ALL_STREAMS, **senses, **GREEDY)
    assert passes == [PROMPT] + [1] * (NEW - 1)


@pytest.mark.parametrize("stream", SIDE_STREAMS)
def test_each_stream_alone(model, prompt, senses, stream):
    expected = loop(model, prompt, senses, streams=(stream,))
    assert_agrees(model.generate(prompt, output_streams=(stream,), **senses, **GREEDY), expected)


def test_emissions_are_fed_back(model, prompt):
    """An efference copy that the next tick feels: without it, later ticks would be others."""
    text_only = model.generate(prompt, **GREEDY)
    for stream in SIDE_STREAMS:
        sequences = model.generate(prompt, output_streams=(stream,), **GREEDY).sequences
        assert torch.equal(sequences[:, PROMPT], text_only[:, PROMPT])  # nothing has been emitted before the first tick
        assert not torch.equal(sequences, text_only), stream
    internal = model.generate(prompt, output_streams=("internal_text",), **GREEDY)
    assert torch.equal(internal, text_only)


@pytest.mark.parametrize("ticks", [2, PROMPT, PROMPT + 3])
def test_what_was_emitted_in_the_prompt_can_be_given(model, prompt, ticks):
    """Efference copies of fewer ticks than the prompt, of all of them, and of more, which are not known yet."""
    given = without_targets(random_batch(model.config, rows=3, ticks=PROMPT + NEW, seed=5))
    copies = {name: given[name][:, :ticks] for names in COPY_ARGUMENTS.values() for name in names}
    known = {name: value[:, :PROMPT] for name, value in copies.items()}
    expected = loop(model, prompt, {}, copies=known)
    assert_agrees(model.generate(prompt, output_streams=SIDE_STREAMS, **copies, **GREEDY), expected)
    # Without a mask, every tick of a given animation is present.
    known["animation_mask"] = torch.ones_like(known["animation_mask"])
    copies |= {"animation_mask": None, "audio_codes": None}
    known.pop("audio_codes")
    expected = loop(model, prompt, {}, copies=known)
    assert_agrees(model.generate(prompt, output_streams=SIDE_STREAMS, **copies, **GREEDY), expected)
    # What is not emitted in this call is as absent beyond the given ticks as any other sense.
    given = {"animation": copies["animation"]}
    expected = loop(model, prompt, {}, streams=(), copies={**given, "animation_mask": torch.ones(3, ticks)})
    assert torch.equal(model.generate(prompt, **given, **GREEDY), expected[0])


def test_several_sequences_of_all_streams(model, prompt, senses):
    torch.manual_seed(0)
    settings = dict(do_sample=True, num_return_sequences=3, max_new_tokens=NEW, eos_token_id=None, temperature=2.0)
    out = model.generate(prompt, output_streams=ALL_STREAMS, **settings, **senses)
    assert out.sequences.shape == (9, PROMPT + NEW)
    assert out.external_text.shape == (9, NEW)
    assert out.audio.shape == (9, NEW, model.config.num_audio_codebooks)
    assert out.animation.shape == (9, NEW, model.config.animation_size)
    assert len(out.audio[:3].unique(dim=0)) > 1 and len(out.external_text[:3].unique(dim=0)) > 1
    # At a temperature near nothing, sampling is greedy, for every stream of every copy of a row.
    cold = model.generate(prompt, output_streams=ALL_STREAMS, **{**settings, "temperature": 1e-6}, **senses)
    sequences, emitted = loop(model, prompt, senses)
    assert torch.equal(cold.sequences, sequences.repeat_interleave(3, dim=0))
    assert torch.equal(cold.audio, emitted["audio"].repeat_interleave(3, dim=0))
    assert torch.equal(cold.external_text, emitted["external_text"].repeat_interleave(3, dim=0))


def test_beams_with_side_streams_are_refused_in_a_sentence(model, prompt):
    assisted = (dict(prompt_lookup_num_tokens=2), dict(assistant_model=model), dict(assistant_early_exit=1))
    for settings in (dict(num_beams=2), *assisted):
        with pytest.raises(ValueError, match="beam search and assisted generation"):
            model.generate(prompt, output_streams=SIDE_STREAMS, max_new_tokens=2, **settings)
    config = model.generation_config.__class__(num_beams=3, max_new_tokens=2)
    with pytest.raises(ValueError, match="beam search"):
        model.generate(prompt, output_streams=SIDE_STREAMS, generation_config=config)
    with pytest.raises(ValueError, match="Unknown output_streams.*smell"):
        model.generate(prompt, output_streams=("smell",), max_new_tokens=2)


def test_generate_leaves_nothing_behind(model, prompt, senses):
    """Two calls are two calls: no state of one is found by the next."""
    first = model.generate(prompt, output_streams=SIDE_STREAMS, **senses, **GREEDY)
    model.generate(prompt[:1], output_streams=("audio",), **GREEDY)
    again = model.generate(prompt, output_streams=SIDE_STREAMS, **senses, **GREEDY)
    assert torch.equal(first.sequences, again.sequences) and torch.equal(first.animation, again.animation)
    assert model.generate(prompt, **GREEDY).shape == (3, PROMPT + NEW)


# --- the live loop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefill", [True, False])
def test_step_agrees_with_generate(model, prompt, senses, passes, prefill):
    """Tick by tick from the start, or after a first call with all ticks of the prompt."""
    generated = model.generate(prompt, output_streams=ALL_STREAMS, **senses, **GREEDY)
    del passes[:]

    def at(first, last):
        return {name: value[:, first:last] for name, value in senses.items()}

    cache, tick, emitted = None, 0, []
    starts = [PROMPT] if prefill else [1] * PROMPT
    for length in starts:
        out = model.step(cache, input_ids=prompt[:, tick : tick + length], **at(tick, tick + length))
        cache, tick = out.past_key_values, tick + length
    while True:
        emitted.append(out)
        if len(emitted) == NEW:
            break
        out = model.step(
            cache,
            input_ids=out.internal_text[:, None],
            external_text_ids=out.external_text[:, None],
            audio_codes=out.audio[:, None],
            animation=out.animation[:, None],
            action=out.action[:, None],
            **at(tick, tick + 1),
        )
        cache, tick = out.past_key_values, tick + 1
    assert passes == starts + [1] * (NEW - 1)
    stacked = {name: torch.stack([out[name] for out in emitted], dim=1) for name in (*ALL_STREAMS, "action")}
    assert torch.equal(stacked["internal_text"], generated.sequences[:, PROMPT:])
    assert torch.equal(stacked["external_text"], generated.external_text)
    assert torch.equal(stacked["audio"], generated.audio)
    for name in ("animation", "action"):
        torch.testing.assert_close(stacked[name], generated[name], atol=1e-4, rtol=1e-4)


def test_step_emits_what_is_asked_for_and_needs_no_internal_voice(model, senses):
    heard = {"input_features": senses["input_features"][:, :1]}
    out = model.step(output_streams=("audio",), **heard)
    assert out.audio.shape == (3, model.config.num_audio_codebooks)
    assert out.internal_text is out.external_text is out.animation is None
    assert out.logits.shape == (3, model.config.vocab_size) and not out.logits.requires_grad
    torch.manual_seed(0)
    many = [model.step(temperature=5.0, **heard).internal_text for _ in range(5)]
    assert len(torch.stack(many).unique()) > 3


def test_animation_starts_from_the_pose_last_commanded(model):
    """With nothing felt and a head that changes nothing, the commanded pose is held."""
    still = micro_model()
    with torch.no_grad():
        still.streams.animation.out_proj.weight.zero_()
        still.streams.animation.out_proj.bias.zero_()
    config = still.config
    torch.manual_seed(0)
    shape = (1, 3, config.subframes_per_tick, config.num_joints, 4)
    pose = F.normalize(torch.randn(1, 1, 1, config.num_joints, 4), dim=-1)
    pose = (pose * pose[..., :1].sign()).expand(shape)
    animation = pack_animation(pose, torch.full((1, 3, config.num_blend_shapes), 0.5), torch.zeros(1, 3, 2, 4))
    ids = torch.tensor([[1, 2, 3]])
    rotations = pose[0, 0].flatten()
    held = still.generate(ids, animation=animation, output_streams=("animation",), **GREEDY).animation
    torch.testing.assert_close(held[0, :, : len(rotations)], rotations.expand(NEW, -1), atol=1e-5, rtol=1e-5)
    felt = still.generate(ids, joint_rotations=pose, output_streams=("animation",), **GREEDY).animation
    torch.testing.assert_close(felt[0, :, : len(rotations)], rotations.expand(NEW, -1), atol=1e-5, rtol=1e-5)


def test_joints_stay_within_their_limits():
    """A head that turns on and on in one direction comes to the limits, and as far as there it does as without any."""
    joints = micro_model().config.num_joints
    limits = {"rotation_low": [[-0.3, -0.2, 0.0]] * joints, "rotation_high": [[0.4, 0.2, 0.0]] * joints}
    found = []
    for given in ({}, limits):
        turning = micro_model(**given)
        head = turning.streams.animation.out_proj
        with torch.no_grad():
            head.weight.zero_()
            head.bias.copy_(torch.linspace(-0.05, 0.05, head.out_features))
        ids = torch.tensor([[1, 2, 3]])
        moved = turning.generate(ids, output_streams=("animation",), max_new_tokens=20, do_sample=False).animation
        found.append(unpack_animation(turning.config, moved)[0][0])
    free, kept = (rotation_vector(rotations) for rotations in found)
    low, high = (torch.tensor(limits[name][0]) for name in ("rotation_low", "rotation_high"))
    assert (free < low - 0.1).any() and (free > high + 0.1).any()
    assert (kept >= low - 1e-5).all() and (kept <= high + 1e-5).all()
    assert torch.isclose(kept, low, atol=1e-5).any() and torch.isclose(kept, high, atol=1e-5).any()


@pytest.mark.parametrize("how", [{}, {"do_sample": True}, {"num_beams": 2}, {"cache_implementation": "dynamic"}])
def test_stop_strings_and_their_tokenizer(how):
    """The loops of transformers pass the tokenizer on, and servers always give one."""
    from creature.data.text.tokenizer import load_tokenizer

    tokenizer, model = load_tokenizer(), micro_model(**GPT2)
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    torch.manual_seed(0)
    free = model.generate(ids, max_new_tokens=6, eos_token_id=None, **how)
    stop = tokenizer.decode(free[0, ids.shape[1] : ids.shape[1] + 1])
    torch.manual_seed(0)
    stopped = model.generate(ids, max_new_tokens=6, eos_token_id=None, stop_strings=stop, tokenizer=tokenizer, **how)
    assert stopped.shape[1] <= free.shape[1]
    assert "num_beams" in how or stopped.shape[1] == ids.shape[1] + 1  # another beam may win
