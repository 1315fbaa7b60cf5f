"""Weights that change on resume, and datasets that are added: an exact continuation, or a refusal by name."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from fusiontree.data.config import DataConfig
from fusiontree.utils.errors import UserError
from tests.data.batches import global_batches, open_data
from tests.data.datasets import random_dataset

Rows = list[tuple[int, bytes]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    base = tmp_path_factory.mktemp("datasets")
    return [str(random_dataset(base / name, shards=2, seed=seed)) for seed, name in enumerate("abc")]


def mixed(folders: list[str], *weights: float) -> DataConfig:
    sources = [{"path": path, "weight": weight} for path, weight in zip(folders, weights, strict=False)]
    return DataConfig.model_validate({"train": sources, "num_workers": 0})


def rows(config: DataConfig, state: Any, steps: int, **kind: Any) -> tuple[Rows, dict[str, Any]]:
    """Return source and tokens of every row of some steps, and the state after them."""
    found: Rows = []
    after: dict[str, Any] = {}
    for batch, state_after in itertools.islice(open_data(config, **kind).steps(state), steps):
        after = state_after
        for micro in batch.micro_batches:
            tokens = [row.numpy().tobytes() for row in micro.input_ids_BS]
            found += zip(micro.sources_B.tolist(), tokens, strict=True)
    return found, after


def of_source(found: Rows, source: int) -> list[bytes]:
    return [tokens for number, tokens in found if number == source]


@pytest.mark.parametrize("weights", [(1.0, 9.0), (3.0, 1.0, 2.0), (0.5, 0.5)])
def test_every_source_goes_on_behind_its_rows(folders: list[str], weights: tuple[float, ...]) -> None:
    first, state = rows(mixed(folders, 3.0, 1.0), None, 7)
    then, after = rows(mixed(folders, *weights), state, 9)
    again, _ = rows(mixed(folders, *weights), after, 6)
    assert state.keys() == {*("step", "row", "number", "skipped_rows", "fingerprint", "order", "sources")}
    assert after["mixture"] == [[0, [3.0, 1.0]], [42, list(weights)]]
    whole = first + then + again
    shares = [len(of_source(then + again, source)) / 90 for source in range(len(weights))]
    assert shares == pytest.approx([weight / sum(weights) for weight in weights], abs=0.05)
    for source, weight in enumerate(weights):  # alone with that source's order, in any mixture: the same rows
        alone, _ = rows(mixed(folders, *(1000.0 if n == source else 1e-6 for n in range(len(weights)))), None, 40)
        got = of_source(whole, source)
        assert got == of_source(alone, source)[: len(got)], (source, weight)


def test_ranks_stops_and_workers_do_not_change_a_changed_mixture(folders: list[str]) -> None:
    _, state = global_batches(mixed(folders, 3.0, 1.0), 5)
    later = mixed(folders, 1.0, 1.0, 1.0)
    wanted, _ = global_batches(later, 12, state=state)
    assert global_batches(later, 12, 3, state=state)[0] == wanted
    threaded = later.model_copy(update={"num_workers": 3})
    head, middle = global_batches(threaded, 5, 2, state=state)
    assert head + global_batches(later, 7, state=middle)[0] == wanted


def test_a_change_that_is_undone_before_a_step_leaves_no_trace(folders: list[str]) -> None:
    config = mixed(folders, 3.0, 1.0)
    _, state = rows(config, None, 4)
    wanted = rows(config, state, 4)
    _, changed = rows(mixed(folders, 1.0, 1.0), state, 3)
    assert [part[0] for part in changed["mixture"]] == [0, 24]
    unused = {**changed, "row": 24, "step": 4, "number": 24}  # nothing was read in the new mixture
    assert rows(config, unused, 4) == wanted
    _, thrice = rows(mixed(folders, 2.0, 1.0), unused, 1)
    assert thrice["mixture"] == [[0, [3.0, 1.0]], [24, [2.0, 1.0]]]


def test_a_single_dataset_becomes_one_of_two(folders: list[str]) -> None:
    alone = DataConfig(train=folders[0], num_workers=0)
    first, state = rows(alone, None, 3)
    then, after = rows(mixed(folders, 1.0, 1.0), state, 6)
    assert after["mixture"] == [[0, [1.0]], [18, [1.0, 1.0]]]
    got = of_source(first + then, 0)
    assert got == of_source(rows(alone, None, 9)[0], 0)[: len(got)]
    assert len(got) == pytest.approx(18 + 18, abs=1)


def test_the_weight_of_a_single_dataset_means_nothing(folders: list[str]) -> None:
    _, state = rows(DataConfig(train=folders[0], num_workers=0), None, 3)
    assert "mixture" not in rows(mixed(folders, 7.0), state, 2)[1]


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ([1, 0], "dataset 0 .* is another dataset"),
        ([0], "data.train had 2 datasets and has 1"),
        ([0, 2], "dataset 1 .* is another dataset"),
        ([2, 0, 1], "dataset 2 .* with weight 1.0 is new"),
    ],
)
def test_other_changes_are_refused_and_name_the_way_out(folders: list[str], order: list[int], words: str) -> None:
    _, state = rows(mixed(folders, 3.0, 1.0), None, 2)
    config = mixed([folders[index] for index in order], *[1.0] * len(order))
    with pytest.raises(UserError, match=words) as refused:
        rows(config, state, 1)
    assert "checkpoint.init_from=RUN" in str(refused.value)
    with pytest.raises(UserError, match=r"training\.seed was 3 and is 4.*init_from"):
        rows(mixed(folders, 1.0, 1.0), state, 1, seed=4)
