# Copyright 2026 The MultiModalCreature developers. Licensed under the Apache License, Version 2.0.
"""CreatureConfig: the architecture of a MultiModalCreature, and nothing else."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import RopeParameters
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

# The output streams, in the one order used wherever they are counted, weighted or listed.
STREAMS = ("internal_text", "external_text", "audio", "animation")
# The senses of the creature, in the order in which they are documented.
SENSES = ("internal_voice", "external_voice", "audio", "vision", "proprioception", "touch")

# GPT-2's 50257 ids end with <|endoftext|>; the creature's own special tokens are the first two of the spare ids behind.
END_OF_TEXT_ID = 50256
NULL_ID = 50257
PAD_ID = 50258

# Tables by token of the first models, which doubled the parameters for 0.014 nats (docs/decisions.md).
REMOVED_FIELDS = ("use_value_embeddings", "per_layer_embedding_size")


@strict
class CreatureConfig(PreTrainedConfig):
    r"""
    Configuration of a [`MultiModalCreature`]. The defaults are the "tiny" creature: 6 layers of width 512.

    Backbone:
        vocab_size (`int`, defaults to 50304): rows of the one token table. GPT-2's 50257 ids, NULL, padding and spare
            ids up to a multiple of 64: an unaligned head is three times slower on a GPU.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads (`int`): widths and depth.
        num_key_value_heads (`int`, *optional*): heads of keys and values; fewer than `num_attention_heads` is
            grouped-query attention. Defaults to `num_attention_heads`.
        head_dim (`int`, *optional*): defaults to `hidden_size / num_attention_heads`; even, for the rotary positions.
        hidden_act (`str`, defaults to `"relu2"`): squared ReLU (So et al. 2021, "Primer").
        max_position_embeddings (`int`, defaults to 2048): the context the model is trained with, in ticks.
        rope_parameters (`dict`, *optional*): rotary positions, as in every transformers model.
        sliding_window (`int`, *optional*): how many ticks attention sees, the present one among them, in training, in
            the cache and in generation; at least 2. Defaults to all of them. Samples that are no longer than it train
            with the kernels of full attention.
        initializer_range (`float`, defaults to 0.02): standard deviation of the initial weights.
        tie_word_embeddings (`bool`, defaults to `True`): `internal_text` is read off the token table itself.

    Special tokens (`int`, *optional*): `bos_token_id` and `eos_token_id` default to GPT-2's 50256, `null_token_id` (the
        learned "present but silent") to 50257, `pad_token_id` to 50258, where the vocabulary has them.

    Loss:
        loss_weights (`dict[str, float]`): one weight per output stream; a stream of weight 0 is not computed in
            training. Streams left out of the dict weigh 0.
        null_loss_weight (`float`, defaults to 0.3): weight of a target that is NULL, a known silence.

    Senses and streams:
        sense_hidden_size (`int`, defaults to 512): hidden width of the small encoders and of the animation head.
        num_mel_bins, audio_frames_per_tick (`int`): one tick of sound is their product in log-mel values.
        num_cameras (`int`, defaults to 2): cameras that see at the same time, two eyes by default.
        vision_image_size (`int` or `[height, width]`, defaults to 64): pixels of a picture, which every convolution
            halves.
        vision_channels (`list[int]`, defaults to `[32, 64, 128, 192]`): the convolutions of the eyes, by how many
            channels come out of each.
        num_joints, subframes_per_tick (`int`): the joints of the body, sampled every 20 ms in a tick of 80 ms.
        rotation_low, rotation_high (`list[list[float]]`, *optional*): [num_joints, 3], the least and the most that each
            component of a joint's rotation vector (axis times angle, rad) is commanded to be. None is no limit; a round
            takes those of its recordings.
        body_state_size (`int`, defaults to 0): any other numbers that the body measures, such as a robot's motor angles
            and torques.
        body_state_mean, body_state_std (`list[float]`, *optional*): what the processor subtracts from these numbers and
            divides them by; `body_state_names` (`list[str]`, *optional*): what they are called.
        num_touch_points, num_touch_surfaces, touch_embedding_size (`int`): ids of skin points and of what they touch.
        num_audio_codebooks, audio_codebook_size, audio_code_size (`int`): codec codes per tick and the width of their
            factorized tables.
        depth_hidden_size, depth_num_layers, depth_num_heads (`int`): the depth decoder over the codes of one tick.
        num_blend_shapes (`int`, defaults to 51): face shapes in [0, 1]; a creature with a face has two eyes to move.
        action_size (`int`, defaults to 0): numbers of a command for a body that is not moved by joint rotations, such
            as a robot's motor angles and gripper.
        action_mean, action_std (`list[float]`, *optional*), action_names (`list[str]`, *optional*): as of `body_state`.

    A creature without an organ has none of its parameters: `num_mel_bins`, `num_cameras`, `num_joints`,
    `body_state_size`, `num_touch_points`, `num_audio_codebooks`, `num_blend_shapes` and `action_size` may be 0.

    Raises:
        `ValueError`: with every problem of the values at once.
    """

    model_type = "creature"
    keys_to_ignore_at_inference = ["past_key_values", "losses", "last_hidden_state"]
    default_theta = 10000.0

    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (
            ["hidden_states", "first_values", "attention_mask"],
            ["hidden_states", "values"],
        ),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50304
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "relu2"
    max_position_embeddings: int = 2048
    rope_parameters: RopeParameters | dict | None = None
    sliding_window: int | None = None
    rms_norm_eps: float | int = 1e-6
    initializer_range: float | int = 0.02
    attention_dropout: float | int = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    null_token_id: int | None = None
    pad_token_id: int | None = None

    loss_weights: dict | None = None
    null_loss_weight: float | int = 0.3

    sense_hidden_size: int = 512
    num_mel_bins: int = 64
    audio_frames_per_tick: int = 8
    num_cameras: int = 2
    vision_image_size: int | list[int] = 64
    vision_channels: list[int] | None = None
    num_joints: int = 24
    subframes_per_tick: int = 4
    rotation_low: list[list[float]] | None = None
    rotation_high: list[list[float]] | None = None
    body_state_size: int = 0
    body_state_mean: list[float] | None = None
    body_state_std: list[float] | None = None
    body_state_names: list[str] | None = None
    num_touch_points: int = 1024
    num_touch_surfaces: int = 64
    touch_embedding_size: int = 64
    num_audio_codebooks: int = 8
    audio_codebook_size: int = 1024
    audio_code_size: int = 128
    depth_hidden_size: int = 256
    depth_num_layers: int = 3
    depth_num_heads: int = 4
    num_blend_shapes: int = 51
    action_size: int = 0
    action_mean: list[float] | None = None
    action_std: list[float] | None = None
    action_names: list[str] | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        defaults = {
            "bos_token_id": END_OF_TEXT_ID,
            "eos_token_id": END_OF_TEXT_ID,
            "null_token_id": NULL_ID,
            "pad_token_id": PAD_ID,
        }
        for name, token in defaults.items():
            if getattr(self, name) is None and token < self.vocab_size:
                setattr(self, name, token)
        if self.vision_channels is None:
            self.vision_channels = [32, 64, 128, 192]
        given = {"internal_text": 1.0} if self.loss_weights is None else self.loss_weights
        self.loss_weights = {**dict.fromkeys(STREAMS, 0.0), **given}
        if any([kwargs.pop(name, None) for name in REMOVED_FIELDS]):
            raise ValueError(
                "CreatureConfig: this model was trained with further tables by token (use_value_embeddings, "
                "per_layer_embedding_size), which are gone: load it with the version that trained it, or train anew."
            )
        super().__post_init__(**kwargs)
        # Here, and not only as the validator that runs later, so that the user meets a plain ValueError.
        self.validate_architecture()

    @property
    def audio_feature_size(self) -> int:
        """Log-mel values in one tick of sound."""
        return self.num_mel_bins * self.audio_frames_per_tick

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of a picture in pixels."""
        size = self.vision_image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def animation_size(self) -> int:
        """Numbers in one tick of animation: joint rotations as quaternions; of a face, blend shapes and two eyes."""
        face = self.num_blend_shapes + 2 * 4 if self.num_blend_shapes else 0
        return self.subframes_per_tick * self.num_joints * 4 + face

    def validate_architecture(self):
        """Raise one `ValueError` that names every value that cannot work, each with what would."""
        problems = []
        for name in _POSITIVE_FIELDS:
            # head_dim follows from two other sizes, and is not to be blamed for theirs.
            if getattr(self, name) < 1 and not (name == "head_dim" and problems):
                problems.append(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in _ORGAN_FIELDS:
            if getattr(self, name) < 0:
                problems.append(f"{name} is {getattr(self, name)}; it must be at least 0, for none")
        if not isinstance(self.vision_image_size, int) and len(self.vision_image_size) != 2:
            problems.append(f"vision_image_size is {self.vision_image_size}; it must be a number or [height, width]")
        elif min(self.image_shape) < 1:
            problems.append(f"vision_image_size is {self.vision_image_size}; it must be at least 1")
        if min(self.vision_channels, default=0) < 1:
            problems.append(f"vision_channels is {self.vision_channels}; it must hold numbers of at least 1")
        if not problems:
            problems += self._shape_problems()
        problems += self._loss_problems()
        if problems:
            raise ValueError("CreatureConfig: " + "; ".join(problems) + ".")

    def _shape_problems(self) -> list[str]:
        problems = []
        for total, parts in (
            ("num_attention_heads", "num_key_value_heads"),
            ("depth_hidden_size", "depth_num_heads"),
        ):
            if getattr(self, total) % getattr(self, parts):
                problems.append(
                    f"{total} ({getattr(self, total)}) must be a multiple of {parts} ({getattr(self, parts)})"
                )
        if any(size % 2 ** len(self.vision_channels) for size in self.image_shape):
            problems.append(
                f"vision_image_size ({self.vision_image_size}) must be a multiple of {2 ** len(self.vision_channels)}, "
                "in height and width: each of the vision_channels halves it"
            )
        problems += self._statistics_problems("body_state") + self._statistics_problems("action")
        problems += self._limit_problems()
        # A head_dim that is the rounded quotient was derived and not chosen; any other one is free of hidden_size.
        rounded = self.head_dim == self.hidden_size // self.num_attention_heads
        if self.hidden_size % self.num_attention_heads and rounded:
            problems.append(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}), unless head_dim says otherwise"
            )
        if self.sliding_window is not None and self.sliding_window < 2:  # transformers' caches keep all but one tick
            problems.append(f"sliding_window is {self.sliding_window}; it must be at least 2, or None for all ticks")
        if self.head_dim % 2:
            problems.append(f"head_dim ({self.head_dim}) must be even for rotary positions")
        ends = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        named_ids = [(name, getattr(self, name)) for name in ("bos_token_id", "null_token_id", "pad_token_id")]
        named_ids += [("eos_token_id", end) for end in ends]
        for name, token in named_ids:
            if token is not None and token < 0:
                problems.append(f"{name} is {token}; it must be at least 0, or None")
            elif token is not None and token >= self.vocab_size:
                problems.append(
                    f"vocab_size ({self.vocab_size}) is smaller than the tokenizer needs: {name} is {token}"
                )
        for name in _SHARE_FIELDS:
            if not 0.0 <= getattr(self, name) <= 1.0:
                problems.append(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if not 0.0 < self.rms_norm_eps < float("inf"):
            problems.append(f"rms_norm_eps is {self.rms_norm_eps}; it must be more than 0")
        if self.hidden_act not in ACT2FN:
            problems.append(f"hidden_act {self.hidden_act!r} is unknown; known are {', '.join(sorted(ACT2FN))}")
        return problems

    def _statistics_problems(self, name: str) -> list[str]:
        """What is wrong with the statistics `<name>_mean`, `<name>_std`, `<name>_names` of `<name>_size` numbers."""
        problems, size = [], getattr(self, f"{name}_size")
        for field in (f"{name}_mean", f"{name}_std", f"{name}_names"):
            values = getattr(self, field)
            if values is not None and len(values) != size:
                problems.append(f"{field} has {len(values)} entries; {name}_size is {size}")
        if not all(0 < value < float("inf") for value in getattr(self, f"{name}_std") or ()):
            problems.append(f"{name}_std must hold numbers above 0")
        return problems

    def _limit_problems(self) -> list[str]:
        """What is wrong with `rotation_low` and `rotation_high`."""
        limits = {name: getattr(self, name) for name in ("rotation_low", "rotation_high")}
        if all(values is None for values in limits.values()):
            return []
        problems = [
            f"{name} must hold three numbers for each of num_joints ({self.num_joints}) joints"
            for name, values in limits.items()
            if values is None or len(values) != self.num_joints or any(len(joint) != 3 for joint in values)
        ]
        pairs = [] if problems else zip(*(sum(values, []) for values in limits.values()), strict=True)
        if not all(-float("inf") < low <= high < float("inf") for low, high in pairs):
            problems.append("rotation_low must not be above rotation_high")
        return problems

    def _loss_problems(self) -> list[str]:
        problems = []
        for stream, weight in self.loss_weights.items():
            if stream not in STREAMS:
                known = ", ".join(STREAMS)
                problems.append(f"loss_weights names the unknown stream {stream!r}; the streams are {known}")
            elif isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
                problems.append(f"loss_weights[{stream!r}] is {weight!r}; it must be a number of at least 0")
        if not 0 <= self.null_loss_weight < float("inf"):
            problems.append(f"null_loss_weight is {self.null_loss_weight}; it must be at least 0")
        return problems


# `creature/settings.py` reads these two lists as well, to report all problems with the settings at once.
_SHARE_FIELDS = ("attention_dropout", "initializer_range")
_POSITIVE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sense_hidden_size",
    "audio_frames_per_tick",
    "subframes_per_tick",
    "num_touch_surfaces",
    "touch_embedding_size",
    "audio_codebook_size",
    "audio_code_size",
    "depth_hidden_size",
    "depth_num_layers",
    "depth_num_heads",
)
# 0 in a creature without the organ.
_ORGAN_FIELDS = (
    "num_mel_bins",
    "num_cameras",
    "num_joints",
    "body_state_size",
    "num_touch_points",
    "num_audio_codebooks",
    "num_blend_shapes",
    "action_size",
)

CreatureConfig.register_for_auto_class()
# `transformers serve` reads the configuration alone before it decides how to load a model. What is not listed here it
# looks for inside of transformers, where a creature is not.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["creature"] = "MultiModalCreature"

__all__ = ["CreatureConfig"]
