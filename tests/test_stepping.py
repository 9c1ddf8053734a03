"""The recorded tick: whichever senses come and go, it gives what the plain one gives, from few recordings."""

import pytest
import torch
from creatures import ALL_STREAMS, micro_model, random_batch, record_on_cpu, without_targets

import stepping_creature
from creature.live.creature import on_host
from sampling_creature import Sampling
from senses_creature import SENSE_TABLE
from stepping_creature import Stepper

TICKS, WINDOW = 14, 5
EXACT = dict(atol=2e-4, rtol=1e-4)
READ = ("logits", "external_text_logits", "animation", "action", "last_hidden_state")


@pytest.fixture(scope="module")
def model():
    return micro_model(sliding_window=WINDOW, tie_word_embeddings=False)


def senses_of(model, rows=1, contacts=3, masked=True):
    batch = without_targets(random_batch(model.config, rows=rows, ticks=TICKS, contacts=contacts))
    return {name: value for name, value in batch.items() if masked or not name.endswith("mask")}


def at(senses, tick, without=()):
    now = {name: value[:, tick : tick + 1] for name, value in senses.items()}
    for sense in SENSE_TABLE:
        if sense.name in without:
            for name in (*sense.arguments, sense.mask):
                now.pop(name, None)
    return now


def live(model, ticks, stepper, sampling=None):
    """What is read off each tick, by name, and drawn."""
    generator = torch.Generator().manual_seed(1)
    steps = [model.step(stepper, sampling=sampling, generator=generator, **now) for now in ticks]
    return {name: torch.stack([step[name] for step in steps]) for name in (*READ, "audio", "internal_text")}


def both(model, ticks, monkeypatch, rows=1, sampling=None):
    """The plain life, the recorded one, its stepper and the slots of its recordings."""
    plain = live(model, ticks, Stepper(model, rows), sampling)
    recordings = record_on_cpu(monkeypatch)
    stepper = Stepper(model, rows)
    return plain, live(model, ticks, stepper, sampling), stepper, recordings


def assert_same(found, wanted):
    for name, value in wanted.items():
        if value.is_floating_point():
            torch.testing.assert_close(found[name], value, **EXACT)
        else:
            assert torch.equal(found[name], value)


@pytest.mark.parametrize("rows", [1, 2])
def test_senses_come_and_go_in_one_graph(model, monkeypatch, rows):
    """Each tick lacks other senses; what is absent holds what a tick before had, NaN among it."""
    senses, names = senses_of(model, rows), [sense.name for sense in SENSE_TABLE]
    for name in ("input_features", "animation"):
        senses[name][:, 1] = torch.nan
    ticks = [at(senses, tick, {names[tick % 9], names[tick * 5 % 9], names[tick * 7 % 9]}) for tick in range(TICKS)]
    for name in ("input_features", "animation"):
        ticks[1][f"{name}_mask"] = torch.zeros(rows, 1, dtype=torch.bool)  # whatever is there, it is not present
    ticks[1]["input_features"], ticks[1]["animation"] = (senses[n][:, 1:2] for n in ("input_features", "animation"))
    plain, recorded, stepper, recordings = both(model, ticks, monkeypatch, rows, {"audio": Sampling(1.0, top_k=5)})
    assert_same(recorded, plain)
    assert len(recordings) <= 4 < TICKS and recordings[-1] == WINDOW
    assert len(plain["audio"].unique()) > 3 and plain["logits"].isfinite().all()


def test_a_sense_that_never_arrives_is_not_in_the_graph(model, monkeypatch):
    senses = {name: value for name, value in senses_of(model).items() if name in ("input_ids", "external_voice_ids")}
    _, _, stepper, recordings = both(model, [at(senses, tick) for tick in range(TICKS)], monkeypatch)
    assert stepper.buffers.tensors.keys() == senses.keys() and len(recordings) == 1


def test_any_number_of_contacts_up_to_a_multiple_of_eight(model, monkeypatch):
    senses = senses_of(model, contacts=20, masked=False)
    ticks = [at(senses, tick) for tick in range(TICKS)]
    for now, contacts in zip(ticks, [3, 8, 1, 5, 9, 2, 16, 10, 0, 17, 20, 4, 1, 7], strict=True):
        for name in ("touch_points", "touch_surfaces", "touch_values"):
            now[name] = now[name][:, :, :contacts]
    plain, recorded, stepper, recordings = both(model, ticks, monkeypatch)
    assert_same(recorded, plain)
    assert len(recordings) == 3 and stepper.buffers.tensors["touch_values"].shape == (1, 1, 24, 5)


def test_a_pose_without_the_rest_of_the_body_needs_no_graph_of_its_own(model, monkeypatch):
    """It is where a command starts, and it is not felt."""
    senses = senses_of(model, masked=False)
    senses = {name: senses[name] for name in ("input_ids", "joint_positions", "joint_rotations", "body_state")}
    ticks = [at(senses, tick) for tick in range(TICKS)]
    for now in ticks[1::2]:
        del now["joint_positions"], now["body_state"]
    for now in ticks[2::5]:
        del now["joint_rotations"]
        now.pop("joint_positions", None), now.pop("body_state", None)
    plain, recorded, _, recordings = both(model, ticks, monkeypatch)
    assert_same(recorded, plain)
    assert len(recordings) == 1


def test_an_inner_voice_of_embeddings_and_senses_encoded_before(model, monkeypatch):
    senses = senses_of(model)
    with torch.no_grad():
        embeds = model.model.embed_tokens(senses["input_ids"])
        outer = model.encode_senses(input_features=senses["input_features"])
    ticks = [{"input_ids": senses["input_ids"][:, t : t + 1]} for t in range(TICKS)]
    for tick in range(4, 8):
        ticks[tick] = {"inputs_embeds": embeds[:, tick : tick + 1]}
    for tick in range(0, TICKS, 3):
        ticks[tick]["sense_embeds"] = outer[:, tick : tick + 1]
    plain, recorded, _, recordings = both(model, ticks, monkeypatch)
    assert_same(recorded, plain)
    assert len(recordings) == 3  # there is one inner voice at a time


@pytest.mark.parametrize("known", [True, False])
def test_what_is_wrong_is_refused_before_anything_changes(model, monkeypatch, known):
    """In what the graph has, and in a sense that it would have to be recorded with."""
    senses = senses_of(model, masked=False)
    first = at(senses, 0) if known else at({"input_ids": senses["input_ids"]}, 0)
    recordings = record_on_cpu(monkeypatch)
    stepper = Stepper(model)
    model.step(stepper, **first)
    kept = [value.clone() for value in (*stepper.cache.keys, *stepper.cache.values, stepper.mask, stepper.cache.slot)]
    wrong_rows = senses["input_features"][:, 1:2].expand(2, -1, -1)
    for name, value, message in (
        ("input_ids", torch.tensor([[128]]), "`input_ids` holds the id 128; there are 128"),
        ("external_voice_ids", torch.tensor([[500]]), "`external_voice_ids` holds the id 500"),
        ("external_text_ids", torch.tensor([[500]]), "`external_text_ids` holds the id 500"),
        ("audio_codes", torch.tensor([[[0, 11, 0]]]), "`audio_codes` holds the id 11; there are 11"),
        ("touch_points", torch.tensor([[[0, 1, -1]]]), "`touch_points` holds the id -1"),
        ("touch_surfaces", torch.tensor([[[0, 6, 1]]]), "`touch_surfaces` holds the id 6"),
        ("pixel_values", senses["pixel_values"][:, 1:2] / 255, "are bytes from 0 to 255"),
        ("input_features", wrong_rows, "differ in rows and ticks"),
        ("body_state", senses["body_state"][:, 1:2, :1], "has the shape"),
        ("body_state", None, "is one part of a sense: give `body_state` with it"),
    ):
        now = at(senses, 1) | {name: value}
        with pytest.raises(ValueError, match=message):
            model.step(stepper, **{name: value for name, value in now.items() if value is not None})
    with pytest.raises(ValueError, match="no input"):
        model.step(stepper)
    with pytest.raises(ValueError, match="no input"):
        model.step(stepper, joint_rotations=senses["joint_rotations"][:, 1:2])
    with pytest.raises(TypeError, match="input_featurs"):
        stepper(model, {"input_featurs": wrong_rows}, (), {}, {})
    now = (*stepper.cache.keys, *stepper.cache.values, stepper.mask, stepper.cache.slot)
    assert stepper.get_seq_length() == 1 and all(map(torch.equal, now, kept))
    following = at({"input_ids": senses["input_ids"]}, 1)  # nothing of what was refused is left
    model.step(stepper, **following)
    assert_same(live(model, [at(senses, 2)], stepper), _after(model, [first, following], at(senses, 2)))
    assert all(slots == WINDOW for slots in recordings)


def _after(model, ticks, now):
    stepper = Stepper(model)
    stepper.recordable = False
    for tick in ticks:
        model.step(stepper, **tick)
    return live(model, [now], stepper)


def test_a_sense_that_comes_when_the_slots_are_full(monkeypatch):
    """Without a window the slots grow with the ticks; trial runs need more than are left."""
    monkeypatch.setattr(stepping_creature, "SHORTEST", 8)
    model = micro_model()
    senses = senses_of(model)
    ticks = [
        at(senses, tick) if tick >= 7 else {"input_ids": senses["input_ids"][:, tick : tick + 1]} for tick in range(10)
    ]
    plain, recorded, _, recordings = both(model, ticks, monkeypatch)
    assert_same(recorded, plain)
    assert 8 in recordings[1:] and recordings[-1] == 16


def test_ids_where_nothing_touches_may_be_anything(model, monkeypatch):
    senses = senses_of(model)
    senses["touch_points"] = senses["touch_points"].masked_fill(~senses["touch_mask"], -7)
    assert (senses["touch_points"] < 0).any()
    plain, recorded, *_ = both(model, [at(senses, tick) for tick in range(TICKS)], monkeypatch)
    assert_same(recorded, plain)


def test_other_weights_streams_and_draws_are_recorded_anew():
    model, senses = micro_model(sliding_window=WINDOW), None
    senses = senses_of(model)
    with pytest.MonkeyPatch.context() as patch:
        recordings = record_on_cpu(patch)
        stepper = Stepper(model)
        for tick, (how, count) in enumerate((
            ({}, 1), ({}, 1), ({"output_streams": ("internal_text",)}, 2), ({"output_streams": ALL_STREAMS}, 3),
            ({"sampling": {"audio": Sampling(1.0)}}, 4), ({}, 5),
        )):  # fmt: skip
            model.step(stepper, **how, **at(senses, tick))
            assert len(recordings) == count
        weight = model.model.senses.audio.up_proj.weight
        weight.data = weight.data * 2  # elsewhere in memory
        changed = model.step(stepper, **at(senses, 6)).logits
        assert len(recordings) == 6
        weight.data.mul_(0.5)  # in place: the graph reads it
        model.step(stepper, **at(senses, 7))
        assert len(recordings) == 6 and changed.isfinite().all()


def test_what_was_emitted_comes_to_the_host_as_it_is(monkeypatch):
    emitted = {
        "internal_text": torch.tensor([7]),
        "animation": torch.randn(1, 5),
        "audio": torch.tensor([[1, 2**40, 3]]),
        "action": torch.randn(1, 2, 3).bfloat16().transpose(1, 2),
    }
    assert on_host(emitted) is emitted  # on the CPU it is there already

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")

    found = on_host({name: value.as_subclass(Elsewhere) for name, value in emitted.items()})
    for name, value in emitted.items():
        assert torch.equal(found[name].as_subclass(torch.Tensor), value) and found[name].dtype == value.dtype
