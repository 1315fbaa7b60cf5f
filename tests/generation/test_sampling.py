from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontree.generation.sampling import SamplingConfig, apply_repetition_penalty, draw, filter_logits, sample
from fusiontree.utils.errors import UserError


def kept_by_definition(logits: list[float], top_k: int | None, top_p: float | None, min_p: float | None) -> set[int]:
    """The filters as the words say, one row at a time in plain Python: top-k, then top-p of the rest, then min-p."""
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if top_k is not None:
        ranked = ranked[:top_k]
    if top_p is not None:
        weights = [math.exp(logits[token] - logits[ranked[0]]) for token in ranked]
        for size in range(1, len(ranked) + 1):  # smallest set of the most likely whose mass reaches p
            if math.fsum(weights[:size]) / math.fsum(weights) >= top_p:
                ranked = ranked[:size]
                break
    if min_p:
        ranked = [token for token in ranked if math.exp(logits[token] - max(logits)) >= min_p]
    return set(ranked)


def kept(logits_BV: torch.Tensor) -> list[set[int]]:
    return [set(row.isfinite().nonzero().flatten().tolist()) for row in logits_BV]


# Few distinct values make ties; masses just beside p are left out, where both roundings are right.
ROWS = st.lists(st.lists(st.integers(-3, 3).map(float), min_size=7, max_size=7), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(
    rows=ROWS,
    top_k=st.none() | st.integers(1, 9),
    top_p=st.none() | st.floats(0.01, 0.999),
    min_p=st.none() | st.floats(0.0, 0.99),
)
def test_filters_equal_their_definition_row_by_row(rows, top_k, top_p, min_p):
    filtered = filter_logits(torch.tensor(rows, dtype=torch.float64), top_k=top_k, top_p=top_p, min_p=min_p)
    assert kept(filtered) == [kept_by_definition(row, top_k, top_p, min_p) for row in rows]
    for row, out in zip(rows, filtered.tolist(), strict=True):
        assert [value for value in out if value > -math.inf] == [v for v, o in zip(row, out, strict=True) if o == v]


def test_top_p_keeps_the_likely_tokens_not_their_positions():
    """Fault of the first prototype: the mask of the sorted order was applied to the unsorted logits."""
    probabilities = torch.tensor([[0.05, 0.10, 0.60, 0.25], [0.60, 0.25, 0.10, 0.05]])
    assert kept(filter_logits(probabilities.log(), top_p=0.5)) == [{2}, {0}]
    assert kept(filter_logits(probabilities.log(), top_p=0.61)) == [{2, 3}, {0, 1}]
    assert kept(filter_logits(probabilities.log(), top_p=0.86)) == [{1, 2, 3}, {0, 1, 2}]


@pytest.mark.parametrize("options", [{"top_p": 1e-12}, {"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-300, "top_k": 5}])
def test_the_top_token_always_stays(options):
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
    assert kept(filter_logits(logits, **options)) == [{int(top)} for top in logits.argmax(-1)]


def test_a_large_vocabulary_of_ties_is_cut_exactly_and_from_the_lowest_token():
    filtered = filter_logits(torch.zeros(1, 50_000), top_p=0.5 - 1e-9)
    assert kept(filtered) == [set(range(25_000))]
    assert kept(filter_logits(torch.zeros(1, 50_000), top_k=10)) == [set(range(10))]


def test_top_k_wider_than_the_vocabulary_and_top_p_of_one_keep_everything():
    logits = torch.randn(2, 6)
    assert torch.equal(filter_logits(logits, top_k=100, top_p=1.0, min_p=0.0), logits)


def test_top_p_counts_the_mass_top_k_left():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert kept(filter_logits(logits, top_p=0.55)) == [{0, 1}]
    assert kept(filter_logits(logits, top_k=2, top_p=0.55)) == [{0}]  # 0.4 of 0.7 is 0.571


def test_repetition_penalty_lowers_seen_tokens_of_either_sign_and_no_others():
    logits = torch.tensor([[2.0, -2.0, 0.0, 3.0], [2.0, -2.0, 0.0, 3.0]])
    seen = torch.tensor([[True, True, True, False], [False, False, False, True]])
    expected = torch.tensor([[1.0, -4.0, 0.0, 3.0], [2.0, -2.0, 0.0, 1.5]])
    assert torch.equal(apply_repetition_penalty(logits, seen, 2.0), expected)
    assert torch.equal(apply_repetition_penalty(logits, seen, 1.0), logits)


def test_a_penalised_token_falls_behind_under_greedy_choice():
    logits = torch.tensor([[5.0, 4.0], [-4.0, -5.0]])
    seen = torch.tensor([[True, False], [True, False]])
    chosen = sample(logits, SamplingConfig(greedy=True, repetition_penalty=1.5), seen_BV=seen, seeds=[0, 0], step=0)
    assert chosen.tolist() == [1, 1]


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3])
    count = 20_000
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = draw(probabilities.log().expand(count, 4), uniforms)
    shares = torch.bincount(drawn, minlength=4) / count
    assert torch.allclose(shares, probabilities, atol=1e-4)
    assert shares[1] == 0


def test_the_ends_of_the_unit_interval_draw_possible_tokens():
    logits = torch.full((4, 101), -torch.inf)
    logits[:, 17:60] = torch.randn(43, generator=torch.Generator().manual_seed(1))
    edge = math.nextafter(1.0, 0.0)
    drawn = draw(logits, torch.tensor([0.0, 1e-320, edge, edge], dtype=torch.float64))
    assert drawn.tolist() == [17, 17, 59, 59]


def test_seeds_spread_evenly_and_steps_are_independent():
    logits = torch.tensor([0.7, 0.2, 0.1]).log()
    seeds = list(range(4000))
    config = SamplingConfig()
    first, second = (sample(logits.expand(4000, 3), config, seen_BV=None, seeds=seeds, step=step) for step in (0, 1))
    for drawn in (first, second):
        shares = torch.bincount(drawn, minlength=3) / 4000
        assert torch.allclose(shares, torch.tensor([0.7, 0.2, 0.1]), atol=0.03)
    both_zero = ((first == 0) & (second == 0)).float().mean()
    assert abs(float(both_zero) - 0.49) < 0.03


def test_a_row_does_not_depend_on_its_neighbours():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 50, generator=generator)
    seen = torch.rand(6, 50, generator=generator) < 0.3
    config = SamplingConfig(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.3)
    seeds = [11, 5, 99, 0, 7, 2**63]
    together = sample(logits, config, seen_BV=seen, seeds=seeds, step=4)
    for row in range(6):
        alone = sample(logits[row : row + 1], config, seen_BV=seen[row : row + 1], seeds=[seeds[row]], step=4)
        assert alone[0] == together[row]
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = sample(logits[order], config, seen_BV=seen[order], seeds=[seeds[i] for i in order], step=4)
    assert torch.equal(shuffled, together[order])


def test_temperature_divides_logits_before_the_filters():
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
    # at temperature 0.5 the masses are 36:9:1, so 0.7 is reached by the first token alone
    cold = SamplingConfig(temperature=0.5, top_p=0.7)
    assert {int(sample(logits, cold, seen_BV=None, seeds=[seed], step=0)) for seed in range(60)} == {0}
    warm = SamplingConfig(temperature=1.0, top_p=0.7)
    assert {int(sample(logits, warm, seen_BV=None, seeds=[seed], step=0)) for seed in range(60)} == {0, 1}


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-300])
def test_a_temperature_near_zero_is_greedy_not_nan(temperature):
    logits = torch.randn(8, 30, generator=torch.Generator().manual_seed(0)) * 50
    config = SamplingConfig(temperature=temperature)
    assert torch.equal(sample(logits, config, seen_BV=None, seeds=range(8), step=0), logits.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_sampled_as_their_exact_values(dtype):
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    config = SamplingConfig(temperature=0.7, top_p=0.9)
    low = sample(logits, config, seen_BV=None, seeds=range(4), step=0)
    assert torch.equal(low, sample(logits.float(), config, seen_BV=None, seeds=range(4), step=0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("greedy", [True, False])
def test_logits_that_are_not_finite_name_their_rows(bad, greedy):
    logits = torch.zeros(3, 4)
    logits[1, 2] = bad
    with pytest.raises(FloatingPointError, match=r"rows \[1\]"):
        sample(logits, SamplingConfig(greedy=greedy), seen_BV=None, seeds=[0, 1, 2], step=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0.*greedy"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"greedy": True, "temperature": 0.5, "top_p": 0.9}, "greedy.*ignore temperature, top_p"),
    ],
)
def test_impossible_settings_are_one_clear_error(options, message):
    with pytest.raises(UserError, match=message):
        SamplingConfig(**options)


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="2 seeds for 3 rows"):
        sample(torch.zeros(3, 4), SamplingConfig(), seen_BV=None, seeds=[0, 1], step=0)
    with pytest.raises(ValueError, match="needs seen_BV"):
        sample(torch.zeros(1, 4), SamplingConfig(repetition_penalty=1.2), seen_BV=None, seeds=[0], step=0)
