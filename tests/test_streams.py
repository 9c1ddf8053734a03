"""The streams: losses by hand, counts, rotations, and which parameters each loss has gradients for."""

import math

import pytest
import torch
import torch.nn.functional as F
from creatures import (
    ALL_STREAMS,
    COPY_ARGUMENTS,
    EVERY_WEIGHT,
    SENSE_ARGUMENTS,
    SENSE_MODULES,
    TARGET_ARGUMENTS,
    assert_close,
    gradients,
    micro_config,
    micro_model,
    random_batch,
    random_quaternions,
    select,
    without_targets,
)

import modeling_creature
from configuration_creature import SENSES, STREAMS
from motor_creature import (
    COMMAND_PARTS,
    ROUNDED_BELOW,
    command_errors,
    last_command,
    matrix_from_6d,
    matrix_to_quaternion,
    pack_animation,
    quaternion_to_6d,
    rotation_of,
    rotation_vector,
    unpack_animation,
)
from sampling_creature import Sampling, sample
from streams_creature import DepthLayer, count_targets, text_loss

HEADS = {"external_text": "streams.external_text.", "audio": "streams.audio.", "animation": "streams.animation."}


def only(stream: str) -> dict:
    return {stream: 1.0}


@pytest.fixture
def batch():
    return random_batch(micro_config())


# --- losses by hand --------------------------------------------------------------------------------------------------


def test_text_loss_by_hand():
    config = micro_config(null_loss_weight=0.3)
    table = torch.zeros(config.vocab_size, 2)
    table[5], table[6] = torch.tensor([math.log(3.0), 0.0]), torch.tensor([0.0, math.log(2.0)])
    others = config.vocab_size - 2
    hidden = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [7.0, 7.0]]])
    labels = torch.tensor([[99, 5, config.null_token_id, -100]])
    # Tick 0 predicts 5, whose weight is 3 among 127 ones; tick 1 predicts NULL beside a 2; tick 2 has no target.
    by_hand = math.log((3 + 1 + others) / 3) + 0.3 * math.log(2 + 1 + others)
    assert text_loss(config, hidden, table, labels).item() == pytest.approx(by_hand, rel=1e-6)
    assert count_targets(config, {"labels": labels}).tolist() == pytest.approx([1.3, *[0] * 6])


def written_out(config, logits, labels, further):
    """The loss of the next labels, and that of all labels ahead that a tick may learn, as sums of cross entropies."""
    plain = mixed = 0.0
    for row, ids in zip(logits, labels.tolist(), strict=True):
        for tick in range(min(len(row), len(ids) - 1)):
            ahead = []  # up to an end of text, or to what is unknown
            for target in ids[tick + 1 : tick + 2 + len(further)]:
                if target == -100 or (ahead and ahead[-1] == config.eos_token_id):
                    break
                ahead.append(target)
            if ahead:
                weights = torch.tensor([1.0, *further], dtype=row.dtype)[: len(ahead)]
                losses = F.cross_entropy(row[tick].expand(len(ahead), -1), torch.tensor(ahead), reduction="none")
                counts = config.null_loss_weight if ahead[0] == config.null_token_id else 1.0
                plain += counts * losses[0]
                mixed += counts * (losses * weights).sum() / weights.sum()
    return plain, mixed


@pytest.mark.parametrize("is_module", [False, True])
@pytest.mark.parametrize("length", [12, 13])  # 13: the label after the last tick is known
def test_further_targets_give_the_gradients_of_a_sum_of_cross_entropies(is_module, length):
    config = micro_config(null_loss_weight=0.3)
    torch.manual_seed(0)
    hidden, table = torch.randn(3, 12, 8, requires_grad=True), torch.randn(config.vocab_size, 8, requires_grad=True)
    labels = torch.randint(0, 100, (3, length))
    labels[0, 4] = labels[1, -1] = labels[1, -3] = labels[2, 1] = config.eos_token_id
    labels[0, 8] = labels[0, 9] = labels[2, 5] = -100
    labels[1, 5] = labels[2, 8] = config.null_token_id
    head = torch.nn.Linear(8, config.vocab_size, bias=False)
    head.weight = torch.nn.Parameter(table.detach().clone())
    given = head if is_module else table
    found = text_loss(config, hidden, given, labels, further_targets=torch.tensor([0.5, 0.25]))
    gradients = torch.autograd.grad(found, [hidden, head.weight if is_module else table])
    plain, mixed = written_out(config, hidden.double() @ table.double().t(), labels, (0.5, 0.25))
    assert found.item() == pytest.approx(plain.item(), rel=1e-6)
    for mine, true in zip(gradients, torch.autograd.grad(mixed, [hidden, table]), strict=True):
        torch.testing.assert_close(mine, true, atol=2e-6, rtol=1e-5)
    ends = micro_config(null_loss_weight=0.3, eos_token_id=[7, config.eos_token_id])
    labels[labels == 7] = 8
    several = text_loss(ends, hidden, given, labels, further_targets=torch.tensor([0.5, 0.25]))
    assert torch.equal(torch.autograd.grad(several, hidden)[0], gradients[0])


def test_further_targets_count_in_training_only_and_by_their_weights(batch):
    batch = {name: batch[name] for name in ("input_ids", "labels")}

    def step(mode, **further):
        model = micro_model().train(mode)
        loss = model(**batch, **further).loss
        loss.backward()
        return {"loss": loss.detach()} | gradients(model)

    some, none = torch.tensor([0.5, 0.25]), torch.zeros(2)
    for mode in (True, False):
        plain = step(mode)
        for further in (none,) if mode else (none, some):
            found = step(mode, further_targets=further)
            assert all(torch.equal(found[name], plain[name]) for name in plain | found)
    learned = step(True, further_targets=some)
    assert torch.equal(learned["loss"], plain["loss"])
    table = "model.embed_tokens.weight"
    assert not torch.allclose(learned[table], plain[table], rtol=0.1)
    with pytest.raises(ValueError, match="`further_targets` has the shape"):
        step(True, further_targets=some[None])


def test_all_losses_of_the_model_by_hand():
    """With tables and last layers of zero every choice is equally likely and the last command is repeated."""
    model = micro_model()
    config = model.config
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        model.streams.audio.out_proj.weight.zero_()
        model.streams.animation.out_proj.weight.zero_()
        model.streams.animation.out_proj.bias.zero_()
    null = config.null_token_id
    turns = random_quaternions(1, 4, config.subframes_per_tick, config.num_joints)
    codes = torch.tensor([[[1, 2, 3], [4, 5, -100], [-100, -100, -100], [7, 8, 9]]])
    eyes = torch.tensor([1.0, 0.0, 0.0, 1.0]).expand(1, 4, 2, 4)
    out = model(
        input_ids=torch.tensor([[1, 2, 3, 4]]),
        labels=torch.tensor([[1, 2, null, -100]]),
        external_text_targets=torch.tensor([[null, null, null, 7]]),
        audio_targets=codes,
        rotation_targets=turns,
        blend_shape_targets=torch.ones(1, 4, config.num_blend_shapes),
        eye_targets=eyes,
        animation_target_mask=torch.tensor([[True, True, False, True]]),
    )
    losses = {name: value.item() for name, value in out.losses.items()}
    assert losses["internal_text"] == pytest.approx(math.log(128), rel=1e-6)
    assert losses["external_text"] == pytest.approx(math.log(128), rel=1e-6)
    assert losses["audio"] == pytest.approx(math.log(11), rel=1e-6)
    # The last commands are repeated.
    assert losses["animation"] == pytest.approx(1, abs=1e-5)
    assert out.loss.item() == pytest.approx(sum(EVERY_WEIGHT[name] * value for name, value in losses.items()), rel=1e-6)
    counts = count_targets(config, dict(labels=torch.tensor([[1, 2, null, -100]]), audio_targets=codes))
    assert counts.tolist() == pytest.approx([1.3, 0, 5, *[0] * 4])


def test_audio_and_external_text_losses_are_plain_cross_entropies(batch):
    model = micro_model()
    batch["labels"][0, 3] = batch["external_text_targets"][1, 2] = model.config.null_token_id
    out = model(**batch, output_streams=("external_text", "audio"))
    targets = batch["audio_targets"][:, 1:].flatten()
    audio = F.cross_entropy(out.audio_logits[:, :-1].flatten(0, 2), targets, ignore_index=-100)
    torch.testing.assert_close(out.losses["audio"], audio)
    for logits, labels, name in (
        (out.logits, "labels", "internal_text"),
        (out.external_text_logits, "external_text_targets", "external_text"),
    ):
        targets = batch[labels][:, 1:].flatten()
        each = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction="none")
        weights = (targets >= 0) * torch.where(targets == model.config.null_token_id, 0.3, 1.0)
        assert (targets == model.config.null_token_id).any()
        torch.testing.assert_close(out.losses[name], (each * weights).sum() / weights.sum())


def test_the_likeliest_animation_is_the_label():
    """Labels made of the model's own animation, one tick later, cost nothing; any other pose does."""
    model = micro_model(loss_weights=only("animation"))
    batch = without_targets(random_batch(model.config, presence=1.1))
    rotations, shapes, eyes = unpack_animation(model.config, batch["animation"])
    eyes[..., 3] = 0.5
    batch["animation"] = pack_animation(rotations, torch.full_like(shapes, 0.5), eyes)
    with torch.no_grad():
        model.streams.animation.out_proj.weight *= 0.1  # nothing has to be cut off at 0 or 1
        out = model(**batch, output_streams=("animation",))
        own = {"animation": out.animation, "action": out.action}
        own = {name: torch.cat((value[:, :1], value[:, :-1]), dim=1) for name, value in own.items()}
        labels = *unpack_animation(model.config, own["animation"]), own["action"]
        targets = dict(zip(COMMAND_PARTS, labels, strict=True))
        assert model(**batch, **targets).loss < 1e-5
        for name in targets:
            assert model(**batch, **{**targets, name: targets[name].flip(-1)}).loss > 1e-3


def test_an_untrained_creature_repeats_its_last_command_at_a_loss_of_1(batch):
    """With a head of zeros at exactly 1, each part of a command for itself, whatever is known of the last command."""
    model = micro_model(random=False, loss_weights=only("animation"))
    copies = dict.fromkeys((*COPY_ARGUMENTS["animation"], *SENSE_ARGUMENTS["proprioception"]))
    with torch.no_grad():
        assert 0 < model.streams.animation.out_proj.weight.std() < 0.003
        assert model(**batch).loss.item() == pytest.approx(1, abs=1e-2)
        model.streams.animation.out_proj.weight.zero_()
        for part in COMMAND_PARTS:
            others = {name: None for name in COMMAND_PARTS if name != part}
            assert model(**{**batch, **others}).loss.item() == pytest.approx(1, abs=1e-4), part
            assert model(**{**batch, **others, **copies}).loss.item() == pytest.approx(1, abs=1e-4), part
        assert model(**batch).loss.item() == pytest.approx(1, abs=1e-4)
        out = model(**without_targets(batch), output_streams=("animation",))
    commanded, acted = batch["animation_mask"], batch["action_mask"]
    rotations, shapes, eyes = unpack_animation(model.config, out.animation)
    for found, given in zip((rotations, shapes, eyes), unpack_animation(model.config, batch["animation"]), strict=True):
        if found is rotations:
            assert angle_between(found, given[:, :, -1:])[commanded].max() < 1e-2
        else:
            torch.testing.assert_close(found[commanded], given[commanded])
    torch.testing.assert_close(out.action[acted], batch["action"][:, :, -1:].expand_as(out.action)[acted])


def test_a_rotation_vector_is_the_axis_times_the_angle():
    quaternions = random_quaternions(200)
    vectors = rotation_vector(quaternions)
    assert vectors.norm(dim=-1).max() <= math.pi + 1e-6
    same = (rotation_of(vectors) * quaternions).sum(-1).abs()  # q and -q are the same rotation
    torch.testing.assert_close(same, torch.ones_like(same))
    half = torch.tensor([math.cos(0.5), 0.0, 0.0, math.sin(0.5)])
    torch.testing.assert_close(rotation_vector(torch.stack((half, -half))), torch.tensor([[0.0, 0.0, 1.0]] * 2))
    still = torch.tensor([1.0, 0, 0, 0])
    assert torch.equal(rotation_vector(still), torch.zeros(3)) and torch.equal(rotation_of(torch.zeros(3)), still)


def test_the_errors_of_a_command_by_hand():
    identity, half_turn = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0.0, 0, 0, 1])
    found = {
        "rotation_targets": matrix_from_6d(quaternion_to_6d(identity)).expand(1, 1, 2, 2, 3, 3),
        "blend_shape_targets": torch.tensor([[[0.5, 0.5]]]),
        "eye_targets": torch.tensor([[[[0.0, 0, 1, 0.5], [0.0, 0, 1, 0.5]]]]),
        "action_targets": torch.zeros(1, 1, 2, 1),
    }
    batch = {
        "rotation_targets": torch.stack((identity, half_turn)).expand(1, 2, 2, 2, 4),
        "blend_shape_targets": torch.tensor([1.0, 0.5]).expand(1, 2, 2),
        "eye_targets": torch.tensor([[2.0, 0, 0, 1], [0.0, 0, -1, 0.5]]).expand(1, 2, 2, 4),
        "action_targets": torch.tensor([[0.4], [3.0]]).expand(1, 2, 2, 1),
    }
    errors = command_errors(found, batch)
    # Of two joints one is half a turn off, |diag(-2, -2, 0)| = sqrt(8). The first eye looks aside and is too narrow,
    # the second one backwards. 0.4 is within the square part of Huber's loss, 3 is beyond it.
    joint, half, aside, back = (math.sqrt(square + 0.02**2) - 0.02 for square in (8, 0.5**2, 2, 2**2))
    by_hand = [joint / 2, half / 2, (aside + half + back) / 2, (0.08 + 2.5) / 2]
    assert [error.item() for error in errors] == pytest.approx(by_hand)
    assert command_errors(found, batch | {"animation_target_mask": torch.zeros(1, 2)})[0].tolist() == [[0]]
    assert command_errors(found, {"eye_targets": batch["eye_targets"]})[:2] == [None, None]


def test_the_best_command_is_the_likeliest_and_not_the_mean():
    """Lids shut and a joint turns in four of ten ticks: to stay costs least, not to go four tenths of the way."""
    still, turned = torch.tensor([1.0, 0, 0, 0]), torch.tensor([math.cos(0.25), math.sin(0.25), 0, 0])
    rare = torch.arange(11) % 3 == 1
    batch = {
        "rotation_targets": torch.where(rare[:, None], turned, still)[None, :, None, None],
        "eye_targets": torch.tensor([[0.0, 0, 1, 1]]).repeat(11, 2, 1)[None].clone(),
    }
    batch["eye_targets"][..., 3] = (~rare).float()[None, :, None]
    costs = []
    for share in torch.linspace(0, 1, 11):  # of the way to what is rare
        half = 0.25 * share
        pose = torch.tensor([half.cos(), half.sin(), 0, 0]).expand(1, 10, 1, 1, 4)
        eyes = torch.tensor([0.0, 0, 1, 1 - share]).expand(1, 10, 2, 4)
        found = {"rotation_targets": matrix_from_6d(quaternion_to_6d(pose)), "eye_targets": eyes}
        costs.append([error.sum() for error in command_errors(found, batch) if error is not None])
    assert [column.argmin() for column in torch.tensor(costs).T] == [0, 0]


@pytest.mark.parametrize("size", [0.05, 0.01])
def test_the_loss_of_an_action_is_in_units_of_repeating_it(size):
    model = micro_model(random=False, loss_weights=only("animation"), num_joints=0, num_blend_shapes=0)
    torch.nn.init.zeros_(model.streams.animation.out_proj.weight)
    steps = size * torch.arange(5).view(1, 5, 1, 1).expand(1, 5, 2, 2)
    steps, mask = torch.cat((steps, -3 * steps)), torch.tensor([[True] * 5, [True, True, False, True, True]])
    given = {"input_ids": torch.ones(2, 5, dtype=torch.long), "action_targets": steps, "animation_target_mask": mask}
    # Each tick moves by `size` in the first row; in the second one by three times that, backwards.
    for moved in (0.0, 0.5, 1.0, 2.0):
        torch.nn.init.constant_(model.streams.animation.out_proj.bias, moved * size)
        squares = 4 * (1 - moved) ** 2 + 2 * (3 + moved) ** 2 + (9 + moved) ** 2
        assert model(**given).loss.item() == pytest.approx(squares / (4 + 2 * 9 + 81), rel=2e-3)


def test_a_body_that_stays_still_divides_by_no_zero(batch):
    batch["rotation_targets"][:] = batch["rotation_targets"][:, :1, :1]
    batch["action_targets"][:] = 3.0
    copies = dict.fromkeys((*COPY_ARGUMENTS["animation"], *SENSE_ARGUMENTS["proprioception"]))
    given = {**batch, **copies, "blend_shape_targets": None, "eye_targets": None, "animation_target_mask": None}
    for random in (False, True):
        model = micro_model(random=random, loss_weights=only("animation")).train()
        loss = model(**given).loss
        loss.backward()
        assert loss.isfinite() and loss > 0
        assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_the_last_command_is_the_copy_else_the_target_else_what_is_felt_else_rest():
    config = micro_config()
    batch = random_batch(config, rows=1, ticks=4, presence=1.1)
    batch["animation_mask"] = batch["action_mask"] = torch.tensor([[True, False, False, False]])
    batch["animation_target_mask"] = torch.tensor([[True, True, False, False]])
    batch["body_mask"] = torch.tensor([[True, True, True, False]])
    last = last_command(config, batch, torch.zeros(1, 4, 32))
    copied = (*unpack_animation(config, batch["animation"]), batch["action"])
    rest = (torch.tensor([1.0, 0, 0, 0]), torch.tensor(0.0), torch.tensor([0.0, 0, 1, 0]), torch.tensor(0.0))
    for part, copy, still in zip(COMMAND_PARTS, copied, rest, strict=True):
        target, found = batch[part], last[part]
        if part in ("rotation_targets", "action_targets"):  # the last sub-frame of the tick is the present
            copy, target = copy[:, :, -1], target[:, :, -1]
        assert torch.equal(found[:, 0], copy[:, 0]) and torch.equal(found[:, 1], target[:, 1])
        felt = batch["joint_rotations"][:, 2, -1] if part == "rotation_targets" else still.expand_as(found[:, 2])
        assert torch.equal(found[:, 2], felt) and torch.equal(found[:, 3], still.expand_as(found[:, 3]))
    # Without masks, all is present; without anything, all rests.
    copies = {"animation": batch["animation"], "action": batch["action"]}
    assert torch.equal(last_command(config, copies, torch.zeros(1, 4, 32))["action_targets"], batch["action"][:, :, -1])
    nothing = last_command(config, {}, torch.zeros(1, 4, 32))
    assert all(torch.equal(nothing[part][:, 0], last[part][:, 3]) for part in COMMAND_PARTS)


def test_a_command_of_a_tick_changes_nothing_before_it():
    model = micro_model(seed=1)  # with seed 0, a row commands blend shapes beyond 0 or 1, whatever the last ones were
    batch = random_batch(model.config, presence=1.1) | dict.fromkeys(COPY_ARGUMENTS["animation"])
    with torch.no_grad():
        before = model(**batch, output_streams=ALL_STREAMS)
        for part in COMMAND_PARTS:
            changed = batch[part].clone()
            changed[:, 4] = changed[:, 4].flip(-1)
            after = model(**{**batch, part: changed}, output_streams=ALL_STREAMS)
            output = "action" if part == "action_targets" else "animation"
            moved = (after[output] != before[output]).flatten(2).any(-1)
            assert moved[:, 4].all() and not moved[:, :4].any() and not moved[:, 5:].any(), part
            assert torch.equal(after.logits, before.logits)


def test_packed_clips_add_up(batch):
    """The first tick of a packed clip is nobody's target, and its command is known from its efference copy."""
    model = micro_model().train()
    ticks, first = 8, 5
    for name in ("labels", "external_text_targets", "audio_targets"):
        batch[name][:, [0, first]] = -100
    batch["animation_target_mask"][:, [0, first]] = False
    batch["animation_mask"][:] = batch["action_mask"][:] = True
    positions = torch.tensor([[*range(first), *range(ticks - first)]]).expand(3, -1)
    counts = count_targets(model.config, batch)
    packed = model(**batch, position_ids=positions, num_items_in_batch=counts)
    clips = [{name: value[:, part] for name, value in batch.items()} for part in (slice(0, first), slice(first, ticks))]
    torch.testing.assert_close(sum(count_targets(model.config, clip) for clip in clips), counts)
    alone = [model(**clip, num_items_in_batch=counts).losses for clip in clips]
    for stream in STREAMS:
        torch.testing.assert_close(packed.losses[stream], alone[0][stream] + alone[1][stream], atol=1e-5, rtol=1e-5)


# --- bodies of other kinds -------------------------------------------------------------------------------------------


def test_a_robot_without_joints_face_and_voice():
    none = ("num_joints", "num_blend_shapes", "num_audio_codebooks", "num_mel_bins", "num_touch_points")
    model = micro_model(**dict.fromkeys(none, 0), action_size=3, loss_weights={"internal_text": 1.0, "animation": 1.0})
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if "audio" in name or "own_voice" in name or "own_command" in name]
    assert model.streams.names == ("internal_text", "external_text", "animation")
    ids = torch.randint(0, 100, (2, 6), generator=torch.Generator().manual_seed(0))
    action, state = torch.randn(2, 6, 2, 3), torch.randn(2, 6, 2, 2)
    out = model(ids, body_state=state, action=action, action_targets=action, labels=ids, output_streams=("animation",))
    assert set(out.losses) == {"internal_text", "animation"} and out.loss.isfinite()
    assert out.animation is None and out.action.shape == (2, 6, 2, 3)
    model.train_only(streams=("internal_text", "animation"))
    assert model.model.senses.own_action.proj.weight.requires_grad
    # Its state carries the clock, without a thought.
    assert model(body_state=state, action_targets=action).losses["animation"] > 0
    emitted = model.step(body_state=state[:, :1])
    assert emitted.action.shape == (2, 2, 3) and emitted.animation is None and emitted.audio is None
    generated = model.generate(ids, output_streams=("animation",), max_new_tokens=3, eos_token_id=None)
    assert generated.action.shape == (2, 3, 2, 3) and generated.animation is None
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="known are internal_text, external_text, animation"):
            call(ids, output_streams=("audio",))


def test_a_creature_without_any_command_has_no_animation_stream():
    model = micro_model(num_joints=0, num_blend_shapes=0, action_size=0)
    assert not [name for name, _ in model.named_parameters() if "animation" in name or "own_action" in name]
    assert model.step(input_ids=torch.ones(1, 1, dtype=torch.long)).animation is None


@pytest.mark.parametrize(
    ("name", "organ"),
    [
        ("action_targets", "action_size"),
        ("action", "action_size"),
        ("rotation_targets", "num_joints"),
        ("eye_targets", "num_blend_shapes"),
        ("audio_targets", "num_audio_codebooks"),
        ("audio_codes", "num_audio_codebooks"),
    ],
)
def test_targets_and_copies_for_a_missing_organ_are_refused(batch, name, organ):
    with pytest.raises(ValueError, match=f"`{name}` is given, but this creature's {organ} is 0: leave it out."):
        micro_model(**{organ: 0})(input_ids=batch["input_ids"], **{name: batch[name]})


@pytest.mark.parametrize("stream", STREAMS)
def test_a_batch_without_targets_gives_zero_not_nan(stream, batch):
    model = micro_model(loss_weights=only(stream)).train()
    for name in TARGET_ARGUMENTS[stream]:
        value = batch[name]
        if value.dtype == torch.bool:
            batch[name] = torch.zeros_like(value)
        else:
            batch[name] = torch.full_like(value, float("nan") if value.is_floating_point() else -100)
    for count in (None, count_targets(model.config, batch), torch.tensor(0.0)):
        out = model(**batch, num_items_in_batch=count)
        assert out.loss.item() == 0.0 and out.losses[stream].item() == 0.0
        out.loss.backward()
        assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_one_tick_has_no_target():
    model = micro_model()
    out = model(**random_batch(model.config, ticks=1))
    assert out.loss.item() == 0.0


def test_without_targets_there_is_no_loss(batch):
    out = micro_model()(**without_targets(batch))
    assert out.loss is None and out.losses is None


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("silent", STREAMS)
def test_weight_zero_computes_nothing(silent, batch, monkeypatch):
    weights = {**EVERY_WEIGHT, silent: 0.0}
    model = micro_model(loss_weights=weights).train()

    def refuse(*arguments, **named):
        raise AssertionError("computed")

    if silent == "internal_text":
        monkeypatch.setattr(modeling_creature, "text_loss", refuse)
        monkeypatch.setattr(model.lm_head, "forward", refuse)
    else:
        head = getattr(model.streams, silent)
        for part in (head, *head.modules()):
            monkeypatch.setattr(part, "forward", refuse)
        monkeypatch.setattr(head, "loss", refuse)
    out = model(**batch)
    assert set(out.losses) == {stream for stream in STREAMS if stream != silent}
    # The same calls are seen where the weight is not zero: otherwise this test would say nothing.
    model.config.loss_weights = EVERY_WEIGHT
    with pytest.raises(AssertionError, match="computed"):
        model(**batch)


def test_a_stream_without_targets_is_not_computed(batch, monkeypatch):
    model = micro_model().train()
    monkeypatch.setattr(model.streams.audio, "forward", None)
    del batch["audio_targets"]
    assert set(model(**batch).losses) == {"internal_text", "external_text", "animation"}


def test_loss_is_the_weighted_sum_of_detached_losses(batch):
    model = micro_model()
    out = model(**batch)
    torch.testing.assert_close(out.loss, sum(EVERY_WEIGHT[name] * loss for name, loss in out.losses.items()))
    assert not any(loss.requires_grad for loss in out.losses.values())


@pytest.mark.parametrize("stream", STREAMS)
def test_each_loss_reaches_its_own_head_and_the_senses_present(stream, batch):
    model = micro_model(loss_weights=only(stream), tie_word_embeddings=False).train()
    labels = select(batch, TARGET_ARGUMENTS, STREAMS)  # the labels of all streams: three have no weight
    for present in (SENSES, ("internal_voice",), ("internal_voice", "touch", "vision"), ("audio",)):
        copies = COPY_ARGUMENTS if present == SENSES else ()
        senses = select(batch, SENSE_ARGUMENTS, present) | select(batch, COPY_ARGUMENTS, copies)
        model(**senses, **labels).loss.backward()
        reached = {name for name, gradient in gradients(model).items() if gradient.any()}

        for head, prefix in HEADS.items():
            own = {name for name, _ in model.named_parameters() if name.startswith(prefix)}
            if head == stream:
                assert own <= reached
            else:
                assert not own & reached
        assert ("lm_head.weight" in reached) == (stream == "internal_text")
        for module in SENSE_MODULES:
            prefix = f"model.senses.{module}."
            is_present = module in present or (present == SENSES and module.startswith("own_"))
            own = {name for name in reached if name.startswith(prefix)}
            assert (f"{prefix}proj.weight" in own) == is_present, module
            if module == "own_voice":  # its table is also the audio stream's
                assert (f"{prefix}codes.weight" in own) == (is_present or stream == "audio")
            elif not is_present:
                assert not own, module
        text = {"internal_voice", "external_voice"} & {*present}
        assert ("model.embed_tokens.weight" in reached) == bool(text or stream == "external_text")
        assert "model.layers.0.self_attn.q_proj.weight" in reached


def test_the_code_table_is_shared_by_voice_and_ears(batch):
    model = micro_model(loss_weights=only("audio"))
    table = model.model.senses.own_voice.code_table
    shape = (model.config.num_audio_codebooks, model.config.audio_codebook_size, model.config.audio_code_size)
    name, rows = "model.senses.own_voice.codes.weight", (shape[0] * shape[1], shape[2])
    assert table.shape == shape and [n for n, p in model.named_parameters() if p.shape == rows] == [name]
    # The last codebook is never read before another code: what it learns, it learns as the head's own table.
    model(input_ids=batch["input_ids"], audio_targets=batch["audio_targets"]).loss.backward()
    assert all(book.any() for book in gradients(model)[name].view(shape))
    given = {"input_ids": batch["input_ids"], "audio_codes": batch["audio_codes"]}
    with torch.no_grad():
        before = model(**given, output_streams=("audio",))
        table += torch.randn_like(table)
        after = model(**given, output_streams=("audio",))
    assert not torch.allclose(before.audio_logits, after.audio_logits)
    assert not torch.allclose(before.last_hidden_state, after.last_hidden_state)


# --- counts and micro-batches ----------------------------------------------------------------------------------------


def test_count_targets_counts_shifted_weighted_targets():
    config = micro_config()
    null = config.null_token_id
    batch = {
        "labels": torch.tensor([[1, 2, 3, null], [5, -100, null, -100]]),
        "external_text_targets": torch.tensor([[4, null, null, null], [-100, 1, 1, 1]]),
        "audio_targets": torch.tensor([[[1, 1, 1], [1, -100, 1]], [[-100] * 3, [2, 2, 2]]]),
        "eye_targets": torch.zeros(2, 3, 2, 4),
        "animation_target_mask": torch.tensor([[True, True, False], [True, False, False]]),
    }
    counts = count_targets(config, batch)
    assert counts.dtype == torch.float32 and counts.shape == (7,)
    # One command is a target: eyes that look nowhere, after eyes that did so too.
    nowhere = math.sqrt(2 + ROUNDED_BELOW**2) - ROUNDED_BELOW
    assert counts.tolist() == pytest.approx([2 + 0.3 + 0.3, 3 * 0.3 + 3, 2 + 3, 0, 0, nowhere + 1e-6, 0])
    assert count_targets(config, {}).tolist() == [0] * 7
    del batch["animation_target_mask"]
    assert count_targets(config, batch)[5] == pytest.approx(4 * nowhere)


def test_gradient_accumulation_is_exact(batch):
    batch = random_batch(micro_config(), rows=4)
    batch["touch_mask"][1:] = False  # the micro-batches are as different as they come
    batch["labels"][2, 2:] = -100
    batch["audio_targets"][3] = -100
    batch["action_targets"][1] *= 30  # and of other sizes of what they repeat
    batch["animation_target_mask"][2] = False
    model = micro_model().train()
    whole = model(**batch)
    whole.loss.backward()
    expected = gradients(model)

    parts = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(4)]
    counts = sum(count_targets(model.config, part) for part in parts)
    torch.testing.assert_close(counts, count_targets(model.config, batch))
    losses = []
    for part in parts:
        out = model(**part, num_items_in_batch=counts)
        out.loss.backward()
        losses.append(out.loss.detach())
    torch.testing.assert_close(sum(losses), whole.loss.detach(), atol=1e-6, rtol=1e-6)
    assert_close(gradients(model), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", [int, float, torch.tensor])
def test_a_single_count_divides_the_internal_text_only(kind, batch):
    model = micro_model()
    own = model(**batch).losses
    count = count_targets(model.config, batch)[0].item()
    given = model(**batch, num_items_in_batch=kind(20)).losses
    torch.testing.assert_close(given["internal_text"], own["internal_text"] * count / 20)
    for stream in STREAMS[1:]:
        assert torch.equal(given[stream], own[stream])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_a_rows_loss(side):
    model = micro_model()
    batch = random_batch(model.config, rows=1)
    # The first tick of a row has nothing to be predicted from, and left padding must not become that.
    batch["labels"][:, 0] = batch["external_text_targets"][:, 0] = batch["audio_targets"][:, 0] = -100
    batch["animation_target_mask"][:, 0] = False
    alone = model(**batch)
    before, after = (5, 0) if side == "left" else (0, 5)

    def pad(value, name):
        filler = {torch.bool: False, torch.float32: float("nan")}.get(value.dtype, -100)
        if name in ("input_ids", "touch_points", "touch_surfaces", "pixel_values"):
            filler = 0
        return F.pad(value, (0, 0) * (value.dim() - 2) + (before, after), value=filler)

    padded = {name: pad(value, name) for name, value in batch.items()}
    padded["attention_mask"] = pad(torch.ones(1, 8, dtype=torch.long), "input_ids")
    out = model(**padded)
    for stream in STREAMS:
        torch.testing.assert_close(out.losses[stream], alone.losses[stream], atol=1e-5, rtol=1e-5)
    # Beside a longer row, too, each row has the sum that it has alone.
    longer = random_batch(model.config, rows=1, ticks=13, seed=1)
    longer["attention_mask"] = torch.ones(1, 13, dtype=torch.long)
    both = {name: torch.cat((padded[name], longer[name])) for name in longer}
    ones = torch.ones(4)
    together = model(**both, num_items_in_batch=ones)
    rows = [model(**row, num_items_in_batch=ones) for row in (batch, longer)]
    torch.testing.assert_close(together.loss, rows[0].loss + rows[1].loss, atol=1e-4, rtol=1e-5)


# --- the tied table ---------------------------------------------------------------------------------------------------


def test_the_tied_table_has_the_gradient_of_all_its_uses(batch):
    """Against autograd through plain logits, and against finite differences along the gradient."""
    model = micro_model(loss_weights={"internal_text": 1.0, "external_text": 0.7})
    table = model.model.embed_tokens.weight
    assert model.lm_head.weight is table
    loss = model(**batch).loss
    loss.backward()
    found = gradients(model)

    out = model(**without_targets(batch), output_streams=("external_text",))
    plain = 0.0
    for logits, name, weight in ((out.logits, "labels", 1.0), (out.external_text_logits, "external_text_targets", 0.7)):
        targets = batch[name][:, 1:].flatten()
        weights = (targets >= 0) * torch.where(targets == model.config.null_token_id, 0.3, 1.0)
        each = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction="none")
        plain = plain + weight * (each * weights).sum() / weights.sum()
    torch.testing.assert_close(loss, plain)
    plain.backward()
    assert_close(found, gradients(model), atol=1e-6, rtol=1e-4)

    slope = found["model.embed_tokens.weight"].norm()
    direction = found["model.embed_tokens.weight"] / slope
    with torch.no_grad():
        table += 5e-3 * direction
        above = model(**batch).loss
        table -= 1e-2 * direction
        below = model(**batch).loss
    assert (above - below).item() / 1e-2 == pytest.approx(slope.item(), rel=1e-2)


# --- audio, codes ----------------------------------------------------------------------------------------------------


def test_a_code_sees_the_codes_before_it_and_no_other():
    model = micro_model()
    audio, table = model.streams.audio, model.model.senses.own_voice.code_table
    torch.manual_seed(0)
    hidden, codes = torch.randn(4, 32), torch.randint(0, 11, (4, 3))
    with torch.no_grad():
        before = audio(hidden, codes, table)
        assert before.shape == (4, 3, 11)
        for changed in range(3):
            other = codes.clone()
            other[:, changed] = (other[:, changed] + 1) % 11
            after = audio(hidden, other, table)
            torch.testing.assert_close(after[:, : changed + 1], before[:, : changed + 1])
            for later in range(changed + 1, 3):
                assert not torch.allclose(after[:, later], before[:, later])


def test_emitted_codes_are_the_likeliest_given_the_ones_before():
    model = micro_model()
    audio, table = model.streams.audio, model.model.senses.own_voice.code_table
    torch.manual_seed(0)
    hidden = torch.randn(5, 32)
    codes, logits = audio.emit(hidden, table)
    with torch.no_grad():
        forced = audio(hidden, codes, table)
    torch.testing.assert_close(logits, forced, atol=1e-5, rtol=1e-5)
    assert torch.equal(codes, forced.argmax(-1))
    sampled, _ = audio.emit(hidden.repeat(40, 1), table, Sampling(temperature=3.0), audio.draw_noise(200, table, None))
    assert len(sampled[::5].unique(dim=0)) > 5 and sampled.min() >= 0 and sampled.max() < 11


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_an_emission_computes_each_code_once_and_draws_what_recomputation_draws(temperature, monkeypatch):
    model = micro_model(depth_num_layers=2, num_audio_codebooks=5)
    audio, table = model.streams.audio, model.model.senses.own_voice.code_table
    torch.manual_seed(0)
    hidden = torch.randn(200, 32)
    noise = audio.draw_noise(200, table, None)
    with torch.no_grad():
        codes = torch.zeros(200, 0, dtype=torch.long)
        while codes.shape[1] < 5:
            code = sample(audio(hidden, codes, table)[:, -1], Sampling(temperature), noise=noise[codes.shape[1]])
            codes = torch.cat((codes, code[:, None]), dim=1)
    places, step = [], DepthLayer.step

    def counted(self, x, cache, place):
        places.append(place)
        return step(self, x, cache, place)

    monkeypatch.setattr(DepthLayer, "step", counted)
    assert torch.equal(audio.emit(hidden, table, Sampling(temperature), noise)[0], codes)
    assert places == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] and len(codes.unique(dim=0)) > 20


def test_audio_targets_of_a_tick_change_the_logits_of_that_tick_only():
    model = micro_model()
    batch = random_batch(model.config, presence=1.1)
    with torch.no_grad():
        before = model(**batch, output_streams=ALL_STREAMS)
        batch["audio_targets"] = batch["audio_targets"].clone()
        batch["audio_targets"][:, 4, 1] = (batch["audio_targets"][:, 4, 1] + 1) % 11
        after = model(**batch, output_streams=ALL_STREAMS)
    moved = (before.audio_logits != after.audio_logits).any(-1)
    assert moved[:, 3, 2].all()  # the code after the changed one, predicted at the tick before
    moved[:, 3, 2] = False
    assert not moved.any()
    assert torch.equal(before.logits, after.logits) and torch.equal(before.animation, after.animation)


# --- rotations -------------------------------------------------------------------------------------------------------


def angle_between(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The rotation in radians from quaternion a to b."""
    return 2 * (a * b).sum(-1).abs().clamp(max=1).acos()


def test_quaternion_round_trip():
    torch.manual_seed(0)
    quaternions = random_quaternions(1000).double()
    back = matrix_to_quaternion(matrix_from_6d(quaternion_to_6d(quaternions)))
    torch.testing.assert_close(back * back[:, :1].sign(), quaternions * quaternions[:, :1].sign())
    assert (back[:, 0] >= 0).all()
    torch.testing.assert_close(quaternion_to_6d(-quaternions), quaternion_to_6d(quaternions))
    torch.testing.assert_close(quaternion_to_6d(quaternions * 3), quaternion_to_6d(quaternions))


def test_known_rotations():
    root = math.sqrt(0.5)
    quarter_about_z = torch.tensor([root, 0.0, 0.0, root])
    matrix = matrix_from_6d(quaternion_to_6d(quarter_about_z))
    torch.testing.assert_close(matrix, torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix_to_quaternion(matrix), quarter_about_z)
    assert quaternion_to_6d(torch.tensor([1.0, 0, 0, 0])).tolist() == [1, 0, 0, 0, 1, 0]
    # Half turns have w = 0, where the usual formula divides by it.
    for axis in ([0.0, 1, 0, 0], [0.0, 0, 1, 0], [0.0, 0, 0, 1], [0.0, root, root, 0.0], [0.0, 0.6, 0.0, -0.8]):
        half_turn = torch.tensor(axis)
        found = matrix_to_quaternion(matrix_from_6d(quaternion_to_6d(half_turn)))
        assert angle_between(found, half_turn) < 1e-3


def test_matrix_to_quaternion_near_half_turns():
    torch.manual_seed(0)
    axis = F.normalize(torch.randn(2000, 3), dim=-1)
    angle = math.pi - torch.logspace(-7, -1, 2000)
    quaternions = torch.cat(((angle / 2).cos()[:, None], (angle / 2).sin()[:, None] * axis), dim=-1)
    matrix = matrix_from_6d(quaternion_to_6d(quaternions))
    back = matrix_to_quaternion(matrix)
    assert torch.linalg.norm(matrix_from_6d(quaternion_to_6d(back)) - matrix, dim=(-2, -1)).max() < 1e-5
    assert (back.norm(dim=-1) - 1).abs().max() < 1e-5
    matrix.requires_grad_()
    matrix_to_quaternion(matrix).sum().backward()
    assert matrix.grad.isfinite().all()


def test_gram_schmidt_makes_rotations_of_anything():
    torch.manual_seed(0)
    matrix = matrix_from_6d(torch.randn(100, 6))
    torch.testing.assert_close(matrix.transpose(1, 2) @ matrix, torch.eye(3).expand(100, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(matrix), torch.ones(100))
    degenerate = [[0.0] * 6, [1.0, 0, 0, 0, 0, 0], [0.0, 0, 0, 1, 0, 0], [1.0, 2, 3, 1, 2, 3]]
    degenerate = torch.tensor([*degenerate, [1e-20] * 6, [1e15] * 6, [1.0, 0, 0, -2, 0, 0]]).requires_grad_()
    matrix = matrix_from_6d(degenerate)
    quaternions = matrix_to_quaternion(matrix)
    (matrix.square().sum() + quaternions.sum()).backward()
    assert matrix.isfinite().all() and quaternions.isfinite().all() and degenerate.grad.isfinite().all()


def test_animation_packs_and_unpacks():
    config = micro_config()
    torch.manual_seed(0)
    parts = (random_quaternions(2, 5, 2, 3), torch.rand(2, 5, 5), torch.rand(2, 5, 2, 4))
    packed = pack_animation(*parts)
    assert packed.shape == (2, 5, config.animation_size)
    for mine, part in zip(unpack_animation(config, packed), parts, strict=True):
        assert torch.equal(mine, part)


def test_animation_output_is_in_range(batch):
    model = micro_model()
    animation = model(**batch, output_streams=("animation",)).animation
    rotations, shapes, eyes = unpack_animation(model.config, animation)
    torch.testing.assert_close(rotations.norm(dim=-1), torch.ones_like(rotations[..., 0]))
    torch.testing.assert_close(eyes[..., :3].norm(dim=-1), torch.ones_like(eyes[..., 0]))
    assert 0 <= shapes.min() and shapes.max() <= 1 and 0 <= eyes[..., 3].min() and eyes[..., 3].max() <= 1
