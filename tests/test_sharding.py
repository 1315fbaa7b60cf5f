"""Every slow test is in exactly one shard, and stays there."""

from __future__ import annotations

import pytest

from tests.sharding import SHARDS, parse_shard, shard_of


def test_a_shard_depends_on_the_id_alone() -> None:
    assert [shard_of(f"tests/a.py::test[{n}]") for n in range(8)] == [1, 0, 3, 2, 1, 0, 3, 2]
    assert {shard_of(f"tests/a.py::test[{n}]", 3) for n in range(20)} == {0, 1, 2}


@pytest.mark.parametrize("text", ["4/4", "1", "a/4", "-1/4", "1/", "/4", "1/4/2"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write K/N with K from 0 to N-1"):
        parse_shard(text)


def test_ci_names_each_shard_in_turn() -> None:
    assert [parse_shard(f"{commits % SHARDS}/{SHARDS}") for commits in range(229, 233)] == [
        (1, SHARDS), (2, SHARDS), (3, SHARDS), (0, SHARDS),
    ]  # fmt: skip
