# Copyright 2026 The MultiModalCreature developers. Licensed under the Apache License, Version 2.0.
"""The model's GPU kernels, in Triton: a matrix product with something done to its tiles, and a norm with rotation.

A training step of a small model spends as long on reading and writing as on arithmetic. These kernels do element-wise
work where the numbers already are: in the registers of the matrix product that makes them. Everything here has a plain
equivalent beside its caller, which runs where there is no Triton.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU compiler
    triton = None

# Tiles of the matrix products: rows, columns, depth, rows of tiles that share columns in the cache, warps, stages.
MATMUL_TILE = (128, 128, 64, 8, 4, 3)
ROTARY_ROWS = 64


def kernels_available(*tensors: torch.Tensor) -> bool:
    """Whether these tensors can go through the kernels here: on a GPU, with Triton, in half precision."""
    return triton is not None and all(x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) for x in tensors)


if triton is not None:

    @triton.jit
    def _matmul_kernel(
        a_ptr,
        b_ptr,
        out_ptr,
        aux_ptr,
        sums_ptr,
        M,
        N,
        stride_a,
        stride_bk,
        stride_bn,
        stride_out,
        K: tl.constexpr,
        EPILOGUE: tl.constexpr,
        BM: tl.constexpr,
        BN: tl.constexpr,
        BK: tl.constexpr,
        GROUP: tl.constexpr,
    ):
        """
        One tile [BM, BN] of a [M, K] @ b [K, N], then the epilogue.

        "exp": exp(product - aux[row]), and the tile's row sums into sums [tiles of columns, M]. "relu2": relu squared.
        "relu2_grad": the product times the derivative of relu squared, 2 sqrt(aux), aux [M, N] being its output.
        """
        pid = tl.program_id(0)
        tiles_n = tl.cdiv(N, BN)
        group = pid // (GROUP * tiles_n)
        height = tl.minimum(tl.cdiv(M, BM) - group * GROUP, GROUP)
        within = pid % (GROUP * tiles_n)
        tile_m = group * GROUP + within % height
        tile_n = within // height

        rows = tile_m * BM + tl.arange(0, BM)
        columns = tile_n * BN + tl.arange(0, BN)
        depth = tl.arange(0, BK)
        # Rows and columns past the end wrap around: their loads need no mask, and nothing of them is stored.
        a = a_ptr + (rows % M)[:, None].to(tl.int64) * stride_a + depth[None, :]
        b = b_ptr + (columns % N)[None, :].to(tl.int64) * stride_bn + depth[:, None] * stride_bk
        product = tl.zeros((BM, BN), tl.float32)
        for _ in range(0, K, BK):
            product = tl.dot(tl.load(a), tl.load(b), product)
            a += BK
            b += BK * stride_bk

        inside = (rows < M)[:, None] & (columns < N)[None, :]
        place = rows[:, None].to(tl.int64) * stride_out + columns[None, :]
        if EPILOGUE == "exp":
            shift = tl.load(aux_ptr + rows, mask=rows < M, other=0.0)
            # 115 / log2(e) = 80 nats: what lies above would not fit into float32.
            result = tl.exp2(tl.minimum((product - shift[:, None]) * 1.4426950408889634, 115.0))
            result = tl.where(columns[None, :] < N, result, 0.0)
            tl.store(sums_ptr + tile_n * M + rows, tl.sum(result, 1), mask=rows < M)
        elif EPILOGUE == "relu2":
            result = tl.maximum(product, 0.0)
            result = result * result
        else:
            result = product * 2.0 * tl.sqrt(tl.load(aux_ptr + place, mask=inside, other=0.0).to(tl.float32))
        tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _rotary_norm_kernel(
        x_ptr, cos_ptr, sin_ptr, out_ptr, scale_ptr, rows, ticks, heads, eps,
        HALF: tl.constexpr, ROWS: tl.constexpr
    ):  # fmt: skip
        """rows of [B, ticks, heads, 2 HALF]: to root mean square 1, then rotated; 1 / rms of each row into scale."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        lane = tl.arange(0, HALF)
        inside = (row < rows)[:, None]
        place = row[:, None].to(tl.int64) * (2 * HALF) + lane[None, :]
        first = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(x_ptr + place + HALF, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)
        angle = ((row // heads) % ticks)[:, None] * HALF + lane[None, :]
        cos = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(tl.float32) * scale[:, None]
        sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32) * scale[:, None]
        kind = out_ptr.dtype.element_ty
        tl.store(out_ptr + place, (first * cos - second * sin).to(kind), mask=inside)
        tl.store(out_ptr + place + HALF, (second * cos + first * sin).to(kind), mask=inside)
        tl.store(scale_ptr + row, scale, mask=row < rows)

    @triton.jit
    def _rotary_norm_backward_kernel(
        out_ptr, grad_ptr, cos_ptr, sin_ptr, scale_ptr, grad_x_ptr, rows, ticks, length, heads,
        stride_batch, stride_tick, stride_head, HALF: tl.constexpr, ROWS: tl.constexpr
    ):  # fmt: skip
        """The gradient of x from the output itself: turned back, the output is the normed x. grad has strides."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        lane = tl.arange(0, HALF)
        inside = (row < rows)[:, None]
        place = row[:, None].to(tl.int64) * (2 * HALF) + lane[None, :]
        angle = ((row // heads) % ticks)[:, None] * HALF + lane[None, :]
        cos = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32)
        out1 = tl.load(out_ptr + place, mask=inside, other=0.0).to(tl.float32)
        out2 = tl.load(out_ptr + place + HALF, mask=inside, other=0.0).to(tl.float32)
        tick = row // heads
        start = (tick // length).to(tl.int64) * stride_batch + (tick % length) * stride_tick + row % heads * stride_head
        grad = grad_ptr + start[:, None] + lane[None, :]
        grad1 = tl.load(grad, mask=inside, other=0.0).to(tl.float32)
        grad2 = tl.load(grad + HALF, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None]
        # The rotation keeps lengths and angles, so the mean of grad x normed can be taken before turning back.
        mean = ((tl.sum(out1 * grad1, 1) + tl.sum(out2 * grad2, 1)) / (2 * HALF))[:, None]
        grad1 = (grad1 - mean * out1) * scale
        grad2 = (grad2 - mean * out2) * scale
        kind = grad_x_ptr.dtype.element_ty
        tl.store(grad_x_ptr + place, (grad1 * cos + grad2 * sin).to(kind), mask=inside)
        tl.store(grad_x_ptr + place + HALF, (grad2 * cos - grad1 * sin).to(kind), mask=inside)


def _matmul(
    a: torch.Tensor, b: torch.Tensor, aux: torch.Tensor, sums: torch.Tensor, epilogue: str
) -> torch.Tensor:
    """`_matmul_kernel` over a [M, K], contiguous, and b [K, N] in any layout: [M, N] in the dtype of a."""
    rows, columns, depth, group, warps, stages = MATMUL_TILE
    (m, k), n = a.shape, b.shape[1]
    out = torch.empty((m, n), dtype=a.dtype, device=a.device)
    _matmul_kernel[(triton.cdiv(m, rows) * triton.cdiv(n, columns),)](
        a, b, out, aux, sums, m, n, a.stride(0), b.stride(0), b.stride(1), n,
        K=k, EPILOGUE=epilogue, BM=rows, BN=columns, BK=depth, GROUP=group, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def matmul_exp(x: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    exp(x @ weight.T - shift[:, None]) in the dtype of x, and its row sums [M] in float32, from one pass.

    x [M, K], weight [N, K], both contiguous, K a multiple of 64; shift [M] float32. An exponent is cut off at 80.
    """
    sums = torch.empty((triton.cdiv(len(weight), MATMUL_TILE[1]), len(x)), dtype=torch.float32, device=x.device)
    return _matmul(x, weight.t(), shift, sums, "exp"), sums.sum(dim=0)


class _Relu2MLP(torch.autograd.Function):
    """relu(x @ up.T)^2 @ down.T, keeping the activation alone: its root tells what its derivative needs."""

    @staticmethod
    def forward(ctx, x, up, down):
        activation = _matmul(x, up.t(), x, x, "relu2")  # [M, intermediate_size]
        ctx.save_for_backward(x, up, down, activation)
        return activation @ down.t()

    @staticmethod
    def backward(ctx, grad):
        x, up, down, activation = ctx.saved_tensors
        grad = grad.contiguous()
        grad_down = grad.t() @ activation
        grad_inner = _matmul(grad, down, activation, x, "relu2_grad")  # [M, intermediate_size]
        return grad_inner @ up, grad_inner.t() @ x, grad_down


def relu2_mlp(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """
    relu(x @ up.T)^2 @ down.T with the activation made inside the first product, differentiable once.

    x [..., K], up [intermediate_size, K], down [K, intermediate_size], one dtype; K a multiple of 64.
    """
    return _Relu2MLP.apply(x.reshape(-1, x.shape[-1]), up, down).view(x.shape)


class _RotaryNorm(torch.autograd.Function):
    """Root-mean-square norm and rotation of the heads in one pass, keeping nothing that attention does not keep too."""

    @staticmethod
    def forward(ctx, x, cos, sin, eps):
        out, scale = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        heads, ticks, rows = x.shape[-2], cos.numel() // cos.shape[-1], scale.numel()
        _rotary_norm_kernel[(triton.cdiv(rows, ROTARY_ROWS),)](
            x, cos, sin, out, scale, rows, ticks, heads, eps, HALF=cos.shape[-1], ROWS=ROTARY_ROWS
        )
        ctx.save_for_backward(out, cos, sin, scale)
        return out

    @staticmethod
    def backward(ctx, grad):
        out, cos, sin, scale = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        grad_x = torch.empty_like(out)
        length, heads = out.shape[1:3]
        ticks, rows = cos.numel() // cos.shape[-1], scale.numel()
        _rotary_norm_backward_kernel[(triton.cdiv(rows, ROTARY_ROWS),)](
            out, grad, cos, sin, scale, grad_x, rows, ticks, length, heads, *grad.stride()[:3],
            HALF=cos.shape[-1], ROWS=ROTARY_ROWS,
        )  # fmt: skip
        return grad_x, None, None, None


def rotary_norm(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float) -> torch.Tensor:
    """
    x [B, T, heads, head_dim], contiguous, to root mean square 1 over head_dim, its halves then rotated against each
    other by cos, sin [1 or B, T, head_dim / 2]; differentiable with respect to x.
    """
    return _RotaryNorm.apply(x, cos.contiguous(), sin.contiguous(), eps)
