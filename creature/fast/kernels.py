"""GPU kernels in Triton: a matrix product with an element-wise epilogue, and a norm with rotation in one pass.

A training step of a small model spends as long on reading and writing memory as on arithmetic. These kernels do the
element-wise work in the registers of the matrix product that computes its input. The plain equivalent of each is in the
model files, and runs wherever these kernels do not.
"""

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no GPU compiler
    triton = None

TILE_ROWS = 128
# By epilogue of the matrix product: columns and depth of a tile, stages, programs on a multiprocessor
# (docs/experiments.md).
TILES = {
    "exp": (256, 64, 4, 1),
    "float8_exp": (128, 128, 3, 2),  # one program multiplies while the other has its epilogue
    "relu2": (256, 64, 4, 1),
    "relu2_grad": (256, 64, 3, 1),  # the activation needs room, too
}
ROTARY_ROWS = 64
FINISHED_ROWS, FINISHED_PARTS = 16, 64


def available(x: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether the kernels take this tensor, or its copy in `dtype`: in half precision, on a GPU with Triton."""
    return triton is not None and x.is_cuda and (dtype or x.dtype) in (torch.bfloat16, torch.float16)


def disable() -> None:
    """Use plain torch from now on: where torch.compile fails, Triton's compiler fails too."""
    global triton
    triton = None


def _multiprocessors(device: int) -> int:
    """
    The number of multiprocessors of a Hopper GPU (H100, H200, GH200), 0 for any other device.

    The tiles of `_matmul_kernel` fill Hopper's 227 KiB of shared memory and need its copy engine; on other GPUs, cuBLAS
    followed by an element-wise pass is used.
    """
    properties = torch.cuda.get_device_properties(device)
    is_hopper = properties.major == 9 and properties.shared_memory_per_block_optin >= 227 << 10
    return properties.multi_processor_count if is_hopper else 0


if triton is not None:
    LOG2_E = tl.constexpr(1.4426950408889634)
    # Exponentials are cut off at 2^100, or 69 nats: the sum of a large vocabulary of them still fits into float32.
    HIGHEST_LOG2 = tl.constexpr(100.0)

    @triton.jit
    def _matmul_kernel(
        a,
        b,
        out,
        transposed,
        aux_ptr,
        sums_ptr,
        scale_ptr,
        M,
        N,
        K: tl.constexpr,
        B_IS_TRANSPOSED: tl.constexpr,
        EPILOGUE: tl.constexpr,
        MASKED: tl.constexpr,
        PROGRAMS: tl.constexpr,
        BM: tl.constexpr,
        BN: tl.constexpr,
        BK: tl.constexpr,
        GROUP: tl.constexpr = 8,
    ):
        """
        Tiles [BM, BN] of a [M, K] @ b [K, N], each followed by the epilogue; a program computes every PROGRAMS-th tile.

        "exp": exp(product - aux[row]), and the tile's row sums into sums [tiles of columns, M].
        "float8_exp": the same of product * scale[row], and its transpose into `transposed` [N, M], its columns in
        `transposed_order`; sums [2, tiles of columns, M]: row sums before rounding to float8, then after it.
        "relu2": relu squared. "relu2_grad": product * 2 sqrt(|aux|), the derivative of relu squared, whose output is
        aux [M, N]. MASKED: whether the last tile of columns ends beyond N.
        """
        tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
        # Flattened, the loads of the next tile run during the epilogue of this one.
        for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
            # GROUP rows of tiles at a time, so that what they share stays in the cache.
            group = tile // (GROUP * tiles_n)
            height = tl.minimum(tiles_m - group * GROUP, GROUP)
            within = tile % (GROUP * tiles_n)
            row = (group * GROUP + within % height) * BM
            tile_n = within // height
            column = tile_n * BN
            product = tl.zeros((BM, BN), tl.float32)
            for k in range(0, K, BK):
                if B_IS_TRANSPOSED:
                    right = b.load([column, k]).T
                else:
                    right = b.load([k, column])
                product = tl.dot(a.load([row, k]), right, product)

            rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BN)
            if EPILOGUE == "exp" or EPILOGUE == "float8_exp":
                shift = tl.load(aux_ptr + rows, mask=rows < M, other=0.0) * LOG2_E
                if EPILOGUE == "float8_exp":
                    product *= (tl.load(scale_ptr + rows, mask=rows < M, other=0.0) * LOG2_E)[:, None]
                else:
                    product *= LOG2_E
                result = tl.exp2(tl.minimum(product - shift[:, None], HIGHEST_LOG2))
                if MASKED:
                    result = tl.where(columns[None, :] < N, result, 0.0)
                tl.store(sums_ptr + tile_n * M + rows, tl.sum(result, 1), mask=rows < M)
            elif EPILOGUE == "relu2":
                result = tl.maximum(product, 0.0)
                result = result * result
            else:
                inside = (rows < M)[:, None] & (columns < N)[None, :]
                activation = tl.load(
                    aux_ptr + rows[:, None].to(tl.int64) * N + columns[None, :], mask=inside, other=0.0
                )
                result = product * 2.0 * tl.sqrt(tl.abs(activation.to(tl.float32)))
            # Storing one half after the other needs half the shared memory.
            result = result.to(out.dtype)
            left, right = tl.split(tl.permute(tl.reshape(result, (BM, 2, BN // 2)), (0, 2, 1)))
            out.store([row, column], left)
            out.store([row, column + BN // 2], right)
            if EPILOGUE == "float8_exp":
                tl.store(sums_ptr + (tiles_n + tile_n) * M + rows, tl.sum(result.to(tl.float32), 1), mask=rows < M)
                # One thread holds rows j and j + 8: side by side they go to shared memory in one step.
                result = tl.permute(tl.reshape(result, (BM // 16, 2, 8, BN)), (0, 2, 1, 3))
                left, right = tl.split(tl.permute(tl.reshape(result, (BM, 2, BN // 2)), (0, 2, 1)))
                transposed.store([column, row], left.T)
                transposed.store([column + BN // 2, row], right.T)

    @triton.jit
    def _exp_logits_kernel(logits_ptr, targets_ptr, sums_ptr, columns, BLOCK: tl.constexpr):
        """One row of logits a program: replaced by their exponentials, 1 - sum at the target's place; and their sum."""
        row = tl.program_id(0).to(tl.int64)
        start = logits_ptr + row * columns
        target = tl.load(targets_ptr + row)
        shift = tl.load(start + target).to(tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, columns, BLOCK):
            column = first + tl.arange(0, BLOCK)
            logits = tl.load(start + column, mask=column < columns, other=float("-inf")).to(tl.float32)
            exp_logits = tl.exp2(tl.minimum((logits - shift) * LOG2_E, HIGHEST_LOG2))
            total += exp_logits
            inside = (column < columns) & (column != target)
            tl.store(start + column, exp_logits.to(logits_ptr.dtype.element_ty), mask=inside)
        row_total = tl.sum(total, 0)
        tl.store(sums_ptr + row, row_total)
        tl.store(start + target, (1.0 - row_total).to(logits_ptr.dtype.element_ty))

    @triton.jit
    def _target_logits_kernel(x_ptr, weight_ptr, targets_ptr, out_ptr, K, BLOCK: tl.constexpr):
        """One row a program: x [row] . weight [target of the row]."""
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(targets_ptr + row)
        total = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, K, BLOCK):
            lane = first + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row * K + lane, mask=lane < K, other=0.0).to(tl.float32)
            total += x * tl.load(weight_ptr + target * K + lane, mask=lane < K, other=0.0).to(tl.float32)
        tl.store(out_ptr + row, tl.sum(total, 0))

    @triton.jit
    def _sum_parts(parts_ptr, row, inside, rows, parts, ROWS: tl.constexpr, PARTS: tl.constexpr):
        """The sums [ROWS] of parts [parts, rows] in these rows."""
        totals = tl.zeros((PARTS, ROWS), tl.float32)
        for first in range(0, parts, PARTS):
            part = first + tl.arange(0, PARTS)
            mask = (part < parts)[:, None] & inside[None, :]
            totals += tl.load(parts_ptr + part[:, None] * rows + row[None, :], mask=mask, other=0.0)
        return tl.sum(totals, 0)

    @triton.jit
    def _finish_exp_logits_kernel(
        exp_ptr, parts_ptr, targets_ptr, sums_ptr, rows, columns, parts, ROWS: tl.constexpr, PARTS: tl.constexpr
    ):  # fmt: skip
        """sums [rows] of parts [parts, rows], and 1 - sum at the place of each row's target, whose exponential is 1."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        inside = row < rows
        total = _sum_parts(parts_ptr, row, inside, rows, parts, ROWS, PARTS)
        total = tl.where(total < 1.0, 1.0, total)  # the target's own; `maximum` would hide NaN
        target = tl.load(targets_ptr + row, mask=inside, other=0)
        tl.store(sums_ptr + row, total, mask=inside)
        place = exp_ptr + row.to(tl.int64) * columns + target
        tl.store(place, (1.0 - total).to(exp_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _finish_float8_kernel(
        exp_ptr, transposed_ptr, parts_ptr, targets_ptr, target_exp_ptr, sums_ptr, rest_ptr, rows, columns, parts,
        ROWS: tl.constexpr, PARTS: tl.constexpr
    ):  # fmt: skip
        """
        sums [rows] of the first half of parts [2, parts, rows]; rest [rows], minus the sum of the second half without
        the target, which also goes to the target's place in the transpose; 0 to its place in exp_logits.
        """
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        inside = row < rows
        total = _sum_parts(parts_ptr, row, inside, rows, parts, ROWS, PARTS)
        rounded = _sum_parts(parts_ptr + parts * rows, row, inside, rows, parts, ROWS, PARTS)
        own = tl.load(target_exp_ptr + row, mask=inside, other=0.0)
        # At least the target's own, which tensor cores may lose to rounding. `maximum` would hide NaN.
        tl.store(sums_ptr + row, tl.where(total < own, own, total), mask=inside)
        target = tl.load(targets_ptr + row, mask=inside, other=0)
        place = exp_ptr + row.to(tl.int64) * columns + target
        rest = tl.load(place, mask=inside, other=0.0).to(tl.float32) - rounded
        tl.store(rest_ptr + row, rest, mask=inside)
        kind = exp_ptr.dtype.element_ty
        tl.store(place, tl.zeros((ROWS,), tl.float32).to(kind), mask=inside)
        column = row // 16 * 16 + row % 8 * 2 + row // 8 % 2  # transposed_order
        tl.store(transposed_ptr + target * rows + column, rest.to(kind), mask=inside)

    @triton.jit
    def _rotary_norm_kernel(
        x_ptr, cos_ptr, sin_ptr, out_ptr, scale_ptr, rows, ticks, heads, eps, HALF: tl.constexpr, ROWS: tl.constexpr
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
        """The gradient of x from the output: rotated back, the output is the normed x. grad has strides."""
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
        # A rotation keeps lengths and angles, so mean(grad * normed) can be computed before rotating back.
        mean = ((tl.sum(out1 * grad1, 1) + tl.sum(out2 * grad2, 1)) / (2 * HALF))[:, None]
        grad1 = (grad1 - mean * out1) * scale
        grad2 = (grad2 - mean * out2) * scale
        kind = grad_x_ptr.dtype.element_ty
        tl.store(grad_x_ptr + place, (grad1 * cos + grad2 * sin).to(kind), mask=inside)
        tl.store(grad_x_ptr + place + HALF, (grad2 * cos - grad1 * sin).to(kind), mask=inside)


def matmul_fits(device: torch.device, depth: int, columns: int) -> bool:
    """Whether the fused product of [..., depth] @ [depth, columns] runs on a device: a Hopper GPU, 16-byte steps."""
    on_gpu = triton is not None and device.type == "cuda"
    return on_gpu and not depth % 64 and not columns % 8 and _multiprocessors(device.index or 0) > 0


def _matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    aux: torch.Tensor,
    sums: torch.Tensor,
    epilogue: str,
    scale: torch.Tensor | None = None,
    transposed: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Launch `_matmul_kernel` for a [M, K] and b [K, N] (b or its transpose contiguous) and return [M, N]; fills
    `transposed` [N, M] where it is given.
    """
    (m, k), n = a.shape, b.shape[1]
    out = torch.empty((m, n), dtype=a.dtype if transposed is None else transposed.dtype, device=a.device)
    columns, depth, stages, each = TILES[epilogue]
    b_is_transposed = b.stride(0) == 1
    programs = each * _multiprocessors(a.device.index)
    halves = TensorDescriptor.from_tensor(out, [TILE_ROWS, columns // 2])
    _matmul_kernel[(programs,)](
        TensorDescriptor.from_tensor(a, [TILE_ROWS, depth]),
        TensorDescriptor.from_tensor(b.t(), [columns, depth]) if b_is_transposed
        else TensorDescriptor.from_tensor(b, [depth, columns]),
        halves, halves if transposed is None else TensorDescriptor.from_tensor(transposed, [columns // 2, TILE_ROWS]),
        aux, sums, aux if scale is None else scale, m, n, K=k, B_IS_TRANSPOSED=b_is_transposed, EPILOGUE=epilogue,
        MASKED=n % columns != 0, PROGRAMS=programs, BM=TILE_ROWS, BN=columns, BK=depth, num_warps=8, num_stages=stages,
    )  # fmt: skip
    return out


# Custom operators, so that torch.compile takes them as they are.


@torch.library.custom_op("creature::softmax_exp_logits", mutates_args=())
def softmax_exp_logits(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    exp(logit - target's logit) of every token, without writing the logits themselves to memory.

    x [M, K], weight [N, K] of one half-precision dtype, targets [M] int64 -> exp_logits [M, N] in that dtype, with
    1 - sum of the row at the target's place, and the sums [M] float32. exp_logits / sums is the gradient of the cross
    entropy log(sums). Exponentials are cut off at 2^100, so a loss is never reported as more than about 80 nats.
    """
    sums = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if len(x) < TILE_ROWS or not matmul_fits(x.device, x.shape[1], len(weight)):
        exp_logits = x @ weight.t()
        _exp_logits_kernel[(len(x),)](exp_logits, targets, sums, len(weight), BLOCK=4096, num_warps=8)
        return exp_logits, sums
    target_logits = torch.empty_like(sums)
    _target_logits_kernel[(len(x),)](x, weight, targets, target_logits, x.shape[1], BLOCK=512, num_warps=1)
    parts = torch.empty((triton.cdiv(len(weight), TILES["exp"][0]), len(x)), dtype=torch.float32, device=x.device)
    exp_logits = _matmul(x, weight.t(), target_logits, parts, "exp")
    _finish_exp_logits_kernel[(triton.cdiv(len(x), FINISHED_ROWS),)](
        exp_logits, parts, targets, sums, *exp_logits.shape, len(parts),
        ROWS=FINISHED_ROWS, PARTS=FINISHED_PARTS, num_warps=4,
    )  # fmt: skip
    return exp_logits, sums


@softmax_exp_logits.register_fake
def _(x, weight, targets):
    return x.new_empty((len(x), len(weight))), x.new_empty(len(x), dtype=torch.float32)


@torch.library.custom_op("creature::softmax_exp_logits_float8", mutates_args=())
def softmax_exp_logits_float8(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    target_exp: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    exp(logit - shift) of every token in float8_e5m2, and its transpose, because float8 products sum along rows only.

    Args:
        x, weight: [M, K], [N, K] in float8_e4m3fn, what `matmul_fits` takes, M and N divisible by 16.
        targets: [M] int64.
        scale, shift: [M] float32; a logit is scale times the product. What is stored is cut off at 57,344.
        target_exp: [M] float32, exp(logit - shift) of the target.

    Returns:
        exp_logits [M, N], 0 at the target's place.
        transposed [N, M], its columns in `transposed_order`, `rest` at the target's place.
        sums [M] float32 of the rows before rounding.
        rest [M] float32, minus the sum of the rounded values of all other tokens: with it at the target's place, a row
        sums to 0, as a gradient with respect to logits does.
    """
    (rows, columns), tiles = (len(x), len(weight)), triton.cdiv(len(weight), TILES["float8_exp"][0])
    transposed = torch.empty((columns, rows), dtype=torch.float8_e5m2, device=x.device)
    parts = torch.empty((2, tiles, rows), dtype=torch.float32, device=x.device)
    exp_logits = _matmul(x, weight.t(), shift, parts, "float8_exp", scale, transposed)
    sums, rest = torch.empty_like(shift), torch.empty_like(shift)
    _finish_float8_kernel[(triton.cdiv(rows, FINISHED_ROWS),)](
        exp_logits, transposed, parts, targets, target_exp, sums, rest, rows, columns, tiles,
        ROWS=FINISHED_ROWS, PARTS=FINISHED_PARTS, num_warps=4,
    )  # fmt: skip
    return exp_logits, transposed, sums, rest


@softmax_exp_logits_float8.register_fake
def _(x, weight, targets, scale, shift, target_exp):
    exp_logits = x.new_empty((len(x), len(weight)), dtype=torch.float8_e5m2)
    return exp_logits, exp_logits.new_empty((len(weight), len(x))), torch.empty_like(shift), torch.empty_like(shift)


def transposed_order(x: torch.Tensor) -> torch.Tensor:
    """The rows of x [M, K] in the order of the transpose's columns in `softmax_exp_logits_float8`: 0, 8, 1, 9, ..."""
    return x.view(-1, 2, 8, x.shape[1]).transpose(1, 2).reshape(x.shape)


@torch.library.custom_op("creature::add_product", mutates_args=("total",))
def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total [M, N] float32 += a.T @ b; a [K, M], b [K, N] in half precision. NVIDIA's GPUs round nothing in between."""
    if torch.version.hip is None:
        torch.addmm(total, a.t(), b, out_dtype=torch.float32, out=total)
    else:
        total.add_(a.t() @ b)


@add_product.register_fake
def _(total, a, b):
    return None


@torch.library.custom_op("creature::matmul_relu2", mutates_args=())
def matmul_relu2(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """relu(x @ weight.T)^2; x [M, K], weight [N, K] -> [M, N]."""
    return _matmul(x, weight.t(), x, x, "relu2")


@matmul_relu2.register_fake
def _(x, weight):
    return x.new_empty((len(x), len(weight)))


@torch.library.custom_op("creature::matmul_relu2_grad", mutates_args=())
def matmul_relu2_grad(grad: torch.Tensor, weight: torch.Tensor, activation: torch.Tensor) -> torch.Tensor:
    """(grad @ weight) times the derivative of `matmul_relu2`, whose output is `activation` [M, N]; weight [K, N]."""
    return _matmul(grad, weight, activation, grad, "relu2_grad")


@matmul_relu2_grad.register_fake
def _(grad, weight, activation):
    return torch.empty_like(activation)


class _Relu2MLP(torch.autograd.Function):
    """relu(x @ up.T)^2 @ down.T; it saves the activation alone, whose square root gives its derivative."""

    @staticmethod
    def forward(ctx, x, up, down):
        activation = matmul_relu2(x, up)  # [M, intermediate_size]
        ctx.save_for_backward(x, up, down, activation)
        return activation @ down.t()

    @staticmethod
    def backward(ctx, grad):
        x, up, down, activation = ctx.saved_tensors
        grad = grad.contiguous()
        grad_down = grad.t() @ activation
        grad_inner = matmul_relu2_grad(grad, down, activation)  # [M, intermediate_size]
        return grad_inner @ up, grad_inner.t() @ x, grad_down


def relu2_mlp(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """
    relu(x @ up.T)^2 @ down.T, the activation computed inside the first product; differentiable once.

    x [..., K] with at least `TILE_ROWS` rows, up [intermediate_size, K], down [K, intermediate_size], of one
    half-precision dtype and of a size that `matmul_fits` accepts.
    """
    return _Relu2MLP.apply(x.reshape(-1, x.shape[-1]), up, down).view(x.shape)


class _RotaryNorm(torch.autograd.Function):
    """Root-mean-square norm and rotation of the heads in one pass; it saves only what attention saves too."""

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
    other by cos, sin [1 or B, T, head_dim / 2]; head_dim a power of two; differentiable with respect to x.
    """
    return _RotaryNorm.apply(x, cos.contiguous(), sin.contiguous(), eps)
