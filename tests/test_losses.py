"""Cross entropy in chunks of tokens: equal to the plain one, and near it in half precision and float8."""

import math

import pytest
import torch
import torch.nn.functional as F

import losses_creature
from creature.fast import head, kernels
from losses_creature import linear_cross_entropy, linear_token_losses


def random_head(tokens=50, size=24, vocab=97, dtype=torch.float64):
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, size, dtype=dtype), torch.randn(vocab, size, dtype=dtype) * 0.5
    return hidden, weight, torch.randint(0, vocab, (tokens,)), torch.rand(tokens).round(decimals=1)


def plain_cross_entropy(hidden, weight, targets, target_weights):
    losses = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    return (losses * target_weights.to(losses.dtype)).sum()


def value_and_gradients(function, hidden, weight, *rest, scale=1.0):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = function(hidden, weight, *rest)
    (loss * scale).backward()
    return loss.detach().double(), hidden.grad.double(), weight.grad.double()


@pytest.mark.parametrize("chunk", [1, 7, 25, 50, 1000])
def test_chunked_cross_entropy_equals_the_plain_one(chunk, monkeypatch):
    monkeypatch.setattr(losses_creature, "chunk_tokens", lambda device: chunk)
    hidden, weight, *rest = random_head()
    expected = value_and_gradients(plain_cross_entropy, hidden, weight, *rest, scale=0.25)
    found = value_and_gradients(linear_cross_entropy, hidden.float(), weight.float(), *rest, scale=0.25)
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true, atol=1e-6, rtol=2e-6)


def test_chunked_cross_entropy_with_the_vocabulary_of_gpt2():
    hidden, weight, *rest = random_head(tokens=1500, size=8, vocab=50304, dtype=torch.float32)  # two chunks on a CPU
    exact = value_and_gradients(plain_cross_entropy, hidden.double(), weight.double(), *rest)
    plain = value_and_gradients(plain_cross_entropy, hidden, weight, *rest)
    found = value_and_gradients(linear_cross_entropy, hidden, weight, *rest)
    for mine, other, true in zip(found, plain, exact, strict=True):
        # A float32 sum over 50,304 columns is good to some 1e-6 of its own: the chunks must not add to that.
        own = (other - true).norm() / true.norm()
        assert (mine - true).norm() / true.norm() < max(1e-6, 1.5 * own.item()) < 2e-5


def test_chunked_cross_entropy_under_bf16_autocast(monkeypatch):
    monkeypatch.setattr(losses_creature, "chunk_tokens", lambda device: 16)
    hidden, weight, *rest = random_head()
    expected = value_and_gradients(plain_cross_entropy, hidden, weight, *rest)

    def autocast(*arguments):
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(*arguments)
        assert loss.dtype == torch.float32  # a bf16 sum of losses has two digits
        return loss

    for dtype in (torch.float32, torch.bfloat16):
        found = value_and_gradients(autocast, hidden.to(dtype), weight, *rest)
        for mine, true in zip(found, expected, strict=True):
            assert (mine - true).norm() / true.norm() < 1e-2


def test_autocast_rounds_the_logits_but_not_the_loss():
    torch.manual_seed(0)
    hidden, weight = torch.randn(600, 32).bfloat16().float(), torch.randn(64, 32).bfloat16().float()
    targets, ones = torch.randint(0, 64, (600,)), torch.ones(600)
    expected = F.cross_entropy((hidden @ weight.t()).bfloat16().float(), targets, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, targets, ones)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)  # bfloat16 would be off by up to 4e-3


def test_chunked_cross_entropy_of_frozen_parts():
    hidden, weight, *rest = random_head(dtype=torch.float32)
    expected = value_and_gradients(linear_cross_entropy, hidden, weight, *rest)
    only_weight = weight.clone().requires_grad_()
    linear_cross_entropy(hidden, only_weight, *rest).backward()
    assert torch.equal(only_weight.grad.double(), expected[2])
    only_hidden = hidden.clone().requires_grad_()
    linear_cross_entropy(only_hidden, weight, *rest).backward()
    assert torch.equal(only_hidden.grad.double(), expected[1])
    assert not linear_cross_entropy(hidden, weight, *rest).requires_grad


def test_float8_keeps_four_bits_of_every_number_that_is_not_small():
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 50)[:, None]
    x[3] = 0
    by_row, scale = head.to_float8(x.bfloat16(), dim=1)
    back = by_row.double() * scale.double()
    assert scale.shape == (50, 1) and (by_row.float().abs().amax(1) == 448).sum() == 49
    large = x.bfloat16().abs() > x.bfloat16().abs().amax(1, keepdim=True) / 2**14
    assert ((back / x.bfloat16().double() - 1).abs()[large] <= 2**-4).all() and (back[3] == 0).all()
    whole, scale = head.to_float8(x)
    assert scale.shape == () and whole.float().abs().max() == 448
    x[5, 5] = float("nan")
    assert head.to_float8(x, dim=1)[0][5].isnan().all()  # a NaN stays one


def test_the_float8_head_stays_near_the_plain_one(monkeypatch):
    """The code around the kernels gives the loss and its gradients; the kernels themselves are in plain torch here."""
    called = []

    def softmax_exp_logits_float8(x, weight, targets, scale, shift, target_exp):
        called.append(len(x))
        exp_logits = (x.float() @ weight.float().t() * scale[:, None] - shift[:, None]).exp()
        sums, rows = exp_logits.sum(1), torch.arange(len(x))
        torch.testing.assert_close(exp_logits[rows, targets], target_exp, rtol=0.1, atol=0.0)  # autocast rounds
        exp_logits[rows, targets] = 0.0
        exp_logits = exp_logits.clamp(max=57344).to(torch.float8_e5m2).float()
        transposed, rest = exp_logits.clone(), -exp_logits.sum(1)
        transposed[rows, targets] = rest.clamp(min=-57344)
        transposed = kernels.transposed_order(transposed).t().contiguous()
        return exp_logits.to(torch.float8_e5m2), transposed.to(torch.float8_e5m2), sums, rest

    def softmax_exp_logits(x, weight, targets):
        logits, rows = x.float() @ weight.float().t(), torch.arange(len(x))
        exp_logits = (logits - logits[rows, targets][:, None]).exp()
        sums = exp_logits.sum(1)
        exp_logits[rows, targets] = 1 - sums
        return exp_logits.to(x.dtype), sums

    def scaled_mm(a, b, scale_a, scale_b, out_dtype, use_fast_accum):
        return (a.float() @ b.float() * scale_a * scale_b).to(out_dtype)

    monkeypatch.setattr(head, "TILE_ROWS", 16)
    monkeypatch.setattr(head, "COMMON_IDS", 40)
    monkeypatch.setattr(head, "softmax_exp_logits_float8", softmax_exp_logits_float8)
    monkeypatch.setattr(head, "softmax_exp_logits", softmax_exp_logits)
    monkeypatch.setattr(head, "add_product", lambda total, a, b: total.add_((a.t() @ b).float()))
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    hidden, weight, *rest = random_head(tokens=72)
    # Sure of another token than the target, and of an uncommon one: its exponential is more than can be stored.
    hidden[4] = weight[60] / weight[60].norm() * 10
    logits = hidden[4] @ weight.t()
    assert logits[60] - logits[:40].logsumexp(0) > math.log(57344 / 64) + 1 and rest[0][4] != 60 and rest[1][4] > 0
    expected = value_and_gradients(plain_cross_entropy, hidden, weight, *rest)

    def loss(*arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return head._FastCrossEntropy.apply(*arguments)

    for float8, chunk, calls, limit in ((False, 20, [], 0.01), (True, 32, [32, 32], 0.07)):  # not the last 8
        found = value_and_gradients(loss, hidden.float(), weight.float(), *rest, float8, chunk)
        assert called == calls
        assert all((mine - true).norm() / true.norm() < limit for mine, true in zip(found, expected, strict=True))
        assert (found[1][4] - expected[1][4]).norm() / expected[1][4].norm() < limit


def test_the_fast_head_is_the_plain_one_where_its_kernels_do_not_run():
    hidden, weight, *rest = random_head(dtype=torch.float32)
    expected = value_and_gradients(linear_cross_entropy, hidden, weight, *rest)
    found = value_and_gradients(head.linear_cross_entropy, hidden, weight, *rest, True)
    assert all(map(torch.equal, found, expected))


def test_cross_entropy_of_huge_logits_is_finite():
    hidden, weight, *rest = random_head(dtype=torch.float32)
    for value in value_and_gradients(linear_cross_entropy, hidden * 1e4, weight, *rest):
        assert value.isfinite().all()


def test_token_losses_and_predictions(monkeypatch):
    monkeypatch.setattr(losses_creature, "chunk_tokens", lambda device: 16)
    hidden, weight, targets, _ = random_head(dtype=torch.float32)
    targets[3:9] = -100
    losses, predictions = linear_token_losses(hidden, weight, targets)
    logits = hidden @ weight.T
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"))
    assert torch.equal(predictions, logits.argmax(-1)) and not losses[3:9].any()
