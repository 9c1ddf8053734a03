# Copyright 2026 The MultiModalCreature developers. Licensed under the Apache License, Version 2.0.
"""A tick of all streams, fast: a cache written in place, both texts from one product, on a GPU a CUDA graph."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

try:
    from .decoding_creature import SHORTEST, Decoder, DecodingCache, fingerprint, head_logits, is_bare, is_recordable
    from .losses_creature import compute_dtype
    from .motor_creature import COMMAND_PARTS
    from .sampling_creature import Sampling
except ImportError:
    from decoding_creature import SHORTEST, Decoder, DecodingCache, fingerprint, head_logits, is_bare, is_recordable
    from losses_creature import compute_dtype
    from motor_creature import COMMAND_PARTS
    from sampling_creature import Sampling


class Stepper(Decoder):
    """
    What the ticks so far left behind in the backbone, and the step to the next one; `past_key_values` of `step`.

    It holds no reference to the model. Without a window, its memory grows with the ticks.

    Args:
        model: a MultiModalCreature, as it will be called.
        rows: B.
        window: how many ticks attention sees, the present one among them; by default the configuration's.
    """

    def __init__(self, model: nn.Module, rows: int = 1, window: int | None = None):
        config = model.config
        window = window or config.sliding_window
        weight = model.lm_head.weight
        self.tick, self.windowed = stream_tick, window is not None
        self.graph, self.fingerprint, self.recorded = None, None, None
        self.recordable = is_bare(model) and is_recordable(model)
        self.ticks = 0
        with torch.inference_mode(False):  # inference tensors could not be written outside of inference mode
            like = torch.empty(
                rows, config.num_key_value_heads, 0, config.head_dim, dtype=compute_dtype(weight), device=weight.device
            )
            self.cache = DecodingCache([(like, like)] * config.num_hidden_layers, window or SHORTEST)
            self.cache.visible = 0
            self.position_ids = torch.zeros(rows, 1, dtype=torch.long, device=weight.device)
            self.mask = like.new_full((rows, 1, 1, self.cache.length), float("-inf"))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The ticks so far."""
        return self.ticks

    def load(
        self,
        prefilled: Cache,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> "Stepper":
        """
        Go on where a pass over several ticks has left its cache; returns itself.

        attention_mask [B, ticks], position_ids [B or 1, ticks]: of that pass, where rows were padded.
        """
        self.ticks = int(prefilled.get_seq_length())
        held = min(self.cache.length, prefilled.layers[0].keys.shape[2]) if self.windowed else self.ticks
        self._make_room(held)
        for buffers, name in ((self.cache.keys, "keys"), (self.cache.values, "values")):
            for buffer, layer in zip(buffers, prefilled.layers, strict=True):
                buffer[:, :, :held] = getattr(layer, name)[:, :, -held:]
        self.mask[..., :held] = 0
        self.cache.visible = held
        self.cache.slot.fill_(held % self.cache.length if self.windowed else held)
        self.position_ids.fill_(self.ticks)
        if position_ids is not None:
            self.position_ids.copy_(position_ids[:, -1:] + 1)
        if attention_mask is not None:
            self.mask[..., :held].masked_fill_(attention_mask[:, None, None, -held:] == 0, float("-inf"))
        return self

    def __call__(
        self,
        model: nn.Module,
        vectors: torch.Tensor,
        last: dict[str, torch.Tensor],
        streams: tuple[str, ...],
        sampling: Sampling,
        noise: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """
        One tick.

        Args:
            vectors: [B, 1, hidden_size] the sum of the senses. last: of `last_command`, {} without animation.
            streams: to emit. sampling, noise: of the audio stream, see `AudioStream.emit`.

        Returns:
            See `stream_tick`.
        """
        inputs = {"vectors": vectors, **last} | ({} if noise is None else {"noise": noise})
        if not self.windowed:
            self._make_room(self.ticks + 1)
        self.ticks += 1
        self.how = (streams, sampling)
        self.cache.visible = min(self.cache.visible + 1, self.cache.length)
        if not self.recordable:
            self.inputs = inputs
            return self._pass(model, self.tick)
        wanted = (streams, sampling, self.cache.length, *inputs)
        if self.recorded != wanted or self.fingerprint != fingerprint(model):
            self._record(model, inputs, wanted)
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        self.graph.replay()
        return {name: value.clone() for name, value in self.outputs.items()}

    def _outputs(self, model: nn.Module, tick, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return tick(model, self.inputs, self.position_ids, mask, self.cache, *self.how)

    def _record(self, model: nn.Module, inputs: dict[str, torch.Tensor], wanted: tuple) -> None:
        """Record the step as a CUDA graph; what its trial runs write is undone."""
        self.cache.visible = self.cache.length  # a graph reads all slots, masked
        with torch.inference_mode(False):
            self.inputs = {name: value.clone() for name, value in inputs.items()}
            state = [*self.cache.keys, *self.cache.values, self.cache.slot, self.position_ids, self.mask]
            before = [value.clone() for value in state]
            self.capture(model)
            for value, kept in zip(state, before, strict=True):
                value.copy_(kept)
        self.recorded = wanted

    def _make_room(self, ticks: int) -> None:
        """Slots for so many ticks, twice as many where there are too few."""
        with torch.inference_mode(False):
            while ticks > self.cache.length:
                self.mask = F.pad(self.mask, (0, self.cache.length), value=float("-inf"))
                self.cache.extend(2 * self.cache.length)


def can_step(model: nn.Module) -> bool:
    """Whether a [`Stepper`] gives what `forward` gives; else `step` goes through `forward`."""
    return (
        not model.training
        # Hooks of submodules run; those of the whole model, such as accelerate's, would not.
        and not (model._forward_hooks or model._forward_pre_hooks or "forward" in model.__dict__)
        and model.config._attn_implementation in ("sdpa", "eager")  # others need other masks
    )


def stream_tick(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    position_ids: torch.Tensor,
    mask: torch.Tensor,
    cache: DecodingCache,
    streams: tuple[str, ...],
    sampling: Sampling,
) -> dict[str, torch.Tensor]:
    """
    What the streams read off one tick: `last_hidden_state` [B, hidden_size], `logits`, `external_text_logits` [B,
    vocab_size], `audio` [B, codebooks] codes, `animation` and `action` [B, ...], as far as they are asked for.

    inputs: `vectors` [B, 1, hidden_size], the last command by its parts, `noise` for the codes.
    """
    outputs = model.model(
        inputs_embeds=inputs["vectors"], attention_mask=mask, position_ids=position_ids, past_key_values=cache
    )
    hidden = outputs.last_hidden_state[:, -1]
    found = {"last_hidden_state": hidden} | _text_logits(model, hidden, streams)
    if "audio" in streams:
        code_table = model.model.senses.own_voice.code_table
        found["audio"], _ = model.streams.audio.emit(hidden, code_table, sampling, inputs.get("noise"))
    if "animation" in streams:
        last = {name: inputs[name][:, 0] for name in COMMAND_PARTS}
        found |= model.streams.animation.emit(hidden, last)
    return found


def _text_logits(model: nn.Module, hidden: torch.Tensor, streams: tuple[str, ...]) -> dict[str, torch.Tensor]:
    head, table = model.lm_head, model.model.embed_tokens.weight
    plain = type(head) is nn.Linear and not (head._forward_hooks or head._forward_pre_hooks)
    if "external_text" not in streams:
        return {"logits": head_logits(head, hidden) if plain else head(hidden)}
    said = model.streams.external_text.proj(hidden)
    if plain and head.weight is table:
        # The table is most of what a tick reads from memory: once for both texts.
        thought, said = F.linear(torch.cat((hidden, said)), table).chunk(2)
    else:
        thought, said = head(hidden), F.linear(said, table)
    return {"logits": thought, "external_text_logits": said}


__all__ = ["Stepper", "can_step", "stream_tick"]
