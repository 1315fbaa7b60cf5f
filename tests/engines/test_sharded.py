"""Sharded parameters on one process: what a recorded pass needs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from fusiontree.engines.parameters.sharded import ShardedParameters
from fusiontree.parallel.layout import Layout


@pytest.mark.parametrize("capturing", [True, False])
def test_gathers_of_a_recorded_backward_pass_come_after_its_start(
    monkeypatch: pytest.MonkeyPatch, capturing: bool
) -> None:
    waits: list[tuple[str, str]] = []
    names = ("all_gather_copy_in_stream", "all_gather_stream")
    streams = {
        name: SimpleNamespace(wait_stream=lambda other, name=name: waits.append((name, other))) for name in names
    }
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the recording")
    placement: Any = object.__new__(ShardedParameters)
    with Layout("cpu") as layout:
        placement._root = fully_shard(nn.Linear(2, 2), mesh=layout.parameter_mesh(shard=True))
        monkeypatch.setattr(placement._root._get_fsdp_state(), "_comm_ctx", SimpleNamespace(**streams))
        placement._gloo = False
        placement.begin_backward(last=True)
    assert waits == ([(name, "the recording") for name in names] if capturing else [])
