"""What senses and streams beside the internal voice and text add to a tick of training: FLOPs and bytes.

Measured, not derived: a creature whose backbone is all but nothing makes a step of two short clips on the CPU, from
which follows what a tick costs. `creature.estimate` adds the backbone.
"""

import json
import warnings
from functools import lru_cache
from types import SimpleNamespace

from creature.errors import UserError

# Contacts on the skin at a tick, which only recordings could say: an assumption.
CONTACTS = 10
# Rows, and ticks of the two batches that are compared: what both of them cost does not depend on ticks.
ROWS, SHORT, LONG = 2, 2, 4
# The backbone of the measured creature. Its hidden_size is that which senses and streams are built for.
NO_BACKBONE = {
    "vocab_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "intermediate_size": 1,
    "rope_parameters": None,
    "sliding_window": None,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "null_token_id": None,
    "pad_token_id": None,
}


def check_trained(config, senses: tuple[str, ...], streams: tuple[str, ...]) -> None:
    """UserError for a sense or a stream that is unknown, or that a creature of this configuration does not have."""
    from configuration_creature import SENSES, STREAMS
    from senses_creature import SENSE_TABLE

    fields = {sense.name: list(sense.organs.values()) for sense in SENSE_TABLE if not sense.copy_of}
    parts = {"audio": ["num_audio_codebooks"], "animation": ["animation_size", "action_size"]}
    for kind, names, known, organs in (("sense", senses, SENSES, fields), ("stream", streams, STREAMS, parts)):
        for name in names:
            if name not in known:
                raise UserError(f"unknown {kind} {name!r}: use some of {', '.join(known)}")
            if organs.get(name) and not any(getattr(config, field) for field in organs[name]):
                zeros = " and ".join(dict.fromkeys(organs[name]))
                raise UserError(f"the {kind} {name} is not one of this creature's ({zeros} is 0): leave it out")


def tick_costs(
    config, senses: tuple[str, ...], streams: tuple[str, ...], backbone: bool, precision: str
) -> SimpleNamespace:
    """
    What senses and streams cost in training beside the backbone, the internal voice and the texts' heads.

    Returns:
        flops: of a tick, forward and backward. kept: bytes of a tick that are kept for the backward pass, uncompiled.
        batch: bytes of a tick of their arguments.
    """
    config_json = config.to_json_string(use_diff=False)
    return _tick_costs(config_json, type(config), frozenset(senses), frozenset(streams), backbone, precision == "fp32")


@lru_cache(maxsize=16)
def _tick_costs(
    config_json: str, config_class: type, senses: frozenset, streams: frozenset, backbone: bool, fp32: bool
) -> SimpleNamespace:
    import torch

    from modeling_creature import MultiModalCreature

    values = {key: value for key, value in json.loads(config_json).items() if key != "model_type"}
    config = config_class(**values | NO_BACKBONE | {"loss_weights": dict.fromkeys(streams, 1.0)})
    with torch.device("meta"):  # no random numbers are drawn, and which ones it holds does not matter
        model = MultiModalCreature(config)
    model = model.to_empty(device="cpu").train()
    model.train_only(tuple(senses), tuple(streams), backbone)
    costs = []  # of the short and the long batch
    for ticks in (SHORT, LONG):
        voice = {"inputs_embeds": torch.zeros(ROWS, ticks, config.hidden_size, requires_grad=True)}
        batch = made_up_batch(config, senses, streams, ticks, ROWS)
        with_senses, alone = _step(model, voice | batch, fp32), _step(model, voice, fp32)
        costs.append([*(a - b for a, b in zip(with_senses, alone, strict=True)), sum(x.nbytes for x in batch.values())])
    flops, kept, size = (round((long - short) / ROWS / (LONG - SHORT)) for short, long in zip(*costs, strict=True))
    return SimpleNamespace(flops=flops, kept=kept, batch=size)


def _step(model, batch: dict, fp32: bool) -> tuple[int, int]:
    """(FLOPs, bytes kept for the backward pass beside the batch and the weights) of one step on the CPU."""
    import torch

    def storage(tensor):
        return tensor.untyped_storage()

    known = {storage(tensor)._cdata for tensor in (*model.parameters(), *model.buffers(), *batch.values())}
    kept, flops = {}, []

    def keep(tensor):
        if storage(tensor)._cdata not in known:
            kept[storage(tensor)._cdata] = storage(tensor)
        return tensor

    def count(module, inputs, output):
        flops.append(_module_flops(module, inputs[0] if inputs else None, output))

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=not fp32)
    with warnings.catch_warnings(), autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        warnings.simplefilter("ignore")  # torch has no fused norm for bfloat16 on a CPU, which is not used for training
        model(**batch)
    for hook in hooks:
        hook.remove()
    return sum(flops), sum(part.nbytes() for part in kept.values())


def _module_flops(module, given, output) -> int:
    """
    FLOPs of the products in a module itself, forward and backward; 0 for a module that leaves them to others.

    torch's own counter is of no use here: of attention on a CPU it knows only some versions' forms.
    """
    from torch import nn

    from streams_creature import AudioStream, DepthLayer

    if isinstance(module, nn.Linear):
        product = 2 * output.numel() * module.in_features  # a convolution takes every number several times
        return product * (1 + given.requires_grad + module.weight.requires_grad)
    if isinstance(module, DepthLayer):  # scores and their use, [N, places, places] of a width
        return 4 * given.numel() * given.shape[1] * (1 + 2 * output.requires_grad)
    if isinstance(module, AudioStream):  # the logits, read off the tables of codes
        return 2 * output.numel() * module.out_proj.out_features * (1 + 2 * output.requires_grad)
    return 0


def made_up_batch(config, senses: frozenset, streams: frozenset, ticks: int, rows: int) -> dict:
    """The arguments of `forward` for senses, efference copies and targets, all of them zeros and present."""
    import torch

    from losses_creature import IGNORE_INDEX
    from senses_creature import SENSE_TABLE, sense_shapes
    from streams_creature import TARGET_ORGANS, target_shapes

    shapes, batch = sense_shapes(config) | target_shapes(config), {}

    def add(name, dtype):
        sizes = {"B": rows, "T": ticks, "C": CONTACTS}
        batch[name] = torch.zeros([sizes.get(size, size) for size in shapes[name]], dtype=dtype)

    ids = {"touch_points", "touch_surfaces"}
    for sense in SENSE_TABLE:
        if not (sense.copy_of in streams if sense.copy_of else sense.name in senses):
            continue
        given = sense.arguments_of(config)
        for name in given:
            is_id = name in ids or sense.arguments[name] == IGNORE_INDEX
            add(name, torch.uint8 if name == "pixel_values" else torch.long if is_id else torch.float32)
        if given and sense.mask:
            add(sense.mask, torch.bool)
            batch[sense.mask] += True
    if "external_text" in streams:
        add("external_text_targets", torch.long)
    if "audio" in streams:
        add("audio_targets", torch.long)
    if "animation" in streams:
        for name in ("rotation_targets", "blend_shape_targets", "eye_targets", "action_targets"):
            if getattr(config, TARGET_ORGANS[name]):
                add(name, torch.float32)
    return batch
