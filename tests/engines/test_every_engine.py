"""What every engine owes training, on one process: clipping, giving up a step, loaded masters, what stays fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fusiontree.engines import build, torch_engine
from fusiontree.models.mixers.base import Fp32Parameters
from fusiontree.parallel.config import ParallelConfig
from fusiontree.parallel.layout import Layout
from fusiontree.training.config import TrainingConfig
from tests.engines.batches import micro_batch
from tests.engines.test_local import whole
from tests.helpers import tiny_config

pytestmark = [pytest.mark.xdist_group("zero")]

CASES = [("ddp", False), ("ddp", True), ("fsdp2", True), ("zero1", True), ("zero2", True), ("zero3", True)]
"""Engine, and whether its parameters are treated as shared with other ranks."""
EVERY_ENGINE = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{'shared' if case[1] else 'local'}")
IDS_BS = torch.arange(16)[None]


@contextmanager
def opened(case: tuple[str, bool], offload: str = "none", **training: Any) -> Iterator[Any]:
    """Build the engine on one process."""
    values = {"seq_len": 16, "max_steps": 3, "global_batch_size": 1, "micro_batch_size": 1, "precision": "fp32"}
    parallel: Any = ParallelConfig.model_validate({"engine": case[0], "offload": offload})
    with Layout("cpu") as layout, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_engine, "is_local", lambda mesh: not case[1])
        yield build.build_engine(tiny_config(), parallel, TrainingConfig.model_validate(values | training), layout)


def backward(engine: Any, factor: float = 1.0, *, last: bool) -> None:
    engine.backward(engine.forward(micro_batch(IDS_BS)).loss_sum * (factor / 16), last=last)


def state_of(engine: Any, kind: str) -> dict[str, torch.Tensor]:
    """Whole values of one kind of state by parameter."""
    found = engine.state_tensors().items()
    return {name.removeprefix(f"{kind}."): whole(t).clone() for name, t in found if name.startswith(f"{kind}.")}


def norm_of(values: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([v.double().square().sum() for v in values.values()]).sum().sqrt())


@EVERY_ENGINE
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_applied_gradient_is_unscaled_and_clipped(case: tuple[str, bool], precision: str) -> None:
    """The optimizer's first mean is a tenth of the gradient that it was given."""
    # A single pass leaves gradients of two types in mixed precision, and the sum of several is fp32.
    for limit, expected, passes in ((1e-2, 1e-2, 2), (1e3, None, 1), (0.0, None, 2)):
        with opened(case, precision=precision, max_grad_norm=limit) as engine:
            for left in reversed(range(passes)):
                backward(engine, last=not left)
            norm = engine.step(1e-3).grad_norm
            assert norm > 0.1
            given = norm_of(state_of(engine, "optimizer.exp_avg")) / (1 - 0.9)
            assert given == pytest.approx(norm if expected is None else expected, rel=1e-4)


@EVERY_ENGINE
def test_both_groups_of_parameters_move_at_the_given_rate(case: tuple[str, bool]) -> None:
    """AdamW's first step is the rate in size wherever there is a gradient; decay is added to matrices alone."""
    rate, decay = 3e-3, 0.5  # not the default of torch
    with opened(case, weight_decay=decay) as engine:
        before = state_of(engine, "model")
        backward(engine, last=True)
        engine.step(rate)
        after, mean = state_of(engine, "model"), state_of(engine, "optimizer.exp_avg")
    for name, decays in (("layers.0.norm.weight", False), ("layers.0.out_proj.weight", True)):
        moved = before[name] * (1 - rate * decay if decays else 1.0) - after[name]
        clear = mean[name].abs() > 1e-6
        assert clear.any()
        torch.testing.assert_close(moved[clear].abs(), torch.full_like(moved[clear], rate), rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    ("case", "offload"),
    [*((case, "none") for case in CASES), *((case, "optimizer") for case in CASES if case[0].startswith("zero"))],
    ids=lambda value: value if isinstance(value, str) else f"{value[0]}-{'shared' if value[1] else 'local'}",
)
def test_a_step_that_is_given_up_leaves_nothing(case: tuple[str, bool], offload: str) -> None:
    """In CPU memory a later pass of a step adds to the gradients that the earlier ones left there."""
    with opened(case, offload) as engine:
        backward(engine, last=True)
        wanted = engine.step(0.0).grad_norm
        before = state_of(engine, "model")
        backward(engine, 5.0, last=True)
        engine.discard()
        backward(engine, 7.0, last=False)
        engine.discard()
        backward(engine, last=True)
        assert engine.step(0.0).grad_norm == pytest.approx(wanted, rel=1e-6)
        assert engine.finite_passes() == [True]
        assert engine.state_dict()["optimizer_step"] == 2
        assert all(torch.equal(values, before[name]) for name, values in state_of(engine, "model").items())


@EVERY_ENGINE
def test_loaded_values_are_those_that_the_next_pass_reads(case: tuple[str, bool]) -> None:
    with opened(case) as engine:
        tensors = engine.state_tensors()
        engine.evaluate(micro_batch(IDS_BS))  # so that nothing but the load says that they have changed
        for name, tensor in tensors.items():
            if name.startswith("model."):
                for _, piece in getattr(tensor, "pieces", None) or [(None, getattr(tensor, "_local_tensor", tensor))]:
                    piece.detach().zero_()
        engine.load_state_dict({"optimizer_step": 7})
        assert engine.state_dict()["optimizer_step"] == 7
        uniform = 16 * torch.log(torch.tensor(64.0))  # all logits are zero
        assert float(engine.evaluate(micro_batch(IDS_BS))) == pytest.approx(float(uniform), rel=1e-6)


@EVERY_ENGINE
def test_the_state_space_and_the_last_norm_stay_fp32(case: tuple[str, bool]) -> None:
    seen: dict[str, set[torch.dtype]] = {"kept": set(), "other": set()}
    with opened(case, precision="fp16") as engine:

        def note(module: Any, inputs: Any) -> None:
            kind = "kept" if isinstance(module, Fp32Parameters) or module is engine.module.norm else "other"
            for leaf in ("weight", "A_log", "D", "dt_bias"):
                value = getattr(module, leaf, None)
                if isinstance(value, torch.Tensor) and value.numel():
                    seen[kind].add(value.dtype)

        for module in engine.module.modules():
            module.register_forward_pre_hook(note)
        engine.evaluate(micro_batch(IDS_BS))
    assert seen == {"kept": {torch.float32}, "other": {torch.float16}}


@EVERY_ENGINE
def test_token_scores_add_up_to_the_loss(case: tuple[str, bool]) -> None:
    with opened(case) as engine:
        backward(engine, last=True)
        engine.step(1e-2)
        labels_BS = IDS_BS.roll(-1, 1).masked_fill(IDS_BS < 5, -100)
        micro = micro_batch(IDS_BS, labels_BS=labels_BS)
        total, scores = engine.evaluate(micro), engine.score(micro, torch.tensor([], dtype=torch.int64))
        assert engine.module.training
    assert scores.log_likelihood.shape == scores.chosen.shape == (1, 16)
    assert not scores.log_likelihood[0, :5].any()
    assert -float(scores.log_likelihood.sum()) == pytest.approx(float(total), rel=1e-5)
