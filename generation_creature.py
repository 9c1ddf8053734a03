# Copyright 2026 The MultiModalCreature developers. Licensed under the Apache License, Version 2.0.
"""Generation with all streams: `generate(output_streams=...)` and the one-tick `step` of a live loop."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput

try:
    from .configuration_creature import STREAMS
    from .decoding_creature import can_decode, decode, has_plain_inputs
    from .sampling_creature import Sampling
    from .senses_creature import SENSE_TABLE, check_names
    from .stepping_creature import Stepper, can_step, draw_noise, sample_texts
except ImportError:
    from configuration_creature import STREAMS
    from decoding_creature import can_decode, decode, has_plain_inputs
    from sampling_creature import Sampling
    from senses_creature import SENSE_TABLE, check_names
    from stepping_creature import Stepper, can_step, draw_noise, sample_texts


def _inputs_of(senses) -> dict[str, float | bool]:
    """The arguments and masks of some rows of the table of senses, each with its value at an absent tick."""
    inputs = {name: absent for sense in senses for name, absent in sense.arguments.items()}
    return inputs | {sense.mask: False for sense in senses if sense.mask}


# What arrives from outside, and what a loop feeds back itself.
OUTER_SENSES = _inputs_of([sense for sense in SENSE_TABLE if not sense.copy_of])
COPIES = [sense for sense in SENSE_TABLE if sense.copy_of]
COPY_MASKS = {name: sense.mask for sense in COPIES for name in sense.arguments if sense.mask}
# What leaves the creature at a tick -> the argument that it is at the next one.
FED_BACK = {"external_text": "external_text_ids", "audio": "audio_codes", "animation": "animation", "action": "action"}
# Along the ticks of a generation: the senses, encoded once before the loop, the pose that animation starts from, and
# the efference copies; each with its value at an absent tick.
COPY_INPUTS = _inputs_of(COPIES)
TICK_INPUTS = {"sense_embeds": 0.0, "joint_rotations": 0.0, "body_mask": False} | COPY_INPUTS


@dataclass
class CreatureGenerateOutput(ModelOutput):
    """
    What `generate(output_streams=...)` returns.

    Args:
        sequences: [B, prompt + N] the internal text, as always.
        external_text: [B, N] ids emitted beside the N new tokens. A body does not stop with an inner sentence: after a
            row's end-of-text token its other streams go on until the last row has ended.
        audio: [B, N, codebooks] codec codes.
        animation: [B, N, animation_size], see `motor_creature.pack_animation`.
        action: [B, N, sub-frames, action_size], normalised.
        scores, logits, attentions, hidden_states, past_key_values: as in transformers.
    """

    sequences: torch.LongTensor | None = None
    external_text: torch.LongTensor | None = None
    audio: torch.LongTensor | None = None
    animation: torch.FloatTensor | None = None
    action: torch.FloatTensor | None = None
    scores: tuple[torch.FloatTensor] | None = None
    logits: tuple[torch.FloatTensor] | None = None
    attentions: tuple | None = None
    hidden_states: tuple | None = None
    past_key_values: Cache | None = None


@dataclass
class CreatureStep(ModelOutput):
    """
    One tick of a live loop.

    Args:
        internal_text, external_text: [B] ids. audio: [B, codebooks] codes. animation: [B, animation_size].
            action: [B, sub-frames, action_size], normalised. What was not asked for, or has size 0, is None.
        logits: [B, vocab_size] of the internal text. external_text_logits: [B, vocab_size], with that stream.
        last_hidden_state: [B, hidden_size], what all streams read.
        past_key_values: pass it to the next step.
    """

    internal_text: torch.LongTensor | None = None
    external_text: torch.LongTensor | None = None
    audio: torch.LongTensor | None = None
    animation: torch.FloatTensor | None = None
    action: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    external_text_logits: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | Stepper | None = None


@dataclass
class _Emission:
    """Which side streams one call of `generate` emits, how they are drawn, and what came out so far."""

    streams: tuple[str, ...]
    sampling: dict[str, Sampling]
    ticks: int = 0  # ticks that the backbone has seen
    emitted: dict[str, list[torch.Tensor]] = field(default_factory=dict)


class CreatureGenerationMixin(GenerationMixin):
    """`GenerationMixin` on the internal text, with the other streams emitted from the same backbone pass."""

    def generate(self, inputs: torch.Tensor | None = None, *args, output_streams: tuple[str, ...] = (), **kwargs):
        """
        As `GenerationMixin.generate`, and with `output_streams` also what the other streams emit, tick by tick.

        Senses ([B, T, ...], as in `forward`) are laid along the ticks of prompt and continuation: tick t of a sense
        arrives with token t, and a sense shorter than the text is absent afterwards. Each side stream's emission is fed
        back as its efference copy at the next tick. Side streams are drawn greedily, or, with `do_sample=True`, at the
        call's temperature.

        Greedy search and sampling of the text alone run in a loop of their own (`decoding_creature.py`), on a GPU as a
        CUDA graph, recorded at the first call of a batch size and length. `compile_config=CompileConfig()` compiles
        the step before it is recorded: faster, after a first call many times as long. Its `dynamic` has no effect, and
        its modes record no graphs of their own. `cache_implementation="dynamic"` selects the loop of transformers.

        Args:
            output_streams: out of "external_text", "audio", "animation", which emits `animation` and `action`.

        Returns:
            What `GenerationMixin.generate` returns, or with `output_streams` a [`CreatureGenerateOutput`].

        Raises:
            ValueError: for an unknown stream, or for side streams with beam search or assisted generation.
        """
        check_names("output_streams", output_streams, self.streams.names)
        given = {name: kwargs.pop(name) for name in OUTER_SENSES if kwargs.get(name) is not None}
        if given:
            with torch.no_grad():
                kwargs["sense_embeds"] = self.encode_senses(**given)
            if "joint_rotations" in given:
                felt = given["joint_rotations"]
                everywhere = torch.ones(felt.shape[:2], dtype=torch.bool, device=felt.device)
                # With a mask, the ticks after the last felt one are absent, and not quaternions of zeros.
                kwargs |= {"joint_rotations": felt, "body_mask": given.get("body_mask", everywhere)}
        for name, mask in COPY_MASKS.items():
            copy = kwargs.get(name)
            if copy is not None and kwargs.get(mask) is None:
                kwargs[mask] = torch.ones(copy.shape[:2], dtype=torch.bool, device=copy.device)
        streams = tuple(stream for stream in output_streams if stream != "internal_text")
        if not streams:
            return super().generate(inputs, *args, **kwargs)

        base = kwargs.get("generation_config") or (args[0] if args else None) or self.generation_config

        def setting(name):
            return kwargs[name] if kwargs.get(name) is not None else getattr(base, name, None)

        beams, assistant = (setting("num_beams") or 1) > 1, kwargs.get("assistant_model") is not None
        if beams or assistant or any(map(setting, ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"))):
            raise ValueError(
                "Side streams are emitted once per tick, which beam search and assisted generation cannot undo: "
                "use greedy search or sampling with output_streams, or leave output_streams out."
            )
        sampling = bool(setting("do_sample"))
        temperature = (setting("temperature") or 1.0) if sampling else 0.0
        emission = _Emission(streams, dict.fromkeys(STREAMS, Sampling(temperature)))
        kwargs["return_dict_in_generate"] = True  # several fields are what comes back in any case
        outputs = super().generate(inputs, *args, emission=emission, **kwargs)
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        # transformers may notice the end one pass late; what that pass emitted is cut off.
        new_tokens = outputs.sequences.shape[1] - (prompt.shape[1] if prompt is not None else 0)
        fields = {name: getattr(outputs, name, None) for name in CreatureGenerateOutput.__dataclass_fields__}
        fields |= {name: torch.stack(ticks[:new_tokens], dim=1) for name, ticks in emission.emitted.items()}
        return CreatureGenerateOutput(**fields)

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        tokenizer=None,  # needed for `stop_strings`, which are among the criteria already
        **model_kwargs,
    ):
        """Greedy search and sampling: as in `GenerationMixin`, in the fast loop where only the tokens are wanted."""
        if can_decode(self, stopping_criteria, generation_config, synced_gpus, model_kwargs):
            return decode(
                self, input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs
            )
        wanted = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
        known = {"emission", *TICK_INPUTS}
        if (
            model_kwargs.get("emission") is not None
            and not any(getattr(generation_config, name) for name in wanted)
            and has_plain_inputs(self, generation_config, synced_gpus, model_kwargs, known)
            and can_step(self)
        ):
            return self._decode_streams(
                input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs
            )
        return super()._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
        )

    def _decode_streams(
        self, input_ids, logits_processor, stopping_criteria, generation_config, streamer, inputs: dict
    ) -> GenerateDecoderOnlyOutput:
        """The loop of `GenerationMixin._sample`, with all streams from the fast step."""
        emission, rows = inputs["emission"], len(input_ids)
        streams, sampling = emission.streams, emission.sampling
        outputs = self._prefill(input_ids, generation_config, inputs)
        stepper = Stepper(self, rows).load(
            outputs.past_key_values, inputs.get("attention_mask"), inputs.get("position_ids")
        )
        outer = {name: inputs[name] for name in TICK_INPUTS if name not in COPY_INPUTS and inputs.get(name) is not None}
        read = self._read(outputs, streams, sampling, draw_noise(self, streams, sampling, rows))
        ends = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
        finished = torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
        while True:
            emitted = {name: read[name] for name in FED_BACK if name in read}
            for name, value in emitted.items():
                emission.emitted.setdefault(name, []).append(value)
            scores = logits_processor(input_ids, read["logits"].to(copy=True, dtype=torch.float32))
            if generation_config.do_sample:
                tokens = torch.multinomial(scores.softmax(dim=-1), num_samples=1)[:, 0]
            else:
                tokens = scores.argmax(dim=-1)
            if ends:
                tokens = torch.where(finished, generation_config._pad_token_tensor, tokens)
            input_ids = torch.cat((input_ids, tokens[:, None]), dim=1)
            if streamer is not None:
                streamer.put(tokens.cpu())
            finished = finished | stopping_criteria(input_ids, None)
            if finished.all():
                break
            senses = {FED_BACK[name]: value[:, None] for name, value in emitted.items()}
            for name, value in outer.items():
                senses[name] = _at_ticks(name, value, stepper.ticks, stepper.ticks + 1)
            senses["input_ids"] = tokens[:, None]
            noise = draw_noise(self, streams, sampling, rows)
            read = stepper(self, senses, streams, sampling, noise)
        if streamer is not None:
            streamer.end()
        return GenerateDecoderOnlyOutput(sequences=input_ids, past_key_values=stepper)

    def _assisted_decoding(self, *args, **kwargs):
        """As in `GenerationMixin`, which leaves the model with the layers of an early exit where that raises."""
        layers = self.config.num_hidden_layers
        try:
            return super()._assisted_decoding(*args, **kwargs)
        finally:
            self.config.num_hidden_layers = layers

    def encode_senses(self, **senses) -> torch.Tensor:
        """
        The sum of the outer senses, [B, T, hidden_size], T the longest of them: encoded once, to be used tick by tick.

        Takes the sense arguments of `forward`; pass the result as `sense_embeds`.

        Raises:
            TypeError: for any other argument.
            ValueError: as `forward`.
        """
        vectors = self.model.senses(senses, self.model.embed_tokens)
        if not vectors:
            return None
        length = max(vector.shape[1] for vector in vectors)
        return sum(F.pad(vector, (0, 0, 0, length - vector.shape[1])) for vector in vectors)

    # `inputs_embeds` is spelled out because `generate` looks for it by name before it accepts embeddings as a prompt.
    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, inputs_embeds=None, emission=None, tokenizer=None, **kwargs
    ):
        """As in `GenerationMixin`; the inputs along the ticks are cut to the ticks of this pass."""
        per_tick = {name: kwargs.pop(name) for name in TICK_INPUTS if kwargs.get(name) is not None}
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )
        if emission is None and not per_tick:
            return model_inputs
        now = model_inputs["inputs_embeds"] if model_inputs.get("input_ids") is None else model_inputs["input_ids"]
        # Counted from the cache, because after a prompt of embeddings `input_ids` holds the new tokens only.
        cache = model_inputs.get("past_key_values")
        end = now.shape[1] + (0 if cache is None else int(cache.get_seq_length()))
        if emission is not None:
            emission.ticks = end
            model_inputs["output_streams"] = tuple(stream for stream in emission.streams if stream != "audio")
        for name, value in per_tick.items():
            model_inputs[name] = _at_ticks(name, value, end - now.shape[1], end)
        return model_inputs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, is_encoder_decoder=False, num_new_tokens=1):
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder=is_encoder_decoder, num_new_tokens=num_new_tokens
        )
        emission = model_kwargs.get("emission")
        if emission is None:
            return model_kwargs
        streams, sampling = emission.streams, emission.sampling
        read = self._read(outputs, streams, sampling, draw_noise(self, streams, sampling, len(outputs.logits)))
        for output, tick in ((name, read[name]) for name in FED_BACK if name in read):
            emission.emitted.setdefault(output, []).append(tick)
            # The ticks before the first emission are absent, unless the caller says what was emitted in the prompt.
            name, mask = FED_BACK[output], COPY_MASKS.get(FED_BACK[output])
            before = tick[:, None][:, :0] if model_kwargs.get(name) is None else model_kwargs[name]
            model_kwargs[name] = torch.cat((_at_ticks(name, before, 0, emission.ticks), tick[:, None]), dim=1)
            if mask:
                known = model_kwargs.get(mask)
                known = tick.new_zeros((len(tick), 0), dtype=torch.bool) if known is None else known
                model_kwargs[mask] = F.pad(_at_ticks(mask, known, 0, emission.ticks), (0, 1), value=True)
        return model_kwargs

    def _read(self, outputs: ModelOutput, streams: tuple[str, ...], sampling: dict, noise: dict) -> dict:
        """What `stream_tick` returns, of the last tick of a forward pass."""
        names = ("last_hidden_state", "logits", "external_text_logits", "animation", "action")
        read = {name: getattr(outputs, name) for name in names if getattr(outputs, name) is not None}
        read = {name: value[:, -1] for name, value in read.items()}
        if "audio" in streams:
            # Drawn here and not in `forward`, which is deterministic.
            table = self.model.senses.own_voice.code_table
            drawn = noise.get("audio noise")
            read["audio"], _ = self.streams.audio.emit(read["last_hidden_state"], table, sampling["audio"], drawn)
        return read | sample_texts(self, read, streams, sampling, noise)

    @torch.no_grad()
    def step(
        self,
        past_key_values: Cache | Stepper | None = None,
        output_streams: tuple[str, ...] | None = None,
        temperature: float | None = None,
        sampling: dict[str, Sampling] | None = None,
        generator: torch.Generator | None = None,
        **senses,
    ) -> CreatureStep:
        """
        One tick of a live loop: the senses of now in, an emission of every stream out, from one backbone pass.

        Args:
            past_key_values: the cache of the step before, None at the first tick.
            output_streams: the streams to emit; by default all that this creature has.
            temperature: draw at this temperature; None is greedy.
            sampling: how each stream of ids is drawn, in place of one temperature for all. generator: what its random
                numbers come from.
            senses: the arguments of `forward` with T = 1 (or, at the first call, the ticks so far); feed back what the
                step before emitted as `input_ids`, `external_text_ids`, `audio_codes`, `animation` and `action`
                [B, 1, ...].

        Returns:
            [`CreatureStep`].

        Raises:
            TypeError: for an argument that `forward` does not have.
            ValueError: as `forward`.
        """
        output_streams = self.streams.names if output_streams is None else output_streams
        check_names("output_streams", output_streams, self.streams.names)
        sampling = dict.fromkeys(STREAMS, Sampling(temperature or 0.0)) | (sampling or {})
        names = {"input_ids", "inputs_embeds", "sense_embeds", *self.model.senses.shapes}
        given = {name: value for name, value in senses.items() if value is not None}
        tensors = [value for name, value in given.items() if name in names]
        ticks = max((value.shape[1] for value in tensors if value.dim() > 1), default=0)
        rows = len(tensors[0]) if tensors else 0
        # `forward` takes the rest, and refuses names that it does not know.
        fast = len(tensors) == len(given) and isinstance(past_key_values, Stepper | None) and can_step(self)
        noise = draw_noise(self, output_streams, sampling, rows, generator)
        if fast and (ticks == 1 or (ticks and past_key_values is not None)):
            past_key_values = past_key_values or Stepper(self, rows)
            for tick in range(ticks):
                streams = output_streams if tick == ticks - 1 else ()
                now = {name: value[:, tick : tick + 1] for name, value in given.items()}
                read = past_key_values(self, now, streams, sampling, noise)
        else:
            outputs = self(
                past_key_values=past_key_values,
                use_cache=True,
                logits_to_keep=1,
                output_streams=tuple(stream for stream in output_streams if stream != "audio"),
                **senses | {name: value.to(self.device) for name, value in given.items() if name in names},
            )
            past_key_values = outputs.past_key_values
            if fast:
                past_key_values = Stepper(self, rows).load(past_key_values)
            read = self._read(outputs, output_streams, sampling, noise)
        return CreatureStep(**read, past_key_values=past_key_values)


def _at_ticks(name: str, value: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """The ticks [start, end) of one of `TICK_INPUTS` [B, T, ...]; ticks after T are absent."""
    value = value[:, start:end]
    missing = end - start - value.shape[1]
    return F.pad(value, (0, 0) * (value.dim() - 2) + (0, missing), value=TICK_INPUTS[name])


__all__ = ["CreatureGenerateOutput", "CreatureGenerationMixin", "CreatureStep"]
