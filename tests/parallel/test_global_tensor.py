"""A rank's part of a parameter, named by its place in the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from fusiontree.parallel.global_tensor import GlobalTensor, ShardSpec

WHOLE = torch.arange(12 * 6, dtype=torch.float32).view(12, 6)
SPECS = [
    ShardSpec((12, 6)),
    ShardSpec((12, 6), 0, ((0, 3), (8, 10))),
    ShardSpec((12, 6), 1, ((1, 2), (4, 6))),
    ShardSpec((12,), 0, ((2, 5), (9, 12))),
    ShardSpec((12,)),
]


@pytest.mark.parametrize("spec", SPECS)
def test_every_flat_range_lands_where_it_came_from(spec: ShardSpec) -> None:
    whole = WHOLE if len(spec.global_shape) == 2 else WHOLE[:, 0].contiguous()
    flat = spec.cut(whole).reshape(-1)
    assert spec.cut(whole).shape == spec.local_shape
    for start in range(flat.numel()):
        for stop in range(start, flat.numel() + 1):
            count = 0
            for offset, view in spec.pieces(flat[start:stop], start):
                there = tuple(slice(o, o + n) for o, n in zip(offset, view.shape, strict=True))
                assert torch.equal(whole[there], view)
                assert view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
                count += view.numel()
            assert count == stop - start


def test_dcp_saves_and_fills_rectangles(tmp_path: Path) -> None:
    """Saved by an uneven flat cut of a block-wise tp cut, loaded whole and by another cut."""
    ranges = [((0, 3), (6, 9)), ((3, 6), (9, 12))]
    specs = [ShardSpec((12, 6), 0, r) for r in ranges]
    pieces = []
    for spec in specs:
        flat = spec.cut(WHOLE).reshape(-1)
        pieces += spec.pieces(flat[:17], 0) + spec.pieces(flat[17:], 17)
    dcp.save({"w": GlobalTensor((12, 6), pieces, torch.float32)}, checkpoint_id=tmp_path, no_dist=True)
    whole = {"w": torch.zeros(12, 6)}
    dcp.load(whole, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(whole["w"], WHOLE)
    other = ShardSpec((12, 6), 1, ((0, 1), (3, 5)))
    target = torch.zeros(other.local_shape)
    dcp.load(
        {"w": GlobalTensor((12, 6), other.pieces(target.view(-1)), torch.float32)}, checkpoint_id=tmp_path, no_dist=True
    )
    assert torch.equal(target, other.cut(WHOLE))
