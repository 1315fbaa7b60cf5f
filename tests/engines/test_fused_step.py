"""Training with the optimizer's fused step, here on the CPU by its formula, equals training with the ordinary step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusiontree.checkpoint.save_plan import pieces_of
from fusiontree.engines import torch_engine
from fusiontree.engines.build import build_engine
from fusiontree.engines.torch_engine import TorchEngine
from fusiontree.optim import build as optim_build
from fusiontree.optim.adamw import FusedAdamW
from fusiontree.parallel.config import ParallelConfig
from fusiontree.parallel.layout import Layout
from fusiontree.training.config import TrainingConfig
from fusiontree.training.losses import GlobalCounts
from fusiontree.training.passes import EagerPasses
from fusiontree.training.recorded_passes import RecordedPasses
from tests.engines.test_local import whole
from tests.helpers import tiny_config
from tests.models.recording import pretend_gpu
from tests.training.test_recorded_passes import WEIGHTS, pass_inputs

TRAINING = {"seq_len": 16, "max_steps": 3, "global_batch_size": 2, "max_grad_norm": 0.5, "optimizer": {"eps": 1e-3}}
POISONED, WRITTEN, LOADED = 3, 4, 5
"""Steps: one with a gradient that is not finite, one before which the parameters are written to, and one before which
a state is loaded through tensors that were taken long before."""


def make(layout: Layout, precision: str, *, fused: bool, own: bool = True, engine: Any = "ddp") -> TorchEngine:
    training = TrainingConfig.model_validate(TRAINING | {"precision": precision})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_engine, "is_local", lambda mesh: own)
        if fused:
            patch.setattr(optim_build, "fuses", lambda device: True)
        built = build_engine(tiny_config(), ParallelConfig(engine=engine), training, layout)
    assert isinstance(built, TorchEngine)
    return built


def train(engine: TorchEngine, passes: Any, micro_batches: int) -> tuple[list[Any], dict[str, Tensor]]:
    """Losses, norms and states of six steps."""
    seen: list[Any] = []
    for step in range(6):
        if step == WRITTEN:
            taken = engine.state_tensors()
        if step in (WRITTEN, LOADED):
            for name, tensor in taken.items():
                for _, piece in pieces_of(tensor):
                    piece.mul_(0.5 if name.startswith("model.") else 1.0)
        if step == LOADED:
            engine.load_state_dict(engine.state_dict())
        for number in range(micro_batches):
            last = number + 1 == micro_batches
            inputs = pass_inputs([[0, 3, 9], [0]], seed=10 * step + number, number=number, last=last)
            if step == POISONED and last:
                inputs = inputs._replace(counts=GlobalCounts(torch.tensor(torch.nan), torch.tensor(2.0)))
            done = passes.forward(inputs)
            passes.backward(inputs, done)
            seen.append(0.0 if step == POISONED else float(done.lm))
        result = passes.step(1e-2)
        seen.append(0.0 if result.skipped else result.grad_norm)
        seen.append(result.skipped is not None)
        if step == 2:
            seen.append(float(engine.evaluate(inputs.micro)))
    seen.append(engine.state_dict()["optimizer_step"])
    return seen, {name: whole(tensor) for name, tensor in engine.state_tensors().items()}


def eager(precision: str, micro_batches: int, *, fused: bool, own: bool) -> tuple[list[Any], dict[str, Tensor]]:
    with Layout("cpu") as layout:
        engine = make(layout, precision, fused=fused, own=own)
        assert isinstance(engine._fused, FusedAdamW) is fused
        return train(engine, EagerPasses(engine, WEIGHTS), micro_batches)


def agree(found: tuple[list[Any], dict[str, Tensor]], want: tuple[list[Any], dict[str, Tensor]], rtol: float) -> None:
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(want[0]), rtol=rtol, atol=0)
    assert found[1].keys() == want[1].keys()
    for name, tensor in found[1].items():
        distance = (tensor - want[1][name]).norm() / want[1][name].norm().clamp(min=1e-6)
        assert distance < 10 * rtol, f"{name}: {distance:.1e}"


@pytest.mark.parametrize(
    ("precision", "micro_batches", "own", "rtol"),
    [
        ("fp32", 1, True, 1e-5),
        ("bf16", 1, True, 1e-3),
        ("bf16", 2, True, 1e-3),
        ("bf16", 3, False, 1e-3),
        ("fp16", 1, True, 1e-3),
        ("fp32", 1, False, 1e-5),
    ],
)
def test_steps_are_those_of_the_ordinary_optimizer(precision: str, micro_batches: int, own: bool, rtol: float) -> None:
    """With a skipped step, an evaluation between steps, and parameters loaded in the middle."""
    found, want = (eager(precision, micro_batches, fused=fused, own=own) for fused in (True, False))
    assert any(value is True for value in want[0])
    agree(found, want, rtol)


@pytest.mark.parametrize(("precision", "micro_batches"), [("bf16", 1), ("fp16", 3)])
def test_recorded_steps_are_those_of_eager_ones(
    precision: str, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; parameters that are loaded between recorded steps reach the recorded passes."""
    want = eager(precision, micro_batches, fused=True, own=True)
    prepared: list[int] = []
    monkeypatch.setattr(FusedAdamW, "prepare", lambda self, gradients: prepared.append(len(gradients)))
    graphs = pretend_gpu(monkeypatch, reads=True)
    with Layout("cpu") as layout:
        engine = make(layout, precision, fused=True)
        engine.records_step = True
        for group in engine.optimizer.param_groups:
            group["lr"] = engine._rate
        passes = RecordedPasses(engine, WEIGHTS, EagerPasses(engine, WEIGHTS), required=True)
        found = train(engine, passes, micro_batches)
        assert prepared == [len(engine.optimizer.state)]
    assert len(graphs) == 2 * micro_batches + 1
    assert found[0] == want[0]
    assert all(map(torch.equal, found[1].values(), want[1].values()))


def test_gradients_of_one_micro_batch_are_not_copied() -> None:
    with Layout("cpu") as layout:
        engine = make(layout, "bf16", fused=True)
        seen: list[set[torch.dtype]] = []
        apply: Any = engine._fused

        def noted(gradients: list[Tensor], *more: Tensor) -> None:
            seen.append({gradient.dtype for gradient in gradients})
            apply(gradients, *more)

        engine._fused = noted  # type: ignore[assignment]
        for micro_batches in (1, 2):
            for number in range(micro_batches):
                inputs = pass_inputs([[0], [0]], seed=number, number=number, last=number + 1 == micro_batches)
                loss = engine.forward(inputs.micro).loss_sum
                assert loss is not None
                engine.backward(loss, last=inputs.last)
            engine.step(1e-3)
        assert all(tensor.grad is None for group in engine.optimizer.param_groups for tensor in group["params"])
    assert seen == [{torch.bfloat16, torch.float32}, {torch.float32}]  # decay parameters are fp32


def test_sharded_parameters_keep_the_ordinary_step() -> None:
    with Layout("cpu") as layout:
        assert make(layout, "bf16", fused=True, own=False, engine="fsdp2")._fused is None
        assert make(layout, "bf16", fused=True, own=True, engine="fsdp2")._fused is not None
