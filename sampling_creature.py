# Copyright 2026 The MultiModalCreature developers. Licensed under the Apache License, Version 2.0.
"""How the next id of a stream is drawn from its logits: temperature, top-k, top-p, and the choice to stay silent."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """
    How the ids of one stream are drawn; by default the likeliest id is taken.

    Args:
        temperature: below 1 is more predictable; 0 takes the likeliest.
        top_k: keep so many of the likeliest ids; 0 keeps all.
        top_p: keep the likeliest ids up to this probability (Holtzman et al. 2020).
        null_bias: added to the logit of NULL; more is more silent. Of text only.
        null_temperature: with a number, whether a tick is silent is drawn first, at this temperature, and the three
            settings above choose among the other ids. None: NULL is an id like any other.

    Raises:
        ValueError: for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    null_bias: float = 0.0
    null_temperature: float | None = None

    def __post_init__(self):
        if not (0 <= self.temperature < float("inf") and 0 <= (self.null_temperature or 0.0) < float("inf")):
            raise ValueError("Sampling: a temperature is at least 0, and 0 takes the likeliest.")
        if self.null_bias != self.null_bias:
            raise ValueError("Sampling: null_bias is not a number: give one, 0 for none.")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling: top_k ({self.top_k}) is at least 0, top_p ({self.top_p}) above 0, at most 1.")


GREEDY = Sampling()


def sample(
    logits: torch.Tensor,
    how: Sampling = GREEDY,
    null_id: int | None = None,
    noise: torch.Tensor | None = None,
    silence: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    One id per row of logits [B, ids], [B] int64.

    Args:
        null_id: NULL of a stream of text.
        noise, silence: the random numbers, where ids, or whether it is silent, are drawn: see `draw_for_sample`.
    """
    logits = logits.float()
    silent = None
    if null_id is not None and (how.null_bias or how.null_temperature is not None):
        null = logits[:, null_id] + how.null_bias
        logits = logits.clone()
        if how.null_temperature is None:
            logits[:, null_id] = null
        else:
            logits[:, null_id].fill_(float("-inf"))
            silent = _is_silent(null - logits.logsumexp(dim=-1), how.null_temperature, silence)
    ids = logits.argmax(dim=-1) if not how.temperature else _draw(logits / how.temperature, how, noise)
    return ids if silent is None else ids.masked_fill(silent, null_id)


def draw_for_sample(
    how: Sampling,
    rows: int,
    ids: int,
    device: torch.device,
    null_id: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, torch.Tensor]:
    """
    The random numbers that `sample` takes for logits [rows, ids], by its arguments: `silence` [rows] from [0, 1) and
    `noise` [rows, ids or top_k] from Exp(1). They are drawn apart from it, because a CUDA graph that holds it cannot.
    """
    drawn = {}
    if null_id is not None and how.null_temperature:
        drawn["silence"] = torch.rand(rows, generator=generator, device=device)
    if how.temperature:
        kept = min(how.top_k or ids, ids)
        drawn["noise"] = torch.empty(rows, kept, device=device).exponential_(generator=generator)
    return drawn


def _is_silent(odds: torch.Tensor, temperature: float, drawn: torch.Tensor | None) -> torch.Tensor:
    """Log-odds of silence [B] -> bool [B]."""
    return drawn < (odds / temperature).sigmoid() if temperature else odds > 0


def _draw(logits: torch.Tensor, how: Sampling, noise: torch.Tensor) -> torch.Tensor:
    ids = None
    if how.top_k and how.top_k < logits.shape[-1]:
        logits, ids = logits.topk(how.top_k, dim=-1)
    elif how.top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    weights = logits.softmax(dim=-1)
    if how.top_p < 1:  # those before which less than top_p lies; the first one always
        weights = weights.masked_fill(weights.cumsum(dim=-1) - weights >= how.top_p, 0.0)
    # As torch.multinomial, in one pass: argmax of p / q with q ~ Exp(1).
    places = (weights / noise[:, : weights.shape[-1]]).argmax(dim=-1)
    return places if ids is None else ids.gather(-1, places[:, None])[:, 0]


__all__ = ["GREEDY", "Sampling", "draw_for_sample", "sample"]
