"""Muon for the matrices, Adam by rows for the tables, AdamW for the rest, as one optimizer object.

One object, so that the scheduler, gradient clipping, the checkpoint and accelerate see an ordinary optimizer.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw

from creature.compiling import with_eager_fallback

# Newton-Schulz coefficients, one triple an iteration (Amsel et al. 2025, "The Polar Express"): together they carry the
# singular values of a matrix of norm below 1 to 1 faster than one triple repeated, also in bfloat16.
_POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
MOMENTUM = 0.9  # of Muon
# Matrices in one compiled step of Muon, as many as the tiny creature has of one shape: the time to compile it grows
# faster than their number (docs/experiments.md).
LARGEST_STACK = 24
MOST_SHAPES = 64  # of matrices, which torch.compile would otherwise give up at 8
_CACHED = 2**18  # numbers of a table that a CPU's core keeps near while it steps them
# Peak learning rates at width 512: of the token table beside Muon, of everything under AdamW (docs/experiments.md).
_RATE_BESIDE_MUON, _RATE_ALONE, _RATE_WIDTH = 8e-3, 2e-3, 512
SCALE_RATE = 2.5  # times the tables', for norms, biases and scales: 0.02 beside 8e-3


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """
    The nearest semi-orthogonal matrix to each of a stack, approximately: all singular values come close to 1.

    matrices [N, rows, columns] -> the same shape, in `dtype` (default: bfloat16 on a GPU, float32 elsewhere).
    """
    if dtype is None:
        dtype = torch.bfloat16 if matrices.is_cuda else torch.float32
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # the products below are rows x rows: take the smaller side
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)).to(dtype)
    if dtype != torch.bfloat16 and 2 * x.shape[-2] <= x.shape[-1]:
        x = _iterate_gram(x)
    else:
        for a, b, c in _POLAR_EXPRESS:
            gram = _gram(x)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _gram(x: torch.Tensor) -> torch.Tensor:
    """x @ x.mT of [N, rows, columns]; one matrix goes to `mm`, which on a CPU is much faster with it than `bmm`."""
    return (x[0] @ x[0].mT)[None] if len(x) == 1 else x @ x.mT


def _iterate_gram(x: torch.Tensor) -> torch.Tensor:
    """
    The same iterations on x @ x.mT alone, multiplied into x at the end: half the arithmetic for a matrix four times as
    wide as high. In float32 only: in bfloat16 the rounding errors grow too large.
    """
    gram, factor = _gram(x), None
    for step, (a, b, c) in enumerate(_POLAR_EXPRESS):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        factor = polynomial if factor is None else polynomial @ factor
        if step + 1 < len(_POLAR_EXPRESS):
            gram = polynomial @ gram @ polynomial
    return factor @ x


def _muon_step(
    params: list[torch.Tensor],
    gradients: list[torch.Tensor],
    buffers: list[torch.Tensor],
    squares: list[torch.Tensor],
    lr: torch.Tensor,
    found_inf: torch.Tensor,
    weight_decay: float,
    momentum: float,
    beta2: float,
) -> None:
    """One Muon update of matrices of one shape or its transpose, in place; none where `found_inf` is not 0."""
    tall = [param.shape[0] >= param.shape[1] for param in params]
    gradient = _stack(gradients, tall).float()  # [N, rows, columns], rows <= columns; a neuron is a column
    old = _stack(buffers, tall)
    new = old.lerp(gradient, 1 - momentum)
    update = orthogonalize(gradient.lerp(new, momentum)).float()  # Nesterov: look one step ahead
    # NorMuon: neurons with large updates get smaller steps, as in Adam; the update as a whole keeps its norm.
    length = update.norm(dim=(-2, -1), keepdim=True)
    old_square = torch.stack(squares)[:, None]
    square = old_square.lerp(update.square().mean(dim=-2, keepdim=True), 1 - beta2)
    update = update * (square + 1e-10).rsqrt()
    update = update * (length / update.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12))  # no gradient, no step
    # A step of equal size for every output, whatever the shape (Jordan et al. 2024; Bernstein 2025).
    longer = (update.shape[-1] / update.shape[-2]) ** 0.5
    bad = found_inf != 0
    kept = torch.where(bad, old, new)
    kept_square = torch.where(bad, old_square, square)[:, 0]
    shrink = 1 - (lr * weight_decay) * ~bad
    update = torch.where(bad, 0.0, update)
    results = (kept.unbind(), kept_square.unbind(), update.unbind())
    for param, buffer, average, is_tall, new_buffer, new_average, step in zip(
        params, buffers, squares, tall, *results, strict=True
    ):
        average.copy_(new_average)
        buffer.copy_(new_buffer.mT if is_tall else new_buffer)
        param.mul_(shrink).sub_((step.mT * (lr * longer) if is_tall else step * lr).to(param.dtype))


def _stack(matrices: list[torch.Tensor], tall: list[bool]) -> torch.Tensor:
    """The matrices as one stack, the tall ones transposed."""
    return torch.stack([matrix.mT if is_tall else matrix for matrix, is_tall in zip(matrices, tall, strict=True)])


def _row_step(
    param: torch.Tensor,
    gradient: torch.Tensor,
    average: torch.Tensor,
    square: torch.Tensor,
    step: torch.Tensor,
    lr: torch.Tensor,
    found_inf: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """The `step`th step of Adam with one second moment for each row, in place; none where `found_inf` is not 0."""
    good = found_inf == 0
    gradient = torch.where(good, gradient, average)  # moving towards itself, the average stays the same
    average.lerp_(gradient, 1 - beta1)
    fresh = torch.linalg.vector_norm(gradient, dim=1, keepdim=True).square() / gradient.shape[1]
    square.lerp_(torch.where(good, fresh, square), 1 - beta2)
    taken = step.clamp(min=1)
    divisor = (square / (1 - beta2**taken)).sqrt() + eps
    param.addcmul_(average, lr * good / ((1 - beta1**taken) * divisor), value=-1)


def _even_parts(items: list, largest: int) -> list[list]:
    """The items in as few parts as hold at most `largest` each, of sizes that differ by one at most."""
    parts = -(-len(items) // largest)
    return [items[len(items) * part // parts : len(items) * (part + 1) // parts] for part in range(parts)]


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, with the rows that other processes hold."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of the tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class MuonAdamW(torch.optim.Optimizer):
    """
    Muon (Jordan et al. 2024) where `group["muon"]` is true, Adam by rows where `group["by_row"]` is, AdamW (Loshchilov
    and Hutter 2019) elsewhere.

    Muon replaces the momentum of a matrix by the nearest orthogonal matrix, so that every direction of the matrix
    learns at the same rate; it keeps one state per weight where AdamW keeps two. The update is then divided by each
    neuron's running mean square (Li et al. 2025, "NorMuon"): 0.019 nats on 73.7 M tokens (docs/experiments.md).

    A table may have `group["row_rates"]` [rows, 1], a factor of the learning rate for each row.

    Adam by rows keeps one second moment for each row of a table (Zhang et al. 2024, "Adam-mini"), because gradients of
    a table differ by how often a token occurs: 0.006 nats, and half the memory.

    Parameters may be sharded over processes (DTensors, as FSDP 2 creates them): a matrix is gathered for its step.

    As with torch's fused optimizers, a tensor set as `found_inf` that is not 0 makes the next step do nothing.

    Args:
        params: parameter groups, each with "muon" or "by_row" (bool) and its own "lr"; "weight_decay" (none by rows),
            "betas", "eps", "momentum" where the defaults do not fit. Muon and rows want 2-D parameters.
        compiled: compile Muon and the rows' steps; worth it on a GPU, where they are otherwise hundreds of kernels.

    Raises:
        ValueError: for a Muon parameter, or one by rows, that is not a matrix.
    """

    skips_found_inf = True

    def __init__(self, params, lr: float = 0.03, weight_decay: float = 0.0, compiled: bool = False):
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "muon": False,
            "by_row": False,
            "row_rates": None,
            "momentum": MOMENTUM,
            "beta2": 0.95,
            "betas": (0.8, 0.98),
            "eps": 1e-10,
            "fused": True,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for param in group["params"]:
                if (group["muon"] or group["by_row"]) and param.dim() != 2:
                    what = "Muon updates matrices" if group["muon"] else "Rows are those of matrices"
                    raise ValueError(f"{what}; a parameter of shape {tuple(param.shape)} goes to AdamW.")
        if compiled:  # each shape of matrices is compiled by itself, and tiny with all senses has 17
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)
        self._muon_step, self._row_step = (
            partial(with_eager_fallback, torch.compile(step, dynamic=False, fullgraph=True)) if compiled else step
            for step in (_muon_step, _row_step)
        )

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            if group["muon"]:
                self._step_muon(group, params)
            elif group["by_row"]:
                self._step_rows(group, params)
            else:
                self._step_adamw(group, params)
        return loss

    def _step_muon(self, group: dict, params: list[torch.Tensor]) -> None:
        stacks: dict[tuple | torch.Tensor, list[torch.Tensor]] = {}
        for param in params:
            # One at a time on a CPU, where a matrix and its temporaries then stay in the cache; a sharded one as well,
            # because gathered it is large.
            alone = param.device.type == "cpu" or isinstance(param, DTensor)
            stacks.setdefault(param if alone else tuple(sorted(param.shape)), []).append(param)
            if not self.state[param]:
                buffer = torch.zeros_like(param, dtype=torch.float32)
                # A neuron is a row, or a column of a wide matrix. Not sharded: every process holds all of them.
                square = torch.zeros(max(param.shape), device=param.device)
                self.state[param].update(momentum_buffer=buffer, mean_square=square)
        lr, found_inf = self._scalars(group)
        for same in (part for stack in stacks.values() for part in _even_parts(stack, LARGEST_STACK)):
            gradients = [param.grad for param in same]
            buffers = [self.state[param]["momentum_buffer"] for param in same]
            squares = [self.state[param]["mean_square"] for param in same]
            settings = group["weight_decay"], group["momentum"], group["beta2"]
            # FSDP 2 gives every process some rows of a matrix, and Muon needs all of them: all processes compute the
            # same step, and each keeps its rows.
            shards = [*same, *buffers]
            same, buffers, gradients = ([_whole(tensor) for tensor in some] for some in (same, buffers, gradients))
            self._muon_step(same, gradients, buffers, squares, lr, found_inf, *settings)
            for shard, tensor in zip(shards, [*same, *buffers], strict=True):
                if shard is not tensor:
                    own = distribute_tensor(tensor, shard.device_mesh, shard.placements, src_data_rank=None)
                    shard.copy_(own)

    def _scalars(self, group: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """The group's learning rate and `found_inf`, as tensors, so that a new rate needs no new compilation."""
        found_inf = getattr(self, "found_inf", None)
        return torch.as_tensor(group["lr"], dtype=torch.float32), torch.zeros(()) if found_inf is None else found_inf

    def _step_rows(self, group: dict, params: list[torch.Tensor]) -> None:
        lr, found_inf = self._scalars(group)
        for param in params:
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
                state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
                state["mean_square"] = torch.zeros_like(param[:, :1], dtype=torch.float32)
            state["step"].add_(found_inf == 0)
            # Rows are independent, so FSDP 2 shards are stepped as they are. On a CPU, as many rows at a time as stay
            # in the cache. Detached, because torch.compile refuses to change a view of a parameter in place.
            tensors = [_own(x).detach() for x in (param, param.grad, state["exp_avg"], state["mean_square"])]
            rows = len(tensors[0]) if param.is_cuda else max(1, _CACHED // param.shape[1])
            parts = list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))
            rates = group["row_rates"]
            if isinstance(param, DTensor) and rates is not None:
                rates = distribute_tensor(rates, param.device_mesh, param.placements, src_data_rank=None).to_local()
            rates = [lr] * len(parts) if rates is None else (lr * rates).split(rows)
            for part, rate in zip(parts, rates, strict=True):
                self._row_step(*part, state["step"], rate, found_inf, *group["betas"], group["eps"])

    def _step_adamw(self, group: dict, params: list[torch.Tensor]) -> None:
        for param in params:
            if not self.state[param]:
                self.state[param]["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
                self.state[param]["exp_avg"] = torch.zeros_like(param)
                self.state[param]["exp_avg_sq"] = torch.zeros_like(param)
        states = [self.state[param] for param in params]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [param.grad for param in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            found_inf=getattr(self, "found_inf", None),
        )


def width_learning_rate(hidden_size: int, muon: bool = True) -> float:
    """
    The peak `learning_rate` for a model of this width, beside Muon or of AdamW alone; it falls with the width's root.

    Muon's own rate needs no such rule: an orthogonal step changes every output by the same amount at any width.
    """
    return (_RATE_BESIDE_MUON if muon else _RATE_ALONE) * (_RATE_WIDTH / hidden_size) ** 0.5


def table_ids(model: nn.Module) -> set[int]:
    """
    The `id`s of a model's tables, in which a row stands for a token, a code, a point of the skin or a place.

    They are the weights of its `nn.Embedding`s, and of a head that is not tied to one.
    """
    return {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or name == "lm_head"
    }


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    matrix_learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.8, 0.98),
    eps: float = 1e-10,
    backbone_rate: float = 1.0,
    other_rows: Sequence[int] = (),
) -> list[dict]:
    """
    The trainable parameters of a creature in groups, by what each of them is: the tables, for Adam by rows; all other
    matrices, of the backbone, the senses and the streams alike, for Muon; norms, biases and scales, for AdamW.

    Args:
        learning_rate, betas, eps: of the tables; norms, biases and scales learn SCALE_RATE times as fast.
        matrix_learning_rate: of the matrices.
        weight_decay: of the matrices; nothing else decays.
        backbone_rate: the rates of the token table, the layers and the norms, as a share of those of senses and
            streams, which then have groups of their own.
        other_rows: rows of the token table that stand for no text, such as NULL, which learn at the full rates.
    """
    tables, adam = table_ids(model), {"weight_decay": 0.0, "muon": False, "betas": betas, "eps": eps}
    parts = {id(param) for name, param in model.named_parameters() if ".senses." in name or ".streams." in f".{name}"}
    groups = []
    for rate, inside in ((1.0, None),) if backbone_rate == 1 else ((backbone_rate, False), (1.0, True)):
        kinds: dict[str, list[torch.Tensor]] = {"others": [], "tables": [], "matrices": []}
        for param in model.parameters():
            if param.requires_grad and (inside is None or inside == (id(param) in parts)):
                kinds["tables" if id(param) in tables else "matrices" if param.dim() == 2 else "others"].append(param)
        groups += [
            # First, so that the rate that the Trainer logs is `learning_rate`, or that of the backbone.
            {"params": kinds["tables"], **adam, "lr": rate * learning_rate, "by_row": True, "row_rates": None},
            {"params": kinds["others"], **adam, "lr": rate * SCALE_RATE * learning_rate},
            {
                "params": kinds["matrices"],
                "lr": rate * matrix_learning_rate,
                "weight_decay": weight_decay,
                "muon": True,
            },
        ]
    if len(other_rows) and 0 < backbone_rate < 1 and groups[0]["params"]:
        table = groups[0]["params"][0]
        groups[0]["row_rates"] = torch.ones(len(table), 1, device=table.device)
        groups[0]["row_rates"][list(other_rows)] = 1 / backbone_rate
    return [group for group in groups if group["params"]]
