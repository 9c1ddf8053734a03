"""Rows of clips to train on, clips to evaluate on, and what is computed from them."""

from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from creatures import EVERY_WEIGHT, micro_model, random_batch

from configuration_creature import CreatureConfig
from creature.data import collate_clips, collate_rows, spread_pictures
from creature.data.recordings.made_up import write_made_up_recordings
from creature.data.recordings.rows import ARGUMENTS, ClipPairs, TrainingRows, open_rows, pack
from creature.data.text.tokenizer import load_tokenizer
from creature.errors import UserError
from creature.rounds.evaluation import COPIES, clip_sums, collate_pairs, evaluate_clips, variant_sums, variants_of
from creature.rounds.metrics import stream_metrics, stream_sums, sum_names
from creature.rounds.trainer import drop_senses
from creature.settings import DataArguments
from losses_creature import IGNORE_INDEX
from processing_creature import ABSENT, TARGETS, CreatureProcessor, pad_ticks
from streams_creature import count_targets

BUILT = {"loss_weights": EVERY_WEIGHT, "body_state_size": 5, "action_size": 2}


def clip_of(model, ticks: int, seed: int) -> dict:
    """A clip with every sense and target, as `make_clips` gives it: arrays [T, ...]."""
    batch = random_batch(model.config, rows=1, ticks=ticks, seed=seed)
    arrays = {name: value[0].numpy() for name, value in batch.items()}
    return {name: value.astype(np.int32) if value.dtype == np.int64 else value for name, value in arrays.items()}


@pytest.fixture(scope="module")
def model():
    return micro_model(**BUILT)


@pytest.fixture(scope="module")
def clips(model):
    return [clip_of(model, ticks, seed) for seed, ticks in enumerate((5, 3, 7, 4))]


def test_every_clip_is_in_one_row_and_no_row_is_too_long():
    lengths = np.random.default_rng(0).integers(2, 100, 500)
    rows = pack(lengths, 100, seed=0)
    assert sorted(clip for row in rows for clip in row) == list(range(500))
    used = [lengths[row].sum() for row in rows]
    assert max(used) <= 100 and sum(used) / (100 * len(rows)) > 0.9
    assert pack(lengths, 100, seed=0) == rows != pack(lengths, 100, seed=1)


def test_a_row_of_several_clips_is_computed_as_each_of_them_alone(model, clips):
    like = {name: value[:0] for name, value in clips[0].items()}
    batch = spread_pictures(collate_rows([clips[:2], clips[2:]], ticks=12, like=like))
    assert batch["position_ids"].tolist() == [
        [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3],
        [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 0],
    ]
    assert batch["cu_seq_lens_q"][:7].tolist() == [0, 5, 8, 12, 19, 23, 24]
    senses = {name: value for name, value in batch.items() if name not in TARGETS}
    hidden = model(**senses).last_hidden_state
    places = [(0, 0), (0, 5), (1, 0), (1, 7)]
    for clip, (row, first) in zip(clips, places, strict=True):
        alone = collate_clips([clip])
        expected = model(**{name: value for name, value in alone.items() if name not in TARGETS}).last_hidden_state[0]
        torch.testing.assert_close(hidden[row, first : first + len(expected)], expected, atol=1e-5, rtol=1e-4)
        assert (batch["labels"][row, first] == IGNORE_INDEX).all() and not batch["animation_target_mask"][row, first]
        assert torch.equal(batch["labels"][row, first + 1 : first + len(expected)], alone["labels"][0, 1:])
    losses = [model(**collate_clips([clip])).losses["internal_text"] for clip in clips]
    counts = [count_targets(model.config, collate_clips([clip]))[0] for clip in clips]
    weighted = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(model(**batch).losses["internal_text"], weighted, atol=1e-5, rtol=1e-4)


def test_a_row_of_text_has_no_other_sense(model, clips):
    ids = np.arange(6, dtype=np.int32)
    like = {name: value[:0] for name, value in clips[0].items()}
    batch = collate_rows([[{"input_ids": ids, "labels": ids}]], ticks=6, like=like)
    assert not len(batch["pixel_values"])  # black pictures are not sent to the device
    batch = spread_pictures(batch)
    assert batch.keys() == like.keys() | {"position_ids", "cu_seq_lens_q"}
    alone = model(input_ids=batch["input_ids"]).last_hidden_state
    senses = {name: value for name, value in batch.items() if name not in TARGETS}
    torch.testing.assert_close(model(**senses).last_hidden_state, alone, atol=1e-6, rtol=1e-5)


def test_rows_come_in_their_shares_and_each_once_before_any_comes_again():
    parts = [list(range(10)), list(range(100, 130))]
    rows = TrainingRows(parts, [Fraction(1, 4), Fraction(3, 4)], 40, seed=0)
    seen = [rows[number] for number in range(len(rows))]
    assert sum(row < 100 for row in seen) == 10 and sorted(seen) == sorted(parts[0] + parts[1])
    longer = TrainingRows(parts, [Fraction(1, 4), Fraction(3, 4)], 400, seed=0)
    assert [longer[number] for number in range(40)] == seen  # the length of a run changes nothing
    assert [longer[number] for number in range(40, 80)] != seen
    single = TrainingRows(parts[:1], [Fraction(1)], 25, seed=0)
    assert sorted(single[number] for number in range(20)) == sorted(2 * parts[0])


class Clips(list):
    """A list of clips with what a `datasets.Dataset` has beside; `read` are the numbers that were asked for."""

    def __init__(self, clips):
        super().__init__(clips)
        self.read, self.column_names = [], [*dict.fromkeys(name for clip in clips for name in clip)]

    def __getitem__(self, number):
        self.read.append(number)
        return super().__getitem__(number)


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
def test_each_clip_is_evaluated_once_with_the_senses_of_the_clip_half_the_split_away(model, count):
    given = Clips([clip_of(model, 3 + seed, seed) for seed in range(count)])
    pairs = list(ClipPairs(given))
    assert len(given.read) == count + count % 2 and set(given.read) == set(range(count))
    own = [len(clip["labels"]) - 3 for clip, _ in pairs]
    assert sorted(own) == list(range(count))
    for number, (clip, wrong) in zip(own, pairs, strict=True):
        other, ticks = list.__getitem__(given, (number + count // 2) % count), 3 + number
        assert wrong.keys() == clip.keys() - TARGETS.keys()
        for name in wrong.keys() - {"input_features_mask"}:
            masked = other[name][:ticks] & clip[name][: len(other[name])] if name.endswith("mask") else other[name]
            assert np.array_equal(wrong[name], masked[:ticks])
    assert list(ClipPairs(Clips(given[:1])))[0][1] is None


def one_at_a_time(model, given: list[dict], how: str, sense: str) -> dict[str, float]:
    """The metrics of one variant, from clips that are changed one by one before they are collated."""
    sums = []
    for number, own in enumerate(given):
        clip, other = dict(own), given[(number + len(given) // 2) % len(given)]
        ticks = len(clip["labels"])
        for name in set(ARGUMENTS.get(sense, ())) & clip.keys():
            value = clip.pop(name)
            if how == "drop":
                clip[name] = np.full_like(value, ABSENT[name])
            elif name in other:
                clip[name] = pad_ticks(name, other[name][:ticks], ticks)
                if name.endswith("_mask") and value.shape == clip[name].shape:
                    clip[name] = clip[name] & value
        sums.append(clip_sums(model, collate_clips([clip])).numpy())
    return stream_metrics(model.config, np.concatenate(sums))


@pytest.mark.parametrize("count", [1, 2, 5, 6])
@pytest.mark.parametrize("size", [1, 3])
def test_all_variants_of_a_batch_are_those_computed_one_at_a_time(model, count, size):
    given = [clip_of(model, ticks, seed) for seed, ticks in enumerate((5, 9, 7, 4, 8, 6)[:count])]
    for name in ARGUMENTS["touch"]:
        given[0][name] = given[0][name][:, :2]  # of fewer contacts than the others
    if count > 2:  # a sense that some have, and one that a single clip has
        given[0] = {name: value for name, value in given[0].items() if name not in ARGUMENTS["vision"]}
        given[1:] = [
            {name: value for name, value in clip.items() if name not in ARGUMENTS["audio"]} for clip in given[1:]
        ]
    clips, rows = Clips(given), ClipPairs(Clips(given))
    variants = variants_of(clips)
    batches = [[rows[number] for number in range(first, min(first + size, count))] for first in range(0, count, size)]
    sums = np.concatenate([variant_sums(model, collate_pairs(batch), variants).numpy() for batch in batches])
    found = evaluate_clips(model.config, clips, sums)
    expected = one_at_a_time(model, given, "", "")
    streams = [name for name in model.config.loss_weights if f"{name}_loss" in expected]
    for how, sense in [(how, sense) for sense in ARGUMENTS for how in (("drop", "wrong") if count > 1 else ("drop",))]:
        metrics = one_at_a_time(model, given, how, sense)
        expected[f"{how}_{sense}"] = metrics["loss"]
        expected |= {f"{stream}_{how}_{sense}": metrics[f"{stream}_loss"] for stream in streams}
    assert list(found) == list(expected) and found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len(streams) == 4 and len({round(found[name], 3) for name in ("loss", "drop_audio", "drop_touch")}) == 3


def test_a_clip_lacks_a_sense_with_its_chance_and_the_same_numbers_drop_the_same(model, clips):
    like = {name: value[:0] for name, value in clips[0].items()}
    batch = spread_pictures(collate_rows([clips[:2]] * 200, ticks=12, like=like))
    dropped = drop_senses(batch, {"audio": 0.25, "internal_voice": 0.5, "touch": 0.9}, np.random.default_rng(1))
    again = drop_senses(batch, {"audio": 0.25, "internal_voice": 0.5, "touch": 0.9}, np.random.default_rng(1))
    assert all(torch.equal(dropped[name], again[name]) for name in batch)
    changed = {name for name in batch if not torch.equal(dropped[name], batch[name])}
    assert changed == {"input_features_mask", "input_ids", "touch_mask"}
    kept = (dropped["input_ids"] >= 0) == (
        batch["input_ids"] >= 0
    )  # a clip keeps its ticks up to some one, or has none
    for first, last in ((0, 5), (5, 8)):
        own = batch["input_ids"][0, first:last] >= 0
        some = kept[:, first:last][:, own].int()
        assert 0.15 < (some.sum(dim=1) == 0).float().mean() < 0.4 and 0.4 < some.all(dim=1).float().mean() < 0.7
        assert (some.diff(dim=1) <= 0).all()
    lost = (batch["input_features_mask"] & ~dropped["input_features_mask"]).float().sum()
    assert 0.1 < lost / batch["input_features_mask"].sum() < 0.3
    assert torch.equal(dropped["labels"], batch["labels"])


def test_metrics_of_streams_are_those_of_the_model(model, clips):
    batch = collate_clips(clips)
    senses = {name: value for name, value in batch.items() if name not in TARGETS}
    hidden = model(**senses).last_hidden_state
    sums = stream_sums(model, hidden, batch)
    assert sums.shape == (4, len(sum_names(model.config)))
    metrics = stream_metrics(model.config, sums.numpy())
    output = model(**batch)
    for name, loss in output.losses.items():
        assert metrics[f"{name}_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["loss"] == pytest.approx(output.loss.item(), rel=1e-4)
    assert np.allclose(sums[1], stream_sums(model, model(**collate_clips(clips[1:2])).last_hidden_state,
                                            collate_clips(clips[1:2]))[0], rtol=1e-3, atol=1e-4)  # fmt: skip
    for name in ("rotation_degrees", "rotation_degrees_repeating", "action_error", "external_text_words_loss"):
        assert metrics[name] > 0
    assert 0 <= metrics["internal_text_silence"] <= 1 and 0 <= metrics["audio_repeating"] < 0.5


def test_perfect_predictions_score_perfectly(model):
    config = model.config
    ticks, names = 6, sum_names(config)
    batch = random_batch(config, rows=2, ticks=ticks, presence=1.0)
    logits = torch.nn.functional.one_hot(batch["labels"][:, 1:], config.vocab_size).float() * 50

    class Head(torch.nn.Module):
        def forward(self, states):  # linear_token_losses gives it the states of all ticks at once
            return logits.flatten(0, 1)

    perfect = SimpleNamespace(config=config, streams=model.streams, model=model.model, _head=Head)
    sums = stream_sums(perfect, torch.zeros(2, ticks, config.hidden_size), batch)
    found = dict(zip(names, sums.sum(dim=0).tolist(), strict=True))
    silent = (batch["labels"][:, 1:] == config.null_token_id).sum()
    assert found["internal_text whole"] == found["internal_text clips"] == 2
    assert found["internal_text words"] == found["internal_text right"] == 2 * (ticks - 1) - silent
    assert found["internal_text silent"] == silent and found["internal_text nats"] < 1e-3


def test_repeating_the_last_command_is_the_measure_of_commands(model):
    batch = random_batch(model.config, rows=1, ticks=5, presence=1.0)
    for name in ("action_targets", "rotation_targets"):
        batch[name] = batch[name][:, :1, :1].expand_as(batch[name]).contiguous()
    batch = {name: value for name, value in batch.items() if name not in COPIES}
    sums = stream_sums(model, torch.ones(1, 5, model.config.hidden_size), batch)
    found = stream_metrics(model.config, sums.numpy())
    assert found["rotation_degrees_repeating"] == pytest.approx(0, abs=0.1)
    assert found["action_error_repeating"] == pytest.approx(0, abs=1e-6) and found["rotation_degrees"] > 0.1


def test_text_has_its_share_of_the_rows(tmp_path):
    write_made_up_recordings(tmp_path / "touch", "touch")
    np.random.default_rng(0).integers(0, 300, 5000).astype(np.uint16).tofile(tmp_path / "text.bin")
    config = CreatureConfig()
    processor = CreatureProcessor.from_config(config, load_tokenizer())
    data = DataArguments(
        text_data=str(tmp_path / "text.bin"), text_share=0.6, clip_ticks=64, cache_dir=str(tmp_path / "cache")
    )
    splits, info, like = open_rows(data, [(str(tmp_path / "touch"), None)], processor, 400, seed=0)
    assert set(splits) == {"train", "validation", "text"} and info["clips"][str(tmp_path / "touch")]["streams"] == [
        "internal_text"
    ]
    assert 0.5 < info["fill"] <= 1 and len(splits["train"]) == 400
    of_text = sum(all("touch_mask" not in clip for clip in splits["train"][number]) for number in range(400))
    assert of_text / 400 == pytest.approx(0.6, abs=0.02) and info["text_rows"] == 0.6
    alone = DataArguments(clip_ticks=64, cache_dir=str(tmp_path / "cache"))
    rows, facts, _ = open_rows(alone, [(str(tmp_path / "touch"), None)], processor, None, seed=0)
    assert len(rows["train"]) == facts["rows_of_recordings"] and facts["data_hash"] != info["data_hash"]
    with pytest.raises(UserError, match="clip_ticks is 1"):
        open_rows(replace(alone, clip_ticks=1), [(str(tmp_path / "touch"), None)], processor, None, seed=0)
