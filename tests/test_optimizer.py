"""Muon and AdamW in one optimizer object."""

import copy

import pytest
import torch
from creatures import micro_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from creature.optimizer import (
    _POLAR_EXPRESS,
    LARGEST_STACK,
    SCALE_RATE,
    MuonAdamW,
    orthogonalize,
    parameter_groups,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def groups(model):
    return parameter_groups(model, learning_rate=0.01, matrix_learning_rate=0.02, weight_decay=0.1)


def take_steps(model, optimizer, first, count):
    for step in range(first, first + count):
        for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.grad = draw(*parameter.shape, seed=1000 * step + index)
        optimizer.step()


@pytest.mark.parametrize("shape", [(3, 32, 64), (2, 64, 32), (1, 48, 48)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_brings_every_singular_value_near_one(shape, scale, dtype):
    matrices = draw(*shape) * scale
    result = orthogonalize(matrices, dtype).float()
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.5 and values.max() < 1.3
    # The directions stay: the result is the polar factor, not just some orthogonal matrix.
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    cosine = (result * (u @ vt)).sum((1, 2)) / result.norm(dim=(1, 2)) / (u @ vt).norm(dim=(1, 2))
    assert cosine.min() > 0.97
    assert orthogonalize(torch.zeros(shape)).isfinite().all()


@pytest.mark.parametrize("shape", [(2, 32, 128), (2, 128, 32), (2, 48, 64)])
def test_orthogonalize_is_five_polar_express_iterations(shape):
    """However the products are arranged, the singular values go through the five polynomials."""
    matrices = draw(*shape)
    u, values, vt = torch.linalg.svd(matrices.double(), full_matrices=False)
    values = values / (matrices.double().norm(dim=(1, 2))[:, None] * 1.02 + 1e-6)
    for a, b, c in _POLAR_EXPRESS:
        values = a * values + b * values**3 + c * values**5
    expected = u * values[:, None] @ vt
    torch.testing.assert_close(orthogonalize(matrices, torch.float32).double(), expected, atol=1e-3, rtol=0)
    error = (orthogonalize(matrices, torch.bfloat16).double() - expected).norm() / expected.norm()
    assert error < 0.03


def test_all_but_the_table_and_the_matrices_of_the_body_take_steps_of_adamw():
    model = micro_model()
    model.train_only()
    twin = copy.deepcopy(model)
    optimizer = MuonAdamW(groups(model))
    rest = next(group for group in optimizer.param_groups if not (group["muon"] or group["by_row"]))
    names = {id(p): name for name, p in model.named_parameters()}
    table = [p for name, p in twin.named_parameters() if name in {names[id(p)] for p in rest["params"]}]
    adamw = torch.optim.AdamW(table, lr=0.01 * SCALE_RATE, betas=rest["betas"], eps=rest["eps"], weight_decay=0.0)
    for step in range(3):
        take_steps(model, optimizer, step, 1)
        for parameter in table:
            name = next(n for n, p in twin.named_parameters() if p is parameter)
            parameter.grad = dict(model.named_parameters())[name].grad.clone()
        adamw.step()
    for parameter, expected in zip(rest["params"], table, strict=True):
        torch.testing.assert_close(parameter, expected)


def test_groups_hold_every_trainable_parameter_once_and_frozen_ones_never():
    model = micro_model()
    model.train_only()
    found = [id(p) for group in groups(model) for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    matrices = next(group for group in groups(model) if group["muon"])["params"]
    assert len(matrices) == 6 * model.config.num_hidden_layers  # q, k, v, o, up, down
    assert not any(p is model.model.embed_tokens.weight for p in matrices)


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_of_senses_and_streams_is_in_the_group_of_what_it_is(tied):
    """Tables by rows, all other matrices under Muon, vectors under AdamW: by the kind, wherever it is."""
    model = micro_model(tie_word_embeddings=tied)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tables, vectors, matrices = ({names[id(p)] for p in group["params"]} for group in groups(model))
    assert tables == {
        "model.embed_tokens.weight",
        *(() if tied else ("lm_head.weight",)),
        "model.senses.own_voice.codes.weight",
        "model.senses.touch.point_embedding.weight",
        "model.senses.touch.surface_embedding.weight",
        "streams.audio.position.weight",
    }
    assert vectors == {name for name, parameter in model.named_parameters() if parameter.dim() == 1}
    assert matrices == {*names.values()} - tables - vectors
    assert {"model.senses.vision.layers.0.weight", "streams.audio.out_proj.weight"} < matrices
    assert [group["lr"] for group in groups(model)] == [0.01, 0.01 * SCALE_RATE, 0.02]


def test_by_rows_a_row_has_one_second_moment():
    table = torch.nn.Parameter(draw(5, 4))
    expected, average, square = table.detach().clone(), torch.zeros(5, 4), torch.zeros(5, 1)
    optimizer = MuonAdamW([{"params": [table], "by_row": True, "lr": 0.1, "betas": (0.8, 0.9)}])
    optimizer.found_inf = torch.ones(())
    table.grad = torch.full((5, 4), float("nan"))
    optimizer.step()  # changes nothing, not even the step count
    optimizer.found_inf = torch.zeros(())
    for step in range(1, 4):
        table.grad = draw(5, 4, seed=step) * torch.tensor([[1.0], [1e-3], [10.0], [1.0], [0.0]])
        optimizer.step()
        average = 0.8 * average + 0.2 * table.grad
        square = 0.9 * square + 0.1 * table.grad.square().mean(1, keepdim=True)
        expected -= 0.1 * (average / (1 - 0.8**step)) / ((square / (1 - 0.9**step)).sqrt() + 1e-10)
        torch.testing.assert_close(table.detach(), expected)
    assert optimizer.state[table]["mean_square"].shape == (5, 1)


def test_a_muon_step_is_orthogonal_and_as_large_as_the_rate():
    parameter = torch.nn.Parameter(torch.zeros(64, 16))
    optimizer = MuonAdamW([{"params": [parameter], "lr": 0.02, "muon": True}])
    parameter.grad = draw(64, 16) * 1e-6
    optimizer.step()
    values = torch.linalg.svdvals(parameter.detach()) / (0.02 * (64 / 16) ** 0.5)
    assert values.min() > 0.5 and values.max() < 1.3


def test_many_matrices_are_stepped_in_few_stacks_of_one_size():
    """Where they are stacked, which on a CPU they are not: what is compiled must not grow with the model."""
    shapes = [(8, 8), (8, 8), (8, 32), (32, 8)] * 40
    matrices = [torch.zeros(shape, device="meta", requires_grad=True) for shape in shapes]
    for matrix in matrices:
        matrix.grad = torch.zeros_like(matrix)
    optimizer = MuonAdamW([{"params": matrices, "muon": True}])
    stacks = []
    optimizer._muon_step = lambda params, *_: stacks.append(params)
    optimizer.step()
    assert len(stacks) == 8 and {len(stack) for stack in stacks} == {20} and 20 <= LARGEST_STACK
    assert len({tuple(matrix.shape for matrix in stack) for stack in stacks}) == 2
    assert {id(matrix) for stack in stacks for matrix in stack} == {id(matrix) for matrix in matrices}


def test_no_gradient_is_no_step():
    """torch takes such a step, at rate 0, before it loads a sharded state."""
    parameter = torch.nn.Parameter(draw(8, 4))
    before = parameter.detach().clone()
    optimizer = MuonAdamW([{"params": [parameter], "lr": 0.02, "muon": True}])
    parameter.grad = torch.zeros(8, 4)
    optimizer.step()
    assert torch.equal(parameter, before)


def test_a_loaded_state_continues_bit_for_bit():
    model = micro_model()
    model.train_only()
    optimizer = MuonAdamW(groups(model))
    take_steps(model, optimizer, 0, 3)
    twin = copy.deepcopy(model)
    resumed = MuonAdamW(groups(twin))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take_steps(model, optimizer, 3, 2)
    take_steps(twin, resumed, 3, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.fixture
def mesh():
    """A process group of this process alone: tensors on it are sharded as on many."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_parameters_take_the_same_steps_and_none_with_found_inf(mesh):
    model = micro_model()
    model.train_only()
    twin = copy.deepcopy(model)
    fully_shard(twin, mesh=mesh)
    optimizer, sharded = MuonAdamW(groups(model)), MuonAdamW(groups(twin))
    for step in range(3):
        finite = step != 1
        optimizer.found_inf = sharded.found_inf = torch.tensor(0.0 if finite else 1.0)
        pairs = list(zip(model.parameters(), twin.parameters(), strict=True))
        before = [param.full_tensor().clone() for _, param in pairs]
        for index, (plain, shard) in enumerate(pairs):
            if plain.requires_grad:
                plain.grad = draw(*plain.shape, seed=1000 * step + index)
                shard.grad = distribute_tensor(plain.grad, mesh, shard.placements)
        optimizer.step()
        sharded.step()
        changed = [not torch.equal(old, shard.full_tensor()) for old, (_, shard) in zip(before, pairs, strict=True)]
        assert any(changed) == finite
        assert all(torch.equal(plain, shard.full_tensor()) for plain, shard in pairs)


def test_a_step_with_found_inf_changes_nothing():
    model = micro_model()
    model.train_only()
    optimizer = MuonAdamW(groups(model))
    take_steps(model, optimizer, 0, 1)
    before, states = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[name], value) for name, value in states[index].items())


@pytest.mark.parametrize("kind", ["muon", "by_row"])
def test_a_vector_for_muon_or_rows_is_refused(kind):
    with pytest.raises(ValueError, match="matrices"):
        MuonAdamW([{"params": [torch.nn.Parameter(torch.zeros(3))], kind: True}])


def test_every_neuron_takes_a_step_of_the_same_length():
    """Two rows of the gradient share a direction: each gets a smaller step, and is brought up to the others' size."""
    matrix = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = MuonAdamW([{"params": [matrix], "muon": True, "lr": 1.0}])
    gradient = draw(8, 8)
    gradient[0] = gradient[1] + 1e-3 * gradient[0]
    gradient[1] = gradient[0]
    matrix.grad = gradient
    optimizer.step()
    lengths = matrix.detach().norm(dim=1)
    plain = orthogonalize(gradient[None], torch.float32)[0].norm(dim=1)
    assert plain.min() < 0.8 * plain.max()
    assert lengths.min() > 0.99 * lengths.max()
    assert lengths.norm() == pytest.approx(plain.norm().item(), rel=0.05)


def test_the_backbone_learns_at_a_share_of_the_rates():
    model = micro_model()
    parts = {id(p) for part in (model.model.senses, model.streams) for p in part.parameters()}
    plain = {id(p): group["lr"] for group in parameter_groups(model, 1.0, 10.0, 0.1) for p in group["params"]}
    scaled = parameter_groups(model, 1.0, 10.0, 0.1, backbone_rate=0.25)
    rates = {id(p): group["lr"] for group in scaled for p in group["params"]}
    assert rates.keys() == plain.keys() and len(scaled) == 6
    for key, rate in rates.items():
        assert rate == pytest.approx(plain[key] * (1 if key in parts else 0.25))


def test_rows_that_stand_for_no_text_learn_at_the_full_rate():
    model = micro_model()
    groups = parameter_groups(model, 0.01, 0.01, 0.0, backbone_rate=0.1, other_rows=[126, 127])
    table = model.model.embed_tokens.weight
    before = table.detach().clone()
    optimizer = MuonAdamW(groups)
    table.grad = torch.ones_like(table)
    optimizer.step()
    moved = (before - table.detach()).mean(dim=1)
    torch.testing.assert_close(moved[126:], torch.full((2,), 0.01), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(moved[:126], torch.full((126,), 0.001), atol=1e-5, rtol=1e-3)


def test_more_shapes_than_torch_compiles_by_default(monkeypatch):
    compile_with_inductor = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **how: compile_with_inductor(step, **how, backend="eager"))
    torch._dynamo.reset()
    matrices = [torch.nn.Parameter(torch.randn(2 + size, 3)) for size in range(12)]
    before = [matrix.detach().clone() for matrix in matrices]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    with torch._dynamo.config.patch(recompile_limit=8):
        MuonAdamW([{"params": matrices, "muon": True, "lr": 0.1}], compiled=True).step()
    assert all(not torch.equal(old, matrix) for old, matrix in zip(before, matrices, strict=True))
