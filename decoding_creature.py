# Copyright 2026 The MultiModalCreature developers. Licensed under the Apache License, Version 2.0.
"""Fast decoding of the internal text: a cache written in place, a CUDA graph of the step, few synchronisations."""

import importlib.util
import platform
import threading
import types
import warnings
from itertools import chain
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import CompileConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.logits_process import (
    PrefixConstrainedLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

# On a GPU, end-of-text and failed draws are checked every 16 tokens, because each check synchronises.
CHECK_EVERY = {"cpu": 1, "cuda": 16, "mps": 16}
# A model keeps its latest graphs for the next call: at most so many, with at most so many bytes of keys and values.
KEPT_GRAPHS, KEPT_BYTES = 8, 2**31
SHORTEST = 256  # ticks of the smallest graph; larger ones are powers of two
# The step is recorded here, so the modes of torch.compile that record graphs of their own are replaced.
MODES = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}

# The arguments of `forward` that the loop below handles; with any other, the loop of transformers runs.
KNOWN_INPUTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "inputs_embeds"}

# The head takes most of a small model's step. On AMD processors, oneDNN is 1.3 to 2 times as fast as MKL for it.
ONEDNN = torch.backends.mkldnn.is_available() and platform.machine().lower() in ("x86_64", "amd64")

# Not an attribute of the model, so that no graph gets into a state dict, a pickle or a copy.
_graphs: WeakKeyDictionary = WeakKeyDictionary()
_lock = threading.Lock()


class DecodingCache:
    """
    Keys and values of all layers in buffers [B, heads, length, head_dim], written in place.

    Args:
        like: a tensor [B, heads, any number of ticks, head_dim] for the keys and one for the values of every layer.
        length: slots, one a tick. With a sliding window, as many as its ticks suffice.
    """

    def __init__(self, like: list[tuple[torch.Tensor, torch.Tensor]], length: int):
        self.keys = [keys.new_zeros(*_with_length(keys, length)) for keys, _ in like]
        self.values = [values.new_zeros(*_with_length(values, length)) for _, values in like]
        self.slot = torch.zeros(1, dtype=torch.long, device=self.keys[0].device)  # where the next tick goes
        self.length = length
        self.visible = length  # slots that attention reads; a graph always reads all of them, masked

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Store one tick [B, heads, 1, head_dim]; returns the keys and values to attend to."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys.index_copy_(2, self.slot, key)
        values.index_copy_(2, self.slot, value)
        return keys[:, :, : self.visible], values[:, :, : self.visible]

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:
        return self.slot[0]

    def load(self, prefilled: Cache) -> int:
        """Copy the ticks that a prefilled cache holds, and return how many: with a sliding window, the last ones."""
        ticks = prefilled.layers[0].keys.shape[2]
        for name in ("keys", "values"):
            for buffer, layer in zip(getattr(self, name), prefilled.layers, strict=True):
                buffer[:, :, :ticks] = getattr(layer, name)
                # A NaN left by an earlier call would pass through the mask: 0 * NaN is NaN.
                buffer[:, :, ticks:] = 0
        self.slot.fill_(ticks)
        return ticks

    def extend(self, length: int) -> None:
        """More slots behind those that there are."""
        for buffers in (self.keys, self.values):
            for place, buffer in enumerate(buffers):
                buffers[place] = nn.functional.pad(buffer, (0, 0, 0, length - self.length))
        self.length = length


def full_tick(model: nn.Module, tokens, position_ids, mask, cache) -> torch.Tensor:
    """tokens, position_ids [B, 1], mask [B, 1, 1, slots] -> logits [B, vocab_size]."""
    outputs = model(
        input_ids=tokens, attention_mask=mask, position_ids=position_ids, past_key_values=cache, logits_to_keep=1
    )
    return outputs.logits[:, -1]


def bare_tick(model: nn.Module, tokens, position_ids, mask, cache) -> torch.Tensor:
    """The same from backbone and head alone, without the checks, senses and streams of `forward`."""
    embeds = model.model.embed_tokens(tokens)  # not `input_ids`, of which negative ones would be taken out first
    outputs = model.model(inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, past_key_values=cache)
    return head_logits(model.lm_head, outputs.last_hidden_state[:, -1])


def head_logits(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """hidden [B, hidden_size] -> logits [B, vocab_size] of a plain head, by the fastest product that there is."""
    if hidden.device.type == "cpu" and ONEDNN and hidden.dtype == head.weight.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(hidden, head.weight, None, "none", [], "")
    return head(hidden)


class Decoder:
    """
    Runs the model on one new tick of every row, eagerly or as a CUDA graph.

    It holds no reference to the model, so that the model is freed when its owner drops it.

    Args:
        prefilled: as for [`DecodingCache`].
        length: slots; a graph's attention always reads them all.
        tick: `bare_tick`, or `full_tick` where the model has hooks that must run.
        windowed: whether the slots are a sliding window, so that a tick after the last slot replaces the oldest one.
    """

    def __init__(self, prefilled: Cache, length: int, tick=bare_tick, windowed: bool = False):
        first = prefilled.layers[0].keys
        self.tick, self.windowed = tick, windowed
        self.graph, self.fingerprint, self.key = None, None, None
        with torch.inference_mode(False):  # inference tensors could not be written outside of inference mode
            self.cache = DecodingCache([(layer.keys, layer.values) for layer in prefilled.layers], length)
            self.tokens = torch.zeros(first.shape[0], 1, dtype=torch.long, device=first.device)
            self.position_ids = torch.zeros_like(self.tokens)
            # Added to the attention scores, in their dtype: a boolean mask would be converted in every layer.
            self.mask = first.new_zeros(first.shape[0], 1, 1, length)

    @property
    def bytes(self) -> int:
        return sum(buffer.nbytes for buffer in chain(self.cache.keys, self.cache.values))

    def load(self, prefilled: Cache, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None):
        """Start a text: the cache after the prompt, its padding mask [B, ticks], its positions [B or 1, ticks]."""
        ticks = self.cache.load(prefilled)
        if self.graph is None:
            self.cache.visible = ticks
        self.mask.fill_(float("-inf"))
        self.mask[..., :ticks] = 0
        if attention_mask is not None:
            self.mask[..., :ticks].masked_fill_(attention_mask[:, None, None, -ticks:] == 0, float("-inf"))
        if position_ids is None:
            self.position_ids.fill_(int(prefilled.get_seq_length()))
        else:
            self.position_ids.copy_(position_ids[:, -1:] + 1)

    def __call__(self, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """The latest tokens [B] -> logits of the next ones [B, vocab_size], valid until the next call."""
        self.tokens[:, 0] = tokens
        if self.graph is not None:
            self.graph.replay()
            return self.outputs
        self.cache.visible = min(self.cache.visible + 1, self.cache.length)
        return self._pass(model, self.tick)

    def _pass(self, model: nn.Module, tick) -> torch.Tensor:
        self.mask.index_fill_(3, self.cache.slot, 0.0)
        outputs = self._outputs(model, tick, self.mask[..., : self.cache.visible])
        self.cache.slot += 1
        if self.windowed:  # after the last slot comes the one with the oldest tick
            self.cache.slot.remainder_(self.cache.length)
        self.position_ids += 1
        return outputs

    def _outputs(self, model: nn.Module, tick, mask: torch.Tensor):
        return tick(model, self.tokens, self.position_ids, mask, self.cache)

    def capture(self, model: nn.Module, settings: dict | None = None) -> "Decoder":
        """Record the step as a CUDA graph, first compiled with `settings` where they are given; returns itself."""
        tick = self.tick if settings is None else compile_tick(self.tick, settings)
        device = self.position_ids.device
        with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            warmup = torch.cuda.Stream()
            warmup.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(warmup):
                for _ in range(3):  # compilation and the choice of kernels happen before the recording
                    self._pass(model, tick)
            torch.cuda.current_stream().wait_stream(warmup)
            graph = torch.cuda.CUDAGraph()
            # On a stream of its own, so that the graph has its own cuBLAS workspaces, which nobody else frees; of this
            # thread alone, because a data loader may be pinning memory in another one.
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                self.outputs = self._pass(model, tick)
        self.graph, self.fingerprint = graph, fingerprint(model)
        self.tick = tick  # keeps the compiled kernels loaded as long as the graph that launches them
        return self


def compile_settings(config: CompileConfig) -> dict:
    """The arguments of `torch.compile` for a caller's `compile_config`: static shapes, no CUDA graphs of its own."""
    return config.to_dict() | {"dynamic": False, "mode": MODES.get(config.mode, config.mode)}


def compile_tick(tick, settings: dict):
    """`bare_tick` or `full_tick`, compiled at its first call."""
    # A copy of the code object, because torch counts compilations by code object and stops after a few.
    return torch.compile(types.FunctionType(tick.__code__.replace(), globals(), tick.__name__), **settings)


def can_decode(model, stopping_criteria, generation_config, synced_gpus: bool, inputs: dict) -> bool:
    """Whether `decode` returns exactly what the loop of transformers returns; otherwise that loop must run."""
    return (
        has_plain_inputs(model, generation_config, synced_gpus, inputs)
        and not generation_config.return_dict_in_generate
        and stopping_criteria.max_length is not None
        and all(type(criteria) in (MaxLengthCriteria, EosTokenCriteria) for criteria in stopping_criteria)
    )


def has_plain_inputs(model, generation_config, synced_gpus: bool, inputs: dict, known=frozenset()) -> bool:
    """Whether one pass after the other over the new tick is all there is to do; known: further inputs allowed."""
    cache, mask = inputs.get("past_key_values"), inputs.get("attention_mask")
    given = {name for name, value in inputs.items() if value is not None}
    return (
        given <= KNOWN_INPUTS | known
        and not (synced_gpus or model.training or generation_config.is_assistant)
        # A cache that the caller passed or chose must be filled, which `decode` does not do.
        and generation_config.cache_implementation is None
        and bool(inputs.get("use_cache"))
        and type(cache) is DynamicCache
        and not getattr(cache, "_is_user_defined", False)
        and (mask is None or mask.dim() == 2)
        # Other attention implementations need other masks.
        and model.config._attn_implementation in ("sdpa", "eager")
    )


def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, streamer, inputs: dict):
    """
    The loop of `GenerationMixin._sample` with less Python per token; it returns the same tokens.

    input_ids [B, T] -> [B, T + N]: N tokens, until every row has ended or the maximal length is reached.
    """
    rows, prompt = input_ids.shape
    longest, context = stopping_criteria.max_length, model.config.max_position_embeddings
    ends = [criteria.eos_token_id for criteria in stopping_criteria if isinstance(criteria, EosTokenCriteria)]
    ends = torch.cat([end.flatten() for end in ends]).to(input_ids.device) if ends else None
    # A logits processor of the user, or a streamer, must not see tokens after the end.
    known = all(
        type(processor).__module__.startswith("transformers.")
        and not isinstance(processor, PrefixConstrainedLogitsProcessor)
        for processor in logits_processor
    )
    check_every = CHECK_EVERY.get(input_ids.device.type, 1) if known and streamer is None else 1
    # Temperature and top_k, the usual two, leave few tokens: one of these is drawn without passes over all of them.
    kinds = [type(processor) for processor in logits_processor]
    top_k_alone = kinds in ([TopKLogitsWarper], [TemperatureLogitsWarper, TopKLogitsWarper])
    top_k_alone &= generation_config.do_sample

    outputs = model._prefill(input_ids, generation_config, inputs)
    logits = outputs.logits[:, -1]
    sequences = input_ids.new_zeros(rows, max(longest, prompt + 1))
    sequences[:, :prompt] = input_ids
    finished = torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
    drawn = torch.zeros(rows, device=input_ids.device)
    decoder, length = None, prompt
    try:
        while True:
            scores = logits
            if not top_k_alone and (logits_processor or generation_config.do_sample):
                scores = logits_processor(sequences[:, :length].contiguous(), logits.to(copy=True, dtype=torch.float32))
            if top_k_alone:
                temperature = getattr(logits_processor[0], "temperature", 1.0)
                weights, tokens = _draw_top(logits, logits_processor[-1].top_k, temperature)
                drawn += weights
            elif generation_config.do_sample:
                weights, tokens = _draw(scores.softmax(dim=-1))
                drawn += weights
            else:
                tokens = scores.argmax(dim=-1)
            if ends is not None:
                tokens = torch.where(finished, generation_config._pad_token_tensor, tokens)
                finished |= (tokens[:, None] == ends).any(dim=1)
            sequences[:, length] = tokens
            length += 1
            if length > context:
                stopping_criteria(sequences[:, :length], None)  # transformers' reminder, once
                context = longest
            check = length >= longest or (length - prompt) % check_every == 0
            if check and generation_config.do_sample:
                _check_drawn(drawn)
            if streamer is not None:
                streamer.put(tokens.cpu())
            if length >= longest or (check and ends is not None and finished.all()):
                break
            if decoder is None:
                decoder = _decoder(model, outputs.past_key_values, longest - length, generation_config)
                decoder.load(outputs.past_key_values, inputs.get("attention_mask"), inputs.get("position_ids"))
                del outputs, logits
            logits = decoder(model, tokens)
    finally:
        if decoder is not None and decoder.graph is not None:
            with _lock:  # keep it for the next call of its shape, as the most recently used
                _graphs.setdefault(model, {})[decoder.key] = decoder
    if streamer is not None:
        streamer.end()
    if ends is not None and check_every > 1:
        ended = (sequences[:, prompt:length, None] == ends).any(dim=-1)
        if ended.any(dim=1).all():
            length = prompt + int(ended.int().argmax(dim=1).max()) + 1
    return sequences[:, :length].contiguous()


def _draw(probabilities: torch.Tensor, noise: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One draw from each row of probabilities [B, N], the same as `torch.multinomial`: weights [B] and indices [B].

    It is argmax of p / q with q ~ Exp(1). `torch.multinomial` first checks all probabilities, which takes a GPU longer
    than the draw, and on bad ones it aborts the CUDA context. Here the weight of such a row is NaN. noise: q [B, N],
    where it has been drawn already.
    """
    if probabilities.device.type not in ("cpu", "cuda"):  # elsewhere exponential_ may return 0
        indices = torch.multinomial(probabilities, num_samples=1)[:, 0]
        return torch.zeros_like(indices, dtype=probabilities.dtype), indices
    if noise is None:
        noise = torch.empty_like(probabilities).exponential_()
    weights, indices = (probabilities / noise).max(dim=-1)
    return weights, indices


def _draw_top(logits: torch.Tensor, top_k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One draw from each row of logits [B, N] after temperature and top_k: weights [B] and tokens [B], as `_draw` does.

    Where several tokens are as likely as the last one that is kept, transformers keeps all of them; here top_k remain.
    """
    kept, tokens = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    probabilities = (kept.float() / temperature).softmax(dim=-1)
    # Numbers for all tokens, as the draw from all of them takes: the same seed gives the same token.
    noise = torch.empty_like(logits, dtype=torch.float32).exponential_().gather(-1, tokens)
    weights, places = _draw(probabilities, noise)
    return weights, tokens.gather(-1, places[:, None])[:, 0]


def _check_drawn(weights: torch.Tensor) -> None:
    """RuntimeError where a row was drawn from NaN or infinite scores."""
    if weights.isnan().any():
        raise RuntimeError(
            "There are no probabilities to sample from, because the scores of the next token are NaN or infinite: look "
            "for such numbers in the model's weights, or leave out the logits processor that made them."
        )


def _decoder(model, prefilled: Cache, passes: int, generation_config) -> Decoder:
    """A decoder for the next `passes` ticks: with a kept graph of this shape, with a new one, or without a graph."""
    windowed = model.config.sliding_window is not None
    ticks = int(prefilled.get_seq_length()) + passes
    slots = max(SHORTEST, 1 << (ticks - 1).bit_length())
    if windowed:
        ticks, slots = min(ticks, model.config.sliding_window), min(slots, model.config.sliding_window)
    first = prefilled.layers[0].keys
    needed = slots * sum(layer.keys[:, :, 0].nbytes + layer.values[:, :, 0].nbytes for layer in prefilled.layers)
    bare = is_bare(model)
    # A batch that needs more memory keeps the device busy without a graph.
    recordable = bare and needed <= KEPT_BYTES and is_recordable(model)
    settings = None
    if generation_config.compile_config is not None and not generation_config.disable_compile:
        if recordable and can_compile(model):
            settings = compile_settings(generation_config.compile_config)
        else:
            warnings.warn("`compile_config` is ignored: this model or device cannot run a CUDA graph.", stacklevel=2)
    if not recordable:
        return Decoder(prefilled, ticks, bare_tick if bare else full_tick, windowed)
    key = (len(first), slots, first.dtype, model.config._attn_implementation, repr(settings))
    with _lock:
        graphs = _graphs.setdefault(model, {})
        decoder = graphs.pop(key, None)  # removed while it is in use, so that a second thread records its own
        if decoder is not None and decoder.fingerprint == fingerprint(model):
            return decoder
        decoder = None  # free its memory before others are counted
        while graphs and (len(graphs) >= KEPT_GRAPHS or needed + sum(g.bytes for g in graphs.values()) > KEPT_BYTES):
            del graphs[next(iter(graphs))]
    if settings is not None:
        try:
            decoder = Decoder(prefilled, slots, windowed=windowed).capture(model, settings)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            warnings.warn(
                f"Generation goes on with a step that is not compiled, as compiling it for `compile_config` failed "
                f"({next(iter(str(error).splitlines()), type(error).__name__)}).",
                stacklevel=2,
            )
    if decoder is None:
        decoder = Decoder(prefilled, slots, windowed=windowed).capture(model)
    decoder.key = key  # also after a failed compilation, which is not tried again
    return decoder


def fingerprint(model: nn.Module) -> list[tuple]:
    """The addresses, dtypes and shapes of the weights: a recorded graph reads them at these addresses only."""
    found, modules = [], [model]
    for module in modules:  # by hand: `parameters()` takes five times as long, and a live creature asks at every tick
        found += (*module._parameters.values(), *module._buffers.values())
        modules += [child for child in module._modules.values() if child is not None]
    return [(weight.data_ptr(), weight.dtype, weight.shape) for weight in found if weight is not None]


def is_bare(model: nn.Module) -> bool:
    """Whether the model has no hooks, adapters, quantized layers or replaced `forward`: then `bare_tick` suffices."""
    for module in model.modules():
        package, _, name = type(module).__module__.rpartition(".")
        known = name.endswith("_creature") or package.partition(".")[0] in ("torch", "transformers", "creature")
        if not known or "forward" in module.__dict__ or module._compiled_call_impl is not None:
            return False
        for hook in chain(module._forward_hooks.values(), module._forward_pre_hooks.values()):
            # transformers leaves hooks of its own, which do nothing unless hidden states are requested.
            if not getattr(hook, "__module__", "").startswith("transformers.utils.output_capturing"):
                return False
    return type(model.lm_head) is nn.Linear and model.lm_head.bias is None


def is_recordable(model: nn.Module) -> bool:
    """Whether a step of a bare model always launches the same kernels, all on one GPU."""
    return (
        model.device.type == "cuda"
        and not torch.is_autocast_enabled("cuda")
        and model.config.rope_parameters["rope_type"] not in ("dynamic", "longrope")  # these depend on the length
        and all(type(weight) is nn.Parameter and weight.device == model.device for weight in model.parameters())
    )


def can_compile(model: nn.Module) -> bool:
    """Whether torch can compile for the model's GPU: Triton is installed and supports it."""
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(model.device) >= (7, 0)


def _with_length(states: torch.Tensor, length: int) -> tuple[int, int, int, int]:
    rows, heads, _, size = states.shape
    return rows, heads, length, size


__all__ = ["can_decode", "decode"]
