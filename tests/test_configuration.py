"""CreatureConfig: its defaults, what it refuses and in which words, and its way through a file."""

import json

import pytest
from creatures import EVERY_WEIGHT, micro_config
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig

from configuration_creature import SENSES, STREAMS, CreatureConfig


def test_defaults_are_the_guides_tiny_creature():
    config = CreatureConfig()
    shape = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size)
    assert shape == (6, 512, 8, 2048)
    assert config.max_position_embeddings == 2048
    assert (config.head_dim, config.num_key_value_heads) == (64, 8)
    assert config.loss_weights == {"internal_text": 1.0, "external_text": 0.0, "audio": 0.0, "animation": 0.0}
    assert config.audio_feature_size == 512
    assert config.vocab_size == 50304 and config.vocab_size % 64 == 0
    assert len(SENSES) == 6 and len(STREAMS) == 4


def test_special_tokens_are_three_different_ids():
    config = CreatureConfig()
    # End-of-text is not NULL, and NULL is not padding: one id for two meanings trains the wrong thing.
    assert (config.bos_token_id, config.eos_token_id) == (50256, 50256)
    assert len({config.eos_token_id, config.null_token_id, config.pad_token_id}) == 3
    assert max(config.null_token_id, config.pad_token_id) < config.vocab_size
    small = CreatureConfig(vocab_size=256)
    assert small.eos_token_id is small.null_token_id is small.pad_token_id is None


def test_loss_weights_are_completed_with_zeros_and_not_shared():
    config = CreatureConfig(loss_weights={"audio": 2})
    assert config.loss_weights == {"internal_text": 0.0, "external_text": 0.0, "audio": 2, "animation": 0.0}
    CreatureConfig().loss_weights["audio"] = 9.0
    assert CreatureConfig().loss_weights["audio"] == 0.0


def test_grouped_query_heads_and_explicit_head_dim():
    config = CreatureConfig(num_key_value_heads=2)
    assert config.num_key_value_heads == 2
    # With a head_dim of its own, the heads need not divide hidden_size.
    assert CreatureConfig(num_attention_heads=6, head_dim=64).head_dim == 64


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(num_attention_heads=7), "multiple of num_attention_heads"),
        (dict(num_attention_heads=8, num_key_value_heads=3), "multiple of num_key_value_heads"),
        (dict(hidden_size=-512), "hidden_size is -512; it must be at least 1"),
        (dict(num_attention_heads=0), "num_attention_heads is 0"),
        (dict(num_hidden_layers=0), "num_hidden_layers is 0"),
        (dict(head_dim=33), "head_dim"),
        (dict(sliding_window=1), "sliding_window is 1; it must be at least 2, or None"),
        (dict(hidden_act="wiggle"), "wiggle"),
        (dict(rms_norm_eps=-1e-6), "rms_norm_eps"),
        (dict(loss_weights={"smell": 1.0}), "unknown stream 'smell'"),
        (dict(loss_weights={"audio": -1.0}), "loss_weights['audio'] is -1.0"),
        (dict(loss_weights={"audio": "much"}), "'much'"),
        (dict(loss_weights={"audio": float("nan")}), "nan"),
        (dict(loss_weights={"audio": True}), "True"),
        (dict(null_loss_weight=-0.1), "null_loss_weight is -0.1"),
        (dict(vocab_size=50000, eos_token_id=50256), "smaller than the tokenizer needs: eos_token_id is 50256"),
        (dict(vocab_size=50257, eos_token_id=[50256, 50300]), "eos_token_id is 50300"),
        (dict(vocab_size=50257, null_token_id=50257), "null_token_id is 50257"),
        (dict(null_token_id=-1), "null_token_id is -1"),
        (dict(attention_dropout=1.5), "attention_dropout is 1.5"),
        (dict(use_value_embeddings=True), "further tables by token"),
        (dict(per_layer_embedding_size=64), "further tables by token"),
        (dict(vision_image_size=30, vision_channels=[8, 8]), "vision_image_size (30) must be a multiple of 4"),
        (dict(vision_image_size=[64, 40]), "([64, 40]) must be a multiple of 16, in height and"),
        (dict(vision_image_size=[64]), "vision_image_size is [64]; it must be a number or [height, width]"),
        (dict(vision_image_size=[64, 0]), "vision_image_size is [64, 0]; it must be at least 1"),
        (dict(num_cameras=-1), "num_cameras is -1; it must be at least 0, for none"),
        (dict(body_state_size=2, body_state_mean=[0.0]), "body_state_mean has 1 entries; body_state_size is 2"),
        (dict(action_size=2, action_std=[1.0, 0.0]), "action_std must hold numbers above 0"),
        (dict(body_state_names=["knee"]), "body_state_names has 1 entries; body_state_size is 0"),
        (dict(body_state_size=1, body_state_std=[0.0]), "body_state_std must hold numbers above 0"),
        (
            dict(num_joints=1, rotation_low=[[0.0] * 3]),
            "rotation_high must hold three numbers for each",
        ),
        (dict(num_joints=2, rotation_low=[[0.0] * 3], rotation_high=[[1.0] * 3] * 2), "rotation_low must hold three"),
        (dict(num_joints=1, rotation_low=[[2.0] * 3], rotation_high=[[1.0] * 3]), "must not be above rotation_high"),
        (dict(vision_channels=[8, 0]), "vision_channels is [8, 0]; it must hold numbers of at least 1"),
        (dict(depth_num_heads=3), "multiple of depth_num_heads"),
        (dict(num_blend_shapes=-1), "num_blend_shapes is -1; it must be at least 0"),
    ],
)
def test_bad_values_raise_in_words(values, words):
    with pytest.raises(ValueError) as caught:
        CreatureConfig(**values)
    assert words in str(caught.value)


@pytest.mark.parametrize("values", [dict(hidden_size="512"), dict(hidden_size=5.5), dict(tie_word_embeddings="yes")])
def test_wrong_types_are_refused(values):
    # Only with `@strict` on this very class, and without `from __future__ import annotations` in its file.
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(values))):
        CreatureConfig(**values)


def test_all_problems_are_reported_at_once():
    with pytest.raises(ValueError) as caught:
        CreatureConfig(
            num_attention_heads=7, depth_num_heads=3, attention_dropout=2.0, loss_weights={"smell": 1.0, "audio": -1}
        )
    message = str(caught.value)
    for words in ("num_attention_heads", "depth_num_heads", "attention_dropout", "smell", "loss_weights['audio']"):
        assert words in message
    with pytest.raises(ValueError) as caught:
        CreatureConfig(hidden_size=0, num_mel_bins=-1, null_loss_weight=-1.0)
    for words in ("hidden_size", "num_mel_bins", "null_loss_weight"):
        assert words in str(caught.value)


def test_through_a_file(tmp_path):
    statistics = dict(body_state_mean=[0.5, 1.0], body_state_std=[1.0, 2.0], body_state_names=["knee", "hip"])
    config = micro_config(null_loss_weight=0.25, vision_image_size=[8, 12], **statistics)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved["model_type"] == "creature"
    again = CreatureConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.loss_weights == EVERY_WEIGHT


def test_known_to_auto_config(tmp_path):
    import modeling_creature  # noqa: F401  registers the classes

    micro_config().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is CreatureConfig
    assert type(AutoConfig.for_model("creature", vocab_size=256)) is CreatureConfig
