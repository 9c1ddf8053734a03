"""What only a CUDA device can show; skipped where there is none."""

import pytest
import torch
import torch.nn.functional as F
from creatures import micro_config

import losses_creature
from creature.data import collate_blocks
from creature.optimizer import MuonAdamW, parameter_groups
from modeling_creature import MultiModalCreature

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_kernel_gives_the_loss_and_its_gradient(dtype, tolerance):
    torch.manual_seed(0)
    logits = torch.randn(37, 50304, device="cuda", dtype=dtype) * 3
    targets = torch.randint(0, 50304, (37,), device="cuda")
    weights = torch.rand(37, device="cuda")
    weights[5] = 0
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none") * weights
    expected.sum().backward()
    losses, gradient = losses_creature._cross_entropy_(logits.clone(), targets, weights)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert (gradient.double() - exact.grad).norm() / exact.grad.norm() < tolerance
    assert not gradient[5].any()


def test_compiled_training_keeps_the_causal_mask_a_flag_and_learns():
    config = micro_config(hidden_size=64, num_attention_heads=1)  # a head_dim that the fused kernels take
    model = MultiModalCreature(config).cuda()
    model.train_only()
    optimizer = MuonAdamW(parameter_groups(model, 0.01, 0.02, 0.0), compiled=True)
    compiled = torch.compile(model, fullgraph=True)
    ids = torch.randint(0, config.vocab_size - 3, (4, 64), device="cuda")
    losses = []
    # Only the flash kernel is allowed, and it takes no mask: a written-out one would raise here.
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.FLASH_ATTENTION]):
        for _ in range(20):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = compiled(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("mean_length, ticks", [(50, 512), (400, 512), (50, 300), (1e9, 512)])
def test_documents_apart_by_flex_attention_equal_those_by_a_mask(mean_length, ticks, half):
    """Compiled, packed documents run in FlexAttention; the reference is eager, with the mask written out."""
    torch._dynamo.reset()
    config = micro_config(hidden_size=128, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512)
    torch.manual_seed(0)
    model = MultiModalCreature(config).cuda()
    model.train_only()
    compiled = torch.compile(model, fullgraph=True)
    for seed in range(3):  # other documents, the same graph
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 120, (4, ticks), generator=generator)
        ids[torch.rand(4, ticks, generator=generator) < 1 / mean_length] = config.eos_token_id
        batch = collate_blocks([{"input_ids": row} for row in ids.numpy()], end_of_text=config.eos_token_id)
        batch = {name: tensor.cuda() for name, tensor in batch.items()}
        results = []
        for run in (model, compiled):
            with torch._dynamo.config.patch(error_on_recompile=True):
                with torch.autocast("cuda", dtype=torch.bfloat16, enabled=half):
                    loss = run(**batch).loss
                loss.backward()
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
            results.append((loss.detach(), gradients))
        (expected, wanted), (actual, found) = results
        tolerance = 2e-3 if half else 2e-4
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        for name, gradient in wanted.items():
            if half and gradient.numel() == 1:
                continue  # a sum over all ticks, of which little is left
            distance = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
            assert distance < (1e-1 if half else 2e-2), f"{name}: {distance:.4f}"


def test_documents_apart_train_in_bf16_without_a_mask_written_out():
    torch._dynamo.reset()
    config = micro_config(hidden_size=64, num_attention_heads=1, max_position_embeddings=2048)
    model = MultiModalCreature(config).cuda()
    model.train_only()
    optimizer = MuonAdamW(parameter_groups(model, 0.01, 0.02, 0.0), compiled=True)
    compiled = torch.compile(model, fullgraph=True)
    ids = (torch.arange(2048) + 30 * torch.arange(4)[:, None]) % 120
    ids[torch.rand(4, 2048) < 0.01] = config.eos_token_id
    batch = collate_blocks([{"input_ids": row} for row in ids.numpy()], end_of_text=config.eos_token_id)
    batch = {name: tensor.cuda() for name, tensor in batch.items()}
    losses = []
    # No kernel of sdpa may run at all.
    with torch.nn.attention.sdpa_kernel([]):
        for _ in range(20):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = compiled(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_documents_apart_in_compiled_evaluation_with_a_shorter_last_batch():
    torch._dynamo.reset()
    config = micro_config(hidden_size=128, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256)
    model = MultiModalCreature(config).cuda().eval()
    compiled = torch.compile(model)
    for rows in (4, 4, 3, 1):
        ids = torch.randint(0, 120, (rows, 256))
        ids[torch.rand(rows, 256) < 0.02] = config.eos_token_id
        batch = collate_blocks([{"input_ids": row} for row in ids.numpy()], end_of_text=config.eos_token_id)
        batch = {name: tensor.cuda() for name, tensor in batch.items()}
        with torch.no_grad():
            expected, actual = (run(**batch, return_logits=False).token_losses for run in (model, compiled))
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)
