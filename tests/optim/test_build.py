"""Every setting of an optimizer reaches the update; compared with the update as its paper writes it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fusiontree.optim.build import build_optimizer, fill_states, new_states, parameter_groups, scaled_step
from fusiontree.optim.config import OPTIMIZERS, AdamWSettings

START, GRADIENTS, RATE, DECAY = 0.5, (0.02, -0.01, 0.03), 0.1, 0.25


def adamw(settings: AdamWSettings, decay: float) -> float:
    """Loshchilov and Hutter 2019, Algorithm 2, for one number."""
    value, mean, square = START, 0.0, 0.0
    for step, gradient in enumerate(GRADIENTS, 1):
        mean = settings.beta1 * mean + (1 - settings.beta1) * gradient
        square = settings.beta2 * square + (1 - settings.beta2) * gradient**2
        unbiased_mean, unbiased_square = mean / (1 - settings.beta1**step), square / (1 - settings.beta2**step)
        value -= RATE * (unbiased_mean / (math.sqrt(unbiased_square) + settings.eps) + decay * value)
    return value


def trained(settings: AdamWSettings, divisor: float = 1.0, norm: float = 1.0) -> tuple[list[Tensor], Any]:
    """Return a decayed and a plain number after the steps; gradients arrive ``divisor`` times too large."""
    tensors = [torch.full((4,), START) for _ in range(2)]
    spec = OPTIMIZERS.get(settings.name)
    optimizer = build_optimizer(settings, parameter_groups(tensors[:1], tensors[1:], DECAY))
    for tensor in tensors:
        fill_states(optimizer, tensor, new_states(spec, tensor))
    for gradient in GRADIENTS:
        for group in optimizer.param_groups:
            group["lr"] = RATE
        for tensor in tensors:
            tensor.grad = torch.full((4,), gradient * divisor)
        scaled_step(optimizer, spec, torch.tensor(divisor), torch.tensor(norm))
    return tensors, optimizer


@pytest.mark.parametrize(
    "given",
    [{}, {"eps": 0.05}, {"eps": 1e-3}, {"beta1": 0.5}, {"beta2": 0.6}, {"beta1": 0.0, "beta2": 0.999, "eps": 1.0}],
    ids=str,
)
def test_adamw_uses_each_of_its_settings(given: dict[str, float]) -> None:
    settings = AdamWSettings.model_validate(given)
    (decayed, plain), _ = trained(settings)
    torch.testing.assert_close(decayed, torch.full((4,), adamw(settings, DECAY)), rtol=1e-6, atol=0)
    torch.testing.assert_close(plain, torch.full((4,), adamw(settings, 0.0)), rtol=1e-6, atol=0)
    if given:  # the comparison would see a setting that is ignored
        assert abs(adamw(settings, DECAY) - adamw(AdamWSettings(), DECAY)) > 1e-3


def test_gradients_are_divided_before_the_states_see_them() -> None:
    settings = AdamWSettings(eps=0.05)
    ours, theirs = trained(settings, divisor=1024.0), trained(settings)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)
    states = [[optimizer.state[tensor]["exp_avg_sq"] for tensor in tensors] for tensors, optimizer in (ours, theirs)]
    torch.testing.assert_close(*states, rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", [math.inf, -math.inf, math.nan])
def test_a_norm_that_is_no_number_changes_nothing(norm: float) -> None:
    tensors, optimizer = trained(AdamWSettings(), norm=norm)
    for tensor in tensors:
        assert torch.equal(tensor, torch.full((4,), START))
        state = optimizer.state[tensor]
        assert not state["exp_avg"].any() and not state["exp_avg_sq"].any() and state["step"] == 0


def test_groups_without_tensors_are_left_out() -> None:
    tensor = torch.zeros(1)
    assert parameter_groups([tensor], [], DECAY) == [{"params": [tensor], "weight_decay": DECAY}]
    assert parameter_groups([], [tensor], DECAY) == [{"params": [tensor], "weight_decay": 0.0}]
