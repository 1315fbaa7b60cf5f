"""FP8 products under every engine: the same losses, casts that follow the weights, checkpoints of either precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusiontree.engines import build, torch_engine
from fusiontree.models.mixers.base import Fp32Parameters
from fusiontree.ops.fp8.linear import Fp8Linear
from fusiontree.parallel.config import ParallelConfig
from fusiontree.parallel.layout import Layout
from fusiontree.training.config import TrainingConfig
from tests.engines.batches import micro_batch
from tests.engines.test_every_engine import CASES
from tests.engines.test_local import whole
from tests.helpers import tiny_config

pytestmark = [pytest.mark.xdist_group("zero")]

TRAINING = {"seq_len": 16, "max_steps": 3, "global_batch_size": 2, "micro_batch_size": 1, "precision": "bf16"}


def ids(seed: int) -> torch.Tensor:
    return torch.randint(0, 64, (1, 16), generator=torch.Generator().manual_seed(seed))


def train(case: tuple[str, bool], **training: Any) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    """Three steps of two micro-batches at a high rate, with an evaluation after each; all values and the parameters."""
    settings = TrainingConfig.model_validate(TRAINING | {"matmul_precision": "fp8"} | training)
    parallel: Any = ParallelConfig(engine=case[0])
    with Layout("cpu") as layout, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_engine, "is_local", lambda mesh: not case[1])
        engine = build.build_engine(tiny_config(), parallel, settings, layout)
        values = []
        for step in range(3):
            for number in range(2):
                loss = engine.forward(micro_batch(ids(2 * step + number))).loss_sum
                assert loss is not None
                values.append(float(loss.detach()))
                engine.backward(loss / 32, last=number == 1)
            values += [engine.step(0.02).grad_norm, float(engine.evaluate(micro_batch(ids(9))))]
        state = engine.state_tensors().items()
        return values, {name: whole(tensor) for name, tensor in state if name.startswith("model.")}, engine


def near(expected: list[float], losses: float, norms: float) -> Any:
    """Approximately the values of :func:`train`: the high rate lets roundings grow, most of all in gradient norms."""
    norms_of = (index % 4 == 2 for index in range(len(expected)))
    return [pytest.approx(value, rel=norms if norm else losses) for value, norm in zip(expected, norms_of, strict=True)]


@pytest.fixture(scope="module")
def without_kept_casts() -> list[float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_engine, "keep_casts", lambda model, in_place: [])
        return train(("ddp", False))[0]


def _cases() -> list[Any]:
    """Return the cases; the stages of ZeRO that cast parameters alike are one fast test."""
    marks = {"zero2": [pytest.mark.slow]}
    return [
        pytest.param(case, id=f"{case[0]}-{'shared' if case[1] else 'local'}", marks=marks.get(case[0], []))
        for case in CASES
    ]


@pytest.mark.parametrize("case", _cases())
def test_every_engine_computes_the_same(case: tuple[str, bool], without_kept_casts: list[float]) -> None:
    """Norms are summed in another order, and engines that do not join projections round otherwise."""
    values, state, engine = train(case)
    if hasattr(engine, "_casts"):
        assert bool(engine._casts) is (case[0] == "ddp"), "gathered weights are cast anew"
    assert values == near(without_kept_casts, losses=0.03, norms=0.15)
    assert set(state) == {f"model.{name}" for name in engine.specs}, "names do not change"
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize("shared", [False, True])
def test_kept_casts_are_those_of_the_weights(shared: bool, without_kept_casts: list[float]) -> None:
    """Exactly, over steps and evaluations that change or re-read the weights."""
    expected = without_kept_casts
    if shared:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch_engine, "keep_casts", lambda model, in_place: [])
            expected = train(("ddp", True))[0]
    assert train(("ddp", shared))[0] == expected


def test_another_precision_gives_other_values_near_them(without_kept_casts: list[float]) -> None:
    values, *_ = train(("ddp", False), matmul_precision="bf16")
    assert values != without_kept_casts
    assert values == near(without_kept_casts, losses=0.1, norms=0.3)


@pytest.mark.parametrize("mode", [pytest.param("selective", marks=pytest.mark.slow), "full"])
def test_recomputation_changes_nothing(mode: str, without_kept_casts: list[float]) -> None:
    assert train(("ddp", False), activation_checkpointing=mode)[0] == pytest.approx(without_kept_casts, rel=1e-6)


def test_which_products_are_in_fp8() -> None:
    fp8 = {"first_bf16_layers": 1, "exclude": ["gate", "out_proj"]}
    *_, engine = train(("ddp", False), fp8=fp8, max_steps=3)
    named = dict(engine.module.named_modules())
    found = {name.removeprefix("layers.1.") for name, module in named.items() if isinstance(module, Fp8Linear)}
    assert found == {
        *("mamba.in_proj", "mamba.out_proj", "attention.q_proj", "attention.k_proj", "attention.v_proj"),
        *("attention.o_proj", "align.up", "align.down", "align.skip", "mlp.up", "mlp.down"),
    }
    in_proj = named["layers.1.mamba.in_proj"]
    assert in_proj.product.outputs([64, 64, 8]).bf16 == 1, "dt stays bf16"
    assert not any(isinstance(module, Fp32Parameters) for module in found)


def test_a_nan_of_one_pass_is_seen_there_and_changes_nothing() -> None:
    settings = TrainingConfig.model_validate(TRAINING | {"matmul_precision": "fp8"})
    with Layout("cpu") as layout:
        engine: Any = build.build_engine(tiny_config(), ParallelConfig(engine="ddp"), settings, layout)
        before = [tensor.clone() for tensor in engine.state_tensors().values()]
        for number in range(2):
            loss = engine.forward(micro_batch(ids(number))).loss_sum
            if number:
                # Not finite inside the model: the gradient of a block's output.
                loss = loss * torch.tensor(torch.nan)
            engine.backward(loss, last=number == 1)
        result = engine.step(0.1)
        assert result.skipped is not None and engine.finite_passes() == [True, False]
        assert all(map(torch.equal, before, engine.state_tensors().values()))
