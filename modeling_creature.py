# Copyright 2026 The MultiModalCreature developers. Licensed under the Apache License, Version 2.0.
"""MultiModalCreature: one causal transformer over ticks; senses are summed into it, streams hang on its last state."""

import inspect
import os
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

try:
    from .configuration_creature import SENSES, STREAMS, CreatureConfig
    from .generation_creature import CreatureGenerationMixin
    from .layers_creature import (
        CreatureAttention,
        CreatureDecoderLayer,
        CreatureRMSNorm,
        CreatureRotaryEmbedding,
        ResidualProjection,
        ZeroProjection,
    )
    from .losses_creature import IGNORE_INDEX, linear_cross_entropy, linear_token_losses
    from .motor_creature import COMMAND_PARTS, CommandProjection, last_command
    from .senses_creature import (
        NO_INPUT,
        SENSE_TABLE,
        CreatureSenses,
        Halving,
        SenseProjection,
        check_ids,
        check_names,
        check_shapes,
        unknown_argument,
    )
    from .streams_creature import CreatureStreams, keep_ticks, mean_losses, text_loss, text_target_weights
except ImportError:
    from configuration_creature import SENSES, STREAMS, CreatureConfig
    from generation_creature import CreatureGenerationMixin
    from layers_creature import (
        CreatureAttention,
        CreatureDecoderLayer,
        CreatureRMSNorm,
        CreatureRotaryEmbedding,
        ResidualProjection,
        ZeroProjection,
    )
    from losses_creature import IGNORE_INDEX, linear_cross_entropy, linear_token_losses
    from motor_creature import COMMAND_PARTS, CommandProjection, last_command
    from senses_creature import (
        NO_INPUT,
        SENSE_TABLE,
        CreatureSenses,
        Halving,
        SenseProjection,
        check_ids,
        check_names,
        check_shapes,
        unknown_argument,
    )
    from streams_creature import CreatureStreams, keep_ticks, mean_losses, text_loss, text_target_weights

# What `forward` accepts beside its own parameters; anything else is a mistake.
KNOWN_KWARGS = (
    TransformersKwargs.__required_keys__
    | TransformersKwargs.__optional_keys__
    | {"return_dict", "shift_labels"}
    | {"attention_instances", "forward_batch"}  # for the attention that vLLM and SGLang put in place of ours
)


@dataclass
class CreatureOutput(ModelOutput):
    """
    What one forward pass returns; fields that were not asked for are None.

    Args:
        loss: scalar, the weighted sum of the streams' losses.
        logits: [B, T or logits_to_keep, vocab_size], of the internal text.
        losses: the detached loss of every stream that was computed, by name.
        token_losses: [B, T - 1] float32, the loss of every next token in nats, 0 where its label is -100
            (in evaluation with `return_logits=False`).
        predictions: [B, T - 1] the likeliest next tokens (with `token_losses`).
        external_text_logits: [B, T, vocab_size] (with `output_streams`, as the next two).
        audio_logits: [B, T, codebooks, codebook_size]; each code given the targets before it in its tick, or, without
            targets, given the likeliest codes.
        animation: [B, T, animation_size], see `motor_creature.pack_animation`.
        action: [B, T, 4, action_size] normalised (both with the stream "animation", as far as the body has them).
        last_hidden_state: [B, T, hidden_size], what all streams read.
        past_key_values, hidden_states, attentions: as in every transformers model.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    losses: dict | None = None
    token_losses: torch.FloatTensor | None = None
    predictions: torch.LongTensor | None = None
    external_text_logits: torch.FloatTensor | None = None
    audio_logits: torch.FloatTensor | None = None
    animation: torch.FloatTensor | None = None
    action: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class CreaturePreTrainedModel(PreTrainedModel):
    """What every creature model declares to transformers, and how its weights begin."""

    config: CreatureConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("text", "audio", "image")
    supports_gradient_checkpointing = True
    _no_split_modules = ["CreatureDecoderLayer", "VisionSense", "TouchSense", "AudioStream"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": CreatureDecoderLayer, "attentions": CreatureAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        std = self.config.initializer_range
        # By classes of the matrices themselves: of a class from outside, transformers skips modules without weights.
        if isinstance(module, SenseProjection | ZeroProjection):
            init.zeros_(module.weight)  # a sense that is connected changes nothing until it is trained
        elif isinstance(module, CreatureDecoderLayer):
            init.ones_(module.residual_scale)
        elif isinstance(module, ResidualProjection):
            # The residual stream adds up 2 x layers outputs: scale them so that its variance does not grow (GPT-2).
            init.normal_(module.weight, mean=0.0, std=std / (2 * self.config.num_hidden_layers) ** 0.5)
        elif isinstance(module, Halving):
            init.normal_(module.weight, mean=0.0, std=module.in_features**-0.5)  # as loud behind it as before
        elif isinstance(module, CommandProjection):
            init.normal_(module.weight, mean=0.0, std=std / 100)


class CreatureModel(CreaturePreTrainedModel):
    """The backbone: the token table, the senses, the layers."""

    _keys_to_ignore_on_load_unexpected = [r"^streams\."]  # of a whole creature's checkpoint

    def __init__(self, config: CreatureConfig):
        super().__init__(config)
        # No padding_idx: GPT-2's id 0 is "!", and every row of the table is a token like any other.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(CreatureDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.embed_norm = CreatureRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm = CreatureRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = CreatureRotaryEmbedding(config)
        # Registered after `layers`, so that tools probing the first checkpointed layer find a decoder layer.
        self.senses = CreatureSenses(config)
        self.gradient_checkpointing = False
        self.post_init()

    def embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, senses: dict) -> torch.Tensor:
        """The sum of the senses present: the backbone's input, [B, T, hidden_size]."""
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("Give the internal voice once: either `input_ids` or `inputs_embeds`, not both.")
        ids, vectors = ("B", "T"), ("B", "T", self.config.hidden_size)
        check_shapes(
            {"input_ids": ids, "inputs_embeds": vectors, "sense_embeds": vectors},
            {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "sense_embeds": senses.get("sense_embeds")},
        )
        hidden_states = inputs_embeds
        if input_ids is not None:  # a negative id is an absent tick
            hidden_states = self.embed_tokens(input_ids.clamp(min=0)).masked_fill((input_ids < 0)[..., None], 0.0)
        others = self.senses({name: senses[name] for name in senses if name != "sense_embeds"}, self.embed_tokens)
        if senses.get("sense_embeds") is not None:
            others.append(senses["sense_embeds"])
        if hidden_states is None:
            if not others:
                raise ValueError(NO_INPUT)
            # A creature without an internal voice at any tick: the sum begins at the first sense that is there.
            hidden_states = others.pop(0)
        for vectors in others:
            if vectors.shape[:2] != hidden_states.shape[:2]:  # or a single row or tick would be broadcast
                raise ValueError(
                    f"The senses differ in rows and ticks, {tuple(vectors.shape[:2])} and "
                    f"{tuple(hidden_states.shape[:2])}: give every sense the same [B, T]."
                )
            hidden_states = hidden_states + vectors.to(hidden_states.dtype)
        return hidden_states

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        senses: dict | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Ticks in, hidden states out.

        input_ids [B, T] or inputs_embeds [B, T, hidden_size]; `senses`: the other sense arguments of
        `MultiModalCreature.forward` in one dict; the rest as in every transformers decoder.

        Raises:
            TypeError, ValueError: as `MultiModalCreature.forward`.
        """
        _check_kwargs(CreatureModel, kwargs)
        hidden_states = self.embed(input_ids, inputs_embeds, senses or {})
        device_type = hidden_states.device.type
        if torch.is_autocast_enabled(device_type):
            # The residual stream is what a training step reads and writes most: keep it in the compute dtype.
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device_type))

        # The norm brings the sum to one scale, however many senses are in it.
        hidden_states = self.embed_norm(hidden_states)

        # Without a mask, sdpa uses its own causal flag. transformers would choose that too, except in graphs compiled
        # before torch 2.14: there it writes out the mask, and training is a quarter slower (docs/experiments.md).
        causal_mask, window = None, self.config.sliding_window
        unmasked = attention_mask is None and past_key_values is None and position_ids is None
        unmasked = unmasked and (window is None or hidden_states.shape[1] <= window)
        if not (unmasked and self.config._attn_implementation == "sdpa"):
            create_mask = create_causal_mask if window is None else create_sliding_window_causal_mask
            causal_mask = create_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                # Only positions that the caller chose can mean packed documents.
                position_ids=position_ids,
            )
        # After the mask, because with a cache, even an empty one, transformers does not look for packed documents.
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past_seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + past_seen)[None]
        position_embeddings = self.rotary_emb(hidden_states, position_ids)

        first_values = None
        # As many as the configuration says: `generate(assistant_early_exit=n)` drafts tokens with the first n of them.
        for layer in islice(self.layers, self.config.num_hidden_layers):
            hidden_states, values = layer(
                hidden_states,
                first_values,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            first_values = values if first_values is None else first_values
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )


def _check_kwargs(kind: type[nn.Module], kwargs: dict) -> None:
    """TypeError for arguments that `forward` of a class does not know: a misspelt sense would be absent in silence."""
    for name in kwargs:
        if name not in KNOWN_KWARGS:
            known = {*inspect.signature(kind.forward).parameters, *KNOWN_KWARGS} - {"self", "kwargs"}
            raise unknown_argument("forward", name, known)


class MultiModalCreature(CreaturePreTrainedModel, CreatureGenerationMixin, GenerationMixin):
    """The creature: six senses in, four streams out, one backbone between them."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: CreatureConfig):
        super().__init__(config)
        self.model = CreatureModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.streams = CreatureStreams(config)
        # The class name is in none of transformers' tables; without this the Trainer counts unshifted targets.
        self.loss_type = "ForCausalLM"
        # `creature.fast.apply` puts a faster one here.
        self.text_cross_entropy = linear_cross_entropy
        self.post_init()

    def train_only(self, senses=("internal_voice",), streams=("internal_text",), backbone: bool = True) -> None:
        """
        Freeze everything that is not named, so that optimizer, DDP and FSDP see live weights only.

        Args:
            senses: names out of `SENSES`. The internal voice is the token table, which every sense and stream of text
                shares: it is trained where one of them is.
            streams: names out of `STREAMS`; the efference copy of a stream is trained with it.
            backbone: False freezes the token table and the layers, and with them the internal voice and text.

        Raises:
            ValueError: for an unknown name, or text in place of a tuple of names.
        """
        check_names("senses", senses, SENSES)
        check_names("streams", streams, STREAMS)
        self.model.requires_grad_(backbone)
        texts = {"internal_voice", "external_voice", "internal_text", "external_text"}
        has_text = not texts.isdisjoint((*senses, *streams))
        self.model.embed_tokens.requires_grad_(backbone and has_text)
        if self.lm_head.weight is not self.model.embed_tokens.weight:
            self.lm_head.requires_grad_(backbone and "internal_text" in streams)
        for sense in SENSE_TABLE:
            if hasattr(self.model.senses, sense.name):
                trained = sense.copy_of in streams if sense.copy_of else sense.name in senses
                getattr(self.model.senses, sense.name).requires_grad_(trained)
        for name in self.streams.names[1:]:
            getattr(self.streams, name).requires_grad_(name in streams)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """As in transformers; config.json also says how to load the folder's code as a backbone, and for serving."""
        # transformers writes the one auto class that a class is registered for; `transformers serve` asks for another.
        others = {"AutoModel": CreatureModel, "AutoModelForMultimodalLM": type(self)}
        names = {auto: f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}" for auto, kind in others.items()}
        self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | names
        super().save_pretrained(save_directory, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        external_voice_ids: torch.LongTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        input_features_mask: torch.BoolTensor | None = None,
        pixel_values: torch.ByteTensor | None = None,
        pixel_mask: torch.BoolTensor | None = None,
        joint_positions: torch.FloatTensor | None = None,
        joint_rotations: torch.FloatTensor | None = None,
        body_state: torch.FloatTensor | None = None,
        body_mask: torch.BoolTensor | None = None,
        touch_points: torch.LongTensor | None = None,
        touch_surfaces: torch.LongTensor | None = None,
        touch_values: torch.FloatTensor | None = None,
        touch_mask: torch.BoolTensor | None = None,
        external_text_ids: torch.LongTensor | None = None,
        audio_codes: torch.LongTensor | None = None,
        animation: torch.FloatTensor | None = None,
        animation_mask: torch.BoolTensor | None = None,
        action: torch.FloatTensor | None = None,
        action_mask: torch.BoolTensor | None = None,
        sense_embeds: torch.FloatTensor | None = None,
        external_text_targets: torch.LongTensor | None = None,
        audio_targets: torch.LongTensor | None = None,
        rotation_targets: torch.FloatTensor | None = None,
        blend_shape_targets: torch.FloatTensor | None = None,
        eye_targets: torch.FloatTensor | None = None,
        action_targets: torch.FloatTensor | None = None,
        animation_target_mask: torch.BoolTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        further_targets: torch.Tensor | None = None,
        output_streams: tuple[str, ...] = (),
        return_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CreatureOutput:
        r"""
        B rows of T ticks; a sense that is None is absent, costs nothing and changes nothing.

        Args:
            input_ids: [B, T] the internal voice (or `inputs_embeds` [B, T, hidden_size] in its place).
            external_voice_ids: [B, T] text heard or read; negative where absent, NULL where silent.
            input_features: [B, T, 512] 8 causal log-mel frames of 10 ms x 64 bands a tick; `input_features_mask`
                [B, T].
            pixel_values: [B, T, cameras, 3, H, W] bytes from 0 to 255; `pixel_mask` [B, T].
            joint_positions, joint_rotations: [B, T, 4, 24, 3] m in the pelvis frame and [B, T, 4, 24, 4] unit
                quaternions (w, x, y, z); `body_mask` [B, T]. Rotations alone are not felt, but are the pose that
                animation starts from.
            body_state: [B, T, 4, body_state_size] what else the body measures, normalised by the configuration's
                `body_state_mean` and `body_state_std`; present where `body_mask` is.
            touch_points, touch_surfaces, touch_values: [B, T, C] ids, [B, T, C] ids, [B, T, C, 5] (force N, place
                x, y, z m, temperature C) of up to C contacts; `touch_mask` [B, T, C].
            external_text_ids, audio_codes, animation, action: efference copies, what the creature emitted for this
                tick, as its targets say it: [B, T] ids and [B, T, 8] codes, negative where absent, [B, T,
                animation_size] with `animation_mask` [B, T], [B, T, 4, action_size] with `action_mask` [B, T].
            sense_embeds: [B, T, hidden_size] senses encoded before, see `encode_senses`.
            labels, external_text_targets: [B, T] unshifted ids, -100 where unknown. (`shift_labels` [B, T], in place of
                `labels`, holds at tick t the id that tick t predicts.)
            audio_targets: [B, T, 8] codes, -100 where unknown.
            rotation_targets, blend_shape_targets, eye_targets: [B, T, 4, 24, 4] unit quaternions, [B, T, 51] in [0, 1],
                [B, T, 2, 4] (gaze direction, openness).
            action_targets: [B, T, 4, action_size], normalised by the configuration's `action_mean` and `action_std`.
            animation_target_mask: [B, T], of these four. The stream's loss is the mean over them of the error divided
                by that of repeating the last command: 1 is no better than doing so.
            num_items_in_batch: what the losses are divided by: a number for the internal text, or all that
                `streams_creature.count_targets` returns; by default that of this batch.
            further_targets: [K] float32, in training only: how much the internal text also learns the labels 2, 3, ...
                K + 1 ticks ahead, where the next one has the weight 1; what a tick learns is divided by the sum of its
                weights. None of them is beyond an end of text or a label of -100. This changes the gradients alone:
                the loss remains that of the next label.
            output_streams: names of streams whose outputs are wanted beside the internal text.
            return_logits: by default, logits are returned except in training with labels, where they would be the
                largest tensor of all. False in evaluation gives `token_losses` and `predictions` in their place.

        Raises:
            TypeError: for an unknown argument.
            ValueError: for an unknown stream, a sense or a target that this creature has no organ for, a wrong shape,
                ids out of range, two internal voices, or no input at all.
        """
        _check_kwargs(MultiModalCreature, kwargs)
        check_names("output_streams", output_streams, self.streams.names)
        check_shapes({"further_targets": ("K",)}, {"further_targets": further_targets})
        senses = {
            "external_voice_ids": external_voice_ids,
            "input_features": input_features,
            "input_features_mask": input_features_mask,
            "pixel_values": pixel_values,
            "pixel_mask": pixel_mask,
            "joint_positions": joint_positions,
            "joint_rotations": joint_rotations,
            "body_state": body_state,
            "body_mask": body_mask,
            "touch_points": touch_points,
            "touch_surfaces": touch_surfaces,
            "touch_values": touch_values,
            "touch_mask": touch_mask,
            "external_text_ids": external_text_ids,
            "audio_codes": audio_codes,
            "animation": animation,
            "animation_mask": animation_mask,
            "action": action,
            "action_mask": action_mask,
            "sense_embeds": sense_embeds,
        }
        shift_labels = kwargs.pop("shift_labels", None)
        if shift_labels is not None:
            # Under sequence parallelism a row is a piece of a text, and has the target of its last tick as well.
            labels = F.pad(shift_labels, (1, 0), value=IGNORE_INDEX)
        targets = {
            "labels": labels,
            "external_text_targets": external_text_targets,
            "audio_targets": audio_targets,
            "rotation_targets": rotation_targets,
            "blend_shape_targets": blend_shape_targets,
            "eye_targets": eye_targets,
            "action_targets": action_targets,
            "animation_target_mask": animation_target_mask,
        }
        if input_ids is not None:
            check_ids("input_ids", input_ids, self.config.vocab_size)
        if use_cache is None and (labels is not None or (position_ids is not None and past_key_values is None)):
            # A loss needs no cache, and with one transformers does not keep packed documents apart.
            use_cache = False

        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            senses=senses,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        unshifted = {} if shift_labels is None else {"labels": labels[:, 1:]}
        self.streams.check(targets | unshifted, hidden)
        felt = {"joint_rotations": joint_rotations}  # alone they are no sense, but what a command may start from
        check_shapes(self.model.senses.shapes, felt, B=hidden.shape[0], T=hidden.shape[1])
        if return_logits is None:
            return_logits = not (self.training and labels is not None)
        logits = token_losses = predictions = None
        if return_logits:
            logits = self.lm_head(keep_ticks(hidden, logits_to_keep))
        elif labels is not None and not self.training:
            flat, predicted = linear_token_losses(
                hidden[:, : labels.shape[1] - 1].flatten(0, 1), self._head(), labels[:, 1:].flatten()
            )
            token_losses, predictions = flat.view_as(labels[:, 1:]), predicted.view_as(labels[:, 1:])
        further_targets = further_targets if self.training else None
        loss, losses = self._losses(hidden, senses, targets, num_items_in_batch, token_losses, further_targets)

        return CreatureOutput(
            loss=loss,
            logits=logits,
            losses=losses,
            token_losses=token_losses,
            predictions=predictions,
            **self.streams(hidden, senses | targets, output_streams, logits_to_keep, self.model),
            past_key_values=outputs.past_key_values,
            last_hidden_state=hidden,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _losses(
        self,
        hidden: torch.Tensor,
        senses: dict,
        targets: dict,
        num_items_in_batch: torch.Tensor | float | None,
        token_losses: torch.Tensor | None,
        further_targets: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, dict | None]:
        """The weighted sum of the losses of the streams that have a weight and targets, and each of them by name."""
        weights = self.config.loss_weights
        table = self.model.embed_tokens.weight
        sums = {}
        if weights["internal_text"] and token_losses is not None and not torch.is_grad_enabled():
            # The head has run already, and without gradients its losses are all there is to know.
            sums["internal_text"] = (token_losses * text_target_weights(self.config, targets["labels"][:, 1:])).sum()
        elif weights["internal_text"] and targets["labels"] is not None:
            sums["internal_text"] = text_loss(
                self.config, hidden, self._head(), targets["labels"], self.text_cross_entropy, further_targets
            )
        if weights["external_text"] and targets["external_text_targets"] is not None:
            sums["external_text"] = self.streams.external_text.loss(
                hidden, table, targets["external_text_targets"], self.text_cross_entropy
            )
        if weights["audio"] and targets["audio_targets"] is not None:
            code_table = self.model.senses.own_voice.code_table
            sums["audio"] = self.streams.audio.loss(hidden, code_table, targets["audio_targets"])
        if weights["animation"] and any(targets[name] is not None for name in COMMAND_PARTS):
            last = last_command(self.config, senses | targets, hidden)
            sums["animation"] = self.streams.animation.loss(hidden, last, targets)  # [4], one sum for each part
        if not sums:
            return None, None
        losses = mean_losses(self.config, sums, senses | targets, num_items_in_batch)
        loss = sum(weights[name] * value for name, value in losses.items())
        return loss, {name: value.detach() for name, value in losses.items()}

    def _head(self) -> torch.Tensor | nn.Module:
        """
        The weight of the internal text's head, or the head itself where only its own forward computes the logits: with
        an adapter around it, a quantized weight, or one that is sharded over devices (a DTensor).
        """
        plain = type(self.lm_head) is nn.Linear and type(self.lm_head.weight) in (nn.Parameter, torch.Tensor)
        return self.lm_head.weight if plain else self.lm_head


AutoConfig.register("creature", CreatureConfig, exist_ok=True)
AutoModel.register(CreatureConfig, CreatureModel, exist_ok=True)
AutoModelForCausalLM.register(CreatureConfig, MultiModalCreature, exist_ok=True)
# The Trainer's label smoothing shifts labels only for models named in these tables.
MODEL_MAPPING_NAMES["creature"] = "CreatureModel"
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["creature"] = "MultiModalCreature"
CreatureModel.register_for_auto_class("AutoModel")
MultiModalCreature.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["CreatureModel", "CreatureOutput", "CreaturePreTrainedModel", "MultiModalCreature"]
