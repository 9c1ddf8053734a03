"""Parameters, FLOPs, memory and hours of a training run, before anything is trained.

Parameters are counted on a model without memory (the meta device), memory from the tensors that a training step keeps.
A round on text needs formulas alone; what other senses and streams add to a tick is measured
(`creature.estimate_senses`). `tests/test_estimate.py` compares memory and FLOPs with real steps.

In all functions, `senses` are the names of `configuration_creature.SENSES` that a batch has and `streams` those of
`STREAMS` that are trained, their efference copies with them. Without `backbone`, the token table, the layers and the
head of the internal text are frozen. A token is a tick.
"""

from functools import lru_cache
from types import SimpleNamespace

from creature.errors import UserError
from creature.estimate_senses import check_trained, tick_costs
from creature.hardware import CARDS, Device, card_name, triton_available

OPTIMIZERS = ("muon", "adamw")
VOICE, TEXT = ("internal_voice",), ("internal_text",)  # what a round on text alone trains
# Bytes per weight of a stack of matrices that Muon updates together: fp32 copies on a CPU, fewer where it runs in bf16.
MUON_TEMPORARIES = 28
PRECISION_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Share of a card's peak FLOP/s that compiled training reaches, the optimizer included (docs/results.md). On an H100 it
# was 47 % for tiny, small and medium and 50 % for 1b, on an H200 52 % for tiny.
MEASURED_MFU = {"H100 SXM": 0.48, "H200": 0.5}
ASSUMED_MFU = 0.36  # of any other card: an assumption, three quarters of what was measured
ASSUMED_SHARE_OF_MATMUL = 0.5  # of a matrix product timed here, where the card is unknown: an assumption, too
# Bytes a second that a card sends to others of its machine, in one direction, by NVIDIA's data sheets: NVLink, or 16
# lanes of PCIe 4.0 where there is none. How much of it an all-reduce reaches is not measured here.
LINK_BYTES = {"V100 SXM": 150e9, "A100": 300e9, "H100 SXM": 450e9, "H200": 450e9, "B200": 900e9}
PCIE_BYTES = 32e9
# A CPU gains nothing from larger batches, and a dry run should leave room on a small machine.
CPU_TOKEN_LIMIT = 4096
CPU_MEMORY_LIMIT = 3e9


# ---------------------------------------------------------------------------------------------------------------------
# Parameters and FLOPs
# ---------------------------------------------------------------------------------------------------------------------


def count_parameters(
    config, senses: tuple[str, ...] = VOICE, streams: tuple[str, ...] | None = None, backbone: bool = True
) -> dict[str, int]:
    """
    Parameters by part.

    Args:
        streams: by default those that have a weight in the configuration's `loss_weights`.

    Returns:
        token_table; body (layers and norms); head (0 while it is tied to the table); senses and streams (beside the
        token table and the tied head); text_only (token_table + body + head); trainable (what such a run trains);
        total.
    """
    if streams is None:
        streams = tuple(name for name, weight in config.loss_weights.items() if weight)
    counts = _count(config, senses, streams, backbone)
    names = ("token_table", "body", "head", "senses", "streams", "text_only", "trainable", "total")
    return {name: getattr(counts, name) for name in names}


def flops_per_token(
    config, block_size: int, senses: tuple[str, ...] = VOICE, streams: tuple[str, ...] = TEXT, backbone: bool = True
) -> float:
    """
    FLOPs of one trained token, forward and backward.

    6 x (weights of the body's matrices + hidden_size x vocab_size of a text's head, tied or not): 2 in the forward
    pass, 4 in the backward pass (Kaplan et al. 2020), 2 where the weights are frozen. Looking up a token's row is no
    arithmetic. Attention scores and their use add 12 x layers x heads x head_dim x the ticks that a tick sees: half a
    block, because a causal kernel skips the future, or less with a sliding window. Recomputing activations adds work
    but no FLOPs of the model, so it lowers the MFU.
    """
    counts = _count(config, senses, streams, backbone)
    matrices = counts.body_matrices + config.hidden_size * config.vocab_size * _text_heads(streams)
    width = config.num_attention_heads * config.head_dim
    window = min(config.sliding_window or block_size, block_size)
    seen = window - window**2 / (2 * block_size)
    flops = (6.0 if backbone else 4.0) * matrices + 12.0 * config.num_hidden_layers * width * seen
    if beside_text(senses, streams):
        flops += tick_costs(config, senses, streams, backbone, "fp32").flops
    return flops


def beside_text(senses: tuple[str, ...], streams: tuple[str, ...]) -> bool:
    """Whether a round has any sense or stream beside the internal ones."""
    return bool({*senses} - {*VOICE} or {*streams} - {*TEXT})


def _text_heads(streams: tuple[str, ...]) -> int:
    """How many streams are read off the vocabulary."""
    return len({*streams} & {"internal_text", "external_text"})


def _count(
    config, senses: tuple[str, ...] = VOICE, streams: tuple[str, ...] = TEXT, backbone: bool = True
) -> SimpleNamespace:
    """Parameter counts of a configuration's model and of what is trained of it, computed once."""
    check_trained(config, senses, streams)
    json_and_class = config.to_json_string(use_diff=False), type(config)
    return _count_json(*json_and_class, frozenset(senses), frozenset(streams), backbone)


@lru_cache(maxsize=16)
def _count_json(
    config_json: str, config_class: type, senses: frozenset, streams: frozenset, backbone: bool
) -> SimpleNamespace:
    import json
    from collections import Counter

    import torch

    from creature.optimizer import LARGEST_STACK, parameter_groups
    from modeling_creature import MultiModalCreature

    values = {key: value for key, value in json.loads(config_json).items() if key != "model_type"}
    config = config_class(**values)
    with torch.device("meta"):
        model = MultiModalCreature(config)
    model.train_only(senses, streams, backbone)

    def total(parameters) -> int:
        return sum(parameter.numel() for parameter in parameters)

    body = model.model
    table = body.embed_tokens.weight.numel()
    head = 0 if model.lm_head.weight is body.embed_tokens.weight else model.lm_head.weight.numel()
    in_senses = total(body.senses.parameters())
    in_body = total(body.parameters()) - table - in_senses
    matrices = [parameter for parameter in body.layers.parameters() if parameter.ndim == 2]
    groups = parameter_groups(model, learning_rate=1.0, matrix_learning_rate=1.0, weight_decay=0.0)
    updated = {kind: [p for g in groups if g.get(kind) for p in g["params"]] for kind in ("muon", "by_row")}
    # Muon stacks a shape with its transpose.
    shapes = Counter(tuple(sorted(matrix.shape)) for matrix in updated["muon"])
    stacks = [rows * columns * min(count, LARGEST_STACK) for (rows, columns), count in shapes.items()]
    return SimpleNamespace(
        token_table=table,
        body=in_body,
        body_matrices=total(matrices),
        # In forward and backward alike: those of the frozen layers, and of the senses and streams that are trained.
        computed_matrices=total({id(matrix): matrix for matrix in (*matrices, *updated["muon"])}.values()),
        head=head,
        senses=in_senses,
        streams=total(model.streams.parameters()),
        text_only=table + in_body + head,
        trainable=total(parameter for parameter in model.parameters() if parameter.requires_grad),
        one_state=total(updated["muon"] + updated["by_row"]),
        largest_stack=max(stacks, default=0),
        largest_matrix=max((rows * columns for rows, columns in shapes), default=0),
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
    senses: tuple[str, ...] = VOICE,
    streams: tuple[str, ...] = TEXT,
    backbone: bool = True,
) -> dict[str, int]:
    """
    Bytes of one training step, by part: what torch allocates, without the driver's own 0.3 to 0.5 GiB.

    Args:
        micro_batch: blocks or clips of block_size ticks.
        precision: "bf16" or "fp16" (autocast over fp32 master weights), or "fp32".
        optimizer: "muon" (one fp32 state for the matrices and the token table, two for the rest) or "adamw" (two).
        compiled: torch.compile fuses the element-wise work and recomputes it in the backward pass.

    Returns:
        weights: fp32, frozen ones included. gradients, optimizer_state: fp32, trainable ones only.
        weight_copies: the weights in the compute dtype, which autocast keeps for the backward pass. batch: pictures and
        all else that senses and streams are given (0 for text). activations: what layers, senses and streams keep for
        the backward pass, the latter two as if they were not compiled. head: one chunk of logits with its temporaries,
        the gradients of the hidden states and of the head; or one recomputed layer, if that is more. optimizer_step:
        temporaries of the optimizer, when copies, activations and head are freed. peak: the larger sum of the two
        moments.
    """
    if precision not in PRECISION_BYTES:
        raise UserError(f"unknown precision {precision!r}: use one of {', '.join(PRECISION_BYTES)}")
    if optimizer not in OPTIMIZERS:
        raise UserError(f"unknown optimizer {optimizer!r}: use one of {', '.join(OPTIMIZERS)}")
    counts = _count(config, senses, streams, backbone)
    tokens, wide = micro_batch * block_size, PRECISION_BYTES[precision]
    kernels = _has_kernels(device, precision, compiled)
    layer = _layer_bytes(config, wide, device, compiled, kernels, backbone)
    head = _head_bytes(config, tokens, wide, device, precision, kernels, _text_heads(streams), backbone)
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
        "weight_copies": wide * counts.computed_matrices if wide < 4 else 0,
        "batch": 0,
        # Beside the layers: the backbone's input and output, and the norms before and behind the layers.
        "activations": tokens * (config.num_hidden_layers * kept + 4 * wide * config.hidden_size),
        "head": head,
        "optimizer_step": MUON_TEMPORARIES * updated if optimizer == "muon" else 0,
    }
    if beside_text(senses, streams):
        costs = tick_costs(config, senses, streams, backbone, precision)
        parts["batch"] = tokens * costs.batch
        parts["activations"] += tokens * costs.kept
    always = parts["weights"] + parts["gradients"] + parts["optimizer_state"] + parts["batch"]
    in_loss = parts["weight_copies"] + parts["activations"] + parts["head"]
    parts["peak"] = always + max(in_loss, parts["optimizer_step"])
    return parts


def _has_kernels(device: Device, precision: str, compiled: bool) -> bool:
    """Whether a step of the job runs our Triton kernels; where torch compiles for CUDA, Triton is installed."""
    return device.kind == "cuda" and precision != "fp32" and (compiled or triton_available())


def _layer_bytes(config, wide: int, device: Device, compiled: bool, kernels: bool, backbone: bool) -> int:
    """
    Bytes per token that one decoder layer keeps for its backward pass, flash attention assumed.

    d is hidden_size, q and k are the widths of queries and keys, f is intermediate_size, wide the bytes of the compute
    dtype. Kept are the residual before the layer's scales, the inputs and outputs of two norms, queries and keys before
    their norm, queries, keys, values and output of attention, and the MLP's activation before and after its function.
    Frozen weights have no gradients that would need the residual, the outputs of the norms and of the function.
    """
    d, f = config.hidden_size, config.intermediate_size
    q, k = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    norm = wide if compiled else 4  # a norm runs in fp32, and keeps its input so unless it is compiled
    size = wide * (2 * q + 2 * k + f) + 2 * norm * d
    if backbone:
        size += wide * (3 * d + f)
    if not kernels:
        size += norm * (q + k)
    if device.kind == "cpu" and not compiled and backbone:
        size += 8 * d  # the two norms' results in fp32
    if config.hidden_act == "relu2" and device.kind == "cuda" and wide < 4 and (backbone or not kernels):
        size += -wide * f if kernels else 4 * f  # the kernel keeps the output alone; autocast squares in fp32
    return size


def _head_bytes(
    config, tokens: int, wide: int, device: Device, precision: str, kernels: bool, texts: int, backbone: bool
) -> int:
    """Bytes of the chunked heads and losses of texts at their peak (`losses_creature.linear_cross_entropy`)."""
    import torch

    from creature.fast.head import FLOAT8_CHUNK
    from losses_creature import chunk_tokens

    float8 = device.is_hopper and precision == "bf16"
    chunk = min(tokens, FLOAT8_CHUNK if float8 else chunk_tokens(torch.device(device.kind)))
    # Logits and log probabilities in fp32, where no kernel writes the gradient at once; and the chunk before.
    per_logit = (wide if kernels else 8) + (wide if tokens > chunk else 0)
    table = config.vocab_size * config.hidden_size
    copies = (4 * table * texts if backbone else 0) + (wide * table if wide < 4 else 0)
    if not texts:
        return tokens * wide * config.hidden_size
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
    senses: tuple[str, ...] = VOICE,
    streams: tuple[str, ...] = TEXT,
    backbone: bool = True,
) -> int:
    """
    The largest power of two of blocks or clips that a training step computes at once in the device's free memory.

    Args:
        config: a CreatureConfig. block_size: tokens in a block, ticks in a clip. precision: "bf16", "fp16" or "fp32".
        limit: the largest useful answer. margin: share of the free memory that is left unused, for fragmentation.

    Returns:
        0 when not even one block fits: then a shorter block, activation checkpointing or a smaller model is needed.
    """
    budget = device.free_bytes * (1 - margin)
    if device.kind == "cpu":
        limit, budget = min(limit, max(1, CPU_TOKEN_LIMIT // block_size)), min(budget, CPU_MEMORY_LIMIT)
    form = {"compiled": compiled, "activation_checkpointing": activation_checkpointing}
    form |= {"senses": senses, "streams": streams, "backbone": backbone}
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


def tokens_per_second(
    config,
    block_size: int,
    gpu: str,
    senses: tuple[str, ...] = VOICE,
    streams: tuple[str, ...] = TEXT,
    backbone: bool = True,
) -> float | None:
    """
    Training speed to expect on one GPU by its name, None when the GPU is unknown: never a guess.

    With other senses and streams it is an upper bound, because the share of the peak is that of text.
    """
    card = card_name(gpu)
    if card is None:
        return None
    flops = flops_per_token(config, block_size, senses, streams, backbone)
    return CARDS[card].peak_flops * expected_mfu(card)[0] / flops


def card_link(card: str) -> tuple[float, str]:
    """(bytes a second in one direction between cards of `hardware.CARDS` in one machine, the name of the link)."""
    return (LINK_BYTES[card], "NVLink") if card in LINK_BYTES else (PCIE_BYTES, "PCIe 4.0")


def all_reduce_seconds(trainable: int, cards: int, link: float) -> float:
    """
    The time to average the fp32 gradients of so many weights over cards, at the full rate of the link.

    In a ring, each card sends 2 (N - 1) / N times what is added up, half of it to add up and half to spread the sum.
    """
    return 2 * (cards - 1) / cards * 4 * trainable / link


def data_parallel_speed(speed: float, step_tokens: int, cards: int, reduce_seconds: float) -> float:
    """
    Tokens/s of several cards that divide the tokens of a step, where one has `speed`.

    The gradients are averaged after the backward pass and nothing overlaps it. That a card is less busy with a smaller
    share is not counted, nor the second averaging of a step in the batch warm-up.
    """
    return step_tokens / (step_tokens / cards / speed + reduce_seconds)


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
