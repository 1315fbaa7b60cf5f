"""Engine ``ddp``: parameters whole on every rank, gradients and optimizer state cut over the ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusiontree.engines.parameters import flat_buffer
from fusiontree.engines.parameters.flat_slice import ALIGNMENT
from fusiontree.engines.parameters.replicated import ReplicatedParameters
from fusiontree.optim.config import OPTIMIZERS
from fusiontree.parallel.collectives import ALL_GATHER, REDUCE_SCATTER
from fusiontree.parallel.layout import Layout
from fusiontree.parallel.shard_groups import DistributedModel, ShardGroup
from tests.engines.test_local import train
from tests.parallel.launch import run_ranks

pytestmark = [pytest.mark.xdist_group("replicated")]


class Two(nn.Module):
    """Two parameters, each of which a forward pass may use."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, 1 + 2**-12]))  # bf16 does not know the second
        self.b = nn.Parameter(torch.full((3, 2), 2.0))

    def forward(self, a: float, b: float | None) -> Tensor:
        loss = a * self.a.sum()
        return loss if b is None else loss + b * self.b.sum()


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Elements of each call of a collective."""
    sent: list[int] = []
    collective: Any = getattr(flat_buffer.dist, name)

    def call(out: Tensor, given: Tensor, **kwargs: Any) -> Any:
        sent.append(max(out.numel(), given.numel()))
        return collective(out, given, **kwargs)

    monkeypatch.setattr(flat_buffer.dist, name, call)
    return sent


def test_passes_add_up_in_fp32_and_a_given_up_step_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gathers, reductions = counted(monkeypatch, ALL_GATHER), counted(monkeypatch, REDUCE_SCATTER)
    model = Two()
    with Layout("cpu") as layout:
        distributed: Any = DistributedModel(model, {})  # type: ignore[arg-type]
        replicated = ReplicatedParameters(distributed, lambda name, parameter: name == "b", OPTIMIZERS.get("adamw"))
        block, mesh = ShardGroup((model,), ("two",)), layout.parameter_mesh(False)
        replicated.take(block, dict(model.named_parameters()), torch.bfloat16, mesh, block)
        replicated._build(list(replicated._collected))
        replicated._in_order([model])
        (group,) = replicated.buffers
        assert [part.name for part in group.slices] == ["b", "a"]  # what decays comes first
        assert [leaf.numel() for leaf in group.leaves] == [ALIGNMENT, ALIGNMENT]
        size = 2 * ALIGNMENT

        def run(a: float, b: float | None, last: bool) -> None:
            replicated.begin()
            loss = model(a, b)
            replicated.begin_backward(last)
            loss.backward()

        def found() -> dict[str, list[float]]:
            replicated.wait_gradients()
            (gradient,) = replicated.gradients()
            assert gradient.dtype == torch.float32
            # The gaps are counted by the norm.
            assert float(gradient.abs().sum()) == sum(float(p.of(gradient).abs().sum()) for p in group.slices)
            return {part.name: part.of(gradient).tolist() for part in group.slices}

        run(256.0, None, last=False)  # the first pass has no gradient of b
        replicated.end_backward()
        run(1.0, 3.0, last=False)
        replicated.end_backward()
        assert not reductions
        run(1.0, 1.0, last=True)
        assert reductions == [size]  # with the last gradient, not with the pass's end
        replicated.end_backward()
        assert (gathers, reductions) == ([size], [size])
        assert found() == {"a": [258.0] * 2, "b": [4.0] * 6}
        replicated.discard()
        assert not replicated.gradients()

        # The masters keep what the model's type does not know, and whoever changes them is heard in the next step.
        assert [part.of(group.master).tolist() for part in group.slices if part.name == "a"] == [[1.0, 1 + 2**-12]]
        group.master.add_(0.5)
        run(5.0, None, last=True)  # given up before the pass is over
        assert model.a.tolist() == [1.5, 1.5] and model.b.tolist() == [[2.5] * 2] * 3
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        replicated.discard()
        assert not replicated.gradients()
        run(0.0, 7.0, last=True)
        replicated.end_backward()
        assert found() == {"a": [0.0] * 2, "b": [7.0] * 6}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("precision", "rtol"), [("fp32", 2e-6), ("bf16", 2e-3)])
def test_equals_parameters_of_ones_own(precision: str, rtol: float, tied: bool) -> None:
    seen, state = train(False, precision, tied, poison=True, engine_name="ddp")
    want, wanted_state = train(True, precision, tied, poison=True)
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(want), rtol=rtol, atol=0)
    assert state.keys() == wanted_state.keys()
    for name, tensor in state.items():
        distance = (tensor - wanted_state[name]).norm() / wanted_state[name].norm().clamp(min=1e-6)
        assert distance < (2e-2 if precision == "bf16" else 1e-4), f"{name}: {distance:.1e}"


@pytest.mark.timeout(600)
def test_two_ranks_hold_and_move_what_they_should(tmp_path: Path) -> None:
    run_ranks(["-m", "tests.engines.replica_worker", str(tmp_path / "found")], 2, tmp_path, timeout=500)
    for rank in range(2):
        found = json.loads((tmp_path / f"found.{rank}").read_text())
        # fp32 masters and moments of half the parameters; gaps between parameters are all that is more.
        assert found["state"] == pytest.approx(12 * found["parameters"] / 2, rel=0.02)
        assert found["cover"] == found["parameters"]
        # A step of two passes, and a validation between steps that brings the masters for the next step too.
        moved = {"reduce_scatter": found["groups"], "all_gather": found["groups"]}
        assert found["first step"] == moved
        assert found["validation"] == {"all_gather": found["groups"]}
        assert found["step after validation"] == {"reduce_scatter": found["groups"]}
        assert found["equal"] == [] and found["changed"] == [
            "embed.weight differs on ranks 0, 1, and no majority tells which is right"
        ]
        assert found["brought anew"] == []
