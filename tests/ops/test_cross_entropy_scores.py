"""Scores of single labels against the full logits, whole and with the vocabulary split over ranks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor

from fusiontree.ops.cross_entropy import TokenScores, linear_cross_entropy, linear_token_scores

NONE = torch.empty(0, dtype=torch.int64)
VOCABULARY, RANKS = 48, 3


def inputs(tokens: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(tokens, 8, generator=g), torch.randn(VOCABULARY, 8, generator=g)
    labels = torch.randint(0, VOCABULARY, (tokens,), generator=g)
    labels[10:25] = (hidden[10:25] @ weight.t()).argmax(-1)
    labels[::5] = -100
    return hidden, weight, labels


def on_ranks(hidden: Tensor, weight: Tensor, labels: Tensor, never: Tensor) -> list[TokenScores]:
    """Compute on threads, each with a shard of the vocabulary."""
    size = VOCABULARY // RANKS
    barrier, parts = Barrier(RANKS), [torch.empty(0)] * RANKS

    def gather_of(rank: int) -> Callable[[Tensor], Tensor]:
        def gather(part: Tensor) -> Tensor:
            parts[rank] = part
            barrier.wait()
            stacked = torch.stack(parts)
            barrier.wait()
            return stacked

        return gather

    def compute(rank: int) -> TokenScores:
        shard = weight[rank * size : (rank + 1) * size]
        return linear_token_scores(
            hidden, shard, labels, never, vocab_start=rank * size, gather_parts=gather_of(rank), chunk_tokens=8
        )

    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(compute, range(RANKS)))


@pytest.mark.parametrize("chunk", [1, 8, 100])
def test_scores_are_those_of_the_full_logits(chunk: int) -> None:
    hidden, weight, labels = inputs()
    scores = linear_token_scores(hidden, weight, labels, NONE, chunk_tokens=chunk)
    logits = hidden @ weight.t()
    asked = labels >= 0
    expected = logits.log_softmax(-1)[asked].gather(1, labels[asked, None])[:, 0]
    torch.testing.assert_close(scores.log_likelihood[asked], expected)
    assert torch.equal(scores.chosen, asked & (logits.argmax(-1) == labels))
    assert 10 <= int(scores.chosen.sum()) < int(asked.sum())
    assert not scores.log_likelihood[~asked].any()
    loss, _ = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(-scores.log_likelihood.sum(), loss)


def test_what_is_never_drawn_is_never_chosen_and_keeps_its_likelihood() -> None:
    hidden, weight, labels = inputs()
    plain = linear_token_scores(hidden, weight, labels, NONE)
    never = labels[plain.chosen].unique()[:3]
    scores = linear_token_scores(hidden, weight, labels, never)
    assert torch.equal(scores.log_likelihood, plain.log_likelihood)
    logits = hidden @ weight.t()
    logits[:, never] = -torch.inf
    assert torch.equal(scores.chosen, (labels >= 0) & (logits.argmax(-1) == labels))
    assert int(scores.chosen.sum()) < int(plain.chosen.sum())


def test_shards_of_the_vocabulary_give_the_same_scores_on_every_rank() -> None:
    hidden, weight, labels = inputs()
    never = torch.tensor([3, 20, 45])
    expected = linear_token_scores(hidden, weight, labels, never)
    for scores in on_ranks(hidden, weight, labels, never):
        torch.testing.assert_close(scores.log_likelihood, expected.log_likelihood)
        assert torch.equal(scores.chosen, expected.chosen)


def test_of_equal_logits_the_first_is_chosen() -> None:
    hidden, weight = torch.ones(2, 8), torch.zeros(VOCABULARY, 8)
    labels = torch.tensor([0, 20])
    assert linear_token_scores(hidden, weight, labels, NONE).chosen.tolist() == [True, False]
    for scores in on_ranks(hidden, weight, labels, NONE):
        assert scores.chosen.tolist() == [True, False]


def test_no_label_at_all_is_no_error() -> None:
    hidden, weight, labels = inputs()
    scores = linear_token_scores(hidden, weight, torch.full_like(labels, -100), NONE)
    assert not scores.log_likelihood.any() and not scores.chosen.any()
