"""The text head's cross entropy with the kernels of a GPU, and in float8 on Hopper: `losses_creature`, but faster."""

import math

import torch

from creature.fast.kernels import (
    TILE_ROWS,
    add_product,
    available,
    matmul_fits,
    softmax_exp_logits,
    softmax_exp_logits_float8,
    transposed_order,
)
from losses_creature import _LinearCrossEntropy, chunk_tokens, compute_dtype
from losses_creature import linear_cross_entropy as plain_cross_entropy

LARGEST_FLOAT8 = torch.finfo(torch.float8_e4m3fn).max
FLOAT8_CHUNK = 16384  # tokens; their exponentials twice in float8 take as much memory as 8,192 tokens in bfloat16 twice
COMMON_IDS = 1024  # the first ids: in a byte-pair vocabulary the most frequent ones


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    target_weights: torch.Tensor,
    float8: bool = False,
) -> torch.Tensor:
    """
    `losses_creature.linear_cross_entropy` for training in bfloat16 on a GPU, which elsewhere it calls.

    float8: compute the logits and both gradients in float8 where the GPU is a Hopper, at twice the speed.
    """
    in_training = torch.is_grad_enabled() and hidden.requires_grad and weight.requires_grad
    if not in_training or compute_dtype(hidden) != torch.bfloat16 or not available(hidden, torch.bfloat16):
        return plain_cross_entropy(hidden, weight, targets, target_weights)
    float8 = float8 and float8_fits(hidden.device, *weight.shape)
    chunk = FLOAT8_CHUNK if float8 else chunk_tokens(hidden.device)
    return _FastCrossEntropy.apply(hidden, weight, targets, target_weights, float8, chunk)


def float8_fits(device: torch.device, vocab_size: int, hidden_size: int) -> bool:
    """Whether the head's products run in float8 on a device: a Hopper GPU, rows that are multiples of 16 bytes."""
    return not vocab_size % 16 and matmul_fits(device, hidden_size, vocab_size)


class _FastCrossEntropy(_LinearCrossEntropy):
    """The plain one, with the chunks' losses and gradients from the kernels."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, target_weights, float8, chunk):
        cast_weight = weight.to(torch.bfloat16)
        float8_head = _Float8Head(cast_weight) if float8 else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden, grad_weight = [], torch.zeros_like(weight, dtype=torch.float32)
        for x, target, factor in zip(
            hidden.split(chunk), targets.split(chunk), target_weights.split(chunk), strict=True
        ):  # x: [chunk, hidden_size]
            x = x.to(torch.bfloat16)
            if float8 and not len(x) % TILE_ROWS:  # but for a few ticks at the end
                losses, grad_x, product = float8_head.chunk(x, target, factor)
                grad_hidden.append(grad_x)
                grad_weight.add_(product)
            else:
                # exp_logits / sums is the gradient with respect to the logits: dividing by the sums, like multiplying
                # by the target weights, waits until the rows have hidden_size numbers.
                exp_logits, sums = softmax_exp_logits(x, cast_weight, target)
                losses, row_factor = sums.log(), (factor / sums)[:, None]
                grad_hidden.append(((exp_logits @ cast_weight) * row_factor).to(x.dtype))
                add_product(grad_weight, exp_logits, (x * row_factor).to(x.dtype))
            loss = loss + (losses * factor).sum()
        ctx.save_for_backward(torch.cat(grad_hidden), grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss


class _Float8Head:
    """
    The head's three products of a chunk in float8, at twice the speed of bfloat16: the logits, and both gradients.

    Rounding to float8 keeps three bits, or two where the range matters more. Therefore the target, the largest part of
    the gradient of the states, is not rounded; and the rounded table is used for the target as well, with factors that
    sum to 0 in every row. Otherwise every step would push all states in the same direction.
    """

    def __init__(self, weight: torch.Tensor):
        """weight [vocab_size, hidden_size] in bfloat16."""
        self.rounded, self.scale = to_float8(weight)
        self.transposed = self.rounded.t().contiguous()

    def chunk(
        self, x: torch.Tensor, targets: torch.Tensor, factor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        x [n, hidden_size] in bfloat16, targets [n], their weights [n] float32 -> losses [n] float32, not weighted, and
        the gradients of their weighted sum: of x, and of the weight, both in bfloat16.
        """
        rounded, scale = to_float8(x, dim=1)  # one factor a tick, because states differ in size more than tokens do
        scale = (scale * self.scale).squeeze(1)
        target_rows = self.rounded[targets].float()
        target_logits = (rounded.float() * target_rows).sum(1) * scale
        # float8_e5m2 stores 2^-16 to 2^15, so the exponentials should be near the probabilities: divide by that of the
        # target and of the commonest tokens, whichever is larger, times 64, because the others raise the sum a little.
        common = _float8_product(rounded, self.rounded[:COMMON_IDS]).float() * scale[:, None]
        shift = torch.maximum(target_logits, common.logsumexp(1)) - math.log(64)
        target_exp = (target_logits - shift).exp()
        exp_logits, transposed, sums, rest = softmax_exp_logits_float8(
            rounded, self.rounded, targets, scale, shift, target_exp
        )
        # Divided by the sum of what was stored: so a row that is sure of another, uncommon token, whose exponential was
        # cut off, learns as much.
        factor = (factor / (target_exp - rest))[:, None]
        grad_x = _float8_product(exp_logits, self.transposed).float() + rest[:, None] * target_rows
        grad_x = grad_x * (factor * self.scale)
        states, states_scale = to_float8(transposed_order(x.float() * factor))
        grad_weight = _float8_product(transposed, states.t().contiguous(), states_scale)
        return sums.log() + shift - target_logits, grad_x.to(x.dtype), grad_weight


def to_float8(x: torch.Tensor, dim: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """
    x in float8_e4m3fn, scaled so that its largest number is the largest of float8, and the float32 factor that undoes
    the scaling; with `dim`, one factor for each slice along it.
    """
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = largest.float().clamp(min=1e-30) / LARGEST_FLOAT8
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def _float8_product(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """a [M, K] @ b.T, b [N, K], both in float8, times a scalar in float32 -> [M, N] in bfloat16."""
    # Without use_fast_accum, which sums in 14 bits and loses part of 50,304 small numbers. Softmax ignores an offset
    # shared by all logits, so rounding bias in that direction is never corrected, and training fails
    # (docs/experiments.md).
    one = torch.ones((), dtype=torch.float32, device=a.device)
    scales = one, one if scale is None else scale
    return torch._scaled_mm(a, b.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=False)
