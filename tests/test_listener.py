"""benchmarks/listener.py: words are recognised where they are said, and not in silence; voices lie on their ticks."""

import numpy as np
import pytest
import torch
from creatures import GPT2, micro_model
from lives import make_recording
from test_codec import micro_codec

from benchmarks import listener
from codec_creature import codec_organs
from creature.data.text.tokenizer import load_tokenizer
from creature.live import LiveCreature
from generation_creature import OUTER_SENSES
from processing_creature import TARGETS, CreatureProcessor
from sampling_creature import GREEDY
from ticks_creature import TICK_SECONDS

RATE, TICK = 16_000, 1280
TONES = {"low": 300, "middle": 900, "high": 2700}  # Hz


def spoken(ticks: list[int], draw: np.random.Generator) -> tuple:
    """A voice that says the word of a random tone for 0.3 s from each tick on."""
    names = [str(name) for name in draw.choice(list(TONES), len(ticks))]
    sound, times = np.zeros((ticks[-1] + 6) * TICK, np.float32), np.arange(4800) / RATE
    for name, tick in zip(names, ticks, strict=True):
        sound[tick * TICK :][:4800] = 0.3 * np.sin(2 * np.pi * TONES[name] * times)
    return sound, RATE, [{"word": name, "start": tick * TICK_SECONDS} for name, tick in zip(names, ticks, strict=True)]


def test_tones_are_recognised_at_their_ticks_and_silence_is_not():
    torch.set_num_threads(1)
    draw, vocabulary = np.random.default_rng(0), {name: place for place, name in enumerate(TONES)}
    voices = [spoken(list(range(0, 200, 4)), draw) for _ in range(3)]
    heard, labels = listener.hear(voices[:2], vocabulary)
    net = listener.train(heard, labels, len(TONES), steps=40, seed=0, device="cpu")
    sound, rate, words = voices[2]
    right = {
        name: listener.share_right(net, *listener.hear([(voice, rate, said)], vocabulary))
        for name, (voice, said) in {
            "true": (sound, words),
            "silence": (0 * sound, words),
            "late": (np.roll(sound, 4 * TICK), words),
            "unknown": (sound, [*words, {"word": "unheard", "start": 0.0}]),
        }.items()
    }
    frequent = max(np.unique(listener.hear(voices[2:], vocabulary)[1], return_counts=True)[1]) / len(words)
    assert right["true"] == right["unknown"] == 1.0
    assert right["silence"] <= frequent < 0.6 and right["late"] < 0.6


@pytest.fixture(scope="module")
def creature():
    codec = micro_codec()
    sizes = codec_organs(codec) | dict(num_mel_bins=8, audio_frames_per_tick=8, body_state_size=0, action_size=0)
    model = micro_model(**GPT2, **sizes)
    processor = CreatureProcessor.from_config(model.config, load_tokenizer(), codec)
    return LiveCreature(model, processor, sampling={"audio": GREEDY})


@pytest.fixture
def recording():
    draw = np.random.default_rng(1)
    voice = {"array": 0.3 * draw.standard_normal(2 * RATE), "sampling_rate": RATE}
    return make_recording() | {"voice": voice}


def test_codes_of_a_recorded_past_are_those_of_a_replayed_life(creature, recording):
    life = creature.processor.encode(recording)
    senses = {name: value for name, value in life.items() if name not in TARGETS}
    creature.reset()
    steps = [creature.step({name: value[tick] for name, value in senses.items()}, feed_back=False) for tick in range(9)]
    drawn = listener.draw_codes(creature, life)
    assert drawn.shape == life["audio_codes"].shape and np.array_equal(drawn[0], life["audio_codes"][0])
    assert np.array_equal(drawn[1:10], [step.voice_codes for step in steps])
    creature.window, window = 10, creature.window
    clips = listener.draw_codes(creature, life)  # of ten ticks each
    creature.window = window
    assert np.array_equal(clips[:10], drawn[:10]) and np.array_equal(clips[10], life["audio_codes"][10])
    creature.reset()
    steps = [creature.step({name: value[tick] for name, value in senses.items()}, feed_back=False) for tick in (10, 11)]
    assert np.array_equal(clips[11:13], [step.voice_codes for step in steps])


def test_own_voice_and_words_are_those_of_a_life_on_own_outputs_a_tick_later(creature, recording):
    voices, life = listener.voices_of(creature, recording, seed=3), creature.processor.encode(recording)
    assert {name: len(sound) for name, (sound, *_) in voices.items()} == dict.fromkeys(voices, 2 * RATE)
    assert not voices["silence"][0].any() and len(voices["own past"][2]) > 3
    creature.reset(3)
    ids, sounds = [GPT2["null_token_id"]], [creature.speaking(life["audio_codes"][0].astype(np.int64))]
    for tick in range(len(life["input_ids"])):
        outer = {name: value[tick] for name, value in life.items() if name in OUTER_SENSES}
        emission = creature.step(outer)
        ids.append(emission.said_id)
        sounds.append(emission.sound)
    np.testing.assert_allclose(voices["own past"][0], np.concatenate(sounds[:-1]), atol=1e-5)
    assert voices["own past"][2] == creature.processor.decode_words(np.array(ids))
