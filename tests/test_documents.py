"""Documents kept apart: what the collator marks, what attention lets through, and that nothing else changes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from creatures import micro_model

from creature.data import block_collator, collate_blocks
from creature.errors import UserError

END = 125  # the micro creature's end of text
# A block that begins in a document, a document of two tokens, one of none, and one that the block cuts off.
BLOCK = [7, 8, 9, END, 20, 21, END, END, 30, 31, 32, 33]
DOCUMENTS = ((0, 3), (3, 6), (6, 7), (7, 12))


def packed(*rows):
    return collate_blocks([{"input_ids": np.array(row)} for row in rows], end_of_text=END)


def test_positions_restart_where_documents_end():
    batch = packed(BLOCK, [1] * 12)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 3, 4], list(range(12))]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 6, 7, 12] + [24] * 251  # of all rows, one behind the other
    many = collate_blocks([{"input_ids": np.full(300, END)}], end_of_text=END)["cu_seq_lens_q"]
    assert many.tolist() == [*range(300)] + [300] * 212
    assert batch["position_ids"].dtype == torch.int64 and batch["labels"] is batch["input_ids"]
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
