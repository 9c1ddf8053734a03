"""benchmarks/witnesses.py: the nats of the words that one sense can tell, on a life by hand and a micro creature."""

import json
import sys

import numpy as np
import pytest
import torch
from creatures import GPT2, micro_model

from creature.errors import UserError

pytest.importorskip("espeakng_loader")
pytest.importorskip("soundfile")
pytest.importorskip("av")
pytest.importorskip("creature.world", exc_type=(ImportError, UserError))  # without mujoco or OpenGL

from benchmarks import witnesses
from benchmarks.leaks import WITNESS, facts_of
from creature.data import collate_clips
from creature.data.recordings.clips import make_clips
from creature.data.recordings.rows import ClipPairs, EvaluationClips
from creature.data.recordings.schema import RecordingsWriter, load_recordings
from creature.data.text.tokenizer import load_tokenizer
from creature.rounds.evaluation import collate_pairs, variant_sums
from creature.rounds.metrics import stream_metrics
from processing_creature import CreatureProcessor

TICKS = 120
THOUGHTS = {10: "that is Agnieszka", 20: "that is Ben", 46: "touch the red cup left", 60: "Ben saw the fox",
            70: "it feels hot"}  # fmt: skip
SAID = {30: "hello Agnieszka", 90: "it is hot"}
SIZES = GPT2 | {"num_mel_bins": 0, "num_cameras": 0, "num_joints": 0, "num_blend_shapes": 0, "body_state_size": 0,
                "action_size": 0, "num_audio_codebooks": 0, "max_position_embeddings": 128}  # fmt: skip


def text(sentences: dict[int, str]) -> list[dict]:
    """Words that begin every other tick from the tick of their sentence on."""
    times = [
        (word, (tick + 2 * at) * 0.08) for tick, words in sentences.items() for at, word in enumerate(words.split())
    ]
    return [{"word": word, "start": time, "end": time + 0.16} for word, time in times]


def life(number: int, side: str) -> dict:
    touch = {"point": 1, "surface": 3, "force": 2.0, "x": 0.0, "y": 0.0, "z": 0.1, "temperature": 50.0}
    thoughts = {tick: words.replace("left", side) for tick, words in THOUGHTS.items()}
    return {
        "recording_id": f"life {number}", "split_group": str(number), "source": "the room", "license": "CC0-1.0",
        "duration": TICKS * 0.08, "external_voice": text({5: "I am Agnieszka"}), "internal_text": text(thoughts),
        "external_text": text(SAID), "touch": [{"time": time, **touch} for time in (4.8, 4.9, 5.0)],
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("recordings") / "room"
    with RecordingsWriter(path) as writer:
        writer.add(life(0, "left"), "train")
        for number, side in enumerate(("left", "right", "left"), 1):
            writer.add(life(number, side), "validation")
    return path


@pytest.fixture(scope="module")
def model():
    return micro_model(**SIZES, loss_weights={"internal_text": 1.0, "external_text": 1.0, "audio": 0, "animation": 0})


@pytest.fixture(scope="module")
def processor(model):
    return CreatureProcessor.from_config(model.config, load_tokenizer())


def clips_of(folder, processor, ticks: int, cache):
    recordings, facts = load_recordings(folder)
    return make_clips(recordings, facts, processor, ticks, cache)[0]["validation"], list(recordings["validation"])


@pytest.fixture(scope="module")
def found(folder, model, processor, tmp_path_factory):
    clips, rows = clips_of(folder, processor, TICKS, tmp_path_factory.mktemp("clips"))
    return clips, witnesses.measure(rows, witnesses.nats_of_lives(model, clips), processor)


def test_the_nats_of_all_words_are_those_of_the_evaluation(found, model):
    clips, figures = found
    variants = [("drop", "external_voice"), ("drop", "touch")]
    sums = variant_sums(model, collate_pairs(list(ClipPairs(clips))), variants).numpy()
    for number, taken in enumerate(("", "external_voice", "skin")):
        metrics = stream_metrics(model.config, sums[:, number])
        for name, stream in (("thought", "internal_text"), ("said", "external_text")):
            one = figures[name]
            nats = one["without"][taken] if taken else one["nats"]
            assert nats * one["words"] / one["tokens"] == pytest.approx(metrics[f"{stream}_words_loss"], rel=1e-5)
    assert figures["thought"]["words"] == 3 * 18 and figures["thought"]["tokens"] > 3 * 18
    assert abs(figures["thought"]["without"]["skin"] - figures["thought"]["nats"]) > 1e-4
    assert figures["thought"]["without"].keys() == {"external_voice", "ears", "skin"}  # what the creature has


def test_a_fact_is_the_word_at_its_tick(found, model):
    clips, figures = found
    nats = {"speaker": [], "color": [], "shape": [], "side": [], "heat": []}
    for clip in map(EvaluationClips(clips).__getitem__, range(len(clips))):
        batch = collate_clips([clip])
        with torch.no_grad():
            logits = model(**{name: batch[name] for name in batch if "target" not in name and name != "labels"}).logits
        losses = -logits[0, :-1].log_softmax(-1).gather(1, batch["labels"][0, 1:, None])[:, 0]
        for fact, tick in (("speaker", 60), ("shape", 52), ("side", 54), ("heat", 74)):
            nats[fact].append(losses[tick - 1].item())
    for fact in ("speaker", "shape", "side", "heat"):
        assert figures[fact]["words"] == 3 and figures[fact]["nats"] == pytest.approx(np.mean(nats[fact]), rel=1e-4)
    assert "color" not in figures and figures["side"]["witness"] == ("eyes", "ears")


def test_seen_facts_are_those_that_the_words_before_do_not_tell():
    two, three = (
        "I see the red ball left the blue box right",
        "I see the red ball left the blue box middle the red can right",
    )
    after = "I see the white can middle the blue box right"
    for words, expected in (
        ("that is Anna", ""),
        (f"that is Anna {two}", "color red shape ball side left color blue shape box side right"),
        (two, "color red shape ball side left color blue shape box side right"),
        (three, "color red shape ball color blue shape box color red shape can"),
        (after, "color white shape can side middle color blue shape box"),
    ):
        thoughts = text({10: words})
        found = facts_of({"internal_text": thoughts, "duration": 10.0})
        assert " ".join(f"{fact.removeprefix('seen ')} {word}" for fact, word, _ in found) == expected
        assert {(word, time) for _, word, time in found} <= {(one["word"], one["start"]) for one in thoughts}
        assert all(WITNESS[fact] == ("eyes",) for fact, _, _ in found)


def test_the_speaker_is_one_of_those_who_are_there_and_a_cut_thought_tells_nothing():
    thoughts = {0: "that is Anna", 20: "that is Ben", 40: "Ben saw the fox at the river", 80: "that is Ben",
                100: "that is Clara", 120: "I hear that this is Ben", 140: "Clara says the aunt made"}  # fmt: skip
    facts = {"internal_text": text(thoughts), "duration": 149 * 0.08}
    assert [(fact, answer) for fact, answer, _ in facts_of(facts)] == [("speaker", "1"), ("speaker", "0")]


def test_what_is_asked_for_and_what_the_eyes_add():
    for words, expected in (
        ("touch the red cup left", "request red shape cup side left"),
        ("look at the cup middle", "request cup side middle"),
        ("find the red cup right", "request red shape cup side right"),
        ("the cup is green", "request cup color green"),
        ("I feel my left hand high", "hand high"),
        ("it feels hot and rough", "heat hot surface rough"),
    ):
        found = facts_of({"internal_text": text({10: words}), "duration": 10.0})
        assert " ".join(f"{fact} {word}" for fact, word, _ in found) == expected


def test_chance_is_the_entropy_of_the_answers(found):
    side = -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))
    assert found[1]["side"]["chance"] == pytest.approx(side) and found[1]["heat"]["chance"] == 0


def test_shorter_clips_lose_only_the_words_that_nothing_predicts(folder, model, processor, tmp_path):
    clips, rows = clips_of(folder, processor, TICKS - 54, tmp_path)  # the side is at the first tick of the second
    assert len(clips) == 6
    figures = witnesses.measure(rows, witnesses.nats_of_lives(model, clips), processor)
    assert figures["thought"]["words"] == 3 * 17 and "side" not in figures and figures["heat"]["words"] == 3


def test_a_word_away_from_its_tick_is_an_error(found, folder, model, processor):
    rows = list(load_recordings(folder)[0]["validation"])
    rows[1]["internal_text"][5]["start"] += 0.08
    with pytest.raises(AssertionError, match="life 2: internal_text is not at the ticks of its words"):
        witnesses.measure(rows, witnesses.nats_of_lives(model, found[0]), processor)


def test_a_burst_of_heard_words_may_end_behind_the_life(found, folder, model, processor, tmp_path):
    recording = life(4, "left") | {"external_voice": text({TICKS - 1: "Agnieszka"})}
    with RecordingsWriter(tmp_path / "burst") as writer:
        writer.add(recording, "train")
        writer.add(recording | {"recording_id": "life 5"}, "validation")
    clips, rows = clips_of(tmp_path / "burst", processor, TICKS + 8, tmp_path)
    assert clips[0]["ticks"] > TICKS
    figures = witnesses.measure(rows, witnesses.nats_of_lives(model, clips), processor)
    assert figures["thought"]["words"] == found[1]["thought"]["words"] / 3


def test_the_command_prints_and_writes_all_figures(folder, found, model, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path / "creature")
    flags = ["--checkpoint", tmp_path / "creature", "--output", tmp_path / "figures.json", "--cache_dir", tmp_path]
    monkeypatch.setattr(sys, "argv", ["witnesses.py", *map(str, [folder, *flags, "--device", "cpu"])])
    witnesses.main()
    written = json.loads((tmp_path / "figures.json").read_text())["words"]
    out = capsys.readouterr().out
    assert written["heat"]["without"] == pytest.approx(found[1]["heat"]["without"])
    assert "side (eyes+ears), n = 3 " in out and f"{written['heat']['nats']:.3f}" in out and "said, n = 15 " in out
