"""The senses: absent ones cost and change nothing, present ones count at their tick and never before it."""

import inspect
import itertools

import pytest
import torch
from creatures import (
    ALL_STREAMS,
    COPY_ARGUMENTS,
    SENSE_ARGUMENTS,
    SENSE_INPUTS,
    SENSE_MODULES,
    TARGET_ARGUMENTS,
    absent_is,
    assert_close,
    gradients,
    micro_config,
    micro_model,
    random_batch,
    select,
    without_targets,
)

from configuration_creature import SENSES, STREAMS
from modeling_creature import MultiModalCreature
from senses_creature import (
    SENSE_SCALE,
    SENSE_TABLE,
    SenseProjection,
    TouchSense,
    encode_present,
    scatter_present,
)

MASKS = [sense.mask for sense in SENSE_TABLE if sense.mask]
OUTPUTS = ("logits", "external_text_logits", "audio_logits", "animation", "action", "last_hidden_state")
ROWS, TICKS = 3, 8


@pytest.fixture(scope="module")
def model():
    return micro_model()


@pytest.fixture
def batch():
    return random_batch(micro_config(), ROWS, TICKS)


@torch.no_grad()
def outputs(model, batch):
    out = model(**batch, output_streams=ALL_STREAMS)
    return {name: out[name] for name in OUTPUTS}


def silent_row(batch, row):
    """The batch with nothing but the internal voice in one row."""
    batch = without_targets(batch)
    for sense in SENSE_TABLE:
        for name in [sense.mask] if sense.mask else sense.arguments:
            batch[name] = batch[name].clone()
            batch[name][row] = False if sense.mask else -100
    return batch


# --- absent senses ---------------------------------------------------------------------------------------------------


def test_text_only_row_is_bit_equal_beside_rows_with_senses(model, batch):
    text_only = outputs(model, {"input_ids": batch["input_ids"]})
    for row in range(ROWS):
        mixed = outputs(model, silent_row(batch, row))
        for name in OUTPUTS:
            assert torch.equal(mixed[name][row], text_only[name][row]), name
            others = [other for other in range(ROWS) if other != row]
            assert not torch.equal(mixed[name][others], text_only[name][others]), name


def test_text_only_is_the_backbone_alone(model, batch):
    ids = batch["input_ids"]
    with torch.no_grad():
        by_embeds = model(inputs_embeds=model.model.embed_tokens(ids)).logits
        backbone = model.lm_head(model.model(input_ids=ids).last_hidden_state)
        logits = model(input_ids=ids).logits
    assert torch.equal(logits, by_embeds) and torch.equal(logits, backbone)


def test_absent_senses_are_not_computed(batch):
    model = micro_model()
    modules = [getattr(model.model.senses, name) for name in SENSE_MODULES] + list(model.streams.children())
    assert len(modules) == 5 + 4 + 3

    def refuse(module, arguments):
        raise AssertionError(f"{type(module).__name__} was computed")

    for module in modules:
        module.register_forward_pre_hook(refuse)
    model(input_ids=batch["input_ids"])
    model.generate(batch["input_ids"], max_new_tokens=2)
    for sense in SENSES[1:]:
        with pytest.raises(AssertionError, match="was computed"):
            model(input_ids=batch["input_ids"], **select(batch, SENSE_ARGUMENTS, [sense]))


def test_no_sense_costs_a_position(model, batch):
    for given in ({"input_ids": batch["input_ids"]}, without_targets(batch)):
        out = model(**given, use_cache=True)
        assert out.last_hidden_state.shape == (ROWS, TICKS, model.config.hidden_size)
        assert out.past_key_values.get_seq_length() == TICKS


def test_connecting_an_untrained_sense_changes_no_logit(batch):
    model = micro_model(random=False)
    projections = [module for module in model.modules() if isinstance(module, SenseProjection)]
    assert len(projections) == len(SENSE_MODULES)
    assert all(not module.weight.any() and module.bias is None for module in projections)
    with torch.no_grad():
        text_only = model(input_ids=batch["input_ids"]).logits
        assert torch.equal(model(**without_targets(batch)).logits, text_only)


def test_present_but_silent_is_not_absent(model, batch):
    ids = batch["input_ids"]
    with torch.no_grad():
        absent = model(input_ids=ids).logits
        null = model(input_ids=ids, external_voice_ids=torch.full_like(ids, model.config.null_token_id)).logits
        missing = model(input_ids=ids, external_voice_ids=torch.full_like(ids, -100)).logits
        silence = model(input_ids=ids, input_features=torch.full((ROWS, TICKS, 8), -10.0)).logits  # of a log-mel
    assert torch.equal(missing, absent)
    assert not torch.allclose(null, absent)
    assert not torch.allclose(silence, absent)


def test_token_zero_is_a_token_like_any_other(model):
    # GPT-2's id 0 is "!": a padding_idx of 0 would silence it and stop its training.
    model.zero_grad()
    heard = torch.zeros(1, 3, dtype=torch.long)
    model(input_ids=heard, external_voice_ids=heard, labels=heard).loss.backward()
    assert model.model.embed_tokens.padding_idx is None
    assert gradients(model)["model.embed_tokens.weight"][0].abs().sum() > 0


# --- 64 subsets, NaN at absent places --------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [False, True])
def test_no_nan_for_any_subset_of_the_senses(batch, copies):
    """Forward and backward of all streams for all 64 subsets; NaN stands wherever a mask says that nothing is there."""
    model = micro_model()
    model.train()
    poisoned = absent_is(batch, float("nan"))
    labels = select(poisoned, TARGET_ARGUMENTS, STREAMS)
    for chosen in itertools.product((False, True), repeat=len(SENSES)):
        senses = select(poisoned, SENSE_ARGUMENTS, itertools.compress(SENSES, chosen))
        if copies:
            senses |= select(poisoned, COPY_ARGUMENTS, COPY_ARGUMENTS)
        if not senses:
            with pytest.raises(ValueError, match="no input"):
                model(**labels)
            continue
        out = model(**senses, **labels, output_streams=ALL_STREAMS, return_logits=True)
        for name in (*OUTPUTS, "loss"):
            assert out[name].isfinite().all(), (chosen, name)
        out.loss.backward()
        for name, gradient in gradients(model).items():
            assert gradient.isfinite().all(), (chosen, name)


def test_values_at_absent_places_are_never_read(batch):
    model = micro_model()
    results = []
    for value in (0.0, float("nan")):
        part = absent_is(batch, value)
        # Ids out of every range, where the mask says there is no contact.
        for name in ("touch_points", "touch_surfaces"):
            part[name] = batch[name].masked_fill(~batch["touch_mask"], 0 if value == 0.0 else 10**6)
        loss = model(**part).loss
        loss.backward()
        results.append({"loss": loss.detach(), **outputs(model, part), **gradients(model)})
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_everything_absent_in_an_all_false_batch(model, batch):
    """Masks that are false everywhere: nothing at all is felt, and with or without an internal voice nothing breaks."""
    for row in range(ROWS):
        batch = silent_row(batch, row)
    nothing = {name: value for name, value in absent_is(batch, float("nan")).items() if name != "input_ids"}
    assert not nothing["touch_mask"].any() and not nothing["pixel_mask"].any()
    assert all(value.isfinite().all() for value in outputs(model, nothing).values())
    beside_text = outputs(model, {"input_ids": batch["input_ids"], **nothing})
    for name, value in outputs(model, {"input_ids": batch["input_ids"]}).items():
        assert torch.equal(beside_text[name], value), name


def test_no_contact_is_exactly_zero(model, batch):
    arguments = select(batch, SENSE_ARGUMENTS, ["touch"]).values()
    points, surfaces, values, mask = arguments
    touch: TouchSense = model.model.senses.touch
    mask = mask.clone()
    mask[1] = False
    felt = touch(points, surfaces, values, mask)
    assert not felt[1].any() and felt[0].any()
    # A sum over contacts: their order means nothing, and each of them counts.
    torch.testing.assert_close(touch(points.flip(2), surfaces.flip(2), values.flip(2), mask.flip(2)), felt)
    for contact in range(3):
        without = mask.clone()
        without[:, :, contact] = False
        changed = (touch(points, surfaces, values, without) - felt).abs().amax(-1)
        assert torch.equal(changed > 1e-4, mask[:, :, contact])


@pytest.mark.parametrize("sense", SENSE_TABLE, ids=lambda sense: sense.name)
def test_every_sense_reaches_its_last_matrix_at_one_size(batch, sense):
    """Whatever it measures, and however far its encoder has grown."""
    model = micro_model()
    module = getattr(model.model.senses, sense.name)
    torch.nn.init.orthogonal_(module.proj.weight)  # keeps the length of what comes in
    given = [batch[name] for name in sense.arguments]
    given += [model.model.embed_tokens] if sense.is_text else [batch[sense.mask]] if sense.mask else []
    for grown in (False, True):
        with torch.no_grad():
            for parameter in [*module.parameters(), model.model.embed_tokens.weight] if grown else []:
                if parameter is not module.proj.weight:
                    parameter *= 30
            lengths = module(*given).norm(dim=-1)
        present = lengths > 0
        assert present.any()
        torch.testing.assert_close(
            lengths[present],
            torch.full_like(lengths[present], SENSE_SCALE * module.proj.in_features**0.5),
            atol=0,
            rtol=1e-3,
        )


def test_encode_present_runs_on_the_present_ticks_only():
    mask = torch.tensor([[True, False, True], [False, False, False]])
    values = torch.arange(12.0).view(2, 3, 2)
    seen = []

    def encode(x):
        seen.append(x)
        return x * 10

    encoded = encode_present(encode, mask, values)
    assert seen[0].tolist() == [[0, 1], [4, 5]]
    assert encoded.tolist() == [[[0, 10], [0, 0], [40, 50]], [[0, 0]] * 3]
    assert torch.equal(encode_present(encode, None, values), values * 10)
    assert torch.equal(scatter_present(mask, torch.ones(2, 4)).sum(-1), mask * 4.0)


def test_an_absent_mask_means_present_everywhere(model, batch):
    ids = batch["input_ids"]
    everywhere = torch.ones(ROWS, TICKS, dtype=torch.bool)
    for sense, mask in (("audio", "input_features_mask"), ("proprioception", "body_mask"), ("touch", "touch_mask")):
        given = select(batch, SENSE_ARGUMENTS, [sense])
        full = torch.ones_like(given[mask]) if sense == "touch" else everywhere
        given[mask] = full
        with_mask = outputs(model, {"input_ids": ids, **given})
        given.pop(mask)
        assert_close(outputs(model, {"input_ids": ids, **given}), with_mask, atol=1e-5)


@pytest.mark.parametrize("name", [*MASKS, "animation_target_mask"])
def test_a_mask_of_zeros_and_ones_is_a_mask_of_booleans(batch, name):
    model, results = micro_model(), []
    given = absent_is(batch, float("nan"))
    for mask in (given[name], given[name].long()):
        loss = model.train()(**given | {name: mask}).loss
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(model), **outputs(model.eval(), given | {name: mask})})
    assert_close(results[1], results[0], atol=0.0, rtol=0.0)


# --- wrong input ------------------------------------------------------------------------------------------------------


def test_pictures_are_bytes(model, batch):
    with pytest.raises(ValueError, match="`pixel_values` are bytes from 0 to 255"):
        model(batch["input_ids"], pixel_values=batch["pixel_values"] / 255)
    seen = model(batch["input_ids"], pixel_values=batch["pixel_values"]).logits
    # datasets turn lists of bytes into int64.
    assert torch.equal(model(batch["input_ids"], pixel_values=batch["pixel_values"].long()).logits, seen)


@pytest.mark.parametrize(
    ("name", "organ"),
    [(name, organ) for sense in SENSE_TABLE if not sense.copy_of for name, organ in sense.organs.items()],
)
def test_a_creature_without_an_organ_has_no_parameters_for_it_and_says_so(batch, name, organ):
    """Given beside what else the sense consists of; a body without joints still has its state, and the reverse."""
    model, whole = micro_model(**{organ: 0}), micro_model()
    sense = next(sense for sense in SENSE_TABLE if name in sense.arguments)
    rest = {other: batch[other] for other in sense.arguments_of(model.config)}
    assert hasattr(model.model.senses, sense.name) == bool(rest)
    assert len([*model.parameters()]) < len([*whole.parameters()]) or rest
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in whole.parameters())
    model.train_only(senses=SENSES)
    with pytest.raises(ValueError, match=f"^`{name}` is given, but this creature's {organ} is 0: leave it out.$"):
        model(batch["input_ids"], **{name: batch[name]}, **rest)
    if rest:
        assert not torch.equal(model(batch["input_ids"], **rest).logits, model(batch["input_ids"]).logits)


@pytest.mark.parametrize("shape", [{"num_cameras": 1}, {"num_cameras": 3, "vision_image_size": [4, 12]}])
def test_any_number_of_cameras_and_rectangular_pictures(shape):
    model = micro_model(**shape)
    batch = without_targets(random_batch(model.config, ROWS, TICKS))
    assert batch["pixel_values"].shape[2:] == (model.config.num_cameras, 3, *model.config.image_shape)
    # Every camera and every patch counts.
    for place in itertools.product(
        range(model.config.num_cameras), *(range(0, n, 4) for n in model.config.image_shape)
    ):
        camera, row, column = place
        changed = batch["pixel_values"].clone()
        changed[:, :, camera, :, row, column] ^= 255
        assert (outputs(model, batch | {"pixel_values": changed})["logits"] != outputs(model, batch)["logits"]).any()


PARTS = [(sense, part) for sense in SENSE_TABLE if len(sense.arguments) > 1 for part in sense.arguments]


@pytest.mark.parametrize(("sense", "left_out"), PARTS, ids=lambda value: getattr(value, "name", value))
def test_a_part_of_a_sense_is_refused(model, batch, sense, left_out):
    given = {name: batch[name] for name in sense.arguments if name != left_out}
    with pytest.raises(ValueError, match=f"part of a sense: give `{left_out}`"):
        model(batch["input_ids"], **given)


def test_rotations_alone_are_not_felt(model, batch):
    """They are the pose that animation starts from."""
    rotations = {"joint_rotations": batch["joint_rotations"]}
    assert torch.equal(model(batch["input_ids"], **rotations).logits, model(batch["input_ids"]).logits)


@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_without_its_sense_is_refused(model, batch, mask):
    with pytest.raises(ValueError, match=f"`{mask}` is one part of a sense"):
        model(batch["input_ids"], **{mask: batch[mask]})


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "name", [name for name, value in random_batch(micro_config()).items() if value.dtype == torch.long]
)
def test_ids_out_of_range_are_named(name, training):
    model = micro_model().train(training)
    batch = random_batch(model.config, presence=1.1)
    absent = name.endswith("_ids") or name == "audio_codes"  # what a negative id of these means
    for wrong in (10**6,) if absent else (10**6, -1):
        ids = batch[name].clone()
        ids[1, 2] = wrong
        with pytest.raises(ValueError, match=f"^`{name}` holds the id {wrong}; there are [0-9]+, from 0 to [0-9]+.$"):
            model(**batch | {name: ids})


def test_an_internal_voice_of_a_negative_id_is_absent(batch):
    model, results = micro_model(), []
    absent = torch.rand(ROWS, TICKS) < 0.5
    ids = batch.pop("input_ids").masked_fill(absent, 0)
    embeds = model.model.embed_tokens(ids).masked_fill(absent[..., None], 0.0)
    for voice in (
        {"inputs_embeds": embeds},
        {"input_ids": ids - absent.long()},
        {"input_ids": ids - 100 * absent.long()},
    ):
        loss = model(**batch, **voice).loss
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(model), **outputs(model, batch | voice)})
    for other in results[1:]:
        assert_close(other, results[0], atol=1e-6)


def test_forward_takes_what_the_table_of_senses_lists():
    parameters = [*inspect.signature(MultiModalCreature.forward).parameters]
    first, end = parameters.index("external_voice_ids"), parameters.index("external_text_targets")
    assert parameters[first:end] == [*SENSE_INPUTS, "sense_embeds"]


# --- causality --------------------------------------------------------------------------------------------------------

PERTURBED = ("input_ids", *SENSE_INPUTS, "sense_embeds", "inputs_embeds")


def perturb(batch, name, tick):
    """The batch with one argument changed at one tick, in every row."""
    batch = dict(batch)
    value = batch[name].clone()
    if name == "pixel_values":
        value[:, tick] = 255 - value[:, tick]
    elif value.dtype == torch.bool:
        value[:, tick] = False
    elif value.dtype == torch.long:
        value[:, tick] = (value[:, tick] + 1) % 5
    elif name in ("joint_rotations", "animation"):
        value[:, tick] = value[:, tick].flip(-1)
    else:
        value[:, tick] += 1.0
    batch[name] = value
    return batch


@pytest.mark.parametrize("name", PERTURBED)
def test_causality(name):
    model = micro_model()
    batch = without_targets(random_batch(model.config, 2, TICKS, presence=1.1))  # everything is there at every tick
    batch["sense_embeds"] = torch.randn(2, TICKS, model.config.hidden_size)
    if name == "inputs_embeds":
        batch["inputs_embeds"] = torch.randn(2, TICKS, model.config.hidden_size)
        del batch["input_ids"]
    assert not {*batch} - {*PERTURBED}  # no sense is forgotten
    before = outputs(model, batch)
    for tick in (0, 3, TICKS - 1):
        after = outputs(model, perturb(batch, name, tick))
        for stream in OUTPUTS:
            torch.testing.assert_close(after[stream][:, :tick], before[stream][:, :tick], atol=1e-5, rtol=1e-5)
            for row in range(2):
                moved = (after[stream][row, tick] - before[stream][row, tick]).abs().max()
                assert moved > 1e-4, (stream, tick)


# --- the parts --------------------------------------------------------------------------------------------------------


def test_left_and_right_eye_differ_and_pictures_reach_their_own_tick(model):
    torch.manual_seed(0)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[0, 2] = mask[1, 1] = True
    pictures = torch.randint(0, 256, (2, 4, 2, 3, 8, 8), dtype=torch.uint8)
    vision = model.model.senses.vision
    with torch.no_grad():
        seen = vision(pictures, mask)
        swapped = vision(pictures.flip(2), mask)
        everywhere = vision(pictures, None)
    assert torch.equal(seen.any(-1), mask)
    torch.testing.assert_close(seen[mask], everywhere[mask])
    assert not torch.allclose(seen, swapped)


def test_rotations_are_poses_not_numbers(model, batch):
    """q and -q are the same pose, for the body as it is felt, as it was commanded, and as it is asked for."""
    before = outputs(model, batch)
    loss = model(**batch).loss
    flipped = dict(batch, joint_rotations=-batch["joint_rotations"], rotation_targets=-batch["rotation_targets"])
    rotations = model.config.subframes_per_tick * model.config.num_joints * 4
    flipped["animation"] = batch["animation"].clone()
    flipped["animation"][..., :rotations] *= -1
    assert_close(outputs(model, flipped), before, atol=1e-5)
    torch.testing.assert_close(model(**flipped).loss, loss)


def test_efference_copies_and_senses_add_up(model, batch):
    """One tick's input is the sum of its senses: `sense_embeds` in two parts gives what the senses give at once."""
    senses = without_targets(batch)
    ids = senses.pop("input_ids")
    with torch.no_grad():
        vectors = model.model.senses(senses, model.model.embed_tokens)
        assert len(vectors) == len(SENSE_MODULES)
        summed = model.model.embed(ids, None, senses)
        torch.testing.assert_close(summed, model.model.embed_tokens(ids) + sum(vectors))
        by_embeds = model(input_ids=ids, sense_embeds=model.encode_senses(**senses)).logits
        torch.testing.assert_close(by_embeds, model(ids, **senses).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("argument", "words"), [("pixel_value", "mean `pixel_values`"), ("smell", "docstring")])
def test_an_unknown_sense_is_an_error(model, batch, argument, words):
    unknown = {argument: batch["pixel_values"]}
    for call in (lambda: model.encode_senses(**unknown), lambda: model.model(batch["input_ids"], senses=unknown)):
        with pytest.raises(TypeError, match=f"^`senses` has no argument `{argument}`.*{words}"):
            call()


def test_the_internal_voice_is_given_once(model, batch):
    with pytest.raises(ValueError, match="not both"):
        model(input_ids=batch["input_ids"], inputs_embeds=torch.zeros(ROWS, TICKS, 32))


def test_only_one_token_table():
    model = micro_model(random=False)
    config = micro_config()
    tables = [n for n, p in model.named_parameters() if config.vocab_size in p.shape]
    assert tables == ["model.embed_tokens.weight"]


def test_senses_of_other_rows_or_ticks_are_refused_and_not_broadcast(model, batch):
    for part in (batch["input_features"][:, :1], batch["input_features"][:1]):
        with pytest.raises(ValueError, match="give every sense the same"):
            model(input_ids=batch["input_ids"], input_features=part)


@pytest.mark.parametrize("name", [*random_batch(micro_config()), "sense_embeds"])
def test_a_wrong_shape_is_an_error_that_names_the_argument_or_its_sense(model, batch, name):
    value = torch.zeros(ROWS, TICKS, 32) if name == "sense_embeds" else batch[name]
    sense = next((sense for sense in SENSE_TABLE if name in (*sense.arguments, sense.mask)), None)
    names = "|".join(filter(None, (*sense.arguments, sense.mask))) if sense else name
    message = rf"^`?({names})`? (has the shape|holds)|^The senses differ in rows and ticks"
    narrow = [value[..., :-1]] if value.dim() > 2 else []
    for wrong in (value[:, :-1], value[:1], value[0], value[..., None], *narrow):
        with pytest.raises(ValueError, match=message):
            model(**batch | {name: wrong})


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_labels_of_fewer_ticks_are_an_error(model, batch, name):
    with pytest.raises(ValueError, match=r"^`labels` has the shape \[3, 5\], but should have \[3, 8\]"):
        model(batch["input_ids"], **{name: batch["labels"][:, :5]})


def test_a_pose_of_fewer_ticks_is_an_error(model, batch):
    felt = {"joint_rotations": batch["joint_rotations"][:, :1]}
    with pytest.raises(ValueError, match="`joint_rotations` has the shape"):
        model(batch["input_ids"], output_streams=("animation",), **felt)


def test_one_stream_is_given_in_a_tuple(model, batch):
    for call in (model, model.generate, model.step):
        with pytest.raises(ValueError, match="tuple of names"):
            call(input_ids=batch["input_ids"], output_streams="audio")


def test_a_sense_that_no_tick_of_a_batch_has_is_not_attended_to(monkeypatch):
    model = micro_model()
    batch = random_batch(model.config, rows=2, ticks=3)
    batch = {"input_ids": batch["input_ids"], "pixel_values": batch["pixel_values"]}
    seen, attention = [], torch.nn.functional.scaled_dot_product_attention

    def keep(query, *others, **how):
        seen.append(query.shape[0])
        return attention(query, *others, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", keep)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    hidden = model(**batch, pixel_mask=nothing).last_hidden_state
    assert min(seen) > 0  # torch 2.11 returns None for attention over no rows on a GPU
    alone = model(input_ids=batch["input_ids"]).last_hidden_state
    torch.testing.assert_close(hidden, alone, atol=0, rtol=0)
    hidden.sum().backward()
