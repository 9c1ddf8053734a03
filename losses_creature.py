# Copyright 2026 The MultiModalCreature developers. Licensed under the Apache License, Version 2.0.
"""The vocabulary head together with its cross entropy, chunk by chunk: what decides memory and much of the speed.

At 50,304 columns the logits of a batch are a hundred times larger than the hidden states they come from. Here a chunk
of them exists at a time, and is turned into its own gradient before the next one is made.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

try:
    from .kernels_creature import (
        TILE_ROWS,
        add_product,
        kernels_available,
        matmul_suits,
        product_in_float32,
        softmax_odds,
        softmax_odds_float8,
        turned_order,
    )
except ImportError:
    from kernels_creature import (
        TILE_ROWS,
        add_product,
        kernels_available,
        matmul_suits,
        product_in_float32,
        softmax_odds,
        softmax_odds_float8,
        turned_order,
    )

IGNORE_INDEX = -100  # a text or code target that is unknown
LARGEST_FLOAT8 = torch.finfo(torch.float8_e4m3fn).max
FLOAT8_CHUNK = 16384  # tokens; their odds, stored twice in float8, take as much memory as once in bfloat16
COMMON_IDS = 1024  # the first ids, in a vocabulary of merged bytes the most frequent ones


def chunk_tokens(device: torch.device) -> int:
    """Tokens whose logits exist at one time: enough to fill the device, few enough to stay small beside the model."""
    return 8192 if device.type == "cuda" else 1024


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype matrix products run in: autocast's where it is on, else the tensor's own."""
    if torch.is_autocast_enabled(tensor.device.type):
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


def to_float8(x: torch.Tensor, dim: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """
    x in float8_e4m3fn, its largest number becoming the largest there is, and the float32 factor that undoes it; with
    `dim`, a factor for each slice along it.
    """
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = largest.float().clamp(min=1e-30) / LARGEST_FLOAT8
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def _softmax_gradient(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """
    The cross entropies of `x @ weight.T`, and their gradient with respect to these logits.

    x [n, hidden_size], weight [vocab_size, hidden_size], targets [n] -> losses [n] float32, a matrix
    [n, vocab_size] in the dtype of x, and the factor [n] that makes its rows the gradient (None: they are).
    """
    if x.dtype == torch.bfloat16 and kernels_available(x, weight):
        # Odds need no maximum of the row, and dividing them by their sum can wait until the rows are short again.
        odds, sums = softmax_odds(x, weight, targets)
        return sums.log(), odds, 1 / sums
    log_probabilities = torch.log_softmax((x @ weight.t()).float(), dim=-1)  # one pass on a CPU; logsumexp takes five
    losses = -log_probabilities.gather(1, targets[:, None]).squeeze(1)
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(1, targets[:, None], gradient.new_full((len(targets), 1), -1.0))
    return losses, gradient.to(x.dtype), None


def float8_suits(device: torch.device, vocab_size: int, hidden_size: int) -> bool:
    """Whether the head's products can be made in float8 on a device, where rows are to fill 16 bytes."""
    return device.type == "cuda" and not vocab_size % 16 and matmul_suits(device.index, hidden_size, vocab_size)


class _Float8Head:
    """
    The head's three products of a chunk in float8, at twice the speed of bfloat16: the logits, and both gradients.

    What is rounded to float8 keeps three bits, or two where the range matters more. So the target, the largest part of
    the gradient of the states, stays out of it; and what is added up there is the rounded table, also for the target,
    times numbers that add up to 0: else every step would push all states the same way.
    """

    def __init__(self, weight: torch.Tensor):
        """weight [vocab_size, hidden_size] in bfloat16."""
        self.rounded, self.scale = to_float8(weight)
        self.turned = self.rounded.t().contiguous()

    def chunk(
        self, x: torch.Tensor, targets: torch.Tensor, factor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        x [n, hidden_size] in bfloat16, targets [n], their weights [n] float32 -> losses [n] float32, not weighted, and
        the gradients of their weighted sum: of x, and of the weight, both in bfloat16.
        """
        rounded, scale = to_float8(x, dim=1)  # a tick's own factor: states differ in size more than tokens do
        scale = (scale * self.scale).squeeze(1)
        target_rows = self.rounded[targets].float()
        target_logits = (rounded.float() * target_rows).sum(1) * scale
        # Odds are stored as they come, between 2^-16 and 2^15, so they should be near the probabilities: over those of
        # the target and of the commonest tokens, whatever is larger, times 64, as the others raise the sum a little.
        common = _float8_product(rounded, self.rounded[:COMMON_IDS]).float() * scale[:, None]
        shift = torch.maximum(target_logits, common.logsumexp(1)) - math.log(64)
        target_odds = (target_logits - shift).exp()
        odds, turned, sums, rest = softmax_odds_float8(rounded, self.rounded, targets, scale, shift, target_odds)
        # By what was stored: so a row that is sure of another, uncommon token, whose odds were cut off, learns as much.
        factor = (factor / (target_odds - rest))[:, None]
        grad_x = _float8_product(odds, self.turned).float() + rest[:, None] * target_rows
        grad_x = grad_x * (factor * self.scale)
        states, states_scale = to_float8(turned_order(x.float() * factor))
        grad_weight = _float8_product(turned, states.t().contiguous(), states_scale)
        return sums.log() + shift - target_logits, grad_x.to(x.dtype), grad_weight


def _float8_product(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """a [M, K] @ b.T, b [N, K], both in float8, times a scalar in float32 -> [M, N] in bfloat16."""
    # Not use_fast_accum: adding up in 14 bits, it loses much of 50,304 small odds. What it loses lies in the direction
    # that all tokens share, which moves no softmax, so that no later step takes it back: training fails (docs/log.md).
    one = torch.ones((), dtype=torch.float32, device=a.device)
    scales = one, one if scale is None else scale
    return torch._scaled_mm(a, b.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=False)


class _LinearCrossEntropy(torch.autograd.Function):
    """
    Sum of weighted cross entropies of `hidden @ weight.T`, with the gradients made in the forward pass.

    The logits of a chunk become its loss and both of its gradients while they exist, so neither [tokens, vocabulary]
    logits nor their gradient are ever alive as a whole (the idea of Wijmans et al. 2024, "Cut Your Losses", and of
    Liger-Kernel's fused head).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, target_weights, dtype, chunk, fp8):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        cast_weight = weight.to(dtype)
        float8_head = _Float8Head(cast_weight) if fp8 else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = []
        grad_weight = None
        for x, target, factor in zip(
            hidden.split(chunk), targets.split(chunk), target_weights.split(chunk), strict=True
        ):  # x: [chunk, hidden_size]
            x = x.to(dtype)
            if float8_head is not None and not len(x) % TILE_ROWS:  # not a few ticks at the end
                losses, grad_x, product = float8_head.chunk(x, target, factor)
                loss = loss + (losses * factor).sum()
                grad_hidden.append(grad_x)
                grad_weight = product.float() if grad_weight is None else grad_weight.add_(product)
                continue
            losses, gradient, row_factor = _softmax_gradient(x, cast_weight, target)
            loss = loss + (losses * factor).sum()  # no product of matrices: autocast would round it to bfloat16
            # The weights of the targets meet the gradient where its rows are short: at hidden_size.
            factor = (factor if row_factor is None else factor * row_factor)[:, None]
            if need_hidden:
                grad_hidden.append(((gradient @ cast_weight) * factor).to(dtype))
            if need_weight:
                x = (x * factor).to(dtype)
                if kernels_available(gradient):
                    if grad_weight is None:
                        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
                    add_product(grad_weight, gradient, x)
                else:
                    product = gradient.t() @ x  # [vocab_size, hidden_size]
                    grad_weight = product.float() if grad_weight is None else grad_weight.add_(product)
        ctx.save_for_backward(torch.cat(grad_hidden) if need_hidden else None, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad_loss).to(hidden_dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    target_weights: torch.Tensor,
    fp8: bool = False,
) -> torch.Tensor:
    """
    Weighted sum of `cross_entropy(hidden @ weight.T, targets)` without ever holding the logits of all tokens.

    Args:
        hidden: [N, hidden_size]. weight: [vocab_size, hidden_size]. targets: [N] ids; any id where the weight is 0.
        target_weights: [N] float32; 0 drops a token.
        fp8: make the logits and the products of the gradient in float8 where that is faster: on a Hopper GPU, under
            bf16.

    Returns:
        The sum in nats, a float32 scalar, differentiable once.
    """
    dtype = compute_dtype(hidden)
    fp8 = fp8 and dtype == torch.bfloat16 and float8_suits(hidden.device, *weight.shape)
    chunk = FLOAT8_CHUNK if fp8 else chunk_tokens(hidden.device)
    return _LinearCrossEntropy.apply(hidden, weight, targets, target_weights, dtype, chunk, fp8)


def _logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T; on a GPU not rounded to half precision, which large logits would show."""
    x = x.to(weight.dtype)
    return product_in_float32(x, weight) if kernels_available(x, weight) else x @ weight.t()


@torch.no_grad()
def linear_token_losses(
    hidden: torch.Tensor, head: torch.Tensor | nn.Module, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The cross entropy of every token and the likeliest id, chunk by chunk: for evaluation, without gradients.

    Args:
        hidden: [N, hidden_size]. head: its weight [vocab_size, hidden_size], or a module that makes the logits.
        targets: [N] ids, or -100.

    Returns:
        losses [N] float32 in nats, 0 where the target is -100, and predictions [N] int64.
    """
    dtype, chunk = compute_dtype(hidden), chunk_tokens(hidden.device)
    if not isinstance(head, nn.Module):
        head = partial(_logits, weight=head.to(dtype))
    losses, predictions = [], []
    for x, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = head(x).float()  # [chunk, vocab_size]
        losses.append(F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="none"))
        predictions.append(logits.argmax(dim=-1))
    return torch.cat(losses), torch.cat(predictions)


__all__ = ["linear_cross_entropy", "linear_token_losses"]
