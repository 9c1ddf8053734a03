# Copyright 2026 The MultiModalCreature developers. Licensed under the Apache License, Version 2.0.
"""The output streams: one head each, from the backbone's hidden state to what the creature emits, and its loss.

One convention holds for all streams: the target at tick t is what arrives (or is emitted) at tick t, and it is
predicted from the hidden state of tick t - 1. Losses are sums over the targets; the caller divides them by the count of
the whole accumulated batch, so that micro-batches simply add up. The count of motor commands is the error of repeating
the last command.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

try:
    from .configuration_creature import STREAMS, CreatureConfig
    from .losses_creature import IGNORE_INDEX, linear_cross_entropy
    from .motor_creature import AnimationStream, errors_of_repeating, last_command
    from .sampling_creature import GREEDY, Sampling, sample
    from .senses_creature import check_ids, check_organs, check_shapes
except ImportError:
    from configuration_creature import STREAMS, CreatureConfig
    from losses_creature import IGNORE_INDEX, linear_cross_entropy
    from motor_creature import AnimationStream, errors_of_repeating, last_command
    from sampling_creature import GREEDY, Sampling, sample
    from senses_creature import check_ids, check_organs, check_shapes

# Of each target, the field of the configuration that is 0 in a creature without the organ for it.
TARGET_ORGANS = {
    "audio_targets": "num_audio_codebooks",
    "rotation_targets": "num_joints",
    "blend_shape_targets": "num_blend_shapes",
    "eye_targets": "num_blend_shapes",
    "action_targets": "action_size",
}


def text_target_weights(config: CreatureConfig, labels: torch.Tensor) -> torch.Tensor:
    """
    How much each label counts: 0 for -100, `null_loss_weight` for NULL (a known silence), 1 for a token.

    labels: any shape, ids -> float32 of the same shape.
    """
    weights = (labels != IGNORE_INDEX).float()
    if config.null_token_id is not None and config.null_loss_weight != 1.0:
        weights = weights * torch.where(labels == config.null_token_id, float(config.null_loss_weight), 1.0)
    return weights


def text_loss(
    config: CreatureConfig,
    hidden: torch.Tensor,
    head: torch.Tensor | nn.Module,
    labels: torch.Tensor,
    cross_entropy: Callable = linear_cross_entropy,
    further_targets: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Sum of the next-token losses of a text stream.

    hidden: [B, T, hidden_size] of ticks 0..T-1. head: its weight [vocab_size, hidden_size], or a module that returns
    the logits, all of them at once. labels: [B, T], unshifted, or [B, T + 1] where the tick after the last is known.
    cross_entropy: `losses_creature.linear_cross_entropy`, or another function of the same signature.
    further_targets: as in `MultiModalCreature.forward`.
    """
    # A last tick without a target gets one of weight 0, so that `hidden` need not be cut, which would copy it.
    targets = F.pad(labels[:, 1:], (0, hidden.shape[1] + 1 - labels.shape[1]), value=IGNORE_INDEX)
    flat, weights = targets.reshape(-1).clamp(min=0), text_target_weights(config, targets)
    if isinstance(head, nn.Module):
        logits = head(hidden).float()
        loss = (F.cross_entropy(logits.flatten(0, 1), flat, reduction="none") * weights.reshape(-1)).sum()
    else:
        loss = cross_entropy(hidden.reshape(-1, hidden.shape[-1]), head, flat, weights.reshape(-1))
    if further_targets is None:
        return loss
    # The shares p_k of a tick add up to 1, so that the sum of p_k (lse - logit_k), where lse is the logarithm in the
    # softmax, is lse - logit_1 plus the sum of p_k (logit_1 - logit_k): the loss above, and a few rows of the table.
    ids, shares = targets_ahead(config, targets, further_targets)
    factors = weights[..., None] * torch.cat((1 - shares[..., :1], -shares[..., 1:]), dim=-1)
    if isinstance(head, nn.Module):
        further = (logits.gather(-1, ids) * factors).sum()
    else:  # rows first: the backward pass then needs one sum of rows for each tick
        further = ((F.embedding(ids, head) * factors[..., None]).sum(2) * hidden).sum()
    return loss + (further - further.detach())  # its gradients alone


def targets_ahead(
    config: CreatureConfig, targets: torch.Tensor, further_targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The targets of each tick, the next one and K further ones: ids [B, T, K + 1], and their shares, which add up to 1.

    targets: [B, T] the next ones, -100 where unknown. further_targets: [K] their weights. What comes after an end of
    text, or after an unknown target, has the share 0.
    """
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ids, shares, inside = [targets], [torch.ones_like(targets, dtype=torch.float32)], targets != IGNORE_INDEX
    for weight in further_targets.unbind():
        for end in ends:
            inside = inside & (ids[-1] != end)
        ids.append(F.pad(ids[-1][:, 1:], (0, 1), value=IGNORE_INDEX))
        inside = inside & (ids[-1] != IGNORE_INDEX)
        shares.append(weight * inside)
    shares = torch.stack(shares, dim=-1)
    return torch.stack(ids, dim=-1).clamp(min=0), shares / shares.sum(-1, keepdim=True)


def count_targets(config: CreatureConfig, batch: dict) -> torch.Tensor:
    """
    What each stream's loss of this batch is divided by: its summed target weights, shifted targets only.

    Args:
        batch: the arguments of `MultiModalCreature.forward`; missing labels count 0.

    Returns:
        float32 [7] on the device of the targets: one number for each of the first three `STREAMS`, then one for each of
        `COMMAND_PARTS`, its error of repeating the last command. Add the counts of all micro-batches and ranks of a
        step and pass the sum as `num_items_in_batch`.
    """
    labels = batch.get("labels")
    spoken = batch.get("external_text_targets")
    codes = batch.get("audio_targets")
    counts = [
        None if labels is None else text_target_weights(config, labels[:, 1:]).sum(),
        None if spoken is None else text_target_weights(config, spoken[:, 1:]).sum(),
        None if codes is None else (codes[:, 1:] != IGNORE_INDEX).sum().float(),
        *errors_of_repeating(config, batch),
    ]
    device = next((count.device for count in counts if count is not None), torch.device("cpu"))
    return torch.stack([torch.zeros((), device=device) if count is None else count for count in counts])


def mean_losses(
    config: CreatureConfig, sums: dict[str, torch.Tensor], batch: dict, num_items_in_batch: torch.Tensor | float | None
) -> dict[str, torch.Tensor]:
    """
    The loss of every stream: its sum divided by its count. Animation: the mean over the parts of a command that have
    targets, each divided by its error of repeating the last command, so that a loss of 1 is no better than that.

    sums: by stream, animation [4]. batch, num_items_in_batch: as in `MultiModalCreature.forward`.
    """
    device, counts = next(iter(sums.values())).device, None
    if num_items_in_batch is not None:
        counts = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=device)
    if counts is None or not counts.dim():
        own = count_targets(config, batch).to(device)
        # One number is the Trainer's count of `labels`; it says nothing of the other streams.
        counts = own if counts is None else torch.cat((counts[None], own[1:]))
    # What has no target has the sum 0; the clamp keeps 0 / 0 from being NaN.
    divisors, parts = counts.clamp(min=1e-6), (counts[3:] > 0).sum().clamp(min=1)
    losses = {name: sums[name] / divisors[place] for place, name in enumerate(STREAMS[:3]) if name in sums}
    if "animation" in sums:
        losses["animation"] = (sums["animation"] / divisors[3:]).sum() / parts
    return losses


def target_shapes(config: CreatureConfig) -> dict[str, tuple[int | str, ...]]:
    """The shape of each target of the streams: B rows, T ticks, or a number."""
    return {
        "labels": ("B", "T"),
        "external_text_targets": ("B", "T"),
        "audio_targets": ("B", "T", config.num_audio_codebooks),
        "rotation_targets": ("B", "T", config.subframes_per_tick, config.num_joints, 4),
        "blend_shape_targets": ("B", "T", config.num_blend_shapes),
        "eye_targets": ("B", "T", 2, 4),
        "action_targets": ("B", "T", config.subframes_per_tick, config.action_size),
        "animation_target_mask": ("B", "T"),
    }


class ExternalTextStream(nn.Module):
    """What the creature says aloud, as text: the token table read through a matrix of its own."""

    def __init__(self, config: CreatureConfig):
        super().__init__()
        self.config = config
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor, token_table: torch.Tensor) -> torch.Tensor:
        """hidden [B, T, hidden_size], token_table [vocab_size, hidden_size] -> logits [B, T, vocab_size]."""
        return F.linear(self.proj(hidden), token_table)

    def loss(
        self,
        hidden: torch.Tensor,
        token_table: torch.Tensor,
        targets: torch.Tensor,
        cross_entropy: Callable = linear_cross_entropy,
    ) -> torch.Tensor:
        """Sum of next-token losses; targets [B, T] ids, -100 where unknown, NULL where silent."""
        return text_loss(self.config, self.proj(hidden), token_table, targets, cross_entropy)


class DepthLayer(nn.Module):
    """One pre-norm causal transformer layer over the codes of a single tick."""

    def __init__(self, config: CreatureConfig):
        super().__init__()
        size = config.depth_hidden_size
        self.num_heads = config.depth_num_heads
        self.input_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.qkv_proj = nn.Linear(size, 3 * size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)
        self.mlp_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.up_proj = nn.Linear(size, 4 * size, bias=False)
        self.down_proj = nn.Linear(4 * size, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [N, codes, depth_hidden_size] -> the same shape."""
        qkv = self.qkv_proj(self.input_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # [N, heads, codes, head_dim]
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self._after_attention(x, attended.transpose(1, 2).flatten(2))

    def step(self, x: torch.Tensor, cache: torch.Tensor, place: int) -> torch.Tensor:
        """
        The same of one code: x [N, depth_hidden_size], that of `place`.

        cache: [2, N, heads, codes, head_dim] the keys and values of the codes before it; its own are written into it.
        """
        qkv = self.qkv_proj(self.input_norm(x)).view(len(x), 3, self.num_heads, -1)
        cache[:, :, :, place] = qkv[:, 1:].transpose(0, 1)
        key, value = cache[:, :, :, : place + 1].unbind(0)
        attended = F.scaled_dot_product_attention(qkv[:, 0, :, None], key, value)  # [N, heads, 1, head_dim]
        return self._after_attention(x, attended.flatten(1))

    def _after_attention(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        x = x + self.o_proj(attended)
        return x + self.down_proj(F.relu(self.up_proj(self.mlp_norm(x))).square())


class AudioStream(nn.Module):
    """
    The creature's voice: the codec codes of one tick, drawn one after another by a small depth decoder.

    All codes of a tick belong to that tick (Yang et al. 2023, "UniAudio"; Défossez et al. 2024, "Moshi"): delaying code
    k by k ticks, as single-transformer codec models do, would cost seven ticks of 80 ms.
    """

    def __init__(self, config: CreatureConfig):
        super().__init__()
        self.num_codes = config.num_audio_codebooks
        size = config.depth_hidden_size
        self.context_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.code_proj = nn.Linear(config.audio_code_size, size, bias=False)
        self.position = nn.Embedding(config.num_audio_codebooks, size)
        self.layers = nn.ModuleList(DepthLayer(config) for _ in range(config.depth_num_layers))
        self.norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.out_proj = nn.Linear(size, config.audio_code_size, bias=False)

    def forward(self, hidden: torch.Tensor, codes: torch.Tensor, code_table: torch.Tensor) -> torch.Tensor:
        """
        Logits of every code of N ticks, each given the codes before it.

        hidden [N, hidden_size], codes [N, K <= num_audio_codebooks - 1 or more] (ids; the last is never looked at),
        code_table [num_audio_codebooks, audio_codebook_size, audio_code_size] -> [N, min(K + 1, codebooks), codebook].
        """
        codes = codes[:, : self.num_codes - 1]
        books = torch.arange(codes.shape[1], device=codes.device)
        before = self.code_proj(code_table[books, codes.clamp(min=0)])  # [N, K, depth_hidden_size]
        x = F.pad(before, (0, 0, 1, 0)) + self.context_proj(hidden)[:, None]
        x = x + self.position.weight[: x.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self._logits(x, code_table[: x.shape[1]])

    def _logits(self, x: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
        """x [N, K, depth_hidden_size] and the tables [K, codebook, audio_code_size] of its codes -> logits."""
        x = self.out_proj(self.norm(x))
        # The product runs in the table's autocast dtype, one codebook per position.
        return torch.einsum("nkc,kvc->nkv", x, tables.to(x.dtype))

    def loss(self, hidden: torch.Tensor, code_table: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum of the code losses; hidden [B, T, hidden_size], targets [B, T, codebooks], -100 where unknown."""
        hidden, targets = hidden[:, :-1].flatten(0, 1), targets[:, 1:].flatten(0, 1)
        logits = self(hidden, targets, code_table).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")

    def draw_noise(self, rows: int, code_table: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """The random numbers of one emission, [codebooks, rows, codebook]."""
        books, codes, _ = code_table.shape
        noise = torch.empty(books, rows, codes, device=code_table.device)
        return noise.exponential_(generator=generator)

    @torch.no_grad()
    def emit(
        self,
        hidden: torch.Tensor,
        code_table: torch.Tensor,
        sampling: Sampling = GREEDY,
        noise: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Draw the codes of N ticks, by default the likeliest; noise: of `draw_noise`.

        hidden [N, hidden_size] -> codes [N, codebooks] int64 and their logits [N, codebooks, codebook].
        """
        context = self.context_proj(hidden) + self.position.weight[:, None]  # [codebooks, N, depth_hidden_size]
        head_dim = context.shape[-1] // self.layers[0].num_heads
        cache = context.new_empty(len(self.layers), 2, len(hidden), self.layers[0].num_heads, self.num_codes, head_dim)
        codes, logits = [], []
        for book, table in enumerate(code_table):
            x = context[book]
            if book:
                x = x + self.code_proj(code_table[book - 1, codes[-1]])
            for layer, kept in zip(self.layers, cache, strict=True):
                x = layer.step(x, kept, book)
            logits.append(F.linear(self.out_proj(self.norm(x)), table.to(x.dtype)))
            codes.append(sample(logits[-1], sampling, noise=None if noise is None else noise[book]))
        return torch.stack(codes, dim=1), torch.stack(logits, dim=1)


class CreatureStreams(nn.Module):
    """The heads beside `lm_head`, one per stream that is not the internal text and that this creature has."""

    def __init__(self, config: CreatureConfig):
        super().__init__()
        self.config, self.shapes = config, target_shapes(config)
        self.external_text = ExternalTextStream(config)
        if config.num_audio_codebooks:
            self.audio = AudioStream(config)
        if config.animation_size or config.action_size:
            self.animation = AnimationStream(config)

    @property
    def names(self) -> tuple[str, ...]:
        """The streams that this creature has, out of `STREAMS`."""
        return tuple(name for name in STREAMS if name == STREAMS[0] or hasattr(self, name))

    def check(self, targets: dict, hidden: torch.Tensor) -> None:
        """ValueError for targets without an organ, of other rows or ticks than hidden [B, T, ...], or out of range."""
        check_organs(self.config, TARGET_ORGANS, [name for name, value in targets.items() if value is not None])
        check_shapes(self.shapes, targets, B=hidden.shape[0], T=hidden.shape[1])
        for name in ("labels", "external_text_targets", "audio_targets"):
            if targets[name] is not None:
                size = self.config.audio_codebook_size if name == "audio_targets" else self.config.vocab_size
                check_ids(name, targets[name], size, smallest=0, ignored=IGNORE_INDEX)

    def forward(
        self,
        hidden: torch.Tensor,
        batch: dict,
        streams: tuple[str, ...],
        logits_to_keep: int | torch.Tensor,
        backbone: nn.Module,
    ) -> dict[str, torch.Tensor]:
        """
        The outputs of the streams asked for, by their names in `CreatureOutput`.

        hidden [B, T, hidden_size]. batch: the senses and targets of the forward pass. logits_to_keep: of which ticks.
        backbone: the `CreatureModel` whose tables the streams share.
        """
        outputs = {}
        kept = keep_ticks(hidden, logits_to_keep)
        if "external_text" in streams:
            outputs["external_text_logits"] = self.external_text(kept, backbone.embed_tokens.weight)
        if "audio" in streams:
            code_table, codes = backbone.senses.own_voice.code_table, batch["audio_targets"]
            if codes is None:
                _, flat = self.audio.emit(kept.flatten(0, 1), code_table)
            else:
                following = keep_ticks(F.pad(codes[:, 1:], (0, 0, 0, 1)), logits_to_keep)
                flat = self.audio(kept.flatten(0, 1), following.flatten(0, 1), code_table)
            outputs["audio_logits"] = flat.unflatten(0, kept.shape[:2])
        if "animation" in streams:
            last = last_command(self.config, batch, hidden)
            outputs |= self.animation.emit(kept, {name: keep_ticks(x, logits_to_keep) for name, x in last.items()})
        return outputs


def keep_ticks(x: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The last `logits_to_keep` ticks of [B, T, ...] (0: all), or the ticks that a tensor of indices names."""
    if isinstance(logits_to_keep, int):
        return x[:, -logits_to_keep:] if logits_to_keep else x
    return x[:, logits_to_keep]


__all__ = ["STREAMS", "TARGET_ORGANS", "CreatureStreams", "count_targets"]
