"""Parameters, FLOPs, memory and hours of a training run, before anything is trained.

Parameters are counted on a model without memory (the meta device), memory from the tensors that a training step keeps.
`tests/test_estimate.py` compares the memory with real steps.
"""

from functools import lru_cache
from types import SimpleNamespace

from creature.errors import UserError
from creature.hardware import CARDS, Device, card_name, triton_available

OPTIMIZERS = ("muon", "adamw")
# Bytes per weight of a stack of matrices that Muon updates together: fp32 copies on a CPU, fewer where it runs in bf16.
MUON_TEMPORARIES = 28
PRECISION_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Share of a card's peak FLOP/s that compiled training reaches, the optimizer included (docs/results.md). On an H100 it
# was 47 % for tiny, small and medium and 50 % for 1b, on an H200 52 % for tiny.
MEASURED_MFU = {"H100 SXM": 0.48, "H200": 0.5}
ASSUMED_MFU = 0.36  # of any other card: an assumption, three quarters of what was measured
ASSUMED_SHARE_OF_MATMUL = 0.5  # of a matrix product timed here, where the card is unknown: an assumption, too
# A CPU gains nothing from larger batches, and a dry run should leave room on a small machine.
CPU_TOKEN_LIMIT = 4096
CPU_MEMORY_LIMIT = 3e9


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
    counts = _count(config)
    names = ("token_table", "body", "head", "senses", "streams", "text_only", "trainable", "total")
    return {name: getattr(counts, name) for name in names}


def flops_per_token(config, block_size: int) -> float:
    """
    FLOPs of one trained token of the text-only model, forward and backward.

    6 x (weights of the body's matrices + hidden_size x vocab_size of the head, tied or not): 2 in the forward pass,
    4 in the backward pass (Kaplan et al. 2020). Looking up a token's row is no arithmetic. Attention scores and their
    use add 12 x layers x heads x head_dim x block_size, halved because a causal kernel skips the future. Recomputing
    activations adds work but no FLOPs of the model, so it lowers the MFU.
    """
    matrices = _count(config).body_matrices + config.hidden_size * config.vocab_size
    width = config.num_attention_heads * config.head_dim
    return 6.0 * matrices + 12.0 * config.num_hidden_layers * width * block_size / 2


def _count(config) -> SimpleNamespace:
    """Parameter counts of a configuration's model, computed once per configuration."""
    return _count_json(config.to_json_string(use_diff=False), type(config))


@lru_cache(maxsize=16)
def _count_json(config_json: str, config_class: type) -> SimpleNamespace:
    import json
    from collections import Counter

    import torch

    from creature.optimizer import LARGEST_STACK, parameter_groups
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
    senses = total(backbone.senses.parameters())
    body = total(backbone.parameters()) - table - senses
    matrices = [parameter for parameter in backbone.layers.parameters() if parameter.ndim == 2]
    groups = parameter_groups(model, learning_rate=1.0, matrix_learning_rate=1.0, weight_decay=0.0)
    updated = {kind: [p for g in groups if g.get(kind) for p in g["params"]] for kind in ("muon", "by_row")}
    # Muon stacks a shape with its transpose.
    shapes = Counter(tuple(sorted(matrix.shape)) for matrix in updated["muon"])
    return SimpleNamespace(
        token_table=table,
        body=body,
        body_matrices=total(matrices),
        head=head,
        senses=senses,
        streams=total(model.streams.parameters()),
        text_only=table + body + head,
        trainable=total(parameter for parameter in model.parameters() if parameter.requires_grad),
        one_state=total(updated["muon"] + updated["by_row"]),
        largest_stack=max(rows * columns * min(count, LARGEST_STACK) for (rows, columns), count in shapes.items()),
        largest_matrix=max(rows * columns for rows, columns in shapes),
        total=total(model.parameters()),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def memory_parts(
    config,
    micro_batch: int,
    block_size: int,
    device: Device,
    precision: str = "bf16",
    optimizer: str = "muon",
    *,
    compiled: bool = False,
    activation_checkpointing: bool = False,
) -> dict[str, int]:
    """
    Bytes of one text-only training step, by part: what torch allocates, without the driver's own 0.3 to 0.5 GiB.

    Args:
        precision: "bf16" or "fp16" (autocast over fp32 master weights), or "fp32".
        optimizer: "muon" (one fp32 state for the matrices and the token table, two for the rest) or "adamw" (two).
        compiled: torch.compile fuses the element-wise work and recomputes it in the backward pass.

    Returns:
        weights: fp32, frozen senses and streams included. gradients, optimizer_state: fp32, trainable ones only.
        weight_copies: the weights in the compute dtype, which autocast keeps for the backward pass. activations: what
        the layers keep for the backward pass. head: one chunk of logits with its temporaries, the gradients of the
        hidden states and of the head; or one recomputed layer, if that is more. optimizer_step: temporaries of the
        optimizer, when copies, activations and head are freed. peak: the larger sum of the two moments.
    """
    if precision not in PRECISION_BYTES:
        raise UserError(f"unknown precision {precision!r}: use one of {', '.join(PRECISION_BYTES)}")
    if optimizer not in OPTIMIZERS:
        raise UserError(f"unknown optimizer {optimizer!r}: use one of {', '.join(OPTIMIZERS)}")
    counts, tokens, wide = _count(config), micro_batch * block_size, PRECISION_BYTES[precision]
    kernels = _has_kernels(device, precision, compiled)
    layer = _layer_bytes(config, wide, device, compiled, kernels)
    head = _head_bytes(config, tokens, wide, device, precision, kernels)
    kept = layer
    if activation_checkpointing:  # a layer keeps its input, and is recomputed when the head's chunk is freed
        kept = wide * config.hidden_size
        head = max(head, tokens * (layer + 2 * wide * config.intermediate_size))
    one_state = counts.one_state if optimizer == "muon" else 0
    # A CPU updates one matrix at a time.
    updated = counts.largest_matrix if device.kind == "cpu" else counts.largest_stack
    parts = {
        "weights": 4 * counts.total,
        "gradients": 4 * counts.trainable,
        "optimizer_state": 8 * counts.trainable - 4 * one_state,
        "weight_copies": wide * counts.body_matrices if wide < 4 else 0,
        # Beside the layers: the backbone's input and output, and the norms before and behind the layers.
        "activations": tokens * (config.num_hidden_layers * kept + 4 * wide * config.hidden_size),
        "head": head,
        "optimizer_step": MUON_TEMPORARIES * updated if optimizer == "muon" else 0,
    }
    always = parts["weights"] + parts["gradients"] + parts["optimizer_state"]
    in_loss = parts["weight_copies"] + parts["activations"] + parts["head"]
    parts["peak"] = always + max(in_loss, parts["optimizer_step"])
    return parts


def _has_kernels(device: Device, precision: str, compiled: bool) -> bool:
    """Whether a step of the job runs our Triton kernels; where torch compiles for CUDA, Triton is installed."""
    return device.kind == "cuda" and precision != "fp32" and (compiled or triton_available())


def _layer_bytes(config, wide: int, device: Device, compiled: bool, kernels: bool) -> int:
    """
    Bytes per token that one decoder layer keeps for its backward pass, flash attention assumed.

    d is hidden_size, q and k are the widths of queries and keys, f is intermediate_size, wide the bytes of the compute
    dtype. Kept are the residual before the layer's scales, the inputs and outputs of two norms, queries and keys before
    their norm, queries, keys, values and output of attention, and the MLP's activation before and after its function.
    """
    d, f = config.hidden_size, config.intermediate_size
    q, k = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    norm = wide if compiled else 4  # a norm runs in fp32, and keeps its input so unless it is compiled
    size = wide * (3 * d + 2 * q + 2 * k + 2 * f) + 2 * norm * d
    if not kernels:
        size += norm * (q + k)
    if device.kind == "cpu" and not compiled:
        size += 8 * d  # the two norms' results in fp32
    if config.hidden_act == "relu2" and device.kind == "cuda" and wide < 4:
        size += -wide * f if kernels else 4 * f  # the kernel keeps the output alone; autocast squares in fp32
    return size


def _head_bytes(config, tokens: int, wide: int, device: Device, precision: str, kernels: bool) -> int:
    """Bytes of the chunked head and loss at their peak (`losses_creature.linear_cross_entropy`)."""
    import torch

    from creature.fast.head import FLOAT8_CHUNK
    from losses_creature import chunk_tokens

    float8 = device.is_hopper and precision == "bf16"
    chunk = min(tokens, FLOAT8_CHUNK if float8 else chunk_tokens(torch.device(device.kind)))
    # Logits and log probabilities in fp32, where no kernel writes the gradient at once; and the chunk before.
    per_logit = (wide if kernels else 8) + (wide if tokens > chunk else 0)
    table = config.vocab_size * config.hidden_size
    copies = 4 * table + (wide * table if wide < 4 else 0)
    return chunk * config.vocab_size * per_logit + copies + tokens * wide * config.hidden_size


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
    The largest power of two of blocks that a training step computes at once in the device's free memory.

    Args:
        config: a CreatureConfig. block_size: tokens in a block. precision: "bf16", "fp16" or "fp32".
        limit: the largest useful answer. margin: share of the free memory that is left unused, for fragmentation.

    Returns:
        0 when not even one block fits: then a shorter block, activation checkpointing or a smaller model is needed.
    """
    budget = device.free_bytes * (1 - margin)
    if device.kind == "cpu":
        limit, budget = min(limit, max(1, CPU_TOKEN_LIMIT // block_size)), min(budget, CPU_MEMORY_LIMIT)
    form = {"compiled": compiled, "activation_checkpointing": activation_checkpointing}
    batch = 1
    while batch <= limit:
        if memory_parts(config, batch, block_size, device, precision, optimizer, **form)["peak"] > budget:
            break
        batch *= 2
    return batch // 2


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


def expected_mfu(card: str) -> tuple[float, str]:
    """(share of the peak FLOP/s that training reaches on a card of `hardware.CARDS`, "measured" or "assumed")."""
    return (MEASURED_MFU[card], "measured") if card in MEASURED_MFU else (ASSUMED_MFU, "assumed")


def tokens_per_second(config, block_size: int, gpu: str) -> float | None:
    """Training speed to expect on one GPU by its name, None when the GPU is unknown: never a guess."""
    card = card_name(gpu)
    if card is None:
        return None
    return CARDS[card].peak_flops * expected_mfu(card)[0] / flops_per_token(config, block_size)


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
