"""What the seed, the source and a row's place decide: order of rows, mixture, and the hash of a step."""

from __future__ import annotations

from pathlib import Path

from fusiontree.data.batch import RowsOfStep
from fusiontree.data.config import DataConfig
from fusiontree.data.mixture import Mixture
from fusiontree.data.order import RowPlace
from fusiontree.data.rows import WantedRow, read_rows
from tests.data.batches import open_data
from tests.data.datasets import random_dataset, row_reader


def test_seeds_mix_the_sources_in_other_orders() -> None:
    orders = {tuple(Mixture([1.0, 1.0], seed).source(row) for row in range(4096)) for seed in range(8)}
    assert len(orders) == 8


def test_sources_of_equal_size_are_shuffled_in_other_orders(tmp_path: Path) -> None:
    paths = [str(random_dataset(tmp_path / name)) for name in "ab"]
    data = open_data(DataConfig.model_validate({"train": [{"path": path, "weight": 1.0} for path in paths]}))
    first, second = ([order.place(index) for index in range(20)] for order in data.orders)
    assert sorted(data.orders[0].rows) == sorted(data.orders[1].rows)
    assert first != second
    for source in data.sources:
        source.close()


def test_the_hash_of_a_step_knows_the_place_of_each_row(tmp_path: Path) -> None:
    reader = row_reader(random_dataset(tmp_path / "d", shards=1), 16)

    def step_hash(places: list[int], sources: tuple[int, int] = (0, 0)) -> int:
        wanted = [
            WantedRow(n, n, source, RowPlace(0, row))
            for n, (source, row) in enumerate(zip(sources, places, strict=True))
        ]
        return read_rows(RowsOfStep(2, 16, 16), wanted, [reader, reader], "stop")[1]

    assert step_hash([0, 1]) == step_hash([0, 1])
    assert len({step_hash([0, 1]), step_hash([1, 0]), step_hash([0, 2]), step_hash([0, 1], (0, 1))}) == 4
    reader.source.close()
