# Copyright 2026 The MultiModalCreature developers. Licensed under the Apache License, Version 2.0.
"""Cross entropy over the vocabulary, computed chunk by chunk so that the logits of a whole batch never exist.

At 50,304 columns the logits of a batch are a hundred times larger than the hidden states they are computed from. A
chunk of them is turned into its loss and gradients before the next chunk is computed.
"""

import torch
import torch.nn.functional as F
from torch import nn

IGNORE_INDEX = -100  # the target of a tick that has none


def chunk_tokens(device: torch.device) -> int:
    """Tokens whose logits exist at one time: enough to fill the device, few enough to stay small beside the model."""
    return 8192 if device.type == "cuda" else 1024


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype matrix products run in: autocast's where it is on, else the tensor's own."""
    if torch.is_autocast_enabled(tensor.device.type):
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    """
    Sum of weighted cross entropies of `hidden @ weight.T`, with the gradients computed in the forward pass.

    The logits of a chunk become its loss and both of its gradients while they exist (the idea of Wijmans et al. 2024,
    "Cut Your Losses", and of Liger-Kernel's fused head).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, target_weights, dtype, chunk):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        cast_weight = weight.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden, grad_weight = [], None
        for x, target, factor in zip(
            hidden.split(chunk), targets.split(chunk), target_weights.split(chunk), strict=True
        ):  # x: [chunk, hidden_size]
            x = x.to(dtype)
            log_probabilities = torch.log_softmax((x @ cast_weight.t()).float(), dim=-1)  # [chunk, vocab_size]
            losses = -log_probabilities.gather(1, target[:, None]).squeeze(1)
            loss = loss + (losses * factor).sum()  # not a dot product: autocast would round it to bfloat16
            if not (need_hidden or need_weight):
                continue
            gradient = log_probabilities.exp_()
            gradient.scatter_add_(1, target[:, None], gradient.new_full((len(target), 1), -1.0))
            gradient = gradient.to(dtype)
            # The target weights are applied to rows of hidden_size numbers, not of vocab_size.
            if need_hidden:
                grad_hidden.append(((gradient @ cast_weight) * factor[:, None]).to(dtype))
            if need_weight:
                product = gradient.t() @ (x * factor[:, None]).to(dtype)  # [vocab_size, hidden_size]
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
        return grad_hidden, grad_weight, None, None, None, None


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, target_weights: torch.Tensor
) -> torch.Tensor:
    """
    Weighted sum of `cross_entropy(hidden @ weight.T, targets)` without ever holding the logits of all tokens.

    Args:
        hidden: [N, hidden_size]. weight: [vocab_size, hidden_size]. targets: [N] ids; any id where the weight is 0.
        target_weights: [N] float32; 0 drops a token.

    Returns:
        The sum in nats, a float32 scalar, differentiable once.
    """
    dtype, chunk = compute_dtype(hidden), chunk_tokens(hidden.device)
    return _LinearCrossEntropy.apply(hidden, weight, targets, target_weights, dtype, chunk)


@torch.no_grad()
def linear_token_losses(
    hidden: torch.Tensor, head: torch.Tensor | nn.Module, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The cross entropy of every token and the likeliest id, chunk by chunk: for evaluation, without gradients.

    Args:
        hidden: [N, hidden_size]. head: its weight [vocab_size, hidden_size], or a module that returns the logits.
        targets: [N] ids, or -100.

    Returns:
        losses [N] float32 in nats, 0 where the target is -100, and predictions [N] int64.
    """
    losses, predictions = [], []
    chunk = chunk_tokens(hidden.device)
    for x, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        if isinstance(head, nn.Module):
            logits = head(x).float()  # [chunk, vocab_size]
        else:
            # In float32 whatever the training computes in: bfloat16 has three digits, and logits of 20 need more.
            with torch.autocast(x.device.type, enabled=False):
                logits = x.float() @ head.float().t()
        losses.append(F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="none"))
        predictions.append(logits.argmax(dim=-1))
    return torch.cat(losses), torch.cat(predictions)


__all__ = ["linear_cross_entropy", "linear_token_losses"]
