"""Permutations, row order and mixture: bijective, keyed, computable anywhere."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontree.data.mixture import ChangingMixture, Mixture, MixturePart, floor_sum
from fusiontree.data.order import Permutation, RowOrder

sizes = st.integers(1, 400)


@given(size=sizes, key=st.integers(0, 2**64 - 1))
@settings(max_examples=30, deadline=None)
def test_a_permutation_meets_every_element_once(size: int, key: int) -> None:
    assert sorted(Permutation(size, key)[i] for i in range(size)) == list(range(size))


def test_keys_give_different_orders() -> None:
    orders = {tuple(Permutation(50, key)[i] for i in range(50)) for key in range(20)}
    assert len(orders) == 20


@given(
    rows=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(sum),
    group_size=st.integers(1, 5),
    shuffle=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_every_row_once_an_epoch(rows: list[int], group_size: int, shuffle: bool, seed: int) -> None:
    order = RowOrder(rows, seed=seed, group_size=group_size, shuffle=shuffle)
    total = sum(rows)
    everything = {(shard, row) for shard, count in enumerate(rows) for row in range(count)}
    for epoch in range(2):
        visited = [order.place(epoch * total + i) for i in range(total)]
        assert {e for e, _ in visited} == {epoch}
        assert {(p.shard, p.row) for _, p in visited} == everything
    # Any place is found without visiting those before it.
    assert RowOrder(rows, seed=seed, group_size=group_size, shuffle=shuffle).place(total + total // 2) == order.place(
        total + total // 2
    )


def test_epochs_and_seeds_differ_and_no_shuffle_keeps_the_order() -> None:
    def first(seed: int, begin: int) -> list[tuple[int, int]]:
        order = RowOrder([20] * 5, seed=seed, group_size=2, shuffle=True)
        return [(p.shard, p.row) for _, p in map(order.place, range(begin, begin + 20))]

    assert first(0, 0) != first(0, 100)
    assert first(0, 0) != first(1, 0)
    plain = RowOrder([3, 2], seed=0, group_size=1, shuffle=False)
    assert [(p.shard, p.row) for _, p in map(plain.place, range(5))] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_groups_are_of_even_size() -> None:
    """A last group of one shard would leave its rows unmixed."""
    order = RowOrder([10] * 9, seed=0, group_size=4, shuffle=True)
    groups = order.shards_from(0)
    assert [len(next(groups)) for _ in range(3)] == [3, 3, 3]


@given(
    rows=st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(sum),
    group_size=st.integers(1, 4),
    shuffle=st.booleans(),
    start=st.integers(0, 150),
)
@settings(max_examples=60, deadline=None)
def test_shards_are_named_in_the_order_rows_need_them(
    rows: list[int], group_size: int, shuffle: bool, start: int
) -> None:
    order = RowOrder(rows, seed=1, group_size=group_size, shuffle=shuffle)
    groups = order.shards_from(start)
    due = [set(next(groups)) for _ in range(6)]
    group = 0
    for index in range(start, start + 60):
        shard = order.place(index)[1].shard
        while shard not in due[group]:
            group += 1
            if group == len(due):
                return
        assert len(due[group]) <= (group_size if shuffle else 1)


def test_threads_may_share_an_order() -> None:
    """Workers read on both sides of the end of an epoch."""
    from concurrent.futures import ThreadPoolExecutor

    order = RowOrder([7, 3, 9, 4], seed=2, group_size=2, shuffle=True)
    indices = [index * 37 % 230 for index in range(2000)]
    alone = [order.place(index) for index in indices]
    shared = RowOrder([7, 3, 9, 4], seed=2, group_size=2, shuffle=True)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(shared.place, indices)) == alone


def test_the_order_never_changes() -> None:
    """A checkpoint names rows by the order's version: if this fails, raise ORDER_VERSION."""
    from fusiontree.data.state import ORDER_VERSION

    order = RowOrder([5, 8, 3, 6], seed=11, group_size=2, shuffle=True)
    places = [(p.shard, p.row) for _, p in map(order.place, [0, 1, 2, 21, 22, 23, 10**9])]
    mixture = Mixture([5, 2, 1], seed=11)
    sources = [mixture.source(row) for row in range(12)]
    assert (ORDER_VERSION, places, sources) == (
        1,
        [(1, 2), (1, 3), (3, 5), (0, 1), (0, 3), (0, 2), (0, 1)],
        [1, 0, 0, 1, 0, 2, 0, 0, 1, 0, 0, 1],
    )


def test_reads_stay_within_a_group() -> None:
    order = RowOrder([10] * 12, seed=3, group_size=3, shuffle=True)
    shards = [order.place(i)[1].shard for i in range(120)]
    assert all(len(set(shards[begin : begin + 30])) == 3 for begin in range(0, 120, 30))


@given(n=st.integers(0, 60), m=st.integers(1, 40), a=st.integers(0, 80), b=st.integers(-60, 60))
def test_floor_sum(n: int, m: int, a: int, b: int) -> None:
    assert floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n))


@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=5), seed=st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_mixture_counts_are_computed_not_replayed(weights: list[float], seed: int) -> None:
    mixture = Mixture(weights, seed)
    counts = [0] * len(weights)
    for row in range(300):
        if row % 37 == 0:
            assert mixture.rows_before(row) == counts
        counts[mixture.source(row)] += 1


@given(
    parts=st.lists(
        st.tuples(st.integers(1, 90), st.lists(st.floats(0.01, 10), min_size=1, max_size=3)), min_size=1, max_size=4
    ),
    seed=st.integers(0, 50),
)
@settings(max_examples=40, deadline=None)
def test_changed_mixtures_count_on(parts: list[tuple[int, list[float]]], seed: int) -> None:
    """Each part has as many sources as the one before or more; a source's rows go on where they ended."""
    given_parts, row, weights = [], 0, [1.0]
    for length, further in parts:
        weights = [w + 0.5 for w in weights] + further[: len(further) - 1]
        given_parts.append(MixturePart(row, weights))
        row += length
    mixture = ChangingMixture(given_parts, seed)
    counts = [0] * len(weights)
    for number in range(row + 40):
        assert mixture.rows_before(number) == counts
        part = [p for p in given_parts if p.row <= number][-1]
        assert mixture.source(number) == Mixture(part.weights, seed).source(number)
        counts[mixture.source(number)] += 1


def test_mixture_is_even_at_every_scale() -> None:
    mixture = Mixture([7, 2, 1], seed=0)
    for rows in (100, 10_000, 10**12):
        shares = [count / rows for count in mixture.rows_before(rows)]
        assert shares == pytest.approx([0.7, 0.2, 0.1], abs=4 / rows)
