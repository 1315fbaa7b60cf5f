"""Rectangles of a tensor that overlap or lie outside are damage, as is a length that no file has."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from fusiontree.checkpoint.cover import Place, first_overlap
from fusiontree.checkpoint.manifest import CheckpointDamage
from fusiontree.checkpoint.metadata import Chunk, SavedTensor, _check_place
from fusiontree.checkpoint.reader import CheckpointReader
from tests.helpers import save_checkpoint


def by_definition(places: list[Place]) -> bool:
    """Whether two of the rectangles hold the same element."""
    taken = torch.zeros(8, 8, dtype=torch.int64)
    for (row, column), (rows, columns) in places:
        taken[row : row + rows, column : column + columns] += 1
    return bool((taken > 1).any())


def test_overlaps_are_those_of_the_definition():
    rng = random.Random(3)
    found = 0
    for _ in range(400):
        places: list[Place] = []
        for _ in range(rng.randint(1, 4)):
            offset = rng.randrange(8), rng.randrange(8)
            places.append((offset, (rng.randint(1, 4), rng.randint(1, 4))))
        inside = [((r, c), (min(h, 8 - r), min(w, 8 - c))) for (r, c), (h, w) in places]
        assert (first_overlap(inside) is not None) == by_definition(inside)
        found += by_definition(inside)
    assert 50 < found < 350
    assert first_overlap([((), ()), ((), ())]) == (0, 1)


def test_a_grid_of_many_rectangles_is_checked_at_once():
    grid: list[Place] = [((4 * row, 4 * column), (4, 4)) for row in range(64) for column in range(64)]
    assert first_overlap(grid) is None
    assert first_overlap([*grid, ((255, 255), (1, 1))]) is not None


@pytest.fixture
def reader(tmp_path: Path) -> CheckpointReader:
    save_checkpoint(tmp_path, 1, {"model.w": torch.arange(12.0).view(6, 2)}, {"config": {}}, [])
    return CheckpointReader(next(tmp_path.iterdir()))


def test_pieces_that_overlap_are_damage(reader: CheckpointReader):
    (chunk,) = reader.tensors["model.w"].chunks
    half = Chunk((0, 0), (3, 2), chunk.file, chunk.start, chunk.length)
    for other in ((1, 0), (0, 0), (2, 0)):
        # As many values as the tensor has, and rows that nothing fills.
        pieces = (half, Chunk(other, (3, 2), chunk.file, chunk.start + 1, chunk.length - 1))
        reader.tensors["model.w"] = SavedTensor((6, 2), torch.float32, pieces)
        with pytest.raises(CheckpointDamage, match="overlap"):
            reader.fill({"model.w": torch.empty(6, 2)})


def test_values_that_no_piece_holds_are_damage(reader: CheckpointReader):
    (chunk,) = reader.tensors["model.w"].chunks
    half = Chunk((3, 0), (3, 2), chunk.file, chunk.start, chunk.length)
    reader.tensors["model.w"] = SavedTensor((6, 2), torch.float32, (half,))
    with pytest.raises(CheckpointDamage, match=r"holds only 6 of 12 values of 'model\.w'"):
        reader.fill({"model.w": torch.empty(6, 2)})


@pytest.mark.parametrize("length", [1 << 62, 1 << 40, 1 << 20])
def test_a_piece_of_absurd_length_is_damage(reader: CheckpointReader, length: int):
    (chunk,) = reader.tensors["model.w"].chunks
    longer = Chunk(chunk.offset, chunk.shape, chunk.file, chunk.start, length)
    reader.tensors["model.w"] = SavedTensor((6, 2), torch.float32, (longer,))
    with pytest.raises(CheckpointDamage, match="ends at byte"):
        reader.fill({"model.w": torch.empty(6, 2)})


@pytest.mark.parametrize(
    ("offset", "shape", "start", "length"),
    [
        ((4, 0), (3, 2), 0, 9),
        ((-1, 0), (3, 2), 0, 9),
        ((0,), (6,), 0, 9),
        ((0, 0), (6, 2), -1, 9),
        ((0, 0), (6, 2), 0, -9),
    ],
)
def test_pieces_that_no_tensor_has_are_refused(offset: tuple, shape: tuple, start: int, length: int):
    place = Chunk(offset, shape, "f", start, length)
    place_in_file = type("Place", (), {"offset": place.start, "length": place.length})
    with pytest.raises(ValueError, match="is no part of a tensor"):
        _check_place(offset, shape, (6, 2), place_in_file)
