from __future__ import annotations

import torch

from fusiontree.training.schedule import branch_scale


def test_depends_on_the_row_not_on_its_place_in_the_batch() -> None:
    kind = {"layers": 3, "probability": 0.5, "seed": 1, "step": 7}
    whole = branch_scale([10, 11, 12, 13], **kind)
    assert torch.equal(branch_scale([12, 10], **kind), whole[:, [2, 0]])


def test_rate_and_never_both() -> None:
    scale = branch_scale(list(range(2000)), layers=2, probability=0.3, seed=0, step=1)
    assert (scale.sum(-1) >= 1).all()
    rates = (scale == 0).float().mean((0, 1))
    assert torch.allclose(rates, torch.tensor([0.15, 0.15]), atol=0.02)


def test_steps_differ_and_zero_means_none() -> None:
    kind = {"layers": 2, "probability": 0.5, "seed": 0}
    assert not torch.equal(branch_scale(list(range(50)), step=1, **kind), branch_scale(list(range(50)), step=2, **kind))
    assert branch_scale([1], layers=2, probability=0.0, seed=0, step=1) is None
