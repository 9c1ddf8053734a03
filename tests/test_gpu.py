"""What only a CUDA device can show; skipped where there is none."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from creatures import micro_config
from test_trainer import Rows, make_trainer
from transformers import TrainerCallback

import losses_creature
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


class WatchWaits(TrainerCallback):
    """Lets torch warn where the host waits for the GPU, from the third step to the log of the last."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.cuda.set_sync_debug_mode("warn" if state.global_step >= 2 else "default")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            torch.cuda.set_sync_debug_mode("default")


def test_no_step_without_a_log_waits_for_the_gpu(tmp_path):
    settings = dict(
        use_cpu=False, bf16=True, dataloader_pin_memory=True, accelerator_config={"non_blocking": True},
        max_steps=6, logging_steps=6, logging_first_step=False,
    )  # fmt: skip
    trainer = make_trainer(tmp_path, rows=Rows(48), callbacks=[WatchWaits()], **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)]
    assert not waits
