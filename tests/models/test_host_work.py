"""Host work per block, forward and backward: it must not grow, as small models and sharded rows wait for the host.

A test that fails because the work grew shows what is new; if the growth is worth it, record the new numbers here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fusiontree.ops.documents import Documents
from fusiontree.parallel.activation_checkpointing import checkpoint_activations, fuse_projections
from tests.helpers import tiny_model
from tests.models.host_work import HostWork, count_kernels_as_calls


class PerBlock(NamedTuple):
    """Recorded work of a fused block."""

    launches: int
    """Operations that return new values, and calls of kernels."""
    views: int
    own_calls: int
    """Calls of FusionTree's Python functions."""
    torch_calls: int
    """Calls of torch's Python functions (torch 2.13)."""


RECORDED = {
    "none": PerBlock(launches=96, views=163, own_calls=126, torch_calls=582),
    "selective": PerBlock(launches=101, views=216, own_calls=297, torch_calls=652),
}


def work_of(layers: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> HostWork:
    """Work of a training pass of a model of ``layers`` fused layers on packed rows."""
    model = tiny_model(layer_pattern="F" * layers)
    checkpoint_activations(model, mode)
    fuse_projections(model)
    generator = torch.Generator().manual_seed(0)
    ids_BS, labels_BS = (torch.randint(0, 64, (2, 24), generator=generator) for _ in range(2))
    documents = Documents.from_positions(torch.cat([torch.arange(10), torch.arange(14)]).expand(2, 24).contiguous())

    def train() -> None:
        model.zero_grad()
        output = model(ids_BS, labels_BS=labels_BS, documents=documents)
        sums = output.layer_sums.sums_LB
        (output.loss_sum + sums["gate"].sum() + sums["entropy"].sum()).backward()  # as the training loss

    work = HostWork()
    with monkeypatch.context() as patch:
        count_kernels_as_calls(work, patch)
        for _ in range(2):  # the first pass chooses backends and imports them
            work.reset()
            with work.counted_calls():
                train()
            work.operations.clear()
            with work:
                train()
    return work


def count(mode: str) -> dict[str, dict[str, int]]:
    """Return a block's counts by kind and name: what a model of three layers does more than one of two."""
    with pytest.MonkeyPatch.context() as patch:
        two, three = (work_of(layers, mode, patch) for layers in (2, 3))
    kinds = ("operations", "views", "own_calls")
    found = {kind: dict(Counter(getattr(three, kind)) - Counter(getattr(two, kind))) for kind in kinds}
    return {**found, "torch_calls": {"": three.torch_calls - two.torch_calls}}


@pytest.mark.parametrize("mode", RECORDED)
def test_the_work_per_block_does_not_grow(mode: str) -> None:
    """In a process of its own: packages that other tests import replace functions of torch."""
    code = f"import json, tests.models.test_host_work as test; print(json.dumps(test.count({mode!r})))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    counts = json.loads(run.stdout.splitlines()[-1])
    launches, views, own, torch_calls = (Counter(counts[kind]) for kind in counts)
    found = PerBlock(launches.total(), views.total(), own.total(), torch_calls.total())
    recorded = RECORDED[mode]
    assert found.launches <= recorded.launches, _listed(launches)
    assert found.own_calls <= 1.03 * recorded.own_calls, _listed(own)
    if torch.__version__.startswith("2.13"):  # another version may divide an operation into other views and calls
        assert found.views <= recorded.views, _listed(views)
        assert found.torch_calls <= 1.03 * recorded.torch_calls
    # Numbers far above the truth would let the work grow unseen.
    assert all(now >= 0.9 * then for now, then in zip(found, recorded, strict=True)), f"record {found}"


def _listed(counts: Counter[str]) -> str:
    return "\n".join(f"{count:4} {name}" for name, count in counts.most_common())
