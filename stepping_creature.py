# Copyright 2026 The MultiModalCreature developers. Licensed under the Apache License, Version 2.0.
"""A tick of all senses and streams, fast: a cache in place, both texts from one product, on a GPU a CUDA graph."""

from math import prod

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

try:
    from .decoding_creature import SHORTEST, Decoder, DecodingCache, fingerprint, head_logits, is_bare, is_recordable
    from .losses_creature import IGNORE_INDEX, compute_dtype
    from .motor_creature import COMMAND_PARTS, last_command
    from .sampling_creature import Sampling, draw_for_sample, sample
    from .senses_creature import NO_INPUT, SENSE_TABLE, check_ids, check_shapes
except ImportError:
    from decoding_creature import SHORTEST, Decoder, DecodingCache, fingerprint, head_logits, is_bare, is_recordable
    from losses_creature import IGNORE_INDEX, compute_dtype
    from motor_creature import COMMAND_PARTS, last_command
    from sampling_creature import Sampling, draw_for_sample, sample
    from senses_creature import NO_INPUT, SENSE_TABLE, check_ids, check_shapes

CONTACTS = 8  # a graph has room for a multiple of so many, so that few of their numbers need another one
# The random numbers of a tick, drawn outside of the graph: of the codes, and of `draw_for_sample` for both texts.
TEXT_NOISE = {
    name: {part: f"{name} {part}" for part in ("silence", "noise")} for name in ("external_text", "internal_text")
}
NOISE = {"audio noise", *(name for names in TEXT_NOISE.values() for name in names.values())}
# What says that a tick has none of these, which have no mask.
ABSENT = {"input_ids": IGNORE_INDEX, "inputs_embeds": 0.0, "sense_embeds": 0.0}
ABSENT |= {name: absent for sense in SENSE_TABLE if not sense.mask for name, absent in sense.arguments.items()}


class Stepper(Decoder):
    """
    What the ticks so far left behind in the backbone, and the step to the next one; `past_key_values` of `step`.

    It holds no reference to the model. Without a window, its memory grows with the ticks.

    On a GPU the whole tick is one CUDA graph, senses included. It is recorded at the first tick, and again when a sense
    arrives that it does not have; a sense that it has and that does not arrive is masked. So there are few recordings,
    whichever senses come and go, and what never arrives is never computed.

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
        self.graph, self.fingerprint, self.recorded, self.buffers = None, None, None, None
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
        senses: dict[str, torch.Tensor],
        streams: tuple[str, ...],
        sampling: dict[str, Sampling],
        noise: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """
        One tick.

        Args:
            senses: those that are there, [B, 1, ...] each, by the arguments of `forward`; on the model's device, or on
                the CPU, from where a graph fetches them all at once.
            streams: to emit. sampling: how each stream of ids is drawn. noise: of `draw_noise`.

        Returns:
            See `stream_tick`.

        Raises:
            TypeError, ValueError: as `forward`. Nothing has changed then.
        """
        inputs = senses | noise
        if not self.windowed:
            self._make_room(self.ticks + 1)
        self.how = (streams, sampling)
        if self.recordable:
            outputs = self._replay(model, inputs)
        else:
            self.cache.visible = min(self.ticks + 1, self.cache.length)
            self.inputs = {name: value.to(self.mask.device) for name, value in inputs.items()}
            outputs = self._pass(model, self.tick)
        self.ticks += 1
        return outputs

    def _pass(self, model: nn.Module, tick) -> dict[str, torch.Tensor]:
        # Before the cache is written, because it refuses what is wrong.
        self.perceived = perceive(model, self.inputs, self.how[0])
        outputs = super()._pass(model, tick)
        self.perceived = None
        return outputs

    def _outputs(self, model: nn.Module, tick, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return tick(model, self.perceived, self.position_ids, mask, self.cache, *self.how)

    def _replay(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tick as a CUDA graph, recorded where there is none that has these inputs and the present weights."""
        check(model, inputs)
        wanted = (*self.how, self.cache.length)
        fits = self.buffers is not None and self.buffers.fit(inputs)
        if fits and self.recorded == wanted and self.fingerprint == fingerprint(model):
            self.buffers.write(inputs)
        else:
            self._record(model, inputs, wanted)
        self.graph.replay()
        return {name: value.clone() for name, value in self.outputs.items()}

    def _record(self, model: nn.Module, inputs: dict[str, torch.Tensor], wanted: tuple) -> None:
        """Record the tick with these inputs and those of the graph before; what its trial runs write is undone."""
        self.graph = self.outputs = self.recorded = None  # frees the memory of the graph before
        self.cache.visible = self.cache.length  # a graph reads all slots, masked
        with torch.inference_mode(False):
            self.buffers = GraphInputs(inputs, self.buffers, self.mask.device)
            self.buffers.write(inputs)
            self.inputs = self.buffers.tensors
            state = [*self.cache.keys, *self.cache.values, self.cache.slot, self.position_ids, self.mask]
            before = [value.clone() for value in state]
            self.cache.slot.zero_()  # the trial runs would go beyond the last slot, which ends the use of the GPU
            try:
                self.capture(model)
            except BaseException:
                self.buffers = None  # or what was refused would be in the next graph as well
                raise
            finally:
                for value, kept in zip(state, before, strict=True):
                    value.copy_(kept)
        self.recorded = wanted

    def _make_room(self, ticks: int) -> None:
        """Slots for so many ticks, twice as many where there are too few."""
        with torch.inference_mode(False):
            while ticks > self.cache.length:
                self.mask = F.pad(self.mask, (0, self.cache.length), value=float("-inf"))
                self.cache.extend(2 * self.cache.length)


class GraphInputs:
    """
    What a recorded tick reads, where it reads it: `tensors` by the arguments of `forward`, each sense with its mask.

    They lie in one buffer, with a copy on the host, so that what comes from there is uploaded at once.

    Args:
        inputs: of the tick to be recorded, noise among them. before: those of the graph before, which stay.
    """

    def __init__(self, inputs: dict[str, torch.Tensor], before: "GraphInputs | None", device: torch.device):
        kept = {} if before is None else before.tensors
        layout = {name: (value.shape, value.dtype) for name, value in kept.items() if name not in NOISE}
        for name, other in (("input_ids", "inputs_embeds"), ("inputs_embeds", "input_ids")):
            if name in inputs:  # there is one inner voice
                layout.pop(other, None)
        for name, value in inputs.items():
            shape = list(value.shape)
            if name.startswith("touch"):
                known = layout[name][0][2] if name in layout else 1
                shape[2] = -(-max(shape[2], known) // CONTACTS) * CONTACTS
            layout[name] = torch.Size(shape), value.dtype
        self.masks = {}  # of each mask, the arguments that must be there
        for sense in SENSE_TABLE:
            names = tuple(name for name in sense.arguments if name in layout)
            if names and sense.mask:
                self.masks[sense.mask] = names
                layout[sense.mask] = layout[names[0]][0][: 3 if sense.name == "touch" else 2], torch.bool
        if "joint_rotations" in layout:  # which may be there without the rest of the body
            self.masks["pose_mask"] = ("joint_rotations",)
            layout["pose_mask"] = layout["body_mask"]
        self.absent = {name: ABSENT[name] for name in layout if name in ABSENT}
        places, size = {}, 0
        for name, (shape, dtype) in layout.items():
            places[name] = slice(size, size + prod(shape) * dtype.itemsize)
            size = -(-places[name].stop // 16) * 16
        self.buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        self.staging = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.tensors, self.host = (
            {name: buffer[place].view(layout[name][1]).view(layout[name][0]) for name, place in places.items()}
            for buffer in (self.buffer, self.staging)
        )

    def fit(self, inputs: dict[str, torch.Tensor]) -> bool:
        """Whether there is room for these inputs."""
        for name, value in inputs.items():
            held = self.tensors.get(name)
            if held is None or (held.dtype != value.dtype and name not in self.masks):
                return False
            if held.shape != value.shape and not (
                name.startswith("touch")
                and value.shape[2] <= held.shape[2]
                and value.shape[:2] + value.shape[3:] == held.shape[:2] + held.shape[3:]
            ):
                return False
        return True

    def write(self, inputs: dict[str, torch.Tensor]) -> None:
        """Fill in the inputs of a tick: those on the host by one copy, which is over when this returns."""
        values = dict(inputs)
        for mask, names in self.masks.items():
            given = inputs.get("body_mask" if mask == "pose_mask" else mask)
            there = all(name in inputs for name in names)
            values[mask] = False if not there else True if given is None else given
        for name, absent in self.absent.items():
            if name not in inputs:
                self.host[name].fill_(absent)
        contacts = inputs["touch_points"].shape[2] if "touch_points" in inputs else 0
        on_device = {}
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.device.type != "cpu":
                on_device[name] = value
            elif name.startswith("touch"):
                self.host[name][:, :, :contacts] = value
            else:
                self.host[name][...] = value
        if "touch_mask" in self.host:
            self.host["touch_mask"][:, :, contacts:] = False
        self.buffer.copy_(self.staging)
        for name, value in on_device.items():
            held = self.tensors[name]
            (held[:, :, :contacts] if name.startswith("touch") else held).copy_(value)


def can_step(model: nn.Module) -> bool:
    """Whether a [`Stepper`] gives what `forward` gives; else `step` goes through `forward`."""
    return (
        not model.training
        # Hooks of submodules run; those of the whole model, such as accelerate's, would not.
        and not (model._forward_hooks or model._forward_pre_hooks or "forward" in model.__dict__)
        and model.config._attn_implementation in ("sdpa", "eager")  # others need other masks
    )


def check(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """TypeError and ValueError as `perceive`, for what a recorded graph cannot see: no input, and ids out of range."""
    voices = ("input_ids", "inputs_embeds", "sense_embeds")
    if "input_ids" in inputs:
        check_ids("input_ids", inputs["input_ids"], model.config.vocab_size)
    others = {name: value for name, value in inputs.items() if name not in voices and name not in NOISE}
    if not model.model.senses.check(others) and not any(name in inputs for name in voices):
        raise ValueError(NO_INPUT)


def perceive(model: nn.Module, inputs: dict[str, torch.Tensor], streams: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """
    What `stream_tick` reads: `vectors` [B, 1, hidden_size], the sum of the senses, the noise, and where a command is
    to be emitted the last one by its parts.

    inputs: the senses of a tick by the arguments of `forward`, and noise. `pose_mask` says where `joint_rotations` are
    there, if not `body_mask`.
    """
    senses = {name: value for name, value in inputs.items() if name not in NOISE and name != "pose_mask"}
    ids, embeds = senses.pop("input_ids", None), senses.pop("inputs_embeds", None)
    if ids is not None:
        check_ids("input_ids", ids, model.config.vocab_size)
    perceived = {name: inputs[name] for name in NOISE & inputs.keys()}
    perceived["vectors"] = model.model.embed(ids, embeds, senses)
    if "animation" in streams:
        felt = {"joint_rotations": senses.get("joint_rotations")}
        check_shapes(model.model.senses.shapes, felt, B=len(perceived["vectors"]))
        pose = {"body_mask": inputs["pose_mask"]} if "pose_mask" in inputs else {}
        perceived |= last_command(model.config, senses | pose, perceived["vectors"])
    return perceived


def stream_tick(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    position_ids: torch.Tensor,
    mask: torch.Tensor,
    cache: DecodingCache,
    streams: tuple[str, ...],
    sampling: dict[str, Sampling],
) -> dict[str, torch.Tensor]:
    """
    What the streams read off one tick: `last_hidden_state` [B, hidden_size], `logits`, `external_text_logits` [B,
    vocab_size], `internal_text`, `external_text` [B] ids, `audio` [B, codebooks] codes, `animation` and `action`
    [B, ...], as far as they are asked for.

    inputs: of `perceive`.
    """
    outputs = model.model(
        inputs_embeds=inputs["vectors"], attention_mask=mask, position_ids=position_ids, past_key_values=cache
    )
    hidden = outputs.last_hidden_state[:, -1]
    found = {"last_hidden_state": hidden} | _text_logits(model, hidden, streams)
    if "audio" in streams:
        code_table = model.model.senses.own_voice.code_table
        found["audio"], _ = model.streams.audio.emit(hidden, code_table, sampling["audio"], inputs.get("audio noise"))
    if "animation" in streams:
        last = {name: inputs[name][:, 0] for name in COMMAND_PARTS}
        found |= model.streams.animation.emit(hidden, last)
    return found | sample_texts(model, found, streams, sampling, inputs)


def draw_noise(
    model: nn.Module, streams: tuple[str, ...], sampling: dict[str, Sampling], rows: int, generator=None
) -> dict[str, torch.Tensor]:
    """The random numbers of one tick by `NOISE`, as far as its streams are drawn."""
    noise, config = {}, model.config
    if "audio" in streams and sampling["audio"].temperature:
        code_table = model.model.senses.own_voice.code_table
        noise["audio noise"] = model.streams.audio.draw_noise(rows, code_table, generator)
    for name, names in TEXT_NOISE.items():
        if name in streams:
            sizes = rows, config.vocab_size, model.device, config.null_token_id
            drawn = draw_for_sample(sampling[name], *sizes, generator)
            noise |= {names[part]: value for part, value in drawn.items()}
    return noise


def sample_texts(
    model: nn.Module, read: dict, streams: tuple[str, ...], sampling: dict[str, Sampling], noise: dict
) -> dict[str, torch.Tensor]:
    """The ids [B] of the texts among the streams, by their logits in `read`; noise: of `draw_noise`."""
    logits, found = {"external_text": "external_text_logits", "internal_text": "logits"}, {}
    for name, names in TEXT_NOISE.items():
        if name in streams:
            drawn = {part: noise.get(names[part]) for part in names}
            found[name] = sample(read[logits[name]], sampling[name], model.config.null_token_id, **drawn)
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


__all__ = ["Stepper", "can_step", "draw_noise", "sample_texts", "stream_tick"]
