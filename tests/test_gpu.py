"""Tests that need a CUDA device."""

import copy
import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from creatures import ALL_STREAMS, GPT2, micro_config, micro_model, random_batch, without_targets
from test_trainer import Rows, make_trainer
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CompileConfig, TrainerCallback

import decoding_creature
import generation_creature
import layers_creature
import losses_creature
from creature import fast
from creature.data import collate_blocks
from creature.data.text.tokenizer import load_tokenizer
from creature.fast import head as fast_head
from creature.fast import kernels
from creature.live import LiveCreature
from creature.optimizer import MuonAdamW, parameter_groups
from modeling_creature import MultiModalCreature
from processing_creature import CreatureProcessor
from sampling_creature import Sampling
from stepping_creature import Stepper

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("fused", [True, False])
def test_the_exponentials_give_the_loss_and_its_gradient(fused, monkeypatch):
    if not fused:  # as on GPUs that the fused product is not made for
        monkeypatch.setattr(kernels, "matmul_fits", lambda *args: False)
    torch.manual_seed(0)
    x = torch.randn(300, 128, device="cuda").bfloat16()
    weight = (torch.randn(50304, 128, device="cuda") * 0.2).bfloat16()
    targets = torch.randint(0, 50304, (300,), device="cuda")
    logits = (x.double() @ weight.double().t()).requires_grad_()
    expected = F.cross_entropy(logits, targets, reduction="none")
    expected.sum().backward()
    exp_logits, sums = kernels.softmax_exp_logits(x, weight, targets)
    # Without the fused product the logits have been rounded to bfloat16 before.
    assert error(sums.log(), expected) < (1e-5 if fused else 3e-3)
    assert error(exp_logits.double() / sums.double()[:, None], logits.grad) < 1e-2
    # A target a hundred nats behind: large, but finite, and still uphill.
    exp_logits, sums = kernels.softmax_exp_logits(x * 100, weight, targets)
    assert exp_logits.isfinite().all() and sums.isfinite().all()


@pytest.mark.parametrize("columns", [1008, 50304])  # the last tile of columns is cut off, or whole
def test_the_exponentials_in_float8_are_those_of_the_logits_and_their_transpose(columns):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the fused product is made for Hopper")
    torch.manual_seed(0)
    x = torch.randn(304, 192, device="cuda").mul(torch.rand(304, 1, device="cuda") * 4).bfloat16()
    weight = (torch.randn(columns, 192, device="cuda") * 0.05).bfloat16()
    rows, targets = torch.arange(304, device="cuda"), torch.randint(0, columns, (304,), device="cuda")
    (x8, scale), (weight8, factor) = fast_head.to_float8(x, dim=1), fast_head.to_float8(weight)
    scale = (scale * factor).squeeze(1)
    logits = (x8.double() @ weight8.double().t()) * scale.double()[:, None]
    shift = logits.logsumexp(1) - 5
    exact = (logits - shift[:, None]).exp()
    arguments = x8, weight8, targets, scale, shift.float(), exact[rows, targets].float()
    exp_logits, transposed, sums, rest = kernels.softmax_exp_logits_float8(*arguments)
    assert error(sums, exact.sum(1)) < 3e-3  # tensor cores add up float8 in fewer bits
    assert error(rest, -exp_logits.float().sum(1)) < 1e-5  # exactly what was rounded: a row adds up to nothing
    order = kernels.transposed_order(rows[:, None]).squeeze(1)
    assert order[:4].tolist() == [0, 8, 1, 9]
    back = torch.empty(exp_logits.shape, device="cuda")
    back[order] = transposed.t().float()
    assert error(back[rows, targets], rest) < 0.1  # two bits and a hidden one
    back[rows, targets] = exact[rows, targets] = 0.0
    assert torch.equal(back, exp_logits.float()) and error(exp_logits, exact) < 0.1
    scale[7] = float("nan")
    assert kernels.softmax_exp_logits_float8(*arguments)[2][8:].isfinite().all()


def test_the_loss_from_float8_is_near_and_its_gradient_points_the_same_way():
    torch.manual_seed(0)
    count = fast_head.FLOAT8_CHUNK + 300  # the last ones do not fill a tile
    targets, ones = torch.randint(0, 50304, (count,), device="cuda"), torch.ones(count, device="cuda") / count
    start = torch.randn(count, 128, device="cuda"), torch.randn(50304, 128, device="cuda") * 0.2
    start[0][5] *= 6  # sure of an uncommon token, tens of nats above all others
    found = {}
    for fp8 in (False, True):
        hidden, weight = (tensor.clone().requires_grad_() for tensor in start)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = fast_head.linear_cross_entropy(hidden, weight, targets, ones, fp8)
        loss.backward()
        found[fp8] = loss.detach(), hidden.grad, weight.grad
        assert all(value.isfinite().all() for value in found[fp8])
    assert error(found[True][0], found[False][0]) < 1e-3
    assert all(error(*pair) < 0.1 for pair in zip(found[True][1:], found[False][1:], strict=True))


def test_evaluation_does_not_round_large_logits():
    torch.manual_seed(0)
    hidden, head = torch.randn(300, 128, device="cuda").bfloat16() * 5, torch.randn(1000, 128, device="cuda").bfloat16()
    targets = torch.randint(0, 1000, (300,), device="cuda")
    losses, predictions = losses_creature.linear_token_losses(hidden, head, targets)
    logits = hidden.double() @ head.double().t()
    assert error(losses, F.cross_entropy(logits, targets, reduction="none")) < 1e-5
    assert torch.equal(predictions, logits.argmax(1))


@pytest.mark.parametrize("rows", [129, 300, 4096])
def test_the_fused_mlp_is_the_plain_one(rows):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the fused product is made for Hopper")
    torch.manual_seed(0)
    shapes = ((rows, 128), (256, 128), (128, 256))
    exact = [torch.randn(shape, device="cuda").mul(0.3).bfloat16().double().requires_grad_() for shape in shapes]
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    expected = F.relu(exact[0] @ exact[1].t()).square() @ exact[2].t()
    found = kernels.relu2_mlp(*half)
    direction = torch.randn_like(found)
    expected.backward(direction.double())
    found.backward(direction)
    assert error(found, expected) < 1e-2
    assert all(error(tensor.grad, reference.grad) < 1e-2 for tensor, reference in zip(half, exact, strict=True))


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("apart", [False, True])
def test_norm_and_rotation_in_one_pass_are_the_plain_ones(head_dim, apart):
    torch.manual_seed(0)
    x = torch.randn(3, 50, 4, head_dim, device="cuda").bfloat16()
    angles = torch.randn(3 if apart else 1, 50, head_dim // 2, device="cuda")
    exact, half = x.double().requires_grad_(), x.clone().requires_grad_()
    cos, sin = angles.cos(), angles.sin()
    normed = F.rms_norm(exact, (head_dim,), eps=1e-6).transpose(1, 2)
    whole = torch.cat((cos, cos), dim=-1).double(), torch.cat((-sin, sin), dim=-1).double()
    expected = layers_creature.apply_rotary_pos_emb(normed, *whole)
    found = kernels.rotary_norm(half, cos.bfloat16(), sin.bfloat16(), 1e-6).transpose(1, 2)
    direction = torch.randn(3, 4, 50, head_dim, device="cuda").bfloat16()  # strides unlike those of the forward pass
    expected.backward(direction.double())
    found.backward(direction)
    assert error(found, expected) < 1e-2 and error(half.grad, exact.grad) < 1e-2


def test_compiled_training_keeps_the_causal_mask_a_flag_and_learns():
    config = micro_config(hidden_size=64, num_attention_heads=1)  # a head_dim that the fused kernels take
    model = MultiModalCreature(config).cuda()
    model.train_only()
    fast.apply(model)
    optimizer = MuonAdamW(parameter_groups(model, 0.01, 0.02, 0.0), compiled=True)
    compiled = torch.compile(model, fullgraph=True)
    ids = torch.randint(0, config.vocab_size - 3, (4, 64), device="cuda")
    losses = []
    # Only the flash kernel is allowed, and it takes no mask: a written-out one would raise here.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        for _ in range(20):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = compiled(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


TEXT = dict(max_new_tokens=80, eos_token_id=None, pad_token_id=127)
COMPILED = dict(compile_config=CompileConfig(fullgraph=True))


def stock(model, ids, **settings):
    """`generate` by the loop of transformers, which serves a caller who names a cache."""
    return model.generate(ids, cache_implementation="dynamic", **settings)


@pytest.fixture
def speaker():
    """A creature in float32 whose texts vary, a prompt of three rows and its padding mask."""
    model = micro_model(tie_word_embeddings=False, hidden_size=64, num_attention_heads=2).cuda()
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [0] * 8 + [1]], device="cuda")
    ids = torch.randint(0, 120, (3, 9), generator=torch.Generator().manual_seed(3)).cuda()
    return model, ids.masked_fill(mask == 0, 127), mask


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.3},
        {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.2},
    ],
    ids=["greedy", "penalty", "sampled"],
)
def test_the_graph_gives_the_tokens_of_the_loop_of_transformers(speaker, settings, compiled):
    model, ids, mask = speaker
    settings = {**TEXT, **settings, "attention_mask": mask}
    torch.manual_seed(0)
    expected = stock(model, ids, **settings)
    for _ in range(2):
        torch.manual_seed(0)
        assert torch.equal(model.generate(ids, **settings, **(COMPILED if compiled else {})), expected)
    (decoder,) = decoding_creature._graphs[model].values()
    assert decoder.graph is not None and (decoder.tick is decoding_creature.bare_tick) != compiled
    assert len(expected[:, 9:].unique()) > 10


@pytest.mark.parametrize("compiled", [False, True])
def test_the_graph_in_half_precision_gives_the_likeliest_tokens(speaker, compiled):
    """With the kernels of half precision; compared token by token, as rounding may choose another text as likely."""
    model, ids, _ = speaker
    ids = ids[:, -1:]  # without the padding, which `generate` would mask and `forward` below would not
    out = model.bfloat16().generate(ids, **TEXT, do_sample=False, **(COMPILED if compiled else {}))
    (decoder,) = decoding_creature._graphs[model].values()
    assert (decoder.tick is decoding_creature.bare_tick) != compiled
    with torch.no_grad():
        logits = model(out).logits[:, ids.shape[1] - 1 : -1].float()
    chosen = logits.gather(2, out[:, ids.shape[1] :, None])[..., 0]
    assert (logits.amax(dim=-1) - chosen).max() < 0.2 * logits.std()
    assert len(out[:, ids.shape[1] :].unique()) > 10


@pytest.mark.parametrize("window", [6, None])
@pytest.mark.parametrize("audio", [Sampling(), Sampling(temperature=1.0, top_k=5)])
def test_a_recorded_step_of_all_streams_is_the_eager_one(window, audio):
    """Over the window several times, and past the slots of an unbounded one; a sense that comes and goes."""
    model = micro_model(sliding_window=window, tie_word_embeddings=False).cuda()
    ticks = 2 * decoding_creature.SHORTEST + 9 if window is None else 40
    batch = {name: value.cuda() for name, value in random_batch(model.config, rows=2, ticks=ticks).items()}
    senses = {name: value for name, value in without_targets(batch).items() if not name.endswith("mask")}
    lives = []
    for recordable in (False, True):
        stepper, generator = Stepper(model, rows=2), torch.Generator("cuda").manual_seed(1)
        assert stepper.recordable
        stepper.recordable, life = recordable, []
        for tick in range(ticks):
            now = {name: value[:, tick : tick + 1] for name, value in senses.items()}
            if tick % 3 == 0:
                del now["pixel_values"]
            life.append(model.step(stepper, sampling={"audio": audio}, generator=generator, **now))
        assert (stepper.graph is not None) == recordable
        lives.append({name: torch.stack([step[name] for step in life]) for name in ("logits", "animation", "audio")})
    for name in ("logits", "animation"):
        torch.testing.assert_close(lives[1][name], lives[0][name], atol=1e-3, rtol=1e-3)
    assert (lives[1]["audio"] == lives[0]["audio"]).float().mean() > 0.99 and len(lives[0]["audio"].unique()) > 3


def lived(creature, ticks):
    """Raw senses that come and go, other numbers of contacts, a pose without its body, and own outputs fed back."""
    draw = np.random.default_rng(0)
    contact = dict(surface=1, force=2.0, x=0.1, y=0.0, z=0.2, temperature=30.0)
    for tick in range(ticks):
        senses = {
            "audio": draw.standard_normal(1280) * 0.1,
            "images": draw.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8),
            "state": draw.standard_normal(2),
            "joint_positions": draw.standard_normal((3, 3)),
            "joint_rotations": draw.standard_normal((3, 4)),
            "touch": [contact | {"point": int(draw.integers(10))} for _ in range(tick * 5 % 12)],
            "words": "robot" if tick % 4 == 0 else [],
        }
        names = list(senses)
        if tick >= 3:  # the first ticks have all of them
            for name in {names[tick % 7], names[tick * 3 % 7]}:
                del senses[name]
        yield creature.tick(**senses)


@pytest.mark.parametrize("window", [6, 512])
@pytest.mark.parametrize("drawn", [False, True])
def test_a_recorded_life_of_all_senses_and_streams_is_the_eager_one(window, drawn, monkeypatch):
    """Over 30 ticks; the host waits twice a tick: for the upload of the senses, and for what is emitted."""
    body = dict(body_state_mean=[0.0] * 2, body_state_std=[1.0] * 2, action_mean=[0.0] * 2, action_std=[1.0] * 2)
    limits = dict(rotation_low=[[-0.5] * 3] * 3, rotation_high=[[0.5] * 3] * 3)
    ears = dict(num_mel_bins=8, audio_frames_per_tick=8)
    model = micro_model(**GPT2, **body, **limits, **ears, sliding_window=window, tie_word_embeddings=False).cuda()
    processor = CreatureProcessor.from_config(model.config, load_tokenizer())
    recordings, capture, waits, lives = [], Stepper.capture, [], []
    monkeypatch.setattr(Stepper, "capture", lambda self, *args: recordings.append(1) or capture(self, *args))
    for recordable in (False, True):
        sampling = {} if drawn else dict.fromkeys(ALL_STREAMS[:3], Sampling())
        creature, life = LiveCreature(model, processor, sampling=sampling, seed=1), []
        assert creature._past.recordable
        creature._past.recordable = recordable
        ticks = lived(creature, 30)
        for _ in range(30):
            before = len(recordings)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                life.append(next(ticks))
                torch.cuda.set_sync_debug_mode("default")
            if len(recordings) == before and recordable:
                waits.append([f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)])
        lives.append(life)
    eager, graph = lives
    for name in ("logits", "external_text_logits", "animation", "action", "last_hidden_state"):
        found, wanted = (torch.cat([getattr(emission.step, name) for emission in life]) for life in (graph, eager))
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
    for name in ("thought_id", "said_id"):
        assert [getattr(emission, name) for emission in graph] == [getattr(emission, name) for emission in eager]
    assert all((a.voice_codes == b.voice_codes).all() for a, b in zip(graph, eager, strict=True))
    assert len(recordings) <= 4 and len({emission.thought_id for emission in graph}) > 3
    assert len(waits) >= 26 and max(map(len, waits)) <= 2, waits


def test_ids_out_of_range_are_refused_before_the_graph_runs():
    model = micro_model(sliding_window=6).cuda()
    senses = without_targets(random_batch(model.config, rows=1, ticks=4))
    stepper = Stepper(model)
    for tick in range(2):
        model.step(stepper, **{name: value[:, tick : tick + 1] for name, value in senses.items()})
    for name, device in (("input_ids", "cpu"), ("audio_codes", "cuda"), ("external_voice_ids", "cuda")):
        now = {name: value[:, 2:3] for name, value in senses.items()}
        with pytest.raises(ValueError, match=f"`{name}` holds the id 1000"):
            model.step(stepper, **now | {name: torch.full_like(now[name], 1000).to(device)})
    assert stepper.get_seq_length() == 2
    # The device is as it was, and senses may lie on either.
    now = {name: value[:, 2:3].to("cuda" if len(name) % 2 else "cpu") for name, value in senses.items()}
    assert model.step(stepper, **now).logits.isfinite().all()


def test_all_streams_generated_with_a_graph_are_those_of_the_loop_of_transformers(monkeypatch):
    model = micro_model(tie_word_embeddings=False).cuda()
    ids = random_batch(model.config, rows=2, ticks=5)["input_ids"].cuda()
    settings = dict(output_streams=ALL_STREAMS, max_new_tokens=20, do_sample=False, eos_token_id=None)
    fast = model.generate(ids, **settings)
    monkeypatch.setattr(generation_creature, "can_step", lambda model: False)
    slow = model.generate(ids, **settings)
    assert torch.equal(fast.sequences, slow.sequences) and torch.equal(fast.external_text, slow.external_text)
    torch.testing.assert_close(fast.animation, slow.animation, atol=1e-3, rtol=1e-3)


def test_the_graph_stops_at_the_end_of_text(speaker):
    model, ids, _ = speaker
    settings = {**TEXT, "do_sample": False}
    free = stock(model, ids, **settings)
    for ends in (free[:, 30].tolist(), [free[1, 12].item()]):
        settings["eos_token_id"] = ends
        for rows in (slice(0, 3), slice(1, 2)):
            out = model.generate(ids[rows], **settings)
            assert torch.equal(out, stock(model, ids[rows], **settings))


def test_the_graph_follows_the_weights_and_goes_with_the_model(speaker):
    model, ids, _ = speaker
    settings = {**TEXT, "do_sample": False}
    before = model.generate(ids, **settings)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    after = model.generate(ids, **settings)
    assert torch.equal(after, stock(model, ids, **settings)) and not torch.equal(after, before)
    model.bfloat16()
    assert model.generate(ids, **settings).shape == after.shape
    model.float().cpu()
    assert model.generate(ids.cpu(), **settings).shape == after.shape
    model.cuda()
    assert torch.equal(copy.deepcopy(model).generate(ids, **settings), model.generate(ids, **settings))
    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
        assert model.generate(ids, **settings).shape == after.shape
    kept = [weakref.ref(decoder) for decoder in decoding_creature._graphs[model].values()]
    # The fixture holds the model as well, so its graphs are deleted by hand.
    decoding_creature._graphs.pop(model)
    gc.collect()
    assert kept and not any(decoder() for decoder in kept)


class WatchWaits(TrainerCallback):
    """Makes torch warn where the host waits for the GPU, from the third step to the log of the last."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.cuda.set_sync_debug_mode("warn" if state.global_step >= 2 else "default")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            torch.cuda.set_sync_debug_mode("default")


def test_no_step_without_a_log_waits_for_the_gpu(tmp_path):
    settings = dict(
        use_cpu=False, bf16=True, dataloader_pin_memory=True, accelerator_config={"non_blocking": True},
        max_steps=6, logging_steps=6, logging_first_step=False,
    )  # fmt: skip
    trainer = make_trainer(tmp_path, rows=Rows(48), callbacks=[WatchWaits()], **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
    assert not waits


@pytest.mark.parametrize(("kv_heads", "window"), [(1, None), (2, None), (2, 8)])
def test_documents_are_kept_apart_without_a_mask(kv_heads, window):
    """With `cu_seq_lens`, compiled or not, the loss and gradients are those of the mask in float32."""
    torch._dynamo.reset()
    config = micro_config(
        hidden_size=128, num_attention_heads=2, num_key_value_heads=kv_heads, max_position_embeddings=256,
        sliding_window=window,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MultiModalCreature(config).cuda()
    model.train_only()
    fast.apply(model)
    weight = model.model.layers[0].self_attn.q_proj.weight
    compiled = torch.compile(model, dynamic=False)
    for seed in range(3):  # other documents, the same graph
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 120, (4, 256), generator=generator)
        ids[torch.rand(4, 256, generator=generator) < 0.03] = config.eos_token_id
        batch = collate_blocks([{"input_ids": row} for row in ids.numpy()], end_of_text=config.eos_token_id)
        batch = {name: tensor.cuda() for name, tensor in batch.items()}
        results = []
        for run, half in ((model, False), (model, True), (compiled, True)):
            # Only the flash kernel is allowed in half precision, and with a mask it would raise.
            kernels = [SDPBackend.FLASH_ATTENTION] if half else list(SDPBackend.__members__.values())
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=half), sdpa_kernel(kernels):
                loss = run(**batch).loss
            loss.backward()
            results.append((loss.detach(), weight.grad.clone()))
            model.zero_grad()
        expected, wanted = results[0]
        for loss, found in results[1:]:
            torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
            assert found.isfinite().all() and error(found, wanted) < 0.1
