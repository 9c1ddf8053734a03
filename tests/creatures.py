"""Micro creatures and random batches for the tests of the model: every sense, every stream, milliseconds a pass."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.streamers import BaseStreamer

import senses_creature
import stepping_creature
from configuration_creature import CreatureConfig
from modeling_creature import MultiModalCreature
from motor_creature import COMMAND_PARTS, pack_animation
from senses_creature import SENSE_SCALE, SENSE_TABLE, SenseProjection

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
# The sizes of a configuration for GPT-2's tokenizer.
GPT2 = dict(vocab_size=50304, bos_token_id=50256, eos_token_id=50256, null_token_id=50257, pad_token_id=50258)
# The sections of a configuration file for the job.
MICRO = {
    "model": dict(
        vocab_size=50304, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, attention_dropout=0.1, sense_hidden_size=8, vision_image_size=8,
        vision_channels=[4, 8], num_touch_points=8,
        touch_embedding_size=4, num_audio_codebooks=2, audio_codebook_size=16, audio_code_size=8,
        depth_hidden_size=8, depth_num_layers=1, depth_num_heads=2, num_joints=3, num_blend_shapes=4,
    ),
    "training": dict(
        tokens_per_step=128, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=3, save_steps=8,
        eval_steps=100, warmup_steps=2, decay_steps=0.25, cpu_threads=1,
    ),
}  # fmt: skip
ALL_STREAMS = ("internal_text", "external_text", "audio", "animation")
EVERY_WEIGHT = {"internal_text": 1.0, "external_text": 0.7, "audio": 0.5, "animation": 0.3}

# The arguments of `forward` that carry each sense, efference copy and stream.
SENSE_ARGUMENTS = {"internal_voice": ("input_ids",)}
COPY_ARGUMENTS = {}
for sense in SENSE_TABLE:
    arguments = (*sense.arguments, sense.mask) if sense.mask else tuple(sense.arguments)
    table, name = (COPY_ARGUMENTS, sense.copy_of) if sense.copy_of else (SENSE_ARGUMENTS, sense.name)
    table[name] = table.get(name, ()) + arguments  # two copies are of one stream
TARGET_ARGUMENTS = {
    "internal_text": ("labels",),
    "external_text": ("external_text_targets",),
    "audio": ("audio_targets",),
    "animation": (*COMMAND_PARTS, "animation_target_mask"),
}
# All of them but the internal voice, in the order of the signature.
SENSE_INPUTS = tuple(name for sense in SENSE_TABLE for name in (*sense.arguments, sense.mask) if name)
# The module of each sense and efference copy, by its name in `model.model.senses`.
SENSE_MODULES = tuple(sense.name for sense in SENSE_TABLE)


def micro_config(**changes) -> CreatureConfig:
    """Hidden size 32, two layers, 128 tokens: NULL is 126, padding 127, end of text 125."""
    sizes = dict(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=125,
        eos_token_id=125,
        null_token_id=126,
        pad_token_id=127,
        loss_weights=dict(EVERY_WEIGHT),
        sense_hidden_size=16,
        num_mel_bins=4,
        audio_frames_per_tick=2,
        vision_image_size=8,
        vision_channels=[4, 8],
        num_joints=3,
        subframes_per_tick=2,
        body_state_size=2,
        num_touch_points=10,
        num_touch_surfaces=6,
        touch_embedding_size=4,
        num_audio_codebooks=3,
        audio_codebook_size=11,
        audio_code_size=8,
        depth_hidden_size=16,
        depth_num_layers=1,
        depth_num_heads=2,
        num_blend_shapes=5,
        action_size=2,
    )
    return CreatureConfig(**{**sizes, **changes})


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Redraw what starts at zero (the senses' projections), and every matrix so large that each input matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                # What comes out is about as large as what goes in, and a sense as large as a token.
                std = 0.5 if isinstance(module, nn.Embedding) else module.weight.shape[1] ** -0.5
                if isinstance(module, SenseProjection):
                    std *= 0.5 / SENSE_SCALE
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * std)
        for name, parameter in model.named_parameters():
            if name.endswith("residual_scale"):
                # Not near 1, so that attention to earlier ticks is not small beside the last tick itself.
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.5 + 0.1)
    return model


def micro_model(seed: int = 0, attn_implementation: str = "sdpa", random: bool = True, **changes) -> MultiModalCreature:
    """A micro creature in evaluation mode, the same for the same arguments; random: see `randomize`."""
    torch.manual_seed(seed)
    config = micro_config(**changes)
    config._attn_implementation = attn_implementation
    model = MultiModalCreature(config).eval()
    return randomize(model, seed) if random else model


def random_quaternions(*shape: int) -> torch.Tensor:
    return nn.functional.normalize(torch.randn(*shape, 4), dim=-1)


def random_batch(
    config: CreatureConfig, rows: int = 3, ticks: int = 8, seed: int = 0, presence: float = 0.7, contacts: int = 3
) -> dict:
    """Every argument of `forward`: all senses, efference copies and labels; each is there at a tick with `presence`."""
    torch.manual_seed(seed)
    shape = (rows, ticks)
    subframes, joints, books = config.subframes_per_tick, config.num_joints, config.num_audio_codebooks

    def there(*sizes):
        return torch.rand(*sizes) < presence

    def tokens():
        ids = torch.randint(0, config.vocab_size - 3, shape)
        return ids.masked_fill(torch.rand(shape) < 0.2, config.null_token_id)

    def codes():
        return torch.randint(0, config.audio_codebook_size, (*shape, books)).masked_fill(~there(*shape, 1), -100)

    def eyes():
        gaze = nn.functional.normalize(torch.randn(*shape, 2, 3), dim=-1)
        return torch.cat((gaze, torch.rand(*shape, 2, 1)), dim=-1)

    return {
        "input_ids": tokens(),
        "external_voice_ids": tokens().masked_fill(~there(*shape), -100),
        "input_features": torch.randn(*shape, config.audio_feature_size),
        "input_features_mask": there(*shape),
        "pixel_values": torch.randint(0, 256, (*shape, config.num_cameras, 3, *config.image_shape), dtype=torch.uint8),
        "pixel_mask": there(*shape),
        "joint_positions": torch.randn(*shape, subframes, joints, 3),
        "joint_rotations": random_quaternions(*shape, subframes, joints),
        "body_state": torch.randn(*shape, subframes, config.body_state_size),
        "body_mask": there(*shape),
        "touch_points": torch.randint(0, config.num_touch_points, (*shape, contacts)),
        "touch_surfaces": torch.randint(0, config.num_touch_surfaces, (*shape, contacts)),
        "touch_values": torch.cat((torch.rand(*shape, contacts, 1) * 20, torch.randn(*shape, contacts, 4)), dim=-1),
        "touch_mask": there(*shape, contacts),
        "external_text_ids": tokens().masked_fill(~there(*shape), -100),
        "audio_codes": codes(),
        "animation": pack_animation(
            random_quaternions(*shape, subframes, joints), torch.rand(*shape, config.num_blend_shapes), eyes()
        ),
        "animation_mask": there(*shape),
        "action": torch.randn(*shape, subframes, config.action_size),
        "action_mask": there(*shape),
        "labels": tokens().masked_fill(~there(*shape), -100),
        "external_text_targets": tokens().masked_fill(~there(*shape), -100),
        "audio_targets": codes(),
        "rotation_targets": random_quaternions(*shape, subframes, joints),
        "blend_shape_targets": torch.rand(*shape, config.num_blend_shapes),
        "eye_targets": eyes(),
        "action_targets": torch.randn(*shape, subframes, config.action_size),
        "animation_target_mask": there(*shape),
    }


def without_targets(batch: dict) -> dict:
    targets = {name for names in TARGET_ARGUMENTS.values() for name in names}
    return {name: value for name, value in batch.items() if name not in targets}


def select(batch: dict, groups: dict, names) -> dict:
    """The arguments of `batch` that belong to `names` in one of the `..._ARGUMENTS` tables above."""
    return {argument: batch[argument] for name in names for argument in groups[name]}


def absent_is(batch: dict, value: float) -> dict:
    """The same batch with `value` (NaN, say) written wherever a mask says that nothing is there."""
    batch = dict(batch)
    masks = {name: sense.mask for sense in SENSE_TABLE for name in sense.arguments if sense.mask}
    masks |= dict.fromkeys(COMMAND_PARTS, "animation_target_mask")
    for name, mask_name in masks.items():
        if name in batch and batch[name].is_floating_point():
            mask, further = batch[mask_name], [1] * (batch[name].dim() - batch[mask_name].dim())
            batch[name] = batch[name].masked_fill(~mask.view(*mask.shape, *further), value)
    return batch


def left_padded(model: nn.Module, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 5 tokens cut to their last 5, 3 and 1, padded on the left, and the attention mask."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
    return prompt.masked_fill(mask == 0, model.config.pad_token_id), mask


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients by name, zeros where there is none; cleared on the way."""
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def assert_close(actual: dict, expected: dict, atol: float, rtol: float = 1e-5) -> None:
    """Two dicts of tensors agree, name by name."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")


class OfAGraph(TorchDispatchMode):
    """Refuses what a CUDA graph cannot record: shapes that depend on data, numbers read or written by the host."""

    REFUSED = {"nonzero", "masked_select", "_local_scalar_dense", "lift_fresh", "_unique2", "repeat_interleave"}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert name not in self.REFUSED and not by_mask, f"a CUDA graph cannot record {name}"
        return function(*args, **(kwargs or {}))


def record_on_cpu(patch) -> list[int]:
    """
    In place of CUDA graphs of a `Stepper`, the recorded pass runs again: buffers, masks and what recording leaves are
    those of a GPU. Returns the slots of each recording, a list that grows.
    """
    recordings, recorded = [], [False]

    def run(stepper, model):
        """What a graph does: it checks nothing."""
        recorded[0] = True
        try:
            with OfAGraph():
                return stepper._pass(model, stepper.tick)
        finally:
            recorded[0] = False

    def capture(stepper, model):
        with torch.no_grad():
            for _ in range(2):  # trial runs write into the cache
                stepper._pass(model, stepper.tick)
            stepper.outputs = {name: value.clone() for name, value in run(stepper, model).items()}

        def replay():
            for name, value in run(stepper, model).items():
                stepper.outputs[name].copy_(value)

        stepper.graph = SimpleNamespace(replay=replay)
        stepper.fingerprint = stepping_creature.fingerprint(model)
        recordings.append(stepper.cache.length)

    def everywhere(mask):
        return mask.shape[1] == 1 and not torch.is_grad_enabled()

    check_ids = senses_creature.check_ids
    for module in (senses_creature, stepping_creature):
        patch.setattr(module, "check_ids", lambda *args, **named: recorded[0] or check_ids(*args, **named))
    patch.setattr(stepping_creature, "is_recordable", lambda model: True)
    patch.setattr(stepping_creature.Stepper, "capture", capture)
    patch.setattr(senses_creature, "encodes_everywhere", everywhere)
    return recordings


def load_script(name: str, folder: Path = SCRIPTS):
    """The module scripts/NAME.py, or that of another folder."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Clock:
    """Stands in for the time module: time passes where a test changes `now`."""

    now = 100.0

    def perf_counter(self):
        return self.now


class Listener(BaseStreamer):
    """A streamer that keeps the tokens it was given, and whether `end` was called."""

    def __init__(self):
        self.heard, self.ended = [], False

    def put(self, value):
        self.heard += value.flatten().tolist()

    def end(self):
        self.ended = True
