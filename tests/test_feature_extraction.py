"""The ears: log-mel frames that never look ahead, the same in pieces as in one, at any sampling rate."""

import numpy as np
import pytest
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from feature_extraction_creature import CreatureFeatureExtractor
from ticks_creature import TICK_SECONDS

RATES = [16000, 22050, 48000, 8000]


@pytest.fixture(scope="module")
def extractor():
    return CreatureFeatureExtractor()


def sound(rate: int, seconds: float = 1.1, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(round(rate * seconds)) * 0.1).astype(np.float32)


def tone(rate: int, frequency: float, seconds: float = 0.8) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def test_a_frame_is_the_log_mel_of_the_25_ms_that_end_with_it(extractor):
    samples = sound(16000)
    filters = mel_filter_bank(257, 64, 20.0, 8000.0, 16000)
    expected = spectrogram(
        np.pad(samples, (240, 0)), window_function(400, "hann"), 400, 160, 512, power=2.0, center=False,
        mel_filters=filters, mel_floor=1e-5, log_mel="log",
    ).T  # fmt: skip
    frames = extractor.extract(samples, 16000).reshape(-1, 64)
    np.testing.assert_allclose(frames[: len(expected)], (expected + 6) / 4, atol=1e-4)
    assert len(frames) == 14 * 8
    np.testing.assert_allclose(extractor.extract(np.zeros(1280), 16000), (np.log(1e-5) + 6) / 4, atol=1e-6)


@pytest.mark.parametrize("rate", RATES)
def test_a_sound_in_pieces_gives_the_numbers_of_the_whole(extractor, rate):
    samples = np.stack((sound(rate), sound(rate, seed=1)), axis=1)  # stereo
    whole = extractor.extract(samples, rate)
    stream, ticks, start = extractor.stream(rate), [], 0
    for size in np.random.default_rng(1).integers(0, rate // 5, 200):
        ticks.append(stream(samples[start : start + size]))
        assert len(ticks[-1]) <= size / rate / TICK_SECONDS + 1
        start += size
    assert start > len(samples) and sum(map(len, ticks)) == len(whole) - 1
    np.testing.assert_allclose(np.concatenate([*ticks, stream.finish()]), whole, atol=1e-4)


@pytest.mark.parametrize("rate", RATES)
def test_a_frame_never_looks_past_its_own_end(extractor, rate):
    samples = sound(rate)
    whole = extractor.extract(samples, rate).reshape(-1, 64)
    for frame in (0, 7, 8, 50, 99):
        later = samples.copy()
        later[int(np.ceil((frame + 1) * 0.01 * rate)) :] = 0.9
        np.testing.assert_array_equal(extractor.extract(later, rate).reshape(-1, 64)[: frame + 1], whole[: frame + 1])
        earlier = samples.copy()
        earlier[int((frame + 1) * 0.01 * rate - 0.008 * rate) :] = 0.9
        assert abs(extractor.extract(earlier, rate).reshape(-1, 64)[frame] - whole[frame]).max() > 0.01


@pytest.mark.parametrize("rate", [22050, 44100, 48000, 11025])
def test_a_resampled_tone_is_the_tone_and_what_is_too_high_for_the_ears_is_silence(extractor, rate):
    expected = extractor.extract(tone(16000, 1000.0), 16000).reshape(-1, 64)[8:-8]
    frames = extractor.extract(tone(rate, 1000.0), rate).reshape(-1, 64)[8:-8]
    np.testing.assert_allclose(frames, expected, atol=0.05)
    if rate > 2 * 9500:
        silence = (np.log(1e-5) + 6) / 4
        np.testing.assert_allclose(extractor.extract(tone(rate, 9500.0), rate)[1:-1], silence, atol=0.05)


def test_integers_channels_and_batches(extractor):
    samples = sound(16000, 0.5)
    expected = extractor.extract(samples, 16000)
    integers = np.round(samples * 32768).astype(np.int16)
    np.testing.assert_allclose(extractor.extract(integers, 16000), expected, atol=0.01)
    np.testing.assert_allclose(extractor.extract(np.stack([samples] * 2, axis=1), 16000), expected, atol=1e-5)
    eight_bits = np.round(samples * 128 + 128).astype(np.uint8)
    assert abs(extractor.extract(eight_bits, 16000) - expected).mean() < 0.3
    batch = extractor([samples, samples[:1280]], sampling_rate=16000, return_tensors="pt")
    assert batch["input_features"].shape == (2, 7, 512)
    assert batch["input_features_mask"].tolist() == [[True] * 7, [True] + [False] * 6]
    np.testing.assert_allclose(batch["input_features"][0].numpy(), expected, atol=1e-5)
    assert extractor(samples, sampling_rate=16000)["input_features"].shape == (1, 7, 512)


@pytest.mark.parametrize(
    ("samples", "rate", "words"),
    [
        (np.zeros(100), None, "give that of the sound"),
        (np.zeros(100), 22050.5, "give that of the sound"),
        (np.array([0.0, np.nan]), 16000, "not finite"),
        (np.zeros((2, 3, 4)), 16000, r"samples \[N\]"),
        (np.zeros((2, 100)), 16000, r"samples \[N\]"),
        (np.array(["a"]), 16000, r"samples \[N\]"),
    ],
)
def test_what_is_no_sound_ends_in_a_sentence(extractor, samples, rate, words):
    with pytest.raises(ValueError, match=words):
        extractor(samples, sampling_rate=rate)


def test_saved_and_loaded_with_its_numbers(tmp_path):
    CreatureFeatureExtractor(feature_size=32, frames_per_tick=4, mean=-5.0, std=3.0).save_pretrained(tmp_path)
    loaded = CreatureFeatureExtractor.from_pretrained(tmp_path)
    samples = sound(16000)
    assert loaded.extract(samples, 16000).shape == (14, 4 * 32)
    same = CreatureFeatureExtractor(feature_size=32, frames_per_tick=4, mean=-5.0, std=3.0)
    np.testing.assert_array_equal(loaded.extract(samples, 16000), same.extract(samples, 16000))
    with pytest.raises(ValueError, match="frames_per_tick"):
        CreatureFeatureExtractor(frames_per_tick=7)
