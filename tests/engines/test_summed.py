"""Gradients that arrive in any number, in several passes, of steps that may be given up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fusiontree.engines import summed
from fusiontree.engines.summed import SummedGradients
from fusiontree.parallel.layout import Layout


def test_passes_add_up_in_fp32_and_a_given_up_step_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    reduce: Any = dist.all_reduce

    def all_reduce(buffer: torch.Tensor, **kwargs: object) -> object:
        sent.append(buffer.numel())
        return reduce(buffer, **kwargs)

    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3, 2))
    with Layout("cpu") as layout:
        sums = SummedGradients(layout.world_group)
        for master in (a, b):
            sums.include(master)
        monkeypatch.setattr(summed.dist, "all_reduce", all_reduce)

        def arrive(master: nn.Parameter, value: float, last: bool) -> None:
            sums.arrive(master, torch.full_like(master, value, dtype=torch.bfloat16), last)

        arrive(a, 256.0, last=False)  # the first pass has no gradient of b
        sums.end_pass(last=False)
        arrive(b, 3.0, last=False)
        arrive(a, 1.0, last=False)
        sums.end_pass(last=False)
        assert not sent
        arrive(a, 1.0, last=True)
        arrive(b, 1.0, last=True)
        assert sent == [8]  # with the last gradient, not with the pass's end
        sums.end_pass(last=True)
        assert sent == [8]
        found = sums.wait()
        assert {g.dtype for g in found.values()} == {torch.float32}
        assert found[a].tolist() == [258.0] * 2 and found[b].tolist() == [[4.0] * 2] * 3
        sums.discard()

        arrive(a, 5.0, last=True)  # given up before the pass is over
        sums.discard()
        assert not sums.wait()
        arrive(b, 7.0, last=True)
        sums.end_pass(last=True)  # a gradient that never comes is zero
        found = sums.wait()
        assert found[a].tolist() == [0.0] * 2 and found[b].tolist() == [[7.0] * 2] * 3
