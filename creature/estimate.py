"""Parameters, FLOPs, memory and hours of a training run, before anything is trained.

Every number is counted from the architecture as it is built: parameters from the model on the meta device (no memory,
no time), memory from the tensors that a step keeps. `tests/test_estimate.py` holds it against a real training step.
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

from creature.errors import UserError
from creature.hardware import CARDS, Device, card_name, is_hopper, triton_available

OPTIMIZERS = ("muon", "adamw")
# Bytes per weight alive in `optimizer._muon_step`, which stacks the matrices of one shape (a CPU takes each alone): ten
# copies in fp32, on a CPU seven; on GPUs the iteration runs in bf16, and the compiler fuses the rest.
MUON_TEMPORARIES = {"cpu": 28, "mps": 40, "cuda": 24}
PRECISION_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Bytes per weight that Muon's step reads and writes around its iterations: stacking, momentum, evening out, update.
MUON_BYTES = 84
# What attention costs beside its products: columns of a head that take as long as a score's exponential, and ticks that
# take as long as what does not grow with the context: parts of tiles beyond the diagonal, sums of rows, conversions.
SCORE_COLUMNS = 64
ATTENTION_TICKS = 512


@dataclass(frozen=True)
class Shares:
    """
    What compiled training reaches of a card's data sheet, by kind of work (`ideal_seconds` says what counts as which).

    products, head, attention: of the peak rate. layers, weights: of the memory bandwidth. overhead: seconds of an
    optimizer step in which the card waits.
    """

    products: float
    head: float
    attention: float
    layers: float
    weights: float
    overhead: float


# Measured with this library, per card (docs/results.md); `benchmarks/scaling.py --fit` prints such a line from its rows.
MEASURED_SHARES: dict[str, Shares] = {
    # Tiny, small, medium, 1b, and tiny at 1,024, 4,096 and 8,192 ticks, the head in float8: all within 1.2 %.
    "H100 SXM": Shares(products=0.699, head=0.902, attention=0.758, layers=0.893, weights=0.899, overhead=0.00151),
}
# The same chip with other memory: not measured, but to be expected of it.
SAME_CHIP = {"H200": "H100 SXM"}
# For any other card: three quarters of that, of the head what is left without float8. An assumption, and called one.
ASSUMED_SHARES = Shares(products=0.5, head=0.48, attention=0.52, layers=0.66, weights=0.68, overhead=0.002)
# For a device whose rate is not in the table: MFU as a share of the rate of a plain matrix product timed on the spot.
ASSUMED_SHARE_OF_MATMUL = 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Parameters and FLOPs
# ---------------------------------------------------------------------------------------------------------------------


def count_parameters(config) -> dict[str, int]:
    """
    Parameters by part.

    Returns:
        token_table; body (layers and norms); head (0 while it is tied to the table); senses and streams (beside the
        token table and the tied head); text_only (token_table + body + head); trainable (what a run with the
        configuration's `loss_weights` trains); total.
    """
    inventory = _inventory(config)
    names = ("token_table", "body", "head", "senses", "streams")
    return {name: getattr(inventory, name) for name in (*names, "text_only", "trainable", "total")}


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

    from creature.optimizer import LARGEST_STACK
    from modeling_creature import STREAMS, MultiModalCreature

    values = {key: value for key, value in json.loads(config_json).items() if key != "model_type"}
    config = config_class(**values)
    with torch.device("meta"):
        model = MultiModalCreature(config)
    model.train_only(streams=[name for name in STREAMS if config.loss_weights[name]])

    def total(parameters) -> int:
        return sum(parameter.numel() for parameter in parameters)

    backbone = model.model
    table = backbone.embed_tokens.weight.numel()
    head = 0 if model.lm_head.weight is backbone.embed_tokens.weight else model.lm_head.weight.numel()
    layers = list(backbone.layers.parameters())
    senses = total(backbone.senses.parameters())
    body = total(backbone.parameters()) - table - senses
    matrices = Counter(tuple(parameter.shape) for parameter in layers if parameter.ndim == 2)
    stacks = Counter(tuple(sorted(shape)) for shape in matrices.elements())  # what Muon steps together
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return SimpleNamespace(
        token_table=table,
        body=body,
        body_matrices=total(parameter for parameter in layers if parameter.ndim == 2),
        matrices=dict(matrices),  # shape -> how many
        head=head,
        senses=senses,
        streams=total(model.streams.parameters()),
        text_only=table + body + head,
        trainable=total(trainable),
        largest_stack=max(rows * columns * min(count, LARGEST_STACK) for (rows, columns), count in stacks.items()),
        largest_matrix=max(rows * columns for rows, columns in matrices),
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
    float8: bool = False,
    activation_checkpointing: bool = False,
    accumulating: bool = True,
) -> dict[str, int]:
    """
    Bytes of one text-only training step, by part: what the framework allocates, without the driver's own (0.3 to 0.5
    GiB on a GPU).

    Args:
        precision: "bf16" or "fp16" (autocast over fp32 master weights), or "fp32".
        optimizer: "muon" (one fp32 state for the matrices and the token table, two for the rest) or "adamw" (two).
        compiled: torch.compile fuses the element-wise work and recomputes it in the backward pass.
        float8: whether the head's products are made in float8, as on Hopper under bf16.
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
    single = inventory.body_matrices + inventory.token_table  # these have one state beside Muon
    states = 8 * inventory.trainable - (4 * single if optimizer == "muon" else 0)
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
        "head": _head_bytes(config, tokens, wide, device_kind, compiled, float8 and precision == "bf16"),
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
    # At its end all gradients are there, and the table has two: from the head and from the lookup. A compiled backward
    # pass hands over all of the body's at once, beside those that they are added to.
    fresh = 4 * inventory.body if compiled and accumulating else 0
    after_backward = lasting + parts["gradients"] + fresh + head_gradient + tokens * per_layer + working
    # The fused AdamW works in place, and so do the token table's rows, compiled or a few at a time.
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
    - the norms of queries and keys: their input in fp32, 4 (q + k), and a factor per head;
    - what attention keeps: queries, keys, values and output, w (q + 2 k + q), and 4 bytes per head; on a CPU the output
      once more in the projection's layout;
    - the MLP: the activation's own input and output, 2 w f; squared ReLU under CUDA's autocast runs in fp32, which adds
      4 f for its input there.

    Compiled, all of it is in the compute dtype: the residual before the scales and before each norm, and the norms'
    output, 5 w d; queries and keys before their norm, w (q + k), and the rest as above.

    The kernels (`kernels_creature.py`, half precision on CUDA) keep no input of the norms of queries and keys, and of
    squared ReLU its output alone, w f.
    """
    wide = PRECISION_BYTES[precision]
    d, f = config.hidden_size, config.intermediate_size
    q, k = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    heads = config.num_attention_heads + config.num_key_value_heads
    kernels = _has_kernels(device_kind, wide, compiled)
    relu2 = config.hidden_act == "relu2"
    norms = 2 * _norm_bytes(d, wide, device_kind, compiled) + 3 * wide * d
    head_norms = 4 * heads + (0 if kernels else (wide if compiled else 4) * (q + k))
    attention = wide * (2 * q + 2 * k + (q if device_kind == "cpu" else 0)) + 4 * config.num_attention_heads
    mlp = wide * f if kernels and relu2 else 2 * wide * f
    if relu2 and wide < 4 and device_kind == "cuda" and not (kernels or compiled):
        mlp += 4 * f
    return norms + head_norms + attention + mlp


def _has_kernels(device_kind: str, wide: int, compiled: bool) -> bool:
    """Whether a step runs `kernels_creature.py`; where there is a compiler for CUDA, there is Triton."""
    return device_kind == "cuda" and wide < 4 and (compiled or triton_available())


def _norm_bytes(size: int, wide: int, device_kind: str, compiled: bool = False) -> int:
    """Bytes per token that an RMSNorm of this width keeps: its fp32 input and a factor; a CPU also its result."""
    if compiled:
        return wide * size + 4
    return (4 if device_kind != "cpu" else 8) * size + 4


def _head_bytes(config, tokens: int, wide: int, device_kind: str, compiled: bool, float8: bool) -> int:
    """Bytes of the chunked head and loss at their peak (`losses_creature.linear_cross_entropy`)."""
    chunk = min(tokens, _chunk_tokens(device_kind, float8))  # in float8 all is there twice, and as large
    before = wide if tokens > chunk else 0  # the gradient of the chunk before is still bound to its name
    if _has_kernels(device_kind, wide, compiled):
        per_logit = wide + before  # the kernel writes no logits, but what their gradient is made of
    else:
        # The logits in fp32 and their log probabilities.
        per_logit = 4 + 4 + before
    table = config.vocab_size * config.hidden_size
    logits = chunk * config.vocab_size
    working = max(
        logits * per_logit, logits * wide + table * wide
    )  # ...or the gradient and its product with the states
    copies = 4 * table + (wide * table if wide < 4 else 0)
    return working + copies + tokens * wide * config.hidden_size


def _chunk_tokens(device_kind: str, float8: bool = False) -> int:
    import torch

    from losses_creature import FLOAT8_CHUNK, chunk_tokens

    return FLOAT8_CHUNK if float8 else chunk_tokens(torch.device(device_kind))


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
            float8=device.is_hopper,
            activation_checkpointing=activation_checkpointing,
        )
        if parts["peak"] > budget:
            break
        batch *= 2
    return batch // 2


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


def ideal_seconds(
    config, micro_batch: int, block_size: int, card: str, accumulation: int = 1, optimizer: str = "muon"
) -> dict[str, float]:
    """
    Seconds of one optimizer step by kind of work, if a card of `hardware.CARDS` gave all that its data sheet says.

    A roofline (Williams et al. 2009): arithmetic over the peak rate, bytes over the memory bandwidth. What is reached
    of either is in `Shares`, under the same names:

    - products: three products for every matrix of the body (forward, gradient of input and of weight), each as long as
      its FLOPs or its operands take, whichever is longer; and the products of Muon's five Newton-Schulz iterations.
    - head: the same three of the vocabulary, whose first one makes the loss too.
    - attention: the causal half of scores and their use, forward and twice backward. Besides head_dim columns, a score
      costs its exponential, as much as SCORE_COLUMNS more; and what does not grow with the context takes as long as
      ATTENTION_TICKS more of it.
    - layers: what element-wise work reads and writes (`layer_traffic_per_token`).
    - weights: casting the weights, adding up gradients, clipping and the optimizer, all independent of the tokens.
    """
    rate, bandwidth = CARDS[card].peak_flops, CARDS[card].bandwidth
    inventory = _inventory(config)
    tokens = micro_batch * block_size
    d, wide = config.hidden_size, 2
    table = config.vocab_size * d

    def product(rows: int, columns: int) -> float:
        operands = wide * (tokens * (rows + columns) + rows * columns)
        return max(2 * tokens * rows * columns / rate, operands / bandwidth)

    body = muon_flops = muon_bytes = 0.0
    for (rows, columns), count in inventory.matrices.items():
        body += 3 * count * product(rows, columns)
        small, large = min(rows, columns), max(rows, columns)
        # An iteration: x x^T, its square, and the product with x; x passes memory five times, the squares six times.
        muon_flops += 5 * count * (4 * small * small * large + 2 * small**3)
        muon_bytes += count * (5 * wide * (5 * small * large + 6 * small * small) + MUON_BYTES * rows * columns)
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * (config.head_dim + SCORE_COLUMNS)
    attention *= tokens * (block_size + ATTENTION_TICKS) / 2

    # Bytes per micro-batch: of a body's weight, read in fp32 and written in bf16, its gradient the other way round and
    # added; of the table, the fp32 sum of its gradient, which every chunk of the head reads and writes (in the product
    # itself, but in float8 behind it, from bf16), and five passes over that.
    float8 = is_hopper(card)
    chunks = -(-tokens // _chunk_tokens("cuda", float8))
    weights = accumulation * (20 * inventory.body_matrices + table * ((12 if float8 else 8) * chunks + 40))
    # Per step: clipping reads twice and writes once; AdamW reads four and writes three numbers of each weight, by rows
    # the gradient is read twice and there is no second moment.
    weights += 12 * inventory.trainable
    if optimizer == "muon":
        weights += muon_bytes + 28 * (inventory.trainable - inventory.body_matrices) - 4 * inventory.token_table
    else:
        muon_flops = 0.0
        weights += 28 * inventory.trainable
    layers = config.num_hidden_layers * layer_traffic_per_token(config) + 24 * wide * d  # and before and behind them
    return {
        "products": accumulation * body + muon_flops / rate,
        "head": accumulation * 3 * product(config.vocab_size, d),
        "attention": accumulation * attention / rate,
        "layers": accumulation * tokens * layers / bandwidth,
        "weights": weights / bandwidth,
    }


def layer_traffic_per_token(config, wide: int = 2) -> int:
    """
    Bytes per token that the element-wise work of one compiled layer reads and writes, forward and backward.

    In units of d, q, k, f as in `layer_bytes_per_token`, forward and backward:

    - scales, both norms and both sums of the residual: 9 d and 17 d (weights' gradients read once more);
    - norm and rotation of queries and keys: 2 (q + k) and 3 (q + k); the first layer's values added: 3 k and 3 k;
    - the activation, which is made inside a product: its output once more, f, in the backward pass. Others than squared
      ReLU are read and written, 2 f and 3 f.
    """
    d, f = config.hidden_size, config.intermediate_size
    q, k = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    return wide * (26 * d + 5 * (q + k) + 6 * k + (1 if config.hidden_act == "relu2" else 5) * f)


def card_shares(card: str) -> tuple[Shares, str]:
    """(what a card of `hardware.CARDS` reaches, "measured" or "assumed")."""
    if card in MEASURED_SHARES:
        return MEASURED_SHARES[card], "measured"
    return MEASURED_SHARES.get(SAME_CHIP.get(card), ASSUMED_SHARES), "assumed"


def step_seconds(
    config, micro_batch: int, block_size: int, card: str, accumulation: int = 1, optimizer: str = "muon"
) -> float | None:
    """Seconds of one compiled optimizer step on a GPU by its name, None when the card is unknown."""
    key = card_name(card)
    if key is None:
        return None
    shares = card_shares(key)[0]
    ideal = ideal_seconds(config, micro_batch, block_size, key, accumulation, optimizer)
    return shares.overhead + sum(seconds / getattr(shares, kind) for kind, seconds in ideal.items())


def tokens_per_second(
    config, micro_batch: int, block_size: int, card: str, accumulation: int = 1, optimizer: str = "muon"
) -> float | None:
    """Training speed to expect on a GPU by its name, None when the card is unknown."""
    seconds = step_seconds(config, micro_batch, block_size, card, accumulation, optimizer)
    return None if seconds is None else micro_batch * accumulation * block_size / seconds


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
