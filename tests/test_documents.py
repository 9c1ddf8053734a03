"""Documents kept apart: what the collator marks, what the masks let through, and that nothing else changes."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from creatures import micro_model

import modeling_creature
from creature.data import block_collator, collate_blocks
from creature.errors import UserError
from masks_creature import document_block_mask, document_ids

END = 125  # the micro creature's end of text
# A block that begins in a document, a document of two tokens, one of none, and one that the block cuts off.
BLOCK = [7, 8, 9, END, 20, 21, END, END, 30, 31, 32, 33]
DOCUMENTS = ((0, 3), (3, 6), (6, 7), (7, 12))


def packed(*rows):
    return collate_blocks([{"input_ids": np.array(row)} for row in rows], end_of_text=END)


def test_positions_restart_where_documents_end():
    batch = packed(BLOCK, [1] * 12)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 3, 4], list(range(12))]
    assert batch["position_ids"].dtype == torch.int64 and batch["labels"] is batch["input_ids"]
    assert document_ids(batch["position_ids"]).tolist() == [[0] * 3 + [1] * 3 + [2] + [3] * 5, [0] * 12]
    assert "position_ids" not in collate_blocks([{"input_ids": np.array(BLOCK)}])


def test_the_end_is_the_tokenizers():
    rows = [{"input_ids": np.array([1, 9, 2])}]
    assert block_collator(SimpleNamespace(eos_token_id=9), True)(rows)["position_ids"].tolist() == [[0, 0, 1]]
    assert block_collator(SimpleNamespace(eos_token_id=9), False) is collate_blocks
    with pytest.raises(UserError, match="end-of-text token"):
        block_collator(SimpleNamespace(eos_token_id=None), True)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_logits_are_those_of_each_document_alone(kind):
    model, batch = micro_model(attn_implementation=kind), packed(BLOCK, BLOCK[::-1])
    with torch.no_grad():
        together = model(batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
        for start, end in DOCUMENTS:
            alone = model(batch["input_ids"][:1, start:end]).logits[0]
            torch.testing.assert_close(together[start:end], alone, atol=1e-5, rtol=1e-5)
        plain = model(batch["input_ids"]).logits[0]
    assert (together - plain)[4:].abs().amax(-1).min() > 1e-3  # without the option they would see one another


def test_no_target_of_a_document_reaches_another():
    model, batch = micro_model(), packed(BLOCK)
    for start, end in DOCUMENTS:
        vectors = model.model.embed_tokens(batch["input_ids"]).detach().requires_grad_()
        labels = torch.full_like(batch["labels"], -100)
        # What this document's ticks predict: its own tokens but the first, and the end of text behind it.
        labels[:, start + 1 : end + 1] = batch["labels"][:, start + 1 : end + 1]
        model(inputs_embeds=vectors, position_ids=batch["position_ids"], labels=labels).loss.backward()
        reached = vectors.grad[0].abs().sum(-1) > 0
        inside = torch.zeros(12, dtype=torch.bool)
        inside[start : min(end, 11)] = True
        assert torch.equal(reached, inside)


def test_the_same_targets_count_as_in_plain_blocks():
    model, batch = micro_model(), packed(BLOCK)
    with torch.no_grad():
        losses = model(**batch, return_logits=False).token_losses[0]
    assert (losses > 0).all() and len(losses) == 11


def test_a_block_of_one_document_gives_the_plain_loss():
    model, batch = micro_model(), packed([1, 2, 3, 4, 5, 6], [END, 2, 3, 4, 5, 6])
    apart = model(**batch).loss
    batch.pop("position_ids")
    torch.testing.assert_close(apart, model(**batch).loss, atol=1e-6, rtol=1e-6)


def test_generation_is_as_before():
    """`generate` gives positions of its own, beside a cache: an end of text in the prompt hides nothing."""
    model, ids = micro_model(), torch.tensor([BLOCK])
    settings = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    cached = model.generate(ids, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
    with torch.no_grad():
        assert cached[0, 12] == model(ids).logits[0, -1].argmax()


# --- FlexAttention ---------------------------------------------------------------------------------------------------


def random_positions(rows: int, ticks: int, mean_length: float, seed: int = 0) -> torch.Tensor:
    ids = torch.rand(rows, ticks, generator=torch.Generator().manual_seed(seed)) < 1 / mean_length
    return collate_blocks([{"input_ids": row} for row in ids.long().numpy()], end_of_text=1)["position_ids"]


@pytest.mark.parametrize("ticks, mean_length", [(1, 5), (100, 30), (256, 2), (700, 100), (1024, 400), (1024, 1e9)])
def test_the_tiles_let_through_what_the_mask_does(ticks, mean_length):
    documents = document_ids(random_positions(3, ticks, mean_length))
    mask = document_block_mask(documents)
    place = torch.arange(ticks)
    expected = (place[:, None] >= place) & (documents[:, :, None] == documents[:, None, :])
    tiles = mask.kv_indices.shape[-1]
    padding = (0, 128 * tiles - ticks) * 2
    wanted = torch.nn.functional.pad(expected, padding).unflatten(1, (tiles, 128)).unflatten(3, (tiles, 128))
    computed = torch.zeros_like(wanted)  # [B, tiles of queries, 128, tiles of keys, 128]
    for row in range(3):
        for query in range(tiles):
            for key in mask.kv_indices[row, 0, query, : mask.kv_num_blocks[row, 0, query]].tolist():
                computed[row, query, :, key] = wanted[row, query, :, key]  # by the mask's function
            for key in mask.full_kv_indices[row, 0, query, : mask.full_kv_num_blocks[row, 0, query]].tolist():
                assert not computed[row, query, :, key].any()
                computed[row, query, :, key] = True
    seen = computed.flatten(1, 2).flatten(2)[:, :ticks]  # queries behind the end are dropped
    assert torch.equal(seen, wanted.flatten(1, 2).flatten(2)[:, :ticks])
    # Nothing is computed for nothing, and with one document all tiles below the diagonal are whole.
    assert mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum() == wanted.any(4).any(2).sum()
    if mean_length > ticks:
        assert mask.full_kv_num_blocks.sum() == 3 * tiles * (tiles - 1) // 2


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="compiles for the CPU")
def test_a_compiled_creature_takes_the_tiles_and_other_documents_without_compiling_anew(monkeypatch):
    """What a GPU does (attention_mask_for), here by hand and forward only: FlexAttention has no more on a CPU."""
    model = micro_model(max_position_embeddings=256, hidden_size=64)
    ids = torch.randint(0, 120, (2, 200), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, fullgraph=True)
    for seed in range(3):
        positions = random_positions(2, 200, 30, seed)
        with torch.no_grad():
            expected = model(ids, position_ids=positions, use_cache=False).logits
            with monkeypatch.context() as patch, torch._dynamo.config.patch(error_on_recompile=True):
                patch.setattr(
                    modeling_creature,
                    "attention_mask_for",
                    lambda config, states, mask, position_ids, *rest, **named: document_block_mask(
                        document_ids(position_ids)
                    ),
                )
                actual = compiled(ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
