# Copyright 2026 The MultiModalCreature developers. Licensed under the Apache License, Version 2.0.
"""Which ticks see which: the plain causal order, and rows in which several documents stand behind one another."""

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import create_causal_mask

MASK_BLOCK = 128  # ticks on a side of the tiles that FlexAttention computes or skips as a whole


def document_ids(position_ids: torch.Tensor) -> torch.Tensor:
    """The number of the document of every tick, from 0 in each row: positions [B, T] that restart -> [B, T] int32."""
    begins = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return torch.nn.functional.pad(begins, (1, 0)).cumsum(-1, dtype=torch.int32)


def document_block_mask(documents: torch.Tensor) -> BlockMask:
    """
    Causal attention within each document, for FlexAttention (Dong et al. 2024): documents [B, T] as `document_ids`
    gives them -> a mask of [B, 1, T, T] that is never written out.

    Documents are runs of ticks, so the first and the last one of every tile tell what the tile holds; T x T is not
    looked at. All of it is tensors: other documents compile nothing anew.
    """
    rows, ticks = documents.shape
    tiles = -(-ticks // MASK_BLOCK)
    # The last tile is filled up with its own last document.
    filled = torch.cat((documents, documents[:, -1:].expand(rows, tiles * MASK_BLOCK - ticks)), dim=1)
    first, last = filled[:, ::MASK_BLOCK], filled[:, MASK_BLOCK - 1 :: MASK_BLOCK]  # [B, tiles]
    place = torch.arange(tiles, device=documents.device)
    earlier = place[:, None] > place  # [tiles of queries, tiles of keys]
    # Of an earlier tile, the queries see what has their own document; all of it where both hold but that one document.
    seen = earlier & (last[:, None, :] == first[:, :, None])
    whole = seen & (first[:, None, :] == last[:, :, None])
    partly = seen & ~whole | (place[:, None] == place)

    def same_document(row, head, query, key):
        return (query >= key) & (documents[row, query] == documents[row, key])

    return BlockMask.from_kv_blocks(
        *_listed(partly), *_listed(whole), BLOCK_SIZE=MASK_BLOCK, mask_mod=same_document, seq_lengths=(ticks, ticks)
    )


def _listed(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, queries, keys] bool -> how many keys each query has, [B, 1, queries], and which, [B, 1, queries, keys]."""
    order = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


def attention_mask_for(
    config,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values,
    dropout: bool = False,
) -> torch.Tensor | BlockMask | None:
    """
    What the layers' attention is masked with; None where the kernel's own causal flag does it.

    Args:
        hidden_states: [B, T, hidden_size]. attention_mask, position_ids, past_key_values: as the caller gave them.
        dropout: whether attention drops weights in this pass, which FlexAttention cannot.
    """
    if attention_mask is None and past_key_values is None and config._attn_implementation == "sdpa":
        if position_ids is None:
            # transformers would say so too, except in compiled graphs before torch 2.14: there it writes out the mask,
            # and training is a quarter slower (docs/log.md).
            return None
        # Positions that the caller chose can mean packed documents. The fast kernels take no mask; FlexAttention
        # leaves out what is masked. It is compiled, though, and for each length anew: generation stays with the mask.
        if torch.compiler.is_compiling() and hidden_states.is_cuda and not dropout:
            return document_block_mask(document_ids(position_ids.expand(hidden_states.shape[0], -1)))
    return create_causal_mask(
        config=config,
        inputs_embeds=hidden_states,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
    )


__all__ = ["attention_mask_for", "document_block_mask", "document_ids"]
