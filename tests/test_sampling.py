"""How ids are drawn: the settings do what their names say, and the choice to stay silent is one of its own."""

import math

import pytest
import torch

from sampling_creature import Sampling, draw_for_sample, sample

NULL = 3
LOGITS = torch.tensor([2.0, 1.0, 0.0, 2.5])  # NULL is the likeliest
MANY = 4000


def draw(logits, how, null_id=None, seed=0):
    """An id for each row of logits, with random numbers of a seed."""
    generator = torch.Generator().manual_seed(seed)
    return sample(logits, how, null_id, **draw_for_sample(how, *logits.shape, logits.device, null_id, generator))


def shares(how, null_id=None, logits=LOGITS, seed=0):
    """How often each id is drawn."""
    drawn = draw(logits.expand(MANY, -1), how, null_id, seed)
    return [(drawn == token).float().mean().item() for token in range(len(logits))]


def near(*values):
    return pytest.approx(values, abs=0.03)


def test_greedy_takes_the_likeliest():
    assert sample(LOGITS[None]).tolist() == [NULL]
    assert draw_for_sample(Sampling(null_temperature=0.0), 1, 4, LOGITS.device, NULL) == {}
    assert sample(LOGITS[None], Sampling(null_bias=-1.0), NULL).tolist() == [0]
    assert sample(LOGITS[None], Sampling(null_bias=-1.0)).tolist() == [NULL]  # of a stream without NULL


def test_temperature_and_what_is_kept():
    weights = LOGITS.softmax(0)
    assert shares(Sampling(temperature=1.0)) == near(*weights.tolist())
    assert shares(Sampling(temperature=0.5)) == near(*(LOGITS / 0.5).softmax(0).tolist())
    first, second = math.exp(2.5), math.exp(2.0)
    both = near(second / (first + second), 0, 0, first / (first + second))
    assert shares(Sampling(temperature=1.0, top_k=2)) == both
    assert shares(Sampling(temperature=1.0, top_k=9)) == near(*weights.tolist())  # more than there are
    assert shares(Sampling(temperature=1.0, top_p=0.6)) == both  # 0.53 alone is less
    assert shares(Sampling(temperature=1.0, top_p=0.5)) == [0, 0, 0, 1]
    assert shares(Sampling(temperature=1.0, top_k=3, top_p=0.6)) == both


def test_silence_is_drawn_apart_from_the_words():
    """As likely as at a temperature of 1 with its bias, whatever the words are drawn with."""
    words, silent = LOGITS[:3], LOGITS[NULL]
    for bias in (0.0, 1.2, -2.0):
        share = torch.sigmoid(silent + bias - words.logsumexp(0)).item()
        greedy = Sampling(null_bias=bias, null_temperature=1.0)
        assert shares(greedy, NULL) == near(1 - share, 0, 0, share)
        cold = Sampling(temperature=0.5, null_bias=bias, null_temperature=1.0)
        rest = [(1 - share) * value for value in (words / 0.5).softmax(0).tolist()]
        assert shares(cold, NULL) == near(*rest, share)
    # Silence is likelier than any word, and less likely than all of them together.
    assert shares(Sampling(null_bias=-0.2), NULL)[NULL] == 1
    assert shares(Sampling(null_bias=-0.2, null_temperature=0.0), NULL) == [1, 0, 0, 0]
    assert shares(Sampling(null_bias=9.0, null_temperature=1.0), NULL)[NULL] > 0.99


def test_the_same_generator_or_noise_gives_the_same_ids():
    how, many = Sampling(temperature=1.0, null_temperature=1.0), LOGITS.expand(MANY, -1)
    first, again, other = (draw(many, how, NULL, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    noise = torch.empty(MANY, 4).exponential_()
    drawn = [sample(many, Sampling(temperature=1.0, top_k=k), noise=noise) for k in (0, 0, 3)]
    assert torch.equal(drawn[0], drawn[1]) and (drawn[2] == 2).sum() == 0


def test_settings_out_of_range_are_refused():
    for wrong in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"null_temperature": -1.0}):
        with pytest.raises(ValueError, match="Sampling: "):
            Sampling(**wrong)
