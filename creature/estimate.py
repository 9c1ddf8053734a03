"""Parameters, FLOPs, memory and hours of a training run, before anything is trained.

Every number is counted from the architecture as it is built: parameters from the model on the meta device (no memory,
no time), memory from the tensors that a step keeps. `tests/test_estimate.py` holds it against a real training step.
"""

from collections import Counter
from functools import lru_cache
from types import SimpleNamespace

from creature.errors import UserError
from creature.hardware import CARDS, Device, card_name, triton_available

OPTIMIZERS = ("muon", "adamw")
# Bytes per weight alive in `optimizer._muon_step`, which stacks the matrices of one shape (a CPU takes each alone): ten
# copies in fp32, on a CPU seven; on GPUs the iteration runs in bf16, and the compiler fuses the rest.
MUON_TEMPORARIES = {"cpu": 28, "mps": 40, "cuda": 24}
PRECISION_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}

# Share of the peak rate that training reaches (model FLOPs utilization, Chowdhery et al. 2022, "PaLM", appendix B).
# What was measured with this library goes here, per card (docs/log.md: the tiny creature only, so other sizes
# are expected to reach the same share); for any other card the assumption stands, and is called one.
MEASURED_MFU: dict[str, float] = {"H200": 0.377}
ASSUMED_MFU = 0.35
# The same for a device whose rate is not in the table: share of a plain matrix product timed on the spot.
ASSUMED_SHARE_OF_MATMUL = 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Parameters and FLOPs
# ---------------------------------------------------------------------------------------------------------------------


def count_parameters(config) -> dict[str, int]:
    """
    Parameters by part.

    Returns:
        token_table; body (layers and norms); head (0 while it is tied to the table); senses and streams (beside the
        token table and the tied head); text_only (table + body + head); trainable (what a run with the configuration's
        `loss_weights` trains); total.
    """
    inventory = _inventory(config)
    names = ("token_table", "body", "head", "senses", "streams", "text_only", "trainable", "total")
    return {name: getattr(inventory, name) for name in names}


def flops_per_token(config, block_size: int) -> float:
    """
    FLOPs of one trained token, forward and backward, the text-only model's own arithmetic.

    6 x (parameters of the body's matrices + hidden_size x vocab_size of the head, tied or not): 2 in the forward pass,
    4 in the backward pass (Kaplan et al. 2020). The table's lookup is no arithmetic. Attention scores and their use add
    12 x layers x heads x head_dim x block_size, halved because a causal kernel skips the future. Recomputing
    activations adds work but no FLOPs of the model, so it lowers the MFU.
    """
    matrices = _inventory(config).body_matrices + config.hidden_size * config.vocab_size
    width = config.num_attention_heads * config.head_dim
    return 6.0 * matrices + 12.0 * config.num_hidden_layers * width * block_size / 2


def _inventory(config) -> SimpleNamespace:
    """What there is to count in a configuration's model; counted once per configuration."""
    return _count(config.to_json_string(use_diff=False), type(config))


@lru_cache(maxsize=16)
def _count(config_json: str, config_class: type) -> SimpleNamespace:
    import json

    import torch

    from modeling_creature import STREAMS, MultiModalCreature

    values = {key: value for key, value in json.loads(config_json).items() if key != "model_type"}
    config = config_class(**values)
    with torch.device("meta"):
        model = MultiModalCreature(config)
    model.train_only(streams=[name for name in STREAMS if config.loss_weights[name]])

    def total(parameters) -> int:
        return sum(parameter.numel() for parameter in parameters)

    table = model.model.embed_tokens.weight.numel()
    head = 0 if model.lm_head.weight is model.model.embed_tokens.weight else model.lm_head.weight.numel()
    layers = list(model.model.layers.parameters())
    senses = total(model.model.senses.parameters())
    body = total(model.model.parameters()) - table - senses
    stacks = Counter()
    for parameter in layers:
        if parameter.ndim == 2:
            stacks[parameter.shape] += parameter.numel()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return SimpleNamespace(
        token_table=table,
        body=body,
        body_matrices=total(parameter for parameter in layers if parameter.ndim == 2),
        head=head,
        senses=senses,
        streams=total(model.streams.parameters()),
        text_only=table + body + head,
        trainable=total(trainable),
        largest_stack=max(stacks.values()),
        largest_matrix=max(shape.numel() for shape in stacks),
        total=total(model.parameters()),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def memory_parts(
    config,
    micro_batch: int,
    block_size: int,
    precision: str = "bf16",
    optimizer: str = "muon",
    *,
    device_kind: str = "cuda",
    compiled: bool = False,
    activation_checkpointing: bool = False,
    accumulating: bool = True,
) -> dict[str, int]:
    """
    Bytes of one text-only training step, by part: what the framework allocates, without the driver's own (0.3 to 0.5
    GiB on a GPU).

    Args:
        precision: "bf16" or "fp16" (autocast over fp32 master weights), or "fp32".
        optimizer: "muon" (one fp32 state for the body's matrices, AdamW's two for the rest) or "adamw" (two).
        compiled: torch.compile fuses the element-wise work and recomputes it in the backward pass.
        accumulating: whether gradients of earlier micro-batches are there while the next one is computed.

    Returns:
        weights: fp32, frozen senses and streams included. gradients, optimizer_state: fp32, trainable ones only.
        weight_copies: the weights in the compute dtype, which autocast keeps for the backward pass. activations: what
        the layers keep for the backward pass, flash attention and a causal kernel assumed. head: one chunk of logits
        with its temporaries, the gradient of the hidden states and the head's own gradient. optimizer_step: temporaries
        of the optimizer, when activations and head are gone. peak: the most that is alive at one time: the sum of all
        parts but the last while the loss is computed, unless another moment takes more.
    """
    if precision not in PRECISION_BYTES:
        raise UserError(f"unknown precision {precision!r}: use one of {', '.join(PRECISION_BYTES)}")
    if optimizer not in OPTIMIZERS:
        raise UserError(f"unknown optimizer {optimizer!r}: use one of {', '.join(OPTIMIZERS)}")
    inventory = _inventory(config)
    tokens = micro_batch * block_size
    wide = PRECISION_BYTES[precision]
    states = 8 * inventory.trainable - (4 * inventory.body_matrices if optimizer == "muon" else 0)
    per_layer = layer_bytes_per_token(config, precision, device_kind, compiled)
    layers = config.num_hidden_layers
    if activation_checkpointing:
        # Each layer keeps its input; one layer at a time is computed again in full, when the head's chunk is gone.
        activations = tokens * layers * wide * config.hidden_size
        recomputed = tokens * per_layer
    else:
        activations, recomputed = tokens * layers * per_layer, 0
    # Beside the layers: the norms before and behind them, and the backbone's input, which every layer sees.
    activations += (
        tokens * 2 * (_norm_bytes(config.hidden_size, wide, device_kind, compiled) + wide * config.hidden_size)
    )
    parts = {
        "weights": 4 * inventory.total,
        "gradients": 4 * inventory.trainable,
        "optimizer_state": states,
        "weight_copies": wide * inventory.body_matrices if wide < 4 else 0,
        "activations": activations,
        "head": _head_bytes(config, tokens, wide, device_kind, compiled),
    }
    lasting = parts["weights"] + parts["optimizer_state"]
    loss_gradients = parts["gradients"] if accumulating else 0
    at_loss = lasting + loss_gradients + parts["weight_copies"] + activations + parts["head"]
    # When the backward pass begins, the head's gradient exists twice (the kept one and its scaled copy); then layer by
    # layer is recomputed, if need be, and has the gradients of the MLP's wide tensors.
    head_gradient = 4 * config.vocab_size * config.hidden_size
    working = tokens * 2 * wide * config.intermediate_size
    in_backward = lasting + loss_gradients + parts["weight_copies"] + activations + head_gradient
    in_backward += max(head_gradient, recomputed + working)
    # At its end all gradients are there, and the table has two: from the head and from the lookup.
    after_backward = lasting + parts["gradients"] + head_gradient + tokens * per_layer + working
    # The fused AdamW works in place.
    stack = inventory.largest_matrix if device_kind == "cpu" else inventory.largest_stack
    parts["optimizer_step"] = MUON_TEMPORARIES[device_kind] * stack if optimizer == "muon" else 0
    in_step = lasting + parts["gradients"] + parts["optimizer_step"]
    parts["peak"] = max(at_loss, in_backward, after_backward, in_step)
    return {name: int(size) for name, size in parts.items()}


def layer_bytes_per_token(config, precision: str, device_kind: str = "cuda", compiled: bool = False) -> int:
    """
    Bytes per token that one decoder layer keeps for its backward pass.

    Eager (d hidden_size, q and k the widths of queries and keys, f intermediate_size, w bytes of the compute dtype):

    - the residual before the layer's scales, w d;
    - two norms of the residual: their input in fp32, 4 d each, and their output, w d each, which projections read;
    - the norms of queries and keys: 4 (q + k); what attention keeps: w (q + 2 k + q) and 4 bytes per head;
    - the MLP: the activation's own input and output, 2 w f; squared ReLU under CUDA's autocast runs in fp32, which adds
      4 f for its input there.

    Compiled, all of it is in the compute dtype: the residual before each norm and the norm's output, 4 w d; queries,
    keys and values, queries and keys once more after norm and rotation, and the output of attention, w (3 q + 3 k);
    the MLP's first product and its activation, 2 w f. (tiny, 32 x 2048 on an H200: measured 9.44 GiB in all.)
    """
    wide = PRECISION_BYTES[precision]
    d, f = config.hidden_size, config.intermediate_size
    q, k = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    heads = config.num_attention_heads + config.num_key_value_heads
    if compiled:
        return wide * (4 * d + 3 * q + 3 * k + 2 * f) + 4 * (2 + heads + config.num_attention_heads)
    norms = 2 * _norm_bytes(d, wide, device_kind) + 3 * wide * d
    head_norms = _norm_bytes(q, wide, device_kind) + _norm_bytes(k, wide, device_kind) + 4 * (heads - 2)
    attention = wide * (2 * q + 2 * k) + 4 * config.num_attention_heads
    mlp = 2 * wide * f
    if config.hidden_act == "relu2" and wide < 4 and device_kind == "cuda":
        mlp += 4 * f
    return norms + head_norms + attention + mlp


def _norm_bytes(size: int, wide: int, device_kind: str, compiled: bool = False) -> int:
    """Bytes per token that an RMSNorm of this width keeps: its fp32 input and a factor; a CPU also its result."""
    if compiled:
        return wide * size + 4
    return (4 if device_kind != "cpu" else 8) * size + 4


def _head_bytes(config, tokens: int, wide: int, device_kind: str, compiled: bool) -> int:
    """Bytes of the chunked head and loss at their peak (`losses_creature.linear_cross_entropy`)."""
    import torch

    from losses_creature import chunk_tokens

    chunk = min(tokens, chunk_tokens(torch.device(device_kind)))
    before = wide if tokens > chunk else 0  # the gradient of the chunk before is still bound to its name
    if device_kind == "cuda" and (compiled or triton_available()):
        per_logit = wide + before  # the kernel turns logits into their gradient in place
    else:
        # The logits, in fp32 where they are not, and their log probabilities.
        per_logit = (wide if wide < 4 else 0) + 4 + 4 + before
    table = config.vocab_size * config.hidden_size
    logits = chunk * config.vocab_size
    working = max(
        logits * per_logit, logits * wide + table * wide
    )  # ...or the gradient and its product with the states
    copies = 4 * table + (wide * table if wide < 4 else 0)
    return working + copies + tokens * wide * config.hidden_size


# A CPU gains nothing from larger batches, and a dry run is to leave room on a small machine.
CPU_TOKEN_LIMIT = 4096
CPU_MEMORY_LIMIT = 3e9


def fit_micro_batch(
    config,
    block_size: int,
    device: Device,
    precision: str,
    *,
    optimizer: str = "muon",
    compiled: bool = False,
    activation_checkpointing: bool = False,
    limit: int = 256,
    margin: float = 0.1,
) -> int:
    """
    The largest power of two of blocks that a training step takes at once with the device's free memory.

    Args:
        config: a CreatureConfig. block_size: tokens in a block. precision: "bf16", "fp16" or "fp32".
        limit: the largest answer wanted. margin: share of the free memory that is left unused, for fragmentation.

    Returns:
        0 when not even one block fits: then a shorter block, activation checkpointing or a smaller model is needed.
    """
    budget = device.free_bytes * (1 - margin)
    if device.kind == "cpu":
        limit, budget = min(limit, max(1, CPU_TOKEN_LIMIT // block_size)), min(budget, CPU_MEMORY_LIMIT)
    batch = 1
    while batch <= limit:
        parts = memory_parts(
            config,
            batch,
            block_size,
            precision,
            optimizer,
            device_kind=device.kind,
            compiled=compiled,
            activation_checkpointing=activation_checkpointing,
        )
        if parts["peak"] > budget:
            break
        batch *= 2
    return batch // 2


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


def expected_mfu(card: str) -> tuple[float, str]:
    """(share of the peak rate, "measured" or "assumed") for a card of `hardware.CARDS`."""
    if card in MEASURED_MFU:
        return MEASURED_MFU[card], "measured"
    return ASSUMED_MFU, "assumed"


def tokens_per_second(config, block_size: int, card: str) -> float | None:
    """Training speed to expect on a GPU by its name, None when the card is unknown."""
    key = card_name(card)
    if key is None:
        return None
    return CARDS[key].peak_flops * expected_mfu(key)[0] / flops_per_token(config, block_size)


def hours(config, tokens: float, card: str, block_size: int | None = None) -> float | None:
    """Hours of training on so many tokens on one GPU by its name, None when the card is unknown."""
    speed = tokens_per_second(config, block_size or config.max_position_embeddings, card)
    return None if speed is None else tokens / speed / 3600


def matmul_flops(kind: str, precision: str, seconds: float = 0.3) -> float:
    """FLOP/s of a plain matrix product on this machine's device, timed for about so many seconds."""
    import time

    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    size = 1024 if kind == "cpu" else 8192
    matrix = torch.ones(size, size, device=kind, dtype=dtype)
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(kind, lambda: None)
    matrix @ matrix
    wait()
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        matrix @ matrix
        wait()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
