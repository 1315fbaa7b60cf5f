"""From logits to the next token: penalties, filters and draws that no batch neighbour can change.

The order is the field's (Hugging Face transformers): repetition penalty, temperature, top-k, top-p, min-p, draw.
Top-p therefore counts the mass of what top-k left, at the chosen temperature. Ties are broken by the lower token id.

Shape legend: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusiontree.utils.errors import UserError
from fusiontree.utils.hashing import stable_uniform


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen. The defaults draw from the model's own distribution.

    Raises:
        UserError: a value outside its range, or a filter that greedy choice would ignore.
    """

    greedy: bool = False
    """Take the most likely token (after the repetition penalty); no randomness."""
    temperature: float = 1.0
    """Logits are divided by it: below 1 sharpens, above 1 flattens."""
    top_k: int | None = None
    """Keep only the k most likely tokens."""
    top_p: float | None = None
    """Keep only the smallest set of most likely tokens whose probabilities sum to at least p."""
    min_p: float | None = None
    """Keep only tokens whose probability is at least this fraction of the most likely token's."""
    repetition_penalty: float = 1.0
    """Tokens of the row so far (prompt and new): positive logits divided by it, negative multiplied (CTRL, 2019)."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UserError(f"temperature is {self.temperature}; it must be above 0 (for no randomness choose greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; it must be at least 1, or absent to keep every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it is a probability mass above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}; it is a fraction between 0 and 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UserError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0, 1 changes nothing")
        if self.greedy:
            ignored = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
            if self.temperature != 1.0:
                ignored.insert(0, "temperature")
            if ignored:
                raise UserError(f"greedy takes the most likely token and would ignore {', '.join(ignored)}; drop one")


def apply_repetition_penalty(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Make tokens that a row already holds less likely (``penalty`` > 1), whatever the sign of their logits.

    Args:
        logits_BV: scores.
        seen_BV: bool, True where the row's own prompt or new tokens hold the token; padding never counts.
        penalty: 1 changes nothing.
    """
    if penalty == 1.0:
        return logits_BV
    penalised_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, penalised_BV, logits_BV)


def filter_logits(
    logits_BV: Tensor, *, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> Tensor:
    """Set the logits of excluded tokens to minus infinity; the most likely token of a row always stays.

    Each filter works on what the one before it left, renormalised. Masses are summed in float64, so that a sum over
    a large vocabulary reaches p where the definition says.

    Args:
        logits_BV: scores, temperature already applied.
        top_k: keep exactly this many tokens (all, if the vocabulary is smaller).
        top_p: keep a token when the tokens before it, from the most likely on, hold less than this mass.
        min_p: keep a token when its probability is at least ``min_p`` times the largest.
    """
    vocabulary = logits_BV.shape[-1]
    if top_k is not None and top_k >= vocabulary:
        top_k = None
    if top_p is not None and top_p >= 1:
        top_p = None
    keep_BV = torch.ones_like(logits_BV, dtype=torch.bool)
    if top_k is not None or top_p is not None:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        sorted_keep_BV = torch.ones_like(keep_BV)
        if top_k is not None:
            sorted_keep_BV[:, top_k:] = False
        if top_p is not None:
            mass_BV = sorted_BV.double().masked_fill(~sorted_keep_BV, -torch.inf).softmax(dim=-1)
            # a token stays while those before it have not reached p; the first has none before it
            sorted_keep_BV[:, 1:] &= mass_BV.cumsum(dim=-1)[:, :-1] < top_p
        keep_BV = keep_BV.scatter(-1, order_BV, sorted_keep_BV)
    if min_p:
        # p >= min_p * p_max, in logarithms; the normaliser cancels, so earlier filters do not matter
        keep_BV &= logits_BV >= logits_BV.amax(dim=-1, keepdim=True) + math.log(min_p)
    return logits_BV.masked_fill(~keep_BV, -torch.inf)


def draw(logits_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Draw one token per row by inverting the cumulative distribution at the row's uniform number.

    Args:
        logits_BV: scores, minus infinity for excluded tokens.
        uniforms_B: numbers in [0, 1), float64.

    Returns:
        int64 ``[B]``. A token with zero probability is never drawn.
    """
    cumulative_BV = logits_BV.double().softmax(dim=-1).cumsum(dim=-1)
    total_B1 = cumulative_BV[:, -1:]
    # u * total may round up to total, where no token lies
    threshold_B1 = torch.minimum(uniforms_B[:, None] * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    return torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0]


def sample(
    logits_BV: Tensor, config: SamplingConfig, *, seen_BV: Tensor | None, seeds: Sequence[int], step: int
) -> Tensor:
    """Choose the next token of every row.

    Row i's draw is a function of ``(seeds[i], step)`` and its own logits alone: neither its neighbours nor its place
    in the batch nor the device change it, and no generator state has to be carried.

    Args:
        logits_BV: the model's scores, any float dtype; probabilities are computed in float64.
        config: how to choose.
        seen_BV: bool, tokens of each row so far; needed when a repetition penalty is set.
        seeds: one per row.
        step: number of tokens drawn for these rows before this one.

    Returns:
        int64 ``[B]``.

    Raises:
        FloatingPointError: a row's logits hold NaN or plus infinity.
    """
    if len(seeds) != logits_BV.shape[0]:
        raise ValueError(f"{len(seeds)} seeds for {logits_BV.shape[0]} rows; give one per row")
    scores_BV = logits_BV.double()
    bad_B = (scores_BV.isnan() | scores_BV.isposinf()).any(dim=-1)
    if bool(bad_B.any()):
        rows = bad_B.nonzero().flatten().tolist()
        raise FloatingPointError(f"logits of rows {rows} are not finite: damaged weights, or an overflow of the dtype")
    if config.repetition_penalty != 1.0:
        if seen_BV is None:
            raise ValueError("repetition_penalty needs seen_BV, the tokens of each row so far")
        scores_BV = apply_repetition_penalty(scores_BV, seen_BV, config.repetition_penalty)
    if config.greedy:
        return scores_BV.argmax(dim=-1)
    # shifted, so that a temperature near 0 overflows towards minus infinity only
    scores_BV = (scores_BV - scores_BV.amax(dim=-1, keepdim=True)) / config.temperature
    scores_BV = filter_logits(scores_BV, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p)
    uniforms = [stable_uniform("sample", seed, step) for seed in seeds]
    return draw(scores_BV, torch.tensor(uniforms, dtype=torch.float64, device=scores_BV.device))
