# Copyright 2026 The MultiModalCreature developers. Licensed under the Apache License, Version 2.0.
"""The vocabulary head together with its cross entropy, chunk by chunk: what decides memory and much of the speed.

At 50,304 columns the logits of a batch are a hundred times larger than the hidden states they come from. Here a chunk
of them exists at a time, and is turned into its own gradient before the next one is made.
"""

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU compiler: the plain path below does the same
    triton = None

IGNORE_INDEX = -100  # a text or code target that is unknown


def chunk_tokens(device: torch.device) -> int:
    """Tokens whose logits exist at one time: enough to fill the device, few enough to stay small beside the model."""
    return 8192 if device.type == "cuda" else 1024


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype matrix products run in: autocast's where it is on, else the tensor's own."""
    if torch.is_autocast_enabled(tensor.device.type):
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


if triton is not None:

    @triton.jit
    def _cross_entropy_kernel(
        logits_ptr, targets_ptr, weights_ptr, losses_ptr, row_stride, columns, BLOCK: tl.constexpr
    ):
        """
        One row of logits a program: its weighted loss out, and the row itself overwritten by the loss's gradient.

        The row crosses memory once in either direction; the second reading hits the cache.
        """
        row = tl.program_id(0).to(tl.int64)
        start_ptr = logits_ptr + row * row_stride
        target = tl.load(targets_ptr + row)
        weight = tl.load(weights_ptr + row)
        lanes = tl.arange(0, BLOCK)
        # Every lane keeps its own maximum and sum; they are brought together once, at the end of the row.
        highest = tl.full((BLOCK,), -1e30, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, columns, BLOCK):
            x = tl.load(start_ptr + start + lanes, mask=start + lanes < columns, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(highest, x)
            total = total * tl.exp(highest - higher) + tl.exp(x - higher)
            highest = higher
        row_highest = tl.max(highest, 0)
        log_norm = row_highest + tl.log(tl.sum(total * tl.exp(highest - row_highest), 0))
        picked = tl.load(start_ptr + target).to(tl.float32)
        tl.store(losses_ptr + row, (log_norm - picked) * weight)
        for start in range(0, columns, BLOCK):
            columns_now = start + lanes
            inside = columns_now < columns
            x = tl.load(start_ptr + columns_now, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(x - log_norm)
            gradient = tl.where(columns_now == target, gradient - 1.0, gradient) * weight
            tl.store(start_ptr + columns_now, gradient.to(logits_ptr.dtype.element_ty), mask=inside)


def _cross_entropy_(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Weighted losses [N] float32 of logits [N, vocab_size], and their gradient in the dtype (and memory) of the logits.

    The logits are used up.
    """
    if triton is not None and logits.is_cuda:
        losses = torch.empty_like(weights)
        _cross_entropy_kernel[(logits.shape[0],)](
            logits, targets, weights, losses, logits.stride(0), logits.shape[1], BLOCK=4096, num_warps=8
        )
        return losses, logits
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)  # one pass on a CPU, where logsumexp takes five
    losses = -log_probabilities.gather(1, targets[:, None]).squeeze(1) * weights
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(1, targets[:, None], gradient.new_full((len(targets), 1), -1.0))
    return losses, gradient.mul_(weights[:, None]).to(logits.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """
    Sum of weighted cross entropies of `hidden @ weight.T`, with the gradients made in the forward pass.

    The logits of a chunk become its loss and both of its gradients while they exist, so neither [tokens, vocabulary]
    logits nor their gradient are ever alive as a whole (the idea of Wijmans et al. 2024, "Cut Your Losses", and of
    Liger-Kernel's fused head).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, target_weights, dtype, chunk):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        cast_weight = weight.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = []
        grad_weight = None
        for x, target, w in zip(
            hidden.split(chunk), targets.split(chunk), target_weights.split(chunk), strict=True
        ):  # x: [chunk, hidden_size]
            x = x.to(dtype)
            losses, grad_logits = _cross_entropy_(x @ cast_weight.t(), target, w)  # [chunk], [chunk, vocab_size]
            loss = loss + losses.sum()
            if need_hidden:
                grad_hidden.append(grad_logits @ cast_weight)
            if need_weight:
                product = grad_logits.t() @ x  # [vocab_size, hidden_size]
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
    return _LinearCrossEntropy.apply(
        hidden, weight, targets, target_weights, compute_dtype(hidden), chunk_tokens(hidden.device)
    )


@torch.no_grad()
def linear_token_losses(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The cross entropy of every token and the likeliest id, chunk by chunk: for evaluation, without gradients.

    Args:
        hidden: [N, hidden_size]. weight: [vocab_size, hidden_size]. targets: [N] ids, or -100.

    Returns:
        losses [N] float32 in nats, 0 where the target is -100, and predictions [N] int64.
    """
    dtype, chunk = compute_dtype(hidden), chunk_tokens(hidden.device)
    cast_weight = weight.to(dtype)
    losses, predictions = [], []
    for x, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = (x.to(dtype) @ cast_weight.t()).float()  # [chunk, vocab_size]
        losses.append(F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="none"))
        predictions.append(logits.argmax(dim=-1))
    return torch.cat(losses), torch.cat(predictions)


__all__ = ["linear_cross_entropy", "linear_token_losses"]
