"""A live creature: replays are teacher forcing, raw senses are those of a recording, memory stays flat."""

import numpy as np
import pytest
import torch
from creatures import ALL_STREAMS, GPT2, micro_model, record_on_cpu
from lives import make_recording, picture, quaternions
from test_codec import micro_codec, micro_mimi

import stepping_creature
from codec_creature import codec_organs, decode_voice
from creature.data.text.tokenizer import load_tokenizer
from creature.errors import UserError
from creature.live import LiveCreature, Sampling
from creature.live.emission import WordStream
from creature.live.perception import Perception
from processing_creature import TARGETS, CreatureProcessor
from sampling_creature import GREEDY
from ticks_creature import TICK_SECONDS

NULL, WINDOW, TICKS = GPT2["null_token_id"], 6, 25
BODY = dict(
    body_state_size=5, body_state_mean=[7.0] * 5, body_state_std=[3.0] * 5, action_size=2, action_mean=[-1.0, 0.5],
    action_std=[2.0, 0.25],
)  # fmt: skip
SIZES = {**GPT2, **BODY, "num_mel_bins": 8, "audio_frames_per_tick": 8, "tie_word_embeddings": False}
ALL_GREEDY = dict.fromkeys(ALL_STREAMS[:3], GREEDY)
OWN = ("input_ids", "external_text_ids", "audio_codes", "animation", "animation_mask", "action", "action_mask")
CONTACT = dict(point=1, surface=0, force=1, x=0, y=0, z=0, temperature=20)
EXACT = dict(atol=2e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def model():
    return micro_model(**SIZES, sliding_window=WINDOW)


@pytest.fixture(scope="module")
def processor(model):
    return CreatureProcessor.from_config(model.config, load_tokenizer())


@pytest.fixture(scope="module")
def life(processor):
    """The senses of a recording with every column, own outputs included, [T, ...] each."""
    encoded = processor.encode(make_recording())
    return {name: value for name, value in encoded.items() if name not in TARGETS}


@pytest.fixture
def creature(model, processor):
    return LiveCreature(model, processor)


def replayed(creature, life, ticks=TICKS, **named):
    return [creature.step({name: value[t] for name, value in life.items()}, **named) for t in range(ticks)]


def stacked(emissions, name):
    return torch.stack([getattr(emission.step, name)[0] for emission in emissions])


def as_batch(life):
    tensors = {name: torch.from_numpy(value)[None] for name, value in life.items()}
    return {name: value.long() if value.dtype == torch.int32 else value for name, value in tensors.items()}


# --- the same as forward and generate --------------------------------------------------------------------------------


def test_a_replayed_life_is_teacher_forcing(creature, model, life):
    emissions = replayed(creature, life, feed_back=False)
    with torch.no_grad():
        whole = model(**as_batch(life), output_streams=ALL_STREAMS, use_cache=False)
    assert WINDOW < len(emissions) == TICKS
    for name in ("logits", "external_text_logits", "animation", "action", "last_hidden_state"):
        torch.testing.assert_close(stacked(emissions, name), whole[name][0], **EXACT)
    changed = life | {"input_ids": np.where(np.arange(TICKS) == 3, 17, life["input_ids"])}
    creature.reset()
    other = stacked(replayed(creature, changed, feed_back=False), "logits")
    assert torch.equal(other[:3], stacked(emissions, "logits")[:3])
    assert not torch.allclose(other[3], emissions[3].step.logits[0], atol=1e-2)


def test_a_window_on_a_model_without_one(processor, life):
    """The weights of a model with a sliding window, whose window the creature brings."""
    full, cut = (micro_model(**SIZES, sliding_window=window) for window in (None, WINDOW))
    with torch.no_grad():
        wanted = cut(**as_batch(life), use_cache=False).logits[0]
    found = stacked(replayed(LiveCreature(full, processor, window=WINDOW), life, feed_back=False), "logits")
    torch.testing.assert_close(found, wanted, **EXACT)
    assert not torch.allclose(found[-1], full(**as_batch(life)).logits[0, -1], atol=1e-2)
    assert LiveCreature(full, processor).window == full.config.max_position_embeddings


def test_its_own_life_is_that_of_generate(model, processor, life):
    """Greedy, from one silent tick on: own outputs are fed back the same way."""
    outer = {name: life[name] for name in ("external_voice_ids", "input_features", "joint_positions",
                                           "joint_rotations", "body_state", "body_mask")}  # fmt: skip
    creature = LiveCreature(model, processor, sampling=ALL_GREEDY)
    emissions = replayed(creature, outer)
    generated = model.generate(
        torch.tensor([[NULL]]), output_streams=ALL_STREAMS, max_new_tokens=TICKS, do_sample=False, eos_token_id=None,
        **as_batch(outer),
    )  # fmt: skip
    assert [emission.thought_id for emission in emissions] == generated.sequences[0, 1:].tolist()
    assert [emission.said_id for emission in emissions] == generated.external_text[0].tolist()
    assert len(set(generated.sequences[0].tolist())) > 3
    np.testing.assert_array_equal([emission.voice_codes for emission in emissions], generated.audio[0])
    torch.testing.assert_close(stacked(emissions, "animation"), generated.animation[0], **EXACT)
    decoded = processor.decode_outputs(generated)[0]
    assert [w for e in emissions for w in e.thought] == decoded["internal_text"][
        : sum(len(e.thought) for e in emissions)
    ]
    subframes = model.config.subframes_per_tick
    np.testing.assert_allclose(
        np.concatenate([emission.action for emission in emissions]),
        decoded["action"]["values"][: TICKS * subframes], atol=1e-3,
    )  # fmt: skip
    np.testing.assert_allclose(
        np.concatenate([emission.rotations for emission in emissions]), decoded["joint_rotations"]["values"], atol=1e-3
    )
    np.testing.assert_allclose([e.blend_shapes for e in emissions], decoded["blend_shapes"]["values"], atol=1e-3)
    np.testing.assert_allclose([e.eyes for e in emissions], decoded["eyes"]["values"], atol=1e-3)


def test_the_same_seed_is_the_same_life(model, processor, life):
    def live(creature):
        return [(e.thought_id, e.said_id, e.voice_codes.tolist(), e.action.tolist()) for e in replayed(creature, life)]

    creature = LiveCreature(model, processor, seed=3)
    first = live(creature)
    torch.manual_seed(1)  # other draws in the same process change nothing
    creature.reset()
    assert live(creature) == first == live(LiveCreature(model, processor, seed=3))
    creature.reset(seed=4)
    assert live(creature) != first


def test_streams_that_were_not_trained_are_not_emitted(processor, life):
    model = micro_model(**SIZES, loss_weights={"animation": 1.0})
    creature = LiveCreature(model, processor)
    emissions = replayed(creature, {"input_features": life["input_features"]})
    assert all(e.thought_id is e.said_id is e.voice_codes is None and e.action.shape == (2, 2) for e in emissions)
    assert all(int(e.arguments["input_ids"]) == NULL for e in emissions)  # the inner voice is silent, not absent
    assert set(emissions[-1].arguments) == {"input_ids", "input_features", "animation", "action"}
    with pytest.raises(ValueError, match="Unknown streams"):
        LiveCreature(model, processor, streams=("voice",))


def test_an_action_without_statistics_is_refused_before_the_first_tick():
    model = micro_model(**SIZES | {"action_mean": None, "action_std": None})
    processor = CreatureProcessor.from_config(model.config, load_tokenizer())
    with pytest.raises(UserError, match="no statistics of action: set action_mean"):
        LiveCreature(model, processor)
    assert LiveCreature(model, processor, streams=("internal_text",)).tick().action is None


def test_a_recorded_graph_gives_the_same_life(processor, life, monkeypatch):
    """With a window that is full twice, and without one, with slots that run out."""
    monkeypatch.setattr(stepping_creature, "SHORTEST", 16)
    outer = {name: life[name] for name in life if name not in OWN}
    for window in (WINDOW, None):
        model = micro_model(**SIZES, sliding_window=window)
        lives, recordings = [], []
        for recorded in (False, True):
            with monkeypatch.context() as patch:
                recordings = record_on_cpu(patch) if recorded else recordings
                creature = LiveCreature(model, processor, window=window)
                if window is None:
                    creature._past = stepping_creature.Stepper(model)
                lives.append(replayed(creature, outer))
        for name in ("thought_id", "said_id"):
            assert [getattr(e, name) for e in lives[0]] == [getattr(e, name) for e in lives[1]]
        for name in ("logits", "animation"):
            torch.testing.assert_close(stacked(lives[0], name), stacked(lives[1], name), **EXACT)
        # At the first tick, at the first that follows an emission, and where the slots run out.
        assert recordings == ([WINDOW] * 2 if window else [16, 16, 32])


# --- senses ----------------------------------------------------------------------------------------------------------


def test_raw_senses_become_what_a_recording_becomes(processor):
    draw = np.random.default_rng(0)
    rate, samples = 22050, 1764  # of a tick
    sound = (draw.standard_normal(TICKS * samples) * 0.1).astype(np.float32)
    cameras = draw.integers(0, 256, (2, TICKS, 12, 16, 3), dtype=np.uint8)
    body = {
        "joint_positions": draw.standard_normal((TICKS, 3, 3)),
        "joint_rotations": quaternions(TICKS, 3, draw=draw),
        "state": draw.standard_normal((TICKS, 5)) * 3 + 7,
    }
    touch = [
        {"time": (tick + 0.5) * TICK_SECONDS, "point": point, "surface": 1, "force": 2.0, "x": 0.0, "y": 0.1, "z": 0.2,
         "temperature": 30.0 + tick} for tick in range(0, TICKS, 3) for point in (2, 5, 7)[: tick % 4]
    ]  # fmt: skip
    words = [{"word": word, "start": tick * TICK_SECONDS} for tick, word in ((0, "unbelievably loud"), (9, "robot"))]
    whole = processor(
        audio=sound, sampling_rate=rate, images=[list(camera) for camera in cameras], touch=touch, external_voice=words,
        return_tensors="np", **body,
    )  # fmt: skip
    perceive = Perception(processor, rate)
    for tick in range(TICKS):
        now = perceive(
            audio=sound[tick * samples : (tick + 1) * samples],
            images=cameras[:, tick],
            touch=[contact for contact in touch if contact["time"] // TICK_SECONDS == tick],
            words=[word for word in words if round(word["start"] / TICK_SECONDS) == tick],
            **{name: value[tick] for name, value in body.items()},
        )
        mask = whole["touch_mask"][0, tick]
        assert mask.any() == ("touch_points" in now)
        for name, value in now.items():
            wanted = whole[name][0, tick]
            if name.startswith("touch"):
                value, wanted = value[now["touch_mask"]], wanted[mask]
            elif name == "joint_rotations":  # q and -q are one rotation
                value, wanted = (q * np.sign(q[..., :1]) for q in (value, wanted))
            np.testing.assert_allclose(value, wanted, atol=1e-5, err_msg=f"{name} at {tick}")
        assert {"input_features", "pixel_values", "body_state", "external_voice_ids"} <= now.keys()


def test_what_does_not_arrive_is_absent(creature):
    def perceived(**senses):
        return set(creature.tick(**senses).arguments) - {
            "input_ids", "external_text_ids", "audio_codes", "animation", "action"
        }  # fmt: skip

    assert perceived() == set()
    assert perceived(audio=np.zeros(1280)) == {"input_features"}
    assert perceived(audio=np.zeros(1000)) == set()  # the rest comes late
    assert perceived(audio=np.zeros(1560)) == {"input_features"}  # two ticks at once
    assert perceived(images=[picture(3), None]) == set()
    assert perceived(images=[picture(3), picture(5)]) == {"pixel_values"}
    assert perceived(state=np.zeros(5)) == set()  # half a body
    assert perceived(joint_rotations=np.ones((3, 4))) == {"joint_rotations"}  # a pose to start from
    assert perceived(touch=[], words=None) == set()
    assert perceived(words=[]) == {"external_voice_ids"}
    body = dict(state=np.full(5, np.nan), joint_positions=np.zeros((3, 3)), joint_rotations=np.ones((3, 4)))
    assert perceived(**body) == set()
    assert creature.clock.ticks == creature.now == 11 and creature.clock.p95 > 0


def test_a_wrong_sense_is_a_sentence_and_changes_nothing(creature, life):
    senses = {name: value[0] for name, value in life.items()}
    creature.step(senses)
    for wrong, message in (
        (
            dict(state=np.zeros(4), joint_positions=np.zeros((3, 3)), joint_rotations=np.ones((3, 4))),
            r"\[4\]: give \[5\]",
        ),
        (dict(images=[picture(1)]), "2 cameras"),
        (dict(touch=[CONTACT | dict(point=99)]), "the point 99"),
        (dict(audio=np.zeros((2, 99, 3))), "samples"),
        (dict(images=[b"no picture"] * 2), "cannot be decoded"),
        (dict(images=[np.zeros((0, 8, 3), np.uint8)] * 2), "cannot be decoded"),
        (dict(images=5), "a picture for each camera"),
        (dict(joint_rotations="turned"), "joint_rotations is an array of <U6"),
        (dict(joint_rotations=[[1], [1, 2]]), "no array of numbers"),
        (dict(state=["hot"] * 5), "give one of numbers"),
        (dict(touch=np.zeros((2, 7))), "no list of contacts"),
        (dict(touch=[dict(point=1)]), "no list of contacts: give a dict of point, surface, force"),
        (dict(touch=[CONTACT | dict(force="much")]), "force of touch is an array of <U4"),
        (dict(words=5), '"words" is a text'),
        (dict(words=[None]), '"words" is a text'),
        (dict(words=["\ud800"]), "half a character"),
        # Numbers that overflow in the model: without a check, every later tick is NaN.
        (dict(audio=np.full(1280, 3e38)), "audio has a number beyond 1e"),
        (dict(touch=[CONTACT | dict(x=-3e38)]), "x of touch has a number beyond 1e"),
        (dict(joint_positions=np.full((3, 3), 3e38)), "joint_positions has a number beyond 1e"),
        (dict(state=np.full(5, 1e300)), "state has a number beyond 1e"),
    ):
        with pytest.raises(ValueError, match=message):
            creature.tick(**{"audio": np.ones(1280), "words": "hello", **wrong})
    assert creature.now == 1 and creature._past.get_seq_length() == 1
    assert not np.array(creature.perception.ears.samples).any() and not creature.perception.words
    np.testing.assert_array_equal(creature.step(senses).arguments["pixel_values"][0, 0], life["pixel_values"][0])


# --- words -----------------------------------------------------------------------------------------------------------


def test_words_that_are_heard_in_a_burst_queue_one_token_a_tick(creature, processor):
    heard = []
    for tick in range(12):
        arguments = creature.tick(words={2: ["a bottle of", "unbelievable"], 3: "tea"}.get(tick, [])).arguments
        heard.append(int(arguments["external_voice_ids"]))
    words = processor.encode_words("a bottle of unbelievable tea")
    assert heard == ([NULL] * 2 + words + [NULL] * 12)[:12] and len(words) >= 5
    creature.tick(words="not heard any more")
    creature.reset()
    assert int(creature.tick(words=[]).arguments["external_voice_ids"]) == NULL


def test_words_come_out_whole_with_their_times(processor):
    ids = np.full(30, NULL)
    ids[3:5] = processor.encode_words("antidisestablishment")[:2]
    bottle, hot = processor.encode_words("bottle"), processor.encode_words("hot")
    ids[5 : 5 + len(bottle)] = bottle
    ids[12] = hot[0]
    ids[20] = hot[0]
    ids[21] = GPT2["eos_token_id"]
    stream, found, ticks = WordStream(processor), [], []
    for tick, token in enumerate(ids):
        for word in stream(int(token), tick):
            found.append(word)
            ticks.append(tick)
    assert found == processor.decode_words(ids) and [word["word"] for word in found][1:] == ["bottle", "hot", "hot"]
    assert ticks == [5, 5 + len(bottle), 13, 21]
    last = WordStream(processor)
    assert last(hot[0], 4) == [] and [word["word"] for word in last.finish()] == ["hot"] and last.finish() == []


# --- voice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [micro_codec, micro_mimi])
def test_the_sound_of_a_voice_that_comes_tick_by_tick(make):
    """Of our own codec that of the whole; of one that looks back a while, of the ticks before."""
    codec = make()
    organs = codec_organs(codec)
    model = micro_model(**{**SIZES, **organs}, sliding_window=WINDOW)
    processor = CreatureProcessor.from_config(model.config, load_tokenizer(), codec)
    creature = LiveCreature(model, processor, seed=1)
    emissions = [creature.tick() for _ in range(6)]
    codes = np.stack([emission.voice_codes for emission in emissions])
    assert len(np.unique(codes)) > 3
    sound = np.concatenate([emission.sound for emission in emissions])
    if make is micro_codec:
        np.testing.assert_allclose(sound, decode_voice(codec, codes), atol=1e-5)
    else:
        np.testing.assert_allclose(
            emissions[-1].sound, decode_voice(codec, codes)[-len(emissions[-1].sound) :], atol=1e-5
        )
    assert len(sound) == round(6 * TICK_SECONDS * codec.config.sampling_rate) and sound.any()


# --- endurance and folders -------------------------------------------------------------------------------------------


def test_memory_is_flat_over_several_windows(model, processor, life):
    import gc

    creature = LiveCreature(model, processor)

    def held():
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor]
        return len(tensors), sum(t.numel() * t.element_size() for t in tensors)

    counts = []
    for _ in range(3):
        for tick in range(2 * WINDOW):
            creature.step({name: value[tick % TICKS] for name, value in life.items() if name != "input_ids"})
        counts.append(held())
    assert counts[0] == counts[1] == counts[2]
    assert all(keys.shape[2] == WINDOW for keys in creature._past.cache.keys)


def test_from_pretrained(model, processor, life, tmp_path, creature):
    model.save_pretrained(tmp_path / "saved")
    processor.tokenizer.save_pretrained(tmp_path / "saved")
    loaded = LiveCreature.from_pretrained(tmp_path / "saved", device="cpu", sampling={"audio": Sampling(0.5)}, seed=2)
    assert loaded.window == WINDOW and loaded.sampling["audio"] == Sampling(0.5) and loaded.seed == 2
    assert loaded.sampling["internal_text"] == creature.sampling["internal_text"]
    found, wanted = (stacked(replayed(c, life, 8, feed_back=False), "logits") for c in (loaded, creature))
    torch.testing.assert_close(found, wanted)
    with pytest.raises(UserError, match="no folder"):
        LiveCreature.from_pretrained(tmp_path / "nowhere")
